"""Multiple choice by log-likelihood: of several answers to a question, which one the model finds likeliest.

Written and scored as lm-evaluation-harness does for `multiple_choice` without a chat template: the context, a space and
a choice, tokenised together; accuracy by the sum of the choice's log-probabilities, normalised accuracy by that sum
over the choice's characters. A question's choices are rows that begin alike, which the packed forward computes once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_kit.data.sources import read_rows, shown
from finetune_kit.data.template import bos_prefix
from finetune_kit.data.token_ids import text_ids
from finetune_kit.errors import DataError
from finetune_kit.evaluation.intervals import SHARE, entry
from finetune_kit.evaluation.loss import IGNORED, Row, row_losses
from finetune_kit.models.shapes import positions_of
from finetune_kit.settings.schema import EvaluateConfig

CONTEXTS = ("question", "query", "ctx", "context", "prompt", "goal", "Question")
CHOICES = ("choices", "options", "endings")
GOLDS = ("gold", "answerKey", "answer", "label", "target", "correct")
LABELLED = re.compile(r"^\s*\(?([A-Za-z]|\d)[.):]\s+")  # "A. Paris"
EXPECTED = (
    f"a question ({', '.join(CONTEXTS[:-1])}), a list of choices ({', '.join(CHOICES)}) and the right one "
    f"({', '.join(GOLDS)}), as its place, letter or text"
)


@dataclass(frozen=True)
class Question:
    """A context, its choices, the place of the right one, and where it stands in its file."""

    context: str
    choices: tuple[str, ...]
    gold: int
    where: str


@dataclass
class Choices:
    """What one model finds likeliest: for each question the log-likelihood (nats) of every choice."""

    source: str
    questions: list[Question]
    loglikelihoods: list[list[float]]

    def picked(self, normalised: bool = False) -> list[int]:
        """The place of the likeliest choice of each question; `normalised`: by character."""
        found = []
        for question, scores in zip(self.questions, self.loglikelihoods, strict=True):
            lengths = [len(choice) if normalised else 1 for choice in question.choices]
            found.append(max(range(len(scores)), key=lambda at: scores[at] / lengths[at]))
        return found

    def right(self, normalised: bool = False) -> list[float]:
        """1 for each question that is answered right, else 0."""
        return [float(at == item.gold) for at, item in zip(self.picked(normalised), self.questions, strict=True)]


def read_choices(source: str, size: int, setting: str = "evaluate.choices") -> list[Question]:
    """`size` questions of a file or Hub data set, or all of them where there are fewer, spread evenly.

    Raises DataError for a row that is not a question with choices.
    """
    rows = read_rows(source, setting)
    chosen = rows if len(rows) <= size else [rows[at * len(rows) // size] for at in range(size)]
    return [question_of(row, f"{Path(source).name}:{number}", setting) for number, row in chosen]


def question_of(row: dict[str, Any], where: str, setting: str = "evaluate.choices") -> Question:
    """A row as a question: its choices as a list, as {text, label}, as lines that begin with letters, as ans0, ans1, …,
    or TruthfulQA's best answer among the wrong ones (MC1)."""
    context = next((row[name] for name in CONTEXTS if isinstance(row.get(name), str)), None)
    if context is not None and "Best Answer" in row and "Incorrect Answers" in row:
        wrong = [text.strip() for text in str(row["Incorrect Answers"]).split(";") if text.strip()]
        texts, gold = [str(row["Best Answer"]).strip(), *wrong], 0
    else:
        texts, labels = _choices(row)
        given = next((row[name] for name in GOLDS if row.get(name) is not None), None)
        found = _gold(given, texts, labels)
        if context is None or len(texts) < 2 or found is None or not all(texts):
            raise DataError(
                f"{setting}: {where} has {', '.join(row)}; expected {EXPECTED}.", "Rename its columns, or leave it out."
            )
        gold = found
    return Question(_written(context, row), tuple(texts), gold, where)


def _written(context: str, row: dict[str, Any]) -> str:
    """As the usual tasks write it: a passage, `Question: …`, `Answer:`. What is to be continued with stays so."""
    if "endings" in row or re.search(r"\bAnswer:\s*$", context):
        return context.rstrip()
    passage = row.get("context")
    before = f"{passage}\n" if isinstance(passage, str) and passage != context else ""
    return f"{before}{context if context.startswith('Question:') else f'Question: {context}'}\nAnswer:"


def _choices(row: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(texts, labels) of a row's choices; no labels where they have none."""
    numbered = [row[name] for name in sorted(row) if re.fullmatch(r"(ans|sol|option)_?\d", name)]
    found = next((row[name] for name in CHOICES if row.get(name)), numbered)
    if isinstance(found, dict) and isinstance(found.get("text"), list):
        return [str(text).strip() for text in found["text"]], [str(label) for label in found.get("label", [])]
    if isinstance(found, dict):
        return [str(text).strip() for text in found.values()], [str(label) for label in found]
    lines = found.strip().splitlines() if isinstance(found, str) else found
    if not isinstance(lines, list):
        return [], []
    texts = [str(item["text"] if isinstance(item, dict) and "text" in item else item).strip() for item in lines]
    marks = [LABELLED.match(text) for text in texts]
    if texts and all(marks):
        return [LABELLED.sub("", text).strip() for text in texts], [mark[1] for mark in marks if mark]
    return texts, []


def _gold(given: Any, texts: Sequence[str], labels: Sequence[str]) -> int | None:
    """The place of the right choice, given as its place from 0, its label, its letter, or its text."""
    if isinstance(given, int) and not isinstance(given, bool):
        return given if 0 <= given < len(texts) else None
    if not isinstance(given, str) or not given.strip():
        return None
    said = given.strip()
    mark = LABELLED.match(said)
    for wanted, among in ((said, labels), (said, texts), (LABELLED.sub("", said).strip() if mark else said, texts)):
        if wanted in among:
            return list(among).index(wanted)
    if mark and mark[1] in labels:
        return list(labels).index(mark[1])
    if said.isdecimal():
        return int(said) if int(said) < len(texts) else None
    at = "ABCDEFGHIJ".find(said.upper()) if len(said) == 1 else -1
    return at if 0 <= at < len(texts) else None


def measure_choices(
    model: Any,
    tokenizer: Any,
    source: str,
    questions: list[Question],
    config: EvaluateConfig,
    told: Callable[[int], None] | None = None,
) -> Choices:
    """The log-likelihood of every choice of every question."""
    rows, where = [], []
    room = positions_of(model)
    for question in questions:
        for choice in question.choices:
            rows.append(_row(tokenizer, question.context, choice, room))
            where.append(question.where)
    nll, _ = row_losses(model, rows, where, config.batch_size, told)
    scores = iter(-value for value in nll)
    return Choices(source, questions, [[next(scores) for _ in question.choices] for question in questions])


def _row(tokenizer: Any, context: str, choice: str, room: int | None) -> Row:
    """Tokens of context and choice, the choice supervised; what the model has no positions for is cut at the front."""
    begin = bos_prefix(tokenizer)
    ids = [*begin, *text_ids(tokenizer, f"{context} {choice}")]
    prompt = [*begin, *text_ids(tokenizer, context)]
    cut = max(0, len(ids) - room) if room else 0
    labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
    return ids[cut:], labels[cut:]


def name_of(source: str, sources: Sequence[str]) -> str:
    """What a file's or data set's metrics are called: its name without ending; two of a name have their folders'."""
    places = [Path(other.partition(":")[0]) for other in (source, *sources)]
    own = places[0].stem
    return own if [place.stem for place in places[1:]].count(own) == 1 else f"{places[0].parent.name}/{own}"


def entries(before: Choices, after: Choices, config: EvaluateConfig, name: str) -> list[dict[str, Any]]:
    """Accuracy and normalised accuracy."""
    return [
        entry(
            f"{name}_{metric}",
            before.right(normalised),
            after.right(normalised),
            config,
            higher_is_better=True,
            within=SHARE,
        )
        for metric, normalised in (("accuracy", False), ("accuracy_norm", True))
    ]


def details(measured: Sequence[Choices], config: EvaluateConfig) -> list[dict[str, Any]]:
    """Of each source what has to be known to read its numbers."""
    listed = ",".join(shown(item.source) for item in measured)
    command = (
        f"python -m finetune_kit evaluate DIR evaluate.choices=[{listed}] evaluate.choices_size={config.choices_size}"
    )
    return [
        {
            "source": shown(item.source),
            "questions": len(item.questions),
            "decoding": "log-likelihoods of the choices, without a chat template",
            "by_chance": sum(1 / len(question.choices) for question in item.questions) / len(item.questions),
            "command": command,
        }
        for item in measured
    ]
