"""Our settings -> the trainer's own arguments. The one place that knows how transformers and TRL spell them."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

from finetune_kit.config import RecipeConfig, TrainConfig
from finetune_kit.data.load import Data
from finetune_kit.errors import SettingsError
from finetune_kit.model.load import computes_in_bfloat16, device
from finetune_kit.run_folder import begin
from finetune_kit.training.progress import console

# transformers' names for the same AdamW; the fused one runs on every device here and is the fastest.
DEFAULT_OPTIMIZER = "adamw_torch_fused"


def build(trainer_class: Any, config_class: Any, config: RecipeConfig, policy: Any, tokenizer: Any, data: Data) -> Any:
    """A TRL trainer over samples that already are tokens and labels. Settings that cannot act raise SettingsError."""
    from transformers import PrinterCallback

    arguments = training_arguments(config_class, config, data)
    begin(config, data.ledger)
    trainer = trainer_class(
        model=policy, args=config_class(**arguments), train_dataset=data.train, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)  # it prints the logs as a dict; progress.py says them
    for parameter in policy.parameters():  # TRL casts adapters of quantised models to bfloat16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    announce(config, policy, data)
    return trainer


def announce(config: RecipeConfig, policy: Any, data: Data) -> None:
    """Say what is about to be trained, on what, and what the ledger noted."""
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in policy.parameters())
    counts, planned = data.ledger.train, steps(config, data)
    console.print(
        f"{counts.rows:,} training rows ({counts.truncated} truncated, {counts.lost} dropped), "
        f"{len(data.held_out):,} held out; {counts.supervised_tokens:,} of {counts.tokens:,} tokens are trained on"
    )
    console.print(
        f"{trained:,} of {total:,} parameters trained, {planned['steps']} steps of {planned['rows_in_a_step']} rows, "
        f"on {policy.device.type}"
    )
    for note in data.ledger.notes:
        console.print(f"note: {note}")


def steps(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, int]:
    """Rows and optimizer steps, as the trainer counts them."""
    train = config.train
    rows = len(data.train)
    if data.packed:  # best-fit packing comes within a few percent of full rows
        rows = math.ceil(data.ledger.train.tokens / config.data.max_length)
    per_pass, accumulation = micro_batch(train, data.packed)
    an_epoch = math.ceil(math.ceil(rows / (per_pass * processes)) / accumulation)
    total = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)
    return {
        "rows_in_an_epoch": rows,
        "rows_in_a_step": per_pass * accumulation * processes,
        "steps_in_an_epoch": an_epoch,
        "steps": total,
    }


def training_arguments(config_class: Any, config: RecipeConfig, data: Data) -> dict[str, Any]:
    """The keyword arguments of `config_class`, with `train.extra` checked against its fields."""
    train = config.train
    check_train(train)
    rows, accumulation = micro_batch(train, data.packed)
    arguments: dict[str, Any] = {
        "output_dir": train.output_dir,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": train.lr_scheduler_type,
        "optim": DEFAULT_OPTIMIZER if train.optim == "auto" else train.optim,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "gradient_checkpointing": train.gradient_checkpointing,
        "logging_steps": train.logging_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "save_total_limit": train.save_total_limit,
        "seed": train.seed,
        "report_to": train.report_to,
        # held-out losses are our own (fit.py): the trainer's is a mean of batch means
        "eval_strategy": "no",
        # a NaN loss is shown as it is, not as 0.0
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "disable_tqdm": True,
        "use_cpu": device().type == "cpu",
        "bf16": computes_in_bfloat16(),
        "dataloader_pin_memory": device().type == "cuda",
        # the samples have their final length; only packing still needs the row's length
        "max_length": config.data.max_length if data.packed else None,
        "packing": data.packed,
        "packing_strategy": "bfd",
    }
    names = {item.name for item in dataclasses.fields(config_class)}
    for name, value in train.extra.items():
        arguments[name] = _extra(name, value, names, arguments, config_class.__name__)
    return {name: value for name, value in arguments.items() if name in names}


def micro_batch(train: TrainConfig, packed: bool) -> tuple[int, int]:
    """(rows in one forward pass, passes in one optimizer step), the product unchanged.

    Packed rows lie end to end in one forward pass, and without a varlen kernel its attention mask grows with the square
    of their sum: on a CPU they go through one by one.
    """
    rows, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    return (1, rows * accumulation) if packed and device().type == "cpu" else (rows, accumulation)


def check_train(train: TrainConfig) -> None:
    """Refuse values out of range and settings that cannot act together."""
    positive = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps")
    for name in positive:
        if getattr(train, name) <= 0:
            raise SettingsError(f"train.{name}: expected more than 0, found {getattr(train, name)}.")
    if not 0 <= train.learning_rate <= 1:
        raise SettingsError(f"train.learning_rate: expected a rate from 0 to 1, found {train.learning_rate:g}.")
    if train.max_steps == 0:
        raise SettingsError("train.max_steps=0 trains nothing.", "Use check instead of run, or leave it out.")
    if train.early_stopping_patience is not None and not train.eval_steps:
        raise SettingsError(
            "train.early_stopping_patience has no effect without held-out losses on the way.", "Add train.eval_steps=20"
        )
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for name, value, choices in (
        ("lr_scheduler_type", train.lr_scheduler_type, [item.value for item in SchedulerType]),
        ("optim", train.optim, ["auto", *(item.value for item in OptimizerNames)]),
    ):
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
            hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(choices)}"
            raise SettingsError(f"train.{name}: '{value}' is not known to transformers.", hint)


def _extra(name: str, value: Any, names: set[str], ours: dict[str, Any], trainer_config: str) -> Any:
    first_class = {item.name for item in dataclasses.fields(TrainConfig)}
    if name in first_class:
        raise SettingsError(f"train.extra.{name}: a setting of its own.", f"Write train.{name}={value}")
    if name in ours:
        raise SettingsError(f"train.extra.{name} is set by finetune_kit from other settings.", "Leave it out.")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean train.extra.{near[0]}?" if near else "See the fields of " + trainer_config
        raise SettingsError(f"train.extra.{name}: {trainer_config} has no such argument.", hint)
    return value
