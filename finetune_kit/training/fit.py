"""Train: with the guard on, the record kept, checkpoints committed, and the best weights at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.adapters import restore
from finetune_kit.models.precision import plain_forward
from finetune_kit.run_folder.naming import is_unfinished
from finetune_kit.settings.schema import TrainConfig
from finetune_kit.system.terminal import doing
from finetune_kit.training import checkpoint, resources, stopping
from finetune_kit.training.batching import set_batches
from finetune_kit.training.callbacks import CheckpointCallback, EvaluationCallback, Score
from finetune_kit.training.longest_batch import trying_longest_batch
from finetune_kit.training.progress import Record, hooks
from finetune_kit.training.sharding import check_wrapper


def fit(trainer: Any, train: TrainConfig, score: Score) -> list[dict[str, float]]:
    """Train and return the lines of metrics.jsonl.

    Continues from the newest whole checkpoint in the run's folder, as if the run had never stopped. With
    `train.eval_steps`, `score(model, metric=…)` is taken every so many steps, the best checkpoint is kept beside the
    last one, and the model ends with the best weights. Where memory is short, half as many rows are taken at once in
    twice as many passes, which the longest rows find out before the first step; where the disk is, a checkpoint is left
    out. Raises Stopped after a signal, ResourceError.
    """
    import torch

    if train.eval_steps and (sharding := distributed.sharding()):
        raise SettingsError(
            f"train.eval_steps puts the best weights back at the end, which {sharding} has in shards.",
            "Set train.eval_steps=null: held-out rows are measured before and after.",
        )
    folder = Path(trainer.args.output_dir)
    if not is_unfinished(folder):
        raise SettingsError(
            f"{folder} holds no run that has begun.", "Call begin(config, tokenizer, data, policy) before fit."
        )
    set_batches(trainer, train)
    record = Record(folder)
    watch = EvaluationCallback(trainer, train, score, record)
    kept = CheckpointCallback(trainer, train, record, watch)
    trainer.add_callback(
        hooks(on_train_begin=record.on_train_begin, on_step_end=record.on_step_end, on_log=record.on_log)
    )
    trainer.add_callback(hooks(on_step_end=watch.on_step_end))
    trainer.add_callback(kept.callback())
    trainer.add_callback(hooks(on_train_begin=lambda *_, **__: check_wrapper(trainer.model_wrapped)))
    trainer.add_callback(trying_longest_batch(trainer))
    start = kept.find()
    resources.check_start(trainer.model, train, folder)
    if (train.save_steps or train.eval_steps) and not distributed.is_sharded(trainer.model):
        with doing("trying to save"):
            distributed.from_main(lambda: resources.rehearse_save(trainer.model, folder))
    random = torch.get_rng_state()
    try:
        while not kept.trained:
            try:
                with stopping.finishing_steps():
                    try:
                        trainer.train(resume_from_checkpoint=str(start) if start else None)
                    finally:
                        plain_forward(trainer.model)
                break
            except (RuntimeError, MemoryError) as error:
                if not resources.out_of_memory(error):
                    raise
            # here, where no traceback holds the tensors of the step any more
            rows = resources.reduce_batch_size(trainer, trainer.model)
            start = kept.checkpoint_last_step(start)
            if start is None:
                torch.set_rng_state(random)
            record.write(
                {
                    "step": checkpoint.step_of(start) if start else 0,
                    "per_device_train_batch_size": rows,
                    "gradient_accumulation_steps": trainer.args.gradient_accumulation_steps,
                }
            )
    finally:
        record.close()
    if stopping.asked(trainer.accelerator):
        raise stopping.stopped(folder)
    if not trainer.state.global_step and not kept.trained:
        raise DataError(
            f"The rows fill no step of {trainer.args.per_device_train_batch_size} a device, so nothing was trained.",
            "Set a smaller train.per_device_train_batch_size, or give more rows.",
        )
    if (weights := watch.best_folder or (start if kept.trained else None)) is not None:
        distributed.barrier()  # the main process may still be writing it
        restore(trainer.model, weights)
    free_memory(trainer)
    return record.history


def free_memory(trainer: Any) -> None:
    """Give the memory of optimizer, gradients and a frozen reference back: what comes is measured and proven."""
    if distributed.sharding():
        return  # its engine computes what is measured
    trainer.model.zero_grad(set_to_none=True)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    if hasattr(trainer, "ref_model"):
        trainer.ref_model = None
    trainer.accelerator.free_memory()
    resources.empty_cache()
