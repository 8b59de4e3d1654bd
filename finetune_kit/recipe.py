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
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import ResourceError, SecurityError, SettingsError
from finetune_kit.run_folder.claim import claim
from finetune_kit.run_folder.lineage import start_from_run
from finetune_kit.run_folder.lock import is_claimed
from finetune_kit.settings.aliases import RECIPES, near_path
from finetune_kit.settings.checks import check, check_code
from finetune_kit.settings.load import recipe_of_yaml
from finetune_kit.settings.schema import RecipeConfig

LIST = "python -m finetune_kit list"
BUILTIN = (
    "pretrain",
    "full_sft",
    "lora_sft",
    "qlora_sft",
    "reward_model",
    "dpo",
    "kto",
    "orpo",
    "ppo",
    "grpo",
    "rloo",
)  # in reading order; each is recipes/<name>.py


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe module.

    `name` is for people and the run's folder, `word` finds it again from anywhere: a built-in's name, or an absolute
    path. `settings` is the YAML it was named by, if any.
    """

    name: str
    word: str
    path: Path
    module: ModuleType
    settings: Path | None = None

    @property
    def config_class(self) -> type[RecipeConfig]:
        return self.module.Config  # type: ignore[no-any-return]  # checked by load

    def run(self, config: RecipeConfig) -> Any:
        """The recipe's artifact. Settings that cannot be are refused before anything is read, and a folder is claimed
        where none was. A recipe that exits ends in SettingsError: no run is over without its report."""
        check(config)
        check_code(config)
        config.check_itself()
        start_from_run(config)
        if not distributed.from_main(lambda: is_claimed(config)):  # which alone holds the folder
            claim(config)
        try:
            return self.module.run(config)
        except SystemExit as error:
            raise _exited(self.path, error) from error


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
        if named.endswith((".yaml", ".yml")):
            raise SettingsError(f"{word}: 'recipe: {named}' is a settings file; expected a recipe.", f"See: {LIST}")
        if "/" in named or "\\" in named or named.startswith("~") or named.endswith(".py"):
            raise SecurityError(
                f"{word} names the recipe {named}, which would be run as code; a settings file names built-ins alone.",
                f"If you have read it, name it yourself: python -m finetune_kit run FILE.py --config {word}",
            )
        return find(named)[0], settings
    if "/" in word or word.endswith(".py"):
        path = Path(word)
        if not path.is_file():
            target = word if word.endswith(".py") else "mine.py"
            raise SettingsError(
                f"{word}: no such recipe file.",
                f"{near_path(word)}Start from a built-in: python -m finetune_kit copy lora_sft {target}",
            )
        return path, None
    if word in BUILTIN:
        return folder() / f"{word}.py", None
    near = [RECIPES[word.lower()]] if word.lower() in RECIPES else []
    near = near or difflib.get_close_matches(word.replace("-", "_"), BUILTIN, n=1, cutoff=0.4)
    if word.lower().endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")):
        raise SettingsError(
            f"'{word}' is not a recipe; it looks like rows.", f"python -m finetune_kit run lora_sft data.path={word}"
        )
    hint = f"Did you mean {near[0]}? " if near else ""
    own = f" A file of your own is written with its folder: ./{word}.py" if Path(f"{word}.py").is_file() else ""
    raise SettingsError(f"'{word}' is not a recipe: {', '.join(BUILTIN)}.", f"{hint}See: {LIST}.{own}")


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
        raise SettingsError(f"{error.filename or path}:{error.lineno}: {error.msg}.") from None
    except SystemExit as error:
        raise _exited(path, error) from error
    needed = {
        "a docstring": bool(module.__doc__),
        "a Config derived from finetune_kit.settings.schema.RecipeConfig": _is_config(getattr(module, "Config", None)),
        "a function run(config)": callable(getattr(module, "run", None)),
    }
    missing = [what for what, found in needed.items() if not found]
    if missing:
        raise SettingsError(f"{path}: a recipe needs {' and '.join(missing)}.", "See docs/add_a_method.md")
    word = path.stem if path.resolve().parent == folder() else str(path.resolve())
    return Recipe(path.stem, word, path, module, settings)


def _exited(path: Path, error: SystemExit) -> SettingsError:
    """A recipe's exit as an error, with the line that called it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f":{frames[-1].lineno}" if frames else ""
    return SettingsError(
        f"{path}{line}: the recipe called sys.exit({error.code!r}), so there is no artifact and no report.",
        "Let run(config) return what save(…) gives it; raise an error for what cannot be.",
    )


def _is_config(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, RecipeConfig)


def copy(word: str, target: Path) -> Path:
    """Copy a recipe's file to `target`, which must not exist."""
    source, _ = find(word)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise SettingsError(f"{target} exists already.", "Choose another name.")
    if target.suffix != ".py":
        raise SettingsError(
            f"{target}: a recipe is a Python file.", f"python -m finetune_kit copy {word} {target.with_suffix('.py')}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise ResourceError(f"{target} cannot be written: {error.strerror}.") from None
    return target


def summary(name: str) -> str:
    """The first line of a built-in's docstring, read without running the file."""
    tree = ast.parse((folder() / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").split("\n")[0]
