"""The packed forward: the same numbers as a padded batch, without the padding and with shared beginnings computed once.

A batch of padded rows reaches the model. Its padding is dropped, rows that begin with the same tokens keep that
beginning once, and what is left is laid end to end as one row of n tokens. The layers run over those; in attention each
segment sees its own beginning and itself. Behind the backbone the hidden states are laid out as the caller expects:
padded rows, or, where labels are given, only the positions in front of a label, so that the language-model head runs
nowhere else; what TRL's fused head says of those positions is laid out in padded rows again. On a CPU, where TRL's head
computes all logits twice, model/head.py takes its place if it proves equal.

Attention is SDPA, segment by segment, on a CPU, and one call of torch's varlen attention on CUDA. Everything else
above the backbone is unchanged, and no forward is replaced: hooks before and behind the model and behind the backbone,
and one attention function of transformers' AttentionInterface.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from finetune_kit import processes
from finetune_kit.model.load import computes_in_bfloat16

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# as torch.nn.attention.varlen.varlen_attn: (query, key, value, cumulative query and key lengths, the longest of each;
# scale, window_size, enable_gqa) -> what the queries see. The last query of a segment stands at its last key.
Kernel = Callable[..., "torch.Tensor"]

ATTENTION = "finetune_kit_packed"
WORTH_SHARING = 8  # tokens: a shorter common beginning costs more in attention calls than it saves in the layers
HEAD_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's head, of each label
TOLERANCE = 1e-4  # largest difference of a float32 log-probability from the padded model's
# With fewer bits, the norm of all differences by that of the numbers around their mean, of log-probabilities and of a
# weight's gradient. In bfloat16 a right kernel is off by 0.03 and at most 0.08 on SmolLM2-135M; on 32 layers of random
# weights by 0.01 and 0.02, and one with its diagonal in the wrong corner by 0.1 or more and 0.3 or more.
ROUGH_TOLERANCE, GRADIENT_TOLERANCE = 0.1, 0.25
PROOF_ROWS, PROOF_TOKENS, PROOF_WEIGHTS = 4, 256, 8  # of a run's first ones, what a varlen kernel is tried on


@dataclass(frozen=True)
class Segment:
    """Tokens that lie together in the packed row: `start`, `length`, and the segments before them in their rows."""

    start: int
    length: int
    before: tuple[Segment, ...]


@dataclass(frozen=True)
class Varlen:
    """A varlen kernel and what it is told of the segments.

    queries, keys: (segments + 1,) int32, cumulative lengths of the segments and of what each sees: those before it in
    its rows, and itself. longest: of each. seen: (k,), the packed tokens seen, one segment's after the other's; None:
    each sees itself alone.
    """

    kernel: Kernel
    queries: torch.Tensor
    keys: torch.Tensor
    longest: tuple[int, int]
    seen: torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """How a batch is packed.

    tokens: (n,), packed token -> its place in the flattened padded batch. positions: (n,), each token's place in its
    row. places: (b, t), padded place -> packed token, 0 where padded. real: (b, t), true where a token is; slots: (m,),
    where that is in the flattened padded batch. selected: (s,), packed tokens whose hidden state the caller wants;
    None: all, in the padded layout. wanted: (b, t - 1), true in front of a label; s in number. varlen: what attends;
    None: SDPA. windows: attention notes the sliding windows that it masked here. targets: (s,), the labels, where
    model/head.py is the head; hidden: their hidden states, left here by the backbone.
    """

    segments: tuple[Segment, ...]
    tokens: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    real: torch.Tensor
    slots: torch.Tensor
    selected: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    varlen: Varlen | None = None
    windows: set[int | None] = field(default_factory=set)
    targets: torch.Tensor | None = None
    hidden: list[torch.Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> Plan:
        """The same with its own tensors on a device."""
        import torch

        own: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: part.to(device) for name, part in own.items() if isinstance(part, torch.Tensor)}
        return Plan(**{**own, **moved})


@dataclass
class Way:
    """How a model's calls are packed.

    windows: the sliding windows that attention was given so far; rows longer than another one stay padded. said: why
    batches stayed padded so far, each of which a line says once. own_head: model/head.py stands for TRL's fused head.
    """

    windows: set[int | None] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    own_head: bool = False


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
        """Lay what all members share from `begin` on, then each group that goes on alike; members are sorted."""
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
        places[row, real[row]] = torch.cat([_tokens(segment) for segment in path])
    slots = real.flatten().nonzero()[:, 0]
    return Plan(tuple(segments), torch.cat(tokens), torch.cat(positions), places, real, slots)


def make_varlen(segments: Sequence[Segment], kernel: Kernel, device: torch.device) -> Varlen:
    """What a kernel is told of a plan's segments."""
    import torch

    queries = [segment.length for segment in segments]
    parts = [(*segment.before, segment) for segment in segments]
    keys = [sum(part.length for part in seen) for seen in parts]
    every = torch.cat([_tokens(part) for seen in parts for part in seen]).to(device)
    ends = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (queries, keys)]
    return Varlen(kernel, ends[0], ends[1], (max(queries), max(keys)), every if keys != queries else None)


def _tokens(segment: Segment) -> torch.Tensor:
    import torch

    return torch.arange(segment.start, segment.start + segment.length)


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning. Of sorted rows, the first and the last share what all of them share."""
    shortest = min(len(one), len(other))
    return next((place for place in range(shortest) if one[place] != other[place]), shortest)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packed: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query (1, heads, n, d), key and value (1, key heads, n, d); returns
    (1, n, heads, d). Each segment sees the segments before it in its rows, and itself up to each token, no further back
    than `sliding_window`. A call without a plan is transformers' own SDPA.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]  # transformers ships no types here
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    packed.windows.add(sliding_window)
    if packed.varlen is not None and not dropout:  # a varlen kernel drops nothing
        return _attend_at_once(packed.varlen, query, key, value, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    outputs = []
    for segment in packed.segments:
        own = slice(segment.start, segment.start + segment.length)
        seen = [slice(part.start, part.start + part.length) for part in segment.before] + [own]
        keys, values = (torch.cat([states[:, :, part] for part in seen], dim=2) for states in (key, value))
        mask, ahead = None, keys.shape[2] - segment.length
        windowed = sliding_window is not None and keys.shape[2] > sliding_window
        if ahead or windowed:  # token i of the segment sees all before the segment, and i + 1 of its own
            mask = torch.ones(segment.length, keys.shape[2], dtype=torch.bool, device=keys.device).tril(ahead)
        if mask is not None and sliding_window is not None:  # of these, the last ones
            mask = mask.triu(ahead - sliding_window + 1)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and segment.length > 1,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_at_once(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """All segments in one call of the kernel; shapes as in `attend`. In autocast's type, as SDPA would."""
    import torch

    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    if varlen.seen is not None:
        key, value = key[varlen.seen], value[varlen.seen]
    acts = sliding_window is not None and sliding_window < varlen.longest[1]
    output = varlen.kernel(
        query,
        key,
        value,
        varlen.queries,
        varlen.keys,
        *varlen.longest,
        scale=scaling,
        # how many keys back and ahead of its own a query sees: a window of w tokens has that one in it
        window_size=(sliding_window - 1 if acts and sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


def varlen_kernel(device: torch.device) -> Kernel | None:
    """What attends on a device: torch's varlen attention on CUDA; None: SDPA, segment by segment."""
    if device.type != "cuda":
        return None
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn  # typed as a pair with what is not asked for here
    return kernel  # type: ignore[no-any-return]


def refusal(device: torch.device, dtype: torch.dtype, config: Any) -> str:
    """Why rows are not packed on a device where a model of `config` attends in `dtype`; "" where they are.

    The limits are those of the flash-attention kernel behind torch's varlen attention.
    """
    import torch

    if device.type == "cpu":
        return ""
    kernel = varlen_kernel(device)
    if kernel is None:
        return f"the packed forward is not proven on {device.type} yet"
    missing = {"scale", "window_size", "enable_gqa"} - inspect.signature(kernel).parameters.keys()
    if missing:
        return f"varlen attention of torch {torch.__version__} lacks {min(missing)}: torch 2.13 has it"
    if not computes_in_bfloat16():
        return "varlen attention needs a GPU with bfloat16 units"
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if head_dim % 8 or head_dim > 256:
        return f"varlen attention takes heads of 8, 16, … 256 numbers, not {head_dim}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen attention does not compute in {str(dtype).removeprefix('torch.')}"
    return ""


def _dtype(causal: Any) -> torch.dtype:
    """The type that a model attends in: autocast's, else its weights'."""
    import torch

    device = causal.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else causal.dtype
    return dtype


def _as_in_training(device: torch.device) -> AbstractContextManager[Any]:
    """The trainers' mixed precision. Weights are not kept in its type: a copy made without gradient would have none."""
    import torch

    mixed = device.type == "cuda" and computes_in_bfloat16()
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def enable(model: Any, rows: Sequence[Sequence[int]] = (), own_head: bool = False) -> str:
    """Turn the packed forward on for a language model or a sequence classifier, adapter or not, if it proves equal on
    the loaded weights.

    `rows`: token ids of the first rows of the run, which a varlen kernel has to prove equal on, too.
    Returns "" where it is on, else the reason why the padded forward stays. It acts on calls with a batch of more than
    padding to drop and without a cache; generation is as before. `own_head`: of what TRL's fused head says, nothing
    but log-probabilities gets a gradient, so that model/head.py may stand for it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _as_in_training(causal.device):
        return refusal(causal.device, _dtype(causal), causal.config) or _enable(model, causal, rows, own_head)


def _enable(model: Any, causal: Any, rows: Sequence[Sequence[int]], own_head: bool) -> str:
    config = causal.base_model.config  # a classifier's backbone has one of its own
    before = config._attn_implementation
    if before != "sdpa":
        return f"the packed forward needs sdpa attention, not {before}"
    _register()
    # a classifier finds a row's last token in the padded batch: it is packed behind that, in front of the backbone
    outer = causal.base_model if hasattr(causal, "score") else model
    way = Way()
    handles = [
        outer.register_forward_pre_hook(partial(_pack, way=way), with_kwargs=True),
        causal.base_model.register_forward_hook(_unpack, with_kwargs=True),
        outer.register_forward_hook(_lay_out, with_kwargs=True),
    ]
    reason = _disproof(model, causal, rows)
    if reason:
        for handle in handles:
            handle.remove()
        config._attn_implementation = before
    else:
        way.own_head = own_head and not hasattr(causal, "score") and _proves_own_head(model, way)
    return reason


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for calls without a plan, such as generation


def _pack(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], way: Way
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: replace a padded batch by its packed row; None leaves a call as it is."""
    import torch

    if len(args) == 1 and kwargs.get("input_ids") is None:
        kwargs = {**kwargs, "input_ids": args[0]}
        args = ()
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    causal = module.get_base_model() if hasattr(module, "get_base_model") else module
    if args or ids is None or mask is None or ids.dim() != 2 or mask.dim() != 2:
        return None
    if causal.config._attn_implementation != ATTENTION:
        return None
    if kwargs.get("cache") is not None or kwargs.get("position_ids") is not None or kwargs.get("use_cache"):
        return None
    labels = kwargs.get("labels")
    device, (ids, mask) = ids.device, (ids.cpu(), mask.cpu())  # what follows asks for many numbers
    if not bool(mask.any(dim=1).all()):
        return None
    longest = int(mask.sum(dim=1).max())
    if reason := refusal(device, _dtype(causal), causal.config) or _too_long(causal, longest, way.windows):
        if reason not in way.said and processes.is_main():
            way.said.add(reason)
            log.warning("padded batches: %s", reason)
        return None
    plan = make_plan(ids, mask, share=not (module.training and _drops(module)))
    kwargs = {**kwargs, "use_cache": False}
    if labels is not None:
        labels = labels.cpu()
        wanted = (labels[:, 1:] != -100) & plan.real[:, :-1]
        if not bool(wanted.any()):
            return None
        plan = replace(plan, selected=plan.places[:, :-1][wanted], wanted=wanted)
        targets = labels[:, 1:][wanted]
        if way.own_head and kwargs.get("fused_lm_head") and is_plain(causal.get_output_embeddings()):
            plan, targets = replace(plan, targets=targets), targets[:0]
        # the losses above shift labels by one: the first has nothing before it
        kwargs["labels"] = torch.cat([labels.new_full((1,), -100), targets])[None].to(device)
    kernel = varlen_kernel(device)
    varlen = make_varlen(plan.segments, kernel, device) if kernel else None
    kwargs["input_ids"] = ids.flatten()[plan.tokens][None].to(device)
    kwargs["position_ids"] = plan.positions[None].to(device)
    # a mask of four dimensions is passed on as it is, so that none of n x n is built
    kwargs["attention_mask"] = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    kwargs["packed"] = replace(plan.to(device), varlen=varlen, windows=way.windows)
    return args, kwargs


def _too_long(causal: Any, longest: int, windows: set[int | None]) -> str:
    """Why a batch with a row of `longest` tokens cannot be packed; "" where it can."""
    text = causal.config.get_text_config()
    for name in ("sliding_window", "attention_chunk_size"):
        limit = getattr(text, name, None)
        if limit is not None and limit not in windows and longest > limit:
            return f"rows are longer than {name}={limit}, of which this model does not tell attention"
    return ""


def _drops(module: Any) -> bool:
    """Whether dropout acts: rows that share a beginning would then share its draw, which a padded batch does not."""
    import torch

    if getattr(module.config, "attention_dropout", 0.0):
        return True
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())


def _unpack(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the backbone: hidden states (1, n, h) -> (b, t, h) with zeros where padded, (1, s + 1, h) or (1, 1, h)."""
    import torch

    plan = kwargs.get("packed")
    if plan is None:
        return output
    hidden = output.last_hidden_state[0]
    if plan.selected is None:
        padded = hidden.new_zeros(plan.real.numel(), hidden.shape[-1])
        padded = padded.index_copy(0, plan.slots, hidden[plan.places.flatten()[plan.slots]])
        output.last_hidden_state = padded.view(*plan.real.shape, -1)
    elif plan.targets is not None:  # TRL's head gets no label, and the one state that it drops
        plan.hidden.append(hidden[plan.selected])
        output.last_hidden_state = hidden[None, :1]
    else:  # the last one is never read: the losses above drop it when they shift
        output.last_hidden_state = hidden[torch.cat([plan.selected, plan.selected[-1:]])][None]
    return output


def _lay_out(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the model: what TRL's fused head says of each label, (1, s) -> (b, t - 1) with zeros elsewhere.

    Where it was given no label, what model/head.py says, of all that it would have measured.
    """
    plan = kwargs.get("packed")
    if plan is None or plan.wanted is None or getattr(output, "log_probs", None) is None:
        return output
    measured = [name for name in HEAD_OUTPUTS if getattr(output, name) is not None]
    if plan.targets is None:
        found = {name: getattr(output, name)[0] for name in measured}
    else:
        from finetune_kit.model.head import label_log_probs

        causal = module.get_base_model() if hasattr(module, "get_base_model") else module
        head = causal.get_output_embeddings()
        found = label_log_probs(plan.hidden.pop(), head.weight, head.bias, plan.targets, measured[1:])
        labels = kwargs.get("num_items_in_batch")
        output.loss = output.loss - found["log_probs"].sum() / (len(plan.targets) if labels is None else labels)
    for name in measured:
        setattr(output, name, found[name].new_zeros(plan.wanted.shape).masked_scatter(plan.wanted, found[name]))
    output.label_mask = plan.wanted
    return output


def is_plain(head: Any) -> bool:
    """Whether model/head.py may compute what this head does: whole float32 weights, on a CPU."""
    import torch

    if type(head) is not torch.nn.Linear or torch.is_autocast_enabled("cpu"):
        return False
    weight, sharded = head.weight, hasattr(head.weight, "device_mesh")
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not sharded


def _disproof(model: Any, causal: Any, rows: Sequence[Sequence[int]]) -> str:
    """Why the packed forward is not to be trusted on the loaded weights; "" if it gives the padded one's numbers.

    Looked at are four rows of random tokens, two of which begin alike, and, where a varlen kernel attends, the first
    rows of the run, with the gradient at the first weights that are trained: it has come through all layers.
    """
    import torch

    was_training = model.training
    model.eval()
    text = causal.config.get_text_config()
    probe = _probe(text.vocab_size)
    moved = [[*probe[0][:14], (probe[0][14] + 1) % text.vocab_size, *probe[0][15:]], *probe[1:]]
    batches: list[tuple[list[list[int]], list[Any]]] = [(probe, [])]
    if varlen_kernel(causal.device) is not None:
        first = [list(row[:PROOF_TOKENS]) for row in rows[:PROOF_ROWS]] or probe
        batches.append((first, [weight for weight in model.parameters() if weight.requires_grad][:PROOF_WEIGHTS]))
    exact = _dtype(causal) == torch.float32
    try:
        padded = [_look(model, batch, text.pad_token_id, trained) for batch, trained in batches]
        causal.base_model.config._attn_implementation = ATTENTION
        packed = [_look(model, batch, text.pad_token_id, trained) for batch, trained in batches]
        other = _look(model, moved, text.pad_token_id, [])
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"this model does not take a packed row ({type(error).__name__})"
    finally:
        model.train(was_training)
    for (one, gradients), (two, expected) in zip(packed, padded, strict=True):
        difference = _difference(one, two, exact)
        if not difference <= (TOLERANCE if exact else ROUGH_TOLERANCE):
            return f"packed and padded log-probabilities differ by {difference:.1e} on this model"
        pairs = zip(gradients, expected, strict=True)
        difference = max((_difference([one], [two], exact=False) for one, two in pairs), default=0.0)
        if not difference <= GRADIENT_TOLERANCE:
            return f"gradients of packed and padded rows differ by {difference:.1e} of their norm on this model"
    if _difference(packed[0][0][1:], other[0][1:], exact) > (TOLERANCE / 10 if exact else ROUGH_TOLERANCE / 100):
        return "a change in one row moves another one on this model"
    return ""


def _probe(words: int) -> list[list[int]]:
    """Four rows of random tokens, two of which begin alike."""
    import torch

    random = torch.randint(0, words, (4, 24), generator=torch.Generator().manual_seed(0)).tolist()
    return [random[0], random[0][:12] + random[1][12:20], random[2], random[3][:5]]


def _proves_own_head(model: Any, way: Way) -> bool:
    """Whether TRL's fused head is there, and model/head.py gives its numbers."""
    import torch

    was_training = model.training
    model.eval()
    ids, mask = _padded(_probe(model.config.get_text_config().vocab_size), 0, model.device)
    labels = ids.masked_fill(mask == 0, -100)

    def numbers(own: bool) -> list[torch.Tensor]:
        way.own_head = own
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        measured = (getattr(output, name, None) for name in HEAD_OUTPUTS)
        return [found.float() for found in measured if found is not None]

    try:
        trls, ours = numbers(own=False), numbers(own=True)
    except (TypeError, ValueError):  # without TRL's head the word means nothing
        return False
    finally:
        model.train(was_training)
    return bool(trls) and _difference(ours, trls, exact=True) <= TOLERANCE


def _padded(rows: list[list[int]], padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask of rows padded on the right."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)


def _look(
    model: Any, rows: list[list[int]], padding: int | None, trained: list[Any]
) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
    """Each row's log-probabilities of its tokens, or its scores, float32; and the gradient of their sum at each of the
    weights `trained`.
    """
    import torch

    ids, mask = _padded(rows, padding or 0, model.device)  # a classifier finds a row's end by the padding
    with torch.set_grad_enabled(bool(trained)):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if logits.dim() == 2:
            numbers = list(logits.float())
        else:  # a row at a time: each token has a number for every word
            each = zip(logits, ids, map(len, rows), strict=True)
            numbers = [row[: n - 1].float().log_softmax(-1).gather(1, own[1:n, None]) for row, own, n in each]
        gradients: Sequence[torch.Tensor] = ()
        if trained:
            total = torch.cat(numbers).sum()
            gradients = torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)
    return [row.detach() for row in numbers], gradients


def _difference(one: list[torch.Tensor], two: list[torch.Tensor], exact: bool) -> float:
    """The largest one of two lists of numbers; not `exact`, its norm by that of the second list around its mean."""
    import torch

    found, expected = (torch.cat([part.flatten().float() for part in parts]) for parts in (one, two))
    if exact:
        return float((found - expected).abs().max())
    apart, spread = float((found - expected).norm()), float((expected - expected.mean()).norm())
    return apart / spread if apart else 0.0
