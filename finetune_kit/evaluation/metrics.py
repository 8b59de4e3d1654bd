"""Scores of answers, as `evaluate.Metric` objects of our own: nothing is fetched and no script is run by default.

Every metric here takes `compute(predictions=…, references=…, metadata=…)` and returns `{name: mean, "per_row": [...]}`,
each row in [0, 1], more is better. `metadata` (one dict a row) is what the data's own scorer needs.
"""

from __future__ import annotations

import difflib
import importlib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from finetune_kit.data.records import Prompt, reference_of
from finetune_kit.errors import NumericsError, ResourceError, SettingsError

RowScore = Callable[[str, str, dict[str, Any]], float]  # prediction, reference, metadata -> [0, 1]

BUILT_IN: dict[str, str] = {
    "task_score": "the data's own scorer",
    "exact_match": "share of answers equal to the reference, white space aside",
    "final_number": "share of answers whose last number (the one after ####, if there) equals the reference's",
    "rouge": "ROUGE-L F1 with the reference, mean over rows",
    "bleu": "sentence BLEU with the reference, mean over rows",
}

# A number as people write it: 1,234.50, -3, .5. A minus after a letter, digit or bracket is a hyphen or an operation.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
SHORT_ANSWER_WORDS = 8
NUMBERED_SHARE = 0.9


def choose_metrics(names: list[str], data: Any, hub_metrics: Sequence[str] = ()) -> list[Any]:
    """The `evaluate.Metric` objects for `names`, or what the data allow where none are named.

    None named: the data's own scorer; else final_number if at least 90 % of the held-out references have a number
    after ####; else exact_match if the median reference has at most 8 words and none is
    empty; else none (the loss alone speaks).
    `hub_metrics` are fetched from the Hub and RUN, and are used in addition.
    Raises SettingsError (unknown name, or no scorer in the data), ResourceError (package missing, Hub unreachable).
    """
    for name in names:
        if name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            raise SettingsError(
                f"evaluate.metrics: '{name}' is not one of {', '.join(BUILT_IN)}.",
                f"Did you mean {near[0]}?" if near else f"To fetch and run a Hub script: evaluate.hub_metrics=[{name}]",
            )
    if "task_score" in names and data.score is None:
        raise SettingsError(
            "evaluate.metrics: task_score needs data with a scorer of their own (reasoning_gym/<task>).",
            "Use another: " + ", ".join(name for name in BUILT_IN if name != "task_score"),
        )
    chosen = names or _what_the_data_allow(data)
    return [_metric(name, _row_score(name, data)) for name in chosen] + [_hub_metric(name) for name in hub_metrics]


def _what_the_data_allow(data: Any) -> list[str]:
    if data.score is not None:
        return ["task_score"]
    references = [reference_of(record) for record in data.held_out_records]
    if not references or isinstance(data.held_out_records[0], Prompt):  # prompts are judged by their reward
        return []
    if sum("####" in text and final_number(text) is not None for text in references) >= NUMBERED_SHARE * len(
        references
    ):
        return ["final_number"]
    short = statistics.median(len(text.split()) for text in references) <= SHORT_ANSWER_WORDS
    return ["exact_match"] if short and all(references) else []  # an empty reference is a tool call: no text to match


def score_rows(
    metric: Any, predictions: list[str], references: list[str], metadata: list[dict[str, Any]], where: list[str]
) -> list[float]:
    """The metric's score of every row. Raises NumericsError naming the row whose score is not a finite number."""
    answers = [answer_of(text) for text in predictions]
    expected = [answer_of(text) for text in references]
    if metric.name in BUILT_IN:
        scores = metric.compute(predictions=answers, references=expected, metadata=metadata)["per_row"]
    else:
        scores = [_hub_score(metric, *pair) for pair in zip(answers, expected, strict=True)]
    for row, score in zip(where, scores, strict=True):
        if not math.isfinite(score):
            raise NumericsError(f"{row}: {metric.name} gave {score} instead of a number.")
    return [float(score) for score in scores]


def answer_of(text: str) -> str:
    """The text after a closed thought (`<think>…</think>`), or all of it."""
    return text.rpartition("</think>")[2].strip()


def exact_match(prediction: str, reference: str) -> float:
    """1 if the texts are equal, runs of white space counted as one space."""
    return float(prediction.split() == reference.split())


def final_number(text: str) -> Decimal | None:
    """The answer's number as GSM8K writes it: the first after the last ####, else the last in the text; None: none."""
    plain = text.replace("−", "-").replace("$", "")
    _, mark, marked = plain.rpartition("####")
    numbers = NUMBER.findall(marked if mark else plain)
    if not numbers:
        return None
    return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))


def final_number_match(prediction: str, reference: str) -> float:
    """1 if both end in the same number (18 equals 18.00). A reference without a number is compared as text."""
    expected = final_number(reference)
    return exact_match(prediction, reference) if expected is None else float(final_number(prediction) == expected)


def _row_score(name: str, data: Any) -> RowScore:
    if name == "task_score":
        return lambda prediction, reference, metadata: float(data.score(prediction, metadata))
    if name == "rouge":
        return _rouge()
    if name == "bleu":
        return _bleu()
    plain = exact_match if name == "exact_match" else final_number_match
    return lambda prediction, reference, metadata: plain(prediction, reference)


def _rouge() -> RowScore:
    scorer = _optional("rouge_score.rouge_scorer", "rouge").RougeScorer(["rougeL"])
    return lambda prediction, reference, metadata: float(scorer.score(reference, prediction)["rougeL"].fmeasure)


def _bleu() -> RowScore:
    # effective_order: an answer of fewer than four words would otherwise always score 0.
    scorer = _optional("sacrebleu.metrics", "bleu").BLEU(effective_order=True)
    return lambda prediction, reference, metadata: min(1.0, scorer.sentence_score(prediction, [reference]).score / 100)


def _optional(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise ResourceError(
            f"evaluate.metrics: {metric} needs the package {package}, which is not installed.",
            f"pip install {package.replace('_', '-')}   (or: pip install 'finetune-kit[metrics]')",
        ) from None


def _metric(name: str, row_score: RowScore) -> Any:
    """An in-process `evaluate.Metric` around one function of a row."""
    import evaluate
    from evaluate.info import Features, Value  # the types that MetricInfo wants, under evaluate's own roof

    class RowMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
        def _info(self) -> Any:
            return evaluate.MetricInfo(
                description=BUILT_IN[name],
                citation="",
                inputs_description="predictions and references: texts; metadata: one dict a row.",
                features=Features({"predictions": Value("string"), "references": Value("string")}),
            )

        def _compute(
            self,
            predictions: Sequence[str],
            references: Sequence[str],
            metadata: Sequence[dict[str, Any]] | None = None,
        ) -> dict[str, Any]:
            rows = zip(predictions, references, metadata or [{}] * len(predictions), strict=True)
            scores = [row_score(*row) for row in rows]
            return {name: statistics.fmean(scores), "per_row": scores}

    RowMetric.__name__ = name  # evaluate names a metric after its class
    return RowMetric(keep_in_memory=True)


def _hub_metric(name: str) -> Any:
    import evaluate

    try:
        return evaluate.load(name)
    except (FileNotFoundError, ConnectionError, ImportError) as error:
        raise ResourceError(
            f"evaluate.hub_metrics: '{name}' could not be loaded: {' '.join(str(error).split())}",
            f"Leave it out, or use one that needs no network: evaluate.metrics=[{', '.join(BUILT_IN)}]",
        ) from None


def _hub_score(metric: Any, prediction: str, reference: str) -> float:
    """A Hub metric's score of one row, in its own unit: the entry of its own name, or its first number."""
    result = metric.compute(predictions=[prediction], references=[reference])
    numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
    if not numbers:
        raise SettingsError(f"evaluate.hub_metrics: '{metric.name}' gives no number for a row, only {sorted(result)}.")
    return float(numbers.get(metric.name, next(iter(numbers.values()))))
