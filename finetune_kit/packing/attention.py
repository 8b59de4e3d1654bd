"""How packed rows attend: SDPA segment by segment, one call of torch's varlen kernel, or flex attention. Which of them
are there on a device, and which is the fastest on a run's rows; whether it is right, packing/proof.py says."""

from __future__ import annotations

import inspect
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from finetune_kit.models.device import computes_in_bfloat16
from finetune_kit.packing.plan import Plan, Segment, make_plan, tokens_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# as torch.nn.attention.varlen.varlen_attn: (query, key, value, cumulative query and key lengths, the longest of each,
# and what of scale, window_size, is_causal and enable_gqa it takes) -> what the queries see. The last query of a
# segment stands at its last key.
Kernel = Callable[..., "torch.Tensor"]
Clock = Callable[[Callable[[], None]], float]  # seconds that something takes

WARM_UPS, TIMED = 2, 5  # calls of a candidate before it is timed, and of which the median counts


@dataclass  # not frozen, as layout.Plan
class Varlen:
    """A varlen kernel and what it is told of the segments.

    queries, keys: (segments + 1,) int32, cumulative lengths of the segments and of what each sees: those before it in
    its rows, and itself. longest: of each. seen: (k,), the packed tokens seen, one segment's after the other's; None:
    each sees itself alone. takes: the names of the kernel's arguments.
    """

    kernel: Kernel | None
    queries: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]
    seen: torch.Tensor | None
    takes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """A way to attend. `name`: as a line says it. `kind`: varlen, segments or flex. `use`: makes torch take it."""

    name: str
    kind: str
    use: Callable[[], None] = lambda: None


SEGMENTS = Candidate("SDPA by segment", "segments")


def make_varlen(segments: Sequence[Segment], kernel: Kernel | None, device: torch.device) -> Varlen:
    """What a kernel is told of a plan's segments."""
    import torch

    queries = [segment.length for segment in segments]
    parts = [(*segment.before, segment) for segment in segments]
    keys = [sum(part.length for part in seen) for seen in parts]
    every = torch.cat([tokens_of(part) for seen in parts for part in seen]).to(device)
    ends = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)]
    seen, takes = every if keys != queries else None, _taken(kernel) if kernel else frozenset()
    return Varlen(kernel, ends[0], ends[1], (max(queries), max(keys)), seen, takes)


def tell(plan: Plan, kind: str, compiled: bool = False) -> Plan:
    """A plan with what a candidate of a kind has to be told of its segments, on the CPU. `compiled`: from inside of a
    layer that is compiled."""
    if kind == "varlen":
        plan = replace(plan, varlen=make_varlen(plan.segments, None, plan.tokens.device))
    if kind == "segments" and compiled:
        from finetune_kit.packing.segments import table_of

        plan = replace(plan, table=table_of(plan.segments))
    return plan


def connect(plan: Plan, candidate: Candidate) -> Plan:
    """A plan that is on its device, with what attends there."""
    if candidate.kind == "varlen" and plan.varlen is not None:
        kernel = varlen_kernel(plan.tokens.device)
        assert kernel is not None
        return replace(plan, varlen=replace(plan.varlen, kernel=kernel, takes=_taken(kernel)))
    return replace(plan, varlen=None, blocks={} if candidate.kind == "flex" else None)


def takes_window(varlen: Varlen, sliding_window: int | None) -> bool:
    """Whether a kernel can keep to a sliding window, where that acts."""
    acts = sliding_window is not None and sliding_window < varlen.longest[1]
    return not acts or "window_size" in varlen.takes


def attend_at_once(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All segments in one call of the kernel; shapes as in `attend`. In autocast's type, as SDPA would."""
    query, key, value = (states[0].transpose(0, 1) for states in in_autocast(query, key, value))
    if varlen.seen is not None:
        key, value = key[varlen.seen], value[varlen.seen]
    assert varlen.kernel is not None
    given: dict[str, Any] = {}
    if "scale" in varlen.takes:
        given["scale"] = scaling
    elif scaling is not None and scaling != (usual := query.shape[-1] ** -0.5):
        query = query * (scaling / usual)
    if "window_size" in varlen.takes:
        acts = sliding_window is not None and sliding_window < varlen.longest[1]
        # how many keys back and ahead of its own a query sees: a window of w tokens has that one in it
        given["window_size"] = (sliding_window - 1 if acts and sliding_window else -1, 0)
    else:  # torch 2.10
        given["is_causal"] = True
    if "enable_gqa" in varlen.takes:  # before torch 2.12 fewer key heads are taken without being told
        given["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen.kernel(query, key, value, varlen.queries, varlen.keys, *varlen.longest, **given)
    return output[None]


def in_autocast(*states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values in autocast's type; without it in that of the values: rotated queries may be wider."""
    import torch

    device = states[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states[-1].dtype
    return tuple(part.to(dtype) for part in states)


@lru_cache
def _taken(kernel: Kernel) -> frozenset[str]:
    """The names of a kernel's arguments; of one that takes whatever it is given, those of today's torch."""
    parameters = inspect.signature(kernel).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return frozenset({"scale", "window_size", "enable_gqa"})
    return frozenset(parameters)


def varlen_kernel(device: torch.device) -> Kernel | None:
    """Torch's varlen attention on CUDA, where torch has it; None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from torch.nn.attention import varlen
    except ImportError:  # before torch 2.10
        return None
    kernel: Any = varlen.varlen_attn  # typed as a pair with what is not asked for here
    return kernel  # type: ignore[no-any-return]


def refusal(device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """Why a varlen kernel does not attend on a device where a model of `config` does so in `dtype`; "" where it may,
    and on a CPU, where SDPA does.

    The limits are those of the flash-attention kernel behind torch's varlen attention.
    """
    import torch

    if device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"the packed forward is not proven on {device.type} yet"
    if varlen_kernel(device) is None:
        return f"torch {torch.__version__} has no varlen attention: torch 2.10 has it"
    if not computes_in_bfloat16():
        return "varlen attention needs a GPU with bfloat16 units"
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return f"varlen attention takes heads of 8, 16, … 256 numbers, not {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen attention does not compute in {str(dtype).removeprefix('torch.')}"
    return ""


def candidates(device: torch.device, dtype: torch.dtype, config: Any) -> list[Candidate]:
    """The ways to attend that there are on a device; none where packed rows are not proven on it."""
    if device.type not in ("cpu", "cuda"):
        return []
    found = []
    if varlen_kernel(device) is not None and not refusal(device, dtype, config):
        found.append(Candidate("varlen attention", "varlen", _flash(None)))
        found += [Candidate(f"varlen attention by {name}", "varlen", _flash(name)) for name in _installed_flash(device)]
    if device.type == "cuda":
        found.append(Candidate("SDPA by segment", "segments", _flash(None)))
        found.append(Candidate("flex attention", "flex", _flash(None)))
    return found or [SEGMENTS]


def _installed_flash(device: torch.device) -> list[str]:
    """The implementations of flash attention beside torch's own that can be turned on, the newest first; off again."""
    if device.type != "cuda":
        return []
    found = []
    with suppress(ImportError):
        from torch.nn.attention import list_flash_attention_impls

        for name in reversed(list_flash_attention_impls()):
            try:
                _flash(name)()
            except Exception as error:  # each package refuses a device, or its absence, in its own way
                log.debug("flash attention %s is not there: %s", name, error)
            else:
                found.append(name)
        _flash(None)()
    return found


def _flash(name: str | None) -> Callable[[], None]:
    """Turns an implementation of flash attention on; None: torch's own."""

    def use() -> None:
        try:
            from torch.nn.attention import (
                activate_flash_attention_impl,
                current_flash_attention_impl,
                restore_flash_attention_impl,
            )
        except ImportError:  # before torch 2.12 there is none but torch's own
            return
        if name is not None:
            activate_flash_attention_impl(name)
        elif current_flash_attention_impl() is not None:
            restore_flash_attention_impl()

    return use


def by_time(
    found: Sequence[Candidate],
    attend: Callable[..., Any],
    rows: Sequence[Sequence[int]],
    config: Any,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock | None = None,
) -> list[tuple[Candidate, float]]:
    """Candidates from the fastest to the slowest, with the seconds that attention takes on `rows`, forward and
    backward, in one layer of a model of `config`. Those that fail are left out; a single one is not timed.

    attend: as in packing/forward.py. clock: the device's.
    """
    import torch

    if len(found) == 1:
        return [(found[0], 0.0)]
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    plan = make_plan(ids, mask, share=True)
    shapes = [(1, count, len(plan.tokens), head_dim) for count in (heads, *[_key_heads(text)] * 2)]
    states = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    timed = []
    for candidate in found:
        told = connect(tell(plan, candidate.kind).to(device), candidate)

        def step(told: Plan = told) -> None:
            output, _ = attend(None, *states, None, packed=told)
            torch.autograd.grad(output.float().sum(), states, allow_unused=True)

        try:
            candidate.use()
            for _ in range(WARM_UPS):
                step()
            timed.append((candidate, statistics.median((clock or clock_of(device))(step) for _ in range(TIMED))))
        except Exception as error:  # a kernel fails in its own way, a compiler in many
            log.debug("%s fails on this run's rows: %s", candidate.name, error)
    return sorted(timed, key=lambda pair: pair[1])


def _key_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or int(text.num_attention_heads)


def clock_of(device: torch.device) -> Clock:
    """Seconds of a device's own work."""
    import torch

    def on_cuda(step: Callable[[], None]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def on_cpu(step: Callable[[], None]) -> float:
        begin = time.perf_counter()
        step()
        return time.perf_counter() - begin

    return on_cuda if device.type == "cuda" else on_cpu


def runs_ahead(device: torch.device) -> bool:
    """Whether the host continues while a device computes, so that asking for a number makes it wait."""
    return device.type != "cpu"


def attention_dtype(causal: Any) -> torch.dtype:
    """The type that a model attends in: autocast's, else its weights'."""
    import torch

    device = causal.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal.dtype
    return dtype


def as_in_training(device: torch.device) -> AbstractContextManager[Any]:
    """The trainers' mixed precision. Weights are not kept in its type: a copy made without gradient would have none."""
    import torch

    mixed = device.type == "cuda" and computes_in_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)
