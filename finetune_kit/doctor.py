"""Is this installation fit to train? Versions against their floors, devices, and one tiny run from end to end."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finetune_kit import recipe as recipes
from finetune_kit.config import resolve
from finetune_kit.errors import FinetuneKitError
from finetune_kit.run_folder import versions

# Lowest version that is safe to use, and why.
FLOORS = {
    "torch": ("2.10", "CVE-2026-24747: reading a checkpoint corrupts memory"),
    "transformers": ("5.3.0", "CVE-2026-4372: a model's config.json runs code"),
    "datasets": ("5.2.0", "CVE-2026-57845: a data set runs code"),
    "accelerate": ("1.15.0", "CVE-2026-69112: a model's index reads outside its folder"),
    "jinja2": ("3.1.6", "CVE-2025-27516: a chat template leaves its sandbox"),
    "trl": ("1.16.0", "the trainers' arguments that the recipes are written for"),
    "peft": ("0.21.0", "the adapters' format that the recipes are written for"),
}


def examine(out: Console) -> bool:
    """Print what was found; True when all is well."""
    problems = _versions(out)
    _devices(out)
    out.print("\n[bold]A tiny run[/] (lora_sft, random model of two layers, 2 steps)")
    started = time.perf_counter()
    try:
        folder_holds = tiny_run()
    except FinetuneKitError as error:
        problems.append(f"the tiny run failed: {error}")
    else:
        out.print(
            f"  trained, saved, loaded in a fresh process, equal: {folder_holds} ({time.perf_counter() - started:.0f} s)"
        )
    for problem in problems:
        out.print(f"problem: {problem}", style="bold red")
    if not problems:
        out.print("\nAll well.", style="bold green")
    return not problems


def _versions(out: Console) -> list[str]:
    from importlib.metadata import version

    from packaging.version import Version

    problems = []
    table = Table.grid(padding=(0, 2))
    found = {**versions(), "jinja2": version("jinja2")}
    for name, number in found.items():
        floor, reason = FLOORS.get(name, (None, ""))
        if number == "not installed":
            problems.append(f"{name} is not installed. Run: pip install finetune-kit")
        elif floor and Version(number) < Version(floor):
            problems.append(f"{name} {number} is older than {floor} ({reason}). Run: pip install '{name}>={floor}'")
        table.add_row(f"  {name}", number, f"at least {floor}" if floor else "")
    out.print("[bold]Versions[/]")
    out.print(table)
    return problems


def _devices(out: Console) -> None:
    import os

    import torch

    out.print("\n[bold]Devices[/]")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        out.print(
            f"  GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, bfloat16 {torch.cuda.is_bf16_supported()}"
        )
    if torch.backends.mps.is_available():
        out.print("  Apple GPU (MPS)")
    out.print(
        f"  CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )


def tiny_run() -> bool:
    """lora_sft on a random model and 24 rows, with the recipe's own code; True when the saved adapter held."""
    from finetune_kit.model.tiny import write_tiny_model

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
        recipe.run(resolve(recipe.config_class, recipe.name, None, words))
        return bool(json.loads((folder / "run" / "report.json").read_text())["reload_max_logit_difference"] <= 1e-4)
