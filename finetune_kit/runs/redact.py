"""Settings as others may see them: without this machine's folders."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.models.source import public_name
from finetune_kit.settings.schema import RecipeConfig, leaves

if TYPE_CHECKING:
    pass


def without_paths(config: RecipeConfig) -> RecipeConfig:
    """The same settings as a stranger may see them: local files and folders by their names alone."""
    shown = copy.deepcopy(config)
    for leaf in leaves(shown):
        section, _, name = leaf.key.rpartition(".")
        setattr(getattr(shown, section) if section else shown, name, _without_folders(leaf.value))
    shown.model.name_or_path = public_name(config.model.name_or_path)
    paths = config.data.path
    shown.data.path = _file_name(paths) if isinstance(paths, str) else [_file_name(path) for path in paths]
    shown.data.held_out_path = config.data.held_out_path and _file_name(config.data.held_out_path)
    lora = getattr(shown, "lora", None)
    if lora is not None and lora.init_from:
        lora.init_from = public_name(lora.init_from)
    shown.train.output_dir, shown.recipe_word = None, config.recipe
    shown.origins = {key: origin.rsplit("/", 1)[-1] for key, origin in config.origins.items()}
    return shown


def _without_folders(value: Any) -> Any:
    """A setting's value with every file and folder that is there by its name alone."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str) and "/" in value and is_here(re.sub(r"\.py:\w+$", ".py", value)):  # a function in a file
        return Path(value).name or value
    return value


def is_here(path: str) -> bool:
    """Whether a text is the path of a file or folder on this machine."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # no path at all: too long, or of a user that is not known
        return False


def _file_name(path: str) -> str:
    local = Path(path).expanduser()
    return local.name if local.exists() else path
