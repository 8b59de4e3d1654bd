"""One token at a time for all rows of a batch: by a cache that grows, and on CUDA by one graph where that is right.

A step of a language model is hundreds of small kernels: on a GPU the host takes 25 to 30 ms to start them, whatever
they do. With a cache of fixed size each step reads and writes the same memory, so that CUDA can record it once and
start it as a whole. Whether that may be is decided at the first batch of a model: the graph has to give the plain
step's log-probabilities within its type's rounding, and to be faster; a line of the log says which it became and why.
Evaluation, `generate`, PPO's rollouts and TRL's sampling come through here. On a CPU nothing is recorded.
"""

from __future__ import annotations

import copy
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from finetune_kit import distributed
from finetune_kit.generation.cache import Growing, Whole, begin, one_forward, own_types, pick, select

log = logging.getLogger(__name__)

Run = Callable[[], None]
Capture = Callable[[Run], Run]

WORTH = 16  # new tokens from which on recording a step, which takes three of them, pays
CHECK = 16  # tokens between two looks at what has ended, on a device that is waited for when it is asked
PROOF_ROWS, PROOF_STEPS = 32, 8  # of the first batch, what both ways are compared on
EXACT = 1e-4  # largest difference of a float32 log-probability, as for the packed forward
GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")  # layers of a cache that there is a fixed one for
WAITS = ("flash", "flex", "paged")  # kinds of attention that look at the mask on the host in each step


def looks_every(device: torch.device) -> int:
    """Tokens between two looks at what has ended."""
    return 1 if device.type == "cpu" else CHECK


class Fixed:
    """A batch whose cache has all its columns from the start: what `Growing` is, for at most `steps` steps.

    Raises ValueError where the cache cannot be made, and what `capture` raises: it is given the step and returns what
    makes one.
    """

    def __init__(self, begun: Growing, steps: int, capture: Capture) -> None:
        from transformers import StaticCache

        self.model, self.left, self.capture = begun.model, steps, capture
        config = begun.model.config.get_text_config()
        self.cache = StaticCache(config, max_cache_len=begun.mask.shape[1] + steps)
        for ours, theirs in zip(self.cache.layers, begun.cache.layers, strict=True):
            ours.update(theirs.keys, theirs.values)
        ahead = begun.mask.new_ones(len(begun.mask), steps)  # hidden by being ahead of the token
        self.mask = torch.cat([begun.mask, ahead], dim=1)
        self.positions = begun.positions + 1
        self.tokens, self.logits = torch.zeros_like(self.positions), begun.logits.clone()
        self._record()

    def _run(self) -> None:
        self.logits.copy_(one_forward(self.model, self.tokens, self.mask, self.positions, self.cache)[1])
        self.positions.add_(1)

    def _record(self) -> None:
        """Capture the step; it may be run for that, which is taken back."""
        counts = [layer.cumulative_length for layer in self.cache.layers]
        moved = [self.positions, self.logits, *counts]
        kept = [part.clone() for part in moved]
        self.run = self.capture(self._run)
        for part, was in zip(moved, kept, strict=True):
            part.copy_(was)
        for layer, count in zip(self.cache.layers, kept[2:], strict=True):
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = int(count)

    def step(self, tokens: Tensor) -> None:
        """Continue by (b, 1) tokens."""
        self.tokens.copy_(tokens)
        self.run()
        self.left -= 1

    def keep(self, rows: Sequence[int]) -> bool:
        """Continue with some rows alone; whether it did. The step is recorded again, which pays where half of the rows
        are left and many tokens are to come."""
        if 2 * len(rows) > len(self.mask) or self.left < 2 * WORTH:
            return False
        kept = torch.tensor(rows, device=self.mask.device)
        self.run = lambda: None  # lets go of what was recorded for all of them
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]
        for name in ("mask", "positions", "tokens", "logits"):
            setattr(self, name, getattr(self, name)[kept])
        self._record()
        return True


def cuda_graph(run: Run) -> Run:
    """A step as one CUDA graph. Raises RuntimeError for a step that waits for the GPU: that cannot be recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # libraries make themselves ready
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a loader's threads pin memory meanwhile
        run()
    replay: Run = graph.replay
    return replay


@dataclass(frozen=True)
class Choice:
    """How the rows of a model are decoded: by a graph or token by token, why, and whether for all batches."""

    graph: bool
    why: str
    lasts: bool = True


_chosen: weakref.WeakKeyDictionary[Any, Choice] = weakref.WeakKeyDictionary()  # by the model's embedding


def capturing(device: torch.device) -> Capture | None:
    """What records a step on a device; None where nothing does."""
    return cuda_graph if device.type == "cuda" else None


FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)  # what a model that knows no step raises


def refusal(model: Any) -> str:
    """Why a model's step is not even tried as a graph; "" where it is."""
    weight = model.get_input_embeddings().weight
    if hasattr(weight, "device_mesh") or len(set((getattr(model, "hf_device_map", None) or {0: 0}).values())) > 1:
        return "the model is spread over devices"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed keeps the weights in parts"
    attention = str(getattr(model.config.get_text_config(), "_attn_implementation", ""))
    if any(word in attention for word in WAITS):
        return f"attention by {attention} waits for the GPU"
    if any(isinstance(module, torch.nn.Dropout) and module.training and module.p for module in model.modules()):
        return "dropout is on"
    return ""


def _refused_cache(cache: Any, columns: int) -> str:
    """Why a cache cannot be one of `columns` columns; "" where it can."""
    if own_types(cache):
        return f"there is no fixed {type(cache).__name__}"
    for layer in getattr(cache, "layers", ()):
        if type(layer).__name__ not in GROWING:
            return f"there is no fixed {type(layer).__name__}"
        if (getattr(layer, "sliding_window", None) or columns) < columns:
            return f"a window of {layer.sliding_window} tokens is shorter than the rows"
    return "" if getattr(cache, "layers", ()) else f"{type(cache).__name__} has no layers"


def fastest(begun: Growing | Whole, steps: int) -> Growing | Whole | Fixed:
    """The batch that continues for at most `steps` steps, in the fastest way that is right on its device."""
    capture = capturing(begun.mask.device)
    if capture is None or steps < WORTH or isinstance(begun, Whole):
        return begun
    model = begun.model
    key = model.get_input_embeddings()
    columns = begun.mask.shape[1] + steps
    choice = _chosen.get(key)
    if why := refusal(model) or _refused_cache(begun.cache, columns):
        choice = Choice(False, why, lasts=False)
    elif choice is None or not choice.lasts:
        choice = prove(begun, steps, capture)
    _say(key, choice)
    if not choice.graph:
        return begun
    try:
        return Fixed(begun, steps, capture)
    except FAILURES as error:
        _say(key, failed(error))
        return begun


def _say(key: Any, choice: Choice) -> None:
    """Keep a choice, and say it where it is new."""
    if _chosen.get(key) == choice:
        return
    _chosen[key] = choice
    if distributed.is_main():
        log.warning("sampling: %s: %s", "one CUDA graph a token" if choice.graph else "token by token", choice.why)


def failed(error: Exception) -> Choice:
    """What a step that cannot be recorded says of it. Raises the error again where memory was too small for it."""
    if "out of memory" in str(error):
        raise error
    return Choice(False, f"no graph: {type(error).__name__} {(str(error).strip().splitlines() or [''])[0]}")


def prove(begun: Growing, steps: int, capture: Capture) -> Choice:
    """Both ways on the first rows of a batch, which is left as it is: the same greedy tokens go in, and what comes out
    and how long it takes is compared."""
    count = min(steps, PROOF_STEPS)
    try:
        plain, recorded = _some(begun), Fixed(_some(begun), steps, capture)
        times: list[list[float]] = [[], []]
        dtype = plain.cache.layers[0].keys.dtype  # mixed precision may give its logits in float32
        worst = allowed = 0.0
        for _ in range(count):
            tokens = plain.logits.argmax(-1, keepdim=True)
            times[0].append(seconds_of(partial(plain.step, tokens), tokens.device))
            times[1].append(seconds_of(partial(recorded.step, tokens), tokens.device))
            difference, rounding = apart(plain.logits, recorded.logits, dtype)
            if not difference <= rounding:
                why = f"by a graph log-probabilities differ by {difference:.2g}, by rounding at most by {rounding:.2g}"
                return Choice(False, why)
            worst, allowed = max(worst, difference), max(allowed, rounding)
    except FAILURES as error:
        return failed(error)
    slow, fast = (sorted(own)[len(own) // 2] for own in times)
    said = f"{1000 * fast:.1f} ms for {len(plain.mask)} rows against {1000 * slow:.1f} ms"
    if fast >= slow:
        return Choice(False, f"a graph takes {said}")
    return Choice(True, f"{said}; log-probabilities within {worst:.1g} (rounding: {allowed:.1g})")


def apart(one: Tensor, other: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference of two (b, v) logits' log-probabilities, what rounding to `dtype` may make of it).

    A logit is rounded to its type's last bit when it is written, and its hidden state was as often as there are layers,
    which adds up to about as much: twice the spread of a row's logits times the type's epsilon. Tokens whose
    log-probabilities are further apart than that have the same order both times, so greedy tokens differ in ties alone.
    """
    first, second = one.detach().float(), other.detach().float()
    spread = float((first.amax(-1) - first.amin(-1)).amax())
    difference = float((first.log_softmax(-1) - second.log_softmax(-1)).abs().amax())
    return difference, max(EXACT, 2 * torch.finfo(dtype).eps * spread)


def seconds_of(run: Run, device: torch.device) -> float:
    """How long a device takes for something."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _some(begun: Growing) -> Growing:
    """The first rows of a batch, with a cache of their own."""
    rows = torch.arange(min(len(begun.mask), PROOF_ROWS), device=begun.mask.device)
    cache = copy.copy(begun.cache)
    cache.layers = [copy.copy(layer) for layer in begun.cache.layers]
    select(cache, rows)
    return Growing(begun.model, cache, begun.mask[rows], begun.positions[rows], begun.logits[rows])


def through_graphs(model: Any, generation_config: Any) -> dict[str, Any]:
    """Arguments with which `model.generate` decodes here; none where it decodes best by itself."""
    from transformers.generation import GenerationMode

    if capturing(model.device) is None or refusal(model):
        return {}
    simple = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    own = any(getattr(generation_config, name, None) for name in ("return_dict_in_generate", "cache_implementation"))
    more = (generation_config.num_return_sequences or 1) > 1
    if own or more or generation_config.get_generation_mode() not in simple:
        return {}
    return {"custom_generate": decode}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    told: Any = None,
    **model_kwargs: Any,
) -> Tensor:
    """transformers' loop over tokens, as `generate` calls a `custom_generate`: (b, w) prompts -> (b, w + new).

    Settings, processors and criteria are transformers' own and act as there; told: a streamer. What has ended is looked
    at every few tokens, so that the host does not wait for each.
    """
    width, cache = input_ids.shape[1], model_kwargs.get("cache")
    steps = generation_config.max_length - width
    if steps < WORTH or _refused_cache(cache, generation_config.max_length):
        plain: Tensor = model._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            streamer=told,
            **model_kwargs,
        )
        return plain
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    state = fastest(begin(model, input_ids, mask, cache), steps)
    pad = generation_config._pad_token_tensor
    over = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    written = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    every = looks_every(input_ids.device)
    for at in range(steps):
        scores = logits_processor(input_ids, state.logits.to(copy=True, dtype=torch.float32))
        tokens = pick(scores.softmax(-1)) if generation_config.do_sample else scores.argmax(-1, keepdim=True)
        if pad is not None:
            tokens = torch.where(over[:, None], pad, tokens)
        written += ~over
        input_ids = torch.cat([input_ids, tokens], dim=1)
        if told is not None:
            told.put(tokens[:, 0].cpu())
        over = over | stopping_criteria(input_ids, None)
        if at + 1 == steps or ((told is not None or (at + 1) % every == 0) and bool(over.all())):
            break
        state.step(tokens)
    if told is not None:
        told.end()
    return input_ids[:, : width + int(written.max())]
