"""Conversations to tokens and labels, for any chat template.

For each trained assistant turn i: P_i is the template's rendering of the turns before it with the generation prompt,
exactly what the model sees when it is served; C_i is what the template writes after it, up to and with the end token.
Where the rendering of the whole conversation begins with P_i C_i for every i (ChatML and most others), one sample holds
all turns. Where the template rewrites history (thinking models), each turn is a sample of its own. Either way
ids(P_i) is a prefix of the sample, so that training tokens equal serving tokens by construction.

Held by code, on every row: the decoded supervised text contains the answer and ends with an end token; one BOS; what
anybody says is in the rendering; no text of a row is a special token, unless data.special_tokens_in_text=keep.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_kit.data.adapt import adapt
from finetune_kit.data.causal import cuts_of, prefixes_of
from finetune_kit.data.records import THOUGHTS, Message, PromptCompletion, Text
from finetune_kit.data.rendering import render, silent
from finetune_kit.data.special import hide, ids_of_hidden, ids_of_text, show
from finetune_kit.data.template import Dialect, Note, added_tokens, bos_prefix, dialect_of, last_added
from finetune_kit.data.token_ids import Asking, hides, ids_of, together
from finetune_kit.errors import DataError, SecurityError
from finetune_kit.settings.schema import DataConfig

IGNORED = -100  # a label that no loss counts


@dataclass(slots=True)
class Sample:
    """One sequence. `labels`: the ids where supervised, -100 elsewhere; `turns`: the supervised spans [start, stop)."""

    input_ids: list[int]
    labels: list[int]
    turns: list[tuple[int, int]]


@dataclass(slots=True)
class Turn:
    """One trained assistant turn as text: `completion` ends with the end token, whose id is `end_id`.

    `joins`: it may share a sample with the other turns.
    """

    prompt: str
    completion: str
    end_id: int
    joins: bool
    message: Message


def render_prompt(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
    in_text: str = "text",
) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer: the tokens that come before it in training.

    Messages marked `plain`, and all with a tokenizer that has no template, are bare text. `in_text`: see `text_ids`.
    Raises DataError where the template refuses, or leaves out what somebody says.
    """
    return next(together([asking_prompt(tokenizer, messages, tools, kwargs, in_text)], tokenizer))


def asking_prompt(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
    in_text: str = "text",
) -> Asking[list[int]]:
    """`render_prompt`, as one of the rows of `together`."""
    if not tokenizer.chat_template or (messages and messages[0].get("plain")):
        text = "\n\n".join(message["content"] for message in messages)
        if hides(tokenizer, text, in_text, "prompt"):
            yield []
            return bos_prefix(tokenizer) + ids_of_text(tokenizer, text)
        (ids,) = yield [text]
        return bos_prefix(tokenizer) + ids
    hidden = hides(tokenizer, [messages, tools], in_text, "prompt")
    if hidden:
        messages, tools = hide(tokenizer, messages), hide(tokenizer, tools)
    dialect = dialect_of(tokenizer, kwargs, bool(tools))
    adapted, tools = adapt(messages, tools, dialect)
    text = _render(tokenizer, adapted, tools, kwargs, True, "prompt", dialect)
    _check_kept(adapted, text, "prompt")
    if hidden:
        yield []
        return ids_of_hidden(tokenizer, text)
    (ids,) = yield [text]
    return ids


def end_token_ids(tokenizer: Any, kwargs: dict[str, Any] | None = None) -> list[int]:
    """Ids that end an answer: the end token of the chat templates, if any, then the tokenizer's eos."""
    ids = []
    if tokenizer.chat_template:
        ends = [dialect_of(tokenizer, kwargs, tools).end for tools in (False, True)]
        ids += [last_added(tokenizer, end) for end in ends if end]
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(ids))


def untrainable(messages: list[Message], train_on: str) -> str:
    """Why no turn of a conversation can be trained, in words; "" where one can."""
    if _trained_turns(messages, train_on):
        return ""
    wanted = [message for i, message in enumerate(messages) if _wanted(messages, i, train_on)]
    if not wanted:
        return "no turn to train (train: false on each)"
    if all(not message["content"].strip() and not message.get("tool_calls") for message in wanted):
        return "empty answer"
    return "nothing comes before the answer"


def samples_of(
    record: PromptCompletion | Text, tokenizer: Any, config: DataConfig, note: Note = silent
) -> list[Sample]:
    """The record's samples at full length; [] where `untrainable`. `note` is told of every fallback, in words.

    Raises DataError naming the row where the template refuses it or an invariant of this module does not hold.
    """
    return next(together([asking_samples(record, tokenizer, config, note)], tokenizer))


def asking_samples(
    record: PromptCompletion | Text, tokenizer: Any, config: DataConfig, note: Note = silent, clean: bool = False
) -> Asking[list[Sample]]:
    """`samples_of`, as one of the rows of `together`; `note` is told before the first ids are asked for.

    `clean`: there is no special token in the record's text, as somebody has found.
    """
    in_text = "keep" if clean else config.special_tokens_in_text
    if isinstance(record, Text):
        return (yield from _text_samples(record, tokenizer, config.max_length, in_text))
    if record.messages[0].get("plain"):
        trains = not untrainable(record.messages, config.train_on)
        # a token may stand where the two texts join
        samples = [_plain_sample(record, tokenizer, config.special_tokens_in_text, note)] if trains else []
        yield []
        return samples
    kwargs, messages, tools = config.chat_template_kwargs, record.messages, record.tools
    hidden = hides(tokenizer, [messages, tools], in_text, record.where)
    if hidden:
        messages, tools = hide(tokenizer, messages), hide(tokenizer, tools)
    dialect = dialect_of(tokenizer, kwargs, bool(tools))
    messages, tools = adapt(messages, tools, dialect, note)
    flat = [{**message, "content": _text(message)} for message in messages] if dialect.parts else messages
    prefixes = None if tools or hidden else prefixes_of(tokenizer, dialect.template, kwargs)
    texts = prefixes.of(messages) if prefixes else None
    turns = []
    for i in _trained_turns(flat, config.train_on):
        given = (texts[i] + prefixes.opening, texts[i + 1] + prefixes.closing) if prefixes and texts else None
        turns.append(_turn(tokenizer, messages, i, tools, kwargs, dialect, note, record.where, given))
    if turns:
        index = next(i for i, message in enumerate(messages) if message is turns[-1].message)
        _check_kept(messages[:index], turns[-1].prompt, record.where)
    wanted = list(dict.fromkeys(text for turn in turns for text in (turn.prompt, turn.prompt + turn.completion)))
    cuts = cuts_of(tokenizer, prefixes.opening) if clean and prefixes and texts else None
    if hidden:
        yield []
        known = {text: ids_of_hidden(tokenizer, text) for text in wanted}
    elif cuts and turns:
        (whole,) = yield wanted[-1:]
        known = {wanted[-1]: whole}
        for turn in turns:
            known[turn.prompt] = cuts.before_answer(turn.prompt, whole) or []
            if turn is not turns[-1]:
                known[turn.prompt + turn.completion] = cuts.with_answer(turn.prompt + turn.completion, whole) or []
    else:
        known = dict(zip(wanted, (yield wanted), strict=True))
    samples = []
    for sample, covered in _encode(turns, lambda text: known.get(text) or _ids(tokenizer, text, hidden)):
        _verify(tokenizer, sample, covered, show if hidden else str, record.where)
        samples.append(sample)
    return samples


def _ids(tokenizer: Any, text: str, hidden: bool) -> list[int]:
    return (ids_of_hidden if hidden else ids_of)(tokenizer, text)


def _wanted(messages: list[Message], index: int, train_on: str) -> bool:
    if messages[index]["role"] != "assistant":
        return False
    default = train_on == "all" or not any(later["role"] == "assistant" for later in messages[index + 1 :])
    return bool(messages[index].get("train", default))


def _trained_turns(messages: list[Message], train_on: str) -> list[int]:
    """Assistant turns that are wanted, not empty, and have something before them to answer."""
    return [
        i
        for i, message in enumerate(messages)
        if i > 0 and _wanted(messages, i, train_on) and (message["content"].strip() or message.get("tool_calls"))
    ]


def _render(
    tokenizer: Any, messages: list[Message], tools: Any, kwargs: Any, generation: bool, where: str, dialect: Dialect
) -> str:
    try:
        return render(tokenizer, messages, tools, kwargs, generation, dialect.template)
    except SecurityError:
        raise
    except Exception as error:  # the template is a program that came with the model: its words are the message
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {error}",
            f"Roles in order: {', '.join(turn['role'] for turn in messages)}. Fix the row, or use another template.",
        ) from None


def _turn(
    tokenizer: Any,
    messages: list[Message],
    index: int,
    tools: Any,
    kwargs: Any,
    dialect: Dialect,
    note: Note,
    where: str,
    given: tuple[str, str] | None = None,
) -> Turn:
    """`given`: the renderings of the turns before, which ask for the answer, and of these turns with it."""
    before, message = messages[:index], messages[index]
    prompt, full = given or (
        _render(tokenizer, before, tools, kwargs, True, where, dialect),
        _render(tokenizer, messages[: index + 1], tools, kwargs, False, where, dialect),
    )
    if full.startswith(prompt):
        completion = full[len(prompt) :]
    else:
        probe = {"role": "assistant", "content": [{"type": "text", "text": "§"}] if dialect.parts else "§"}
        # The probe keeps an answer that happens to continue like the prompt from being taken for the header.
        bare = _render(tokenizer, [*before, probe], tools, kwargs, False, where, dialect)
        shared = min(_shared_length(prompt, bare), _shared_length(prompt, full))
        completion = _after_other_prompt(
            prompt[shared:], full[shared:], message, _thought(message, dialect), note, where
        )
    completion, end = _cut_after_end(tokenizer, completion, dialect)
    reasoning = _thought(message, dialect)
    if reasoning and _squeezed(reasoning) not in _squeezed(completion):
        note("The chat template does not render reasoning_content here: it is not trained.")
    if not end:
        if not tokenizer.eos_token:
            raise DataError(f"{where}: neither the chat template nor the tokenizer has a token that ends an answer.")
        note(f"The chat template ends answers with no token: {tokenizer.eos_token} is appended, each answer by itself.")
        return Turn(prompt, completion + tokenizer.eos_token, tokenizer.eos_token_id, False, message)
    known = dialect.end_id if end == dialect.end else None
    return Turn(prompt, completion, last_added(tokenizer, end) if known is None else known, True, message)


def _shared_length(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _thought(message: Message, dialect: Dialect) -> str:
    return str(message.get(dialect.reasoning or THOUGHTS[0]) or "")


def _after_other_prompt(
    prompt_rest: str, full_rest: str, message: Message, reasoning: str, note: Note, where: str
) -> str:
    """The completion where the generation prompt says more (or other) than the template writes before an answer.

    Both rests follow the same header. `prompt_rest` opens a thought (`<think>\\n`), or closes an empty one.
    """
    content = _text(message)
    if not prompt_rest.strip():
        return full_rest.lstrip()
    if "</think>" in prompt_rest:
        note("The prompt closes the thought before the answer: thoughts in the data are not trained.")
        return full_rest.rpartition("</think>")[2].lstrip()
    if "<think>" not in prompt_rest:
        raise DataError(
            f"{where}: the template's prompt ends in {prompt_rest!r}, but it writes the answer as {full_rest[:50]!r}.",
            "Such a template cannot be trained on what it will serve; use another chat template.",
        )
    thought = reasoning or content.rpartition("</think>")[0].rpartition("<think>")[2]
    answer = full_rest.rpartition("</think>")[2].lstrip()
    if thought.strip():
        return thought.strip() + "\n</think>\n\n" + answer
    note("The generation prompt opens a thought and the data have none: it is closed at once, before the answer.")
    return "</think>\n\n" + answer


def _cut_after_end(tokenizer: Any, completion: str, dialect: Dialect) -> tuple[str, str]:
    """(completion up to and with its end token, that ending); the ending is "" where there is none."""
    if dialect.end and completion.endswith(dialect.tail):
        return completion[: len(completion) - len(dialect.tail) + len(dialect.end)], dialect.end
    trimmed = completion.rstrip()
    if dialect.end:  # a turn with an ending of its own, such as a tool call that stops at another token
        for token in sorted(added_tokens(tokenizer), key=len, reverse=True):
            if trimmed.endswith(token):
                return trimmed, token
    return trimmed, ""


def _encode(turns: list[Turn], ids_of: Callable[[str], list[int]]) -> list[tuple[Sample, list[Turn]]]:
    """One sample for the turns that agree, in text and in tokens, with the last rendering; one each for the others."""
    if not turns:
        return []
    whole = turns[-1].prompt + turns[-1].completion
    whole_ids = ids_of(whole)
    spans: list[tuple[int, int]] = []
    shared: list[Turn] = []
    alone: list[tuple[Sample, list[Turn]]] = []
    # Turns share a sample all or none where text differs: a sample whose history is not what is served teaches nothing.
    share = all(turn.joins and whole.startswith(turn.prompt + turn.completion) for turn in turns)
    for turn in turns:
        prompt = ids_of(turn.prompt)
        both = whole_ids if turn is turns[-1] else ids_of(turn.prompt + turn.completion)
        fits = both[: len(prompt)] == prompt
        if share and fits and whole_ids[: len(both)] == both:
            spans.append((len(prompt), len(both)))
            shared.append(turn)
        else:
            ids = both if fits else prompt + ids_of(turn.completion)
            alone.append((_sample(ids, [(len(prompt), len(ids))]), [turn]))
    return ([(_sample(whole_ids[: spans[-1][1]], spans), shared)] if spans else []) + alone


def _sample(ids: list[int], spans: list[tuple[int, int]]) -> Sample:
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return Sample(ids, labels, spans)


def _text(message: Message) -> str:
    content = message["content"]
    return str(content) if isinstance(content, str) else "".join(part["text"] for part in content)


def _squeezed(text: str) -> str:
    """Text without white space, case and compatibility forms: what templates and tokenizers may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _check_kept(messages: list[Message], text: str, where: str) -> None:
    """Raises DataError where a turn's content does not come out in a rendering."""
    squeezed = ""
    for number, message in enumerate(messages, start=1):
        content = _text(message).rpartition("</think>")[2] if message["role"] == "assistant" else _text(message)
        content = content.strip()
        if content in text:
            continue
        squeezed = squeezed or _letters(text)
        # a template may take its own switches out of a text (/no_think), and write a result as JSON
        forms = (
            content,
            _SWITCH.sub("", content),
            json.dumps(content)[1:-1],
            json.dumps(content, ensure_ascii=False)[1:-1],
        )
        if not any(_letters(form) in squeezed for form in forms):
            raise DataError(
                f"{where}: the chat template leaves out turn {number} ({message['role']}): {content[:60]!r}.",
                "Remove the turn or the row, or use another template.",
            )


_SWITCH = re.compile(r"(?<!\S)/\w+")


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, _squeezed(text)))


def _verify(tokenizer: Any, sample: Sample, turns: list[Turn], show: Callable[[str], str], where: str) -> None:
    import numpy as np  # of a list the tokenizer looks at every number

    ids = sample.input_ids
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError(
            f"{where}: the sample begins with two {tokenizer.bos_token}.", "Remove one from the chat template."
        )
    for (start, stop), turn in zip(sample.turns, turns, strict=True):
        answer = show(_text(turn.message).rpartition("</think>")[2])
        supervised = ids[start:stop]
        if len(supervised) < 2 or supervised[-1] != turn.end_id:
            raise DataError(f"{where}: the supervised text does not end with the template's end token.")
        written = tokenizer.decode(np.asarray(supervised[:-1]), skip_special_tokens=False)
        names = [show(call["function"]["name"]) for call in turn.message.get("tool_calls", [])]
        # A tokenizer that cannot write a character loses it in the answer just as it does in the sample.
        missing = [_squeezed(text) for text in (answer.strip(), *names) if text not in written]
        decoded = _squeezed(written) if missing else ""
        if any(text not in decoded and _squeezed(_through(tokenizer, text)) not in decoded for text in missing):
            raise DataError(
                f"{where}: the supervised text is not the answer of the data. Answer: {answer.strip()[:80]!r}; "
                f"supervised: {tokenizer.decode(supervised)[:80]!r}.",
                "The chat template changes what it is given; use another template.",
            )


def _through(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False))


def _plain_sample(record: PromptCompletion, tokenizer: Any, in_text: str, note: Note) -> Sample:
    """Prompt and completion as bare text, as they are, then the end token."""
    prompt, completion = record.messages[0]["content"], record.messages[1]["content"]
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end token: an answer would never end.", "Set tokenizer.eos_token.")
    if prompt and not prompt[-1].isspace() and not completion[0].isspace():
        note("Prompts and completions are joined as they are, with no white space between them.")
    hidden = hides(tokenizer, [prompt, completion, prompt + completion], in_text, record.where)
    encode = ids_of_text if hidden else ids_of
    head = bos_prefix(tokenizer) + encode(tokenizer, prompt)
    whole = bos_prefix(tokenizer) + encode(tokenizer, prompt + completion)
    ids = whole if whole[: len(head)] == head else head + encode(tokenizer, completion)
    return _sample([*ids, tokenizer.eos_token_id], [(len(head), len(ids) + 1)])


def _text_samples(record: Text, tokenizer: Any, max_length: int, in_text: str) -> Asking[list[Sample]]:
    """Text in blocks of `max_length`, the last one shorter; the end token where a document ends.

    A block begins with the last token of the one before, which is context there and no label: so every token of the
    text is predicted once, but for the first where the tokenizer begins no text with a token of its own.
    """
    if hides(tokenizer, record.text, in_text, record.where):
        yield []
        said = ids_of_text(tokenizer, record.text)
    else:
        (said,) = yield [record.text]
    ids = bos_prefix(tokenizer) + said
    if record.ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if len(ids) < 2 or max_length < 2:
        return []  # nothing that could be predicted from something
    blocks = (ids[start : start + max_length] for start in range(0, len(ids) - 1, max_length - 1))
    return [_sample(block, [(1, len(block))]) for block in blocks]


def truncate(sample: Sample, max_length: int) -> Sample | None:
    """The sample's first `max_length` tokens, or None where no supervised token is among them.

    A turn cut in the middle is trained as far as it goes, without its end token.
    """
    if len(sample.input_ids) <= max_length:
        return sample
    turns = [(start, min(stop, max_length)) for start, stop in sample.turns if start < max_length]
    return Sample(sample.input_ids[:max_length], sample.labels[:max_length], turns) if turns else None


def written_turn(
    tokenizer: Any,
    before: list[Message],
    answer: Message,
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Turn:
    """The text of an assistant's turn as it is trained. Raises DataError where the template refuses it."""
    dialect = dialect_of(tokenizer, kwargs, bool(tools))
    messages, tools = adapt([*before, answer], tools, dialect)
    index = len(messages) - 1
    return _turn(tokenizer, messages, index, tools, kwargs, dialect, silent, "a tool call")


def after_calls(
    tokenizer: Any,
    before: list[Message],
    answer: Message,
    results: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
    in_text: str = "text",
) -> tuple[list[int], bool]:
    """What stands, in training, between a turn that calls tools and the turn that follows their `results`.

    (token ids that follow the turn's end token, True); where the template writes the turns before otherwise once there
    are results, (the ids of the whole conversation, False). Raises DataError where the template refuses it.
    """
    whole = render_prompt(tokenizer, [*before, answer, *results], tools, kwargs, in_text)
    hidden = hides(tokenizer, [before, answer, tools], in_text, "a tool call")
    if hidden:
        before, answer, tools = hide(tokenizer, before), hide(tokenizer, answer), hide(tokenizer, tools)
    turn = written_turn(tokenizer, before, answer, tools, kwargs)
    written = (ids_of_hidden if hidden else ids_of)(tokenizer, turn.prompt + turn.completion)
    return (whole[len(written) :], True) if whole[: len(written)] == written else (whole, False)
