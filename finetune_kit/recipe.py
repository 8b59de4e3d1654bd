"""Find a recipe by name or path, and load it.

A bare word is a built-in; anything with `/`, `.py` or `.yaml` is a path. Built-ins and a user's own file go through the
same loader, so `finetune_kit copy lora_sft mine.py` gives a file that runs unchanged.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_kit.config import RecipeConfig, recipe_of_yaml
from finetune_kit.errors import SettingsError

BUILTIN = ("full_sft", "lora_sft")  # in reading order; each is recipes/<name>.py


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe module: `name` for messages and the run's folder, `settings` the YAML it was named by, if any."""

    name: str
    path: Path
    module: ModuleType
    settings: Path | None = None

    @property
    def config_class(self) -> type[RecipeConfig]:
        return self.module.Config  # type: ignore[no-any-return]  # checked by load

    def run(self, config: RecipeConfig) -> Any:
        return self.module.run(config)


def folder() -> Path:
    """Where the built-in recipes lie: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find(word: str) -> tuple[Path, Path | None]:
    """(recipe file, YAML with its settings or None) that a word on the command line means."""
    if word.endswith((".yaml", ".yml")):
        settings = Path(word)
        named = recipe_of_yaml(settings)
        # a path in a YAML file is relative to that file
        return find(str(settings.parent / named) if "/" in named or named.endswith(".py") else named)[0], settings
    if "/" in word or word.endswith(".py"):
        path = Path(word)
        if not path.is_file():
            raise SettingsError(
                f"{word}: no such recipe file.", "Start from a built-in: finetune_kit copy lora_sft " + word
            )
        return path, None
    if word in BUILTIN:
        return folder() / f"{word}.py", None
    near = difflib.get_close_matches(word, BUILTIN, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]}? " if near else ""
    own = f" A file of your own is written with its folder: ./{word}.py" if Path(f"{word}.py").is_file() else ""
    raise SettingsError(f"'{word}' is not a recipe: {', '.join(BUILTIN)}.", f"{hint}See: finetune_kit list.{own}")


def load(word: str) -> Recipe:
    """The recipe a word means. Raises SettingsError for a file without docstring, Config or run."""
    path, settings = find(word)
    spec = importlib.util.spec_from_file_location(f"finetune_kit_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SettingsError(f"{path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise SettingsError(f"{path}:{error.lineno}: {error.msg}.") from None
    missing = [name for name in ("Config", "run") if not hasattr(module, name)] + (
        [] if module.__doc__ else ["docstring"]
    )
    if missing or not issubclass(module.Config, RecipeConfig):
        what = ", ".join(missing) or "a Config derived from finetune_kit.config.RecipeConfig"
        raise SettingsError(f"{path}: a recipe needs {what}.", "See docs/add_a_method.md")
    return Recipe(path.stem, path, module, settings)


def copy(word: str, target: Path) -> Path:
    """Copy a recipe's file to `target`, which must not exist."""
    source, _ = find(word)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SettingsError(f"{target} exists already.", "Choose another name.")
    if target.suffix != ".py":
        raise SettingsError(f"{target}: a recipe is a Python file.", f"finetune_kit copy {word} {target}.py")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def summary(name: str) -> str:
    """The first line of a built-in's docstring, read without running the file."""
    tree = ast.parse((folder() / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").split("\n")[0]
