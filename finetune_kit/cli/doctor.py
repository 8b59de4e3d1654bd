"""Is this installation fit to train? Versions against their floors, devices, and one tiny run from end to end."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from finetune_kit import recipe as recipes
from finetune_kit.errors import FinetuneKitError, ResourceError
from finetune_kit.settings.load import resolve
from finetune_kit.system.parsing import read_object
from finetune_kit.system.versions import reason

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from finetune_kit.system.terminal import Console

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

EXTRAS = ("quickstart", "qlora", "metrics", "trackers", "vllm")  # of pyproject.toml, those that a run may need
# Why a version below the lowest one in pyproject.toml is not enough; for one that is not safe: system/versions.py.
REASONS = {
    "trl": "the recipes are written for its trainers' arguments",
    "peft": "the recipes are written for its adapters' format",
}


def examine(out: Console) -> bool:
    """Print what was found; True when all is well."""
    problems = [*_versions(out), *_devices(out)]
    out.print("\n[bold]A tiny run[/] (lora_sft, random model of two layers, 2 steps)")
    started = time.perf_counter()
    try:
        difference = tiny_run()
    except FinetuneKitError as error:
        problems.append(f"the tiny run failed: {error}")
    else:
        seconds = time.perf_counter() - started
        out.print(f"  trained, saved, and loaded in a fresh process: logits within {difference:.0e} ({seconds:.0f} s)")
    for problem in problems:
        out.print(f"problem: {problem}", style="bold red", markup=False)
    if not problems:
        out.print("\nAll well.", style="bold green")
    return not problems


def _versions(out: Console) -> list[str]:
    """Prints what is installed; the problems: what is missing, or is not a version that pyproject.toml allows. What an
    extra would bring may be missing."""
    problems = []
    table = Table.grid(padding=(0, 2))
    for requirement in _requirements():
        name, extra = requirement.name, _extra_of(requirement)
        try:
            number = metadata.version(name)
        except metadata.PackageNotFoundError:
            number = "not installed"
            if not extra:
                problems.append(f"{name} is not installed. Run: pip install '{requirement}'")
        else:
            if not requirement.specifier.contains(number, prereleases=True):
                why = reason(name) or REASONS.get(name, "")
                said = f"{name} {number} is not {requirement.specifier}{f' ({why})' if why else ''}."
                problems.append(f"{said} Run: pip install '{name}{requirement.specifier}'")
        table.add_row(f"  {name}", number, str(requirement.specifier), f"extra {extra}" if extra else "")
    out.print(f"[bold]Versions[/] on Python {platform.python_version()}")
    out.print(table)
    return problems


def _requirements() -> list[Requirement]:
    """What pyproject.toml demands, and what its extras do, those for work on this package left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in metadata.requires("finetune-kit") or []]
    return [requirement for requirement in found if requirement.marker is None or _extra_of(requirement)]


def _extra_of(requirement: Requirement) -> str:
    """The extra that asks for it; "" where every run does, or none of `EXTRAS`."""
    marker = requirement.marker
    return next((name for name in EXTRAS if marker is not None and marker.evaluate({"extra": name})), "")


def _devices(out: Console) -> list[str]:
    """Prints what can compute; the problem: a GPU that this build of torch cannot use."""
    import torch

    out.print("\n[bold]Devices[/]")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size, bf16 = gpu.total_memory / 2**30, torch.cuda.is_bf16_supported(including_emulation=False)
        out.print(f"  GPU {index}: {gpu.name}, {size:.0f} GiB, {'' if bf16 else 'no '}bfloat16")
    if torch.backends.mps.is_available():
        out.print("  Apple GPU (MPS)")
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    out.print(f"  CPU: {os.cpu_count()} cores, {threads} threads, {capability}")
    if NVIDIA_DRIVER.exists() and not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
        return [f"an NVIDIA GPU is here, but torch {torch.__version__} (built {build}) cannot use it. See: pytorch.org"]
    return []


def tiny_run() -> float:
    """lora_sft on a random model and 24 rows; the largest difference of a logit after saving and loading.

    Raises what the recipe raises, such as NumericsError where the saved adapter does not hold.
    """
    from finetune_kit.models.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tiny_model(folder / "model")
        rows = [{"prompt": f"{n} + {n} =", "completion": str(2 * n)} for n in range(24)]
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        recipe = recipes.load("lora_sft")
        words = [
            f"model.name_or_path={folder / 'model'}",
            f"data.path={folder / 'rows.jsonl'}",
            f"train.output_dir={folder / 'run'}",
            "max_steps=2",
            "per_device_train_batch_size=4",
            "evaluate.size=4",
            "evaluate.general_text=false",
        ]
        recipe.run(resolve(recipe.config_class, recipe.word, None, words))
        results = read_object(folder / "run" / "report.json")
        if results["reload_max_logit_difference"] is None:
            raise ResourceError(f"the saved run could not be proven: {results['reload']['not_made']}")
        return float(results["reload_max_logit_difference"])
