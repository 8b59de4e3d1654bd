"""A run's folder: which name it gets, and the record of settings and versions in it."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
from pathlib import Path
from typing import Any

from finetune_kit import processes
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

    A folder that the user names must be free and writable (SettingsError). The default runs/<recipe>, and that of a
    run.yaml which is run again, go on with -2, -3, …
    """
    config.train.output_dir = str(processes.from_main(lambda: _choose(config)))
    return Path(config.train.output_dir)


def _choose(config: RecipeConfig) -> Path:
    given = config.train.output_dir
    folder = Path("runs") / config.recipe if given is None else Path(given)
    if given is None or _is_run_again(config, folder):
        folder = _next_free(folder)
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "holds another run" if (folder / "run.yaml").exists() else "is not empty"
        fix = f"Choose: output_dir={_next_free(folder)}"
        raise SettingsError(f"train.output_dir={folder} {what}; nothing in it was touched.", fix)
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SettingsError(f"train.output_dir={folder} cannot be made: {above} is no folder that can be written to.")
    return folder


def _is_run_again(config: RecipeConfig, folder: Path) -> bool:
    """Whether the folder's name comes from the run.yaml in it."""
    file = Path(config.origins.get("train.output_dir", "").rpartition(":")[0])
    return file.name == "run.yaml" and file.resolve().parent == folder.resolve()


def _next_free(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return folder if not folder.exists() else next(path for path in names if not path.exists())


def begin(config: RecipeConfig, ledger: Any) -> Path:
    """Make the folder with what is known before training: run.yaml and ledger.json."""
    folder = Path(config.train.output_dir or "")
    if not processes.is_main():
        return folder
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
