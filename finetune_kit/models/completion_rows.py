"""Prompts with completions as rows, and the hidden states in front of each completion token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_kit.models.adapters import is_adapter


@dataclass(frozen=True)
class Rows:
    """Prompts with their completions as the model takes them; s is the number of completion tokens.

    input_ids, attention_mask: (b, w), padded on the right. before: (s,), the places among b * w whose next token is a
    completion's. tokens: (s,), those next tokens. mask: (b, t), true where a completion, laid out alone, has a token;
    places: (s,), of those among b * t. Places are counted on the CPU: a GPU that is asked for them is waited for.
    What a tool returned is in input_ids alone: the tokens around it follow one another in (b, t).
    """

    input_ids: Tensor
    attention_mask: Tensor
    before: Tensor
    tokens: Tensor
    mask: Tensor
    places: Tensor

    def spread(self, flat: Tensor) -> Tensor:
        """(s,) numbers of completion tokens -> (b, t), 0 where masked; keeps the gradient."""
        return flat.new_zeros(self.mask.numel()).index_put((self.places,), flat).view(self.mask.shape)

    def states(self, hidden: Tensor) -> Tensor:
        """(b, w, h) hidden states -> (s, h), those in front of each completion token."""
        return hidden.flatten(0, 1)[self.before]


def make_rows(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    width: int,
    device: Any,
    own: Sequence[list[bool]] | None = None,
) -> Rows:
    """Rows of prompts with completions of at least one token each; `width`: t, at least that of the longest one.

    `own`: which tokens of each completion the policy wrote, the others being read and no more; None: all of them.
    """
    if own is None:
        own = [[True] * len(answer) for answer in completions]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, completions, strict=True))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    attention = torch.zeros_like(ids)
    before: list[int] = []
    places: list[int] = []
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    tokens: list[int] = []
    for row, (prompt, answer, written) in enumerate(zip(prompts, completions, own, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        attention[row, :end] = 1
        kept = [at for at, is_own in enumerate(written) if is_own]
        before += [row * longest + len(prompt) - 1 + at for at in kept]
        places += range(row * width, row * width + len(kept))
        tokens += [answer[at] for at in kept]
        mask[row, : len(kept)] = True
    flat = [torch.tensor(part, dtype=torch.long) for part in (before, tokens, places)]
    parts = [part.to(device, non_blocking=True) for part in (ids, attention, flat[0], flat[1], mask, flat[2])]
    return Rows(*parts)


def states(model: Any, rows: Rows, *, head: bool = True) -> tuple[Tensor, Tensor]:
    """(logits (s, v), hidden states (s, h)) in front of each completion token, float32.

    Without `head` no logits (0, v). The model's own forward; only what enters its language-model head is cut down to
    those s positions.
    """
    found: list[Tensor] = []

    def cut(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args[0]
        while given.dim() > 3:  # ProphetNet's head reads one state for each token ahead; the next one's is the first
            given = given[:, 0]
        found.append(rows.states(given))
        kept = found[0] if head else found[0][:0]
        return (kept[(None,) * (args[0].dim() - 2)], *args[1:])

    causal = model.get_base_model() if is_adapter(model) else model
    hook = causal.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        output = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    finally:
        hook.remove()
    return output.logits[0].float(), found[0].float()
