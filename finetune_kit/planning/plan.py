"""What a run is going to do and need, counted from shapes before anything is loaded; and the same in words."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.data.load import Data, training_texts
from finetune_kit.errors import ResourceError
from finetune_kit.models.adapters import covered, is_adapter
from finetune_kit.models.embedded import NAME as EMBEDDED
from finetune_kit.models.language import left_alone, said
from finetune_kit.models.new import NewModelConfig, is_new
from finetune_kit.models.new_tokenizer import make_tokenizer
from finetune_kit.models.shapes import empty_policy
from finetune_kit.models.source import resolve_name
from finetune_kit.models.tokenizer import lacks_tokenizer, load_tokenizer
from finetune_kit.planning.compute import compute, compute_in_words
from finetune_kit.planning.memory import Quantised, in_4_bits, memory, planned_for, quantised_weights
from finetune_kit.settings.schema import ModelConfig, RecipeConfig
from finetune_kit.system.terminal import format_bytes
from finetune_kit.training.arguments import check_train
from finetune_kit.training.batching import check_batches, padded_share, plan_batches
from finetune_kit.training.begin import check_measurable
from finetune_kit.training.steps import steps

if TYPE_CHECKING:
    from rich.console import Console


def plan(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, Any]:
    """Steps, parameters, matched modules and memory by part (bytes), and the device and arithmetic that it is for.

    Nothing is trained and no weight is loaded.

    padded_share: of the slots of a padded batch, those without a token; None where rows are packed, or sampled.
    """
    check_train(config.train)
    check_batches(config, data)
    check_measurable(config, data)
    lora = config.lora
    policy = empty_policy(config.model, lora, trained_in_full=lora is None, scores=config.scores)
    found = covered(policy) if is_adapter(policy) else None
    parameters = list(policy.parameters())
    sizes = memory(config, data, policy)  # which gives the policy the types of training
    quantised = quantised_weights(policy) if config.model.load_in_4bit else Quantised()
    unknown = data.packed or data.kind == "prompt"
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    planned = steps(config, data, processes)
    return {
        **planned,
        **({"compute": compute(data, policy, planned)} if is_new(config.model) else {}),
        "padded_share": None if unknown else padded_share(plan_batches(config.train, data, processes)),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "target_modules": found.covered if found else {},
        "trained_by_kind": found.trained if found else {},
        "covered_share": found.share if found else None,
        "left_out": found.reasons if found else {},
        "adapter": found.in_words() if found else [],
        "in_4_bits": in_4_bits(policy, config.model, quantised),
        "left_alone": left_alone(policy),
        "planned_for": planned_for(config, data, policy),
        "memory_bytes": sizes,
    }


def tokenizer_to_count_with(config: RecipeConfig, weights: bool) -> tuple[Any, list[str]]:
    """(tokenizer, what is assumed, in words): the model's own, that of a new model, trained as the run will, or, to
    plan for a folder with shapes and no vocabulary, the embedded model's. `weights`: as in load_tokenizer."""
    model, seed = config.model, config.train.seed
    if isinstance(model, NewModelConfig) and is_new(model):
        return make_tokenizer(config.tokenizer, model, training_texts(config.data, seed), seed), []
    if not weights and lacks_tokenizer(Path(resolve_name(model.name_or_path))):
        assumed = f"{model.name_or_path} has no tokenizer: tokens are counted, and rows rendered, by {EMBEDDED}'s"
        return load_tokenizer(ModelConfig(name_or_path=EMBEDDED)), [assumed]
    return load_tokenizer(model, weights=weights), []


def print_plan(settings: RecipeConfig, planned: dict[str, Any], out: Console) -> None:
    """What a run is going to do and need, and where a budget was given, what fits into it."""
    from rich.markup import escape
    from rich.table import Table

    out.print("\n[bold]The run[/]")
    table = Table.grid(padding=(0, 2))
    table.add_row("model", escape(settings.model.name_or_path))
    share = planned["trainable_parameters"] / planned["parameters"]
    table.add_row(
        "trained", f"{planned['trainable_parameters']:,} of {planned['parameters']:,} parameters ({share:.1%})"
    )
    for line in planned["adapter"]:
        table.add_row(*line.split(": ", 1))
    if planned["left_alone"]:
        table.add_row("left alone", escape(said(planned["left_alone"])))
    budget = settings.train.max_tokens_per_batch
    cut = f", each in {planned['passes_in_a_step']} passes of at most {budget:,} tokens" if budget else ""
    table.add_row("steps", f"{planned['steps']:,} of {planned['rows_in_a_step']} rows{cut}")
    for name, said_of in compute_in_words(planned):
        table.add_row(name, said_of)
    if planned["padded_share"] is not None:
        table.add_row("padding", f"{planned['padded_share']:.0%} of a padded batch")
    for place, line in enumerate(said_for(planned["planned_for"], planned.get("assumed", []))):
        table.add_row("" if place else "planned for", escape(line))
    sizes = planned["memory_bytes"]
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in sizes.items() if size)
    if planned["in_4_bits"]:
        table.add_row("4 bits", planned["in_4_bits"])
    table.add_row("memory", f"about {format_bytes(sum(sizes.values()))}: {parts}")
    if "measured" in planned:
        measured = planned["measured"]
        seconds = measured["seconds_a_step"]
        table.add_row("measured", f"{seconds:.2f} s a step, so {seconds * planned['steps'] / 60:.1f} min of training;")
        table.add_row("", f"peak memory {measured['peak_memory_gib']:.2f} GiB")
    out.print(table)
    if len(planned.get("ways", [])) > 1:
        out.print(
            f"\n[bold]What fits into {format_bytes(planned['memory_room'])}[/]",
            "of the ways to train on as many rows a step",
        )
        table = Table.grid(padding=(0, 2))
        for way in planned["ways"]:
            table.add_row(
                "yes" if way["fits"] else "no", format_bytes(way["bytes"]), way["recipe"], " ".join(way["words"])
            )
        out.print(table)


def said_for(known: dict[str, str], assumed: list[str]) -> list[str]:
    """What a plan is for, in lines."""
    names = {"cuda": "a CUDA GPU", "cpu": "a CPU", "mps": "MPS"}
    frozen = f"frozen weights {known['frozen']}, " if "frozen" in known else ""
    types = f"{frozen}trained weights {known['trained']}, arithmetic {known['arithmetic']}"
    rows = f"rows {known['rows']}, attention by {known['attention']}"
    return [f"{names[known['device']]}: {types}", rows, *assumed]


def print_sharding_plans(planned: dict[str, Any], out: Console) -> None:
    """The ways to share a run among devices, with the bytes that each holds and sends."""
    from rich.table import Table

    room = planned["memory_room"]
    there = f" with {format_bytes(room)} each" if room is not None else ""
    out.print(
        f"\n[bold]On {planned['devices']} devices{there}[/]: bytes on each, and sent by each in an optimizer step"
    )
    table = Table.grid(padding=(0, 2))
    for way in planned["ways_on_devices"]:
        fits = {True: "fits", False: "does not fit", None: ""}[way["fits"]]
        row = (
            way["recipe"],
            " ".join(way["words"]),
            way["sharding"],
            format_bytes(way["bytes"]),
            format_bytes(way["sent"]),
            fits,
        )
        table.add_row(*row)
    out.print(table)


def command_on_devices(planned: dict[str, Any], typed: list[str]) -> str:
    """The command of the first way that fits, made of what was `typed`. Raises ResourceError where none does."""
    ways = planned["ways_on_devices"]
    way = next((way for way in ways if way["fits"] is not False), None)
    if way is None:
        least = min(ways, key=lambda way: way["bytes"])
        raise ResourceError(
            f"None of these ways fits into {format_bytes(planned['memory_room'])} on each of {planned['devices']} "
            "devices.",
            f"The least is {format_bytes(least['bytes'])}: use more devices, a smaller model or shorter rows.",
        )
    name = typed[0] if way["recipe"] == ways[0]["recipe"] else way["recipe"]
    launched = f"--num_processes {planned['devices']} -m finetune_kit run"
    words = shlex.join([name, *typed[1:], *way["words"]])
    return f"accelerate launch --config_file {way['file']} {launched} {words}"


def does_not_fit(planned: dict[str, Any], typed: list[str]) -> ResourceError:
    """The error of a run that needs more than there is, with the command of the first way that fits."""
    asked, *others = planned["ways"]
    known = planned["planned_for"]
    where = f"on {known['device']}, computing in {known['arithmetic']}"
    needed, there = format_bytes(asked["bytes"]), format_bytes(planned["memory_room"])
    message = f"{asked['recipe']} needs about {needed} {where}; there is {there}."
    if "on_cuda" in planned:  # who names a memory on a laptop may mean a card's
        message += (
            f"\nOn a CUDA GPU it needs about {format_bytes(planned['on_cuda'])}: plan for one with --device cuda."
        )
    way = next((way for way in others if way["fits"]), None)
    if way is None:
        least = min(planned["ways"], key=lambda way: way["bytes"])
        return ResourceError(
            message,
            f"None of the ways tried fits; the least is {format_bytes(least['bytes'])}. Use a smaller model or rows.",
        )
    name = typed[0] if way["recipe"] == asked["recipe"] else way["recipe"]
    command = shlex.join([name, *typed[1:], *way["words"]])
    return ResourceError(message, f"About {format_bytes(way['bytes'])}: python -m finetune_kit run {command}")
