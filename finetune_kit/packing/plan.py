"""Where each token of a batch of rows lies when they are packed: real tokens alone, shared beginnings once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from finetune_kit.packing.attention import Varlen

CARRIED = "packing_plan"  # a batch's token ids carry their plan to the model under this name
WORTH_SHARING = 8  # tokens: a shorter common beginning costs more in attention calls than it saves in the layers


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together in the packed row: `start`, `length`, and the segments before them in their rows."""

    start: int
    length: int
    before: tuple[Segment, ...]


@dataclass  # not frozen: torch.compile would take all of a frozen one for constants, and compile each batch anew
class Plan:
    """How a batch is packed.

    tokens: (n,), packed token -> its place in the flattened padded batch. positions: (n,), each token's place in its
    row. places: (b, t), padded place -> packed token, 0 where padded. real: (b, t), true where a token is; slots: (m,),
    where that is in the flattened padded batch. times: (1, n), in how many rows each packed token is. longest: tokens
    of the longest row. shares: some token is in several rows. selected: (s,), packed tokens whose hidden state the
    caller wants; None: all, in the padded layout. wanted: (b, t - 1), true in front of a label; scored: (s,), where in
    it, flattened. varlen: what attends; None: SDPA by segment. table: the segments as attention inside a compiled layer
    is told of them, on the CPU. blocks: flex attention's mask, by window. windows: attention notes the sliding windows
    that it masked here. targets: (s,), the labels, where packing/head.py is the head; hidden: their hidden states, left
    here by the backbone.
    """

    segments: tuple[Segment, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    real: torch.Tensor
    slots: torch.Tensor
    times: torch.Tensor
    longest: int
    shares: bool
    selected: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    scored: torch.Tensor | None = None
    varlen: Varlen | None = None
    table: torch.Tensor | None = None
    blocks: dict[int | None, Any] | None = None
    windows: set[int | None] = field(default_factory=set)
    targets: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> Plan:
        """The same with its own tensors on a device; the host does not wait for them where they are pinned."""
        return self.moved(lambda part: part.to(device, non_blocking=True))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Plan:
        """The same with its own tensors moved, but for what is read on the CPU."""
        moved: Plan = _moved(self, move, but=("table",))
        return replace(moved, varlen=self.varlen and _moved(self.varlen, move))


def _moved(parts: Any, move: Callable[[torch.Tensor], torch.Tensor], but: tuple[str, ...] = ()) -> Any:
    """A copy of a dataclass in which its own tensors are moved."""
    import torch

    own = {item.name: getattr(parts, item.name) for item in fields(parts) if item.name not in but}
    return replace(parts, **{name: move(part) for name, part in own.items() if isinstance(part, torch.Tensor)})


def select(plan: Plan, labels: torch.Tensor) -> Plan | None:
    """The plan of a batch of which only the positions in front of a label are wanted; None where there is none.

    labels: (b, t), -100 where there is none, on the CPU.
    """
    wanted = (labels[:, 1:] != -100) & plan.real[:, :-1]
    scored = wanted.flatten().nonzero()[:, 0]
    if not len(scored):
        return None
    return replace(plan, selected=plan.places[:, :-1][wanted], wanted=wanted, scored=scored)


def make_plan(input_ids: torch.Tensor, attention_mask: torch.Tensor, share: bool) -> Plan:
    """Pack rows of (b, t) token ids whose real tokens lie together, padded on either side; all tensors on the CPU."""
    import torch

    rows, width = input_ids.shape
    real = attention_mask.bool()
    first = real.int().argmax(dim=1).tolist()
    texts = [ids[keep].tolist() for ids, keep in zip(input_ids, real, strict=True)]
    segments: list[Segment] = []
    tokens: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    paths: list[list[Segment]] = [[] for _ in range(rows)]

    def lay(members: list[int], begin: int, end: int, before: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Put tokens begin..end of rows that share them into the packed row, once."""
        if begin == end:
            return before
        last = segments[-1] if segments else Segment(0, 0, ())
        segment = Segment(last.start + last.length, end - begin, before)
        positions.append(torch.arange(begin, end))
        tokens.append(positions[-1] + members[0] * width + first[members[0]])
        segments.append(segment)
        for row in members:
            paths[row].append(segment)
        return (*before, segment)

    def split(members: list[int], begin: int, before: tuple[Segment, ...]) -> None:
        """Lay what all members share from `begin` on, then each group that continues alike; members are sorted."""
        common = len(texts[members[0]])
        if len(members) > 1:
            common = _common(texts[members[0]], texts[members[-1]])
        if len(members) == 1 or common - begin >= WORTH_SHARING or all(len(texts[m]) == common for m in members):
            before, begin = lay(members, begin, common, before), common
        groups: dict[int, list[int]] = {}
        for row in members:
            if len(texts[row]) > common:
                groups.setdefault(texts[row][common], []).append(row)
            elif begin < common:  # it ends inside a beginning too short to be shared
                lay([row], begin, common, before)
        for group in groups.values():
            split(group, begin, before)

    if share:
        split(sorted(range(rows), key=texts.__getitem__), 0, ())
    else:
        for row in range(rows):
            lay([row], 0, len(texts[row]), ())
    places = torch.zeros_like(input_ids)
    for row, path in enumerate(paths):
        places[row, real[row]] = torch.cat([tokens_of(segment) for segment in path])
    slots = real.flatten().nonzero()[:, 0]
    packed = torch.cat(tokens)
    times = torch.bincount(places[real], minlength=len(packed))[None]
    longest = max(map(len, texts))
    return Plan(
        tuple(segments), packed, torch.cat(positions), places, real, slots, times, longest, len(packed) < len(slots)
    )


def tokens_of(segment: Segment) -> torch.Tensor:
    """(length,) places in the packed row."""
    import torch

    return torch.arange(segment.start, segment.start + segment.length)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning. Of sorted rows, the first and the last share what all of them share."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)
