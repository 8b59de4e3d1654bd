# %% [markdown]
# # Lesson 6: A transformer in less than 200 lines, equal to Llama
#
# **You need** lesson 5. **You get** the whole architecture of Llama, Qwen, Mistral and SmolLM in one cell, and the
# proof: given the same weights, it computes the same numbers as the library `transformers`.
#
# A transformer is a column of equal blocks. Each token has a vector that travels up the column. A block does two
# things to it, and each time *adds* what it found to what was there (a *residual connection*):
#
# $$x \leftarrow x + \mathrm{Attention}(\mathrm{norm}(x)), \qquad x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x))$$
#
# Attention moves information between tokens. The MLP works on each token alone. Because both only add, a derivative
# can run down the column unchanged, and that is why deep columns can be trained.
#
# The parts, each with the reason for it:
#
# - **Embedding**: row $i$ of a matrix is the vector of token $i$; a one-hot row times a matrix, as in lesson 1.
# - **RMSNorm**: $x / \sqrt{\tfrac{1}{n} \sum_i x_i^2 + \epsilon}$ times a learned vector. Each part gets input of
#   the same size.
# - **Rotary positions** (lesson 5): queries and keys are turned by an angle that grows with the position.
# - **Grouped queries**: several query heads share one key and value head. While it writes, a model keeps all keys and
#   values; with a quarter of the heads they take a quarter of the memory.
# - **SwiGLU**: $W_{\text{down}} \big( \mathrm{silu}(W_{\text{gate}} x) \cdot W_{\text{up}} x \big)$, an MLP with a
#   gate.
# - **Head**: a score for each token of the vocabulary. Often it is the embedding matrix again (*tied*): the score
#   of a token is the product of its vector with $x$.
#
# The names of the parts are those of `transformers`, so that weights can be exchanged. The cache is for lesson 8.

# %% tags=["model"]
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu


@dataclass
class Config:
    vocab_size: int
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x over its root mean square, times a learned vector."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(b, heads, t, d), each pair (i, i + d/2) turned by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-torch.arange(half) / half)  # (t, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, size, d = config, config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, size, bias=False)

    def forward(self, x: Tensor, cache: dict | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (part(x).view(b, t, -1, self.config.head_dim).transpose(1, 2)
                   for part in (self.q_proj, self.k_proj, self.v_proj))  # fmt: skip
        before = cache["k"].shape[2] if cache else 0
        positions = torch.arange(before, before + t)
        q, k = rotate(q, positions, self.config.rope_theta), rotate(k, positions, self.config.rope_theta)
        if cache is not None:  # keys and values of the tokens before, so that they need not be computed again
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache.update(k=k, v=v)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mask = torch.ones(t, before + t, dtype=torch.bool).tril(before)  # itself and what comes before
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: dict | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, caches: list[dict] | None) -> Tensor:
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, caches[number] if caches is not None else None)
        return self.norm(x)


class Llama(nn.Module):
    """Token ids (b, t) -> logits (b, t, vocabulary)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.model = config, Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith("proj.weight"):  # what comes out is as large as what goes in
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):  # each block adds to the same vector twice
                nn.init.normal_(weight, std=(weight.shape[1] * 2 * config.num_hidden_layers) ** -0.5)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, caches: list[dict] | None = None) -> Tensor:
        """`caches`: one dict a layer, empty at first; then only the new tokens have to be given."""
        return self.lm_head(self.model(ids, caches))

    def loss(self, ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Mean of -log p(next token); labels are the ids themselves, or -100 where nothing is to be learned."""
        labels = ids if labels is None else labels
        return cross_entropy(self(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# %% [markdown]
# That is all of it. Count the lines: the cell has fewer than 200.
#
# ## Equal to the library
#
# The package's tests use a tiny random Llama. We read its weights into our own model and compare the outputs.

# %%
import math
import tempfile
from pathlib import Path

from lesson import plot, source_of, try_exercise
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from finetune_kit.models.tiny import write_tiny_model

lines = [line for line in source_of("06_transformer", "model").splitlines() if line.strip()]
print(len(lines), "lines")
assert len(lines) <= 200


def ours_from(theirs: LlamaForCausalLM) -> Llama:
    """Our model with the weights of theirs."""
    names = Config.__dataclass_fields__.keys() - {"rope_theta"}
    config = Config(rope_theta=theirs.config.rope_parameters["rope_theta"],
                    **{name: getattr(theirs.config, name) for name in names})  # fmt: skip
    model = Llama(config)
    model.load_state_dict(theirs.state_dict())
    return model.eval()


logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    theirs = LlamaForCausalLM.from_pretrained(write_tiny_model(Path(folder))).eval()
ours = ours_from(theirs)
torch.manual_seed(0)
ids = torch.randint(0, theirs.config.vocab_size, (3, 40))
with torch.no_grad():
    difference = (ours(ids) - theirs(input_ids=ids).logits).abs().max().item()
    losses = ours.loss(ids).item(), theirs(input_ids=ids, labels=ids).loss.item()
print(f"largest difference of a logit: {difference:.1e}; losses {losses[0]:.6f} and {losses[1]:.6f}")
assert difference < 1e-5
assert abs(losses[0] - losses[1]) < 1e-5

# %% [markdown]
# Not only for that one: other widths, no grouping, another base of the angles, a head of its own. And not only
# forwards: the gradients agree as well, so that training would go the same way.

# %%
variants = [
    {"num_key_value_heads": 8, "num_attention_heads": 8, "hidden_size": 96},
    {"num_key_value_heads": 1, "num_hidden_layers": 5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"tie_word_embeddings": False, "intermediate_size": 301, "rms_norm_eps": 1e-4},
]  # fmt: skip
for variant in variants:
    given = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, **variant}  # fmt: skip
    theirs = LlamaForCausalLM(LlamaConfig(**given))
    ours, ids = ours_from(theirs), torch.randint(0, 97, (2, 30))
    ours.loss(ids).backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    logits = (ours(ids) - theirs(input_ids=ids).logits).abs().max().item()
    grads = dict(theirs.named_parameters())
    gradients = max((weight.grad - grads[name].grad).abs().max().item() for name, weight in ours.named_parameters())
    print(f"{str(variant)[:60]:60} logits {logits:.1e}, gradients {gradients:.1e}")
    assert logits < 1e-5
    assert gradients < 1e-5

# %% [markdown]
# ## What a fresh model knows
#
# Nothing: all tokens are about equally likely, so its loss is $\ln$ of the vocabulary. If yours starts elsewhere,
# something is wrong with it. This is the cheapest test there is.
#
# And it only looks back. Change one token, and nothing before it may change:

# %%
fresh = Llama(Config(vocab_size=200, num_hidden_layers=6))
ids = torch.randint(0, 200, (8, 32))
print(f"loss of a fresh model: {fresh.loss(ids):.3f}; ln 200 = {math.log(200):.3f}")
assert abs(fresh.loss(ids).item() - math.log(200)) < 0.05
changed = ids.clone()
changed[:, 20] = (changed[:, 20] + 1) % 200
with torch.no_grad():
    moved = (fresh(changed) - fresh(ids)).abs().amax(dim=(0, 2))
assert moved[:20].max() == 0
assert moved[20:].min() > 0


def draw(axes) -> None:
    axes.bar(range(32), moved.tolist())
    axes.set(xlabel="position", ylabel="largest change of a logit", title="What changes when token 20 does")


plot("06_transformer", draw)

# %% [markdown]
# **For real:** `python -m finetune_kit run full_sft model.name_or_path=…` (`recipes/full_sft.py`) loads any causal
# language model, by `finetune_kit.models.load.load_policy`. The tiny model is made in
# `finetune_kit.models.tiny.write_tiny_model`. What is read from a model's structure is in
# `finetune_kit.models.coverage.matrices`.
#
# ## Exercise
#
# How many parameters does a Llama have? Write the formula: embedding, head (unless tied), and for each layer four
# matrices of attention, three of the MLP, two norms; one norm at the end. The test compares with real models, and
# with the size on the label of one that you can download.


# %%
def exercise(config: Config) -> int:
    raise NotImplementedError("count the parameters")


def check(exercise) -> None:
    for config in (Config(50), Config(50, tie_word_embeddings=False), Config(99, 96, 200, 3, 8, 8)):
        assert exercise(config) == sum(weight.numel() for weight in Llama(config).parameters())
    assert exercise(Config(49_152, 576, 1536, 30, 9, 3)) == 134_515_008  # SmolLM2-135M


try_exercise(check, exercise)
