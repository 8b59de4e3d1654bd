"""SIGTERM and SIGINT: finish the step, keep it, and end with exit code 75; a second signal ends at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from finetune_kit.errors import Stopped

_asked: list[str] = []  # the signals that came, by name
_in_steps = False


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if _asked:  # nothing counts before it is whole, so that there is nothing to tidy up
        os.write(2, f"\nstopped at once by a second signal, {name}\n".encode())
        os._exit(Stopped.exit_code)
    _asked.append(name)
    if not _in_steps:
        raise KeyboardInterrupt
    os.write(2, f"\n{name}: stopping after this step\n".encode())


@contextmanager
def heeding_signals(folder: Path) -> Iterator[None]:
    """SIGTERM and SIGINT become the error Stopped: at once, or after the step where steps are being taken."""
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    _asked.clear()
    try:
        yield
    except KeyboardInterrupt:
        if not _asked:  # raised by something else
            raise
        raise stopped(folder) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


@contextmanager
def finishing_steps() -> Iterator[None]:
    """In here the first signal is only noted: see `asked`."""
    global _in_steps
    _in_steps = True
    try:
        yield
    finally:
        _in_steps = False


def asked(accelerator: Any) -> bool:
    """Whether a signal came, to any of the processes; each of them must ask after each step."""
    if accelerator.num_processes == 1:
        return bool(_asked)
    import torch

    return bool(accelerator.reduce(torch.tensor(float(bool(_asked)), device=accelerator.device), "sum") > 0)


def stopped(folder: Path) -> Stopped:
    """The error that ends the run, with how to go on."""
    from finetune_kit.training.checkpoint import checkpoints

    by = _asked[0] if _asked else "another process"
    kept = checkpoints(folder)
    where = f"{kept[-1]} is what it goes on from" if kept else "before its first checkpoint, so that it begins anew"
    command = shlex.join(["python", "-m", "finetune_kit", *sys.argv[1:]])
    return Stopped(f"by {by}; {where}, with the same command: {command}")
