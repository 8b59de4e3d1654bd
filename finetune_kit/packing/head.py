"""The language-model head on the positions that have a label: log-probabilities in chunks, with two products each.

The gradient of a label's log-probability by its hidden state is (its row of the weight) - (the mean row, weighted by
the probabilities), times a number that only backward knows. So the forward pass computes the direction while it has the
logits, and backward multiplies: no logits are kept, and none are computed a second time. Only where the head itself is
trained does its own gradient need them again.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 2**23  # logits at a time: 32 MiB in float32, and as much again for their probabilities
TILE_WORDS = 2**15  # of TRL's head
MEASURES = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # by TRL's names, in this order


def label_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, measured: Collection[str] = ()
) -> dict[str, Tensor]:
    """Of s labels, each (s,): `log_probs` in nats, and those of MEASURES that are asked for, without a gradient.

    hidden: (s, h), weight: (v, h), bias: (v,), targets: (s,) token ids.
    """
    log_probs, *others = _LabelLogProbs.apply(hidden, weight, bias, targets, tuple(measured))  # type: ignore[no-untyped-call]  # torch's
    return {"log_probs": log_probs, **{name: o for name, o in zip(MEASURES, others, strict=True) if o is not None}}


class _Chunk(NamedTuple):
    """Some rows: (c, v) logits less the row's largest, (c, v) probabilities; (c, 1) the largest logit, its token, and
    the logarithm of the sum that the probabilities were divided by."""

    logits: Tensor
    probs: Tensor
    top: Tensor
    best: Tensor
    log_sum: Tensor


class _Chunks:
    """Logits and probabilities of some rows at a time, in the same memory each time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.size = max(1, min(len(hidden), CHUNK // len(weight)))
        self.logits, self.probs = (hidden.new_empty(self.size, len(weight)) for _ in range(2))
        self.rows = [slice(at, min(at + self.size, len(hidden))) for at in range(0, max(len(hidden), 1), self.size)]

    def of(self, rows: slice) -> _Chunk:
        count = rows.stop - rows.start
        logits, probs = self.logits[:count], self.probs[:count]
        torch.mm(self.hidden[rows], self.weight.t(), out=logits)
        if self.bias is not None:
            logits += self.bias
        top, best = logits.max(dim=-1, keepdim=True)
        torch.exp(logits.sub_(top), out=probs)
        # torch.softmax adds up tens of thousands of words less exactly than torch.sum: SmolLM2's entropy by 5e-4
        total = probs.sum(dim=-1, keepdim=True)
        return _Chunk(logits, probs.div_(total), top, best, total.log())


class _LabelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, measured: tuple[str, ...]
    ) -> tuple[Tensor | None, ...]:
        found: dict[str, list[Tensor]] = {name: [] for name in ("log_probs", *measured)}
        direction = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunks = _Chunks(hidden, weight, bias)
        for rows in chunks.rows:
            logits, probs, top, best, log_sum = chunks.of(rows)
            labels = targets[rows, None]
            found["log_probs"].append((logits.gather(1, labels) - log_sum)[:, 0])
            if "is_top1" in measured:
                found["is_top1"].append((best == labels)[:, 0])
            if "mean_logits" in measured:
                found["mean_logits"].append(top[:, 0] + logits.mean(dim=-1))
            # products in the logits' place, which nothing needs any more; a matrix product would sum them one by one
            if "entropy" in measured:
                found["entropy"].append(log_sum[:, 0] - logits.mul_(probs).sum(dim=-1))
            if "log_sum_sq_probs" in measured:
                found["log_sum_sq_probs"].append(torch.mul(probs, probs, out=logits).sum(dim=-1).log())
            if direction is not None:
                torch.mm(probs, weight, out=direction[rows])
                torch.sub(weight[targets[rows]], direction[rows], out=direction[rows])
        ctx.save_for_backward(direction, hidden, weight, bias, targets)
        outputs = [torch.cat(found[name]) if name in found else None for name in ("log_probs", *MEASURES)]
        ctx.mark_non_differentiable(*(output for output in outputs[1:] if output is not None))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, by: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        direction, hidden, weight, bias, targets = ctx.saved_tensors
        by_hidden = by[:, None] * direction if direction is not None else None
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        if by_weight is not None or by_bias is not None:
            chunks = _Chunks(hidden, weight, bias)
            for rows in chunks.rows:
                by_logits = chunks.of(rows).probs.mul_(-by[rows, None])
                by_logits.scatter_add_(1, targets[rows, None], by[rows, None])
                if by_weight is not None:
                    by_weight.addmm_(by_logits.t(), hidden[rows])
                if by_bias is not None:
                    by_bias += by_logits.sum(dim=0)
        return by_hidden, by_weight, by_bias, None, None


def log_probs_of(head: Any, hidden: Tensor, targets: Tensor, measured: Collection[str] = ()) -> dict[str, Tensor]:
    """label_log_probs of a head that it stands for: on a CPU by ours, on CUDA by TRL's kernels, which TRL's own head
    calls only when the host has waited for the number of labels."""
    if hidden.device.type == "cpu":
        return label_log_probs(hidden, head.weight, head.bias, targets, measured)
    from trl.kernels import ChunkedLogProbFunction

    found = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, TILE_WORDS, None, 1.0, ("log_probs", *measured)
    )
    return {name: o for name, o in zip(("log_probs", *MEASURES), found, strict=True) if o is not None}


def stands_for(head: Any) -> bool:
    """Whether log_probs_of may compute what a head does: whole weights of a plain layer, and on a CPU in float32."""
    if is_plain(head):
        return True
    whole = type(head) is torch.nn.Linear and not hasattr(head.weight, "device_mesh")
    return whole and head.weight.device.type == "cuda"


def is_plain(head: Any) -> bool:
    """Whether label_log_probs may compute what this head does: whole float32 weights, on a CPU."""
    if type(head) is not torch.nn.Linear or torch.is_autocast_enabled("cpu"):
        return False
    weight, sharded = head.weight, hasattr(head.weight, "device_mesh")
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and not sharded


def through_own_logits(causal: Any, temperature: float, measured: Collection[str]) -> None:
    """Have a model that TRL has given its fused head say the same from the logits of its own forward.

    TRL's multiplies hidden states by the head's weight, with the scales and caps that it knows by name. What else a
    model does between its backbone and its logits, such as a layer before the head, acts here. It takes the memory of
    all logits of a pass. `temperature`: what logits are divided by; `measured`: of MEASURES, what is to be said besides
    log-probabilities.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    plain = causal.forward  # TRL's, which without its word is the model's own

    @functools.wraps(type(causal).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return plain(*args, **kwargs, **{name: value for name, value in given.items() if value is not None})
        output = plain(*args, **{**kwargs, "use_cache": False})
        labels = labels[:, 1:]
        mask = labels != -100
        logits = output.logits[:, :-1][mask].float() / temperature
        log_probs = logits.log_softmax(-1)
        found = {"log_probs": log_probs.gather(1, labels[mask][:, None])[:, 0]}
        if "entropy" in measured:
            found["entropy"] = -(log_probs.exp() * log_probs).sum(-1)
        if "log_sum_sq_probs" in measured:
            found["log_sum_sq_probs"] = (2 * log_probs.detach()).logsumexp(-1)
        if "mean_logits" in measured:
            found["mean_logits"] = logits.detach().mean(-1)
        if "is_top1" in measured:
            found["is_top1"] = logits.argmax(-1) == labels[mask]
        laid_out = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in found.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, routers = -found["log_probs"].sum() / count, getattr(output, "aux_loss", None)
        if routers is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * routers
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=routers, **laid_out)

    causal.forward = types.MethodType(forward, causal)
