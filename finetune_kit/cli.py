"""The command line. Thin: each command finds its parts, calls them and says what came out; heavy imports inside."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from finetune_kit import processes, signals, streams
from finetune_kit import recipe as recipes
from finetune_kit.ancestry import start_from_run
from finetune_kit.config import RecipeConfig, check_code, full_key, leaves, resolve
from finetune_kit.errors import FinetuneKitError, NumericsError, ResourceError, SettingsError, Stopped
from finetune_kit.floors import check_floors
from finetune_kit.names import COMMANDS, KNOWN_ELSEWHERE
from finetune_kit.terminal import Console, as_json, doing, escaped, guard

app = typer.Typer(
    help="From a base model to an aligned one, with proof that it got better.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's own takes a tenth of a second to import
)
out = Console(highlight=False, soft_wrap=True, quiet=not processes.is_main())

RecipeWord = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in's name, or a path to a .py or .yaml file.")
]
Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings, such as learning_rate=1e-4.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="A YAML file with settings.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a user's mistake, too.")]


def main() -> NoReturn:
    """Run the command line; a user's mistake ends with its message and exit code, a bug of ours with its traceback.

    A signal ends it as that, whatever a library made of it on the way.
    """
    # names that transformers and TRL will rename one day, used by themselves: nothing that a user could mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\.")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a package that is not needed
    guard()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO stands there; the pinned release has what is used
    os.environ.setdefault("TQDM_DISABLE", "1")  # training/progress.py says how far a run is
    streams.spell_out()
    signals.started()
    try:
        try:
            # without standalone mode a typer.Exit comes back as its code, and a command's end as None
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            streams.check_written()
        except BaseException as error:
            if not signals.came or isinstance(error, Stopped):
                raise
            raise _stopped() from error
        if signals.came:
            raise _stopped()
        sys.exit(code)
    except FinetuneKitError as error:
        if processes.fails_first(error.exit_code):
            if "--debug" in sys.argv:
                traceback.print_exc()
            _say_error(error.message, error.fix, "stopped" if isinstance(error, Stopped) else "error")
        sys.exit(error.exit_code)
    except Exception as error:  # typer's own usage errors carry their message and code
        if not processes.fails_first(1):
            sys.exit(1)
        if isinstance(error, typer.Abort):
            _say_error("Nothing was answered.", "")
            sys.exit(1)
        if not hasattr(error, "format_message"):
            raise
        _say_error(error.format_message(), _meant(sys.argv[1:]))
        sys.exit(getattr(error, "exit_code", 2))
    except BaseException as error:
        # tokenizers' own; it is no Exception. Its library ends a search that would take forever by such a panic
        if type(error).__name__ != "PanicException":
            raise
        if processes.fails_first(SettingsError.exit_code):
            said = " ".join(str(error).split())[:200]
            _say_error(f"The tokenizer gave up on a text: {said}", "Take a tokenizer whose patterns end on any text.")
        sys.exit(SettingsError.exit_code)
    finally:
        signals.started(False)  # nothing is left to tidy up


def _stopped() -> Stopped:
    """The error of a command that a signal ended, where nothing that knows more has said so."""
    error = Stopped(f"by {signals.came[0]}", "Run the same command again." if signals.is_resumable() else "")
    error.exit_code = signals.exit_code()
    return error


def _meant(words: list[str]) -> str:
    """What a command line may have meant that typer cannot read: another tool's command or option."""
    command = "python -m finetune_kit"
    known = {item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands}
    first = words[0] if words else ""
    if first and not first.startswith("-") and first not in known:
        rest = " ".join(words[1:])
        if first in recipes.BUILTIN or first.endswith((".py", ".yaml", ".yml")):
            return f"{command} run {first} {rest}".rstrip()
        near = COMMANDS.get(first.lower()) or next(iter(difflib.get_close_matches(first, known, n=1)), "")
        if near:
            return f"Did you mean {near}? {command} {near} {rest or '…'}"
    if first in ("run", "check", "show"):
        for at, word in enumerate(words):
            if word.startswith("--") and word.split("=")[0] not in ("--config", "--json", "--debug"):
                name, _, value = word[2:].partition("=")
                value = value or next(iter(words[at + 1 : at + 2]), "…")
                key = "model.name_or_path" if name == "model" else name.replace("-", "_")
                key = KNOWN_ELSEWHERE.get(key, key)
                return f"Settings are written key=value, such as {key}={value}. See: {command} show lora_sft"
    return f"Settings are written key=value. See: {command} --help"


def _say_error(message: str, fix: str, what: str = "error") -> None:
    said = Console(stderr=True, highlight=False, soft_wrap=True)
    said.print(f"{what}: ", style="bold red", end="")
    said.print(message, markup=False)
    if fix:
        said.print(fix, markup=False)


def _read(word: str, config_file: Path | None, words: list[str] | None) -> tuple[recipes.Recipe, RecipeConfig]:
    check_floors()
    recipe = recipes.load(word)
    if recipe.settings and config_file:
        raise SettingsError(f"{word} and --config {config_file} are both settings files.", "Give one of them.")
    settings = resolve(recipe.config_class, recipe.word, config_file or recipe.settings, words or [])
    start_from_run(settings)
    return recipe, settings


def _import_heavy() -> None:
    """The libraries that take seconds to import, so that the silence has a name."""
    import torch  # noqa: F401
    import transformers  # noqa: F401


@app.command("list")
def list_recipes() -> None:
    """The built-in recipes, in reading order."""
    width = max(map(len, recipes.BUILTIN)) + 3
    for name in recipes.BUILTIN:
        out.print(f"[bold]{name:<{width}}[/]{recipes.summary(name)}")
    command = "python -m finetune_kit"
    out.print(f"\nRead one: {command} show RECIPE    try one: {command} run lora_sft", style="dim")


@app.command()
def show(word: RecipeWord, words: Words = None, config: ConfigFile = None, debug: Debug = False) -> None:
    """What a recipe does, and all its settings.

    Each with its value, unit, origin (the recipe, a file's line or the command line) and meaning.
    """
    recipe, settings = _read(word, config, words)
    out.print((recipe.module.__doc__ or "").strip(), markup=False)
    out.print(f"\nThe code: {recipe.path}\n", style="dim", markup=False)
    _print_settings(settings)
    if hasattr(settings, "lora") and Path(settings.model.name_or_path).expanduser().is_dir():
        from finetune_kit.model.load import coverage_of

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


@app.command("copy")
def copy_recipe(word: RecipeWord, target: Path) -> None:
    """Copy a recipe to a file of yours.

    It runs unchanged.
    """
    path = recipes.copy(word, target)
    name = path if "/" in str(path) else f"./{path}"
    out.print(f"{word} is now yours in {path}. Run it: python -m finetune_kit run {name}", markup=False)


@app.command()
def check(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    json_: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Train two steps to measure the time of one.")] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", help="What there is, such as 24GiB: exit 5 and say what fits instead.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many will share the run, each with that memory.")] = 1,
    on: Annotated[
        str | None, typer.Option("--device", help="Plan for cuda, cpu or mps; unset: what this machine has.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Plan a run: data, masks, memory, steps.

    Reads the data, shows what is trained in them, and counts. Nothing is trained.
    """
    if on not in (None, "cuda", "cpu", "mps"):
        raise SettingsError(f"--device {on}: expected cuda, cpu or mps.")
    with doing("starting"):
        recipe, settings = _read(word, config, words)
        check_code(settings)
        _import_heavy()
        from finetune_kit.data.load import load_data
        from finetune_kit.data.preview import preview_json, print_preview
        from finetune_kit.model.load import device, planning_for
        from finetune_kit.training import budget
        from finetune_kit.training.plan import command_on_devices, does_not_fit, plan, print_plan, print_ways_on_devices
        from finetune_kit.training.plan import tokenizer_to_count_with as count_with
        from finetune_kit.training.start import check_start

        here = device().type
        check_start(settings, elsewhere=on not in (None, here))
    room = budget.read_size(memory) if memory is not None else None
    if measure and on not in (None, here):
        raise SettingsError(f"--measure trains two steps here, on {here}, not on {on}.", "Leave one of them out.")
    tokenizer, assumed = count_with(settings.model, weights=measure)
    given = (config or recipe.settings, words or [])
    ways: list[budget.Way] = []
    with planning_for(on), doing("planning"):
        data = load_data(settings.data, settings.kind, tokenizer, seed=settings.train.seed)
        planned = {**plan(settings, data, devices), "assumed": assumed}
        if devices > 1:
            spread = budget.ways_on_devices(recipe, settings, given, data, devices, room)
            planned |= {"devices": devices, "memory_room": room, "ways_on_devices": [vars(way) for way in spread]}
        elif room is not None:
            ways = budget.ways(recipe, settings, given, data, sum(planned["memory_bytes"].values()), room)
            planned["memory_room"], planned["ways"] = room, [vars(way) for way in ways]
    if on is None and here == "cpu" and ways and not ways[0].fits:
        with planning_for("cuda"), doing("planning"):
            planned["on_cuda"] = sum(plan(settings, data)["memory_bytes"].values())
    if measure:
        from finetune_kit.training.trial import measure_step

        with doing("training two steps"):
            planned["measured"] = measure_step(recipe, settings)
    if json_:
        streams.write(as_json({**preview_json(data, tokenizer), "plan": planned}))
    else:
        print_preview(data, tokenizer, out)
        print_plan(settings, planned, out)
        if devices > 1:
            print_ways_on_devices(planned, out)
    typed = [word, *(["--config", str(config)] if config else []), *(words or [])]
    if devices > 1:
        command = command_on_devices(planned, typed)
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"Try: {command}", markup=False)
    elif ways and not ways[0].fits:
        raise does_not_fit(planned, typed)


@app.command()
def run(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    require: Annotated[
        str | None, typer.Option("--require", help="improved: exit 4 unless the result is better.")
    ] = None,
    allow_changed: Annotated[
        str | None, typer.Option(metavar="KEY,…", help="Settings in which an unfinished run may go on changed.")
    ] = None,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="A broken checkpoint is an error, not passed over.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train, and report what it changed.

    The same held-out rows are measured before and after. Stopped or killed, the same command goes on from the newest
    whole checkpoint, as if nothing had happened.
    """
    if require not in (None, "improved"):
        raise SettingsError(f"--require {require}: expected improved.")
    with doing("starting"):
        recipe, settings = _read(word, config, words)
        check_code(settings)
        if processes.is_launched():
            from finetune_kit.model.load import device

            processes.start(on_cpu=device().type != "cuda")
        from finetune_kit.run_folder import claim, is_unfinished, same_finished
        from finetune_kit.training.start import check_start

    keys = [word.strip() for word in (allow_changed or "").split(",") if word.strip()]
    settings.allow_changed = tuple(full_key(settings, key, "--allow-changed") for key in keys)
    folder = claim(settings)
    if settings.hub.push:
        from finetune_kit.hub import check_access

        with doing("asking the Hub"):
            processes.from_main(lambda: check_access(settings.hub.model_id or "", settings.hub.private))
    with doing("starting"):
        processes.from_main(lambda: check_start(settings))
    what = f"{recipe.name} of {settings.model.name_or_path} on {settings.data.path}, into {folder}"
    out.print(what, style="bold", markup=False)
    if (twin := same_finished(settings, folder)) is not None:
        out.print(f"note: {twin} holds a finished run of these very settings; this one trains again.", markup=False)
    from finetune_kit.training import checkpoint, room, stopping

    if is_unfinished(folder):
        found = processes.from_main(lambda: checkpoint.newest_whole(folder, strict_resume))
        where = f"goes on from step {checkpoint.step_of(found)}" if found else "begins anew: it had no checkpoint yet"
        out.print(f"{folder} holds an unfinished run of these settings, which {where}.", markup=False)
    with doing("starting"):
        _import_heavy()
    with stopping.heeding_signals(folder), room.heeding_disk(folder, "A file of the run"):
        with doing(f"running {recipe.name}"):
            artifact = recipe.run(settings)
        processes.finish()
    signals.resumable(False)
    if not processes.is_main():
        return
    from finetune_kit.evaluation.report import print_report

    print_report(artifact.report, out)
    out.print(f"\nThe run is in {folder}: report.html has the curves and the first answers.", markup=False)
    command, own = "python -m finetune_kit", "" if recipe.word in recipes.BUILTIN else f" --recipe {recipe.path}"
    ask = "" if "gate" in artifact.report.details else f'{command} generate {folder} "…"{own}    '
    out.print(f"Next: {ask}{command} evaluate {folder}{own}", markup=False)
    if require == "improved" and not artifact.report.improved:
        raise NumericsError(f"--require improved: {artifact.report.verdict}", f"The run is kept in {folder}.")
    if settings.hub.push:
        from finetune_kit.hub import push_run

        with doing(f"sending the run to {settings.hub.model_id}"):
            address = push_run(folder, settings)
        out.print(f"Pushed to {address}", markup=False)


RunFolder = Annotated[str, typer.Argument(metavar="DIR", help="A run's folder, or user/name of a pushed one.")]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE.py", help="The run's recipe, where it is a file of yours."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a run on the Hub.")]


@app.command()
def evaluate(
    folder: RunFolder,
    words: Words = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Another adapter of the same base, beside the run's; repeat.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="The report as data.")] = False,
    revision: Revision = None,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Measure a finished run again.

    On its own held-out rows, or on other data: data.path=…, evaluate.size=…
    """
    from finetune_kit.evaluation.report import print_adapters, print_report
    from finetune_kit.finished import compare_adapters, compare_run, open_run
    from finetune_kit.hub import folder_of

    with doing("opening the run"):
        run = open_run(folder_of(folder, revision), words or [], recipe)
    if run.unseen:
        note = (
            f"note: what it was trained on ({', '.join(run.unseen)}) is not here: these rows may have been part of it"
        )
        Console(stderr=True).print(note, style="dim", markup=False)
    if adapter:
        compared = compare_adapters(run, adapter).to_json()
        if json_:
            streams.write(as_json(compared))
        else:
            print_adapters(compared, out)
        return
    report = compare_run(run)
    if json_:
        streams.write(as_json(report.to_json()))
    else:
        print_report(report, out)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], debug: Debug = False
) -> None:
    """Prove a finished run once more.

    A fresh process loads its folder with plain libraries and must give the same outputs; the report keeps the result.
    """
    from finetune_kit.finished import open_run, verify_run

    with doing("opening the run"):
        run = open_run(folder, [])
    proof = verify_run(run)
    if proof.difference is None:
        raise ResourceError(f"Nothing was proven: {proof.reason}.", "Free memory, or take a larger machine.")
    out.print(
        f"A fresh process loaded it and gave the same outputs to {proof.difference:.1e}, "
        f"in {proof.dtype} on {proof.device} (rounding allows {proof.tolerance:.1e}).",
        markup=False,
    )


@app.command()
def generate(
    folder: RunFolder,
    prompt: Annotated[str | None, typer.Argument(help="What to ask; left out: a conversation, or stdin.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSONL with a "prompt" or "messages" a line.')
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL for their answers; what it has is not asked again.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer, too.")] = False,
    system: Annotated[str | None, typer.Option(help="System turn, in place of the run's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0: greedy, the default; above: samples.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Sample tokens of this share of the likeliest one's.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there get rarer.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the samples; unset: 0.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeat.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Of --prompts, answered together; unset: 32.")] = None,
    revision: Revision = None,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Ask the model of a finished run.

    One PROMPT, a file of them (--prompts, --output), or a conversation. Greedy (the likeliest token at each step)
    unless a temperature above 0, top-p, top-k or min-p is given.
    """
    if (prompts is None) != (output is None):
        raise SettingsError("--prompts and --output belong together.", "Such as: --prompts in.jsonl --output out.jsonl")
    if prompts and prompt is not None:
        raise SettingsError("A prompt and --prompts are both given.", "Give one of them.")
    if batch_size is not None and not prompts:
        raise SettingsError("--batch-size has no effect without --prompts.", "Leave it out.")
    from finetune_kit import answering
    from finetune_kit.finished import open_run
    from finetune_kit.hub import folder_of

    decoding = answering.Decoding(
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    with doing("opening the run"):
        asked = answering.prepare(open_run(folder_of(folder, revision), [], recipe), decoding, system)
    if prompts and output:
        from finetune_kit.training.progress import telling

        settings: dict[str, Any] = {"with_base": compare, "progress": telling("answering")}
        with doing("answering"):
            total, there = answering.answer_prompt_file(asked, prompts, output, batch_size=batch_size or 32, **settings)
        kept = f", {there} of them from before" if there else ""
        out.print(f"{total} answers in {output}{kept}.", markup=False)
    elif prompt is None and sys.stdin.isatty():
        answering.converse(answering.load(asked, compare), _user_turn, _tell)
    else:
        _answer(asked, sys.stdin.read().rstrip("\n") if prompt is None else prompt, compare)


def _answer(asked: Any, prompt: str, compare: bool) -> None:
    """Print the answer to one prompt as it comes, and whether it was cut off."""
    from finetune_kit import answering

    if not prompt.strip():
        raise SettingsError("The prompt is empty.", 'Such as: python -m finetune_kit generate DIR "…"')
    messages = [{"role": "user", "content": prompt}]
    answering.prompt_ids(asked, messages)  # refused before the weights are loaded
    completion = answering.answer_one(answering.load(asked, compare), messages, _tell)
    _tell("\n")
    if not completion.ended:
        count = asked.decoding.max_new_tokens
        Console(stderr=True).print(f"(cut off after {count} tokens: --max-new-tokens)", style="dim")


def _user_turn() -> str:
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # gives input() its line editing
    return input("> ")


def _tell(text: str) -> None:
    # on a terminal a control character of the model's could do anything; a file gets its text as it is
    streams.write(escaped(text) if sys.stdout.isatty() else text, end="")


@app.command()
def merge(
    folder: RunFolder,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The model's folder: a new or an empty one.")],
    candidate: Annotated[
        str, typer.Option(help="After 4-bit training, merge into the base, the dequantised base, or the better (auto).")
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB or 500MB.")] = "5GB",
    size: Annotated[int | None, typer.Option(help="Held-out rows to measure candidates on; unset: all.")] = None,
    revision: Revision = None,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Make a plain model of a run's adapter.

    It loads without this package and without PEFT. What merging changed is measured, and written into its card.
    """
    from rich.table import Table

    from finetune_kit.hub import folder_of
    from finetune_kit.merge import merge as merge_run
    from finetune_kit.merge import table_of, verdict_of

    results = merge_run(folder_of(folder, revision), target, candidate, max_shard_size, size, recipe).results
    heads, *lines = table_of(results)
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for line in lines:
        table.add_row(*line)
    out.print(table)
    for said in (verdict_of(results), *results["notes"]):
        out.print(said, markup=False)
    out.print(f"The model is in {target}; train it further with model.name_or_path={target}", markup=False)


@app.command()
def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A run's folder.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    json_: Annotated[bool, typer.Option("--json", help="The same as data.")] = False,
    debug: Debug = False,
) -> None:
    """Name what differs between two runs.

    Settings with where each came from, data, versions, results.
    """
    from finetune_kit.difference import difference, print_difference

    with doing("reading both runs"):
        found = difference(one, other)
    if json_:
        streams.write(as_json(found))
    else:
        print_difference(found, out)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or a merged model's.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; else a private one is made.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; unset: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Push a finished run to the Hugging Face Hub.

    The files are shown first. Private unless --public is given; pushed again, it is updated.
    """
    from finetune_kit import hub
    from finetune_kit.finished import open_run

    with doing(f"reading {folder}"):
        config = open_run(folder, [], recipe).config if (folder / "run.yaml").is_file() else None
        pushed = hub.prepare(folder, repo_id, config, private=not public, revision=revision)
    for line in pushed.lines():
        out.print(line, markup=False)
    with doing("asking the Hub"):
        hub.check_access(repo_id, not public)
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("Nothing was sent: there is nobody here to ask.", f"Go on: {pushed.command()}")
        if not typer.confirm("Push these files?"):
            out.print("Nothing was sent.")
            return
    with doing(f"sending {len(pushed.files)} files to {repo_id}"):
        address = hub.send(pushed, message)
    out.print(f"Pushed to {address}", markup=False)


@app.command()
def doctor(debug: Debug = False) -> None:
    """Is this installation fit to train?

    Versions, known-bad combinations, devices, and one tiny run from end to end. Exit code 5 where something is wrong.
    """
    from finetune_kit.doctor import examine

    if not examine(out):
        raise typer.Exit(5)
