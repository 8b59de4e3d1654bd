"""Decoder layers compiled by torch, one for all: they run the same code on other weights, for any number of tokens.

What is above and below the layers stays as it is, the hooks of packed rows too, and so do the names of weights. A call
in evaluation mode or with a cache, as generation makes it, runs the layers plain.

train.extra.torch_compile says whether; unset: on CUDA, where packed rows are proven, the run is long enough for the
minute that compiling takes, and a step turns out faster by it.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from finetune_kit import distributed
from finetune_kit.models.coverage import layers_of
from finetune_kit.packing import attention
from finetune_kit.packing.forward import drops, packing_of
from finetune_kit.settings.schema import TrainConfig

log = logging.getLogger(__name__)

COMPILED_HERE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")  # settings of transformers
LONG_ENOUGH = 200  # forward and backward passes, below which compiling takes longer than it saves
FASTER = 0.97  # of the plain time, at most
ALIKE = 0.05  # relative difference of the gradient's norm, compiled, from the plain one, in bfloat16
LABELS = 8  # of a row, at most, when steps are timed
TIMED = 3  # steps of which the median counts, after one that warms up


def compile_layers(model: Any, backend: str | None = None, mode: str | None = None) -> int:
    """Compile the decoder layers of a model for training; how many there are. Weights keep their names."""
    import torch

    layers = layers_of(model)
    for layer in layers:
        compiled = torch.compile(layer._call_impl, backend=backend or "inductor", mode=mode, dynamic=True)
        # where torch's own Module.compile puts it; that one would compile generation, too
        layer._compiled_call_impl = partial(_call, layer, compiled)
    if (way := packing_of(model)) is not None and layers:
        way.compiled = True
    return len(layers)


def _call(layer: Any, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    plain = not layer.training or kwargs.get("past_key_values") is not None
    return (layer._call_impl if plain else compiled)(*args, **kwargs)


def plain_layers(model: Any) -> None:
    """Take compile_layers back."""
    for layer in layers_of(model):
        layer._compiled_call_impl = None
    if (way := packing_of(model)) is not None:
        way.compiled = False


def compile_where_it_pays(model: Any, train: TrainConfig, rows: Sequence[Sequence[int]], passes: int) -> str:
    """Compile the layers as train.extra says, or as it turns out; returns a line that says what was chosen, or "".

    rows: token ids of the run's first pass. passes: forward and backward passes of the whole run.
    """
    asked = train.extra.get("torch_compile", True if set(COMPILED_HERE[1:]) & train.extra.keys() else None)
    backend, mode = (train.extra.get(name) for name in COMPILED_HERE[1:])
    if asked is not None:
        count = compile_layers(model, backend, mode) if asked else 0
        return f"{count} layers are compiled, one for all" if count else ""
    way = packing_of(model)
    if model.device.type != "cuda" or way is None or passes < LONG_ENOUGH or distributed.sharding():
        return ""
    return try_compiled(model, rows)


def try_compiled(model: Any, rows: Sequence[Sequence[int]], clock: attention.Clock | None = None) -> str:
    """Compile the layers, and take that back unless a step on `rows` is faster by it and its gradient the same.

    clock: seconds that a step takes, on the model's device.
    """
    timing, was_training = clock or attention.clock_of(model.device), model.training
    model.train()
    try:
        plain, norm = _timed(model, rows, timing)
        count = compile_layers(model)
        compiled, other = _timed(model, rows, timing)
    except Exception as error:  # a compiler fails in many ways, none of which may end a run
        log.debug("layers cannot be compiled: %s", error)
        plain_layers(model)
        return f"layers are not compiled: {type(error).__name__}"
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    said = f"a step takes {compiled:.3f} s with compiled layers, {plain:.3f} s without"
    alike = drops(model) or abs(norm - other) <= ALIKE * norm
    if not alike or not compiled < FASTER * plain:
        plain_layers(model)
        return f"layers are not compiled: {said}" + ("" if alike else f"; gradient norms {other:.2e} and {norm:.2e}")
    return f"{count} layers are compiled, one for all: {said}"


def _timed(model: Any, rows: Sequence[Sequence[int]], clock: attention.Clock) -> tuple[float, float]:
    """Seconds of a forward and backward pass over rows of tokens, and the norm of its gradient."""
    import torch

    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    scores = hasattr(causal, "score")
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    labels = torch.tensor(
        [[*[-100] * max(0, len(row) - LABELS), *row[-LABELS:], *[-100] * (width - len(row))] for row in rows]
    )
    labels = labels.to(model.device)

    def step() -> None:
        with torch.random.fork_rng([torch.cuda.current_device()] if model.device.type == "cuda" else []):
            given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            if scores:
                loss = model(**given).logits.float().square().mean()
            else:  # TRL's head, where the trainer has put it, is asked for few labels: layers are what differs
                loss = model(**given, labels=labels, fused_lm_head=True).loss
            model.zero_grad(set_to_none=True)
            loss.backward()

    with attention.as_in_training(model.device):
        step()
        seconds = statistics.median(clock(step) for _ in range(TIMED))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return seconds, float(torch.nn.utils.get_total_norm(gradients))
