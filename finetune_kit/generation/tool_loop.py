"""Answers in which the model calls tools: what it writes, the call carried out, the result, what it writes next.

A turn that ends is read for calls by its chat template's own syntax (data/calls.py). Each call is checked, carried out
with a time limit, and its result is put in with the very tokens that training has between such turns
(data/chat.after_calls); the row continues with its cache. In a batch a row whose tool is at work stands still while the
others continue. Where a template writes the turns before otherwise once there are results (thinking models), the row
starts over with the conversation as it would be served.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune_kit.data.calls import ParsedCall, Syntax, parse_calls, syntax_of
from finetune_kit.data.chat import after_calls, render_prompt
from finetune_kit.data.records import Message
from finetune_kit.errors import DataError
from finetune_kit.generation import cache
from finetune_kit.generation.generate import Call, Completion, completion_of
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.models.inference import evaluation_mode, in_batches
from finetune_kit.tools.tool import Outcome, carry_out

log = logging.getLogger(__name__)

AT_WORK = 4  # tools that run at one time

Draw = Callable[[Any, list[list[int]]], list[int]]  # (rows, vocabulary) logits, each row's tokens -> a token each
Told = Callable[[str, Any], None]  # "token", its id; "turn", None; "call", a Call


@dataclass(slots=True)
class Answer(Completion):
    """`after`: the token ids that followed the prompt, `own`: which of them the model wrote; both are empty where the
    template wrote the turns before otherwise on the way. `messages`: the turns before the last one, prompt included."""

    after: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)


@dataclass(slots=True)
class _Row:
    """One conversation on its way. `unfed`: ids that the model has not been given yet; `turn`: where in `ids` the turn
    that it writes began; `state`: writing, waiting (for its tools), moved (starts over) or over."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    ids: list[int]
    prompt: int
    unfed: deque[int] = field(default_factory=deque)
    own: list[bool] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    rewritten: bool = False
    turn: int = 0
    state: str = "writing"
    ended: bool = False
    calls: list[Call] = field(default_factory=list)
    said: str = ""
    parsed: list[ParsedCall] = field(default_factory=list)
    waits: list[Future[Outcome]] = field(default_factory=list)


def greedy(logits: Any, rows: list[list[int]]) -> list[int]:
    """The likeliest token of each row."""
    found: list[int] = logits.argmax(-1).tolist()
    return found


def sampling(
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    do_sample: bool = True,
    repetition_penalty: float = 1.0,
) -> Draw:
    """A draw by transformers' own processors, in their order; what is drawn follows from the seed and the calls."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps: list[Any] = []
    if repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if do_sample:
        steps.append(TemperatureLogitsWarper(float(temperature)))
        steps += [TopKLogitsWarper(top_k)] if top_k else []
        steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        steps += [MinPLogitsWarper(min_p)] if min_p else []
    processors, generators = LogitsProcessorList(steps), {}

    def draw(logits: Any, rows: list[list[int]]) -> list[int]:
        device = logits.device
        scores = torch.cat(
            [processors(torch.tensor([row], device=device), logits[at : at + 1]) for at, row in enumerate(rows)]
        )
        if not do_sample:
            return greedy(scores, rows)
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        found: list[int] = cache.pick(scores.softmax(-1), generators[device])[:, 0].tolist()
        return found

    return draw


def answer_with_tools(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[list[Message], list[dict[str, Any]] | None]],
    toolbox: Toolbox,
    *,
    max_new_tokens: int,
    end_token_ids: list[int],
    batch_size: int = 32,
    draw: Draw = greedy,
    stop: Sequence[str] = (),
    positions: int | None = None,
    progress: Callable[[int], None] | None = None,
    told: Told | None = None,
    in_step: bool = False,
) -> list[Answer]:
    """One answer for each (conversation, tools listed in it), in their order.

    `max_new_tokens`: of the model's own, in all turns of an answer together; `positions`: the longest conversation in
    tokens that the model knows. `draw` picks each token. Calls beyond `toolbox.max_calls` get an error for a result.
    `told` of a single conversation is given what happens as it does. `in_step`: the rows of a batch wait for each
    other's tools, so that what `draw` is asked does not depend on how long a tool takes.
    Raises DataError where the template's calls cannot be read back, or for a prompt without tokens.
    """
    syntax = syntax_of(tokenizer, toolbox.kwargs)
    ends = list(dict.fromkeys([*end_token_ids, syntax.end_id]))
    prompts = [render_prompt(tokenizer, turns, tools, toolbox.kwargs, toolbox.in_text) for turns, tools in asked]
    loop = _Loop(model, tokenizer, toolbox, syntax, ends, max_new_tokens, draw, tuple(stop), positions, told, in_step)
    found: dict[int, Answer] = {}

    def run(batch: list[int]) -> None:
        rows = [_row(asked[index], prompts[index]) for index in batch]
        with ThreadPoolExecutor(AT_WORK) as pool:
            while going := [row for row in rows if row.state != "over"]:
                loop.go(going, pool)
        found.update(zip(batch, map(loop.answer, rows), strict=True))
        if progress is not None:
            progress(len(found))

    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    with evaluation_mode(model):
        in_batches([order[at : at + batch_size] for at in range(0, len(order), batch_size)], run, "generation")
    return [found[index] for index in range(len(prompts))]


def _row(asked: tuple[list[Message], list[dict[str, Any]] | None], ids: list[int]) -> _Row:
    if not ids:
        raise DataError("A prompt has no token, so there is nothing to continue.")
    return _Row(list(asked[0]), asked[1], list(ids), len(ids), turn=len(ids))


class _Loop:
    """What all batches of one call have in common."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        toolbox: Toolbox,
        syntax: Syntax,
        ends: list[int],
        max_new_tokens: int,
        draw: Draw,
        stop: tuple[str, ...],
        positions: int | None,
        told: Told | None,
        in_step: bool,
    ) -> None:
        self.model, self.tokenizer, self.toolbox, self.syntax, self.ends = model, tokenizer, toolbox, syntax, ends
        self.max_new_tokens, self.draw, self.stop, self.positions = max_new_tokens, draw, stop, positions
        self.told, self.in_step = told or (lambda what, value: None), in_step

    def go(self, rows: list[_Row], pool: ThreadPoolExecutor) -> None:
        """All rows from where they are until each is over, or has to start over."""
        batch = cache.begin_rows(self.model, [row.ids for row in rows])
        stands = isinstance(batch, cache.Whole) or cache.is_plain(batch.cache)
        for row in rows:
            row.state = "writing"
            row.unfed.clear()
        device = self.model.device
        while True:
            self._write(rows, batch.logits, pool)
            self._gather(rows, wait_for_all=self.in_step or not stands)
            if not any(row.state in ("writing", "waiting") for row in rows):
                return
            places = [place for place, row in enumerate(rows) if row.state in ("writing", "waiting")]
            if len(places) < len(rows) and batch.keep(places):
                rows = [rows[place] for place in places]
            moving = [row for row in rows if row.state == "writing"]
            # a state without columns, which cannot stand still either, is stepped token by token
            count = min(len(row.unfed) for row in moving) if stands else 1
            fed = [[row.unfed.popleft() for _ in range(count)] if row.state == "writing" else [] for row in rows]
            tokens = torch.tensor([own or [0] * count for own in fed], device=device)
            real = torch.tensor([[1 if own or not stands else 0] * count for own in fed], device=device)
            batch.feed(tokens, real)

    def _write(self, rows: list[_Row], logits: Any, pool: ThreadPoolExecutor) -> None:
        """The next token of every row that has been given all of its tokens."""
        places = [place for place, row in enumerate(rows) if row.state == "writing" and not row.unfed]
        if not places:
            return
        chosen = [rows[place] for place in places]
        tokens = self.draw(logits[places].float(), [row.ids for row in chosen])
        for row, token in zip(chosen, tokens, strict=True):
            row.ids.append(token)
            row.own.append(True)
            row.unfed.append(token)
            row.written.append(token)
            self.told("token", token)
            full = self.positions is not None and len(row.ids) >= self.positions
            if token in self.ends:
                self._end_of_turn(row, pool)
            elif len(row.written) >= self.max_new_tokens or full or self._stopped(row):
                row.state = "over"

    def _stopped(self, row: _Row) -> bool:
        if not self.stop:
            return False
        text = str(self.tokenizer.decode(row.ids[row.turn :], skip_special_tokens=True))
        return any(stop in text for stop in self.stop)

    def _end_of_turn(self, row: _Row, pool: ThreadPoolExecutor) -> None:
        text = str(self.tokenizer.decode(row.ids[row.turn : -1], skip_special_tokens=False))
        row.said, row.parsed = parse_calls(self.syntax, text, row.tools)
        if not row.parsed:
            row.ended, row.state = True, "over"
            return
        self.told("turn", None)
        if len(row.written) >= self.max_new_tokens:
            row.state = "over"  # no token is left to say anything about what the tool would give
            return
        row.state = "waiting"
        row.waits = [self._carried_out(call, len(row.calls) + nth, pool) for nth, call in enumerate(row.parsed)]

    def _carried_out(self, call: ParsedCall, nth: int, pool: ThreadPoolExecutor) -> Future[Outcome]:
        box, done = self.toolbox, Future[Outcome]()
        tool = box.tools.get(call.name)
        if call.error:
            done.set_result(Outcome(f"Error: {call.error}", valid=False, ok=False))
        elif nth >= box.max_calls:
            done.set_result(Outcome(f"Error: no more than {box.max_calls} calls in one answer", valid=True, ok=False))
        elif tool and not tool.built_in and box.allow is not None and not box.allow(tool, call.arguments):
            done.set_result(Outcome("Error: the user does not allow this call", valid=True, ok=False))
        elif tool and tool.waits:
            return pool.submit(carry_out, box.tools, call.name, call.arguments, box.timeout)
        else:
            done.set_result(carry_out(box.tools, call.name, call.arguments, box.timeout))
        return done

    def _gather(self, rows: list[_Row], wait_for_all: bool) -> None:
        """Put the results in where they are there; where no row can continue, wait for the first."""
        while waiting := [row for row in rows if row.state == "waiting"]:
            for row in waiting:
                if all(future.done() for future in row.waits):
                    self._put_in(row)
            waiting = [row for row in rows if row.state == "waiting"]
            if not waiting or (not wait_for_all and any(row.state == "writing" for row in rows)):
                return
            wait([future for row in waiting for future in row.waits if not future.done()], return_when=FIRST_COMPLETED)

    def _put_in(self, row: _Row) -> None:
        """The results of a row's calls as the turns that follow them, and their tokens as the next to be fed."""
        outcomes = [future.result() for future in row.waits]
        made = [
            Call(call.name, call.arguments, outcome.text, outcome.valid, outcome.ok, outcome.seconds)
            for call, outcome in zip(row.parsed, outcomes, strict=True)
        ]
        for call in made:
            row.calls.append(call)
            self.told("call", call)
        answer, results = turns_of(row.said, made)
        box = self.toolbox
        try:
            ids, continues = after_calls(
                self.tokenizer, row.messages, answer, results, row.tools, box.kwargs, box.in_text
            )
        except DataError as error:  # a template may know no call behind a result, or not what the model made up
            log.warning("an answer ends at its call %d: %s", len(row.calls), error.message)
            row.state = "over"
            return
        row.messages += [answer, *results]
        if continues:
            row.ids += ids
            row.own += [False] * len(ids)
            row.unfed.extend(ids)
            row.state = "writing"
        else:
            row.ids, row.state, row.rewritten = ids, "moved", True
        row.turn = len(row.ids)
        if self.positions is not None and len(row.ids) >= self.positions:
            row.state = "over"

    def answer(self, row: _Row) -> Answer:
        """What a row that is over has become."""
        last = completion_of(self.tokenizer, row.ids[row.turn :], end_token_ids=self.ends, stop=self.stop)
        ended = row.ended or (bool(self.stop) and last.ended)
        written = row.written[:-1] if row.ended else row.written
        after, own = ([], []) if row.rewritten else (row.ids[row.prompt :], row.own)
        return Answer(written, last.text, ended, row.calls, after, own, row.messages)


def turns_of(said: str, calls: Sequence[Call]) -> tuple[Message, list[Message]]:
    """The assistant's turn that makes these calls, and the turns of their results."""
    made = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    results = [{"role": "tool", "name": call.name, "content": call.result} for call in calls]
    return {"role": "assistant", "content": said, "tool_calls": made}, results
