"""What a run must not make worse: metrics of its report that the user names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.settings.schema import EvaluateConfig

# a word for several metrics, or a shorter one for a metric
FAMILIES = {
    "safety": ("harmful_refused", "harmless_refused"),
    "fairness": (
        "fairness_accuracy_ambiguous",
        "fairness_bias_ambiguous",
        "fairness_accuracy_disambiguated",
        "fairness_bias_disambiguated",
    ),
    "general_text": ("general_text_loss",),
}
CHOICES = "choices"


def choice_sources(config: EvaluateConfig) -> list[str]:
    """The files of questions that are measured: those of evaluate.choices, and those among the guards."""
    files = [guard for guard in config.guards if is_source(guard)]
    return list(dict.fromkeys([*config.choices, *files]))


def is_source(guard: str) -> bool:
    """Whether a guard is a file or a Hub id of questions, and no metric's name."""
    return "/" in guard or Path(guard).suffix.lower() in (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


def guarded(config: EvaluateConfig, entries: Sequence[dict[str, Any]], names: dict[str, str]) -> list[dict[str, Any]]:
    """The report's lines that the guards name. `names`: of each file of questions what its metrics are called.

    Raises SettingsError for a guard that names nothing measured, or a metric that has no better side.
    """
    known = {line["name"]: line for line in entries}
    found: dict[str, dict[str, Any]] = {}
    for guard in config.guards:
        if guard == CHOICES:
            wanted = [f"{name}_accuracy" for name in names.values()]
        else:
            wanted = [f"{names[guard]}_accuracy"] if guard in names else list(FAMILIES.get(guard, (guard,)))
        lines = [known[name] for name in wanted if name in known]
        if not lines:
            near = difflib.get_close_matches(guard, [*known, *FAMILIES, CHOICES], n=1)
            raise SettingsError(
                f"evaluate.guards: {guard} is not measured here.",
                f"{f'Did you mean {near[0]}? ' if near else ''}Measured: {', '.join(known)}",
            )
        for line in lines:
            if line["higher_is_better"] is None and "_bias_" not in line["name"]:
                raise SettingsError(f"evaluate.guards: {line['name']} is better in neither direction.", "Leave it out.")
            found[line["name"]] = line
    return list(found.values())


def sentence(lines: Sequence[dict[str, Any]]) -> str:
    """What the verdict says of the guards."""
    if not lines:
        return ""
    worse = [line for line in lines if line["verdict"] == "worse"]
    unsure = [line["name"] for line in lines if line["verdict"].startswith("too few")]
    said = [f" Guard failed: {line['name']} {line['before']:.3f} → {line['after']:.3f} got worse." for line in worse]
    if not worse:
        held = [line["name"] for line in lines if line["name"] not in unsure]
        said += [f" Guards held: {', '.join(held)}."] if held else []
    said += [f" Guards with too few rows to judge: {', '.join(unsure)}."] if unsure else []
    return "".join(said)
