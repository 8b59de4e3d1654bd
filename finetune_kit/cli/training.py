"""Commands that plan and train: check, run."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune_kit import distributed
from finetune_kit import recipe as recipes
from finetune_kit.cli.options import (
    REQUIRE,
    ConfigFile,
    Debug,
    RecipeWord,
    Words,
    check_required,
    import_heavy,
    out,
    read_settings,
    required,
)
from finetune_kit.errors import SettingsError
from finetune_kit.settings.checks import check_code
from finetune_kit.settings.load import full_key
from finetune_kit.system import signals, streams
from finetune_kit.system.terminal import Console, as_json, doing


def check(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train two real steps to measure time and memory.")
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="Memory available, such as 24GiB. If it is too small: exit 5 and show what fits."
        ),
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices that share the run, each with that memory.")
    ] = 1,
    on: Annotated[
        str | None, typer.Option("--device", help="Plan for cuda, cpu or mps; unset: this machine's device.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Plan a run: data, masks, memory, steps.

    Reads the data, shows which tokens would be trained, and counts. It doesn't train.
    """
    if on not in (None, "cuda", "cpu", "mps"):
        raise SettingsError(f"--device {on}: expected cuda, cpu or mps.")
    with doing("starting"):
        recipe, settings = read_settings(word, config, words)
        check_code(settings)
        import_heavy()
        from finetune_kit.data.load import load_data
        from finetune_kit.data.preview import preview_json, print_preview
        from finetune_kit.models.device import device, planning_for
        from finetune_kit.planning import budget
        from finetune_kit.planning.plan import command_on_devices, does_not_fit, plan, print_plan, print_sharding_plans
        from finetune_kit.planning.plan import tokenizer_to_count_with as count_with
        from finetune_kit.planning.preflight import check_start

        here = device().type
        check_start(settings, elsewhere=on not in (None, here))
    room = budget.read_size(memory) if memory is not None else None
    if measure and on not in (None, here):
        raise SettingsError(f"--measure trains two steps here, on {here}, not on {on}.", "Leave one of them out.")
    tokenizer, assumed = count_with(settings, weights=measure)
    given = (config or recipe.settings, words or [])
    ways: list[budget.Option] = []
    with planning_for(on), doing("planning"):
        data = load_data(settings.data, settings.kind, tokenizer, seed=settings.train.seed)
        planned = {**plan(settings, data, devices), "assumed": assumed}
        if devices > 1:
            spread = budget.sharding_plans(recipe, settings, given, data, devices, room)
            planned |= {"devices": devices, "memory_room": room, "ways_on_devices": [vars(way) for way in spread]}
        elif room is not None:
            ways = budget.ways(recipe, settings, given, data, sum(planned["memory_bytes"].values()), room)
            planned["memory_room"], planned["ways"] = room, [vars(way) for way in ways]
    if on is None and here == "cpu" and ways and not ways[0].fits:
        with planning_for("cuda"), doing("planning"):
            planned["on_cuda"] = sum(plan(settings, data)["memory_bytes"].values())
    if measure:
        from finetune_kit.planning.measured_step import measure_step

        with doing("training two steps"):
            planned["measured"] = measure_step(recipe, settings)
    if json_:
        streams.write(as_json({**preview_json(data, tokenizer), "plan": planned}))
    else:
        print_preview(data, tokenizer, out)
        print_plan(settings, planned, out)
        if devices > 1:
            print_sharding_plans(planned, out)
    typed = [word, *(["--config", str(config)] if config else []), *(words or [])]
    if devices > 1:
        command = command_on_devices(planned, typed)
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"Try: {command}", markup=False)
    elif ways and not ways[0].fits:
        raise does_not_fit(planned, typed)


def run(
    word: RecipeWord,
    words: Words = None,
    config: ConfigFile = None,
    require: Annotated[list[str] | None, typer.Option("--require", help=REQUIRE)] = None,
    allow_changed: Annotated[
        str | None, typer.Option(metavar="KEY,…", help="Settings that may change when a run resumes.")
    ] = None,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="Treat a broken checkpoint as an error instead of skipping it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train, and report what it changed.

    The same held-out rows are measured before and after. If the run is stopped or killed, run the same command: it
    resumes from the newest complete checkpoint, as if nothing had happened.
    """
    with doing("starting"):
        recipe, settings = read_settings(word, config, words)
        check_code(settings)
        wanted = required(require, settings)
        if distributed.is_launched():
            from finetune_kit.models.device import device

            distributed.start(on_cpu=device().type != "cuda")
        from finetune_kit.run_folder.claim import claim

    keys = [word.strip() for word in (allow_changed or "").split(",") if word.strip()]
    settings.allow_changed = tuple(full_key(settings, key, "--allow-changed") for key in keys)
    folder = claim(settings)
    with doing("starting"):
        from finetune_kit.runs.train import train
    artifact = train(recipe, settings, strict_resume=strict_resume, out=out)
    signals.resumable(False)
    if not distributed.is_main():
        return
    from finetune_kit.evaluation.report import print_report

    print_report(artifact.report, out)
    out.print(f"\nThe run is in {folder}: report.html has the curves and the first answers.", markup=False)
    command, own = "python -m finetune_kit", "" if recipe.word in recipes.BUILTIN else f" --recipe {recipe.path}"
    ask = "" if "gate" in artifact.report.details else f'{command} generate {folder} "…"{own}    '
    out.print(f"Next: {ask}{command} evaluate {folder}{own}", markup=False)
    check_required(wanted, artifact.report, f"The run is kept in {folder}.")
    if settings.hub.push:
        from finetune_kit.runs.hub import push_run

        with doing(f"sending the run to {settings.hub.model_id}"):
            address = push_run(folder, settings)
        out.print(f"Pushed to {address}", markup=False)
