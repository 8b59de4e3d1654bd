"""Whether the packed forward may be trusted on the loaded weights: its numbers beside those of the padded one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from finetune_kit.packing import attention

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # largest difference of a float32 log-probability from the padded model's
# With fewer bits, the norm of all differences by that of the numbers around their mean, of log-probabilities and of a
# weight's gradient. In bfloat16 a right kernel is off by 0.03 and at most 0.08 on SmolLM2-135M; on 32 layers of random
# weights by 0.01 and 0.02, and one with its diagonal in the wrong corner by 0.1 or more and 0.3 or more.
ROUGH_TOLERANCE, GRADIENT_TOLERANCE = 0.1, 0.25
PROOF_ROWS, PROOF_TOKENS, PROOF_WEIGHTS = 4, 256, 8  # of a run's first ones, what a varlen kernel is tried on


def disproof(model: Any, causal: Any, rows: Sequence[Sequence[int]], turn_on: Callable[[], None]) -> str:
    """Why the packed forward is not to be trusted on the loaded weights; "" if it gives the padded one's numbers.

    Looked at are four rows of random tokens, two of which begin alike, and, where a varlen kernel attends, the first
    rows of the run, with the gradient at the first weights that are trained: it has come through all layers. `turn_on`
    is called between the padded look and the packed one.
    """
    import torch

    was_training = model.training
    model.eval()
    text = causal.config.get_text_config()
    probe = _probe(text.vocab_size)
    moved = [[*probe[0][:14], (probe[0][14] + 1) % text.vocab_size, *probe[0][15:]], *probe[1:]]
    batches: list[tuple[list[list[int]], list[Any]]] = [(probe, [])]
    if attention.varlen_kernel(causal.device) is not None:
        first = [list(row[:PROOF_TOKENS]) for row in rows[:PROOF_ROWS]] or probe
        batches.append((first, [weight for weight in model.parameters() if weight.requires_grad][:PROOF_WEIGHTS]))
    exact = attention.attention_dtype(causal) == torch.float32
    try:
        padded = [_look(model, batch, text.pad_token_id, trained) for batch, trained in batches]
        turn_on()
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


def proves_own_head(model: Any, use: Callable[[bool, Sequence[str]], None], outputs: Sequence[str]) -> list[str]:
    """Those of `outputs` that TRL's fused head measures, if it is there and packing/head.py equals it; else none.

    `use` puts ours (True) or TRL's (False) in place, and says what is measured.
    """
    import torch

    was_training = model.training
    model.eval()
    ids, mask = _padded(_probe(model.config.get_text_config().vocab_size), 0, model.device)
    labels = ids.masked_fill(mask == 0, -100)

    def numbers(own: bool, names: Sequence[str]) -> dict[str, torch.Tensor]:
        use(own, names)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
        measured = {name: getattr(output, name, None) for name in names}
        return {name: found.float() for name, found in measured.items() if found is not None}

    try:
        trls = numbers(False, outputs)
        ours = numbers(True, list(trls))
    except (TypeError, ValueError):  # without TRL's head the word means nothing
        return []
    finally:
        model.train(was_training)
    if not trls or ours.keys() != trls.keys():
        return []
    exact = attention.attention_dtype(model) == torch.float32
    difference = _difference(list(ours.values()), list(trls.values()), exact)
    return list(trls) if difference <= (TOLERANCE if exact else ROUGH_TOLERANCE / 10) else []


def settle_head(model: Any, temperature: float, outputs: Sequence[str]) -> str:
    """Put the model's own logits in the place of TRL's fused head where that does not give their log-probabilities.

    Returns "" where it does, or where there is none, else by how much they differed, for people. `temperature`: what
    the trainer divides logits by; `outputs`: what the head may have been asked for.
    """
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(causal, "score"):
        return ""
    was_training = model.training
    model.eval()
    ids, mask = _padded(_probe(causal.config.get_text_config().vocab_size), 0, causal.device)
    labels = ids.masked_fill(mask == 0, -100)
    try:
        with torch.no_grad():
            own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            fused = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True, use_cache=False)
            measured = [name for name in outputs if getattr(fused, name, None) is not None]
            expected = (own.float() / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
            difference = _difference([fused.log_probs.float() * mask[:, 1:]], [expected * mask[:, 1:]], exact=False)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):  # without TRL's head the word means none
        return ""
    finally:
        model.train(was_training)
    exact = attention.attention_dtype(causal) == torch.float32
    if difference <= (ROUGH_TOLERANCE / 100 if exact else ROUGH_TOLERANCE):
        return ""
    from finetune_kit.packing.head import through_own_logits  # which needs torch when it is imported

    through_own_logits(causal, temperature, measured)
    return f"TRL's fused head is off by {difference:.1e} of this model's own log-probabilities"


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
