"""Conversations to tokens and labels, for any chat template.

For each trained assistant turn i: P_i is the template's rendering of the turns before it with the generation prompt,
exactly what the model sees when it is served; C_i is what the template writes after it, up to and with the end token.
Where the rendering of the whole conversation begins with P_i C_i for every i (ChatML and most others), one sample holds
all turns. Where the template rewrites history (thinking models), each turn is a sample of its own. Either way
ids(P_i) is a prefix of the sample, so that training tokens equal serving tokens by construction.

Held by code, on every row: the decoded supervised text contains the answer and ends with an end token; one BOS.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finetune_kit.config import DataConfig
from finetune_kit.data.records import Message, PromptCompletion, Text
from finetune_kit.data.template import Dialect, Note, adapt, added_tokens, bos_prefix, dialect_of, render, silent
from finetune_kit.errors import DataError, SecurityError

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


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text; nothing is added, since the template writes its own BOS."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_prompt(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation that waits for the assistant's answer: the tokens that come before it in training.

    Messages marked `plain`, and all with a tokenizer that has no template, are bare text. Raises DataError where the
    template refuses.
    """
    if not tokenizer.chat_template or (messages and messages[0].get("plain")):
        return bos_prefix(tokenizer) + ids_of(tokenizer, "\n\n".join(message["content"] for message in messages))
    adapted, tools = adapt(messages, tools, dialect_of(tokenizer, kwargs))
    return ids_of(tokenizer, _render(tokenizer, adapted, tools, kwargs, True, "prompt"))


def end_token_ids(tokenizer: Any, kwargs: dict[str, Any] | None = None) -> list[int]:
    """Ids that end an answer: the end token of the chat template, if any, then the tokenizer's eos."""
    ids = []
    if tokenizer.chat_template:
        end = dialect_of(tokenizer, kwargs).end
        ids += [_last_added(tokenizer, end)] if end else []
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
    if isinstance(record, Text):
        return _text_samples(record, tokenizer, config.max_length)
    if record.messages[0].get("plain"):
        return [_plain_sample(record, tokenizer, note)] if not untrainable(record.messages, config.train_on) else []
    kwargs = config.chat_template_kwargs
    dialect = dialect_of(tokenizer, kwargs)
    messages, tools = adapt(record.messages, record.tools, dialect, note)
    flat = [{**message, "content": _text(message)} for message in messages]
    turns = [
        _turn(tokenizer, messages, i, tools, kwargs, dialect, note, record.where)
        for i in _trained_turns(flat, config.train_on)
    ]
    samples = _encode(tokenizer, turns)
    for sample, covered in samples:
        _verify(tokenizer, sample, covered, record.where)
    return [sample for sample, _ in samples]


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


def _render(tokenizer: Any, messages: list[Message], tools: Any, kwargs: Any, generation: bool, where: str) -> str:
    try:
        return render(tokenizer, messages, tools, kwargs, generation)
    except SecurityError:
        raise
    except Exception as error:  # the template is a program that came with the model: its words are the message
        raise DataError(
            f"{where}: the model's chat template refuses this conversation: {error}",
            f"Roles in order: {', '.join(turn['role'] for turn in messages)}. Mend the row, or take another template.",
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
) -> Turn:
    before, message = messages[:index], messages[index]
    prompt = _render(tokenizer, before, tools, kwargs, True, where)
    full = _render(tokenizer, messages[: index + 1], tools, kwargs, False, where)
    if full.startswith(prompt):
        completion = full[len(prompt) :]
    else:
        probe = {"role": "assistant", "content": [{"type": "text", "text": "§"}] if dialect.parts else "§"}
        # The probe keeps an answer that happens to go on like the prompt from being taken for the header.
        bare = _render(tokenizer, [*before, probe], tools, kwargs, False, where)
        shared = min(_shared_length(prompt, bare), _shared_length(prompt, full))
        completion = _after_other_prompt(prompt[shared:], full[shared:], message, note, where)
    completion, end = _cut_after_end(tokenizer, completion, dialect)
    reasoning = message.get("reasoning_content")
    if reasoning and _squeezed(reasoning) not in _squeezed(completion):
        note("The chat template does not render reasoning_content here: it is not trained.")
    if not end:
        if not tokenizer.eos_token:
            raise DataError(f"{where}: neither the chat template nor the tokenizer has a token that ends an answer.")
        note(f"The chat template ends answers with no token: {tokenizer.eos_token} is appended, each answer by itself.")
        return Turn(prompt, completion + tokenizer.eos_token, tokenizer.eos_token_id, False, message)
    return Turn(prompt, completion, _last_added(tokenizer, end), True, message)


def _shared_length(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _after_other_prompt(prompt_rest: str, full_rest: str, message: Message, note: Note, where: str) -> str:
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
            "Such a template cannot be trained on what it will serve; take another chat template.",
        )
    thought = message.get("reasoning_content") or content.rpartition("</think>")[0].rpartition("<think>")[2]
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


def _last_added(tokenizer: Any, text: str) -> int:
    tokens = added_tokens(tokenizer)
    return tokens[max((token for token in tokens if token and text.endswith(token)), key=len)]


def _encode(tokenizer: Any, turns: list[Turn]) -> list[tuple[Sample, list[Turn]]]:
    """One sample for the turns that agree, in text and in tokens, with the last rendering; one each for the others."""
    if not turns:
        return []
    whole = turns[-1].prompt + turns[-1].completion
    whole_ids = ids_of(tokenizer, whole)
    spans: list[tuple[int, int]] = []
    shared: list[Turn] = []
    alone: list[tuple[Sample, list[Turn]]] = []
    # Turns share a sample all or none where text differs: a sample whose history is not what is served teaches nothing.
    share = all(turn.joins and whole.startswith(turn.prompt + turn.completion) for turn in turns)
    for turn in turns:
        prompt = ids_of(tokenizer, turn.prompt)
        both = whole_ids if turn is turns[-1] else ids_of(tokenizer, turn.prompt + turn.completion)
        fits = both[: len(prompt)] == prompt
        if share and fits and whole_ids[: len(both)] == both:
            spans.append((len(prompt), len(both)))
            shared.append(turn)
        else:
            ids = both if fits else prompt + ids_of(tokenizer, turn.completion)
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


def _verify(tokenizer: Any, sample: Sample, turns: list[Turn], where: str) -> None:
    ids = sample.input_ids
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise DataError(
            f"{where}: the sample begins with two {tokenizer.bos_token}.", "Take one out of the chat template."
        )
    for (start, stop), turn in zip(sample.turns, turns, strict=True):
        answer = _text(turn.message).rpartition("</think>")[2]
        supervised = ids[start:stop]
        if len(supervised) < 2 or supervised[-1] != turn.end_id:
            raise DataError(f"{where}: the supervised text does not end with the template's end token.")
        decoded = _squeezed(tokenizer.decode(supervised[:-1], skip_special_tokens=False))
        names = [call["function"]["name"] for call in turn.message.get("tool_calls", [])]
        # A tokenizer that cannot write a character loses it in the answer just as it does in the sample.
        if any(
            _squeezed(text) not in decoded and _squeezed(_through(tokenizer, text)) not in decoded
            for text in (answer.strip(), *names)
        ):
            raise DataError(
                f"{where}: the supervised text is not the answer of the data. Answer: {answer.strip()[:80]!r}; "
                f"supervised: {tokenizer.decode(supervised)[:80]!r}.",
                "The chat template changes what it is given; take another template.",
            )


def _through(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=False))


def _plain_sample(record: PromptCompletion, tokenizer: Any, note: Note) -> Sample:
    """Prompt and completion as bare text, as they are, then the end token."""
    prompt, completion = record.messages[0]["content"], record.messages[1]["content"]
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end token: an answer would never end.", "Set tokenizer.eos_token.")
    if prompt and not prompt[-1].isspace() and not completion[0].isspace():
        note("Prompts and completions are joined as they are, with no white space between them.")
    head = bos_prefix(tokenizer) + ids_of(tokenizer, prompt)
    whole = bos_prefix(tokenizer) + ids_of(tokenizer, prompt + completion)
    ids = whole if whole[: len(head)] == head else head + ids_of(tokenizer, completion)
    return _sample([*ids, tokenizer.eos_token_id], [(len(head), len(ids) + 1)])


def _text_samples(record: Text, tokenizer: Any, max_length: int) -> list[Sample]:
    """Text in blocks of `max_length`, the last one shorter, nothing lost; the end token where a document ends.

    The first token of a block has nothing before it to be predicted from, so its label is -100; a last block of one
    token would teach nothing and takes one more from the block before.
    """
    ids = bos_prefix(tokenizer) + ids_of(tokenizer, record.text)
    if record.ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if len(ids) < 2:
        return []
    edges = [*range(0, len(ids), max_length), len(ids)]
    if edges[-1] - edges[-2] == 1 and max_length > 2:
        edges[-2] -= 1
    return [_sample(ids[start:stop], [(1, stop - start)]) for start, stop in pairwise(edges) if stop - start > 1]


def truncate(sample: Sample, max_length: int) -> Sample | None:
    """The sample's first `max_length` tokens, or None where no supervised token is among them.

    A turn cut in the middle is trained as far as it goes, without its end token.
    """
    if len(sample.input_ids) <= max_length:
        return sample
    turns = [(start, min(stop, max_length)) for start, stop in sample.turns if start < max_length]
    return Sample(sample.input_ids[:max_length], sample.labels[:max_length], turns) if turns else None
