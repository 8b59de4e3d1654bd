"""Locks on a run's folder: one process trains in it, and two commands never take one name."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.files import lock

log = logging.getLogger(__name__)


ASKED_FOR = 10  # tries at a lock which somebody may hold for the moment of a question
_held: list[int] = []  # the folder of the run that this process trains, open, so that its lock lasts as long as it
_reserved: dict[Path, int] = {}  # the name that this process has claimed, and its lock


def is_being_trained(folder: Path) -> bool:
    """Whether another living process trains in a folder. Nothing stays locked by asking.

    The lock is the kernel's and goes with the process, however that ends. Of a run's processes the main one asks.
    """
    if _is_held(folder):
        return False
    if sys.platform == "win32":
        return False  # folders cannot be opened there
    number = os.open(folder, os.O_RDONLY)
    try:
        return lock(number, shared=True) is False
    finally:
        os.close(number)


def _is_held(folder: Path) -> bool:
    return bool(_held) and os.path.samestat(os.fstat(_held[0]), folder.stat())


def hold(folder: Path) -> bool:
    """Lock a folder for this process, until it ends or holds another one; False where another process has it."""
    if sys.platform == "win32" or _is_held(folder):
        return True
    number = open_locked(folder, os.O_RDONLY)
    if number is not None:
        keep_lock(number)
    return number is not None


def keep_lock(number: int) -> None:
    for other in _held:
        os.close(other)
    _held[:] = [number]


def open_locked(path: Path, flags: int, tell: bool = True) -> int | None:
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


def reserve(folder: Path) -> bool:
    """Take a name for this process before there is a folder; False where another process has it.

    The lock is on a file of the system's folder for temporary ones, and goes with the process. Where that cannot be
    written nothing is reserved, and `begin` finds out.
    """
    named = folder.absolute().parent.resolve() / folder.name
    if sys.platform == "win32" or named in _reserved:
        return True
    home = Path(tempfile.gettempdir()) / f"finetune_kit-{os.getuid()}"
    file = home / f"{hashlib.sha256(os.fsencode(named)).hexdigest()[:32]}.lock"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        number = open_locked(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, tell=False)
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


@functools.cache
def _say_unlocked(place: Path) -> None:
    log.warning("note: the file system of %s has no locks: do not start a second command on one run", place)
