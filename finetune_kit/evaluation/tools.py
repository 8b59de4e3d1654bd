"""What the tools were worth: scores with and without them on the same rows, and how they were called."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from finetune_kit.evaluation.function_calls import same_call
from finetune_kit.evaluation.intervals import SHARE, entry, spread_of
from finetune_kit.evaluation.measure import Measurement
from finetune_kit.evaluation.metrics import BUILT_IN
from finetune_kit.generation.generate import Call, Completion
from finetune_kit.settings.schema import EvaluateConfig


def tools_report(before: Measurement, after: Measurement, config: EvaluateConfig) -> dict[str, Any]:
    """The report's `tools`: for the model before and after, `scores` (each metric without and with the tools, a paired
    difference with its 95 % interval, over all rows and over those that want a call) and `calls` (see `calling`)."""
    sides = {"before": before, "after": after}
    return {name: {"scores": _scores(side, config), "calls": calling(side)} for name, side in sides.items()}


def tools_sentence(report: dict[str, Any]) -> str:
    """What matters of it in words."""
    after, calls = report["after"], report["after"]["calls"]
    said = ""
    for score in (score for score in after["scores"] if score["name"] == after["scores"][0]["name"]):
        on = "" if score["rows"] == "all" else f"On the {score['n']} rows {score['rows']}: "
        said += f"{on}{'without' if on else 'Without'} the tools {score['name']} is {score['without']:.3f}, "
        said += f"with them {score['with']:.3f} (difference {score['difference']:+.3f} [{spread_of(score)}]). "
    said += f"{calls['answers_that_call']:.1%} of the answers call"
    if calls["calls"]:
        said += f", {calls['valid']:.1%} of {calls['calls']} calls are valid"
    if calls["needless"] is not None:
        said += f"; of {calls['rows_that_want_none']} rows that want no call {calls['needless']:.1%} got one"
    return f"{said}."


def calling(side: Measurement) -> dict[str, Any]:
    """How a model called its tools. Shares are of 1; None where there is nothing to take a share of.

    `valid`: of the calls, those that could be read, name a known tool and fit its schema; `failed`: of the valid ones,
    those that the tool gave an error for; `used`: of the answers that call and got a result, those in which a result is
    found again, in a later call or in the answer; `needless`: of the rows of the data that make no call, the answers
    that call; `missed`: of those that make one, the answers that do not; `matched`: of those, the answers with the very
    same calls: names, arguments, and their types.
    """
    answers = side.completions
    calls = [call for answer in answers for call in answer.calls]
    calling_ones = [answer for answer in answers if answer.calls]
    given = [answer for answer in calling_ones if any(call.ok and call.result.strip() for call in answer.calls)]
    pairs = list(zip(answers, side.wanted, strict=True))
    none = [answer for answer, wanted in pairs if wanted == []]  # None: the row does not say
    some = [(answer, wanted) for answer, wanted in pairs if wanted]
    seconds = sum(call.seconds for call in calls)
    return {
        "answers_that_call": _share([bool(answer.calls) for answer in answers]),
        "calls": len(calls),
        "calls_per_row": len(calls) / len(answers) if answers else None,
        "valid": _share([call.valid for call in calls]),
        "failed": _share([not call.ok for call in calls if call.valid]),
        "used": _share([_is_used(answer) for answer in given]),
        "rows_that_want_none": len(none),
        "needless": _share([bool(answer.calls) for answer in none]),
        "rows_that_want_some": len(some),
        "missed": _share([not answer.calls for answer, _ in some]),
        "matched": _share([same_calls(answer.calls, wanted) for answer, wanted in some]),
        "seconds_in_tools": seconds,
        "seconds_per_call": seconds / len(calls) if calls else None,
    }


def same_calls(calls: Sequence[Call], wanted: Sequence[dict[str, Any]]) -> bool:
    """Whether the valid calls are those that are wanted, each {"name", "arguments"}, in any order."""
    left = [call for call in calls if call.valid]
    if len(left) != len(calls) or len(calls) != len(wanted):
        return False
    for want in wanted:
        found = next((call for call in left if same_call(call.name, call.arguments, want)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _is_used(answer: Completion) -> bool:
    """Whether what a tool gave stands in a later call or in the answer."""
    for at, call in enumerate(answer.calls):
        later = [answer.text, *(str(after.arguments) for after in answer.calls[at + 1 :])]
        said = re.compile(rf"(?<![\w.]){re.escape(call.result.strip())}(?!\w|\.\d)")  # 2 is not in 24, nor in 2.5
        if call.ok and call.result.strip() and any(map(said.search, later)):
            return True
    return False


def _share(found: Sequence[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def _scores(side: Measurement, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Each metric over all rows and, where some want a call and others are not known to, over those that do."""
    rows: dict[str, Sequence[int]] = {"all": range(len(side.completions))}
    calling_ones = [row for row, wanted in enumerate(side.wanted) if wanted]
    if 0 < len(calling_ones) < len(side.completions):
        rows["that want a call"] = calling_ones
    lines = []
    for name, scores in side.metrics.items():
        for which, chosen in rows.items() if name in side.bare else ():
            within = SHARE if name in BUILT_IN else None
            bare, with_tools = ([values[row] for row in chosen] for values in (side.bare[name], scores))
            line = entry(name, bare, with_tools, config, higher_is_better=True, within=within)
            lines.append(
                {"name": name, "rows": which, "without": line.pop("before"), "with": line.pop("after"), **line}
            )
    return lines
