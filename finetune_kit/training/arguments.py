"""Our settings -> the trainer's own arguments. The one place that knows how transformers and TRL spell them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.evaluation.metrics import choose_metrics
from finetune_kit.models.device import computes_in_bfloat16, device
from finetune_kit.settings.checks import MUON, STABLE
from finetune_kit.settings.schema import RecipeConfig, TrainConfig
from finetune_kit.training.batching import check_batches, micro_batch
from finetune_kit.training.compiling import COMPILED_HERE

# transformers' names for the same AdamW; the fused one runs on every device here and is the fastest.
DEFAULT_OPTIMIZER = "adamw_torch_fused"

# Arguments of the trainers that could not act here: why, and their names (with * for all that begin so).
INERT = {
    "samples are tokens and labels before the trainer sees them: see the data section": (
        *("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_text_field", "dataset_kwargs"),
        *("eos_token", "pad_token", "model_init_kwargs"),
    ),
    "held-out rows are measured by finetune_kit, not by the trainer: see train.eval_steps and the evaluate section": (
        *("do_*", "eval_*", "load_best_model_at_end", "greater_is_better", "per_device_eval_batch_size"),
        *("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"),
    ),
    "lengths are counted in the rows": ("length_column_name",),
    "weights and arithmetic follow model.dtype": ("fp16*", "bf16_full_eval"),
    "the reference is the policy's start": ("sync_ref_model", "ref_model_*", "precompute_ref_*"),
    "run the same command again: an unfinished run resumes from its newest whole checkpoint": (
        *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
        *("save_only_model", "enable_jit_checkpoint"),
    ),
    "a run is pushed by the hub section: hub.push, hub.model_id": ("push_to_hub", "hub_*"),
}


def make_arguments(config_class: Any, config: RecipeConfig, data: Data, **own: Any) -> Any:
    """An instance of `config_class`; `own`: arguments from the recipe's own settings. What it refuses by itself is a
    SettingsError, too."""
    return instance(config_class, config, training_arguments(config_class, config, data), own)


def instance(config_class: Any, config: RecipeConfig, arguments: dict[str, Any], own: dict[str, Any]) -> Any:
    """The same from arguments that are known, such as those before any data are read."""
    for name in own:
        if name in config.train.extra:
            raise SettingsError(f"train.extra.{name}: the recipe sets it.", f"See its own settings, such as {name}=…")
    try:
        return config_class(**{**arguments, **own})
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{config_class.__name__} refuses these settings: {error}") from None
    except ImportError as error:
        raise ResourceError(f"A setting needs a package that is not installed: {error}") from None


def check_parts(trainer_class: Any, arguments: Any, policy: Any) -> None:
    """Look for optimizer, schedule and trackers now: the trainer would make them only when it starts. `policy`: None
    before it is loaded; optimizers that are made of its layers are looked at for their package alone.

    Raises SettingsError where an argument of theirs is wrong or missing, ResourceError where a package is.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    _try("optim", lambda: trainer_class.get_optimizer_cls_and_kwargs(arguments, policy), "optim_args", policy)
    check_schedule(arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {})
    _try("report_to", lambda: [tracker() for tracker in get_reporting_integration_callbacks(arguments.report_to)])


def check_schedule(name: str, known: dict[str, Any]) -> None:
    """Raises SettingsError where a schedule by transformers' name cannot be made with the arguments `known`."""
    import torch
    from transformers import get_scheduler

    any_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    _try(
        "lr_scheduler_type",
        lambda: get_scheduler(name, any_optimizer, 1, 2, scheduler_specific_kwargs=known),
        "lr_scheduler_kwargs",
    )


def _try(name: str, make: Callable[[], Any], own: str = "", policy: Any = True) -> None:
    """Make what train.`name` asks for; `own`: where its own arguments are given."""
    try:
        make()
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        if policy is None and "You need to pass a" in str(error):  # the model
            return
        message = f"train.{name}: {error}"
        if isinstance(error, ImportError | RuntimeError) or "install" in str(error):
            raise ResourceError(message) from None
        raise SettingsError(message, f"Its own arguments: train.extra.{own}" if own else "") from None


def training_arguments(config_class: Any, config: RecipeConfig, data: Data) -> dict[str, Any]:
    """The keyword arguments of `config_class`, with `train.extra` checked against its fields."""
    check_train(config.train)
    check_best_metric(config, data)
    check_batches(config, data)
    batch = micro_batch(config.train, data, distributed.count())
    return arguments_of(config_class, config, data.kind, batch, data.packed)


def arguments_of(
    config_class: Any, config: RecipeConfig, kind: str, batch: tuple[int, int], packed_rows: bool
) -> dict[str, Any]:
    """The same from the few facts that the data add: their kind, (rows in a forward pass, passes in a step), and
    whether they are packed."""
    train, (rows, accumulation) = config.train, batch
    arguments: dict[str, Any] = {
        "output_dir": train.output_dir,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        # KTO's rows come shuffled, each beside the one that its KL estimate is taken from
        "train_sampling_strategy": "sequential" if kind == "labelled_completion" else train.train_sampling_strategy,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": train.lr_scheduler_type,
        "optim": DEFAULT_OPTIMIZER if train.optim in ("auto", MUON) else train.optim,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "gradient_checkpointing": train.gradient_checkpointing,
        "logging_steps": train.logging_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "save_total_limit": None,  # fit.py rotates, after a checkpoint counts
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
        "max_length": config.data.max_length if packed_rows else None,
        "packing": packed_rows,
        "packing_strategy": "bfd",
    }
    known = {item.name for item in dataclasses.fields(config_class)}
    for name, value in train.extra.items():
        arguments[name] = _extra(name, value, arguments, config_class)
    for name in COMPILED_HERE:  # layer by layer (training/compiling.py); the trainer would compile the whole model
        arguments.pop(name, None)
    if device().type == "cuda" and kind != "prompt":  # batches are put together and planned beside the training
        arguments.setdefault("dataloader_num_workers", 1)
    arguments.setdefault("ddp_find_unused_parameters", False)  # every trained weight is used in every pass
    return {name: value for name, value in arguments.items() if name in known}


def check_train(train: TrainConfig) -> None:
    """Refuse what the trainer's own evaluation would have to steer: there is none (fit.py has ours)."""
    if train.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise SettingsError(
            f"train.lr_scheduler_type={train.lr_scheduler_type} needs the trainer's own evaluation, which is not used.",
            "Try train.lr_scheduler_type=cosine",
        )


def schedule_arguments(train: TrainConfig, steps: int) -> dict[str, Any]:
    """What warmup_stable_decay has to be told: how many of its steps the rate falls in, by 1 - sqrt of the share of
    them that is done (Hägele et al. 2024, arXiv 2405.18392). Nothing for other schedules, or where the user says it."""
    if train.lr_scheduler_type != STABLE or "lr_scheduler_kwargs" in train.extra:
        return {}
    decay = round(train.decay_steps if train.decay_steps >= 1 else train.decay_steps * steps)
    warmup = round(train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * steps)
    if decay + warmup > steps:
        raise SettingsError(
            f"train.warmup_steps and train.decay_steps are {warmup + decay:,} steps of {steps:,}.",
            "Set fewer of them; below 1 each is a share of all steps.",
        )
    return {"lr_scheduler_kwargs": {"num_decay_steps": max(1, decay), "decay_type": "1-sqrt"}}


def check_best_metric(config: RecipeConfig, data: Data) -> None:
    """Refuse a metric_for_best_model that will not be measured."""
    name = config.train.metric_for_best_model
    if name == "loss":
        return
    answered = data.kind != "text" and config.evaluate.size > 0
    metrics = choose_metrics(config.evaluate.metrics, data, config.evaluate.hub_metrics) if answered else []
    paired = ["preference_accuracy"] if data.kind in ("preference", "labelled_completion") else []
    known = ["loss", *paired, *(metric.name for metric in metrics)]
    if name not in known:
        raise SettingsError(f"train.metric_for_best_model={name} is not measured here.", f"Known: {', '.join(known)}")


def _extra(name: str, value: Any, ours: dict[str, Any], config_class: Any) -> Any:
    hints, trainer_config = typing.get_type_hints(config_class), config_class.__name__
    first_class = {item.name for item in dataclasses.fields(TrainConfig)}
    if name in first_class:
        raise SettingsError(f"train.extra.{name}: a setting of its own.", f"Write train.{name}={value}")
    if name in ours:
        raise SettingsError(f"train.extra.{name} is set by finetune_kit from other settings.", "Leave it out.")
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"Did you mean train.extra.{near[0]}?" if near else "See the fields of " + trainer_config
        raise SettingsError(f"train.extra.{name}: {trainer_config} has no such argument.", hint)
    for reason, inert in INERT.items():
        if any(name == word or (word.endswith("*") and name.startswith(word[:-1])) for word in inert):
            raise SettingsError(f"train.extra.{name} has no effect: {reason}.", "Leave it out.")
    options = _options(hints[name])
    if options <= {bool, int, float, str, types.NoneType} and type(value) not in options:
        expected = " or ".join(sorted(kind.__name__.replace("NoneType", "null") for kind in options))
        raise SettingsError(f"train.extra.{name}: expected {expected}, found {value!r}.")
    return value


def _options(hint: Any) -> set[Any]:
    """The types that a value of this hint may have: {float, int, NoneType} for float | None."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = set(typing.get_args(hint)) if is_union else {hint}
    return options | {int} if float in options else options
