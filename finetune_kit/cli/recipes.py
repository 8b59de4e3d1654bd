"""Commands on recipes: list, show, copy."""

from __future__ import annotations

import json
from pathlib import Path

from finetune_kit import recipe as recipes
from finetune_kit.cli.options import ConfigFile, Debug, RecipeWord, Words, out, read_settings
from finetune_kit.settings.schema import RecipeConfig, leaves
from finetune_kit.system.terminal import Console, doing


def list_recipes() -> None:
    """The built-in recipes, in reading order."""
    width = max(map(len, recipes.BUILTIN)) + 3
    for name in recipes.BUILTIN:
        out.print(f"[bold]{name:<{width}}[/]{recipes.summary(name)}")
    command = "python -m finetune_kit"
    out.print(f"\nRead one: {command} show RECIPE    try one: {command} run lora_sft", style="dim")


def show(word: RecipeWord, words: Words = None, config: ConfigFile = None, debug: Debug = False) -> None:
    """What a recipe does, and all its settings.

    Each setting has its value, unit, origin (the recipe, a file's line or the command line) and meaning.
    """
    recipe, settings = read_settings(word, config, words)
    out.print((recipe.module.__doc__ or "").strip(), markup=False)
    out.print(f"\nThe code: {recipe.path}\n", style="dim", markup=False)
    _print_settings(settings)
    if settings.lora is not None and Path(settings.model.name_or_path).expanduser().is_dir():
        from finetune_kit.models.shapes import coverage_of

        out.print(f"\nThe adapter on {settings.model.name_or_path}", style="dim", markup=False)
        with doing("counting what it covers"):
            lines = coverage_of(settings.model, settings.lora)
        for line in lines:
            out.print(line, markup=False)


def _print_settings(settings: RecipeConfig) -> None:
    """One line a setting, or two where the terminal is too narrow for that."""
    from rich.table import Table

    table = Table("setting", "value", "unit", "from", "meaning", box=None, pad_edge=False, header_style="bold")
    for leaf in leaves(settings):
        origin = settings.origins.get(leaf.key, "recipe")
        value = "unset" if leaf.value is None else json.dumps(leaf.value, ensure_ascii=False).strip('"')
        style = "" if origin == "recipe" else "bold"
        if out.is_terminal and out.width < 160:
            unit = f" {leaf.unit}" if leaf.unit else ""
            out.print(f"{leaf.key} = {value}{unit}  ({origin})", style=style, markup=False)
            out.print(f"    {leaf.help}", style="dim", markup=False)
        else:
            table.add_row(leaf.key, value, leaf.unit, origin, leaf.help, style=style)
    if table.row_count:
        Console(highlight=False, markup=False, width=None if out.is_terminal else 200).print(table)


def copy_recipe(word: RecipeWord, target: Path) -> None:
    """Copy a recipe to your own file.

    The copy runs unchanged.
    """
    path = recipes.copy(word, target)
    name = path if "/" in str(path) else f"./{path}"
    out.print(f"{word} is now yours in {path}. Run it: python -m finetune_kit run {name}", markup=False)
