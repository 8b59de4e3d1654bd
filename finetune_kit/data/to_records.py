"""Rows of each recognised layout to records: what its columns hold becomes turns, pairs, labels, prompts or text."""

from __future__ import annotations

from typing import Any

from finetune_kit.data.columns import (
    ANSWER_KEY,
    Row,
    answer_of,
    asked,
    choices_of,
    one_of,
    question_of,
    with_history,
    with_system,
    with_thought,
)
from finetune_kit.data.messages import (
    ROLE_NAMES,
    describe,
    is_transcript,
    is_turn,
    messages_of,
    side_of,
    text_of,
    tools_of,
    transcript_of,
)
from finetune_kit.data.records import (
    LabelledCompletion,
    Message,
    Preference,
    Prompt,
    PromptCompletion,
    Record,
    Text,
    asked_of,
    last_assistant,
    prompt_of,
    reference_of,
)
from finetune_kit.errors import DataError

TOOLS = ("tools", "functions")
TURN_COLUMNS = ("messages", "conversations", "conversation", "chat")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "question_stem")
# the first that a row has: what answers in words stands before what may be its last word alone
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("instruction", "completion"),
    *(("question", name) for name in ("solution", "answer", "response", "output", "completion")),
    *(("query", name) for name in ("response", "answer", "output", "completion")),
    *(("problem", name) for name in ("solution", "answer", "response", "output", "completion")),
    *(("prompt", name) for name in ("solution", "answer", "output", "generation", "demonstration")),
    *(("instruction", name) for name in ("answer", "demonstration")),
    *(("question", name) for name in ("correct_answer", "answers")),
    *((name, "answer_key") for name in ("question", "question_stem")),  # ARC's, CommonsenseQA's and OpenBookQA's
    ("user", "assistant"),
    ("human", "assistant"),
    ("inputs", "targets"),
    ("input", "response"),
    ("input", "output"),
)
# beside a prompt alone: what a right completion says, the shortest first
ANSWERS = (
    "completion",
    "response",
    "answer",
    "final_answer",
    "expected_answer",
    "ground_truth",
    "reference",
    "reference_answer",
    "target",
    "correct_answer",
    "answers",
    "answer_key",
    "demonstration",
    "solution",
    "output",
)


def _conversation(messages: list[Message], row: Row, where: str, as_strings: bool = False) -> list[Record]:
    messages = with_thought(with_system(messages, row), row)
    if row.waits and messages[-1]["role"] in ("user", "tool"):
        return [Prompt(where, messages, _tools(row, where), completion=_right_answer(row))]
    if last_assistant(messages) < 0:
        raise DataError(
            f"{where}: no assistant turn, so nothing to learn; roles: {', '.join(m['role'] for m in messages)}.",
            "Remove the row, or write the answer.",
        )
    return [PromptCompletion(where, messages, _tools(row, where), as_strings=as_strings)]


def _tools(row: Row, where: str) -> list[dict[str, Any]] | None:
    name = next((name for name in TOOLS if row.get(name)), TOOLS[0])
    return tools_of(row.take(name), where)


def from_turns(row: Row, where: str) -> list[Record]:
    name = _turn_column(row) or "messages"
    return _conversation(_turns_of(row.take(name), where), row, where)


def _turns_of(turns: Any, where: str) -> list[Message]:
    if is_transcript(turns):
        return transcript_of(turns, where)
    messages = messages_of(turns, where)
    if not messages:
        raise DataError(f"{where}: only empty system turns.", "Remove the row.")
    return messages


def _turn_column(row: Row) -> str:
    return next((name for name in TURN_COLUMNS if row.get(name) is not None), "")


def _exchange(row: Row, question: str, answer: str, where: str) -> list[Record]:
    return _conversation(with_history(_two_turns(question, answer, where), row, where), row, where)


def _instance(row: Row, instance: dict[str, Any], where: str) -> list[Record]:
    question = question_of(row, "instruction", where)
    given = instance.get("input")
    given = text_of(given, f"{where}: input") if given is not None else ""
    question = f"{question}\n\n{given}" if given.strip() else question
    return _exchange(row, question, text_of(instance.get("output"), f"{where}: output"), where)


def _two_turns(question: str, answer: str, where: str) -> list[Message]:
    if not question.strip():
        raise DataError(f"{where}: the prompt is empty.", "Remove the row, or write the prompt.")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def from_instances(row: Row, where: str) -> list[Record]:
    instances = row.take("instances")
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise DataError(f"{where}: instances are {describe(instances)}; expected a list of {{input, output}}.")
    if len(instances) == 1:
        return _instance(row, instances[0], where)
    records: list[Record] = []
    for number, item in enumerate(instances, start=1):
        records += _instance(row, item, f"{where}.{number}")
    return records


def pair_of(columns: set[str]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= columns), None)


def from_pair(row: Row, where: str) -> list[Record]:
    names = pair_of(set(row)) or ("prompt", "completion")
    question, answer = row.get(names[0]), row.get(names[1])
    if row.waits and not any(isinstance(side, list) and side and is_turn(side[0]) for side in (question, answer)):
        return from_prompt(row, where)  # any value can be what a reward compares with
    if names[0] != "instruction" and (isinstance(question, list) or _has_turns(answer)):
        row.used.update(names)
        turns = [*side_of(question, "user", where), *side_of(answer, "assistant", where)]
        return _conversation(with_history(turns, row, where), row, where)
    question, answer = question_of(row, names[0], where), answer_of(row, names[1], where)
    records = _exchange(row, question, answer, where)
    said = {name for name in row.used if row.get(name) not in (None, "", [])}
    if names[0] == "prompt" and said == set(names):
        records[0].as_strings = True  # type: ignore[union-attr]  # a conversation
    return records


def _has_turns(answer: Any) -> bool:
    """Whether an answer is a list of turns, or is to be refused as one; lists of texts are not turns."""
    return isinstance(answer, list) and not (answer and all(isinstance(item, str) for item in answer))


def from_labels(row: Row, where: str) -> list[Record]:
    label = truth(row.take("label"))
    if label is None:
        raise DataError(f"{where}: label is {describe(row.get('label'))}; expected true or false.")
    names = pair_of({name for name, item in row.items() if item is not None}) or pair_of(set(row))
    column = "" if names else _turn_column(row)
    if column or names is None:
        turns = with_history(_turns_of(row.take(column or TURN_COLUMNS[0]), where), row, where)
        last = last_assistant(turns)
        if last < 1:
            raise DataError(f"{where}: no answer to a question, which could be liked.", "Remove the row.")
        prompt, completion = with_system(turns[:last], row), turns[last:]
    else:
        prompt = asked(row, names[0], where)
        completion = side_of(row.take(names[1]), "assistant", f"{where}: {names[1]}")
    return [LabelledCompletion(where, prompt, with_thought(completion, row), label, _tools(row, where))]


def truth(value: Any) -> bool | None:
    """true/false, 1/0, those words as text (CSV) or words of liking; None if it is none of them."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    words |= {"good": True, "liked": True, "desirable": True, "bad": False, "disliked": False, "undesirable": False}
    return words.get(str(value).strip().lower())


def from_text(row: Row, where: str) -> list[Record]:
    value = text_of(row.take("text"), f"{where}: text")
    if isinstance(row.get("role"), str) and row["role"] in ROLE_NAMES:
        raise DataError(
            f"{where}: this row is one turn ({row['role']}) of a conversation, and no text of its own.",
            'Put the turns of each conversation into one row: {"messages": [{"role": "user", "content": "…"}, …]}',
        )
    return [Text(where, value)]


def from_transcript(row: Row, where: str) -> list[Record]:
    text = text_of(row.take("text"), f"{where}: text")
    return _conversation(transcript_of(text, where), row, where)


def from_prompt(row: Row, where: str) -> list[Record]:
    pair = pair_of(set(row)) or ("prompt", "")  # the question of a pair may have another name
    name = next((name for name in QUESTIONS if row.get(name) is not None), pair[0])
    turns = asked(row, name, where)
    return [Prompt(where, turns, _tools(row, where), completion=_right_answer(row))]


def _right_answer(row: Row) -> str:
    """What the row says beside a prompt that a right completion says, "" where it says nothing."""
    column = next((name for name in ANSWERS if _answer_of(row.get(name))), None)
    return _answer_of(row.take(column)) if column else ""


def _answer_of(value: Any) -> str:
    """The text of an answer column: text, a number, or turns of which the last one answers; "" for anything else."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    value = _number_as_text(one_of(value))
    return value if isinstance(value, str) else ""


def _number_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def answers_as_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row of prompts whose answer is a number has it as text, which a reward compares with a completion: the text
    of the choice that it counts, where the question offers some."""
    return {name: _answer_as_text(row, name) if name in ANSWERS else value for name, value in row.items()}


def _answer_as_text(row: dict[str, Any], name: str) -> Any:
    said = Row(row)
    if (isinstance(row[name], int) or name == ANSWER_KEY) and choices_of(said):
        try:
            return answer_of(said, name, name)
        except DataError:  # no place of a choice
            pass
    return _number_as_text(row[name])


def as_kind(record: Record, kind: str, calls: bool = False) -> list[Record]:
    """A record as the kind that a recipe trains on: the prompt that a conversation's last answer or a pair answers,
    a pair as a liked and a disliked answer; any other record unchanged. `calls`: answers may call tools, so that the
    calls of a row and their results are no part of the prompt.
    """
    if kind == "prompt" and isinstance(record, PromptCompletion | Preference):
        turns = asked_of(record) if calls else prompt_of(record)
        return [Prompt(record.where, turns, record.tools, record.metadata, reference_of(record))]
    if kind == "labelled_completion" and isinstance(record, Preference):
        sides = ((record.chosen, True), (record.rejected, False))
        return [
            LabelledCompletion(record.where, record.prompt, turns, label, record.tools, record.defect, record.metadata)
            for turns, label in sides
        ]
    return [record]
