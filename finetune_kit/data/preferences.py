"""Rows of any common preference layout to pairs: two answers, scored or ranked lists, two answers and votes on them.

A row that is not a pair (a tie, two equal answers, an empty one) becomes a record with its `defect`, so that the ledger
counts it; a row that cannot be read is a DataError.
"""

from __future__ import annotations

import ast
import json
import re
from functools import lru_cache
from itertools import combinations
from typing import Any

from finetune_kit.data.columns import GIVEN, HISTORY, SYSTEMS, Row, asked, history_of, with_history, with_system
from finetune_kit.data.messages import describe, is_transcript, messages_of, side_of, tools_of, transcript_of
from finetune_kit.data.records import Message, Preference, Record
from finetune_kit.errors import DataError

PROMPTS = ("prompt", "instruction", "question", "query", "problem", "history", "context", "input", "user", "human")
CONVERSATIONS = ("messages", "conversations", "conversation", "chat")  # with the question last, where no column has it
LISTS = ("responses", "completions", "answers", "candidates", "outputs", "generations")
SCORES = ("scores", "score", "ratings", "rating", "overall_score")  # higher is better
RANKS = ("ranks", "rank", "ranking")  # 1 is best
TEXTS = ("response", "completion", "answer", "text", "content", "output")
ENDINGS = (("_a", "_b"), ("_A", "_B"), ("_0", "_1"), ("_1", "_2"), ("0", "1"), ("1", "2"))
BARE = (("A", "B"), ("a", "b"))  # columns that are an answer each
SHP = "human_ref"  # of Stanford's: there label 1 is the first answer, and 0 the second
STEMS = (*TEXTS, "conversation", SHP, "model_response")
VOTES = ("votes", "preferences", "annotations", "winner", "preference", "label", "labels", "choice")
VOTES_BY_ID = ("better_response_id", "chosen_index")
SIGNED = ("overall_preference", "individual_preference")  # below 0: the first is better
SCORED_ALONE = (*SCORES, "helpfulness", "reward")  # of one answer a row
IN_A_VOTE = ("score", "overall_pref", "preference", "winner", "vote", "label", "choice")
NAMES = {
    *(*LISTS, *SCORED_ALONE, *RANKS, *VOTES, *VOTES_BY_ID, *SIGNED),
    *(stem + ending for stem in STEMS for pair in ENDINGS for ending in pair),
    *(f"score{ending}" for pair in ENDINGS for ending in pair),
    *(name for pair in BARE for name in pair),
}
TIES = ("tie", "both", "neither", "equal", "same", "none")


def preference(row: Row, where: str) -> list[Record]:
    """The pair of a row with chosen and rejected; the prompt is a column, or what both begin with."""
    margin = _score_difference(row) if row.get("margin") is None else row.take("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise DataError(f"{where}: margin is {describe(margin)}; expected a number.")
    return [_pair(row, row.take("chosen"), row.take("rejected"), where, margin)]


def two_in_a_list(columns: set[str], row: dict[str, Any]) -> bool:
    """Whether an instruction's output is a list of texts, as LLaMA-Factory's files of pairs once had it."""
    value = row.get("output")
    several = isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
    return several and {"instruction", "output"} <= columns


def first_of_two(row: Row, where: str) -> list[Record]:
    """The pair of such a row: the first text is the better one."""
    texts = row.take("output")
    if len(texts) != 2:
        raise DataError(
            f"{where}: output is a list of {len(texts)} texts; a pair is two, the better one first.",
            "Write chosen and rejected, or all answers with their scores: responses and scores.",
        )
    return [_pair(row, texts[0], texts[1], where, None)]


def ranked(row: Row, where: str) -> list[Record]:
    """Every pair of a row's scored or ranked answers, the best against the worst first; equal ones are ties."""
    name = list_of(set(row), row)
    answers = _scored(row, name or "", where)
    answers.sort(key=lambda answer: -answer[1])  # stable: of equal ones the first stays first
    if len(answers) < 2:
        raise DataError(f"{where}: {name} holds {len(answers)} answers; a pair needs two.", "Remove the row.")
    pairs = sorted(combinations(range(len(answers)), 2), key=lambda pair: pair[0] - pair[1])
    records: list[Record] = []
    for number, (one, other) in enumerate(pairs, start=1):
        margin = answers[one][1] - answers[other][1]
        record = _pair(row, answers[one][0], answers[other][0], f"{where}.{number}", margin)
        record.defect = record.defect or ("tie: both answers have the same score" if margin == 0 else "")
        records.append(record)
    return records


def voted(row: Row, where: str) -> list[Record]:
    """The pair that the majority of votes makes of two answers; without a majority it is a tie."""
    first, second = answers_of(set(row)) or ("", "")
    endings = next(pair for pair in (*ENDINGS, *BARE) if first.endswith(pair[0]) and second.endswith(pair[1]))
    _refuse_digits(row, (first, second), endings, where)
    votes = _shp_vote(row, where) if first.startswith(SHP) else _votes(row, endings, where)
    balance = sum(votes)
    chosen, rejected = (first, second) if balance <= 0 else (second, first)
    record = _pair(row, row.take(chosen), row.take(rejected), where, abs(balance) / max(1, len(votes)))
    record.defect = record.defect or ("" if balance else "tie: as many votes for the one as for the other")
    return [record]


def gathered(rows: list[tuple[int, Row]], question: str, answer: str) -> list[tuple[int, Row]]:
    """Rows of one scored answer each (HelpSteer2's) as rows of one prompt with all its answers, where each of a score
    is a number; the rows as they are elsewhere. A row keeps the number of its prompt's first one."""
    score = next((name for name in SCORED_ALONE if any(is_number(row.get(name)) for _, row in rows)), "")
    if not score:
        return rows
    together: dict[str, tuple[int, Row]] = {}
    for number, row in rows:
        rest = {name: value for name, value in row.items() if name not in (answer, score)}
        key = json.dumps([row.get(name) for name in (question, *SYSTEMS, *GIVEN, HISTORY)], sort_keys=True)
        first = together.setdefault(key, (number, Row({**rest, LISTS[0]: []}, row.waits)))
        first[1][LISTS[0]].append({"response": row.get(answer), "score": row.get(score)})
    return list(together.values())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def list_of(columns: set[str], row: dict[str, Any]) -> str | None:
    """The column that lists scored or ranked answers, if there is one."""
    for name in LISTS:
        value = row.get(name)
        if name not in columns or not isinstance(value, list) or not value:
            continue
        inner = value[0] if isinstance(value[0], dict) else {}
        if set(inner) & {*SCORES, *RANKS} or columns & {*SCORES, *RANKS}:
            return name
    return None


def answers_of(columns: set[str]) -> tuple[str, str] | None:
    """The two columns that hold an answer each, where something says which is better."""
    return _answers_of(frozenset(columns))


@lru_cache(maxsize=64)
def _answers_of(columns: frozenset[str]) -> tuple[str, str] | None:
    for stem in STEMS:
        for one, other in ENDINGS:
            verdicts = {*VOTES, *VOTES_BY_ID, *SIGNED, f"score{one}"}
            if {stem + one, stem + other} <= columns and verdicts & columns:
                return stem + one, stem + other
    asked_ = columns & {*PROMPTS, *CONVERSATIONS}
    return next((pair for pair in BARE if {*pair} <= columns and asked_ and columns & {*VOTES, *SIGNED}), None)


def _refuse_digits(row: Row, answers: tuple[str, str], endings: tuple[str, str], where: str) -> None:
    """Raises DataError for a vote of 0 or 1 over answers that are named by letters: which of them it means differs from
    data set to data set."""
    named = next((name for name in VOTES if row.get(name) is not None), None)
    if named is None or answers[0].startswith(SHP) or endings[0].strip("_").isdigit():
        return
    if str(row[named]).strip().lower() in ("0", "1", "0.0", "1.0", "true", "false"):
        one, other = answers
        raise DataError(
            f"{where}: {named} is {row[named]}, which does not say whether {one} or {other} is the better one: in some "
            "data sets 0 is the first, in others 1.",
            f"Where 0 is {one}: data.columns='{{{one}: response_0, {other}: response_1}}'. Where 1 is {one}: "
            f"data.columns='{{{one}: human_ref_A, {other}: human_ref_B, {named}: labels}}'",
        )


def _score_difference(row: Row) -> float | None:
    """score_chosen - score_rejected, from columns or from `metadata` (an object, or Python's text of one)."""
    metadata = row.get("metadata")
    if isinstance(metadata, str):
        try:
            metadata = ast.literal_eval(metadata)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            metadata = None
    for holder, columns in ((row, ("score_chosen", "score_rejected")), (metadata, ("metadata",))):
        if isinstance(holder, dict):
            chosen, rejected = holder.get("score_chosen"), holder.get("score_rejected")
            if isinstance(chosen, int | float) and isinstance(rejected, int | float):
                row.used.update(columns)
                return float(chosen - rejected)
    return None


def _pair(row: Row, chosen: Any, rejected: Any, where: str, margin: float | None) -> Preference:
    """The record of two answers, each a text, a list of turns or a transcript, split where they part."""
    column = next((name for name in PROMPTS if _says_something(row.get(name))), "")
    prompt = _turns_of(row, column, where) if column else []
    sides = []
    for label, value in (("chosen", chosen), ("rejected", rejected)):
        if is_transcript(value) and not prompt:
            sides.append(transcript_of(value, where))
        else:
            sides.append(side_of(value, "assistant", f"{where}: {label}"))
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    # Two equal answers are still two answers: the prompt ends before the last turn at the latest.
    shared = min(shared, *(len(side) - 1 for side in sides))
    before = sides[0][:shared]
    if before and prompt and not _says(before, prompt):
        raise DataError(
            f"{where}: both sides begin with turns of their own that do not hold the prompt column's text.",
            "Remove the prompt column, or give the answers alone.",
        )
    if before and prompt:
        row.used.add(column)  # the turns say it
    if not before and not column and (column := next((name for name in CONVERSATIONS if row.get(name)), "")):
        prompt = messages_of(row.take(column), f"{where}: {column}")
        if prompt and prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: {column} ends with an answer, and chosen and rejected are two others.",
                f"End {column} with the question that they answer.",
            )
    before = with_system(before, row) if before else _asked(row, column, prompt, where)
    if not before:
        raise DataError(
            f"{where}: chosen and rejected share no prompt.", "Add a prompt column, or whole conversations."
        )
    tools = tools_of(row.take("tools"), where)
    return Preference(where, before, sides[0][shared:], sides[1][shared:], tools, margin)


def _says_something(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None and value != []


def _turns_of(row: Row, column: str, where: str) -> list[Message]:
    """What a prompt's column says by itself."""
    if column == HISTORY:
        said = row[HISTORY]
        if isinstance(said, str) and not is_transcript(said) and not said.lstrip().startswith("["):
            row.used.add(HISTORY)  # a post that both answers reply to
            return [{"role": "user", "content": said}]
        return history_of(row, where)
    value, where = row[column], f"{where}: {column}"
    return transcript_of(value, where) if is_transcript(value) else side_of(value, "user", where)


def _asked(row: Row, column: str, prompt: list[Message], where: str) -> list[Message]:
    """The prompt with what the other columns say of it: input, context, choices, earlier turns, a system turn."""
    if not column:
        return []
    if column == HISTORY or is_transcript(row[column]):
        row.used.add(column)
        return with_system(prompt if column == HISTORY else with_history(prompt, row, where), row)
    return asked(row, column, where)


def _says(turns: list[Message], prompt: list[Message]) -> bool:
    """Whether a conversation holds all that a prompt column says, white space aside."""
    said = [" ".join(str(turn["content"]).split()) for turn in turns]
    return all(" ".join(str(turn["content"]).split()) in said for turn in prompt)


def _scored(row: Row, name: str, where: str) -> list[tuple[Any, float]]:
    """(answer, score) of a list of answers; a rank counts downwards."""
    values, scored = row.take(name), []
    beside = next((column for column in (*SCORES, *RANKS) if isinstance(row.get(column), list)), None)
    if beside and len(row.take(beside)) != len(values):
        raise DataError(f"{where}: {len(values)} {name} and {len(row[beside])} {beside}; expected as many.")
    for number, value in enumerate(values):
        answer, score, key = value, None, beside
        if beside:
            score = row[beside][number]
        elif isinstance(value, dict):
            key = next((column for column in (*SCORES, *RANKS) if column in value), None)
            score = value.get(key)
        if isinstance(value, dict) and "role" not in value:
            answer = next((value[text] for text in TEXTS if text in value), None)
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise DataError(f"{where}: the score of answer {number + 1} is {describe(score)}; expected a number.")
        scored.append((answer, -float(score) if key in RANKS else float(score)))
    return scored


def _shp_vote(row: Row, where: str) -> list[float]:
    label = row.take("labels")
    row.used.update(("score_A", "score_B"))
    if isinstance(label, bool) or label not in (0, 1):
        raise DataError(f"{where}: labels is {describe(label)}; expected 1 (the first is better) or 0.")
    return [-1.0 if label else 1.0]


def _votes(row: Row, endings: tuple[str, str], where: str) -> list[float]:
    """One number a vote: -1 for the first answer, 1 for the second, 0 for neither."""
    scores = [row.get(f"score{ending}") for ending in endings]
    named = next((name for name in (*VOTES, *VOTES_BY_ID, *SIGNED) if row.get(name) is not None), None)
    if named is None:
        row.used.update(f"score{ending}" for ending in endings)
        if any(isinstance(score, bool) or not isinstance(score, int | float) for score in scores):
            raise DataError(f"{where}: no vote and no two scores.", "Remove the row, or say which answer is better.")
        return [float(scores[1] > scores[0]) - float(scores[1] < scores[0])]  # type: ignore[operator]  # checked
    value = row.take(named)
    if isinstance(value, dict) and all(isinstance(count, int) for count in value.values()):
        value = [vote for vote, count in value.items() for _ in range(count)]
    votes = value if isinstance(value, list) else [value]
    return [_side(vote, endings, named, f"{where}: {named}") for vote in votes]


def _side(vote: Any, endings: tuple[str, str], name: str, where: str) -> float:
    """Which answer a vote is for: -1 the first, 1 the second, 0 neither. DataError where it cannot be told."""
    if isinstance(vote, dict):
        key = next((key for key in IN_A_VOTE if key in vote), None)
        return _side(vote.get(key), endings, name, where)
    if vote is None:
        return 0.0
    marks = [ending.strip("_").lower() for ending in endings]
    if isinstance(vote, int | float) and not isinstance(vote, bool) and name in SIGNED:
        return float(vote > 0) - float(vote < 0)
    words = re.findall(r"[a-z0-9]+", str(vote).lower())
    if any(word in TIES for word in words):
        return 0.0
    found = {mark for mark in marks for word in words if word == mark or word in (f"response{mark}", f"model{mark}")}
    if len(found) != 1:
        expected = f"{marks[0].upper()}, {marks[1].upper()} or tie"
        raise DataError(f"{where}: {describe(vote)} names none of the two answers, or both.", f"Expected {expected}.")
    return -1.0 if found == {marks[0]} else 1.0
