"""The command line. Thin: each command finds its parts, calls them and says what came out; heavy imports inside."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from finetune_kit import recipe as recipes
from finetune_kit.config import RecipeConfig, leaves, resolve
from finetune_kit.errors import FinetuneKitError, NumericsError, SettingsError

app = typer.Typer(
    help="From a base model to an aligned one, with proof that it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)

RecipeWord = Annotated[str, typer.Argument(help="A built-in's name, or a path to a .py or .yaml file.")]
Words = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, such as learning_rate=1e-4.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a user's mistake, too.")]


def main() -> NoReturn:
    """Run the command line; a user's mistake ends with its message and exit code, a bug of ours with its traceback."""
    # names that transformers and TRL will rename one day, used by themselves: nothing that a user could mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\.")
    try:
        app(standalone_mode=False)
    except FinetuneKitError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        said = Console(stderr=True, highlight=False, soft_wrap=True)
        said.print("error: ", style="bold red", end="")
        said.print(error.message, markup=False)
        if error.fix:
            said.print(error.fix, markup=False)
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:  # click's own usage errors carry their message and code
        if not hasattr(error, "format_message"):
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error.format_message()}", markup=False)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(0)


def _read(word: str, config_file: Path | None, words: list[str] | None) -> tuple[recipes.Recipe, RecipeConfig]:
    recipe = recipes.load(word)
    if recipe.settings and config_file:
        raise SettingsError(f"{word} and --config {config_file} are both settings files.", "Give one of them.")
    return recipe, resolve(recipe.config_class, recipe.name, config_file or recipe.settings, words or [])


@app.command("list")
def list_recipes() -> None:
    """The built-in recipes, in reading order."""
    table = Table.grid(padding=(0, 3))
    for name in recipes.BUILTIN:
        table.add_row(f"[bold]{name}[/]", recipes.summary(name))
    out.print(table)
    out.print("\nRead one: finetune_kit show RECIPE    try one: finetune_kit run lora_sft", style="dim")


@app.command()
def show(word: RecipeWord, words: Words = None, config: ConfigFile = None, debug: Debug = False) -> None:
    """What a recipe does, and every setting with its value, origin, unit and meaning."""
    recipe, settings = _read(word, config, words)
    out.print((recipe.module.__doc__ or "").strip(), markup=False)
    out.print(f"\nThe code: {recipe.path}\n", style="dim")
    table = Table("setting", "value", "unit", "from", "meaning", box=None, pad_edge=False, header_style="bold")
    for leaf in leaves(settings):
        origin = settings.origins.get(leaf.key, "recipe")
        value = "unset" if leaf.value is None else json.dumps(leaf.value, ensure_ascii=False).strip('"')
        table.add_row(leaf.key, value, leaf.unit, origin, leaf.help, style=None if origin == "recipe" else "bold")
    Console(highlight=False, width=None if out.is_terminal else 200).print(table)


@app.command("copy")
def copy_recipe(word: RecipeWord, target: Path) -> None:
    """Copy a recipe to a file of yours, which runs unchanged."""
    path = recipes.copy(word, target)
    name = path if "/" in str(path) else f"./{path}"
    out.print(f"{word} is now yours in {path}. Run it: python -m finetune_kit run {name}")


@app.command()
def check(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Train two steps to measure the time of one.")] = False,
    debug: Debug = False,
) -> None:
    """Read the data and plan the run: counts, trained tokens, memory, steps. Nothing is trained."""
    recipe, settings = _read(word, config, words)
    from finetune_kit.data.load import load_data
    from finetune_kit.data.preview import preview_json, print_preview
    from finetune_kit.model.load import load_tokenizer
    from finetune_kit.training.plan import plan

    tokenizer = load_tokenizer(settings.model)
    data = load_data(settings.data, "prompt_completion", tokenizer, seed=settings.train.seed)
    planned = plan(settings, data)
    if measure:
        from finetune_kit.training.trial import measure_step

        planned["measured"] = measure_step(recipe, settings)
    if as_json:
        print(json.dumps({**preview_json(data, tokenizer), "plan": planned}, ensure_ascii=False, indent=1))
        return
    print_preview(data, tokenizer, out)
    _print_plan(settings, planned)


def _print_plan(settings: RecipeConfig, planned: dict[str, Any]) -> None:
    out.print("\n[bold]The run[/]")
    table = Table.grid(padding=(0, 2))
    table.add_row("model", settings.model.name_or_path)
    share = planned["trainable_parameters"] / planned["parameters"]
    table.add_row(
        "trained", f"{planned['trainable_parameters']:,} of {planned['parameters']:,} parameters ({share:.1%})"
    )
    if planned["target_modules"]:
        table.add_row("adapted", ", ".join(f"{name}: {count}" for name, count in planned["target_modules"].items()))
    table.add_row("steps", f"{planned['steps']:,} of {planned['rows_in_a_step']} rows")
    sizes = planned["memory_bytes"]
    parts = ", ".join(f"{name.replace('_', ' ')} {_size(size)}" for name, size in sizes.items())
    table.add_row("memory", f"about {_size(sum(sizes.values()))}: {parts} (activations are an estimate)")
    if "measured" in planned:
        measured = planned["measured"]
        seconds = measured["seconds_a_step"]
        table.add_row("measured", f"{seconds:.2f} s a step, so {seconds * planned['steps'] / 60:.1f} min of training; ")
        table.add_row("", f"peak memory {measured['peak_memory_gib']:.2f} GiB")
    out.print(table)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


@app.command()
def run(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    require: Annotated[
        str | None, typer.Option("--require", help="improved: exit 4 unless the result is better.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train, and report what it changed on held-out rows."""
    if require not in (None, "improved"):
        raise SettingsError(f"--require {require}: expected improved.")
    recipe, settings = _read(word, config, words)
    from finetune_kit.run_folder import claim

    folder = claim(settings)
    out.print(f"{recipe.name} of {settings.model.name_or_path} on {settings.data.path}, into {folder}", style="bold")
    artifact = recipe.run(settings)
    from finetune_kit.evaluation.report import print_report

    print_report(artifact.report, out)
    out.print(f"\nThe run is in {folder}: report.html has the curves and all samples.")
    out.print(f'Next: python -m finetune_kit generate {folder} "…"    python -m finetune_kit evaluate {folder}')
    if require == "improved" and not artifact.report.improved:
        raise NumericsError(f"--require improved: {artifact.report.verdict}", f"The run is kept in {folder}.")


@app.command()
def evaluate(
    folder: Path,
    words: Words = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as data.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a finished run again, on its own held-out rows or on other data: data.path=…, evaluate.size=…"""
    from finetune_kit.finished import compare_run, open_run

    report = compare_run(open_run(folder, words or []))
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
        return
    from finetune_kit.evaluation.report import print_report

    print_report(report, out)


@app.command()
def generate(
    folder: Path,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 256,
    debug: Debug = False,
) -> None:
    """Answer a prompt with the model of a finished run, greedily."""
    from finetune_kit.finished import answer, open_run

    completion = answer(open_run(folder, []), prompt, max_new_tokens)
    out.print(completion.text, markup=False)
    if not completion.ended:
        Console(stderr=True).print(f"(cut off after {max_new_tokens} tokens: --max-new-tokens)", style="dim")


@app.command()
def doctor(debug: Debug = False) -> None:
    """Versions, known-bad combinations, devices, and one tiny run from end to end."""
    from finetune_kit.doctor import examine

    if not examine(out):
        raise typer.Exit(5)
