"""Run a model without training it: no gradients, no dropout, and smaller batches where memory is short."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from finetune_kit.errors import ResourceError
from finetune_kit.models.precision import as_trained

log = logging.getLogger(__name__)


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No gradients, no dropout, the arithmetic of training; the model's mode is what it was afterwards.

    `torch.no_grad`, not `inference_mode`: buffers that a model renews on the way (dynamic RoPE, 8-bit state) would
    otherwise be inference tensors, which the next training step refuses.
    """
    import torch

    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with torch.no_grad(), as_trained(model):
            yield
    finally:
        for module in training:
            module.training = True


def in_batches(batches: list[list[int]], run: Callable[[list[int]], None], what: str) -> None:
    """`run` on every batch of row indices; one that does not fit into memory is halved, and so are those after it.

    Raises ResourceError when a single row does not fit.
    """
    waiting = deque(batches)
    limit = max(map(len, batches), default=0)
    while waiting:
        batch = waiting.popleft()
        if len(batch) > limit:
            waiting.extendleft([batch[limit:], batch[:limit]])
            continue
        if _fits(run, batch):
            continue
        if len(batch) == 1:
            raise ResourceError(
                f"Out of memory in {what}, with one row in the batch.",
                "Set a smaller evaluate.max_new_tokens or data.max_length, or use a smaller model.",
            )
        limit = len(batch) // 2
        log.warning("Out of memory in %s with %d rows in a batch: continuing with %d.", what, len(batch), limit)
        waiting.appendleft(batch)


def _fits(run: Callable[[list[int]], None], batch: list[int]) -> bool:
    """Run the batch; False if it ran out of memory, on any device."""
    import torch

    try:
        run(batch)
        return True
    except RuntimeError as error:
        # CUDA and MPS: "out of memory"; the CPU allocator: "not enough memory" or "can't allocate memory".
        signs = ("out of memory", "not enough memory", "can't allocate memory")
        if not any(sign in str(error) for sign in signs):
            raise
    if torch.cuda.is_available():  # outside the except block: there the traceback still holds the tensors
        torch.cuda.empty_cache()
    return False
