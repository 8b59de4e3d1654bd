"""The packed forward: the same numbers as a padded batch, without the padding and with shared beginnings computed once.

A batch of padded rows reaches the model. Its padding is dropped, rows that begin with the same tokens keep that
beginning once, and what is left is laid end to end as one row of n tokens. The layers run over those; in attention each
segment sees its own beginning and itself. Behind the backbone the hidden states are laid out as the caller expects:
padded rows, or, where labels are given, only the positions in front of a label (or those that a mask wants kept), so
that the language-model head runs nowhere else; what TRL's fused head says of labels is laid out in padded rows again.
On a CPU, where TRL's head computes all logits twice, model/head.py takes its place if it proves equal.

Attention is SDPA, segment by segment, on a CPU, and one call of torch's varlen attention on CUDA. Everything else
above the backbone is unchanged, and no forward is replaced: hooks before and behind the model and behind the backbone,
and one attention function of transformers' AttentionInterface.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_kit import processes
from finetune_kit.model import kernel
from finetune_kit.model.layout import Plan, make_plan
from finetune_kit.model.proof import disproof, proves_own_head

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ATTENTION = "finetune_kit_packed"
HEAD_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # of TRL's head, of each label


@dataclass
class Way:
    """How a model's calls are packed.

    windows: the sliding windows that attention was given so far; rows longer than another one stay padded. said: why
    batches stayed padded so far, each of which a line says once. own_head: model/head.py stands for TRL's fused head.
    """

    windows: set[int | None] = field(default_factory=set)
    said: set[str] = field(default_factory=set)
    own_head: bool = False


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
        return kernel.attend_at_once(packed.varlen, query, key, value, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    # by split, whose gradient is one cat: that of a slice is as long as the packed row
    lengths = [segment.length for segment in packed.segments]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    at = {segment.start: index for index, segment in enumerate(packed.segments)}
    outputs = []
    for index, segment in enumerate(packed.segments):
        seen = [at[part.start] for part in segment.before] + [index]
        its_keys, its_values = (torch.cat([states[part] for part in seen], dim=2) for states in (keys, values))
        mask, ahead = None, its_keys.shape[2] - segment.length
        windowed = sliding_window is not None and its_keys.shape[2] > sliding_window
        if ahead or windowed:  # token i of the segment sees all before the segment, and i + 1 of its own
            mask = torch.ones(segment.length, its_keys.shape[2], dtype=torch.bool, device=query.device).tril(ahead)
        if mask is not None and sliding_window is not None:  # of these, the last ones
            mask = mask.triu(ahead - sliding_window + 1)
        outputs.append(
            scaled_dot_product_attention(
                queries[index],
                its_keys,
                its_values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and segment.length > 1,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def enable(model: Any, rows: Sequence[Sequence[int]] = (), own_head: bool = False) -> str:
    """Turn the packed forward on for a language model or a sequence classifier, adapter or not, if it proves equal on
    the loaded weights.

    `rows`: token ids of the first rows of the run, which a varlen kernel has to prove equal on, too.
    Returns "" where it is on, else the reason why the padded forward stays. It acts on calls with a batch of more than
    padding to drop and without a cache; generation is as before. `own_head`: of what TRL's fused head says, nothing
    but log-probabilities gets a gradient, so that model/head.py may stand for it.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    with kernel.as_in_training(causal.device):
        refused = kernel.refusal(causal.device, kernel.attention_dtype(causal), causal.config)
        return refused or _enable(model, causal, rows, own_head)


def _enable(model: Any, causal: Any, rows: Sequence[Sequence[int]], own_head: bool) -> str:
    config = causal.base_model.config  # a classifier's backbone has one of its own
    before = config._attn_implementation
    if before != "sdpa":
        return f"the packed forward needs sdpa attention, not {before}"
    register()
    # a classifier finds a row's last token in the padded batch: it is packed behind that, in front of the backbone
    outer = causal.base_model if hasattr(causal, "score") else model
    way = Way()
    handles = [
        outer.register_forward_pre_hook(partial(_pack, way=way), with_kwargs=True),
        causal.base_model.register_forward_hook(_unpack, with_kwargs=True),
        outer.register_forward_hook(_lay_out, with_kwargs=True),
    ]

    def turn_on() -> None:
        config._attn_implementation = ATTENTION

    def use(own: bool) -> None:
        way.own_head = own

    reason = disproof(model, causal, rows, turn_on)
    if reason:
        for handle in handles:
            handle.remove()
        config._attn_implementation = before
    else:
        use(own_head and not hasattr(causal, "score") and proves_own_head(model, use, HEAD_OUTPUTS))
    return reason


def acts_on(model: Any) -> bool:
    """Whether calls of this model are packed, but for rows longer than a window that its attention is not told of.

    Such a call may have a (b, t) mask as logits_to_keep: its logits are those of the positions that are true there,
    (1, s, v); of a batch that stays padded, those of the places where any row has one, (b, k, v).
    """
    hooks = (hook for hook in model._forward_pre_hooks.values() if isinstance(hook, partial))
    if not any(hook.func is _pack for hook in hooks):
        return False
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return not kernel.refusal(causal.device, kernel.attention_dtype(causal), causal.config)


def register() -> None:
    """Make the attention of packed rows known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for calls without a plan, such as generation


def _pack(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], way: Way
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the model: replace a padded batch by its packed row; None leaves a call as it is."""
    import torch

    keep = kwargs.get("logits_to_keep")
    if not isinstance(keep, torch.Tensor) or keep.dim() != 2:
        return _pack_batch(module, args, kwargs, way)
    packed = _pack_batch(module, args, {**kwargs, "logits_to_keep": 0}, way, keep.cpu())
    return packed or (args, {**kwargs, "logits_to_keep": keep.any(dim=0).nonzero()[:, 0]})


def _pack_batch(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], way: Way, keep: torch.Tensor | None = None
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
    device, (ids, mask) = ids.device, (ids.cpu(), mask.cpu())  # what follows asks for many numbers
    if not bool(mask.any(dim=1).all()):
        return None
    longest = int(mask.sum(dim=1).max())
    if reason := kernel.refusal(device, kernel.attention_dtype(causal), causal.config) or _too_long(
        causal, longest, way.windows
    ):
        if reason not in way.said and processes.is_main():
            way.said.add(reason)
            log.warning("padded batches: %s", reason)
        return None
    plan = make_plan(ids, mask, share=not (module.training and _drops(module)))
    kwargs = {**kwargs, "use_cache": False}
    if keep is not None:
        plan = replace(plan, selected=plan.places[keep])
    if labels is not None:
        labels = labels.cpu()
        wanted = (labels[:, 1:] != -100) & plan.real[:, :-1]
        if not bool(wanted.any()):
            return None
        plan = replace(plan, selected=plan.places[:, :-1][wanted], wanted=wanted)
        targets = labels[:, 1:][wanted]
        from finetune_kit.model.head import is_plain  # which needs torch when it is imported

        if way.own_head and kwargs.get("fused_lm_head") and is_plain(causal.get_output_embeddings()):
            plan, targets = replace(plan, targets=targets), targets[:0]
        # the losses above shift labels by one: the first has nothing before it
        kwargs["labels"] = torch.cat([labels.new_full((1,), -100), targets])[None].to(device)
    attends = kernel.varlen_kernel(device)
    varlen = kernel.make_varlen(plan.segments, attends, device) if attends else None
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
