# %% [markdown]
# # Lesson 9: Supervised fine-tuning, and what the mask does
#
# **You need** lesson 6. **You get** the step from a model that continues text to one that answers: a chat template,
# a mask of labels, and three trained models that differ in nothing but that mask.
#
# Fine-tuning on conversations (SFT) uses the loss of lesson 1 and nothing else. All the care goes into *which
# tokens it is taken over*. A conversation becomes one row of tokens, with *special tokens* that part the turns:
#
#     <|im_start|>user\nshout: hello<|im_end|>\n<|im_start|>assistant\nHELLO<|im_end|>\n
#
# The model should learn to write `HELLO<|im_end|>`. It should not learn to write what users say: it will never have
# to. And it must learn the `<|im_end|>`: that is how it stops.

# %%
import random
import tempfile
from pathlib import Path

import torch
from lesson import cell, choose, plot, try_exercise
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

from finetune_kit.models.tiny import write_tiny_model

llama = cell("06_transformer", "model")
logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_model(Path(folder)))
END = tokenizer.convert_tokens_to_ids("<|im_end|>")
IGNORED = -100  # cross_entropy leaves out rows with this label

# %% [markdown]
# ## The rows
#
# The task: write a word of five letters in capitals. The letters are drawn at random, so nobody can guess what a
# user will ask, only what the answer must be.


# %%
def conversation(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"shout: {word}"}, {"role": "assistant", "content": word.upper()}]


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=5)) for _ in range(count)]


def encode(word: str) -> tuple[list[int], list[int]]:
    """(ids, labels): labels are the ids of the answer with its end token, and -100 elsewhere."""
    turns = conversation(word)
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    end = len(prompt) + ids[len(prompt) :].index(END) + 1  # the end token is part of the answer
    assert ids[: len(prompt)] == prompt  # what the model is asked with later is what it was trained with
    return ids, [IGNORED] * len(prompt) + ids[len(prompt) : end] + [IGNORED] * (len(ids) - end)


ids, labels = encode("hello")
for token, label in zip(ids[-14:], labels[-14:], strict=True):
    print(f"{tokenizer.decode([token])!r:16} {'trained' if label != IGNORED else '-'}")
trained = [label for label in labels if label != IGNORED]
print(f"{len(trained)} of {len(ids)} tokens are trained on: {tokenizer.decode(trained)!r}")
assert tokenizer.decode(trained) == "HELLO<|im_end|>"

# %% [markdown]
# The package finds the same mask, for any chat template:

# %%
from finetune_kit.data.chat import samples_of
from finetune_kit.data.records import PromptCompletion
from finetune_kit.settings.schema import DataConfig

(theirs,) = samples_of(PromptCompletion("row 1", conversation("hello")), tokenizer, DataConfig())
assert (list(theirs.input_ids), list(theirs.labels)) == (ids[: len(theirs.input_ids)], labels[: len(theirs.labels)])
assert all(label == IGNORED for label in labels[len(theirs.labels) :])  # the line break after the answer

# %% [markdown]
# ## Three masks
#
# - **answers**: as above.
# - **everything**: no mask, the label of each token is the token. This is what you get from many tools if you do
#   not look.
# - **no end**: answers, but the end token is masked. It happens when the pad token is the end token and padding is
#   masked *by its id*: the commonest bug of home-made fine-tuning.


# %%
def rows(words: list[str]) -> tuple[Tensor, Tensor]:
    """(ids, labels) of many words; all rows are of one length here, so no padding is needed."""
    pairs = [encode(word) for word in words]
    return torch.tensor([ids for ids, _ in pairs]), torch.tensor([labels for _, labels in pairs])


train_words = words(choose(4000, 500), seed=0)
held_words = [word for word in words(choose(200, 50), seed=1) if word not in train_words]  # never trained on
(train_ids, train_labels), (held_ids, held_labels) = rows(train_words), rows(held_words)
answers_start = int((held_labels[0] != IGNORED).nonzero()[0])
MASKS = {
    "answers": train_labels,
    "everything": train_ids,
    "no end": train_labels.masked_fill(train_labels == END, IGNORED),
}
STEPS = choose(120, 20)


def fine_tune(labels: Tensor) -> tuple[torch.nn.Module, list[tuple[int, float]]]:
    """(model, its curve of the held-out loss of answers)."""
    torch.manual_seed(0)
    model = llama.Llama(llama.Config(vocab_size=len(tokenizer)))
    optimizer, curve = torch.optim.AdamW(model.parameters(), lr=4e-3), []
    for step in range(STEPS + 1):
        if step % (STEPS // 10) == 0:
            with torch.no_grad():
                curve.append((step, model.loss(held_ids, held_labels).item()))
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / (STEPS + 1))
        rows = torch.randint(len(train_ids), (16,))
        loss = model.loss(train_ids[rows], labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval(), curve


@torch.no_grad()
def answer(model: torch.nn.Module, prompts: Tensor, count: int = 12) -> list[list[int]]:
    """Greedy answers, each up to its end token and with it, or `count` tokens long."""
    written, new, caches = [], prompts, [{} for _ in model.model.layers]
    for _ in range(count):
        new = model(new, caches)[:, -1:].argmax(-1)
        written.append(new)
    found = torch.cat(written, dim=1).tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in found]


models, curves, results = {}, {}, {}
for name, labels in MASKS.items():
    models[name], curves[name] = fine_tune(labels)
    found = answer(models[name], held_ids[:, :answers_start])
    wanted = [[token for token in row if token != IGNORED] for row in held_labels.tolist()]
    with torch.no_grad():
        prompt_loss = models[name].loss(held_ids[:, :answers_start]).item()
    results[name] = {
        "right": sum(ours[:5] == truth[:5] for ours, truth in zip(found, wanted, strict=True)) / len(wanted),
        "ended": sum(row[-1] == END for row in found) / len(found),
        "answer loss": curves[name][-1][1],
        "prompt loss": prompt_loss,
    }
    print(
        f"{name:11}", {key: round(value, 3) for key, value in results[name].items()}, repr(tokenizer.decode(found[0]))
    )


def draw(axes) -> None:
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=f"trained on: {name}")
    axes.set(xlabel="step", ylabel="held-out loss of the answers, nats/token", title="What the mask does", yscale="log")
    axes.legend()


plot("09_sft", draw)
answers, everything, no_end = (results[name] for name in MASKS)
assert answers["prompt loss"] > everything["prompt loss"] + 1  # the mask: nothing was learned about users
assert no_end["ended"] == 0  # it never stops
assert answers["ended"] > 0.9
assert answers["answer loss"] < everything["answer loss"]
if choose(True, False):  # 20 steps are too few to be right
    assert answers["right"] > 0.95
    assert no_end["right"] > 0.95
    assert answers["right"] > everything["right"] + 0.1

# %% [markdown]
# What the three show:
#
# - Trained on answers, the model shouts all words rightly after 120 steps, and stops.
# - Trained on everything, it has *also* learned to speak as the user: the loss of prompts is far lower. Part of
#   each step went into letters that nobody can predict (no model gets below $\ln 16 = 2.77$ nats there), so the
#   answers come later.
# - Without the end token the answers are the same, and never end. In a chat it would continue talking, or speak for
#   the user.
#
# How much of the loss would have gone to the prompt?

# %%
share = (train_labels == IGNORED).float().mean().item()
print(f"{share:.0%} of all tokens are not part of an answer")
assert share > 0.8

# %% [markdown]
# **For real:** `python -m finetune_kit run lora_sft data.path=my_chats.jsonl` (`recipes/lora_sft.py`, and
# `recipes/full_sft.py` for all weights). The mask comes from the model's own chat template, in
# `finetune_kit.data.chat.samples_of`; rows become columns in `finetune_kit.data.tokenise.supervised`. `python -m
# finetune_kit check lora_sft` shows, before any training, which tokens of your rows are trained. And the report
# of a run counts the answers that end by themselves.
#
# ## Exercise
#
# Make a batch of rows of different lengths: `exercise(rows, pad)` gets pairs (ids, labels) and returns two tensors,
# padded on the right: ids with `pad`, labels with -100. The catch is in the test: `pad` is the end token.


# %%
def exercise(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("pad the batch")


def check(exercise) -> None:
    ids, labels = exercise([([5, 6, 7, 9], [-100, 6, 7, 9]), ([5, 9], [-100, 9])], pad=9)
    assert ids.tolist() == [[5, 6, 7, 9], [5, 9, 9, 9]]
    assert labels.tolist() == [[-100, 6, 7, 9], [-100, 9, -100, -100]]  # the end is trained once in each row
    ids, labels = exercise([encode("abcde"), encode("hello")], pad=0)
    assert torch.equal(ids[1], torch.tensor(encode("hello")[0]))


try_exercise(check, exercise)
