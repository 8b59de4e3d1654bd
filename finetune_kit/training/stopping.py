"""SIGTERM and SIGINT in a run: finish the step, keep it, and say how to continue; a second signal ends at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_kit.errors import Stopped
from finetune_kit.system import signals

finishing_steps = signals.deferred  # in here the first signal is only noted: see `asked`


@contextmanager
def stop_on_signals(folder: Path) -> Iterator[None]:
    """SIGTERM and SIGINT become the error Stopped: at once, or after the step where steps are being taken.

    Whatever a library made of a signal, an error of another kind is none while one has come.
    """
    with signals.heeded():
        signals.resumable(True)
        try:
            yield
        except BaseException as error:
            if not signals.came or isinstance(error, Stopped):
                raise
            raise stopped(folder) from error


def asked(accelerator: Any) -> bool:
    """Whether a signal came, to any of the processes; each of them must ask after each step."""
    if accelerator.num_processes == 1:
        return bool(signals.came)
    import torch

    came = torch.tensor(float(bool(signals.came)), device=accelerator.device)
    return bool(accelerator.reduce(came, "sum") > 0)


def stopped(folder: Path) -> Stopped:
    """The error that ends the run, with how to continue."""
    from finetune_kit.training.checkpoint import checkpoints

    by = signals.came[0] if signals.came else "another process"
    command = shlex.join(["python", "-m", "finetune_kit", *sys.argv[1:]])
    kept = checkpoints(folder)
    if (folder / "report.json").is_file():
        signals.resumable(False)
        error = Stopped(f"by {by}; the run in {folder} is finished")
    else:
        where = f"{kept[-1]} is what it resumes from" if kept else "before its first checkpoint, so that it starts over"
        error = Stopped(f"by {by}; {where}, with the same command: {command}")
    error.exit_code = signals.exit_code() if signals.came else signals.RESUMABLE
    return error
