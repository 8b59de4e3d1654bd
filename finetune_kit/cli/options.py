"""What several commands share: their arguments, where they print, and how they read a recipe's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_kit import distributed
from finetune_kit import recipe as recipes
from finetune_kit.data.split import FEWEST
from finetune_kit.errors import NumericsError, SettingsError
from finetune_kit.run_folder.lineage import start_from_run
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import Console
from finetune_kit.system.versions import check_floors

out = Console(highlight=False, soft_wrap=True, quiet=not distributed.is_main())
RecipeWord = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in recipe, or a path to a .py or .yaml file.")
]
Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as learning_rate=1e-4.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Also show the traceback for user mistakes.")]


def read_settings(word: str, config_file: Path | None, words: list[str] | None) -> tuple[recipes.Recipe, RecipeConfig]:
    check_floors()
    recipe = recipes.load(word)
    if recipe.settings and config_file:
        raise SettingsError(f"{word} and --config {config_file} are both settings files.", "Give one of them.")
    settings = resolve(recipe.config_class, recipe.word, config_file or recipe.settings, words or [])
    start_from_run(settings)
    return recipe, settings


REQUIRE = "improved: exit 4 unless the result is better. safe: unless refusals got no worse. Repeatable."


def required(words: list[str] | None, settings: RecipeConfig) -> list[str]:
    """What --require asks for. Raises SettingsError for an unknown word, and where refusals will not be measured."""
    wanted = [part.strip() for word in words or [] for part in word.split(",")]
    for word in wanted:
        if word not in ("improved", "safe"):
            raise SettingsError(f"--require {word}: expected improved or safe.")
    measured = settings.evaluate
    if "safe" in wanted and (not measured.safety or measured.safety_size < 2 * FEWEST):
        found = f"evaluate.safety_size={measured.safety_size}" if measured.safety else "evaluate.safety is unset"
        raise SettingsError(
            f"--require safe needs {FEWEST} harmful and {FEWEST} harmless prompts; {found}.",
            f"Set evaluate.safety=xstest and evaluate.safety_size={2 * FEWEST} or more.",
        )
    return wanted


def check_required(wanted: list[str], report: Any, kept: str) -> None:
    """Raises NumericsError where a report does not show what --require asks for."""
    if "improved" in wanted and not report.improved:
        raise NumericsError(f"--require improved: {report.verdict}", kept)
    if "safe" in wanted and (why := report.unsafe()):
        raise NumericsError(f"--require safe: {why}.", kept)


def import_heavy() -> None:
    """The libraries that take seconds to import, so that the silence has a name."""
    import torch  # noqa: F401
    import transformers  # noqa: F401


RunFolder = Annotated[str, typer.Argument(metavar="DIR", help="A run's folder, or user/name of a pushed run.")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE.py", help="The run's recipe, if it is your own file."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The run's base, if it is elsewhere now: a folder or a Hub id."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a run on the Hub.")]
