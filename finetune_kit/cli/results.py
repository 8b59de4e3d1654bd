"""Commands on what a run left: evaluate, verify, generate, merge, diff, push."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_kit.cli.options import (
    REQUIRE,
    Base,
    Debug,
    RecipeFile,
    Revision,
    RunFolder,
    Words,
    check_required,
    out,
    required,
)
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.run_folder import upload
from finetune_kit.system import streams
from finetune_kit.system.terminal import Console, as_json, doing, escaped


def evaluate(
    folder: RunFolder,
    words: Words = None,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Also measure another adapter of the same base; repeatable.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", help="Tasks of lm-evaluation-harness, or files of questions with choices: arc_easy,…"),
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option("--task-files", metavar="DIR", help="A folder with YAML task files of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task; unset: all.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; unset: the task's own number.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put the tasks' prompts into the chat template.")
    ] = False,
    require: Annotated[list[str] | None, typer.Option("--require", help=REQUIRE)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    revision: Revision = None,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Measure a finished run again.

    On its own held-out rows, or on other data: data.path=…, evaluate.size=…
    """
    from finetune_kit.evaluation.report import print_adapters, print_report
    from finetune_kit.runs.hub import folder_of
    from finetune_kit.runs.saved import compare_adapters, compare_run, compare_tasks, open_run

    with doing("opening the run"):
        run = open_run(folder_of(folder, revision), words or [], recipe)
        wanted = required(require, run.config)
    if wanted and (adapter or tasks):
        other = "--adapter, which compares several" if adapter else "--tasks, which measures nothing else"
        raise SettingsError(f"--require has no effect with {other}.", "Leave one of them out.")
    asked = _asked(tasks, limit, num_fewshot, chat, task_files)
    if asked and adapter:
        raise SettingsError("--tasks has no effect with --adapter.", "Leave one of them out.")
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
    report = compare_tasks(run, asked) if asked else compare_run(run)
    if json_:
        streams.write(as_json(report.to_json()))
    else:
        print_report(report, out)
    check_required(wanted, report, f"The run is in {folder}.")


def _asked(tasks: list[str] | None, limit: int | None, num_fewshot: int | None, chat: bool, folder: Path | None) -> Any:
    """What --tasks and its companions ask of lm-evaluation-harness, checked; None where it is not asked."""
    given = {
        "--limit": limit,
        "--num-fewshot": num_fewshot,
        "--apply-chat-template": chat or None,
        "--task-files": folder,
    }
    if not tasks:
        if lone := next((name for name, value in given.items() if value is not None), None):
            raise SettingsError(f"{lone} has no effect without --tasks.", "Such as: --tasks arc_easy")
        return None
    from finetune_kit.evaluation import harness

    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--task-files {folder}: no such folder.", "Give the folder that holds the YAML files.")
    asked = harness.Asked(harness.listed(tasks), limit, num_fewshot, chat, folder)
    with doing("looking up the tasks"):
        harness.check(asked)
    return asked


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], debug: Debug = False
) -> None:
    """Prove a finished run again.

    A fresh process loads its folder with plain libraries and must give the same outputs. The report keeps the result.
    """
    from finetune_kit.runs.saved import open_run, verify_run

    with doing("opening the run"):
        run = open_run(folder, [])
    proof = verify_run(run)
    if proof.difference is None:
        raise ResourceError(f"Nothing was proven: {proof.reason}.", "Free memory, or use a larger machine.")
    out.print(
        f"A fresh process loaded it and gave the same outputs to {proof.difference:.1e}, "
        f"in {proof.dtype} on {proof.device} (rounding allows {proof.tolerance:.1e}).",
        markup=False,
    )


def generate(
    folder: RunFolder,
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask. Leave it out for a conversation, or to read stdin.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSONL with a "prompt" or "messages" per line.')
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSONL for the answers; prompts already answered there are skipped."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Let the base model answer too.")] = False,
    system: Annotated[str | None, typer.Option(help="System turn, instead of the run's own.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 (the default): greedy; above 0: sample.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens that add up to this probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample tokens with at least this share of the top probability.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make repeated tokens less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling; unset: 0.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeatable.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="How many of --prompts to answer together; unset: 32.")] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(help="A tool that answers may call: calculator, python, search:DIR, FILE.py:NAME; repeatable."),
    ] = None,
    max_tool_calls: Annotated[int | None, typer.Option(help="Calls in one answer; unset: 8.")] = None,
    tool_timeout: Annotated[float | None, typer.Option(help="Longest call of a tool, in seconds; unset: 10.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask before a tool of your own runs.")] = False,
    revision: Revision = None,
    recipe: RecipeFile = None,
    base: Base = None,
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
    limits = {"--max-tool-calls": max_tool_calls, "--tool-timeout": tool_timeout, "--yes": yes or None}
    if idle := [name for name, value in limits.items() if value is not None and not tools]:
        raise SettingsError(f"{idle[0]} has no effect without --tools.", "Such as: --tools calculator")
    from finetune_kit.runs import answering
    from finetune_kit.runs.hub import folder_of
    from finetune_kit.runs.saved import moved_base, open_run

    decoding = answering.Decoding(
        max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, tuple(stop or ())
    )
    with doing("opening the run"):
        box = _toolbox(tools, max_tool_calls, tool_timeout, yes, prompts is not None) if tools else None
        asked = answering.prepare(
            open_run(folder_of(folder, revision), moved_base(base), recipe), decoding, system, box
        )
    if prompts and output:
        from finetune_kit.system.progress_bar import progress_bar

        settings: dict[str, Any] = {"with_base": compare, "progress": progress_bar("answering")}
        with doing("answering"):
            total, there = answering.answer_prompt_file(asked, prompts, output, batch_size=batch_size or 32, **settings)
        kept = f", {there} of them from before" if there else ""
        out.print(f"{total} answers in {output}{kept}.", markup=False)
    elif prompt is None and sys.stdin.isatty():
        answering.converse(answering.load(asked, compare), _user_turn, _tell)
    else:
        _answer(asked, sys.stdin.read().rstrip("\n") if prompt is None else prompt, compare)


def _toolbox(sources: list[str], most: int | None, seconds: float | None, yes: bool, many: bool) -> Any:
    """The tools of --tools; what is not built in is asked for before each call. Of `many` prompts none is asked for."""
    from finetune_kit.generation.toolbox import Toolbox
    from finetune_kit.tools.load import is_built_in, load_tools

    if (most is not None and most < 1) or (seconds is not None and not seconds > 0):
        raise SettingsError("--max-tool-calls and --tool-timeout: expected numbers above 0.")
    own = [source for source in sources if not is_built_in(source)]
    if own and not yes and (many or not sys.stdin.isatty()):
        why = "a file of prompts is not interrupted" if many else "there is nobody here to ask"
        raise SettingsError(f"{own[0]} is not built in, and {why}.", "If it may run: --yes")

    def allow(tool: Any, arguments: dict[str, Any]) -> bool:
        call = escaped(f"{tool.name}({json.dumps(arguments, ensure_ascii=False)})")
        return yes or typer.confirm(f"\nRun {call}?", err=True)

    return Toolbox(load_tools(sources), most or 8, seconds or 10.0, allow=allow)


def _answer(asked: Any, prompt: str, compare: bool) -> None:
    """Print the answer to one prompt as it comes, and whether it was cut off."""
    from finetune_kit.runs import answering

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


def merge(
    folder: RunFolder,
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder for the model.")],
    candidate: Annotated[
        str,
        typer.Option(help="After 4-bit training: merge into the base, the dequantised base, or the better one (auto)."),
    ] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB or 500MB.")] = "5GB",
    size: Annotated[int | None, typer.Option(help="Held-out rows to measure candidates on; unset: all.")] = None,
    revision: Revision = None,
    recipe: RecipeFile = None,
    base: Base = None,
    debug: Debug = False,
) -> None:
    """Merge a run's adapter into a plain model.

    The model loads without this package and without PEFT. Its card says what merging changed, as measured.
    """
    from rich.table import Table

    from finetune_kit.runs.hub import folder_of
    from finetune_kit.runs.merge import merge as merge_run
    from finetune_kit.runs.merge import table_of, verdict_of

    results = merge_run(folder_of(folder, revision), target, candidate, max_shard_size, size, recipe, base).results
    heads, *lines = table_of(results)
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for line in lines:
        table.add_row(*line)
    out.print(table)
    for said in (verdict_of(results), *results["notes"]):
        out.print(said, markup=False)
    out.print(f"The model is in {target}; train it further with model.name_or_path={target}", markup=False)


def diff(
    one: Annotated[Path, typer.Argument(metavar="A", help="A run's folder.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another run's folder.")],
    json_: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what differs between two runs.

    Settings and where each came from, data, versions, results.
    """
    from finetune_kit.runs.diff import difference, print_difference

    with doing("reading both runs"):
        found = difference(one, other)
    if json_:
        streams.write(as_json(found))
    else:
        print_difference(found, out)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder, or a merged model's.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; unset: main.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask for confirmation.")] = False,
    recipe: RecipeFile = None,
    debug: Debug = False,
) -> None:
    """Push a finished run to the Hugging Face Hub.

    It shows the files first. The repository is private unless you give --public. Push again to update it.
    """
    from finetune_kit.runs import hub
    from finetune_kit.runs.saved import open_run

    with doing(f"reading {folder}"):
        config = open_run(folder, [], recipe).config if (folder / "run.yaml").is_file() else None
        pushed = hub.prepare(folder, repo_id, config, private=not public, revision=revision)
    for line in pushed.lines():
        out.print(line, markup=False)
    with doing("asking the Hub"):
        upload.check_access(repo_id, not public)
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError("Nothing was sent: there is nobody here to ask.", f"Continue: {pushed.command()}")
        if not typer.confirm("Push these files?"):
            out.print("Nothing was sent.")
            return
    with doing(f"sending {len(pushed.files)} files to {repo_id}"):
        address = upload.send(pushed, message)
    out.print(f"Pushed to {address}", markup=False)
