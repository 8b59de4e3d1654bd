# %% [markdown]
# # Lesson 7: Pretraining, and what grows with size
#
# **You need** lessons 4 and 6. **You get** a model trained from random weights, three times, in three sizes; the
# curve that tells how much a larger one would gain; and an ability that the smallest model does not have at all.
#
# Pretraining is lesson 1's loss, lesson 2's descent and lesson 6's model, on as much text as there is. Nothing is
# labelled: the next character *is* the label.

# %%
import math
import time

import torch
from lesson import cell, choose, plot, shakespeare, try_exercise
from torch import Tensor

llama = cell("06_transformer", "model")
train, held_out = shakespeare()
alphabet = sorted(set(train + held_out))
number_of = {character: number for number, character in enumerate(alphabet)}
train_ids, held_ids = (torch.tensor([number_of[c] for c in text]) for text in (train, held_out))
T = 48  # characters that the model sees at once
print(f"{len(train_ids):,} characters to train on, {len(held_ids):,} held out")

# %% [markdown]
# ## Two kinds of rows
#
# The text is Shakespeare. Beside it the models see riddles, for a question that the text answers badly: *what can a
# model do with what stands in its own context?* A riddle is twelve random letters, one of which is a `!`, then a
# `?`, and then the letter that stood right of the `!`. No table of pairs can know it, since the letters are new in
# each row.


# %%
def rows(ids: Tensor, count: int) -> Tensor:
    """(count, T + 1), each from a random place of the text."""
    return ids[torch.randint(len(ids) - T, (count, 1)) + torch.arange(T + 1)]


LETTERS = torch.tensor([number_of[c] for c in "abcdefghijklmnop"])


def riddles(count: int) -> tuple[Tensor, Tensor]:
    """(count, 14) riddles, and their labels: the answer, and -100 ("learn nothing here") everywhere else."""
    ids, every = LETTERS[torch.randint(16, (count, 14))], torch.arange(count)
    place = torch.randint(0, 11, (count,))
    ids[every, place], ids[:, 12] = number_of["!"], number_of["?"]
    ids[:, 13] = ids[every, place + 1]
    labels = ids.clone()
    labels[:, :13] = -100
    return ids, labels


print("".join(alphabet[i] for i in riddles(1)[0][0]))

# %% [markdown]
# ## One knob for size
#
# `depth` layers, width 16 · (depth + 1), heads of 16 numbers. One more layer makes everything larger at once, so
# that no part is the bottleneck.
#
# The training loop has what every pretrainer uses: **AdamW**; a learning rate that *warms up* (the first gradients
# of a random model point anywhere) and then falls along a half *cosine* to zero; and a *clipped gradient*, so that
# one odd batch cannot throw the model away.


# %%
def config_of(depth: int):
    width = 16 * (depth + 1)
    return llama.Config(len(alphabet), width, 3 * width, depth, width // 16, width // 16)


def rate(step: int, steps: int, peak: float = 8e-3, warmup: int = 30) -> float:
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


HELD = choose(200, 30)  # rows of the held-out text that are measured


@torch.no_grad()
def measure(model) -> tuple[float, float]:
    """(bits a held-out character, share of new riddles that it solves)."""
    bits = model.loss(held_ids[: HELD * (T + 1)].view(HELD, T + 1)).item() / math.log(2)
    ids, _ = riddles(choose(500, 100))
    return bits, (model(ids)[:, 12].argmax(-1) == ids[:, 13]).float().mean().item()


def pretrain(depth: int, steps: int) -> dict:
    torch.manual_seed(0)
    model = llama.Llama(config_of(depth))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.01)
    curve, begin = [], time.perf_counter()
    for step in range(steps + 1):
        if step % (steps // choose(10, 2)) == 0:
            curve.append((step, *measure(model)))
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        loss = model.loss(rows(train_ids, 24)) + model.loss(*riddles(32))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    parameters = sum(weight.numel() for weight in model.parameters())
    seconds = time.perf_counter() - begin
    _, bits, solved = curve[-1]
    print(f"depth {depth}: {parameters:7,} parameters, {bits:.3f} bits a character, {seconds:.0f} s")
    return {"parameters": parameters, "curve": curve, "bits": bits, "solved": solved}


STEPS = choose(400, 20)
runs = {depth: pretrain(depth, STEPS) for depth in (1, 2, 3)}
sizes, losses = [run["parameters"] for run in runs.values()], [run["bits"] for run in runs.values()]
assert all(
    abs(run["curve"][0][1] - math.log2(len(alphabet))) < 0.15 for run in runs.values()
)  # a fresh model knows nothing
assert all(run["bits"] < choose(3.58, 5.5) for run in runs.values())  # better than counting pairs (lesson 1)

# %% [markdown]
# ## The scaling curve
#
# Loss against size, both on logarithmic axes, is close to a straight line: $L \approx a\,N^{-b}$. That is why
# laboratories train small models first: three small ones tell what a large one will be worth. (The line holds while
# the data last, and for models that train long enough; ours, with 400 steps, are far from that.)

# %%
logs = torch.tensor([[math.log(n), math.log(loss)] for n, loss in zip(sizes, losses, strict=True)])
centred = logs - logs.mean(0)
slope = ((centred[:, 0] * centred[:, 1]).sum() / (centred[:, 0] ** 2).sum()).item()
print(f"each doubling of the parameters multiplies the loss by {2**slope:.3f}")
if choose(True, False):  # after 30 steps a larger model need not be ahead
    assert losses == sorted(losses, reverse=True)
    assert 0.85 < 2**slope < 1


def draw(axes) -> None:
    axes.loglog(sizes, losses, "o-")
    axes.set(xlabel="parameters", ylabel="bits a held-out character", title="Scaling")


plot("07_scaling", draw)

# %% [markdown]
# Compute, not size, is what one pays for: about $6 N D$ operations for $N$ parameters and $D$ tokens (2 for the way
# forwards, 4 for the way back). For a given sum, the best size grows with it: about 20 tokens a parameter (Hoffmann
# et al. 2022). Ours saw:

# %%
for depth, run in runs.items():
    tokens = STEPS * 24 * T
    operations = 6 * run["parameters"] * tokens
    print(f"depth {depth}: {tokens / run['parameters']:.1f} tokens a parameter, {operations:.1e} operations")

# %% [markdown]
# ## An ability that appears with size
#
# Now the riddles:

# %%
abilities = [run["solved"] for run in runs.values()]
print("riddles solved:", {depth: round(run["solved"], 2) for depth, run in runs.items()})
assert abilities[0] < 0.3
if choose(True, False):  # 20 steps are too few
    assert abilities[1] > 0.9
    assert abilities[2] > 0.9


def draw(axes) -> None:
    for depth, run in runs.items():
        axes.plot(
            [step for step, _, _ in run["curve"]], [solved for _, _, solved in run["curve"]], label=f"depth {depth}"
        )
    axes.set(xlabel="step", ylabel="riddles solved", title="An ability that one layer does not have")
    axes.legend()


plot("07_ability", draw)

# %% [markdown]
# The loss fell smoothly with size. The riddles did not: one layer guesses, two layers know. Why? The answer takes
# two looks, one after the other. First each letter has to find out what stands left of it; only then can the `?`
# look for the letter that has a `!` on its left. All looks of one layer happen at the same moment, so one layer
# cannot do it, however long it is trained. The same pair of looks, called an *induction head*, lets large models go
# on with a pattern that they have only just been shown.
#
# A warning, since much is said about *emergence*: other abilities only seem to appear suddenly, because they are
# measured by everything being right at once. A name of ten letters is right with probability $p^{10}$: 0.01 at $p =
# 0.63$, 0.35 at $p = 0.9$.

# %%
assert abs(0.63**10 - 0.01) < 0.001
assert abs(0.9**10 - 0.35) < 0.01

# %% [markdown]
# **For real:** `python -m finetune_kit run pretrain` (`recipes/pretrain.py`) does all of this on the whole text: it
# trains a tokenizer (lesson 4), makes a Llama by the one knob `model.depth`, and moves its matrices by Muon and the
# rest by AdamW. `python -m finetune_kit check pretrain` tells tokens a parameter and operations before. The rule of
# sizes is in `finetune_kit.models.new.shape_of`. The rates of a schedule come from transformers by name
# (`train.lr_scheduler_type`, `train.warmup_steps`); the arguments of the loop are put together in
# `finetune_kit.training.build.build`, and the loop runs in `finetune_kit.training.fit.fit`. The text itself is read in
# `finetune_kit.data.files.read_txt`.
#
# ## Exercise
#
# A cosine must know in advance when training ends. *Warmup, stable, decay* (WSD) need not: it rises for `warmup`
# steps, stays, and falls to nearly zero in the last `decay` steps. Write `exercise(step, steps, warmup, decay)`,
# the factor of the rate at steps 0 to `steps - 1`: `(step + 1) / warmup` while it rises, `(steps - step) / decay`
# while it falls, never above 1.


# %%
def exercise(step: int, steps: int, warmup: int, decay: int) -> float:
    raise NotImplementedError("warmup, stable, decay")


def check(exercise) -> None:
    factors = [exercise(step, 100, 10, 20) for step in range(100)]
    assert abs(factors[0] - 0.1) < 1e-12
    assert factors[9:81] == [1.0] * 72
    assert abs(factors[-1] - 0.05) < 1e-12
    assert factors[80:] == sorted(factors[80:], reverse=True)
    assert all(exercise(step, 1000, 10, 20) == exercise(step, 100, 10, 20) for step in range(80))  # the end is open


try_exercise(check, exercise)
