"""What operating systems and file systems have or lack: locks, memory limits, a folder's fsync."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
resource: ModuleType | None
try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def lock(number: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder for this process, `shared` with others that ask so: True where it has it now, False
    where another one has, None where the file system, or the system, has no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network file systems: no locks, or none on a folder
        return None
    return True


def strange_in(folder: Path) -> Path | None:
    """What in a folder, or in one below it, is neither a file nor a folder: a pipe is waited for, a device never ends.
    None where there is no such thing. Links are followed, those to folders aside."""
    for here, folders, files in os.walk(folder):
        for name in sorted([*files, *folders]):
            path = Path(here, name)
            if path.exists() and not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
                return path
    return None


def sync_folder(folder: Path) -> None:
    """Names in a folder are kept by its own fsync, not by those of its files; nothing where folders have none."""
    if sys.platform == "win32":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path: Path, text: str) -> None:
    """A text file that is there whole or not at all, whenever the process or the machine dies."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def peak_memory() -> int:
    """Most memory that this process has had, in bytes."""
    if resource is not None:
        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    import psutil

    return int(psutil.Process().memory_info().peak_wset)


def sha256(path: Path, sync: bool = False) -> str:
    """A file's SHA-256 in hexadecimal; with `sync`, of what has reached the disk."""
    writes = sync and sys.platform == "win32"  # where a file that is only read cannot be written out
    with path.open("r+b" if writes else "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
