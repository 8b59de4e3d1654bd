"""Checkpoints that count only when whole. One mechanism for every trainer.

A checkpoint's files are written first; MANIFEST.json, with the size and SHA-256 of each, is written last, under another
name, and renamed once everything is on the disk. A folder without one is half written and never read; a folder that
differs from its manifest is set aside, and the next older one is taken.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.split import FEWEST
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.run_folder import claim, identity
from finetune_kit.settings.schema import RecipeConfig, leaves
from finetune_kit.system.files import sync_folder, write_whole
from finetune_kit.system.parsing import read_object
from finetune_kit.training.progress import console

MANIFEST = "MANIFEST.json"
PREFIX, TRASH, CORRUPT = "checkpoint-", ".trash-", ".corrupt"


def begin(config: RecipeConfig, tokenizer: Any, data: Data) -> Path:
    """Make the run's folder, or go on with the unfinished run in it.

    Raises SettingsError where that one had other settings, data, weights, tokenizer or number of processes, and
    DataError where nothing could be measured.
    """
    check_measurable(config, data)

    def make() -> Path:
        stamps = {**stamps_of(config, tokenizer, data), "processes": distributed.count()}
        differing = identity.new_versions(Path(config.train.output_dir or ""))
        folder = claim.begin(config, data.ledger, stamps)
        if differing:
            console.print(f"note: not as when this run began, so that its numbers may differ: {', '.join(differing)}")
        return folder

    return distributed.from_main(make)


def check_measurable(config: RecipeConfig, data: Data) -> None:
    """Raises DataError for a run that could not say whether it changed anything: it ends with what it measured."""
    if not len(data.held_out):
        raise DataError(
            "No row is held out, so whether training changes anything could not be measured.",
            f"Hold some out: data.held_out_size={FEWEST}, or give others: data.held_out_path=FILE",
        )
    if data.kind == "prompt" and not config.evaluate.size and not config.evaluate.general_text:
        raise SettingsError(
            "With evaluate.size=0 and evaluate.general_text=false nothing is measured: prompts have no held-out loss.",
            f"Set evaluate.size={FEWEST} or more.",
        )


def stamps_of(config: RecipeConfig, tokenizer: Any, data: Data) -> dict[str, Any]:
    """What a run's result depends on beside its settings, as hashes: rows, base model, tokenizer, files it names."""
    from finetune_kit.models.provenance import base_record

    model = base_record(config.model)
    named = {leaf.key: leaf.value for leaf in leaves(config) if not leaf.key.startswith(("data.", "train.", "hub."))}
    named["recipe"] = config.recipe_word
    del named["model.name_or_path"]  # known by its weights
    texts = {key: text for name, value in named.items() for key, text in _texts(name, value)}
    files = {key: _content(path) for key, text in texts.items() if (path := file_of(text)) is not None}
    return {
        "data": data.ledger.fingerprint,
        "model": {"weights": model["weights"], "config": model["config"], "revision": model["revision"]},
        "tokenizer": _tokenizer_hash(tokenizer),
        "files": files,
    }


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a setting's value, lists and mappings at any depth, with its place: reward.sources[0]."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(f"{name}.{key}", key) if isinstance(key, str) else ()
            yield from _texts(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _texts(f"{name}[{at}]", item)


def file_of(text: str) -> Path | None:
    """The file or folder that a setting's text names, file.py:function too; None where there is none."""
    path, colon, _ = text.rpartition(":")
    for named in (text, path if colon and path.endswith(".py") else ""):
        try:
            if named and ((found := Path(named).expanduser()).is_file() or found.is_dir()):
                return found
        except (OSError, ValueError, RuntimeError):  # a text that can be no path: too long, with a NUL, ~nobody
            continue
    return None


def _content(path: Path) -> str:
    """SHA-256 of a file, of a Python file with the modules beside it that it imports, or of the weights and settings
    in a folder."""
    if path.is_dir():
        names = sorted(file for end in ("*.safetensors", "*config.json") for file in path.glob(end) if file.is_file())
    else:
        names = sorted(_with_imports(path)) if path.suffix == ".py" else [path]
    return hashlib.sha256("".join(f"{file.name} {_sha256(file)} " for file in names).encode()).hexdigest()


def _with_imports(path: Path) -> set[Path]:
    """A Python file, and the files beside it that it imports, and what those import; read, not run."""
    found, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # whoever runs it says so
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" if node.module else name for name in names)]
            places = [(folder, name.split(".")) for name in names if name for folder in {path.parent, file.parent}]
            for folder, words in places:
                inner, first = folder.joinpath(*words), folder / words[0]
                candidates = (Path(f"{inner}.py"), inner / "__init__.py", Path(f"{first}.py"), first / "__init__.py")
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of vocabulary, rules, special tokens and chat template; not of how it happens to pad."""
    rules = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    known = [
        rules,
        str(tokenizer.chat_template),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def commit(folder: Path, facts: dict[str, Any]) -> None:
    """Make a written checkpoint count. `facts`: step, and what the run that goes on from it must have in common."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": _sha256(path, sync=True)}
    for inner in {path.parent for path in folder.rglob("*") if path.is_file()} | {folder}:
        sync_folder(inner)
    write_whole(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=1, ensure_ascii=False))
    sync_folder(folder.parent)


def _sha256(path: Path, sync: bool = False) -> str:
    writes = sync and sys.platform == "win32"  # where a file that is only read cannot be written out
    with path.open("r+b" if writes else "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        return f"{strange[0]} is none of the files that the run wrote"
    for name, file in files.items():
        if sizes[name] != file["bytes"]:
            return f"{name} has {sizes[name]:,} bytes, not {file['bytes']:,}"
    return _changed(checkpoint, stamp, (checkpoint / MANIFEST).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # a command looks at a checkpoint when it starts, and again before it loads it
def _changed(checkpoint: Path, stamp: tuple[tuple[str, int], ...], manifest: int) -> str:
    for name, file in read_manifest(checkpoint)["files"].items():
        try:
            same = _sha256(checkpoint / name) == file["sha256"]
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
