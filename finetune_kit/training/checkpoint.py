"""Checkpoints that count only when whole. One mechanism for every trainer.

A checkpoint's files are written first; MANIFEST.json, with the size and SHA-256 of each, is written last, under another
name, and renamed once everything is on the disk. A folder without one is half written and never read; a folder that
differs from its manifest is set aside, and the next older one is taken.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.run_folder import claim
from finetune_kit.system.files import sha256, sync_folder, write_whole
from finetune_kit.system.parsing import read_object
from finetune_kit.training.progress import console

MANIFEST = "MANIFEST.json"
PREFIX, TRASH, CORRUPT = "checkpoint-", ".trash-", ".corrupt"


def commit(folder: Path, facts: dict[str, Any]) -> None:
    """Make a written checkpoint count. `facts`: step, and what the run that resumes from it must have in common."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path, sync=True)}
    for inner in {path.parent for path in folder.rglob("*") if path.is_file()} | {folder}:
        sync_folder(inner)
    write_whole(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False))
    sync_folder(folder.parent)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The facts that a checkpoint was committed with."""
    return read_object(checkpoint / MANIFEST)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps behind a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def checkpoints(run: Path) -> list[Path]:
    """A run's committed checkpoints, oldest first; their files are not read."""
    return [path for path in _folders(run) if (path / MANIFEST).is_file()]


def _folders(run: Path) -> list[Path]:
    found = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def broken(checkpoint: Path) -> str:
    """What differs between a checkpoint and its manifest; "" where it is whole."""
    try:
        files = read_manifest(checkpoint)["files"]
        stamp = tuple(sorted((name, (checkpoint / name).stat().st_mtime_ns) for name in files))
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read: {error.strerror}"
    except (SettingsError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    # the trainer would read a pickle by its name, whoever put it there
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()}
    if strange := sorted(there - files.keys() - {MANIFEST}):
        return f"{strange[0]} is not a file that the run wrote"
    for name, file in files.items():
        if sizes[name] != file["bytes"]:
            return f"{name} has {sizes[name]:,} bytes, not {file['bytes']:,}"
    return _changed(checkpoint, stamp, (checkpoint / MANIFEST).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a command looks at a checkpoint when it starts, and again before it loads it
def _changed(checkpoint: Path, stamp: tuple[tuple[str, int], ...], manifest: int) -> str:
    for name, file in read_manifest(checkpoint)["files"].items():
        try:
            same = sha256(checkpoint / name) == file["sha256"]
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if not same:
            return f"{name} has another SHA-256"
    return ""


def newest_whole(run: Path, strict: bool = False) -> Path | None:
    """The newest checkpoint that holds what its manifest says; None where there is none.

    A newer one that does not is said aloud, renamed to <name>.corrupt and passed over; with `strict` it is a
    ResourceError instead. What a killed process left half written is removed.
    """
    for leftover in [*run.glob(f"{TRASH}*"), *(path for path in _folders(run) if not (path / MANIFEST).is_file())]:
        if not leftover.is_symlink():
            shutil.rmtree(leftover)
    for checkpoint in reversed(checkpoints(run)):
        reason = broken(checkpoint)
        if not reason:
            return checkpoint
        if strict:
            raise ResourceError(
                f"{checkpoint} is broken: {reason}.",
                "Without --strict-resume it is set aside, and the next older checkpoint is taken.",
            )
        console.print(f"note: {checkpoint} is broken, and set aside as {set_aside(checkpoint).name}: {reason}")
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing takes it for one; returns its new path."""
    taken = list(checkpoint.parent.glob(f"{checkpoint.name}{CORRUPT}*"))
    aside = checkpoint.with_name(f"{checkpoint.name}{CORRUPT}" + (f"-{len(taken) + 1}" if taken else ""))
    return checkpoint.rename(aside)


def rotate(run: Path, keep: int, best: Path | None = None) -> None:
    """Delete the oldest committed checkpoints until `keep` are left, never the newest one or the best one."""
    found = checkpoints(run)
    spared = {path.name for path in (*found[-1:], *([best] if best else []))}
    for old in [path for path in found if path.name not in spared][: max(0, len(found) - keep)]:
        discard(old)


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint: it stops counting at once, whenever the process dies."""
    trash = checkpoint.with_name(f"{TRASH}{checkpoint.name}")
    shutil.rmtree(trash, ignore_errors=True)
    shutil.rmtree(checkpoint.rename(trash))


def check_steps(checkpoint: Path, steps: int) -> None:
    """Raises SettingsError for a checkpoint beyond the end of the run."""
    if step_of(checkpoint) > steps:
        fix = f"Set max_steps to at least {step_of(checkpoint)}."
        raise SettingsError(f"{checkpoint} is beyond the {steps} steps of this run.", fix)


def reopen(optimizer: Any, scheduler: Any, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Let changed settings of rate and decay act, which the loaded state of optimizer and scheduler would overrule."""
    if then.get("train.weight_decay") != now["train.weight_decay"]:
        optimizer.param_groups[0]["weight_decay"] = now["train.weight_decay"]  # the others are those without decay
    if all(then.get(key) == now[key] for key in claim.RATE):
        return
    was, rate = then["train.learning_rate"], now["train.learning_rate"]
    bases = [base * rate / was if was else rate for base in scheduler.base_lrs]
    scheduler.base_lrs = bases
    scales: list[Callable[[int], float]] = scheduler.lr_lambdas
    for group, base, scale in zip(optimizer.param_groups, bases, scales, strict=True):
        group["initial_lr"], group["lr"] = base, base * scale(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
