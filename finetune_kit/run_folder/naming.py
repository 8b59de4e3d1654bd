"""Names of run folders: which are free, and which hold an unfinished run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

IDENTITY = "identity.json"  # in a run's folder: what a run that continues there must have in common with it
# settings that leave what is trained as it is
FREE = (
    "train.output_dir",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "evaluate.bootstrap_samples",
    "reward.timeout",
)


def is_unfinished(folder: Path) -> bool:
    """Whether a run was begun there and has not come to its report, which is written last."""
    return (folder / IDENTITY).is_file() and not (folder / "report.json").is_file()


def numbered(folder: Path, itself_first: bool) -> list[Path]:
    """A folder and its -2, -3, … that are there, the newest first."""
    later = [path for path in folder.parent.glob(f"{folder.name}-*") if path.name.rpartition("-")[2].isdigit()]
    later = sorted(later, key=lambda path: -int(path.name.rpartition("-")[2]))
    later = [path for path in later if path.name.rpartition("-")[0] == folder.name]
    return [folder, *later] if itself_first else [*later, folder]


def next_free(folder: Path) -> Path:
    return next(free_names(folder))


def free_names(folder: Path) -> Iterator[Path]:
    """The folder, and its -2, -3, …, as far as nothing has these names."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return (path for path in itertools.chain([folder], names) if not path.exists())
