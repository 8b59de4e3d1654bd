"""Standard output and error, which may be closed, on a full disk, or unable to write more than ASCII."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import Any

from rich.console import Console

from finetune_kit.errors import ResourceError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EPIPE, errno.EIO, errno.EBADF)  # a pipe without a reader, a terminal that is gone, `>&-`

_lost: list[OSError] = []  # what kept a line of standard output from being written


class Voice(Console):
    """A console whose stream may go away or fill up: that costs lines, not the run."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            if error.errno not in (*NO_ROOM, *CLOSED):
                raise
            if not self.stderr:
                _lost.append(error)

    def on_broken_pipe(self) -> None:
        """rich would end the process here."""
        free_memory(self.file)


def write(text: str, end: str = "\n") -> None:
    """Text for standard output as it is, at once; what cannot be written is told by `check_written`."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        _lost.append(error)


def free_memory(stream: Any) -> None:
    """Send what else is written nowhere, so that nothing complains when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, stream.fileno())
        os.close(devnull)


def check_written() -> None:
    """Raises ResourceError where standard output could not be written, and is quiet where its reader has gone."""
    if sys.stdout is not None:  # `>&-`
        try:
            sys.stdout.flush()
        except OSError as error:
            _lost.append(error)
    if not _lost:
        return
    lost = _lost[0]
    _lost.clear()
    free_memory(sys.stdout)  # what is in its buffer would be tried again
    if lost.errno in NO_ROOM:
        raise ResourceError(f"Standard output cannot be written: {lost.strerror}.", "Send it elsewhere.")


def spell_out() -> None:
    r"""Let both streams write what their encoding lacks as \u2192, which is also how JSON writes it."""
    codecs.register_error("finetune_kit.spelt", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="finetune_kit.spelt")


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2)), error.end
