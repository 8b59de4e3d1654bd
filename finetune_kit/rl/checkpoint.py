"""Checkpoints of PPO: tensors as safetensors, numbers as JSON, nothing that could run when it is read."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_kit.errors import SettingsError
from finetune_kit.system.parsing import read_object
from finetune_kit.training import checkpoint

TENSORS, NUMBERS = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """tensors: weights and optimizer by parameter name, on any device. numbers: step, KL coefficient, and what the run
    must have in common with the one that continues. scheduler: its own state. record: that of metrics.jsonl."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    scheduler: dict[str, Any]
    record: dict[str, Any]


def write_checkpoint(folder: Path, snapshot: Snapshot, facts: dict[str, Any]) -> Path:
    """`folder`/checkpoint-<step>, whole or not at all, committed with `facts`. Returns its path; one that is there
    already is left as it is."""
    from safetensors.torch import save_file

    target = folder / f"checkpoint-{snapshot.numbers['step']}"
    if not (target / checkpoint.MANIFEST).is_file():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        save_file({name: tensor.cpu().contiguous() for name, tensor in snapshot.tensors.items()}, target / TENSORS)
        content = {**snapshot.numbers, "scheduler": snapshot.scheduler, "record": snapshot.record}
        (target / NUMBERS).write_text(json.dumps(content, indent=1), encoding="utf-8")
        checkpoint.commit(target, {"step": snapshot.numbers["step"], **facts})
    return target


def read_checkpoint(path: Path) -> Snapshot:
    """Raises SettingsError where no PPO checkpoint is there."""
    from safetensors.torch import load_file

    if not (path / NUMBERS).is_file() or not (path / TENSORS).is_file():
        raise SettingsError(f"{path} is no checkpoint of PPO: {NUMBERS} and {TENSORS} belong to it.")
    numbers = read_object(path / NUMBERS)
    if not isinstance(numbers.get("scheduler"), dict) or not isinstance(numbers.get("record"), dict):
        raise SettingsError(f"{path / NUMBERS}: expected scheduler and record, as a run of PPO writes them.")
    scheduler, record = numbers.pop("scheduler"), numbers.pop("record")
    return Snapshot(load_file(path / TENSORS), numbers, scheduler, record)


def optimizer_tensors(optimizer: Any, names: list[str]) -> dict[str, Tensor]:
    """AdamW's state by parameter name and entry; `names` in the order that the optimizer got the parameters."""
    state = optimizer.state_dict()["state"].items()
    return {f"optimizer.{names[at]}.{key}": value for at, entry in state for key, value in entry.items()}


def load_optimizer(optimizer: Any, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Put such tensors back; a parameter without any starts anew."""
    entries: dict[int, dict[str, Tensor]] = {}
    for at, name in enumerate(names):
        kept = {key: tensors.get(f"optimizer.{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if kept["step"] is not None:
            entries[at] = {key: value.clone() for key, value in kept.items() if value is not None}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
