"""The processes of one run, as `accelerate launch` or torchrun started them. Alone, every function here costs nothing.

All processes go through the same code. Where one of them has to act for all (`from_main`), or each does a share of the
work (`spread`), the others wait for what comes of it, so these functions are called by all or by none.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from finetune_kit.errors import FinetuneKitError, SettingsError

Result = TypeVar("Result")

CONFIG = "accelerate launch --config_file accelerate_config.yaml --num_processes 2 -m finetune_kit run …"
FAILED = "finetune_kit/failed"  # in the launcher's store: rank and exit code of the process that failed first
POLL = 0.5  # seconds between two looks at it
GRACE = 10.0  # seconds in which the others may end by themselves, such as by keeping their last good state


def rank() -> int:
    """This process's number, 0 for the main one."""
    return int(os.environ.get("RANK", 0))


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def sharding() -> str:
    """What the launcher was told to cut the model by: "FSDP", "DeepSpeed", or "" where each process has all of it."""
    asked = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, variable in asked.items() if os.environ.get(variable, "").lower() == "true"), "")


def is_launched() -> bool:
    """Whether a launcher started this process, alone or with others; if so, `start` is due."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "WORLD_SIZE" in os.environ


def start(on_cpu: bool) -> None:
    """Join the other processes, and make all but the main one silent. Once, before anything is read or written.

    Raises SettingsError where there are not as many as `accelerate launch` was asked for, or no number of this one.
    """
    if count() > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise SettingsError(
            f"WORLD_SIZE={count()} is set, but not which of these processes this one is (RANK, LOCAL_RANK).",
            f"Start all of them: {CONFIG}, or for one process: unset WORLD_SIZE",
        )
    asked = _asked()
    if asked is not None and asked != count():
        raise SettingsError(
            f"accelerate launch was asked for {asked} processes, and started {count()}.",
            f"Its --cpu and MULTI_CPU start one; this starts two, on CPUs, too: {CONFIG}",
        )
    if sharding() and on_cpu:
        raise SettingsError(
            f"{sharding()} was asked for, and accelerate does not shard on a CPU: it would train plain data parallel.",
            f"On CPUs: {CONFIG}",
        )
    if count() == 1:
        return
    from accelerate import PartialState

    PartialState(cpu=on_cpu)  # the group, and each process's device
    if not is_main():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    _watch()


def _asked() -> int | None:
    """How many processes the `accelerate launch` above this one was asked for; None where there is none to be read.

    Its one-process launcher tells its child nothing of it, so its own words are read, by its own parser.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return None  # torchrun's agent starts as many as it says
    import psutil
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    try:
        words = psutil.Process(os.getppid()).cmdline()
        at = next(place for place, word in enumerate(words) if word.endswith(("accelerate", "accelerate-launch")))
        launched = words[at + 2 :] if words[at + 1 : at + 2] == ["launch"] else words[at + 1 :]
        logging.disable(logging.WARNING)  # it has said its notes
        asked = _validate_launch_command(launch_command_parser().parse_args(launched))[0].num_processes
        return int(asked) or 1  # without a GPU it counts none, and starts one
    except (psutil.Error, StopIteration, SystemExit, ValueError, TypeError, OSError):
        return None
    finally:
        logging.disable(logging.NOTSET)


def finish() -> None:
    """Leave the others."""
    if count() > 1:
        _distributed().destroy_process_group()


def barrier() -> None:
    """Continue when all are here."""
    if count() > 1:
        _distributed().barrier()


def from_main(make: Callable[[], Result]) -> Result:
    """What `make` gives on the main process, on all of them; an error of a user's making is raised on all."""
    if count() == 1:
        return make()
    found: Result | None = None
    failed: FinetuneKitError | None = None
    if is_main():
        try:
            found = make()
        except FinetuneKitError as error:
            failed = error
    stop_together(failed)
    given = [found]
    _distributed().broadcast_object_list(given, src=0)
    return given[0]  # type: ignore[return-value]  # what the main process made


def stop_together(failed: FinetuneKitError | None) -> None:
    """Raises on all processes the error that one of them has met; alone it would leave the others waiting."""
    if count() > 1:
        said: list[Any] = [None] * count()
        mine = failed and (type(failed), failed.message, failed.fix)
        _distributed().all_gather_object(said, mine)
        first = next((one for one in said if one), None)
        if first and failed is None:
            kind, message, fix = first
            failed = kind(message, fix)
    if failed is not None:
        raise failed


def spread(number: int, work: Callable[[list[int]], Sequence[Result]], everyone_all: bool = False) -> list[Result]:
    """`work` on the places 0 … number - 1, each process its share; all get the results of all, in order.

    `everyone_all`: each does the whole of it, in step with the others, as a model needs that is cut into shards.
    """
    if count() == 1 or everyone_all:
        return list(work(list(range(number))))
    mine = list(range(rank(), number, count()))
    parts: list[Any] = [None] * count()
    _distributed().all_gather_object(parts, list(work(mine)))
    return [parts[place % count()][place // count()] for place in range(number)]


def where(model: Any) -> str:
    """What a model is computed on, for people."""
    many = f"{count()} processes, each on " if count() > 1 else ""
    return f"{many}{model.device.type}"


def is_sharded(model: Any) -> bool:
    """Whether each process holds a part of the weights alone, so that all have to compute together."""
    if count() == 1 and not sharding():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") for parameter in model.parameters())


def fails_first(code: int) -> bool:
    """Call just before exiting with `code`: whether this process is the first to fail, whose message counts."""
    if count() == 1 or "MASTER_ADDR" not in os.environ:
        return True
    try:
        mine = f"{rank()} {code}"
        return bool(_store().compare_set(FAILED, "", mine).decode() == mine)
    except RuntimeError:  # the launcher is gone already
        return is_main()


def _watch() -> None:
    """Look out for a process that fails, in a thread that is gone before the interpreter is.

    One that is still inside the store's C++ when the interpreter goes is torn out of it: std::terminate, signal 6.
    """
    ending = threading.Event()
    watcher = threading.Thread(target=_end_with_the_others, args=(ending,), daemon=True)
    watcher.start()

    @atexit.register
    def leave() -> None:
        ending.set()
        watcher.join(GRACE)


def _end_with_the_others(ending: threading.Event) -> None:
    """Wait for a process that fails, and end this one after it: inside a collective nothing else would."""
    store = _store()
    while not ending.wait(POLL):
        try:
            failed = store.check([FAILED])
        except RuntimeError:
            return
        if failed:
            first, code = store.get(FAILED).decode().split()
            if int(first) != rank() and not ending.wait(GRACE):
                os._exit(int(code))
            return


def _store() -> Any:
    """A connection of its own to the store that the launcher keeps for its processes."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _distributed().TCPStore(*where, is_master=False, wait_for_workers=False)


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
