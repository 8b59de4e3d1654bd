"""Versions below which a library runs a stranger's code or corrupts memory: looked at before anything is loaded."""

from __future__ import annotations

import re
from importlib import metadata

from finetune_kit.errors import SecurityError

# library: (lowest safe version, what an older one does). pyproject.toml demands these or higher ones.
FLOORS = {
    "torch": ((2, 10), "reading a checkpoint corrupts memory, CVE-2026-24747"),
    "transformers": ((5, 3), "a model's config.json runs code, CVE-2026-4372"),
    "datasets": ((5, 2), "a data set runs code, CVE-2026-57845"),
    "accelerate": ((1, 15), "a model's index reads outside its folder, CVE-2026-69112"),
    "jinja2": ((3, 1, 6), "a chat template leaves its sandbox, CVE-2025-27516"),
}


def reason(library: str) -> str:
    """Why a version below the floor is not safe; "" for a library without one."""
    if library not in FLOORS:
        return ""
    floor, what = FLOORS[library]
    return f"below {'.'.join(map(str, floor))} {what}"


def check_floors() -> None:
    """Raises SecurityError where an installed library is older than its floor. From metadata: nothing is imported."""
    for library, (floor, _) in FLOORS.items():
        try:
            number = metadata.version(library)
        except metadata.PackageNotFoundError:  # its import says so
            continue
        if tuple(map(int, re.findall(r"\d+", number)[: len(floor)])) < floor:
            raise SecurityError(
                f"{library} {number} is not safe to use: {reason(library)}.",
                f"Run: pip install '{library}>={'.'.join(map(str, floor))}'   and then: python -m finetune_kit doctor",
            )
