"""Batched generation: token ids in, completions out. Evaluation, `generate` and rollouts use it."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from finetune_kit.errors import DataError, ResourceError

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Completion:
    """What the model wrote after one prompt.

    `ids`: the new tokens without the end token. `text`: the same decoded, special tokens left out. `ended`: the model
    stopped by an end token of its own, not by max_new_tokens.
    """

    ids: list[int]
    text: str
    ended: bool


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_token_ids: list[int],
    batch_size: int = 32,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """One completion for each prompt (token ids as rendered for training), in the order of the prompts.

    Greedy unless `do_sample`. Only the settings given here act: sampling settings, penalties and end tokens stored
    with the checkpoint do not. With `seed` the samples are a function of seed, prompts and batch_size, and the
    caller's random state is left as it was; without it they follow torch's global state. `progress` is told how many
    prompts are done. Out of memory: the batch is halved and a warning says so.

    Raises DataError (a prompt without tokens), ResourceError (one prompt alone does not fit into memory).
    """
    empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise DataError(f"Prompt {empty + 1} of {len(prompts)} has no token, so there is nothing to continue.")
    generation_config = _generation_config(
        tokenizer, end_token_ids, max_new_tokens, do_sample, temperature=temperature, top_p=top_p, top_k=top_k
    )
    completions: dict[int, Completion] = {}

    def answer(batch: list[int]) -> None:
        rows = _answer(model, [prompts[index] for index in batch], generation_config)
        for index, ids in zip(batch, rows, strict=True):
            completions[index] = _completion(tokenizer, ids, end_token_ids)
        if progress is not None:
            progress(len(completions))

    # Longest first: neighbours need little padding, and a batch that does not fit shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with evaluation_mode(model), _only_our_settings(model), _seeded(model, seed):
        in_batches(batches, answer, "generation")
    return [completions[index] for index in range(len(prompts))]


@contextlib.contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No gradients, no dropout; the model's mode is what it was afterwards.

    `torch.no_grad`, not `inference_mode`: buffers that a model renews on the way (dynamic RoPE, 8-bit state) would
    otherwise be inference tensors, which the next training step refuses.
    """
    import torch

    training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        with torch.no_grad():
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
                "Set a smaller evaluate.max_new_tokens or data.max_length, or take a smaller model.",
            )
        limit = len(batch) // 2
        log.warning("Out of memory in %s with %d rows in a batch: going on with %d.", what, len(batch), limit)
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


def _generation_config(
    tokenizer: Any, end_token_ids: list[int], max_new_tokens: int, do_sample: bool, **sampling: float
) -> Any:
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end_token_ids[0] if end_token_ids else 0  # any id will do: the attention mask hides it
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        eos_token_id=end_token_ids or None,
        pad_token_id=pad,
        use_cache=True,  # gradient checkpointing switches the cache off in the model's config
        **(sampling if do_sample else {}),
    )


@contextlib.contextmanager
def _only_our_settings(model: Any) -> Iterator[None]:
    """Take the checkpoint's generation settings away for a while.

    transformers fills every unset field of the GenerationConfig it is given from `model.generation_config`
    (`_prepare_generation_config`): a stored repetition_penalty would bend a greedy answer.
    """
    from transformers import GenerationConfig

    stored = [(module, vars(module)["generation_config"]) for module in model.modules() if _has_settings(module)]
    for module, _ in stored:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, generation_config in stored:
            module.generation_config = generation_config


def _has_settings(module: Any) -> bool:
    return "generation_config" in vars(module)


@contextlib.contextmanager
def _seeded(model: Any, seed: int | None) -> Iterator[None]:
    """torch's random state set to `seed` within, and put back after."""
    import torch

    if seed is None:
        yield
        return
    cuda = [model.device] if model.device.type == "cuda" else []  # the CPU's own state is always kept
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        yield


def _answer(model: Any, prompts: list[list[int]], generation_config: Any) -> list[list[int]]:
    """New token ids of one batch, with whatever follows the end token. Rows are padded on the left."""
    import torch

    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), generation_config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1  # by length: the pad token may occur inside a prompt
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=generation_config,
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _completion(tokenizer: Any, ids: list[int], end_token_ids: list[int]) -> Completion:
    """Cut at the first end token: padding only ever follows it, so pad may be the same token."""
    end = next((position for position, token in enumerate(ids) if token in end_token_ids), None)
    kept = ids if end is None else ids[:end]
    return Completion(kept, tokenizer.decode(kept, skip_special_tokens=True), ended=end is not None)
