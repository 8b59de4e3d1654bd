"""A run's folder: which name it gets, and the record of settings and versions in it."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.run_folder.identity import (
    STAMPS,
    changed,
    difference_of,
    read_identity,
    settings_of,
    short_text,
    versions,
)
from finetune_kit.run_folder.lock import hold, is_being_trained, keep_lock, open_locked, reserve
from finetune_kit.run_folder.naming import IDENTITY, free_names, is_unfinished, next_free, numbered
from finetune_kit.settings.load import to_yaml
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.files import lock, strange_in, write_whole

log = logging.getLogger(__name__)

ABANDONED = 60.0  # seconds; a folder younger than that may be about to be locked
RATE = (
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.warmup_steps",
    "train.decay_steps",
    "train.max_steps",
    "train.num_train_epochs",
)
# settings that a run can continue with changed, and then act from there on; those of `evaluate` act in any case
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


def claim(config: RecipeConfig) -> Path:
    """Decide the run's folder and put it into config.train.output_dir; nothing is created yet.

    An unfinished run of the same settings continues in its folder; config.allow_changed lists the settings that may
    differ. Else a folder that the user names must be free and writable (SettingsError). The default runs/<recipe>, and
    that of a run.yaml which is run again, is followed by -2, -3, …; a finished run, or one that another process trains,
    is never touched.
    """
    config.train.output_dir = str(distributed.from_main(lambda: _choose(config)))
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
        mine = next((path for path in numbered(folder, itself_first=again) if _goes_on(path, config)), None)
        if config.allow_changed and not mine:
            raise SettingsError("--allow-changed: no unfinished run differs from this one in these settings alone.")
        folder = mine if mine else next(path for path in free_names(folder) if reserve(path))
    elif is_unfinished(folder):
        _refuse_others(folder, config)
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        what = "holds another run" if (folder / "run.yaml").exists() else "is not empty"
        fix = f"Choose: output_dir={next_free(folder)}"
        raise SettingsError(f"train.output_dir={folder} {what}; nothing in it was touched.", fix)
    elif not reserve(folder):
        raise _taken(folder)
    _try_to_make(folder)
    return folder


def same_finished(config: RecipeConfig, folder: Path) -> Path | None:
    """A finished run of the same settings beside the folder that a run is given, such as runs/lora_sft for
    runs/lora_sft-2; None for none."""
    stem = folder.with_name(re.sub(r"-\d+$", "", folder.name))
    for other in numbered(stem, itself_first=False):
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


def _check_openable(keys: Sequence[str]) -> None:
    for key in keys:
        if key not in OPENABLE and not key.startswith("evaluate."):
            raise SettingsError(
                f"--allow-changed {key}: a run that has begun cannot continue with another one, or it would not act.",
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
    return set(changed(then, settings_of(config))) <= set(config.allow_changed) and hold(folder)


def _refuse_others(folder: Path, config: RecipeConfig) -> None:
    if is_being_trained(folder):
        raise _taken(folder)
    _check_plain(folder)
    _compare(folder, read_identity(folder), {"settings": settings_of(config)}, config)
    if not hold(folder):
        raise _taken(folder)


def _check_plain(folder: Path) -> None:
    """Raises SettingsError where a run that would continue holds what is neither a file nor a folder."""
    if (strange := strange_in(folder)) is not None:
        raise SettingsError(
            f"{strange} is not a plain file: reading or writing it could hang.",
            f"Remove it, or begin another run: output_dir={next_free(folder)}",
        )


def _taken(folder: Path) -> SettingsError:
    fix = f"Choose: output_dir={next_free(folder)}"
    return SettingsError(f"train.output_dir={folder} is being trained by another process.", fix)


def _compare(folder: Path, then: dict[str, Any], now: dict[str, Any], config: RecipeConfig) -> None:
    """Raises SettingsError where the unfinished run in `folder` was another one, with each difference."""
    free = f"Begin another run: output_dir={next_free(folder)}"
    settings = [key for key in changed(then["settings"], now["settings"]) if key not in config.allow_changed]
    if settings:
        was = [
            f"{key} {short_text(then['settings'].get(key))} → {short_text(now['settings'].get(key))}"
            for key in settings
        ]
        opened = all(key in OPENABLE or key.startswith("evaluate.") for key in settings)
        on = f"Continue with them: --allow-changed {','.join([*config.allow_changed, *settings])}   " if opened else ""
        raise SettingsError(f"{folder} holds an unfinished run with other settings: {', '.join(was)}.", on + free)
    stamps = [name for name in STAMPS if name in now and then.get(name) != now[name]]
    if stamps:
        was = [f"{STAMPS[name]} {difference_of(then.get(name), now[name])}" for name in stamps]
        raise SettingsError(f"{folder} holds an unfinished run of {', '.join(was)}.", free)


def _remove_leftovers(folder: Path) -> None:
    """What a killed command left beside its folder before that had its name: nothing holds its lock any more."""
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.name)}.????????.new"):
        with contextlib.suppress(OSError):
            number = os.open(left, os.O_RDONLY)
            if lock(number) and time.time() - os.fstat(number).st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
            os.close(number)


def _is_run_again(config: RecipeConfig, folder: Path) -> bool:
    """Whether the folder's name comes from the run.yaml in it."""
    file = Path(config.origins.get("train.output_dir", "").rpartition(":")[0])
    return file.name == "run.yaml" and file.resolve().parent == folder.resolve()


def begin(config: RecipeConfig, ledger: Any, stamps: dict[str, Any]) -> Path:
    """Make the folder with what is known before training: run.yaml, ledger.json, and identity.json with `stamps`.

    A folder appears with all three or not at all. An unfinished run in it continues; SettingsError where that was begun
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
        if not hold(folder):
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
    number = None if sys.platform == "win32" else open_locked(new, os.O_RDONLY)
    try:
        for name, text in texts.items():
            write_whole(new / name, text)
        if sys.platform == "win32" and folder.is_dir():
            folder.rmdir()  # an empty one would be in the way there, and only there
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
        keep_lock(number)
