"""Train: with the guard on, the record kept, held-out scores on the way, and the best weights at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit import processes
from finetune_kit.config import TrainConfig
from finetune_kit.errors import SettingsError
from finetune_kit.model.adapters import restore
from finetune_kit.model.load import public_name
from finetune_kit.training.guard import finite_gradients, finite_log
from finetune_kit.training.progress import Record
from finetune_kit.training.sharing import check_wrapper

# What a run is judged by on the way: {"loss": …}, and the metric `metric` of the report where it is another.
Score = Callable[..., dict[str, float]]


def fit(trainer: Any, train: TrainConfig, score: Score) -> list[dict[str, float]]:
    """Train and return the lines of metrics.jsonl.

    With `train.eval_steps`, `score(model, metric=…)` is taken every so many steps, the best checkpoint is kept beside
    the last one, and the model ends with the best weights.
    """
    if train.eval_steps and (sharding := processes.sharding()):
        raise SettingsError(
            f"train.eval_steps puts the best weights back at the end, which {sharding} has in shards.",
            "Leave it out: held-out rows are measured before and after.",
        )
    record = Record(Path(trainer.args.output_dir))
    watch = Watch(trainer, train, score, record)
    trainer.add_callback(hooks(on_pre_optimizer_step=finite_gradients, on_log=finite_log))
    trainer.add_callback(
        hooks(on_train_begin=record.on_train_begin, on_step_end=record.on_step_end, on_log=record.on_log)
    )
    trainer.add_callback(hooks(on_step_end=watch.on_step_end, on_save=lean_checkpoint))
    trainer.add_callback(hooks(on_train_begin=lambda *_, **__: check_wrapper(trainer.model_wrapped)))
    try:
        trainer.train()
    finally:
        record.close()
    if watch.best_folder is not None:
        processes.barrier()  # the main process may still be writing it
        restore(trainer.model, watch.best_folder)
    return record.history


def hooks(**events: Callable[..., None]) -> Any:
    """A callback of transformers made of plain functions, named by event (on_step_end=…)."""
    from transformers import TrainerCallback

    return type("Hooks", (TrainerCallback,), {name: staticmethod(event) for name, event in events.items()})()


class Watch:
    """Scores the model every `eval_steps` and at the end, keeps the best and the last checkpoint, and stops when the
    model gets no better."""

    def __init__(self, trainer: Any, train: TrainConfig, score: Score, record: Record) -> None:
        self.trainer, self.train, self.score, self.record = trainer, train, score, record
        self.best: float | None = None
        self.best_folder: Path | None = None
        self.not_better = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.train.eval_steps:
            return
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = True
        if state.global_step % self.train.eval_steps and not last:
            return
        name = self.train.metric_for_best_model
        scores = self.score(self.trainer.model, metric=name)
        self.record.write({"step": state.global_step, **{f"eval_{key}": number for key, number in scores.items()}})
        self.record.say(
            f"step {state.global_step}  held-out " + "  ".join(f"{key} {number:.4f}" for key, number in scores.items())
        )
        value = -scores[name] if name == "loss" else scores[name]
        if self.best is None or value > self.best:
            self.best, self.not_better = value, 0
            self.best_folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            state.best_metric, state.best_model_checkpoint = scores[name], str(self.best_folder)
            control.should_save = True  # rotation spares state.best_model_checkpoint
            return
        self.not_better += 1
        if self.train.early_stopping_patience is not None and self.not_better >= self.train.early_stopping_patience:
            self.record.say(
                f"held-out {name} did not improve {self.not_better} times: stopping at step {state.global_step}"
            )
            control.should_training_stop = control.should_save = True


def lean_checkpoint(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """Removes what nothing reads (the arguments as a pickle, TRL's card) and the local path that PEFT writes."""
    if not processes.is_main():
        return
    folder = Path(args.output_dir)
    checkpoint = folder / f"checkpoint-{state.global_step}"
    for path in (checkpoint / "training_args.bin", checkpoint / "README.md", folder / "README.md"):
        path.unlink(missing_ok=True)
    adapter = checkpoint / "adapter_config.json"
    if adapter.is_file():
        content = json.loads(adapter.read_text(encoding="utf-8"))
        content["base_model_name_or_path"] = public_name(content["base_model_name_or_path"])
        adapter.write_text(json.dumps(content, indent=2), encoding="utf-8")
