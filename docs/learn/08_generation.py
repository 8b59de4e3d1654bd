# %% [markdown]
# # Lesson 8: Generation
#
# **You need** lesson 6. **You get** every knob of a chat window, written by hand and equal to `transformers`:
# temperature, top-k, top-p, repetition penalty; and the KV cache, which changes nothing but the time.
#
# A language model gives a distribution. Writing means: draw a token from it, append it, ask again. All the knobs
# below change the distribution a little before the draw.
#
# First we need a model that has something to say. Here is our Llama with random weights, trained for a minute on
# Shakespeare, byte by byte. (Lesson 7 does this in earnest.)

# %%
import math
import tempfile
from collections import Counter
from pathlib import Path

import torch
from lesson import cell, choose, plot, shakespeare, try_exercise
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from finetune_kit.models.tiny import write_tiny_model

logging.disable_progress_bar()
llama = cell("06_transformer", "model")
with tempfile.TemporaryDirectory() as folder:
    write_tiny_model(Path(folder))
    theirs, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
model = llama.Llama(llama.Config(vocab_size=len(tokenizer)))
text = shakespeare()[0][: choose(500_000, 50_000)]
ids = torch.tensor(tokenizer(text)["input_ids"])  # one token a byte
assert len(ids) == len(text)

torch.manual_seed(0)
optimizer, steps = torch.optim.AdamW(model.parameters(), lr=5e-3), choose(400, 60)
for step in range(steps):
    optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
    loss = model.loss(ids[torch.randint(len(ids) - 64, (16, 1)) + torch.arange(64)])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss:.2f} nats a byte; ln {len(tokenizer)} = {math.log(len(tokenizer)):.2f}")
assert loss < choose(2.2, 3.3)
model.eval()

# %% [markdown]
# ## Greedy, with and without a cache
#
# The simplest way takes the most likely token each time. To write token $n$ the plain loop sends all $n$ tokens
# through the model again, though nothing about the earlier ones has changed: in a causal model they cannot see the
# new one. The *KV cache* keeps their keys and values, so that only the new token has to be computed. For $n$ tokens
# that is $n$ token passes instead of $n(n+1)/2$, and the same result.


# %%
@torch.no_grad()
def greedy(prompt: list[int], count: int, cached: bool) -> tuple[list[int], Tensor, int]:
    """(tokens, the logits that each was taken from, how many tokens went through the model)."""
    written, rows, passed = list(prompt), [], 0
    caches: list[dict] | None = [{} for _ in model.model.layers] if cached else None
    new = written
    for _ in range(count):
        given = new if cached else written
        logits = model(torch.tensor([given]), caches)[0, -1]
        passed += len(given)
        new = [int(logits.argmax())]
        written, rows = written + new, [*rows, logits]
    return written[len(prompt) :], torch.stack(rows), passed


prompt = tokenizer("ROMEO:\n")["input_ids"]
COUNT = choose(150, 40)
plain, plain_logits, plain_passes = greedy(prompt, COUNT, cached=False)
cached, cached_logits, cached_passes = greedy(prompt, COUNT, cached=True)
difference = (plain_logits - cached_logits).abs().max().item()
print(f"{plain_passes:,} token passes without a cache, {cached_passes} with one; logits differ by {difference:.1e}")
print(tokenizer.decode(plain))
assert plain == cached
assert difference < 1e-4
assert cached_passes == len(prompt) + COUNT - 1

# %% [markdown]
# It repeats itself. The most likely continuation of a sentence that has come before is the same sentence once more,
# and a greedy loop never gets out. So we draw.
#
# ## Temperature
#
# $p_i \propto e^{z_i / T}$. At $T = 1$ the model's own distribution; below 1 it is sharpened, towards greedy at 0;
# above 1 it is flattened, towards a uniform one. The entropy $-\sum p \log p$ says how many choices are really
# open: $e^{H}$.


# %%
def entropy(p: Tensor) -> float:
    return -(p * p.clamp(min=1e-30).log()).sum().item()


logits = plain_logits[10]
temperatures = [0.1, 0.5, 0.7, 1.0, 1.5, 3.0]
entropies = [entropy((logits / t).softmax(-1)) for t in temperatures]
for t, nats in zip(temperatures, entropies, strict=True):
    print(f"temperature {t:.1f}: {math.exp(nats):6.2f} open choices")
assert entropies == sorted(entropies)
assert (logits / 0.01).softmax(-1).max() > 0.999
assert abs(entropy((logits / 1000).softmax(-1)) - math.log(len(tokenizer))) < 0.01

# %% [markdown]
# ## Top-k and top-p
#
# The tail of the distribution has hundreds of tokens, each unlikely, but together likely enough to derail a text
# every few words. **Top-k** keeps the $k$ most likely. **Top-p** (nucleus) keeps as many as are needed to make up a
# probability of $p$: few where the model is sure, many where it is not. What is cut off gets $-\infty$.
#
# The **repetition penalty** divides the positive logits of tokens that occurred by a number above 1, and multiplies
# the negative ones.


# %%
def top_k(logits: Tensor, k: int) -> Tensor:
    least = logits.topk(k).values[-1]
    return logits.masked_fill(logits < least, -math.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    ordered, places = logits.sort(descending=True)
    chances = ordered.softmax(-1)
    before = chances.cumsum(-1) - chances  # the mass of the more likely ones
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(0, places, before >= p), -math.inf)


def penalise(logits: Tensor, seen: list[int], penalty: float) -> Tensor:
    logits, at = logits.clone(), torch.tensor(sorted(set(seen)))
    logits[at] = torch.where(logits[at] > 0, logits[at] / penalty, logits[at] * penalty)
    return logits


from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

for row in plain_logits[:30]:
    one, seen = row[None], torch.tensor([plain])
    assert torch.equal(top_k(row, 20), TopKLogitsWarper(20)(seen, one)[0])
    assert torch.equal(top_p(row, 0.9), TopPLogitsWarper(0.9)(seen, one)[0])
    assert torch.allclose(penalise(row, plain, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(seen, one.clone())[0])
kept = [int(top_p(row, 0.9).isfinite().sum()) for row in plain_logits]
print(f"top-p 0.9 keeps between {min(kept)} and {max(kept)} of {len(tokenizer)} tokens")
assert choose(min(kept) < max(kept), True)  # after 60 steps the model is equally unsure everywhere

# %% [markdown]
# ## Drawing
#
# A draw from $p$: divide each $p_i$ by a random number of the exponential distribution and take the largest. It is
# what `torch.multinomial` does inside, and what this package does, without the checks for which a GPU would be
# waited for.

# %%
from finetune_kit.generation.cache import pick

chances = logits.softmax(-1)[None]
torch.manual_seed(3)
drawn = [torch.multinomial(chances, 1).item() for _ in range(50)]
torch.manual_seed(3)
assert drawn == [pick(chances).item() for _ in range(50)]


@torch.no_grad()
def sample(prompt: list[int], count: int, change=lambda logits, seen: logits, seed: int = 0) -> list[int]:
    torch.manual_seed(seed)
    written, new, caches = list(prompt), list(prompt), [{} for _ in model.model.layers]
    for _ in range(count):
        scores = change(model(torch.tensor([new]), caches)[0, -1], written)
        new = [pick(scores.softmax(-1)[None]).item()]
        written += new
    return written[len(prompt) :]


def repeated(tokens: list[int], n: int = 8) -> float:
    """Share of the runs of n tokens that came before."""
    runs = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    return 1 - len(runs) / runs.total()


ways = {
    "temperature 1": lambda logits, seen: logits,
    "temperature 0.5": lambda logits, seen: logits / 0.5,
    "top-k 5": lambda logits, seen: top_k(logits, 5),
    "top-p 0.8": lambda logits, seen: top_p(logits, 0.8),
    "temperature 2": lambda logits, seen: logits / 2,
}
shares = {"greedy": repeated(plain)}
for name, change in ways.items():
    tokens = sample(prompt, COUNT, change)
    shares[name] = repeated(tokens)
    print(f"--- {name}\n{tokenizer.decode(tokens)[:90]!r}")
print("share of repeated runs of 8 bytes:", {name: round(share, 2) for name, share in shares.items()})
assert shares["greedy"] > 0.3
assert all(share < shares["greedy"] - 0.2 for name, share in shares.items() if name != "greedy")


def draw(axes) -> None:
    ordered = chances[0].sort(descending=True).values
    for t in (0.5, 1.0, 2.0):
        likely = (logits / t).softmax(-1).sort(descending=True).values[:60]
        axes.plot(range(1, 61), likely.tolist(), label=f"temperature {t}")
    axes.axvline(int((ordered.cumsum(0) < 0.9).sum()) + 1, color="k", linestyle=":", label="top-p 0.9")
    axes.set(xlabel="token, most likely first", ylabel="probability", yscale="log", title="One step")
    axes.legend()


plot("08_generation", draw)

# %% [markdown]
# ## The same words from the package
#
# Our weights fit into `transformers` (lesson 6). The package's `generate` then writes the same words, greedy and
# with a penalty.

# %%
from finetune_kit.generation.generate import generate

theirs.load_state_dict(model.state_dict())
(answer,) = generate(theirs, tokenizer, [prompt], max_new_tokens=COUNT, end_token_ids=[])
assert answer.ids == plain
two = generate(theirs, tokenizer, [prompt, prompt[:3]], max_new_tokens=20, end_token_ids=[])
assert two[0].ids == plain[:20]  # a shorter neighbour in the batch changes nothing
penalised, caches, new = list(prompt), [{} for _ in model.model.layers], list(prompt)
for _ in range(30):
    with torch.no_grad():
        new = [int(penalise(model(torch.tensor([new]), caches)[0, -1], penalised, 1.2).argmax())]
    penalised += new
(answer,) = generate(theirs, tokenizer, [prompt], max_new_tokens=30, end_token_ids=[], repetition_penalty=1.2)
assert answer.ids == penalised[len(prompt) :]
print("the package's generate: the same tokens")

# %% [markdown]
# **For real:** `python -m finetune_kit generate RUN "a prompt"` writes with the model of a run. The recipe
# `recipes/lora_sft.py` makes one. The settings are read in `finetune_kit.runs.answering.Decoding`, the batches are
# written in `finetune_kit.generation.generate.generate`, the loop with its cache is
# `finetune_kit.generation.decoding.decode`, and a draw is `finetune_kit.generation.cache.pick`.
#
# ## Exercise
#
# *Min-p* keeps the tokens whose probability is at least `p` times that of the most likely one. Write
# `exercise(logits, p)`; what is cut off gets minus infinity. The test compares with `transformers`.


# %%
def exercise(logits: Tensor, p: float) -> Tensor:
    raise NotImplementedError("write min-p")


def check(exercise) -> None:
    from transformers import MinPLogitsWarper

    for row in plain_logits[:20]:
        for p in (0.02, 0.1, 0.5):
            kept = exercise(row, p).isfinite()
            assert torch.equal(kept, MinPLogitsWarper(p)(None, row[None])[0].isfinite())


try_exercise(check, exercise)
