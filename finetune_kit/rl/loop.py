"""Run PPO's updates: resumed from a checkpoint, within the memory there is, watched, logged and kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from finetune_kit import distributed
from finetune_kit.errors import DataError, NumericsError
from finetune_kit.rl.checkpoint import Snapshot, read_checkpoint, write_checkpoint
from finetune_kit.rl.watch import CAUSES, collapse
from finetune_kit.run_folder.identity import read_identity
from finetune_kit.run_folder.naming import is_unfinished
from finetune_kit.system.terminal import doing
from finetune_kit.training import checkpoint, resources, stopping
from finetune_kit.training.progress import peak_memory_gib

if TYPE_CHECKING:
    from finetune_kit.rl.ppo import PPOTrainer

Result = TypeVar("Result")


def fits_beside(state: Snapshot, device: torch.device) -> bool:
    """Whether a GPU has room for two such states beside the most that this process has taken so far, with a tenth left
    for what differs between updates."""
    if device.type != "cuda":
        return False
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return 2 * size < 0.9 * (total - others - torch.cuda.max_memory_allocated(device))


class Loop:
    """All updates of a trainer, in its run's folder."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer, self.config, self.record = trainer, trainer.config, trainer.record
        self.folder = trainer.record.path.parent
        self.disk = resources.Disk(self.folder)

    def run(self) -> list[dict[str, float]]:
        """All updates, from the newest whole checkpoint in the run's folder, or from where this trainer is.

        The value is saved beside the policy, which is left without it.

        Raises NumericsError (not finite, or a watchdog) and DataError (a reward), the last good state in a checkpoint;
        Stopped after a signal.
        """
        trainer, train = self.trainer, self.config.train
        self.folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        if trainer.is_main:
            self._announce()
        resources.check_start(trainer.model, train, self.folder)
        if train.save_steps:
            with doing("trying to save"):
                distributed.from_main(lambda: resources.rehearse_save(trainer.model, self.folder))
        if trainer.is_main:
            self.record.on_train_begin(None, SimpleNamespace(global_step=trainer.step, max_steps=trainer.updates), None)
        try:
            trainer.states = 2 * [trainer.snapshot()]
            with stopping.finishing_steps():
                if trainer.step < trainer.updates:
                    with doing("trying the longest rows"):
                        self._fitting(trainer.try_longest)
                while trainer.step < trainer.updates and trainer.constant < self.config.max_constant_updates:
                    try:
                        line = self._fitting(trainer.update)
                        self._log(line)
                        if (reason := self._why_stop(line)) is not None:
                            raise NumericsError(f"{reason}, at update {trainer.step}.", CAUSES)
                    except (NumericsError, DataError) as error:
                        # what is wrong with a state shows in what it samples: the one ahead of it is the last good
                        raise type(error)(f"{error.message} {self._leave(trainer.states[0])}", error.fix) from None
                    del trainer.states[0]
                    if trainer.beside is None:
                        trainer.beside = fits_beside(trainer.states[0], trainer.model.device)
                    trainer.states.append(trainer.snapshot())
                    if stopping.asked(trainer.accelerator):
                        self._keep(trainer.states[-1])
                        raise stopping.stopped(self.folder)
                    if train.save_steps and trainer.step % train.save_steps == 0:
                        self._keep(trainer.states[-1])
            if trainer.constant >= self.config.max_constant_updates:
                self.record.say(f"All completions of {trainer.constant} updates scored alike: nothing more to learn.")
            if train.save_steps:
                self._keep(trainer.states[-1])
        finally:
            self.record.close()
        trainer.put_value_aside(self.folder)
        return self.record.history

    def _resume(self) -> None:
        """From the newest whole checkpoint of the run begun in the folder, unless this trainer is past its start."""
        if self.trainer.step or not is_unfinished(self.folder):
            return
        found = distributed.from_main(lambda: checkpoint.newest_whole(self.folder))
        if found is None:
            self.record.restore({})
            return
        checkpoint.check_steps(found, self.trainer.updates)
        snapshot = read_checkpoint(found)
        self.trainer.restore(snapshot)
        self.record.restore(snapshot.record)
        then, now = checkpoint.read_manifest(found)["settings"], self._facts()["settings"]
        if then != now:
            checkpoint.reopen(self.trainer.optimizer, self.trainer.scheduler, then, now)

    def _fitting(self, act: Callable[[], Result]) -> Result:
        """What `act` gives, an update; where it runs out of memory it is made again: without the states that were kept
        on the device, then with half as many rows in a forward pass."""
        while True:
            try:
                return act()
            except (RuntimeError, MemoryError) as error:
                if not resources.out_of_memory(error):
                    raise
            # here, where no traceback holds its tensors any more
            self.trainer.optimizer.zero_grad()
            train, before = self.config.train, self.trainer.states[-1]
            if self.trainer.beside and self.trainer.accelerator.num_processes == 1:
                self.trainer.beside = False
                for state in self.trainer.states:
                    state.tensors.update({name: tensor.cpu() for name, tensor in state.tensors.items()})
                resources.empty_cache()
                self.trainer.restore(before)
                continue
            rows = train.per_device_train_batch_size
            if rows == 1 or self.trainer.accelerator.num_processes > 1:
                raise resources.too_large(rows, train.gradient_checkpointing, self.trainer.model)
            train.per_device_train_batch_size = resources.fewer(rows)
            resources.empty_cache()
            if self.trainer.is_main:
                taken = train.per_device_train_batch_size
                self.record.say(f"note: {rows} rows at once do not fit into memory: continuing with {taken}")
                self.record.write({"step": before.numbers["step"], "per_device_train_batch_size": taken})
            self.trainer.restore(before)

    def _announce(self) -> None:
        prompts, batch_size = len(self.trainer.prompts), self.config.batch_size
        if self.trainer.padded_because and self.config.train.padding_free:
            self.record.say(f"note: padded batches: {self.trainer.padded_because}")
        if prompts < batch_size:
            times = batch_size / prompts
            self.record.say(f"note: fewer prompts than batch_size={batch_size}: each is in an update {times:.3g} times")

    def _log(self, line: dict[str, float]) -> None:
        step, last = self.trainer.step, self.trainer.updates
        self.record.last_tokens = line["tokens"]
        if not self.trainer.is_main:
            return
        if step in (1, last) or step % self.config.train.logging_steps == 0:
            seconds = round(time.perf_counter() - self.record.started, 2)
            self.record.write({**line, "seconds": seconds, "peak_memory_gib": round(peak_memory_gib(), 3)})
        self.record.say(
            f"update {step}/{last}  score {line['objective/scores']:.3f}  KL {line['objective/kl']:.2f}  "
            f"entropy {line['policy/entropy_avg']:.2f}  length {line['completions/mean_length']:.0f}  "
            f"ended {line['completions/ended']:.0%}  {line['time/update']:.1f} s"
        )
        self.record.on_step_end(None, SimpleNamespace(global_step=step), None)

    def _why_stop(self, line: dict[str, float]) -> str | None:
        """The watchdogs' word on an update; scores that once differed and now are all alike are no error."""
        alike = line["objective/scores_std"] == 0 and self.config.batch_size > 1
        self.trainer.constant = self.trainer.constant + 1 if alike else 0
        self.trainer.varied = self.trainer.varied or not alike
        return collapse(line, self.config, 0 if self.trainer.varied else self.trainer.constant)

    def _keep(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, by one process, if the disk has room for it."""

        def write() -> None:
            if self.trainer.is_main:
                write_checkpoint(self.folder, snapshot, self._facts())

        with self.record.beside(f"saving checkpoint-{snapshot.numbers['step']}"):
            written = self.disk.write(self.trainer.model, self.trainer.accelerator, write)
        if written and self.trainer.is_main:
            checkpoint.rotate(self.folder, self.config.train.save_total_limit)

    def _leave(self, good: Snapshot) -> str:
        """The last good state in a checkpoint, and none that is newer; says where it is. By the main process alone: the
        others may not have met what ends the run."""
        if not self.trainer.is_main:
            return ""
        try:
            kept = write_checkpoint(self.folder, good, self._facts())
        except Exception as error:
            if not resources.is_full_disk(error):
                raise
            resources.remove_halves(self.folder)
            return f"The last good state could not be kept: {resources.first_line(error)}."
        for newer in checkpoint.checkpoints(self.folder):
            if checkpoint.step_of(newer) > checkpoint.step_of(kept):
                checkpoint.discard(newer)
        checkpoint.rotate(self.folder, self.config.train.save_total_limit)
        return f"The last good checkpoint is {kept}."

    def _facts(self) -> dict[str, Any]:
        return read_identity(self.folder) if is_unfinished(self.folder) else {}
