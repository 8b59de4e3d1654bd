"""One token at a time with a cache that grows, of any kind; rows that have ended leave it where it lets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune_kit.packing.plan import WORTH_SHARING


def pick(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(b, v) -> (b, 1), tokens drawn with their chances: torch.multinomial's own draw to the bit, without its look at
    whether they are chances, for which a GPU is waited for."""
    return (chances / torch.empty_like(chances).exponential_(1, generator=generator)).argmax(-1, keepdim=True)


class Growing:
    """A batch whose cache grows by a column a step. logits: (b, v), of the next token, in the model's type.

    mask: (b, columns so far), positions: (b, 1), of the last token. `begin` makes one.
    """

    def __init__(self, model: Any, cache: Any, mask: Tensor, positions: Tensor, logits: Tensor) -> None:
        self.model, self.cache, self.mask, self.positions, self.logits = model, cache, mask, positions, logits

    def step(self, tokens: Tensor) -> None:
        """Continue by (b, 1) tokens."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)
        self.positions = self.positions + 1
        # a model of states alone takes a mask of the tokens that it is given, and these are all real
        mask = self.mask if _has_columns(self.cache) else None
        self.cache, self.logits = one_forward(self.model, tokens, mask, self.positions, self.cache)

    def feed(self, tokens: Tensor, real: Tensor) -> None:
        """Continue by (b, k) tokens, of which those are real where (b, k) `real` is 1. A row has only real ones or
        none: it then stands still, for which the cache must be plain, and its logits say nothing."""
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = self.positions + real.cumsum(dim=1)
        mask = self.mask if _has_columns(self.cache) else None
        self.cache, self.logits = one_forward(self.model, tokens, mask, positions, self.cache)
        self.positions = positions[:, -1:]

    def keep(self, rows: Sequence[int]) -> bool:
        """Continue with some rows alone, where every layer of the cache lets rows go; whether it did.

        It costs a copy of the cache: worth it for every quarter of the rows.
        """
        if len(rows) > 0.75 * len(self.mask) or not can_leave(self.cache):
            return False
        kept = torch.tensor(rows, device=self.mask.device)
        select(self.cache, kept)
        self.mask, self.positions, self.logits = self.mask[kept], self.positions[kept], self.logits[kept]
        return True


def one_forward(model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> tuple[Any, Tensor]:
    """(the cache, (b, v) logits of the token after the last); None for a cache that is not handed out."""
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1
    )
    return getattr(output, "cache", None), output.logits[:, -1]


def begin(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> Growing:
    """Prompts through the model. ids: (b, w), padded on the left; mask: (b, columns of the cache + w).

    Raises TypeError for a model that knows no cache of this kind.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
    cache, logits = one_forward(model, ids, mask, positions, cache)
    if cache is None:
        raise TypeError(f"{type(model).__name__} hands no cache out")
    return Growing(model, cache, mask, positions[:, -1:], logits)


def begin_rows(model: Any, rows: Sequence[list[int]]) -> Growing | Whole:
    """Rows of token ids through the model, what they all begin with once where its cache allows that."""
    try:
        return _begin_with_cache(model, rows)
    except (TypeError, ValueError, AttributeError):  # it knows no cache of the common kind
        return Whole(model, rows)


def _begin_with_cache(model: Any, rows: Sequence[list[int]]) -> Growing:
    shared = common_beginning(model, rows)
    cache: Any = None
    if shared:
        beginning = torch.tensor([rows[0][:shared]], device=model.device)
        cache = getattr(model(input_ids=beginning, use_cache=True, logits_to_keep=1), "cache", None)
        if is_plain(cache):
            cache.batch_repeat_interleave(len(rows))
        else:  # a state without columns would see the padding behind the beginning
            cache, shared = None, 0
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width - shared), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    mask[:, :shared] = 1
    for place, row in enumerate(rows):  # padded in front of what is its own, so that all continue in the same column
        ids[place, width - len(row) :] = torch.tensor(row[shared:])
        mask[place, width - (len(row) - shared) :] = 1
    return begin(model, ids.to(model.device), mask.to(model.device), cache)


def common_beginning(model: Any, rows: Sequence[list[int]]) -> int:
    """How many tokens at the start of all rows go through the model once, for all of them; 0: each on its own.

    Every row keeps at least its last token. Behind the beginning shorter rows are padded, which a model that counts
    distance in columns (a sliding window) or keeps a state without columns would see.
    """
    first, last = min(rows), max(rows)  # sorted rows: what these two share, all share
    most = min(map(len, rows)) - 1
    shared = next((place for place in range(most) if first[place] != last[place]), most)
    config = model.config.get_text_config()
    plain = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    if len(rows) < 2 or shared < WORTH_SHARING or not plain or getattr(config, "sliding_window", None):
        return 0
    return shared


class Whole:
    """A batch of a model without a cache, or with one of another kind than `Growing` knows: each step reads all of each
    row. mask: (b, columns so far), of rows padded on the right, since not every such model heeds a mask."""

    def __init__(self, model: Any, rows: Sequence[list[int]]) -> None:
        self.model, self.rows = model, [list(row) for row in rows]
        self._look()

    def _look(self) -> None:
        width = max(map(len, self.rows))
        device = self.model.device
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in self.rows], device=device)
        ends = torch.tensor([len(row) for row in self.rows], device=device)
        self.mask = (torch.arange(width, device=device)[None] < ends[:, None]).long()
        logits = self.model(input_ids=ids, attention_mask=self.mask, use_cache=False).logits
        self.logits = logits[torch.arange(len(ids), device=device), ends - 1]

    def step(self, tokens: Tensor) -> None:
        """Continue by (b, 1) tokens."""
        self.rows = [[*row, token] for row, (token,) in zip(self.rows, tokens.tolist(), strict=True)]
        self._look()

    def feed(self, tokens: Tensor, real: Tensor) -> None:
        """Continue by (b, k) tokens, of which those are real where (b, k) `real` is 1."""
        fed = zip(self.rows, tokens.tolist(), real.tolist(), strict=True)
        self.rows = [
            [*row, *(token for token, is_real in zip(new, own, strict=True) if is_real)] for row, new, own in fed
        ]
        self._look()

    def keep(self, rows: Sequence[int]) -> bool:
        """Continue with some rows alone, which it always does."""
        self.rows = [self.rows[row] for row in rows]
        self.mask, self.logits = self.mask[list(rows)], self.logits[list(rows)]
        return True


def is_plain(cache: Any) -> bool:
    """Whether all that a cache holds is keys and values, a column each for every token, of all of its layers."""
    layers = getattr(cache, "layers", ())
    plain = all(type(layer).__name__ == "DynamicLayer" and layer.is_initialized for layer in layers)
    return bool(layers) and plain and not own_types(cache)


def can_leave(cache: Any) -> bool:
    """Whether rows can be taken out of a cache: each layer is asked, since those of a hybrid model differ.

    One of a model's own, or a layer of it, holds more than keys and values: it must say itself how rows leave it.
    """
    layers = getattr(cache, "layers", ())
    if not layers or any(own_types(part) and not _selects(part) for part in (cache, *layers)):
        return False
    return all(_has_state(layer) or hasattr(layer, "batch_select_indices") for layer in layers)


def select(cache: Any, kept: Tensor) -> None:
    """Leave the rows `kept` in a cache, in that order."""
    if own_types(cache):
        cache.batch_select_indices(kept)
        return
    for layer in cache.layers:
        # a state without columns, alone or beside keys and values: beam search's reordering takes both
        (layer.reorder_cache if _has_state(layer) else layer.batch_select_indices)(kept)


def own_types(part: Any) -> list[type]:
    """The classes of a cache, or of a layer of one, that a model brings with it, besides those of transformers' own."""
    return [
        kind for kind in type(part).__mro__ if kind.__module__ not in ("transformers.cache_utils", "builtins", "abc")
    ]


def _selects(part: Any) -> bool:
    return any("batch_select_indices" in vars(kind) for kind in own_types(part))


def _has_columns(cache: Any) -> bool:
    """Whether a cache has keys of the tokens before in any of its layers."""
    layers = getattr(cache, "layers", ())
    return not layers or bool(own_types(cache)) or any(hasattr(layer, "keys") for layer in layers)


def _has_state(layer: Any) -> bool:
    return hasattr(layer, "recurrent_states")
