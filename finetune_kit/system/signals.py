"""SIGTERM and SIGINT, from the first import to the last line: which came, and what a command ends with after one.

The first signal raises Interrupted wherever the command is, so that it tidies up, or is only noted while steps are
being taken (`deferred`). Libraries turn a KeyboardInterrupt into errors of their own, or swallow it: who wants to know
what ended a command asks `came`, not the exception; and what has not ended after GRACE seconds is ended. A second
signal ends at once: nothing counts before it is whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

RESUMABLE, TERMINATED, INTERRUPTED = 75, 143, 130  # exit codes: EX_TEMPFAIL, 128 + SIGTERM, 128 + SIGINT
GRACE = 10.0  # seconds for tidying up
HEEDED = (signal.SIGTERM, signal.SIGINT)

came: list[str] = []  # the signals that came, by name
_starting = False  # nothing to tidy up: imports alone, or the very end
_deferring = False
_resumable = False  # the same command would continue where this one stops
_ending: list[threading.Timer] = []


class Interrupted(KeyboardInterrupt):
    """A signal came. Libraries know a KeyboardInterrupt, and tidy up after it."""


def install() -> None:
    """Heed both from here on; until `started` one ends the process at once. Before any other import."""
    global _starting, _resumable
    _starting, _resumable = True, "run" in sys.argv[1:2]
    for number in HEEDED:
        signal.signal(number, _on_signal)


def started(whether: bool = True) -> None:
    """From here on a signal raises; with False, when all is tidied up, it ends the process at once again."""
    global _starting
    _starting = not whether


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """The same inside a `with`, for a process that did not begin with `install`; what came is forgotten at its end."""
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in HEEDED}
    forget()
    started()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        forget()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """In here the first signal is only noted."""
    global _deferring
    _deferring = True
    try:
        yield
    finally:
        _deferring = False


def resumable(whether: bool) -> None:
    """Say whether the same command would continue where this one would stop now."""
    global _resumable
    _resumable = whether


def is_resumable() -> bool:
    return _resumable


def forget() -> None:
    """It was meant for something smaller than the command."""
    came.clear()
    while _ending:
        _ending.pop().cancel()


def exit_code() -> int:
    """What a command that was stopped ends with."""
    if "SIGTERM" not in came and came:
        return INTERRUPTED
    return RESUMABLE if _resumable else TERMINATED


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    second = bool(came)
    came.append(name)
    if second:
        _end(f"stopped at once by a second signal, {name}")
    if _starting:
        _end(f"stopped: by {name}")
    if _deferring:
        _say(f"{name}: stopping after this step")
        return
    timer = threading.Timer(GRACE, _end, [f"stopped: by {name}"])
    timer.daemon = True
    timer.start()
    _ending.append(timer)
    raise Interrupted(name)


def _end(text: str) -> None:
    _say(text)
    os._exit(exit_code())


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever listened may be gone
        os.write(2, f"\n{text}\n".encode())
