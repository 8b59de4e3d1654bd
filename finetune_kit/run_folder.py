"""A run's folder: which name it gets, and the record of settings and versions in it."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune_kit import processes
from finetune_kit.config import RecipeConfig, leaves, to_yaml
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.parsing import read_object
from finetune_kit.system import lock, strange_in, write_whole

log = logging.getLogger(__name__)

STACK = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "evaluate",
    "huggingface_hub",
)

ABANDONED = 60.0  # seconds; a folder younger than that may be about to be locked
IDENTITY = "identity.json"  # in a run's folder: what a run that goes on there must have in common with it
# settings that leave what is trained as it is
FREE = (
    "train.output_dir",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.report_to",
    "evaluate.bootstrap_samples",
    "reward.timeout",
)
RATE = (
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.warmup_steps",
    "train.max_steps",
    "train.num_train_epochs",
)
# settings that a run can go on with changed, and then act from there on; those of `evaluate` act in any case
OPENABLE = (
    *RATE,
    "train.weight_decay",
    "train.max_grad_norm",
    "train.eval_steps",
    "train.early_stopping_patience",
    "train.on_nonfinite",
    "train.gradient_checkpointing",
    "train.padding_free",
    "model.attn_implementation",
)
ASKED_FOR = 10  # tries at a lock which somebody may hold for the moment of a question
# what else must be the same, and its name for people
STAMPS = {
    "data": "other data: fingerprint",
    "model": "another model:",
    "tokenizer": "another tokenizer:",
    "files": "other files that the settings name:",
    "processes": "another number of processes:",
}


def claim(config: RecipeConfig) -> Path:
    """Decide the run's folder and put it into config.train.output_dir; nothing is created yet.

    An unfinished run of the same settings goes on in its folder; config.allow_changed opens single ones. Else a folder
    that the user names must be free and writable (SettingsError). The default runs/<recipe>, and that of a run.yaml
    which is run again, go on with -2, -3, …; a finished run, or one that another process trains, is never touched.
    """
    config.train.output_dir = str(processes.from_main(lambda: _choose(config)))
    return Path(config.train.output_dir)


def _choose(config: RecipeConfig) -> Path:
    given = config.train.output_dir
    folder = Path("runs") / config.recipe if given is None else Path(given)
    try:
        # the longest names that a run gives its files
        os.lstat(folder.with_name(f".{folder.name}.12345678.new") / "checkpoint-12345678" / ("x" * 48))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _cannot_be_made(folder, folder, error) from None
    again = _is_run_again(config, folder)
    _check_openable(config.allow_changed)
    if given is None or again:
        mine = next((path for path in _numbered(folder, itself_first=again) if _goes_on(path, config)), None)
        if config.allow_changed and not mine:
            raise SettingsError("--allow-changed: no unfinished run differs from this one in these settings alone.")
        folder = mine if mine else next(path for path in _free_names(folder) if _reserve(path))
    elif is_unfinished(folder):
        _refuse_others(folder, config)
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "holds another run" if (folder / "run.yaml").exists() else "is not empty"
        fix = f"Choose: output_dir={_next_free(folder)}"
        raise SettingsError(f"train.output_dir={folder} {what}; nothing in it was touched.", fix)
    elif not _reserve(folder):
        raise _taken(folder)
    _try_to_make(folder)
    return folder


def same_finished(config: RecipeConfig, folder: Path) -> Path | None:
    """A finished run of the same settings beside the folder that a run is given, such as runs/lora_sft for
    runs/lora_sft-2; None for none."""
    stem = folder.with_name(re.sub(r"-\d+$", "", folder.name))
    for other in _numbered(stem, itself_first=False):
        if other == folder or not (other / IDENTITY).is_file() or is_unfinished(other):
            continue
        try:
            known = read_identity(other)["settings"]
        except (SettingsError, OSError, ValueError, KeyError, TypeError):  # of another release, or torn: not the same
            continue
        if isinstance(known, dict) and not changed(known, settings_of(config)):
            return other
    return None


def _try_to_make(folder: Path) -> None:
    """Raises SettingsError where the folder cannot be made and written into; nothing is left behind."""
    place = folder.absolute()
    above = next(path for path in (place, *place.parents) if os.path.lexists(path) or path == path.parent)
    try:
        if above.is_symlink() and not above.exists():
            raise OSError(errno.ENOENT, f"a link to {above.readlink()}, which is not there")
        if not above.is_dir():
            raise OSError(errno.ENOTDIR, "no folder")
        with tempfile.TemporaryDirectory(prefix=".finetune_kit-", dir=above):
            pass
    except OSError as error:
        raise _cannot_be_made(folder, above, error) from None


def _cannot_be_made(folder: Path, above: Path, error: OSError) -> SettingsError:
    shown = str(folder) if len(str(folder)) <= 80 else f"{str(folder)[:77]}…"
    at = f" ({above})" if len(str(above)) <= 80 else ""
    return SettingsError(
        f"train.output_dir={shown} cannot be made and written into: {error.strerror}{at}.",
        "Choose another place: output_dir=runs/mine",
    )


def is_unfinished(folder: Path) -> bool:
    """Whether a run was begun there and has not come to its report, which is written last."""
    return (folder / IDENTITY).is_file() and not (folder / "report.json").is_file()


def _check_openable(keys: Sequence[str]) -> None:
    for key in keys:
        if key not in OPENABLE and not key.startswith("evaluate."):
            raise SettingsError(
                f"--allow-changed {key}: a run that has begun cannot go on with another one, or it would not act.",
                f"These can be changed: {', '.join(OPENABLE)} and evaluate.…",
            )


def _goes_on(folder: Path, config: RecipeConfig) -> bool:
    if not is_unfinished(folder) or is_being_trained(folder):
        return False
    try:
        _check_plain(folder)
        then = read_identity(folder)["settings"]
    except SettingsError as error:  # another run's, which need not stop this one
        log.warning("note: passed over: %s", error.message)
        return False
    return set(changed(then, settings_of(config))) <= set(config.allow_changed) and _hold(folder)


def _refuse_others(folder: Path, config: RecipeConfig) -> None:
    if is_being_trained(folder):
        raise _taken(folder)
    _check_plain(folder)
    _compare(folder, read_identity(folder), {"settings": settings_of(config)}, config)
    if not _hold(folder):
        raise _taken(folder)


def _check_plain(folder: Path) -> None:
    """Raises SettingsError where a run that would go on holds what is neither a file nor a folder."""
    if (strange := strange_in(folder)) is not None:
        raise SettingsError(
            f"{strange} is no plain file: reading or writing it could hang.",
            f"Take it out, or begin another run: output_dir={_next_free(folder)}",
        )


def _taken(folder: Path) -> SettingsError:
    fix = f"Choose: output_dir={_next_free(folder)}"
    return SettingsError(f"train.output_dir={folder} is being trained by another process.", fix)


def settings_of(config: RecipeConfig) -> dict[str, Any]:
    """The settings that a run's result depends on, by dotted key, as JSON gives them back."""
    kept = {leaf.key: leaf.value for leaf in leaves(config) if leaf.key not in FREE and not leaf.key.startswith("hub.")}
    known: dict[str, Any] = json.loads(json.dumps({"recipe": config.recipe_word, **kept}))
    return known


def read_identity(folder: Path) -> dict[str, Any]:
    """What the run in a folder was begun with: settings, versions, and hashes of data, model and tokenizer."""
    fix = f"It is no run that can go on. Begin another: output_dir={_next_free(folder)}"
    known = read_object(folder / IDENTITY, SettingsError, fix)
    if missing := [name for name in ("settings", "versions") if not isinstance(known.get(name), dict)]:
        raise SettingsError(f"{folder / IDENTITY} has no {' and no '.join(missing)}.", fix)
    return known


def changed(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys that differ, in order."""
    return [key for key in dict.fromkeys([*then, *now]) if then.get(key) != now.get(key)]


def new_versions(folder: Path) -> list[str]:
    """What is not as it was when the unfinished run in a folder began: "torch 2.12.0 → 2.13.0"; [] where none runs."""
    if not is_unfinished(folder):
        return []
    known = read_identity(folder)
    then, now = known.get("began_with", known["versions"]), versions()
    return [f"{name} {then.get(name)} → {now.get(name)}" for name in changed(then, now)]


def _compare(folder: Path, then: dict[str, Any], now: dict[str, Any], config: RecipeConfig) -> None:
    """Raises SettingsError where the unfinished run in `folder` was another one, with each difference."""
    free = f"Begin another run: output_dir={_next_free(folder)}"
    settings = [key for key in changed(then["settings"], now["settings"]) if key not in config.allow_changed]
    if settings:
        was = [f"{key} {_shown(then['settings'].get(key))} → {_shown(now['settings'].get(key))}" for key in settings]
        opened = all(key in OPENABLE or key.startswith("evaluate.") for key in settings)
        on = f"Go on with them: --allow-changed {','.join([*config.allow_changed, *settings])}   " if opened else ""
        raise SettingsError(f"{folder} holds an unfinished run with other settings: {', '.join(was)}.", on + free)
    stamps = [name for name in STAMPS if name in now and then.get(name) != now[name]]
    if stamps:
        was = [f"{STAMPS[name]} {_difference(then.get(name), now[name])}" for name in stamps]
        raise SettingsError(f"{folder} holds an unfinished run of {', '.join(was)}.", free)


def _difference(then: Any, now: Any) -> str:
    """Two values of a stamp for people; of files those that differ, by the setting that names them."""
    if isinstance(then, dict) and isinstance(now, dict) and (keys := changed(then, now)) and "weights" not in now:
        return ", ".join(f"{key} {_shown(then.get(key))} → {_shown(now.get(key))}" for key in keys)
    return f"{_shown(then)} → {_shown(now)}"


def _shown(value: Any) -> str:
    """A value for people: hashes and long ones cut."""
    if isinstance(value, dict):
        value = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    text = json.dumps(value, ensure_ascii=False).strip('"')
    return text if len(text) <= 60 else f"{text[:12]}…"


_held: list[int] = []  # the folder of the run that this process trains, open, so that its lock lasts as long as it
_reserved: dict[Path, int] = {}  # the name that this process has claimed, and its lock


def is_being_trained(folder: Path) -> bool:
    """Whether another living process trains in a folder. Nothing stays locked by asking.

    The lock is the kernel's and goes with the process, however that ends. Of a run's processes the main one asks.
    """
    if _is_held(folder):
        return False
    if os.name == "nt":
        return False  # folders cannot be opened there
    number = os.open(folder, os.O_RDONLY)
    try:
        return lock(number, shared=True) is False
    finally:
        os.close(number)


def _is_held(folder: Path) -> bool:
    return bool(_held) and os.path.samestat(os.fstat(_held[0]), folder.stat())


def _hold(folder: Path) -> bool:
    """Lock a folder for this process, until it ends or holds another one; False where another process has it."""
    if os.name == "nt" or _is_held(folder):
        return True
    number = _locked(folder, os.O_RDONLY)
    if number is not None:
        _keep(number)
    return number is not None


def _keep(number: int) -> None:
    for other in _held:
        os.close(other)
    _held[:] = [number]


def _locked(path: Path, flags: int, tell: bool = True) -> int | None:
    """A file or folder, open and locked; None where another process has it. `tell`: say where there are no locks."""
    number = os.open(path, flags, 0o600)
    for _ in range(ASKED_FOR):
        found = lock(number)
        if found is None and tell:
            _say_unlocked(path.absolute().parent)
        if found is not False:
            return number
        time.sleep(0.02)  # somebody may only be asking
    os.close(number)
    return None


def _reserve(folder: Path) -> bool:
    """Take a name for this process before there is a folder; False where another process has it.

    The lock is on a file of the system's folder for temporary ones, and goes with the process. Where that cannot be
    written nothing is reserved, and `begin` finds out.
    """
    named = folder.absolute().parent.resolve() / folder.name
    if os.name == "nt" or named in _reserved:
        return True
    home = Path(tempfile.gettempdir()) / f"finetune_kit-{os.getuid()}"
    file = home / f"{hashlib.sha256(os.fsencode(named)).hexdigest()[:32]}.lock"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        number = _locked(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, tell=False)
    except OSError:
        return True
    if number is None:
        return False
    for other in _reserved.values():
        os.close(other)
    _reserved.clear()
    _reserved[named] = number
    return True


def is_claimed(config: RecipeConfig) -> bool:
    """Whether `claim` has given this process the settings' folder, or it trains in it."""
    if config.train.output_dir is None:
        return False
    folder = Path(config.train.output_dir)
    named = folder.absolute().parent.resolve() / folder.name
    return named in _reserved or (folder.is_dir() and _is_held(folder))


def _remove_leftovers(folder: Path) -> None:
    """What a killed command left beside its folder before that had its name: nothing holds its lock any more."""
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.????????.new"):
        with contextlib.suppress(OSError):
            number = os.open(left, os.O_RDONLY)
            if lock(number) and time.time() - os.fstat(number).st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
            os.close(number)


@functools.cache
def _say_unlocked(place: Path) -> None:
    log.warning("note: the file system of %s has no locks: do not start a second command on one run", place)


def _is_run_again(config: RecipeConfig, folder: Path) -> bool:
    """Whether the folder's name comes from the run.yaml in it."""
    file = Path(config.origins.get("train.output_dir", "").rpartition(":")[0])
    return file.name == "run.yaml" and file.resolve().parent == folder.resolve()


def _numbered(folder: Path, itself_first: bool) -> list[Path]:
    """A folder and its -2, -3, … that are there, the newest first."""
    later = [path for path in folder.parent.glob(f"{folder.name}-*") if path.name.rpartition("-")[2].isdigit()]
    later = sorted(later, key=lambda path: -int(path.name.rpartition("-")[2]))
    later = [path for path in later if path.name.rpartition("-")[0] == folder.name]
    return [folder, *later] if itself_first else [*later, folder]


def _next_free(folder: Path) -> Path:
    return next(_free_names(folder))


def _free_names(folder: Path) -> Iterator[Path]:
    """The folder, and its -2, -3, …, as far as nothing has these names."""
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return (path for path in itertools.chain([folder], names) if not path.exists())


def begin(config: RecipeConfig, ledger: Any, stamps: dict[str, Any]) -> Path:
    """Make the folder with what is known before training: run.yaml, ledger.json, and identity.json with `stamps`.

    A folder appears with all three or not at all. An unfinished run in it goes on; SettingsError where that was begun
    with other settings or stamps.
    """
    if config.train.output_dir is None:
        raise SettingsError("train.output_dir is unset: no folder was claimed for this run.", "Give output_dir=…")
    folder = Path(config.train.output_dir)
    identity = {"settings": settings_of(config), **json.loads(json.dumps(stamps)), "versions": versions()}
    identity["began_with"] = identity["versions"]
    goes_on = is_unfinished(folder)
    if goes_on:
        then = read_identity(folder)
        _compare(folder, then, identity, config)
        identity["began_with"] = then.get("began_with", then["versions"])
        if not _hold(folder):
            raise _taken(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise SettingsError(f"train.output_dir={folder} is not empty; nothing in it was touched.", "Choose another.")
    texts = {
        IDENTITY: json.dumps(identity, indent=1, ensure_ascii=False),
        "run.yaml": to_yaml(config, versions()),
        "ledger.json": json.dumps(ledger.to_json(), indent=1, ensure_ascii=False),
    }
    try:
        _write(folder, texts, goes_on)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written: {error.strerror or error}.", "Choose another place: output_dir=…"
        ) from None
    return folder


def _write(folder: Path, texts: dict[str, str], goes_on: bool) -> None:
    """The files into the folder, which this process locks: a new one appears with all of them. Where two commands do
    this at once, the folder is that of the first one."""
    if goes_on:
        for name, text in texts.items():
            write_whole(folder / name, text)
        return
    _remove_leftovers(folder)
    new = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
    new.mkdir(parents=True)
    number = None if os.name == "nt" else _locked(new, os.O_RDONLY)
    try:
        for name, text in texts.items():
            write_whole(new / name, text)
        new.replace(folder)  # locked before it has its name, it is never without
    except OSError as error:
        if number is not None:
            os.close(number)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another one was first
            raise _taken(folder) from None
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if number is not None:
        _keep(number)


def versions() -> dict[str, str]:
    """What ran: this package, Python and the libraries a result depends on."""
    names = {"finetune_kit": "finetune-kit", **{name: name for name in STACK}}
    found = {"python": platform.python_version()}
    for name, distribution in names.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
