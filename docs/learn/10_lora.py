# %% [markdown]
# # Lesson 10: LoRA and QLoRA by hand
#
# **You need** lessons 3 and 6. **You get** the trick that lets a laptop tune a model: a low-rank update beside frozen
# weights, proof that it can be merged, the four-bit number format under QLoRA, and the answer to "which rank?".
#
# ## A matrix that changes little
#
# Full fine-tuning moves every number of a matrix $W$ (out × in). LoRA freezes $W$ and trains two thin matrices
# beside it:
#
# $$W' = W + \frac{\alpha}{r} B A, \qquad A : r \times \text{in}, \quad B : \text{out} \times r$$
#
# A product of two thin matrices has rank at most $r$: it can only write $r$ different directions. The bet of LoRA
# is that a task needs few. $B$ starts at zero, so training starts exactly at the base model; $A$ starts at random,
# since if both were zero no derivative would ever leave zero.

# %%
import math

import torch
from lesson import choose, plot, try_exercise
from torch import Tensor, nn

torch.manual_seed(0)


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank update."""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.A.T @ self.B.T)  # two thin products, never B A

    def merged(self) -> nn.Linear:
        """One plain layer that does the same."""
        layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False)
        layer.weight = nn.Parameter(self.base.weight + self.scaling * self.B @ self.A)
        return layer


base = nn.Linear(256, 192, bias=False)
layer, x = LoRA(base, r=8, alpha=16), torch.randn(50, 256)
assert torch.equal(layer(x), base(x))  # at the start: the base model, bit for bit
count = sum(weight.numel() for weight in layer.parameters() if weight.requires_grad)
print(f"trained: {count:,} numbers instead of {base.weight.numel():,}")
assert count == 8 * (256 + 192)

# %% [markdown]
# ## Merging
#
# After training the update can be added into the weights: the model is an ordinary one again and not a bit slower.
# In exact arithmetic $Wx + s B(Ax)$ and $(W + s B A)x$ are the same; with floats they differ in the last digits.

# %%
with torch.no_grad():
    layer.B.normal_(std=0.1)
    difference = (layer(x) - layer.merged()(x)).abs().max().item()
print(f"merged and unmerged differ by at most {difference:.1e}, outputs are about {layer(x).abs().mean():.2f}")
assert difference < 1e-5

# %% [markdown]
# PEFT, the library that everybody uses, does the same with the same numbers, and so does this package's own faster
# product for CPUs:

# %%
from peft import LoraConfig, get_peft_model

from finetune_kit.models.lora_product import add_in_one_pass

peft = get_peft_model(nn.Sequential(base), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
theirs = peft.base_model.model[0]
with torch.no_grad():
    theirs.lora_A["default"].weight.copy_(layer.A)
    theirs.lora_B["default"].weight.copy_(layer.B)
    ours, library = layer(x), peft(x)
    assert add_in_one_pass(peft) == 1
    kit = peft(x)
    delta = (theirs.get_delta_weight("default") - layer.scaling * layer.B @ layer.A).abs().max().item()
print(f"to PEFT {(ours - library).abs().max():.1e}, to this package {(ours - kit).abs().max():.1e}, update {delta:.1e}")
assert (ours - library).abs().max() < 1e-5
assert (ours - kit).abs().max() < 1e-5
assert delta < 1e-6

# %% [markdown]
# ## Which rank?
#
# Let us make a task of which we know the answer: the right weights are $W$ plus an update of rank 4. With $r < 4$
# LoRA cannot reach it, and the loss that is left is that of the directions that it had to leave out. The best
# update of rank $r$ is known: keep the $r$ largest singular values (Eckart and Young). From $r = 4$ on there is
# nothing left to gain.


# %%
def tune(base: nn.Linear, target: Tensor, r: int, steps: int) -> float:
    """The loss that LoRA of rank r gets to: mean of |W' x - target x|² per output."""
    torch.manual_seed(r)
    layer = LoRA(base, r, alpha=2 * r)
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=1e-2)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        x = torch.randn(256, layer.base.in_features)
        loss = (layer(x) - x @ target.T).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # for random x the loss is the size of what is missing
        return (layer.merged().weight - target).pow(2).sum().item() / target.shape[0]


small = nn.Linear(64, 48, bias=False)
with torch.no_grad():
    left, right = torch.linalg.qr(torch.randn(48, 4))[0], torch.linalg.qr(torch.randn(64, 4))[0]
    update = left @ torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])) @ right.T
target = small.weight.detach() + update
singular = torch.linalg.svdvals(update)
ranks = [1, 2, 3, 4, 8]
curve = {r: tune(small, target, r, choose(1500, 300)) for r in ranks}
limits = {r: (singular[r:] ** 2).sum().item() / 48 for r in ranks}
for r in ranks:
    print(f"rank {r}: loss {curve[r]:.4f}, the least possible {limits[r]:.4f}")
    assert limits[r] - 1e-6 < curve[r] < limits[r] + choose(0.003, 0.1)


def draw(axes) -> None:
    axes.plot(ranks, list(curve.values()), "o-", label="LoRA")
    axes.plot(ranks, list(limits.values()), "k:", label="least possible")
    axes.set(xlabel="rank r", ylabel="loss", title="A task of rank 4")
    axes.legend()


plot("10_rank", draw)

# %% [markdown]
# A real task does not tell its rank. But the shape is the same: past some $r$ more rank buys nothing. With 16 you
# rarely go wrong; if the loss stays high, the learning rate is the likelier culprit.
#
# ## QLoRA: the frozen weights in four bits
#
# The base is frozen, so it need not be stored exactly. Four bits have 16 values. Which? Weights are distributed
# like a bell, so evenly spaced levels would be wasted at the rims. **NF4** ("normal float") takes levels that each
# hold an equal share of a bell curve, scaled to $[-1, 1]$, with an exact 0. Each block of 64 weights is divided by
# its largest absolute value, the *scale*, which is kept beside it:
#
# $$w \approx s_{\text{block}} \cdot c_i, \qquad i = \arg\min_i |w / s_{\text{block}} - c_i|$$


# %%
def nf4_levels() -> Tensor:
    """16 levels: 8 quantiles of the bell above 0, 7 below, and 0 itself (QLoRA, appendix E)."""
    bell = torch.distributions.Normal(0.0, 1.0)
    rim = 0.9677083  # as far out as the paper goes: between 1 - 1/30 and 1 - 1/32
    above = bell.icdf(torch.linspace(rim, 0.5, 9)[:-1])
    below = -bell.icdf(torch.linspace(rim, 0.5, 8)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def quantise(weight: Tensor, levels: Tensor, block: int = 64) -> Tensor:
    """The weights as they come back from four bits."""
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    index = ((blocks / scales)[..., None] - levels).abs().argmin(dim=-1)  # 4 bits each
    return (levels[index] * scales).view_as(weight)


NF4, EVEN = nf4_levels(), torch.linspace(-1, 1, 16)
weight = torch.randn(512, 512) * 0.02
errors = {name: (quantise(weight, levels) - weight).pow(2).mean().sqrt().item() / 0.02
          for name, levels in (("NF4", NF4), ("evenly spaced", EVEN))}  # fmt: skip
print("levels:", [round(level, 3) for level in NF4.tolist()])
print("error, share of the weights' own spread:", {name: round(error, 4) for name, error in errors.items()})
assert abs(errors["NF4"] - 0.0908) < 0.004
assert errors["NF4"] < errors["evenly spaced"]

# %% [markdown]
# bitsandbytes, which does this on GPUs (and on CPUs, slower), has the same levels and gives the same weights:

# %%
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
theirs = dequantize_4bit(packed, state)
levels_apart = (NF4 - get_4bit_type("nf4", device="cpu")).abs().max().item()
weights_apart = (theirs - quantise(weight, NF4)).abs().max().item()
print(f"levels apart by {levels_apart:.0e}, weights by {weights_apart:.1e}")
print(f"{weight.numel():,} weights in {packed.numel():,} bytes")
assert levels_apart < 1e-4
assert (theirs - quantise(weight, NF4)).pow(2).mean().sqrt() < 1e-4
assert packed.numel() == weight.numel() // 2

# %% [markdown]
# ## LoRA on the rounded weights
#
# Rounding is an error in every weight: no low-rank update undoes it all. But training runs *through* the rounded
# weights, so that the update learns the task and some of the damage as well.

# %%
rounded = nn.Linear(64, 48, bias=False)
with torch.no_grad():
    rounded.weight.copy_(quantise(small.weight, NF4))
damage = (rounded.weight - small.weight).pow(2).sum().item() / 48
untrained = (rounded.weight - target).pow(2).sum().item() / 48
q_curve = {r: tune(rounded, target, r, choose(1500, 300)) for r in (4, 8, 16)}
print(f"untrained {untrained:.4f}; rounding alone costs {damage:.4f}")
print("QLoRA by rank:", {r: round(nats, 4) for r, nats in q_curve.items()})
assert q_curve[16] < q_curve[8] < q_curve[4] < untrained / 10
assert q_curve[16] < damage  # part of the damage is repaired
assert q_curve[4] > curve[4]

# %% [markdown]
# One trap: after QLoRA, merge into the weights *you trained on*, the rounded ones, not into the original ones: the
# update was learned beside the rounding errors. This package measures the candidates and takes the best.
#
# **For real:** `python -m finetune_kit run lora_sft lora.r=16` and `python -m finetune_kit run qlora_sft`
# (`recipes/lora_sft.py`, `recipes/qlora_sft.py`). The adapter is put on in `finetune_kit.models.adapters.attach`,
# its product on a CPU is `finetune_kit.models.lora_product.add_in_one_pass`, four bits are asked for in
# `finetune_kit.models.quantization.quantization_config`, and merging is `finetune_kit.runs.merge.merge`.
#
# ## Exercise
#
# The scales cost memory, too: one float32 for each 64 weights is half a bit a weight. *Double quantisation* stores
# them in 8 bits: subtract their mean, and round to 256 even levels by the largest absolute value. Write
# `exercise(scales)`: return the scales as they come back.


# %%
def exercise(scales: Tensor) -> Tensor:
    raise NotImplementedError("quantise the scales to 8 bits and back")


def check(exercise) -> None:
    scales = torch.rand(256, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.05
    back = exercise(scales)
    assert back.shape == scales.shape
    assert len(back.unique()) < len(scales.unique())  # it was rounded
    step = 2 * (scales - scales.mean()).abs().max() / 255
    assert (back - scales).abs().max() <= step * 0.51
    assert ((back - scales).abs() / scales).max() < 1e-3


try_exercise(check, exercise)
