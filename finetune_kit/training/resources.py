"""What a run does when memory or the disk is too small: fewer rows at once, a checkpoint left out, but no lost run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import ResourceError
from finetune_kit.settings.schema import TrainConfig
from finetune_kit.system.streams import NO_ROOM
from finetune_kit.system.terminal import format_bytes
from finetune_kit.training import checkpoint
from finetune_kit.training.progress import console

MOST_FAILED_SAVES = 3
SPARE = 16 * 2**20  # bytes left on the disk for the run's small files
REHEARSED = 64 * 2**20  # bytes of weights that are written before the first step, at most
FAILED = (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENXIO, errno.ENODEV)
FULL_DISK = ("No space left", "unexpected pos", "File too large", "Disk quota", "file write failed", "write failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, on any device."""
    # CUDA and MPS: "out of memory"; the CPU allocator: "not enough memory" or "can't allocate memory"
    signs = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, RuntimeError | MemoryError) and any(sign in str(error) for sign in signs)


def fewer(rows: int) -> int:
    """Half of a batch, or the largest part that divides it: the product with the passes stays whole."""
    return next(part for part in range(rows // 2, 0, -1) if rows % part == 0)


def reduce_batch_size(trainer: Any, model: Any) -> int:
    """Let a trainer of transformers take half as many rows at once, in twice as many passes: the same step.

    Returns the rows. Raises ResourceError where one row alone does not fit, for trainers that sample in groups, and
    with several processes, the others of which are in the middle of the step.
    """
    args = trainer.args
    rows = int(args.per_device_train_batch_size)
    if rows == 1 or hasattr(args, "num_generations") or trainer.accelerator.num_processes > 1:
        raise too_large(rows, args.gradient_checkpointing, model)
    taken = fewer(rows)
    args.per_device_train_batch_size = taken
    args.gradient_accumulation_steps *= rows // taken
    trainer._train_batch_size = args.train_batch_size  # what the trainer took it from when it was made
    empty_cache()
    console.print(
        f"note: {rows} rows at once do not fit into memory: continuing with {taken} rows in "
        f"{args.gradient_accumulation_steps} passes, which makes the same step"
    )
    return taken


def too_large(rows: int, checkpointing: bool, model: Any) -> ResourceError:
    levers = [] if checkpointing else ["train.gradient_checkpointing=true (about 1.3x the time)"]
    levers += ["a smaller data.max_length"]
    levers += ["run qlora_sft (4-bit weights)" if hasattr(model, "peft_config") else "an adapter: run lora_sft"]
    levers += ["a smaller model"]
    return ResourceError(
        f"Out of memory in training with {rows} row{'s' if rows > 1 else ''} at once.",
        f"The cheapest ways out: {'; '.join(levers[:3])}.",
    )


def empty_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bytes_of_checkpoint(model: Any, folder: Path) -> int:
    """What the next checkpoint will take: as much as the last one, or trained weights with two moments each."""
    last = next(iter(reversed(checkpoint.checkpoints(folder))), None)
    if last is not None:
        return sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    return 12 * _trained(model)


def _trained(model: Any) -> int:
    """Numbers that are trained."""
    return sum(int(parameter.numel()) for parameter in model.parameters() if parameter.requires_grad)


def check_start(model: Any, train: TrainConfig, folder: Path) -> None:
    """Raises ResourceError where the disk has no room for what the run leaves and one checkpoint on the way to it."""
    weights = 4 * _trained(model)
    needed = weights + (bytes_of_checkpoint(model, folder) if train.save_steps or train.eval_steps else 0) + SPARE
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"The disk of {folder} has {format_bytes(free)} free; the run leaves about {format_bytes(needed)}.",
            "Make room, or put the run elsewhere: output_dir=…",
        )


def rehearse_save(model: Any, folder: Path) -> None:
    """Write trained weights as a checkpoint is written and committed, read them back, and remove them.

    Raises ResourceError where that fails: a quota, a disk that is full or read-only, a file system that cannot sync.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    trial = folder / f"{checkpoint.TRASH}rehearsal"  # removed with the rest where a killed process leaves it
    weights, size = {}, 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and size < REHEARSED:
            weights[name] = parameter.detach().cpu().contiguous()
            size += weights[name].nbytes
    try:
        trial.mkdir(exist_ok=True)
        save_file(weights, trial / "weights.safetensors")
        checkpoint.commit(trial, {})
        failed = checkpoint.broken(trial)
    except (OSError, SafetensorError) as error:
        failed = first_line(error)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    if failed:
        raise ResourceError(
            f"A checkpoint cannot be written into {folder}: {failed}.",
            "Make room, or put the run elsewhere: output_dir=…",
        )


class Disk:
    """Writes checkpoints where there is room for them, and counts those that could not be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = 0

    def write(self, model: Any, accelerator: Any, *parts: Callable[[], None]) -> bool:
        """Write a checkpoint, a part after the other; all processes call it, and continue to the next part together.

        False where the disk has no room for it, or fills up in the middle: what is half written is removed, a line says
        so, and training can continue. Raises ResourceError after the third in a row. Of a model that is cut into shards
        the parts gather weights, so that a process cannot leave them alone: there the error of the disk is raised.
        """
        needed, free = bytes_of_checkpoint(model, self.folder) + SPARE, shutil.disk_usage(self.folder).free
        why = (
            ""
            if free >= needed
            else f"the disk has {format_bytes(free)} free, a checkpoint needs {format_bytes(needed)}"
        )
        for part in parts:
            if not all_agree(accelerator, not why):
                break
            try:
                part()
            except Exception as error:  # each library that writes has its own class for it
                if not (is_full_disk(error) or failed_disk(error, self.folder)) or distributed.sharding():
                    raise
                why = first_line(error)
        if all_agree(accelerator, not why):
            self.failed = 0
            return True
        if distributed.is_main():
            remove_halves(self.folder)
        self.failed += 1
        why = why or "another process could not write its part"
        if self.failed >= MOST_FAILED_SAVES:
            raise full(self.folder, f"{self.failed} checkpoints in a row could not be written: {why}.")
        console.print(
            f"note: no checkpoint is written: {why}. Training continues, and tries again at the next one.", markup=False
        )
        return False


def remove_halves(folder: Path) -> None:
    """Remove what was left in the middle of writing; a checkpoint that counts has its manifest."""
    for path in folder.glob(f"{checkpoint.PREFIX}*"):
        if path.is_dir() and not (path / checkpoint.MANIFEST).is_file():
            shutil.rmtree(path, ignore_errors=True)


def all_agree(accelerator: Any, well: bool) -> bool:
    """Whether something holds in every process; each of them has to ask."""
    if accelerator.num_processes == 1:
        return well
    import torch

    return float(accelerator.reduce(torch.tensor(float(not well), device=accelerator.device), reduction="sum")) == 0


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk, or one's share of it, is full."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return True
    return any(sign in str(error) for sign in FULL_DISK)


def failed_disk(error: BaseException, folder: Path) -> bool:
    """Whether an error is the operating system's about a file in a folder, or one that any file there would meet."""
    if not isinstance(error, OSError):
        return "I/O error" in str(error)  # safetensors
    named = [Path(os.fsdecode(name)).absolute() for name in (error.filename, error.filename2) if isinstance(name, str)]
    return error.errno in FAILED or any(path.is_relative_to(folder.absolute()) for path in named)


@contextlib.contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns a full or failing disk into ResourceError: `what` was not written, what is kept, how to continue."""
    try:
        yield
    except Exception as error:  # each library that writes has its own class for it
        if isinstance(error, ResourceError) or not (is_full_disk(error) or failed_disk(error, folder)):
            raise
        remove_halves(folder)
        raise full(folder, f"{what} could not be written: {first_line(error)}.") from error


def full(folder: Path, what: str) -> ResourceError:
    """The error that ends a run whose disk is full: what happened, the last good checkpoint, and how to continue."""
    last = next(iter(reversed(checkpoint.checkpoints(folder))), None)
    kept = f"The last good checkpoint is {last}." if last else "There is no checkpoint yet."
    on = "resumes from there" if last else "starts over"
    return ResourceError(f"{what} {kept}", f"Make room, and run the same command again: it {on}.")


def first_line(error: BaseException) -> str:
    """What an error says, for the middle of a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
