"""A run that starts from another one: what it starts with, and the whole line that it comes from."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.settings import values
from finetune_kit.settings.schema import ModelConfig, RecipeConfig
from finetune_kit.system import parsing

ANCESTRY = "ancestry.json"  # in a run's folder: one entry a run, the oldest first
INHERITED = ("name_or_path", "revision", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


def start_from_run(config: RecipeConfig) -> None:
    """Let model.name_or_path name a finished run of an adapter: the run's base is loaded, and training resumes from
    its adapter (lora.init_from). A folder with a whole model needs nothing.

    Raises SettingsError for an adapter that no run of ours made, and where the recipe trains no adapter.
    """
    named = config.model.name_or_path
    folder = Path(named).expanduser()
    ancestors(config)  # the result's card will need them
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    if not (folder / "run.yaml").is_file():
        raise SettingsError(
            f"model.name_or_path={named} is an adapter without its run.yaml, so its base is not known.",
            f"Name both: model.name_or_path=BASE lora.init_from={named}",
        )
    lora = config.lora
    if lora is None or lora.r == 0:
        raise SettingsError(
            f"model.name_or_path={named} is an adapter, and {config.recipe} trains all weights here.",
            f"Make a model of it: python -m finetune_kit merge {named} merged   and take model.name_or_path=merged",
        )
    if lora.init_from:
        raise SettingsError(f"model.name_or_path={named} and lora.init_from are both adapters.", "Give one of them.")
    base = model_of(folder / "run.yaml")
    for name in INHERITED:
        if f"model.{name}" not in config.origins or name == "name_or_path":
            setattr(config.model, name, base[name])
            config.origins[f"model.{name}"] = f"{folder / 'run.yaml'}"
    lora.init_from = str(folder)
    config.origins["lora.init_from"] = "model.name_or_path"


def model_of(path: Path) -> dict[str, Any]:
    """The model section of a run.yaml; what it lacks is as in ModelConfig."""
    root = values.read_file(path)
    sections = {name: node for name, node, _ in values.pairs(root, str(path))} if root else {}
    given = values.pairs(sections["model"], str(path)) if "model" in sections else ()
    hints, found = typing.get_type_hints(ModelConfig), dataclasses.asdict(ModelConfig())
    for name, node, line in given:
        if name in hints:
            found[name] = values.coerce(node, hints[name], f"{path}:{line}")
    return found


def ancestors(config: RecipeConfig) -> list[dict[str, Any]]:
    """The entries of the run that this one started from, the oldest first; none where that was no run of ours."""
    lora = config.lora
    folder = Path((lora.init_from if lora else None) or config.model.name_or_path).expanduser()
    if not (folder / ANCESTRY).exists():
        return []
    entries = parsing.read(folder / ANCESTRY)
    keys = ("recipe", "start", "data", "fingerprint", "verdict")
    whole = isinstance(entries, list) and all(
        isinstance(one, dict)
        and one.keys() >= set(keys)
        and isinstance(one["fingerprint"], str)
        and isinstance(one["data"], list)
        and all(isinstance(name, str) for name in one["data"])
        for one in entries
    )
    if not whole:
        raise SettingsError(f"{folder / ANCESTRY} is not a list of runs.", "Remove the file: it is told, not used.")
    return list(entries)


def as_text(entries: Sequence[dict[str, Any]]) -> list[str]:
    """One numbered line of Markdown a run."""
    return [
        f"{number}. {entry['recipe']} of {entry['start']} on {', '.join(entry['data'])} "
        f"(fingerprint {entry['fingerprint'][:16]}): {entry['verdict']}"
        for number, entry in enumerate(entries, start=1)
    ]
