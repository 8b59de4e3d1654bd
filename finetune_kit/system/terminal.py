"""What reaches the terminal: text of data, names and models without control characters, and a word in every silence.

A model's answer, a file's name or a JSON key may hold escape sequences, which a terminal obeys: they can hide lines,
rename the window, or fill the keyboard's buffer. All consoles here show such characters in place of sending them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import ConsoleDimensions
from rich.segment import Segment

from finetune_kit import distributed
from finetune_kit.system import streams
from finetune_kit.system.streams import NO_ROOM as NO_ROOM

FIRST = 1.0  # seconds of silence before a piece of work is named where there is no terminal
PROGRESS = "progress"  # the thread that says so
GAP = 3.0  # seconds between two lines about it, and between anything said and the next one
GROWTH = (1.0, 10 / 3, 10.0, 20.0)  # times that after the first, second, … line about work of one name: logs stay short
WIDTH = 120  # columns where there is no terminal and COLUMNS does not say

# C0 but tab and line feed, as the pictures Unicode has of them; C1, line separators, and what turns the direction of
# writing round (CVE-2021-42574) or is half a character, as the sign for what cannot be shown
_SHOWN = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)} | {127: "\u2421"}
_SHOWN |= dict.fromkeys([*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")
_SHOWN |= dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def escaped(text: str) -> str:
    """The text with every character that a terminal would obey in place of showing as one that is shown."""
    return text.replace("\r\n", "\n").translate(_SHOWN)


def as_json(content: Any) -> str:
    """JSON for people and programs, of the same values, in which no character acts on a terminal."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    return "".join(f"\\u{ord(char):04x}" if ord(char) in _SHOWN else char for char in text)


class Console(streams.Voice):
    """rich's console, with every text escaped; its own colours and cursor moves stay."""

    @property
    def size(self) -> ConsoleDimensions:
        """rich's own is 80 columns where nothing says how many there are, as in a log."""
        found = super().size
        said = os.environ.get("COLUMNS", "").isdigit() or any(map(os.isatty, range(3)))
        return found if said or self.is_terminal or self._width is not None else found._replace(width=WIDTH)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def print(self, *objects: Any, **options: Any) -> None:
        """On a terminal prose wraps between words; a command stays in one piece, so that it can be copied."""
        _work.heard = time.monotonic()
        text = objects[0] if len(objects) == 1 and isinstance(objects[0], str) else ""
        if self.is_terminal and text and "python -m " not in text:
            options.setdefault("soft_wrap", False)
        super().print(*objects, **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


class Voice(Console):
    """A console whose lines are about data, so that square brackets in them are not markup."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"markup": False, **options})


# what a command says on the way, once
console = Voice(stderr=True, highlight=False, soft_wrap=True, quiet=not distributed.is_main())


def quiet_libraries() -> None:
    """Leave out what libraries say of themselves, and nothing that a user could fix."""
    # names that transformers and TRL will rename one day, used by themselves
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch)\.")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a package that is not needed
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO stands there; the pinned release has what is used
    os.environ.setdefault("TQDM_DISABLE", "1")  # training/progress.py says how far a run is


def guard() -> None:
    """Escape what comes from elsewhere, too: warnings of the log, and the traceback of a bug."""

    class Escaping(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return escaped(super().format(record))

    if logging.lastResort is not None:
        logging.lastResort.setFormatter(Escaping())
    sys.excepthook = lambda *error: sys.stderr.write(escaped("".join(traceback.format_exception(*error))))


class _Work:
    """The pieces of work in progress where there is no terminal, the inner ones last; a thread names the last one
    in a line after FIRST seconds, then wherever nothing has been said for GAP, and later for longer (GROWTH)."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.begun: list[str] = []  # the names that they began with
        self.lines: Counter[str] = Counter()  # about work that began with a name
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.since = 0.0  # the innermost one has its name
        self.began = 0.0  # it began, or continued
        self.due = 0.0
        self.heard = time.monotonic()  # anything was printed, or the program began

    def begin(self, what: str, after: float) -> None:
        with self.changed:
            self.names.append(what)
            self.begun.append(what)
            self._anew(after)
            if self.thread is None:
                self.thread = threading.Thread(target=self._watch, daemon=True, name=PROGRESS)
                self.thread.start()

    def end(self) -> None:
        with self.changed:
            self.names.pop()
            self.begun.pop()
            self._anew(GAP)

    def move(self, what: str) -> None:
        with self.changed:
            if self.names and self.names[-1] != what:
                self.names[-1], self.since = what, time.monotonic()

    def _grown(self, seconds: float) -> float:
        said = self.lines[self.begun[-1]] if self.begun else 0
        return seconds * GROWTH[min(said, len(GROWTH) - 1)]

    def _anew(self, after: float) -> None:
        """Short pieces of work, one after the other, are not a reason to be silent for longer than GAP."""
        self.since = self.began = time.monotonic()
        self.due = min(self.since + self._grown(after), max(self.since, self.heard + self._grown(GAP)))
        self.changed.notify_all()

    def _watch(self) -> None:
        """Waits while there is no work; ends with the process."""
        with self.changed:
            while True:
                if not self.names:
                    self.thread = None
                    return
                now = time.monotonic()
                rest = max(self.due, self.heard + self._grown(GAP) if self.heard > self.began else 0.0) - now
                if rest > 0:
                    self.changed.wait(rest)
                    continue
                passed = f" ({now - self.since:.0f} s)" if now - self.since >= GAP else ""
                self.lines[self.begun[-1]] += 1
                self.due, self.heard = now + self._grown(GAP), now
                with contextlib.suppress(ValueError, OSError):  # nobody listens any more
                    console.print(f"{self.names[-1]} …{passed}")
                self.changed.wait(0.01)  # lets the work that waits for the lock end


_work = _Work()
_lines: list[Callable[[str], None]] = []  # what shows a new name of the innermost work on a terminal


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Names a piece of work that may take longer than people like to look at nothing: "loading smollm2-135m"."""
    if not console.is_terminal:
        with _named(what, FIRST):
            yield
        return
    with console.status(f"{escaped(what)} …") as status, shown_by(lambda now: status.update(f"{escaped(now)} …")):
        yield


@contextlib.contextmanager
def shown_by(show: Callable[[str], None], what: str = "") -> Iterator[None]:
    """The same of work that has a bar on a terminal, where `show` is given what `moved` says."""
    if not console.is_terminal:
        with _named(what, GAP):
            yield
        return
    _lines.append(show)
    try:
        yield
    finally:
        _lines.remove(show)


@contextlib.contextmanager
def _named(what: str, after: float) -> Iterator[None]:
    if console.quiet:
        yield
        return
    _work.begin(what, after)
    try:
        yield
    finally:
        _work.end()


def moved(what: str) -> None:
    """The innermost piece of work has another name now, such as with the rows done in it."""
    if console.is_terminal and _lines:
        _lines[-1](what)
    _work.move(what)


def format_bytes(count: int) -> str:
    """Bytes, for people: 1.50 GiB, 96.0 MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
