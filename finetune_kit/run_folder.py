"""A run's folder: which name it gets, and the record of settings and versions in it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_kit.config import RecipeConfig, to_yaml
from finetune_kit.errors import SettingsError

STACK = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "evaluate",
    "huggingface_hub",
)


def claim(config: RecipeConfig) -> Path:
    """Decide the run's folder and put it into config.train.output_dir; nothing is created yet.

    A folder that the user names must be free (SettingsError); the default runs/<recipe> goes on with -2, -3, …
    """
    if config.train.output_dir is not None:
        folder = Path(config.train.output_dir)
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            what = "holds another run" if (folder / "run.yaml").exists() else "is not empty"
            free = next(path for path in _numbered(folder) if not path.exists())
            raise SettingsError(
                f"train.output_dir={folder} {what}; nothing in it was touched.", f"Choose: output_dir={free}"
            )
        return folder
    folder = next(path for path in _numbered(Path("runs") / config.recipe) if not path.exists())
    config.train.output_dir = str(folder)
    return folder


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))


def begin(config: RecipeConfig, ledger: Any) -> Path:
    """Make the folder with what is known before training: run.yaml and ledger.json."""
    folder = Path(config.train.output_dir or "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(to_yaml(config, versions()), encoding="utf-8")
    (folder / "ledger.json").write_text(json.dumps(ledger.to_json(), indent=1, ensure_ascii=False), encoding="utf-8")
    return folder


def versions() -> dict[str, str]:
    """What ran: this package, Python and the libraries a result depends on."""
    names = {"finetune_kit": "finetune-kit", **{name: name for name in STACK}}
    found = {"python": platform.python_version()}
    for name, distribution in names.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
