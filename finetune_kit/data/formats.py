"""Rows of any common format to records: found by looking at the columns, never by registration.

Where several formats fit, the first of `FORMATS` whose kind the recipe can use is taken. The order goes from the most
telling columns to the least: preference pairs, then labelled answers, lists of turns, instructions, pairs of strings,
plain text, prompts alone. `data.columns` renames before anything is looked at.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_kit.data import preferences
from finetune_kit.data.columns import (
    ANSWER_KEY,
    NAMES,
    UNUSED,
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
    last_assistant,
    prompt_of,
    reference_of,
)
from finetune_kit.errors import DataError, SettingsError

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
NAMES_WE_KNOW = sorted(
    {name for pair in PAIRS for name in pair}
    | {*QUESTIONS, *TURN_COLUMNS, "chosen", "rejected", "label", "margin", "instances", *TOOLS, "text", *NAMES}
    | {"responses", "scores", "ranks", "response_a", "response_b", "votes", "score_chosen", "score_rejected"}
)
UNDERSTOOD = {*NAMES_WE_KNOW, *preferences.NAMES}


@dataclass(frozen=True)
class Format:
    """A name for people, the kind of record it gives, whether columns and a first row fit, and the conversion.

    `ranked`: the conversion gives all pairs of a row, the best against the worst first.
    """

    name: str
    kind: str
    fits: Callable[[set[str], dict[str, Any]], bool]
    convert: Callable[[Row, str], list[Record]]
    ranked: bool = False


# what a recipe takes besides rows of its own kind: plain text, conversations without their last answer, and pairs, each
# of which is a liked and a disliked answer
ACCEPTED = {
    "prompt_completion": ("prompt_completion", "text"),
    "prompt": ("prompt", "prompt_completion", "preference"),
    "labelled_completion": ("labelled_completion", "preference"),
}


def recognise(
    columns: set[str], first: dict[str, Any], kind: str, where: str, theirs: dict[str, str] | None = None
) -> Format:
    """The format of a source from its column names and a row. Raises DataError where none gives records of `kind`.

    `theirs`: our name -> the source's own, where that is another one.
    """
    names, theirs = columns, theirs or {}
    columns = columns - {"label"} if kind == "prompt" else columns  # no answer is trained
    fitting = [item for item in FORMATS if item.fits(columns, first)]
    for item in fitting:
        if item.kind in ACCEPTED.get(kind, (kind,)):
            return item
    found = f"columns {', '.join(sorted(theirs.get(name, name) for name in names))}"
    score = next((name for name in preferences.SCORED_ALONE if preferences.is_number(first.get(name))), "")
    if score and kind == "labelled_completion" and _pair_of(columns):
        name = theirs.get(score, score)
        raise DataError(
            f"{where}: {name} is a number on a scale, such as {first[score]}, and no word of liking.",
            f"Of 0 and 1 alone: data.columns='{{{name}: label}}'. Else write a label: true where it is high enough.",
        )
    if fitting and fitting[0].kind == "labelled_completion" and kind == "prompt_completion":
        label = theirs.get("label", "label")
        raise DataError(
            f"{where}: found {found}, which look like {fitting[0].name}: {label} says which answers were liked.",
            f"Learn from both: run kto. Or train on all of them alike: data.columns='{{{label}: unused}}'",
        )
    looks = f", which look like {fitting[0].name} ({fitting[0].kind})" if fitting else ""
    expected = "; ".join(f"{item.name}" for item in FORMATS if item.kind in ACCEPTED.get(kind, (kind,)))
    raise DataError(
        f"{where}: found {found}{looks}; this recipe needs {kind.replace('_', '-')} rows: {expected}.",
        f"Say what your columns are, with their names on the left: data.columns='{{{_EXAMPLE[kind]}}}'",
    )


def layout_of(row: Row, kind: str) -> Format | None:
    """The format that one row's own columns have, among those that `kind` takes; of another kind where they say so."""
    columns = {name for name, value in row.items() if value is not None and (name != "label" or kind != "prompt")}
    fitting = [item for item in FORMATS if item.fits(columns, row)]
    own = [item for item in fitting if item.kind in ACCEPTED.get(kind, (kind,))]
    # a question whose answer is missing is not a prompt of its own
    return next((item for item in [*own, *fitting] if item.kind != "prompt" or kind == "prompt"), None)


def layouts_of(rows: list[Row], kind: str, where: str, theirs: dict[str, str]) -> tuple[Format, list[Format | None]]:
    """(the format that most rows of a source have, the format of each row). Raises as `recognise`."""
    each = [layout_of(row, kind) for row in rows]
    fitting = Counter(item for item in each if item is not None and item.kind in ACCEPTED.get(kind, (kind,)))
    if fitting:
        return fitting.most_common(1)[0][0], each
    columns = {name for row in rows for name, value in row.items() if value is not None}
    first = {name: next(row[name] for row in rows if row.get(name) is not None) for name in columns}
    return recognise(columns, first, kind, where, theirs), each


def as_lists(rows: list[tuple[int, Row]], kind: str) -> list[tuple[int, Row]]:
    """For a recipe that takes pairs, rows of one scored answer each as rows of all answers to a prompt."""
    taken = ACCEPTED.get(kind, (kind,))
    layouts = [layout_of(row, kind) for _, row in rows]
    if "preference" not in taken or kind == "prompt" or any(item and item.kind in taken for item in layouts):
        return rows
    names = _pair_of({name for _, row in rows for name, value in row.items() if value is not None})
    gathered = preferences.gathered(rows, *names) if names else rows
    # for KTO a score is not a word of liking; where it orders several answers to a prompt, the order says it
    return rows if kind == "labelled_completion" and len(gathered) == len(rows) else gathered


def check_layout(row: Row, own: Format | None, found: Format, where: str, other: tuple[str, Row]) -> None:
    """Raises DataError for a row of another format than `found`, which the source has; `other`: a row that has it, and
    its place."""
    have, has = ({name for name, value in some.items() if value is not None} for some in (other[1], row))
    pair = _pair_of(set(row)) if found.convert is _pair and not row.waits else None
    if own is None or own is found:
        if pair and has - have and not has.issuperset(pair):
            lacks = ", ".join(name for name in pair if name not in has)
            raise DataError(
                f"{where} has no {lacks}, as {other[0]} has; it has {', '.join(sorted(has))}.",
                "Give all rows of a file the same columns.",
            )
        return
    # one text of many that looks like a transcript is a text, and a question is a prompt with an answer and without
    if {own.convert, found.convert} in ({_text, _transcript}, {_pair, _prompt}) and found.convert is not _transcript:
        return
    if has == have and found.kind != "prompt_completion":
        return  # its values are what is wrong, which the conversion says
    differs = [("", has - have), ("no ", have - has)]
    parts = [f"{no}{', '.join(sorted(names))}" for no, names in differs if names]
    more = f" It has {', and '.join(parts)}." if parts else ""
    raise DataError(
        f"{where}: another layout than that of {other[0]}: {own.name}, and not {found.name}.{more}",
        "Keep rows of one layout in a file; data.path=[a.jsonl, b.jsonl] reads several.",
    )


_EXAMPLE = {
    "prompt_completion": "my_question: prompt, my_answer: completion",
    "prompt": "my_question: prompt",
    "text": "my_column: text",
    "preference": "my_question: prompt, the_better: chosen, the_worse: rejected",
    "labelled_completion": "my_question: prompt, my_answer: completion, is_good: label",
}


def rename(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our names, without the columns that are `displaced`."""
    if not columns:
        return row
    return {columns.get(name, name): value for name, value in row.items() if name not in displaced(row, columns)}


def displaced(row: dict[str, Any], columns: dict[str, str]) -> set[str]:
    """The columns that `rename` leaves out: called unused, or named as another one is to be."""
    taken = set(columns.values())
    return {name for name in row if columns.get(name) == UNUSED or (name not in columns and name in taken)}


def check_columns(columns: dict[str, str], found: set[str], where: str) -> None:
    """Raises SettingsError where `data.columns` names a column that is not there, or no name of ours, or one twice."""
    for ours in columns.values():
        same = [theirs for theirs, name in columns.items() if name == ours]
        if len(same) > 1 and ours != UNUSED:
            raise SettingsError(
                f"data.columns: {' and '.join(same)} cannot both be {ours!r}.", f"Call one of them {UNUSED}."
            )
    for theirs, ours in columns.items():
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1)
            raise SettingsError(
                f"data.columns: {where} has no column {theirs!r}; found {', '.join(sorted(found))}.",
                f"Did you mean {near[0]}?" if near else "Name a column of the data on the left of each colon.",
            )
        if ours not in UNDERSTOOD:
            near = difflib.get_close_matches(ours, NAMES_WE_KNOW, n=1)
            raise SettingsError(
                f"data.columns: {theirs} cannot be {ours!r}." + (f" Did you mean {near[0]}?" if near else ""),
                f"Names: {', '.join(NAMES_WE_KNOW)}.",
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


def _turns(row: Row, where: str) -> list[Record]:
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


def _instances(row: Row, where: str) -> list[Record]:
    instances = row.take("instances")
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise DataError(f"{where}: instances are {describe(instances)}; expected a list of {{input, output}}.")
    if len(instances) == 1:
        return _instance(row, instances[0], where)
    records: list[Record] = []
    for number, item in enumerate(instances, start=1):
        records += _instance(row, item, f"{where}.{number}")
    return records


def _pair_of(columns: set[str]) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if set(pair) <= columns), None)


def _pair(row: Row, where: str) -> list[Record]:
    names = _pair_of(set(row)) or ("prompt", "completion")
    question, answer = row.get(names[0]), row.get(names[1])
    if row.waits and not any(isinstance(side, list) and side and is_turn(side[0]) for side in (question, answer)):
        return _prompt(row, where)  # any value can be what a reward compares with
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
    """Whether an answer is a list of turns, or is to be refused as one; lists of texts are no turns."""
    return isinstance(answer, list) and not (answer and all(isinstance(item, str) for item in answer))


def _labelled(row: Row, where: str) -> list[Record]:
    label = truth(row.take("label"))
    if label is None:
        raise DataError(f"{where}: label is {describe(row.get('label'))}; expected true or false.")
    names = _pair_of({name for name, item in row.items() if item is not None}) or _pair_of(set(row))
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


def _is_labelled(columns: set[str], row: dict[str, Any]) -> bool:
    return (
        "label" in columns
        and truth(row.get("label")) is not None
        and bool(_pair_of(columns) or columns & set(TURN_COLUMNS))
    )


def _text(row: Row, where: str) -> list[Record]:
    value = text_of(row.take("text"), f"{where}: text")
    if isinstance(row.get("role"), str) and row["role"] in ROLE_NAMES:
        raise DataError(
            f"{where}: this row is one turn ({row['role']}) of a conversation, and no text of its own.",
            'Put the turns of each conversation into one row: {"messages": [{"role": "user", "content": "…"}, …]}',
        )
    return [Text(where, value)]


def _transcript(row: Row, where: str) -> list[Record]:
    text = text_of(row.take("text"), f"{where}: text")
    return _conversation(transcript_of(text, where), row, where)


def _prompt(row: Row, where: str) -> list[Record]:
    pair = _pair_of(set(row)) or ("prompt", "")  # the question of a pair may have another name
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


def as_kind(record: Record, kind: str) -> list[Record]:
    """A record as the kind that a recipe trains on: the prompt that a conversation's last answer or a pair answers,
    a pair as a liked and a disliked answer; any other record unchanged.
    """
    if kind == "prompt" and isinstance(record, PromptCompletion | Preference):
        return [Prompt(record.where, prompt_of(record), record.tools, record.metadata, reference_of(record))]
    if kind == "labelled_completion" and isinstance(record, Preference):
        sides = ((record.chosen, True), (record.rejected, False))
        return [
            LabelledCompletion(record.where, record.prompt, turns, label, record.tools, record.defect, record.metadata)
            for turns, label in sides
        ]
    return [record]


FORMATS = (
    Format(
        "preference (chosen, rejected; prompt)",
        "preference",
        lambda c, r: {"chosen", "rejected"} <= c,
        preferences.preference,
    ),
    Format(
        "an answer and a worse one in a list (instruction, output: [good, bad])",
        "preference",
        lambda c, r: preferences.two_in_a_list(c, r),
        preferences.first_of_two,
    ),
    Format(
        "scored or ranked answers (prompt, responses, scores)",
        "preference",
        lambda c, r: preferences.list_of(c, r) is not None,
        preferences.ranked,
        ranked=True,
    ),
    Format(
        "two answers and votes (prompt, response_a, response_b, votes)",
        "preference",
        lambda c, r: preferences.answers_of(c) is not None,
        preferences.voted,
    ),
    Format(
        "labelled completions (prompt, completion, label)",
        "labelled_completion",
        _is_labelled,
        _labelled,
    ),
    # A truth value beside an answer says whether it was liked: training on all of them would teach the bad ones.
    Format(
        "messages (or conversations)",
        "prompt_completion",
        lambda c, r: bool(c & set(TURN_COLUMNS)) and not _is_labelled(c, r),
        _turns,
    ),
    Format(
        "self-instruct (instruction, instances)",
        "prompt_completion",
        lambda c, r: {"instruction", "instances"} <= c,
        _instances,
    ),
    Format(
        "prompt and completion (or question and answer, instruction and output, …)",
        "prompt_completion",
        lambda c, r: _pair_of(c) is not None and not _is_labelled(c, r),
        _pair,
    ),
    Format(
        "transcripts (text with Human: and Assistant:)",
        "prompt_completion",
        lambda c, r: "text" in c and is_transcript(r.get("text")),
        _transcript,
    ),
    Format("plain text (text)", "text", lambda c, r: "text" in c, _text),
    Format(
        "prompts (prompt)",
        "prompt",
        lambda c, r: bool(c & set(QUESTIONS)),
        _prompt,
    ),
)
