"""Ask a finished run. It is fed the tokens of its training, and generation is the one that evaluation uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune_kit.data.calls import syntax_of
from finetune_kit.data.chat import end_token_ids, render_prompt
from finetune_kit.data.records import Message
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.generation.generate import Completion, generate
from finetune_kit.generation.prompt_file import Line, answered, append_answers, read_prompts
from finetune_kit.generation.tool_loop import Answer, answer_with_tools, greedy, sampling
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.models.load import load_base
from finetune_kit.models.source import load_model_config
from finetune_kit.runs.saved import FinishedRun, check_writes, model_of, own_model, tokenizer_of
from finetune_kit.system import signals
from finetune_kit.system.parsing import read_object
from finetune_kit.system.terminal import doing

SEEDS = 2**32
COMMANDS = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer, /help says this again."
ENDS = ("/exit", "/quit", "/bye", "/q", "exit", "quit")  # the last two are what people type who are used to a shell
HELPS = ("/help", "/?", "help")


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; None: not given.

    Greedy, unless one of temperature (above 0), top_p, top_k or min_p is given: then samples, at temperature 1 if none
    is given. A seed gives the same samples again; 0 where none is given.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def samples(self) -> bool:
        filters = (self.top_p, self.top_k, self.min_p)
        return any(value is not None for value in filters) if self.temperature is None else self.temperature > 0

    def arguments(self, shift: int = 0) -> dict[str, Any]:
        """Arguments of `generation.generate`; `shift` moves the seed, so that no two calls draw the same noise."""
        given: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
        }
        if self.samples:
            chosen = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "min_p")}
            given |= {name: value for name, value in chosen.items() if value is not None}
            given |= {"do_sample": True, "seed": ((self.seed or 0) + shift) % SEEDS}
        return given


def check(decoding: Decoding) -> None:
    """Raises SettingsError for a setting out of range, or one that has no effect."""
    d = decoding
    ranges = (
        ("--max-new-tokens", d.max_new_tokens, d.max_new_tokens >= 1, "1 or more"),
        ("--temperature", d.temperature, d.temperature is None or 0 <= d.temperature < math.inf, "0 (greedy) or more"),
        ("--top-p", d.top_p, d.top_p is None or 0 < d.top_p <= 1, "above 0 and at most 1"),
        ("--top-k", d.top_k, d.top_k is None or d.top_k >= 0, "0 (all tokens) or more"),
        ("--min-p", d.min_p, d.min_p is None or 0 <= d.min_p <= 1, "0 to 1"),
        ("--repetition-penalty", d.repetition_penalty, 0 < d.repetition_penalty < math.inf, "above 0 (1: none)"),
        ("--seed", d.seed, d.seed is None or 0 <= d.seed < SEEDS, f"0 to {SEEDS - 1}"),
    )
    for name, value, fine, expected in ranges:
        if not fine:
            raise SettingsError(f"{name} {value:g}: expected {expected}.")
    if "" in d.stop:
        raise SettingsError("--stop '': an empty string would end every answer before it begins.", "Leave it out.")
    if d.samples:
        return
    for name in ("top_p", "top_k", "min_p", "seed"):
        if getattr(d, name) is not None:
            raise SettingsError(
                f"--{name.replace('_', '-')} has no effect on greedy answers.", "Add --temperature 1, or leave it out."
            )


@dataclass(frozen=True)
class LoadedRun:
    """A run that is ready to be asked.

    `base`: what answers beside it, None where nothing does. For an adapter it is the same model, with the adapter
    switched off. `positions`: longest prompt with its answer, in tokens, where the model has such a limit.
    """

    run: FinishedRun
    tokenizer: Any
    end_token_ids: list[int]
    positions: int | None
    system: str | None
    decoding: Decoding
    toolbox: Toolbox | None = None
    model: Any = None
    base: Any = None


def prepare(
    run: FinishedRun, decoding: Decoding, system: str | None = None, toolbox: Toolbox | None = None
) -> LoadedRun:
    """Everything but the weights, so that prompts can be checked before those are loaded.

    `system` takes the place of the run's own system prompt; answers may call what is in `toolbox`. Raises SettingsError
    for settings that cannot be.
    """
    check(decoding)
    check_writes(run)
    tokenizer = tokenizer_of(run)
    if system and _is_bare(run, tokenizer):
        raise SettingsError("--system has no effect: this run was trained on bare prompts.", "Leave it out.")
    if toolbox is not None:
        if _is_bare(run, tokenizer):
            raise SettingsError("--tools has no effect: this run was trained on bare prompts.", "Leave it out.")
        data = run.config.data
        toolbox = replace(toolbox, kwargs=data.chat_template_kwargs, in_text=data.special_tokens_in_text)
        syntax_of(tokenizer, toolbox.kwargs)  # refused before the weights are loaded
    shapes = load_model_config(own_model(run)).get_text_config()
    positions = getattr(shapes, "max_position_embeddings", None)  # ALiBi and state-space models have no such limit
    own = run.config.data.system_prompt if system is None else system
    return LoadedRun(run, tokenizer, _end_token_ids(run, tokenizer), positions, own or None, decoding, toolbox)


def _end_token_ids(run: FinishedRun, tokenizer: Any) -> list[int]:
    """What the run saved as the ends of its answers: those of the template, and any its training rows had besides."""
    path = run.folder / "generation_config.json"
    saved = read_object(path).get("eos_token_id")  # the others have no say here, whatever they are
    ids = saved if isinstance(saved, list) else [saved] if saved is not None else []
    if not all(isinstance(number, int) for number in ids):
        raise SettingsError(f"{path}: eos_token_id is {saved!r}; expected token numbers.", "Download the file again.")
    return list(dict.fromkeys([*ids, *end_token_ids(tokenizer, run.config.data.chat_template_kwargs)]))


def load(asked: LoadedRun, with_base: bool = False) -> LoadedRun:
    """With its weights, and those of the base where both are to answer."""
    model = model_of(asked.run)
    if not with_base:
        return replace(asked, model=model)
    # Two copies for inference are far less than what training all weights took (16 bytes each), so both can stay.
    return replace(asked, model=model, base=model if asked.run.is_adapter else load_base(asked.run.config.model))


def prompt_ids(asked: LoadedRun, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The tokens of a conversation that waits for an answer, as they came before answers in training.

    Raises DataError for one that the run's template cannot write, or too long for the model.
    """
    data = asked.run.config.data
    kwargs, in_text = data.chat_template_kwargs, data.special_tokens_in_text
    if _is_bare(asked.run, asked.tokenizer):
        if len(messages) != 1 or tools:
            raise DataError(
                "This run was trained on bare prompts, without a chat template: it knows no turns.", "Give a `prompt`."
            )
        ids = render_prompt(asked.tokenizer, [{**messages[0], "plain": True}], None, kwargs, in_text)
    else:
        if asked.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": asked.system}, *messages]
        tools = tools or (asked.toolbox.schemas if asked.toolbox else None)
        ids = render_prompt(asked.tokenizer, messages, tools, kwargs, in_text)
    wanted = asked.decoding.max_new_tokens
    if asked.positions is not None and len(ids) + wanted > asked.positions:
        room = asked.positions - len(ids)
        raise DataError(
            f"{len(ids)} tokens of prompt and {wanted} to come: the model has positions for {asked.positions}.",
            f"Set --max-new-tokens {room}, or shorten the prompt." if room > 0 else "Shorten the prompt.",
        )
    return ids


def _is_bare(run: FinishedRun, tokenizer: Any) -> bool:
    """Whether prompts are text as it is, without turns."""
    return not run.config.data.apply_chat_template or not tokenizer.chat_template


def answers(
    asked: LoadedRun,
    prompts: list[list[int]],
    *,
    of_base: bool = False,
    shift: int = 0,
    stream: Callable[[str], None] | None = None,
) -> list[Completion]:
    """One answer for each prompt, all in one batch; by the base where `of_base`. `shift`: see `Decoding.arguments`."""
    model = asked.base if of_base else asked.model
    base_of_adapter = of_base and asked.run.is_adapter
    with model.disable_adapter() if base_of_adapter else contextlib.nullcontext():
        return generate(
            model,
            asked.tokenizer,
            prompts,
            end_token_ids=asked.end_token_ids,
            batch_size=max(1, len(prompts)),
            stream=stream,
            **asked.decoding.arguments(shift),
        )


def answer_prompt_file(
    asked: LoadedRun,
    prompts: Path,
    output: Path,
    *,
    batch_size: int = 32,
    with_base: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[int, int]:
    """(lines in the file, lines that `output` had answers to already). Every line is checked before any is answered.

    Raises DataError naming file and line, SettingsError.
    """
    if batch_size < 1:
        raise SettingsError(f"--batch-size {batch_size}: expected 1 or more.")
    lines = read_prompts(prompts)
    ids = {line.number: _ids_of(asked, line, prompts) for line in lines}
    made_with = _made_with(asked, batch_size, with_base)
    done = answered(lines, output, made_with)
    if len(done) < len(lines):
        asked = load(asked, with_base)

        def answer(batch: list[Line]) -> list[dict[str, Any]]:
            if asked.toolbox is not None:
                return _called_fields(asked, batch)
            return answer_fields(asked, [ids[line.number] for line in batch], batch[0].number)

        told = None if progress is None else partial(_tell_progress, progress, len(lines))
        append_answers(lines, done, output, answer, made_with=made_with, batch_size=batch_size, progress=told)
    return len(lines), len(done)


def _tell_progress(progress: Callable[[str, int, int], None], total: int, count: int) -> None:
    progress("prompts", count, total)


def _ids_of(asked: LoadedRun, line: Line, path: Path) -> list[int]:
    try:
        return prompt_ids(asked, line.messages, line.tools)
    except DataError as error:
        raise DataError(f"{path}:{line.number}: {error.message}", error.fix) from None


def _made_with(asked: LoadedRun, batch_size: int, with_base: bool) -> str:
    """12 hex digits that change with the run, what it measured, and every setting that its answers depend on."""
    files = [(asked.run.folder / name).read_bytes() for name in ("run.yaml", "report.json")]
    settings: tuple[Any, ...] = (
        asked.decoding,
        asked.system,
        with_base,
        batch_size if asked.decoding.samples else None,
    )
    if (box := asked.toolbox) is not None:
        settings += (box.schemas, box.max_calls, box.timeout)
    return hashlib.sha256(b"".join([*files, repr(settings).encode()])).hexdigest()[:12]


def answer_fields(asked: LoadedRun, prompts: list[list[int]], shift: int = 0) -> list[dict[str, Any]]:
    """The answers as fields of JSON lines: completion, ended, tokens (new ones), and base_… of the base's, if any."""
    fields = [_fields("", completion) for completion in answers(asked, prompts, shift=shift)]
    if asked.base is not None:
        beside = answers(asked, prompts, of_base=True, shift=shift)
        fields = [{**own, **_fields("base_", other)} for own, other in zip(fields, beside, strict=True)]
    return fields


def _called_fields(asked: LoadedRun, batch: list[Line]) -> list[dict[str, Any]]:
    """The same of answers that may call tools, with what they called."""
    sides = {"": False, **({"base_": True} if asked.base is not None else {})}
    found = {side: called_answers(asked, batch, of_base) for side, of_base in sides.items()}
    return [
        {name: value for side in sides for name, value in _fields(side, found[side][place]).items()}
        for place in range(len(batch))
    ]


def _fields(side: str, completion: Completion) -> dict[str, Any]:
    values: dict[str, Any] = {"completion": completion.text, "ended": completion.ended, "tokens": len(completion.ids)}
    if isinstance(completion, Answer):
        names = ("name", "arguments", "result", "valid", "ok")  # the same at each run, as its seconds are not
        values["calls"] = [{name: getattr(call, name) for name in names} for call in completion.calls]
    return {side + name: value for name, value in values.items()}


def answer_one(asked: LoadedRun, messages: list[Message], tell: Callable[[str], None]) -> Completion:
    """The answer to a conversation; `tell` is given its text as it comes, after the base's where that is to answer."""
    ids, turn = prompt_ids(asked, messages), len(messages) - 1

    def written(before: str, **of: Any) -> Completion:
        with contextlib.ExitStack() as silence:
            silence.enter_context(doing("reading the prompt"))

            def told(text: str) -> None:
                silence.close()
                tell(begun.pop() + text if begun else text)

            begun = [before] if before else []
            if asked.toolbox is not None:
                found: Completion = _answer_with_tools(asked, messages, turn, told, **of)
            else:
                found = answers(asked, [ids], shift=turn, stream=told, **of)[0]
        if begun:  # it wrote nothing
            tell(before)
        return found

    if asked.base is None:
        return written("")
    written("base:  ", of_base=True)
    return written("\ntuned: ")


Asked = tuple[list[Message], list[dict[str, Any]] | None]  # a conversation, and the tools that are listed in it


def _answer_with_tools(
    asked: LoadedRun, messages: list[Message], shift: int, tell: Callable[[str], None], of_base: bool = False
) -> Answer:
    """The answer to a conversation, with each call and its result told between its turns."""
    box = asked.toolbox
    assert box is not None
    shown: list[int] = []

    def told(what: str, value: Any) -> None:
        if what == "token":
            before = str(asked.tokenizer.decode(shown, skip_special_tokens=True)).rstrip("\ufffd")
            shown.append(value)
            after = str(asked.tokenizer.decode(shown, skip_special_tokens=True)).rstrip("\ufffd")
            if new := after.removeprefix(before):
                tell(new)
        elif what == "call":
            shown.clear()
            tell(f"\n[{value.name}({json.dumps(value.arguments, ensure_ascii=False)}) → {value.result}]\n")

    return _loop(asked, [(messages, box.schemas)], shift, of_base, told=told)[0]


def called_answers(asked: LoadedRun, batch: list[Line], of_base: bool = False) -> list[Answer]:
    """Answers to lines of a prompt file, which may call tools. A line's own tools are listed in place of --tools'."""
    assert asked.toolbox is not None
    given: list[Asked] = [(line.messages, line.tools or asked.toolbox.schemas) for line in batch]
    return _loop(asked, given, batch[0].number, of_base, in_step=True)


def _loop(
    asked: LoadedRun,
    given: list[Asked],
    shift: int,
    of_base: bool,
    **more: Any,
) -> list[Answer]:
    box = asked.toolbox
    assert box is not None
    if asked.system:
        system: Message = {"role": "system", "content": asked.system}
        given = [(turns if turns[0]["role"] == "system" else [system, *turns], tools) for turns, tools in given]
    model = asked.base if of_base else asked.model
    arguments = asked.decoding.arguments(shift)
    longest, stop = arguments.pop("max_new_tokens"), arguments.pop("stop")
    sampled = asked.decoding.samples
    draws = sampled or asked.decoding.repetition_penalty != 1
    draw = sampling(**{"seed": 0, "do_sample": sampled, **arguments}) if draws else greedy
    with model.disable_adapter() if of_base and asked.run.is_adapter else contextlib.nullcontext():
        return answer_with_tools(
            model,
            asked.tokenizer,
            given,
            box,
            max_new_tokens=longest,
            end_token_ids=asked.end_token_ids,
            batch_size=len(given),
            draw=draw,
            stop=stop,
            positions=asked.positions,
            **more,
        )


def converse(asked: LoadedRun, read: Callable[[], str], tell: Callable[[str], None]) -> None:
    """A conversation: `read` gives a turn of the user (EOFError ends it), `tell` is given text for the screen.

    Each answer is given the whole conversation so far; a run trained on bare prompts knows no turns and is given the
    last one alone. What cannot be answered is said, and left out of the conversation.
    """
    bare = _is_bare(asked.run, asked.tokenizer)
    tell(f"{COMMANDS}{' Each prompt stands alone: the run was trained without turns.' if bare else ''}\n")
    messages: list[Message] = []
    while True:
        try:
            said = read()
        except (EOFError, KeyboardInterrupt):
            tell("\n")
            if signals.came:  # it ends the command, too
                raise
            return
        word = said.strip().lower()
        if word in ENDS:
            return
        if word in HELPS or (word.startswith("/") and word[1:].isalpha() and word != "/reset"):
            tell(f"{'' if word in HELPS else f'{word} is not a command. '}{COMMANDS}\n")
            continue
        if word == "/reset" or bare:
            messages = []
        if not word or word == "/reset":
            continue
        turns = [*messages, {"role": "user", "content": said}]
        try:
            completion = answer_one(asked, turns, tell)
            before = completion.messages if isinstance(completion, Answer) else turns
            messages = [*before, {"role": "assistant", "content": completion.text}]
            tell("\n" if completion.ended else "\n(cut off: --max-new-tokens)\n")
        except DataError as error:
            tell(f"{error}\n/reset starts over.\n")
        except KeyboardInterrupt:
            if "SIGTERM" in signals.came:
                raise
            signals.forget()  # it ended the answer
            tell("\n(stopped; your last turn is forgotten)\n")
