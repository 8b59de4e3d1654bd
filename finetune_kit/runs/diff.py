"""What differs between two runs: settings with where each came from, data, versions, results. Read from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from finetune_kit.errors import SettingsError
from finetune_kit.models.folder import check_files
from finetune_kit.settings import values
from finetune_kit.system.parsing import read_object
from finetune_kit.system.terminal import Console

ABSENT = "absent"
PLACES = ("train.output_dir",)  # differs between any two runs


def difference(one: Path, other: Path) -> dict[str, Any]:
    """{settings, data, versions, results}, each a list of {name, a, b, …} of what is not the same in both runs.

    Settings have origin_a and origin_b; results are all metrics that either has, {before, after} on each side.
    Raises SettingsError where a folder is not a run's.
    """
    a, b = _read(one), _read(other)
    return {
        "a": str(one),
        "b": str(other),
        "settings": [
            {**line, "origin_a": _origin(a, line["name"]), "origin_b": _origin(b, line["name"])}
            for line in _differing(a["settings"], b["settings"])
        ],
        "data": _differing(a["data"], b["data"]),
        "versions": _differing(a["versions"], b["versions"]),
        "results": [
            {"name": name, "a": a["results"].get(name), "b": b["results"].get(name)}
            for name in dict.fromkeys([*a["results"], *b["results"]])
        ],
    }


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "run.yaml"
    if folder.is_dir():
        check_files(folder)
    if not path.is_file():
        raise SettingsError(
            f"{folder} is not a run's folder: it has no run.yaml.",
            "A run is made by: python -m finetune_kit run RECIPE",
        )
    record = values.load_file(path)
    versions, origins = (_object(record.pop(name, {}), path, name) for name in ("versions", "origins"))
    settings: dict[str, Any] = {}
    for name, value in record.items():
        inside = value if isinstance(value, dict) else {}
        settings |= {f"{name}.{leaf}": found for leaf, found in inside.items()} if inside else {name: value}
    ledger = _json(folder / "ledger.json")
    data = {"fingerprint": ledger.get("fingerprint")}
    for split in ("train", "held_out"):
        counts = _object(ledger.get(split, {}), folder / "ledger.json", split)
        data |= {f"{split} {name}": counts.get(name) for name in ("rows", "truncated", "tokens", "supervised_tokens")}
        dropped = _object(counts.get("dropped", {}), folder / "ledger.json", f"{split}.dropped").values()
        data[f"{split} dropped"] = sum(count for count in dropped if isinstance(count, int)) if counts else None
    metrics = _json(folder / "report.json").get("metrics", [])
    try:
        sides = ("before", "after")
        results = {str(metric["name"]): {side: float(metric[side]) for side in sides} for metric in metrics}
    except (TypeError, KeyError, ValueError):
        raise SettingsError(f"{folder / 'report.json'} is not a run's report: its metrics are not whole.") from None
    return {
        "settings": {name: value for name, value in settings.items() if name not in PLACES},
        "origins": origins,
        "data": data,
        "versions": versions,
        "results": results,
    }


def _object(value: Any, path: Path, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(
            f"{path} is not a run's: {name} is not an object.", "Download the file again, or remove it."
        )
    return value


def _json(path: Path) -> dict[str, Any]:
    """{} where a run has not come that far."""
    return read_object(path) if path.is_file() else {}


def _differing(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in dict.fromkeys([*a, *b]) if a.get(name, ABSENT) != b.get(name, ABSENT)]
    return [{"name": name, "a": a.get(name, ABSENT), "b": b.get(name, ABSENT)} for name in names]


def _origin(run: dict[str, dict[str, Any]], name: str) -> str:
    return str(run["origins"].get(name, "recipe"))


def print_difference(found: dict[str, Any], out: Console) -> None:
    """A table a part; a part in which nothing differs is said in a line."""
    for part, what in (("settings", "setting"), ("data", "count"), ("versions", "library")):
        lines = found[part]
        if not lines:
            out.print(f"{part}: the same")
            continue
        table = Table(what, found["a"], found["b"], box=None, pad_edge=False, header_style="bold", title_justify="left")
        for line in lines:
            sides = [_shown(line[side]) for side in ("a", "b")]
            if part == "settings":
                sides = [f"{text} ({line[f'origin_{side}']})" for text, side in zip(sides, "ab", strict=True)]
            table.add_row(line["name"], *sides)
        out.print(f"[bold]{part}[/]")
        Console(file=out.file, width=max(out.width, 160), highlight=False, markup=False).print(table)
    if found["results"]:
        out.print("[bold]results[/], before → after")
        table = Table("metric", found["a"], found["b"], box=None, pad_edge=False, header_style="bold")
        for line in found["results"]:
            table.add_row(line["name"], *(_movement(line[side]) for side in ("a", "b")))
        Console(file=out.file, width=max(out.width, 160), highlight=False, markup=False).print(table)
        same = all(line["a"] == line["b"] for line in found["results"])
        out.print("All results are equal." if same else "Not all results are equal.")


def _shown(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _movement(side: dict[str, Any] | None) -> str:
    return ABSENT if side is None else f"{side['before']:.4f} → {side['after']:.4f}"
