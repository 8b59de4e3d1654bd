"""What makes a run the one that it is: settings, stamps of what it reads, versions; and what has changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.run_folder.naming import FREE, IDENTITY, is_unfinished, next_free
from finetune_kit.settings.schema import RecipeConfig, leaves
from finetune_kit.system.parsing import read_object

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
# what else must be the same, and its name for people
STAMPS = {
    "data": "other data: fingerprint",
    "model": "another model:",
    "tokenizer": "another tokenizer:",
    "files": "other files that the settings name:",
    "processes": "another number of processes:",
}


def settings_of(config: RecipeConfig) -> dict[str, Any]:
    """The settings that a run's result depends on, by dotted key, as JSON gives them back."""
    kept = {leaf.key: leaf.value for leaf in leaves(config) if leaf.key not in FREE and not leaf.key.startswith("hub.")}
    known: dict[str, Any] = json.loads(json.dumps({"recipe": config.recipe_word, **kept}))
    return known


def read_identity(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with: settings, versions, and hashes of data, model and tokenizer."""
    fix = f"It is not a run that can continue. Begin another: output_dir={next_free(folder)}"
    known = read_object(folder / IDENTITY, SettingsError, fix)
    if missing := [name for name in ("settings", "versions") if not isinstance(known.get(name), dict)]:
        raise SettingsError(f"{folder / IDENTITY} has no {' and no '.join(missing)}.", fix)
    return known


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys that differ, in order."""
    return [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]


def new_versions(folder: Path) -> list[str]:
    """What is not as it was when the unfinished run in a folder began: "torch 2.12.0 → 2.13.0"; [] where none runs."""
    if not is_unfinished(folder):
        return []
    known = read_identity(folder)
    then, now = known.get("began_with", known["versions"]), versions()
    return [f"{name} {then.get(name)} → {now.get(name)}" for name in changed(then, now)]


def difference_of(then: Any, now: Any) -> str:
    """Two values of a stamp for people; of files those that differ, by the setting that names them."""
    if isinstance(then, dict) and isinstance(now, dict) and (keys := changed(then, now)) and "weights" not in now:
        return ", ".join(f"{key} {short_text(then.get(key))} → {short_text(now.get(key))}" for key in keys)
    return f"{short_text(then)} → {short_text(now)}"


def short_text(value: Any) -> str:
    """A value for people: hashes and long ones cut."""
    if isinstance(value, dict):
        value = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    text = json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 60 else f"{text[:12]}…"


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
