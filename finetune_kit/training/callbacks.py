"""What is called in a training loop: checkpoints, held-out scores, the best weights, pushes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.models.source import hub_name, public_name
from finetune_kit.run_folder.identity import read_identity
from finetune_kit.run_folder.upload import push_checkpoint
from finetune_kit.settings.schema import RecipeConfig, TrainConfig
from finetune_kit.system.parsing import read_object
from finetune_kit.training import checkpoint, resources, stopping
from finetune_kit.training.progress import Record, console, hooks


def pushes_checkpoints(config: RecipeConfig) -> Any:
    """A callback that pushes each checkpoint's weights; where that fails the run says so and continues."""
    from transformers import TrainerCallback

    def on_save(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            failed = push_checkpoint(
                config, Path(args.output_dir) / f"checkpoint-{state.global_step}", hub_name(config.model.name_or_path)
            )
            if failed:
                console.print(f"note: checkpoint-{state.global_step} was not pushed: {failed}", markup=False)

    return type("Pushes", (TrainerCallback,), {"on_save": staticmethod(on_save)})()


# What a run is judged by on the way: {"loss": …}, and the metric `metric` of the report where it is another.
Score = Callable[..., dict[str, float]]
PROGRESS = "progress.json"  # in a checkpoint: what this package's own callbacks keep
# what the trainers count for their own log between two lines of it, and start anew with when they resume
COUNTED = ("_globalstep_last_logged", "_total_loss_scalar", "_total_train_tokens", "_step")


class CheckpointCallback:
    """Writes, commits, rotates and restores checkpoints: transformers' own files, and the state of the record, the
    watch and the trainer's log.

    `trained`: the checkpoint that the run resumes from is its last one.
    """

    def __init__(self, trainer: Any, train: TrainConfig, record: Record, watch: EvaluationCallback) -> None:
        self.trainer, self.train, self.record, self.watch = trainer, train, record, watch
        self.folder = Path(trainer.args.output_dir)
        self.trained = False
        self.own: dict[str, Any] = {}
        self.then: dict[str, Any] = {}
        self.now: dict[str, Any] = read_identity(self.folder)
        self.disk = resources.Disk(self.folder)
        self.due = False  # a checkpoint of the last step is to be made
        self.loss: Any = None  # as it was summed up before the step that is being made

    def callback(self) -> Any:
        """These events as a callback of transformers."""
        return hooks(
            on_train_begin=self.on_train_begin,
            on_step_begin=self.on_step_begin,
            on_step_end=self.on_step_end,
            on_epoch_end=self.on_epoch_end,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_if_due()
        self.loss = self.trainer._tr_loss.clone()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write_if_due()

    def checkpoint_last_step(self, start: Path | None) -> Path | None:
        """A checkpoint of the last whole step, for a trainer that broke off in the next one; `start`: where it had gone
        on from, which is returned if no step was made since."""
        trainer, step = self.trainer, self.trainer.state.global_step
        trainer.model.zero_grad(set_to_none=True)
        if step == (checkpoint.step_of(start) if start else 0):
            return start
        if not (self.folder / f"checkpoint-{step}" / checkpoint.MANIFEST).is_file():
            trainer._tr_loss = self.loss
            if not self.write():
                raise resources.full(self.folder, f"Memory and disk are both too small at step {step + 1}.")
        return self.find()

    def find(self) -> Path | None:
        """The checkpoint to resume from, with what lies beside the trainer's own state put back; None for none."""
        found = distributed.from_main(lambda: checkpoint.newest_whole(self.folder))
        if found is None:
            self.record.restore({})
            return None
        self.then = checkpoint.read_manifest(found)
        self.own = read_object(self._own_file(found))
        kept = read_object(found / PROGRESS)
        self.record.restore(kept["record"])
        self.watch.restore(kept["watch"])
        steps = self._steps(int(kept["max_steps"]))
        checkpoint.check_steps(found, steps)
        self.trained = self.watch.stopped or checkpoint.step_of(found) >= steps
        return found

    def _steps(self, then: int) -> int:
        """The steps of the whole run; `then`: as they were when the checkpoint was made."""
        args = self.trainer.args
        was, now = self.then["settings"], self.now["settings"]
        if all(was[key] == now[key] for key in ("train.max_steps", "train.num_train_epochs")):
            return then
        if args.max_steps > 0:
            return int(args.max_steps)
        passes, accumulation = len(self.trainer.get_train_dataloader()), int(args.gradient_accumulation_steps)
        return math.ceil(self.train.num_train_epochs * math.ceil(passes / accumulation))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the trainer has read its own state."""
        if not self.then:
            return
        import torch
        from safetensors.torch import load_file

        trainer, own = self.trainer, self.own
        for name in COUNTED:
            if name in own and hasattr(trainer, name):
                setattr(trainer, name, own[name])
        if hasattr(trainer, "_tr_loss"):
            trainer._tr_loss = torch.tensor(own["_tr_loss"], device=args.device)
        for name, into in (("_metrics", _logged(trainer)), ("_stored_metrics", _stored(trainer))):
            for key, numbers in own[name].items():
                into[key] = numbers
        if own["buffered"]:
            tensors = load_file(self._buffer_file(Path(args.output_dir) / f"checkpoint-{state.global_step}"))
            on_device = {key: tensor.to(args.device) for key, tensor in tensors.items()}
            trainer._buffered_inputs = [
                {name: on_device.get(f"{at}.{name}", plain) for name, plain in batch.items()}
                for at, batch in enumerate(own["buffered"])
            ]
        changes = self.then["settings"] != self.now["settings"]
        if changes:
            checkpoint.reopen(kwargs["optimizer"], kwargs["lr_scheduler"], self.then["settings"], self.now["settings"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the watch, whose evaluation belongs to the step. The checkpoint is made at the event after the step's
        line of the log, and not by the trainer itself, which a disk that fills up would end."""
        if stopping.asked(self.trainer.accelerator):
            control.should_save = control.should_training_stop = True
        self.due, control.should_save = control.should_save, False

    def write_if_due(self) -> None:
        if self.due:
            self.due = False
            self.write()

    def write(self) -> bool:
        """A checkpoint of the last step, committed, and older ones deleted; False where the disk has no room for it."""
        trainer, state = self.trainer, self.trainer.state
        folder = self.folder / f"checkpoint-{state.global_step}"

        def write_files() -> None:
            trainer._save_checkpoint(trainer.model, trial=None)
            self._write_own(folder)

        def make_whole() -> None:
            if distributed.is_main():
                lean_checkpoint(folder)
                kept = {"record": self.record.state(), "watch": self.watch.state(), "max_steps": state.max_steps}
                (folder / PROGRESS).write_text(json.dumps(kept), encoding="utf-8")
                checkpoint.commit(folder, {"step": state.global_step, **self.now})

        with self.record.beside(f"saving {folder.name}"):
            written = self.disk.write(trainer.model, trainer.accelerator, write_files, make_whole)
        if not written:
            self.watch.forget(folder)
            return False
        if distributed.is_main():
            checkpoint.rotate(self.folder, self.train.save_total_limit, self.watch.best_folder)
        distributed.barrier()
        trainer.callback_handler.on_save(trainer.args, state, trainer.control)
        return True

    def _write_own(self, folder: Path) -> None:
        from safetensors.torch import save_file

        trainer = self.trainer
        own = {name: getattr(trainer, name) for name in COUNTED if hasattr(trainer, name)}
        own["_tr_loss"] = float(getattr(trainer, "_tr_loss", 0.0))
        own["_metrics"] = {name: [float(number) for number in found] for name, found in _logged(trainer).items()}
        own["_stored_metrics"] = {name: [float(n) for n in found] for name, found in _stored(trainer).items()}
        batches, tensors = _buffered(trainer)
        own["buffered"] = batches
        self._own_file(folder).write_text(json.dumps(own), encoding="utf-8")
        if tensors:
            save_file(tensors, self._buffer_file(folder))

    def _own_file(self, folder: Path) -> Path:
        return folder / f"trainer_{self.trainer.args.process_index}.json"

    def _buffer_file(self, folder: Path) -> Path:
        return folder / f"completions_{self.trainer.args.process_index}.safetensors"


def _logged(trainer: Any) -> dict[str, list[float]]:
    """What TRL's trainers average over the steps of a log line."""
    found: dict[str, list[float]] = getattr(trainer, "_metrics", {}).get("train", {})
    return found


def _stored(trainer: Any) -> dict[str, list[float]]:
    """The same of the experimental ones."""
    stored = getattr(trainer, "_stored_metrics", {})
    found: dict[str, list[float]] = stored["train"] if hasattr(stored, "default_factory") else {}
    return found


def _buffered(trainer: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The completions that GRPO and RLOO are going to use again in the next step: batches without their tensors, and
    the tensors by `<batch>.<name>`. Empty where the next step samples anew."""
    batches = getattr(trainer, "_buffered_inputs", None) or []
    every = trainer.args.steps_per_generation * trainer.num_iterations if batches else 1
    if not batches or trainer._step % every == 0:
        return [], {}
    tensors = {
        f"{at}.{name}": value.detach().cpu().clone()
        for at, batch in enumerate(batches)
        for name, value in batch.items()
        if hasattr(value, "detach")
    }
    plain = [{name: None if hasattr(v, "detach") else v for name, v in batch.items()} for batch in batches]
    return plain, tensors


class EvaluationCallback:
    """Scores the model every `eval_steps` and at the end, keeps the best and the last checkpoint, and stops when the
    model gets no better."""

    def __init__(self, trainer: Any, train: TrainConfig, score: Score, record: Record) -> None:
        self.trainer, self.train, self.score, self.record = trainer, train, score, record
        self.best: float | None = None
        self.best_folder: Path | None = None
        self.not_better = 0
        self.stopped = False
        self.earlier: tuple[float | None, Path | None, int] = (None, None, 0)  # the best one before this one

    def state(self) -> dict[str, Any]:
        best = self.best_folder.name if self.best_folder else None
        return {"best": self.best, "best_folder": best, "not_better": self.not_better, "stopped": self.stopped}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.not_better, self.stopped = state["best"], state["not_better"], state["stopped"]
        self.best_folder = self.record.path.parent / state["best_folder"] if state["best_folder"] else None
        if self.best_folder is not None and (reason := checkpoint.broken(self.best_folder)):
            console.print(
                f"note: {self.best_folder}, the best one so far, is broken: {reason}. The best is counted again."
            )
            self.best = self.best_folder = None

    def forget(self, folder: Path) -> None:
        """A checkpoint could not be written: the best one is that before it."""
        if folder == self.best_folder:
            self.best, self.best_folder, self.not_better = self.earlier

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.train.eval_steps:
            return
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = True
        if state.global_step % self.train.eval_steps and not last:
            return
        name = self.train.metric_for_best_model
        with self.record.beside(f"measuring held-out rows after step {state.global_step}"):
            scores = self.score(self.trainer.model, metric=name)
        self.record.write({"step": state.global_step, **{f"eval_{key}": number for key, number in scores.items()}})
        self.record.say(
            f"step {state.global_step}  held-out " + "  ".join(f"{key} {number:.4f}" for key, number in scores.items())
        )
        value = -scores[name] if name == "loss" else scores[name]
        if self.best is None or value > self.best:
            self.earlier = self.best, self.best_folder, self.not_better
            self.best, self.not_better = value, 0
            self.best_folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            state.best_metric, state.best_model_checkpoint = scores[name], str(self.best_folder)
            control.should_save = True  # rotation spares it
            return
        self.not_better += 1
        if self.train.early_stopping_patience is not None and self.not_better >= self.train.early_stopping_patience:
            self.record.say(
                f"held-out {name} did not improve {self.not_better} times: stopping at step {state.global_step}"
            )
            self.stopped = control.should_training_stop = control.should_save = control.should_log = True


def lean_checkpoint(folder: Path) -> None:
    """Removes what nothing reads (the arguments as a pickle, TRL's card) and the local path that PEFT writes."""
    for path in (folder / "training_args.bin", folder / "README.md", folder.parent / "README.md"):
        path.unlink(missing_ok=True)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        content = read_object(adapter)
        content["base_model_name_or_path"] = public_name(content["base_model_name_or_path"])
        adapter.write_text(json.dumps(content, indent=2), encoding="utf-8")
