"""Batched generation: token ids in, completions out. Evaluation, `generate` and rollouts use it."""

from __future__ import annotations

import contextlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune_kit.errors import DataError
from finetune_kit.models.inference import evaluation_mode, in_batches

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call and what came of it. `valid`: it could be read, and fits the schema of a known tool; `ok`: the tool
    gave a result and no error; `seconds`: in the tool."""

    name: str
    arguments: dict[str, Any]
    result: str
    valid: bool
    ok: bool
    seconds: float


@dataclass(slots=True)
class Completion:
    """What the model wrote after one prompt.

    `ids`: the new tokens without the end token; those of a stop string are among them. `text`: the same decoded up to
    the stop string, special tokens left out. `ended`: an end token or a stop string came before max_new_tokens.
    With tools (tool_loop.py) `ids` are those of all its turns, `text` is that of the last one; `calls`: what it called.
    """

    ids: list[int]
    text: str
    ended: bool
    calls: list[Call] = field(default_factory=list)


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
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
    progress: Callable[[int], None] | None = None,
    stream: Callable[[str], None] | None = None,
) -> list[Completion]:
    """One completion for each prompt (token ids as rendered for training), in the order of the prompts.

    Greedy unless `do_sample`. Only the settings given here act: sampling settings, penalties and end tokens stored
    with the checkpoint do not. With `seed` the samples are a function of seed, prompts and batch_size, and the
    caller's random state is left as it was; without it they follow torch's global state. `repetition_penalty` counts
    the tokens of the prompt and the new ones, not the padding; `stop` strings end a text, which is cut before them.
    `progress` is told how many prompts are done, `stream` is given the text of a single prompt piece by piece. Out of
    memory: the batch is halved and a warning says so.

    Raises DataError (a prompt without tokens), ResourceError (one prompt alone does not fit into memory).
    """
    empty = next((index for index, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        raise DataError(f"Prompt {empty + 1} of {len(prompts)} has no token, so there is nothing to continue.")
    if stream is not None and len(prompts) != 1:
        raise ValueError(f"one prompt can be streamed, not {len(prompts)}")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    generation_config = _generation_config(tokenizer, end_token_ids, max_new_tokens, do_sample, sampling)
    completed = partial(completion_of, tokenizer, end_token_ids=end_token_ids, stop=stop)
    completions: dict[int, Completion] = {}

    def answer(batch: list[int]) -> None:
        chosen = [prompts[index] for index in batch]
        controls = _controls(tokenizer, chosen, repetition_penalty, stop)
        if stream is not None:
            controls["streamer"] = _Stream(completed, stop, stream)
        for index, ids in zip(batch, _answer(model, chosen, generation_config, controls), strict=True):
            completions[index] = completed(ids)
        if progress is not None:
            progress(len(completions))

    # Longest first: neighbours need little padding, and a batch that does not fit shows at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if progress is not None:
        progress(0)
    with evaluation_mode(model), _only_our_settings(model), _seeded(model, seed):
        in_batches(batches, answer, "generation")
    return [completions[index] for index in range(len(prompts))]


def _generation_config(
    tokenizer: Any, end_token_ids: list[int], max_new_tokens: int, do_sample: bool, sampling: dict[str, float]
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


def _controls(
    tokenizer: Any, prompts: list[list[int]], repetition_penalty: float, stop: Sequence[str]
) -> dict[str, Any]:
    """What acts on each new token of one batch: the penalty, and the end at a stop string."""
    import torch
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

    width = max(map(len, prompts))
    controls: dict[str, Any] = {}
    if repetition_penalty != 1:
        # As a setting of generate it would punish the padding token, often the end token, in the padded rows only.
        padding = torch.tensor([width - len(prompt) for prompt in prompts])
        penalty = RepetitionPenaltyLogitsProcessor(float(repetition_penalty), prompt_ignore_length=padding)
        controls["logits_processor"] = LogitsProcessorList([penalty])
    if stop:
        # A token is at least one byte of text, so that a stop string just completed lies in the last tokens; they
        # decode otherwise on their own than in their place, so the whole text is asked before a row is stopped.
        last = 2 * max(len(text.encode()) for text in stop) + 8

        def stopped(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            rows = input_ids[:, width:].tolist()
            found = [
                _stop_position(_decode(tokenizer, ids[-last:]), stop) is not None
                and _stop_position(_decode(tokenizer, ids), stop) is not None
                for ids in rows
            ]
            return torch.tensor(found, device=input_ids.device)

        controls["stopping_criteria"] = StoppingCriteriaList([stopped])
    return controls


def _answer(model: Any, prompts: list[list[int]], generation_config: Any, controls: dict[str, Any]) -> list[list[int]]:
    """New token ids of one batch, with whatever follows the end. Rows are padded on the left."""
    import torch

    from finetune_kit.generation.decoding import through_graphs

    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), generation_config.pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1  # by length: the pad token may occur inside a prompt
    if ours := through_graphs(model, generation_config):
        told = controls.pop("streamer", None)
        if told is not None:
            told.put(input_ids)  # as transformers does
        controls |= {**ours, "told": told}
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=generation_config,
        **controls,
    )
    new: list[list[int]] = output[:, width:].tolist()
    return new


def completion_of(tokenizer: Any, ids: list[int], *, end_token_ids: list[int], stop: Sequence[str]) -> Completion:
    """Cut at the first end token (padding only ever follows it, so pad may be the same token) or stop string."""
    end = next((position for position, token in enumerate(ids) if token in end_token_ids), None)
    kept = ids if end is None else ids[:end]
    text = _decode(tokenizer, kept)
    if _stop_position(text, stop) is None:
        return Completion(kept, text, ended=end is not None)

    def holds_one(count: int) -> bool:
        return _stop_position(_decode(tokenizer, kept[:count]), stop) is not None

    # the fewest tokens that hold a stop string: beside slower rows of its batch this one may have continued after it
    kept = kept[: bisect_left(range(len(kept)), True, key=holds_one)]
    text = _decode(tokenizer, kept)
    return Completion(kept, text[: _stop_position(text, stop)], ended=True)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _stop_position(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string of a text begins."""
    return min((text.index(string) for string in stop if string in text), default=None)


class _Stream:
    """A streamer as transformers wants it: tells the text as far as it is sure, and all of it at the end.

    Half a character, and what may become a stop string, waits for the tokens to come.
    """

    def __init__(
        self, completed: Callable[[list[int]], Completion], stop: Sequence[str], tell: Callable[[str], None]
    ) -> None:
        self.completed, self.stop, self.tell = completed, stop, tell
        self.ids: list[int] | None = None  # the first thing to be put is the prompt
        self.told = ""

    def put(self, tokens: Any) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += tokens.tolist()
        completion = self.completed(self.ids)
        text = completion.text if completion.ended else completion.text[: _sure(completion.text, self.stop)]
        if text.startswith(self.told):
            self._tell(text)

    def end(self) -> None:
        self._tell(self.completed(self.ids or []).text)

    def _tell(self, text: str) -> None:
        new = text[len(self.told) :]
        self.told = text
        if new:
            self.tell(new)


def _sure(text: str, stop: Sequence[str]) -> int:
    """How many characters of an unfinished text no further token can take back."""
    text = text.rstrip("\ufffd")  # a character of several bytes, not all of which are there
    longest = max(map(len, stop), default=0)
    starts = range(max(0, len(text) - longest + 1), len(text))
    return next((at for at in starts if any(string.startswith(text[at:]) for string in stop)), len(text))
