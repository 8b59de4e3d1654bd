# %% [markdown]
# # Lesson 5: Attention
#
# **You need** lessons 1 and 2. **You get** the operation that made language models what they are, written by hand
# and equal to torch's own; several heads; two ways to say where a token stands; and the reason why the models that
# write look only back.
#
# ## A soft look-up
#
# A dictionary gives the value of the one key that fits. Attention gives a *mean* of all values, weighted by how
# well their keys fit. Each token asks with a *query* $q$, offers a *key* $k$, and gives a *value* $v$, three
# vectors that are made from its own vector by three matrices:
#
# $$\mathrm{out}_i = \sum_j a_{ij} v_j, \qquad
# a_{ij} = \frac{e^{q_i \cdot k_j / \sqrt d}}{\sum_m e^{q_i \cdot k_m / \sqrt d}}$$
#
# All at once, with the tokens as rows: $\mathrm{softmax}(Q K^\top / \sqrt d)\, V$.
#
# Why $\sqrt d$? A product of two random vectors of $d$ numbers is a sum of $d$ random terms, so it is about $\sqrt
# d$ large. Undivided, softmax would put nearly all weight on one token, and its derivative would be nearly 0.

# %%
import math

import torch
from lesson import choose, plot, shakespeare, try_exercise
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

torch.manual_seed(0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(…, t, d) each -> (…, t, d). `mask`: (t, t), true where a query may look."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # e^(-inf) = 0: no weight
    return scores.softmax(dim=-1) @ v


q, k, v = torch.randn(3, 2, 4, 16, 32)  # a batch of 2, 4 heads, 16 tokens, vectors of 32
causal = torch.ones(16, 16, dtype=torch.bool).tril()
for mask in (None, causal):
    difference = (attention(q, k, v, mask) - scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max().item()
    print(f"largest difference to torch's scaled_dot_product_attention: {difference:.1e}")
    assert difference < 1e-6
random = torch.randn(10_000, 2, 64)
spread = (random[:, 0] * random[:, 1]).sum(1).std().item()
print(f"products of random vectors of 64 numbers spread by {spread:.2f}; the root of 64 is 8")
assert abs(spread - 8) < 0.3

# %% [markdown]
# ## Several heads
#
# One softmax can look at one kind of thing at a time. So the vector is cut into parts, *heads*, each with queries
# and keys of its own, and the results are put side by side. Cutting is a matter of shape only: `view` and
# `transpose`. Here is a whole layer, equal to torch's with the same weights.


# %%
def heads(x: Tensor, count: int) -> Tensor:
    """(b, t, size) -> (b, count, t, size / count)"""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


x = torch.randn(2, 16, 64)
layer = nn.MultiheadAttention(64, num_heads=4, bias=False, batch_first=True)
to_q, to_k, to_v = layer.in_proj_weight.chunk(3)
out = attention(heads(x @ to_q.T, 4), heads(x @ to_k.T, 4), heads(x @ to_v.T, 4), causal)
ours = out.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
theirs = layer(x, x, x, attn_mask=~causal, need_weights=False)[0]
print(f"largest difference to nn.MultiheadAttention: {(ours - theirs).abs().max():.1e}")
assert (ours - theirs).abs().max() < 1e-6

# %% [markdown]
# ## Where is a token?
#
# Attention is a mean, and a mean has no order. Shuffle the tokens, and the outputs are the same ones, shuffled:
# "dog bites man" would be "man bites dog".

# %%
order = torch.randperm(16)
assert torch.allclose(
    attention(q, k, v)[:, :, order], attention(q[:, :, order], k[:, :, order], v[:, :, order]), atol=1e-6
)

# %% [markdown]
# **Learned positions** (GPT-2): a table with a vector for each position, added to the token's vector. Simple; but
# there is no vector for a position beyond the table, and the model must learn anew at each place what "the token
# before" means.
#
# **Rotary positions** (RoPE: Llama and nearly all since): turn queries and keys. Take the numbers of a vector in
# pairs, each pair a point in the plane, and turn it by the angle $m\,\theta_i$ at position $m$. Turning two vectors
# by the same angle does not change their product. So the product of a query at $m$ and a key at $n$ depends on $m -
# n$ alone:
#
# $$(R_m q) \cdot (R_n k) = q \cdot R_{n-m}\, k$$


# %%
def rotate(x: Tensor, positions: Tensor, theta: float = 10_000.0) -> Tensor:
    """(…, t, d): the pair (i, i + d/2) turned by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


one_q, one_k = torch.randn(2, 1, 32)
far = torch.arange(0, 200, 20)
products = [
    (rotate(one_q, m[None] + 7) * rotate(one_k, m[None])).sum().item() for m in far
]  # always 7 apart, at 0, 20, 40, …
print(f"7 apart, at ten places: {min(products):.4f} to {max(products):.4f}")
assert max(products) - min(products) < 1e-4
other = (rotate(one_q, far[:1] + 8) * rotate(one_k, far[:1])).sum().item()
assert abs(other - products[0]) > 1e-3  # 8 apart is something else
assert torch.allclose(rotate(one_q, far[3:4]).norm(), one_q.norm())  # turning changes no length


def draw(axes) -> None:
    distance = torch.arange(0, 400)
    keys = torch.ones(400, 64)
    axes.plot(((rotate(keys, distance) * keys).sum(1) / 64).tolist())
    axes.set(xlabel="tokens apart", ylabel="product", title="Rotary: equal vectors at growing distance")


plot("05_rotary", draw)

# %% [markdown]
# ## Why look only back?
#
# Two kinds of language models came out of the transformer:
#
# - **autoregressive** (GPT, Llama): predict the *next* token; each token sees itself and what comes before
#   (*causal*).
# - **masked** (BERT): hide some tokens, here 15 %, and predict those; each token sees both sides.
#
# First, what goes wrong without the causal mask. The target of a position is the token right of it. If the position
# may look right, the best "model" copies the answer. Its loss falls far below anything honest, and it can write
# nothing, since when it writes there is nothing on the right to copy.

# %%
train, held_out = shakespeare()
alphabet = sorted(set(train + held_out))
number_of = {character: number for number, character in enumerate(alphabet)}
MASK, V = len(alphabet), len(alphabet) + 1
train_ids, held_out_ids = (torch.tensor([number_of[c] for c in text]) for text in (train, held_out))
T = 48


class Model(nn.Module):
    """Two layers of attention and MLP, rotary positions; `causal` or not is the only difference."""

    def __init__(self, causal: bool, size: int = 48, count: int = 3) -> None:
        super().__init__()
        self.causal, self.count = causal, count
        self.embed, self.head = nn.Embedding(V, size), nn.Linear(size, V)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
            for _ in range(2)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(size) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x, positions = self.embed(ids), torch.arange(ids.shape[1])
        mask = torch.ones(len(positions), len(positions), dtype=torch.bool)
        mask = mask.tril() if self.causal else mask
        for qkv, out, mlp, norm in zip(self.qkv, self.out, self.mlp, self.norm, strict=False):
            q, k, v = (heads(part, self.count) for part in qkv(norm(x)).chunk(3, dim=-1))
            x = x + out(attention(rotate(q, positions), rotate(k, positions), v, mask).transpose(1, 2).flatten(2))
            x = x + mlp(x)
        return self.head(self.norm[2](x))


def next_token(model: Model, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def masked_token(model: Model, ids: Tensor) -> Tensor:
    hidden = torch.rand(ids.shape) < 0.15
    return cross_entropy(model(ids.masked_fill(hidden, MASK))[hidden], ids[hidden])


def pretrain(model: Model, loss_of, steps: int) -> float:
    """Train; returns the loss on held-out text, nats a predicted token."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        starts = torch.randint(len(train_ids) - T - 1, (32, 1))
        loss = loss_of(model, train_ids[starts + torch.arange(T + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        torch.manual_seed(2)
        return loss_of(model, held_out_ids[: 100 * (T + 1)].view(100, T + 1)).item()


STEPS = choose(300, 30)
results = {
    "next token, causal": pretrain(Model(causal=True), next_token, STEPS),
    "next token, not causal": pretrain(Model(causal=False), next_token, choose(200, 80)),
    "masked token, both sides": pretrain(Model(causal=False), masked_token, STEPS),
}
for name, nats in results.items():
    print(f"{name:25} held-out loss {nats:.3f} nats a predicted character")
causal_loss, cheating, masked_loss = results.values()
assert cheating < choose(0.3, 2.2)  # nobody predicts Shakespeare like that
assert causal_loss > 1.5
if choose(True, False):  # after 30 steps neither knows much
    assert abs(causal_loss - 2.15) < 0.06
    assert abs(masked_loss - 2.36) < 0.1

# %% [markdown]
# The model that may look right "predicts" nearly every character: it reads it. Nothing was learned about language.
#
# The honest two are different trades. The masked model sees both sides of a gap, which makes each gap easier; but
# it learns from 15 % of the tokens of a row, where the causal one learns from all of them, and it cannot write.
# After the same 300 steps the causal model is ahead (2.15 nats against 2.36), though each of its guesses is the
# harder one. That is why BERT is for understanding (classifying, searching) and GPT for writing, and why GPT's way
# learns more from a text.

# %%
print(f"predictions a row: causal {T}, masked about {0.15 * (T + 1):.0f}")
model = Model(causal=True)
with torch.no_grad():
    ids = held_out_ids[: T + 1][None]
    changed = ids.clone()
    changed[0, 30] = (changed[0, 30] + 1) % len(alphabet)
    moved = (model(ids) - model(changed)).abs().amax(dim=-1)[0]
assert moved[:30].max() == 0  # causal: nothing before position 30 can know
assert moved[30:].max() > 0

# %% [markdown]
# A consequence that training lives from: in one pass a causal model makes a prediction at *every* position, each as
# if the text ended there. And one that generation lives from: what was computed for earlier tokens stays valid when
# new ones come (lesson 8).
#
# **For real:** `python -m finetune_kit run full_sft` (`recipes/full_sft.py`). When several short texts share a row,
# each may see itself only; that mask of blocks is made in `finetune_kit.packing.segments.by_segment`. Our own
# attention gives the same:

# %%
from finetune_kit.packing.segments import by_segment

q, k, v = torch.randn(3, 1, 4, 20, 32)
packed = by_segment(q, k, v, [(12, []), (8, [])], scaling=None, sliding_window=None)
apart = [attention(q[:, :, s], k[:, :, s], v[:, :, s], torch.ones(n, n, dtype=torch.bool).tril())
         for s, n in ((slice(0, 12), 12), (slice(12, 20), 8))]  # fmt: skip
assert (packed - torch.cat(apart, dim=2)).abs().max() < 1e-6

# %% [markdown]
# ## Exercise
#
# A *sliding window* lets each token see itself and the `window - 1` tokens before it. Write `exercise(t, window)`:
# the mask, (t, t), true where row i may look at column j.


# %%
def exercise(t: int, window: int) -> Tensor:
    raise NotImplementedError("write the mask")


def check(exercise) -> None:
    assert torch.equal(exercise(5, 5), torch.ones(5, 5, dtype=torch.bool).tril())
    assert torch.equal(exercise(4, 1), torch.eye(4, dtype=torch.bool))
    mask = exercise(6, 3)
    assert mask.sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3]
    assert mask[4].tolist() == [False, False, True, True, True, False]


try_exercise(check, exercise)
