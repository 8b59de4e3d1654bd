"""Prepared rows on disk, found again by the next command, the next run and the other processes of this one.

Below the user's cache folder each set has a folder of its own, named by a hash of all that its rows depend on: the
content of its files, the settings, the tokenizer with its template, this program and the libraries. It is written
beside its name and renamed, so a folder of that name is whole. Whoever comes first prepares; others wait for its lock
and map what it wrote. What has not been used for longest goes where the cache would grow beyond its bound.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_kit.data import tasks
from finetune_kit.data.files import data_files
from finetune_kit.errors import FinetuneKitError, SettingsError
from finetune_kit.models.embedded import cache_folder
from finetune_kit.settings.schema import DataConfig
from finetune_kit.system.files import lock, sha256

log = logging.getLogger(__name__)

FOLDER = "data"
FACTS = "facts.json"  # of a set: what it is, for people, and all that is not rows; written last
LIMIT = "FINETUNE_KIT_CACHE_GIB"
MOST_GIB = 32.0  # of prepared rows, unless LIMIT says otherwise; 0: none are kept
# that rows depend on, and what is made of them, which `datasets` keeps beside them (TRL's packing)
LIBRARIES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "trl")
POLL = 0.1  # seconds between two looks at somebody's lock
_in_use: dict[Path, int] = {}  # the sets that this process maps, with the locks by which nobody clears them


@dataclass(frozen=True)
class Kept:
    """A prepared set: what it was made of, its bytes on disk, when it was used last (seconds since 1970), and whether
    somebody uses it now."""

    folder: Path
    what: str
    bytes: int
    used: float
    in_use: bool


def home() -> Path:
    return cache_folder() / FOLDER


def key_of(config: DataConfig, kind: str, seed: int, tokenizer: Any) -> str | None:
    """The name of what these settings make of these files; None for rows that are not kept.

    These are generated ones, those of the Hub, those of a tokenizer that is not of the tokenizers library, and those
    that offer tools which depend on more than these settings. Raises SettingsError for a wrong LIMIT.
    """
    paths = [config.path] if isinstance(config.path, str) else list(config.path)
    paths += [config.held_out_path] if config.held_out_path else []
    if most_bytes() == 0 or not getattr(tokenizer, "is_fast", False) or {*config.tools} - {"calculator"}:
        return None
    if not type(tokenizer).__module__.startswith("transformers."):  # a class of somebody's, whose code is not known
        return None
    if any(path.startswith(tasks.PREFIX) or not Path(path).expanduser().exists() for path in paths if path):
        return None
    try:
        files = [[str(file), sha256(file)] for path in paths for file in _files(path)]
    except (FinetuneKitError, OSError):
        return None  # whoever reads them says so
    if not files:
        return None
    facts = [asdict(config), kind, seed, files, _of_tokenizer(tokenizer), _program(), *map(version, LIBRARIES)]
    if "strftime_now" in str(tokenizer.chat_template):  # a template that writes today's date
        facts.append(date.today().isoformat())
    written = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(written.encode("utf-8", "surrogatepass")).hexdigest()


def _files(path: str) -> list[Path]:
    local = Path(path).expanduser()
    if path and local.is_dir():
        return [file for files in data_files(local) for file in files]
    return [local] if path else []


def _of_tokenizer(tokenizer: Any) -> list[Any]:
    rules = tokenizer.backend_tokenizer
    if rules.padding is not None or rules.truncation is not None:  # how it happens to be used
        rules = type(rules).from_str(rules.to_str())
        rules.no_padding()
        rules.no_truncation()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    whole = rules.to_str().encode("utf-8", "surrogatepass")
    splits = bool(getattr(tokenizer, "split_special_tokens", False))
    return [hashlib.sha256(whole).hexdigest(), tokenizer.chat_template, special, type(tokenizer).__name__, splits]


@cache
def _program() -> str:
    """A hash of the code that makes rows of files."""
    own = Path(__file__).parents[1]
    files = sorted(file for name in ("data", "tools", "system") for file in (own / name).rglob("*.py"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Inside, no other process prepares the set of that name; it waits for this one. Raises OSError."""
    home().mkdir(mode=0o700, parents=True, exist_ok=True)
    number = os.open(home() / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while lock(number) is False:  # None: a file system without locks, where several may prepare the same
            time.sleep(POLL)
        yield
    finally:
        os.close(number)


def found(name: str) -> tuple[Path, dict[str, Any]] | None:
    """A prepared set and its facts, which nobody clears as long as this process lives; None where there is none."""
    folder = home() / name
    number = None if folder in _in_use or not folder.is_dir() else _locked(folder, shared=True)
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):  # there is none, or somebody clears it
        _unlock(number)
        return None
    if number is not None:
        _in_use[folder] = number
    with suppress(OSError):  # a cache that is only read
        os.utime(folder / FACTS)
    return folder, facts


def _locked(folder: Path, shared: bool = False) -> int | None:
    """A folder, open and locked; None where another process has it, or there are no such locks."""
    if sys.platform == "win32":
        return None  # folders cannot be opened there; nor can a file that is in use be removed
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if lock(number, shared=shared) is not False:
        return number
    os.close(number)
    return None


def _unlock(number: int | None) -> None:
    if number is not None:
        os.close(number)


@contextmanager
def writing(name: str, facts: dict[str, Any]) -> Iterator[Path]:
    """A folder beside the set's, which gets its name where all goes well and the cache's bound allows it.

    Raises OSError.
    """
    with tempfile.TemporaryDirectory(dir=home(), prefix=f".{name[:12]}-") as scratch:
        whole = Path(scratch) / "set"
        whole.mkdir()
        yield whole
        (whole / FACTS).write_text(json.dumps(facts))
        if (size := size_of(whole)) <= most_bytes():
            make_room(most_bytes() - size)
            if found(name) is None:  # where there are no locks another process may have been first
                shutil.rmtree(home() / name, ignore_errors=True)
                whole.rename(home() / name)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def most_bytes() -> int:
    """The cache's bound. Raises SettingsError."""
    asked = os.environ.get(LIMIT, "")
    try:
        most = float(asked or MOST_GIB)
        if not 0 <= most < 2**30:
            raise ValueError
    except ValueError:
        raise SettingsError(f"{LIMIT}={asked}: expected a number of GiB.", f"Such as {LIMIT}=100, or 0") from None
    return int(most * 2**30)


def sets() -> list[Kept]:
    """The prepared sets, the one that was used last first."""
    kept = []
    for folder in home().iterdir() if home().is_dir() else ():
        try:
            facts = json.loads((folder / FACTS).read_bytes())
            used = (folder / FACTS).stat().st_mtime
            number = None if folder in _in_use else _locked(folder)
            kept.append(Kept(folder, str(facts["what"]), size_of(folder), used, number is None))
            _unlock(number)
        except (OSError, ValueError, KeyError):
            continue  # a lock, or what another process writes
    return sorted(kept, key=lambda one: -one.used)


def clear(some: list[Kept]) -> int:
    """Remove sets that nobody uses; the bytes that this frees."""
    freed = 0
    for one in some:
        number = None if one.folder in _in_use else _locked(one.folder)
        if number is not None or sys.platform == "win32":
            shutil.rmtree(one.folder, ignore_errors=True)
            one.folder.with_name(f"{one.folder.name}.lock").unlink(missing_ok=True)
            freed += one.bytes
        _unlock(number)
    return freed


def release() -> None:
    """Let others clear what this process has mapped."""
    for folder in list(_in_use):
        _unlock(_in_use.pop(folder))


def make_room(most: int) -> None:
    """Let the cache have at most so many bytes: what has not been used for longest goes first."""
    total = 0
    for one in sets():
        total += one.bytes
        if total > most:
            total -= clear([one])
