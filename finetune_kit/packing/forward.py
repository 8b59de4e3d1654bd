"""The packed forward: the same numbers as a padded batch, without the padding and with shared beginnings computed once.

A batch of padded rows reaches the model. Its padding is dropped, rows that begin with the same tokens keep that
beginning once, and what is left is laid end to end as one row of n tokens. The layers run over those; in attention each
segment sees its own beginning and itself. Behind the backbone the hidden states are laid out as the caller expects:
padded rows, or, where labels are given, only the positions in front of a label (or those that a mask wants kept), so
that the language-model head runs nowhere else; what TRL's fused head says of labels is laid out in padded rows again.
On a CPU TRL's head computes all logits twice, and on a GPU it has the host wait for the number of labels:
packing/head.py takes its place if it proves equal.

Attention is SDPA, segment by segment, on a CPU, and on CUDA what is the fastest on the run's rows of those that prove
right (packing/attention.py). Everything else above the backbone is unchanged, and no forward is replaced: hooks before
and behind the model and the backbone, and one attention function of transformers' AttentionInterface.

The plan of a batch is made where its rows are put together (training/collate.py), and comes with its token ids: the
host asks the device for nothing. A call without one has its plan made on the spot.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.packing import attention
from finetune_kit.packing.attention import SEGMENTS, Candidate
from finetune_kit.packing.plan import CARRIED, Plan, make_plan, select
from finetune_kit.packing.proof import disproof, proves_own_head

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ATTENTION = "finetune_kit_packed"
HEAD_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's head, of each label


@dataclass
class PackingState:
    """How a model's calls are packed.

    attends: what attends; chosen: the line that says why. compiled: its layers are. windows: the sliding windows that
    attention was given so far; rows longer than another one stay padded. said: why batches stayed padded so far, each
    of which a line says once. own_head: packing/head.py stands for TRL's fused head; measured: what that says of each
    label.
    """

    attends: Candidate = SEGMENTS
    chosen: str = ""
    compiled: bool = False
    windows: set[int | None] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    own_head: bool = False
    measured: tuple[str, ...] = ()


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
    sliding_window = sliding_window or None  # 0 is none, too
    compiling = torch.compiler.is_compiling()
    if not compiling:  # a compiled layer has been asked before it was compiled
        packed.windows.add(sliding_window)
    # a varlen kernel and flex attention drop nothing
    if packed.varlen is not None and not dropout and attention.takes_window(packed.varlen, sliding_window):
        return attention.attend_at_once(packed.varlen, query, key, value, scaling, sliding_window), None
    from finetune_kit.packing import segments  # which needs torch when it is imported

    query, key, value = attention.in_autocast(query, key, value)
    if packed.blocks is not None and not dropout:
        output = segments.attend_by_flex(packed, query, key, value, scaling, sliding_window)
    elif compiling and packed.table is not None and not dropout:
        scale, window = scaling or query.shape[-1] ** -0.5, sliding_window or segments.NO_WINDOW
        output = segments.attend_by_segment(query, key, value, packed.table, scale, window)
    else:
        seen = segments.seen_by(packed.segments)
        output = segments.by_segment(query, key, value, seen, scaling, sliding_window, dropout)
    return output.transpose(1, 2).contiguous(), None


def enable(model: Any, rows: Sequence[Sequence[int]] = (), own_head: bool = False) -> str:
    """Turn the packed forward on for a language model or a sequence classifier, adapter or not, if it proves equal on
    the loaded weights.

    `rows`: token ids of the first rows of the run, which a varlen kernel has to prove equal on, too.
    Returns "" where it is on, else the reason why the padded forward stays. It acts on calls with a batch of more than
    padding to drop and without a cache; generation is as before. `own_head`: of what TRL's fused head says, nothing
    but log-probabilities gets a gradient, so that packing/head.py may stand for it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with attention.as_in_training(causal.device):
        dtype = attention.attention_dtype(causal)
        found = attention.candidates(causal.device, dtype, causal.config)
        if not found:
            return attention.refusal(causal.device, dtype, causal.config)
        return _enable(model, causal, rows, own_head, found)


def _enable(model: Any, causal: Any, rows: Sequence[Sequence[int]], own_head: bool, found: Sequence[Candidate]) -> str:
    config = causal.base_model.config  # a classifier's backbone has one of its own
    before = config._attn_implementation
    if before != "sdpa":
        return f"the packed forward needs sdpa attention, not {before}"
    register()
    # a classifier finds a row's last token in the padded batch: it is packed behind that, in front of the backbone
    outer = causal.base_model if hasattr(causal, "score") else model
    way = PackingState()
    handles = [
        outer.register_forward_pre_hook(partial(_pack, way=way), with_kwargs=True),
        causal.base_model.register_forward_pre_hook(_mask, with_kwargs=True),
        causal.base_model.register_forward_hook(_unpack, with_kwargs=True),
        outer.register_forward_hook(partial(_lay_out, way=way), with_kwargs=True),
    ]

    def turn_on(candidate: Candidate) -> None:
        config._attn_implementation = ATTENTION
        way.attends = candidate
        candidate.use()

    def turn_off() -> None:
        config._attn_implementation = before

    def use(own: bool, measured: Sequence[str] = ()) -> None:
        way.own_head, way.measured = own, tuple(measured)

    reason, way.chosen = _choose(model, causal, rows, found, turn_on, turn_off)
    if reason:
        for handle in handles:
            handle.remove()
        turn_off()
    else:
        use(False)
        measured = () if not own_head or hasattr(causal, "score") else proves_own_head(model, use, HEAD_OUTPUTS)
        use(bool(measured), measured)
    return reason


def _choose(
    model: Any,
    causal: Any,
    rows: Sequence[Sequence[int]],
    found: Sequence[Candidate],
    turn_on: Callable[[Candidate], None],
    turn_off: Callable[[], None],
) -> tuple[str, str]:
    """Turn on the fastest candidate that is right; "" or why none is, and where there was a choice a line about it."""
    dtype, reason = attention.attention_dtype(causal), "no way to attend to packed rows works here"
    timed = attention.by_time(found, attend, rows or [[0] * 128, [0] * 64], causal.config, causal.device, dtype)
    for candidate, _ in timed:
        turn_off()
        reason = disproof(model, causal, rows, partial(turn_on, candidate))
        if not reason:
            return "", said_times(candidate, timed) if len(timed) > 1 else ""
        if len(timed) > 1:
            log.warning("packed rows: not by %s: %s", candidate.name, reason)
    return reason, ""


def said_times(chosen: Candidate, timed: Sequence[tuple[Candidate, float]]) -> str:
    """The candidate that attends, and how long each takes in a layer."""
    times = ", ".join(f"{candidate.name} {1000 * seconds:.2f} ms" for candidate, seconds in timed)
    return f"packed rows: {chosen.name} attends (in one layer, forward and backward: {times})"


def acts_on(model: Any) -> bool:
    """Whether calls of this model are packed, but for rows longer than a window that its attention is not told of.

    Such a call may have a (b, t) mask as logits_to_keep: its logits are those of the positions that are true there,
    (1, s, v); of a batch that stays padded, those of the places where any row has one, (b, k, v).
    """
    way = packing_of(model)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return way is not None and not hasattr(causal, "score") and not _refusal(causal, way)


def packing_of(model: Any) -> PackingState | None:
    """How the calls of a model are packed; None where they are not."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    outer = causal.base_model if hasattr(causal, "score") else model
    hooks = (hook for hook in outer._forward_pre_hooks.values() if isinstance(hook, partial))
    return next((hook.keywords["way"] for hook in hooks if hook.func is _pack), None)


def _refusal(causal: Any, way: PackingState) -> str:
    """Why a call made now is not packed; "" where it is."""
    if way.attends.kind != "varlen":
        return ""
    return attention.refusal(causal.device, attention.attention_dtype(causal), causal.config)


def register() -> None:
    """Make the attention of packed rows known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for calls without a plan, such as generation


def _pack(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], way: PackingState
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: replace a padded batch by its packed row; None leaves a call as it is."""
    import torch

    keep = kwargs.get("logits_to_keep")
    if not isinstance(keep, torch.Tensor) or keep.dim() != 2:
        return _pack_batch(module, args, kwargs, way)
    packed = _pack_batch(module, args, {**kwargs, "logits_to_keep": 0}, way, keep.cpu())
    return packed or (args, {**kwargs, "logits_to_keep": keep.any(dim=0).nonzero()[:, 0]})


def _pack_batch(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], way: PackingState, keep: torch.Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """`keep`: (b, t), true at the positions whose hidden states the head gets; None: what the labels say, or all."""
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
    share = not (module.training and drops(module))
    plan = None if keep is not None else _carried(ids, mask, labels, share)
    if plan is None:
        plan = plan_on_the_spot(ids, mask, labels, share, way, keep)
    if plan is None:
        return None
    if reason := _refusal(causal, way) or _too_long(causal, plan.longest, way.windows):
        if reason not in way.said and distributed.is_main():
            way.said.add(reason)
            log.warning("padded batches: %s", reason)
        return None
    kwargs = {**kwargs, "use_cache": False}
    if labels is not None:
        assert plan.scored is not None
        first, targets = labels.new_full((1,), -100), labels[:, 1:].flatten()[plan.scored]
        from finetune_kit.packing.head import stands_for  # which needs torch when it is imported

        if way.own_head and kwargs.get("fused_lm_head") and stands_for(causal.get_output_embeddings()):
            plan = replace(plan, targets=targets)
            kwargs["labels"], kwargs["fused_lm_head"] = None, False
        else:  # the losses above shift labels by one: the first has nothing before it
            kwargs["labels"] = torch.cat([first, targets])[None]
    kwargs["input_ids"] = ids.flatten()[plan.tokens][None]
    kwargs["position_ids"] = plan.positions[None]
    kwargs["attention_mask"] = plan.times  # what a router's loss counts; attention is told by the plan
    kwargs["packed"] = replace(attention.connect(plan, way.attends), windows=way.windows, hidden=[])
    return args, kwargs


def _carried(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None, share: bool) -> Plan | None:
    """The plan that came with a batch's token ids; None where there is none, or where it is not that of this call.

    Mask and labels are compared with it where they are: a device that finds others ends the run.
    """
    import torch

    plan: Plan | None = getattr(ids, CARRIED, None)
    if plan is None or plan.real.shape != mask.shape or (plan.shares and not share):
        return None
    if plan.tokens.device != ids.device or (labels is not None and plan.wanted is None):
        return None
    same: list[torch.Tensor] = [mask.bool().eq(plan.real)]
    if labels is None:
        plan = replace(plan, selected=None, wanted=None, scored=None)
    else:
        assert plan.wanted is not None
        same.append(((labels[:, 1:] != -100) & plan.real[:, :-1]).eq(plan.wanted))
    if not attention.runs_ahead(ids.device):
        return plan if all(bool(part.all()) for part in same) else None
    for part in same:
        torch._assert_async(part.all(), "a batch is not the one that its packing plan was made of")
    return plan


def plan_on_the_spot(
    ids: torch.Tensor,
    mask: torch.Tensor,
    labels: torch.Tensor | None,
    share: bool,
    way: PackingState,
    keep: torch.Tensor | None = None,
) -> Plan | None:
    """The plan of a batch, on its device; None where it has an empty row, or labels that are none.

    `keep`: as in `_pack_batch`. What follows asks for many numbers: they are fetched from the device.
    """
    device, (ids, mask) = ids.device, (ids.cpu(), mask.cpu())
    if not bool(mask.any(dim=1).all()):
        return None
    plan: Plan | None = attention.tell(make_plan(ids, mask, share), way.attends.kind, way.compiled)
    assert plan is not None
    if keep is not None:
        plan = replace(plan, selected=plan.places[keep])
    elif labels is not None:
        plan = select(plan, labels.cpu())
    return plan and plan.to(device)


def _too_long(causal: Any, longest: int, windows: set[int | None]) -> str:
    """Why a batch with a row of `longest` tokens cannot be packed; "" where it can."""
    text = causal.config.get_text_config()
    if set(getattr(text, "layer_types", None) or ()) == {"full_attention"}:
        return ""
    for name in ("sliding_window", "attention_chunk_size"):
        limit = getattr(text, name, None)  # 0, as in Qwen2-MoE's: none
        if limit and limit not in windows and longest > limit:
            return f"rows are longer than {name}={limit}, of which this model does not tell attention"
    return ""


def drops(module: Any) -> bool:
    """Whether dropout acts: rows that share a beginning would then share its draw, which a padded batch does not."""
    import torch

    if getattr(module.config, "attention_dropout", 0.0):
        return True
    return any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in module.modules())


def _mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Before the backbone: attention is told by the plan. A mask of four dimensions is passed on as it is, so that none
    of n x n is built."""
    import torch

    plan = kwargs.get("packed")
    if plan is None:
        return None
    unused = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=plan.tokens.device)
    return args, {**kwargs, "attention_mask": unused}


def _unpack(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Behind the backbone: hidden states (1, n, h) -> (b, t, h) with zeros where padded, (1, s, h) of what is to be
    kept, (1, s + 1, h) or (1, 1, h) where there are labels."""
    import torch

    plan = kwargs.get("packed")
    if plan is None:
        return output
    hidden = output.last_hidden_state[0]
    if plan.selected is None:
        padded = hidden.new_zeros(plan.real.numel(), hidden.shape[-1])
        padded = padded.index_copy(0, plan.slots, hidden[plan.places.flatten()[plan.slots]])
        output.last_hidden_state = padded.view(*plan.real.shape, -1)
    elif plan.wanted is None:
        output.last_hidden_state = hidden[plan.selected][None]
    elif plan.targets is not None:  # the model's head gets nothing to do
        plan.hidden.append(hidden[plan.selected])
        output.last_hidden_state = hidden[None, :0]
    else:  # the last one is never read: the losses above drop it when they shift
        output.last_hidden_state = hidden[torch.cat([plan.selected, plan.selected[-1:]])][None]
    return output


def _lay_out(module: Any, args: Any, kwargs: dict[str, Any], output: Any, way: PackingState) -> Any:
    """Behind the model: what is said of each label, (s,) -> (b, t - 1) with zeros elsewhere; by TRL's fused head, or by
    packing/head.py, of all that TRL's would have measured."""
    plan = kwargs.get("packed")
    if plan is None or plan.wanted is None:
        return output
    if plan.targets is None:
        if getattr(output, "log_probs", None) is None:
            return output
        found = {name: getattr(output, name)[0] for name in HEAD_OUTPUTS if getattr(output, name) is not None}
    else:
        from finetune_kit.packing.head import log_probs_of

        causal = module.get_base_model() if hasattr(module, "get_base_model") else module
        found = log_probs_of(causal.get_output_embeddings(), plan.hidden.pop(), plan.targets, way.measured[1:])
        labels = kwargs.get("num_items_in_batch")
        output.loss = -found["log_probs"].sum() / (len(plan.targets) if labels is None else labels)
    for name in HEAD_OUTPUTS:
        if name in found:
            padded = found[name].new_zeros(plan.wanted.numel()).index_copy(0, plan.scored, found[name])
            setattr(output, name, padded.view(plan.wanted.shape))
        else:
            setattr(output, name, None)
    output.label_mask = plan.wanted
    return output
