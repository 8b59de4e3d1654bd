"""What would end a run late is looked for before anything is read: the model's shapes and the settings say it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.choices import read_choices
from finetune_kit.evaluation.fairness import read_bbq
from finetune_kit.evaluation.guards import choice_sources
from finetune_kit.evaluation.safety import read_prompts
from finetune_kit.models import classifier, quantization
from finetune_kit.models.adapters import take_adapter_settings
from finetune_kit.models.device import device, weight_dtype
from finetune_kit.models.load import check_writes
from finetune_kit.models.provenance import check_base
from finetune_kit.models.shapes import check_text, learned_positions
from finetune_kit.models.source import load_model_config
from finetune_kit.rewards.models import check_judge
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.rewards.sources import check_sources
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.training.arguments import (
    arguments_of,
    check_parts,
    check_schedule,
    check_train,
    instance,
    schedule_arguments,
)
from finetune_kit.training.begin import check_measures
from finetune_kit.training.reference import check_smoothing

# TRL's names, by recipe or kind of rows; where a trainer looks at the name only in its first step
LOSSES = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "labelled_completion": ("kto", "apo_zero_unpaired"),
    "prompt": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
    "prompt_completion": ("nll", "dft"),
    "text": ("nll", "dft"),
}
# settings of train that no trainer could refuse once they are in their interval
PLAIN = {
    *("train.output_dir", "train.max_steps", "train.num_train_epochs", "train.learning_rate", "train.seed"),
    *("train.logging_steps", "train.save_steps", "train.eval_steps", "train.save_total_limit", "train.padding_free"),
    *("train.warmup_steps", "train.weight_decay", "train.max_grad_norm", "train.on_nonfinite"),
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")  # of TRL's DPO
SAMPLED = ("max_new_tokens", "max_completion_length")  # of recipes that sample: tokens beside those of the prompt


def check_start(config: RecipeConfig, elsewhere: bool = False) -> None:
    """Raises SettingsError for what the settings, the model's shapes and the folders that they name show to be
    impossible, ResourceError for a package that is not installed. No data and no weights are read.

    `elsewhere`: the run is planned for another device than this machine has, which is not asked for packages.
    """
    config.check_itself()
    _check_losses(config)
    _check_evaluation(config)
    _check_folders(config)
    _check_weights(config, elsewhere)
    _check_trainer(config, elsewhere)
    _check_positions(config)


def _check_evaluation(config: RecipeConfig) -> None:
    evaluate = config.evaluate
    named = ", ".join([*evaluate.metrics, *evaluate.hub_metrics, *filter(None, [evaluate.reward_model])])
    if named and evaluate.size == 0:
        raise SettingsError(f"evaluate: scoring answers ({named}) has no effect: evaluate.size is 0.", "Leave it out.")
    check_measures(config)
    named_here = ("safety", "choices", "fairness", "guards")
    if config.scores and (given := next((name for name in named_here if getattr(evaluate, name)), None)):
        raise SettingsError(f"evaluate.{given} has no effect: a reward model writes no answers.", "Leave it out.")
    if evaluate.safety_judge and not evaluate.safety:
        raise SettingsError(
            "evaluate.safety_judge has no effect without evaluate.safety.", "Add evaluate.safety=xstest"
        )
    if evaluate.safety:
        read_prompts(evaluate.safety, evaluate.safety_size)
    for source in choice_sources(evaluate):
        read_choices(source, evaluate.choices_size)
    if evaluate.fairness:
        read_bbq(evaluate.fairness, evaluate.choices_size)


def _check_folders(config: RecipeConfig) -> None:
    """That rewards and the adapter to start from are there, and are what they are taken for."""
    lora, data = config.lora, config.data
    paths = [data.path] if isinstance(data.path, str) else data.path
    if isinstance(reward := config.reward, RewardConfig):
        check_sources(reward, [data.held_out_path] if data.held_out_path else paths, config.model)
    if config.evaluate.reward_model:
        check_judge("evaluate.reward_model", config.evaluate.reward_model, config.model)
    if config.evaluate.safety_judge:
        check_judge("evaluate.safety_judge", config.evaluate.safety_judge, config.model)
    if lora is not None and lora.init_from:
        # adopt puts the adapter's shape into the settings, which still are those of the user here
        folder = take_adapter_settings(dataclasses.replace(lora))
        check_base(config.model, folder)


def _check_weights(config: RecipeConfig, elsewhere: bool) -> None:
    """That the weights can be trained, or kept frozen as the reference, in the form that is asked for."""
    lora, model = config.lora, config.model
    in_full = lora is None or lora.r == 0
    if config.scores:
        classifier.loading(load_model_config(model))
        check_text(model, scores=True)
    else:
        check_writes(model, lora)
        check_text(model)
    if model.load_in_4bit:
        if in_full:
            raise SettingsError("model.load_in_4bit: quantised weights cannot be trained.", "Run qlora_sft")
        if not elsewhere:
            quantization.check_device(device())
        quantization.check_base(load_model_config(model), model.name_or_path)
    if not elsewhere:
        weight_dtype(model, in_full)


def _check_trainer(config: RecipeConfig, elsewhere: bool) -> None:
    """The trainer's own arguments, its optimizer, schedule and trackers, as they will be made of these settings.

    Where none of them was set there is nothing to look at: the import of the trainer's library takes seconds.
    """
    train = config.train
    check_train(train)
    given = [key for key in config.origins if key.startswith("train.") or "." not in key]
    if not set(given) - PLAIN:
        return
    if not config.trainer_config:
        check_schedule(train.lr_scheduler_type, {})
        return
    library, _, name = config.trainer_config.rpartition(".")
    config_class = getattr(importlib.import_module(library), name)
    batch = (train.per_device_train_batch_size, train.gradient_accumulation_steps)
    arguments = arguments_of(config_class, config, config.kind, batch, False)
    if elsewhere:
        return
    fields = {item.name for item in dataclasses.fields(config_class)}
    own = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.name in fields and getattr(config, item.name) != []
    }
    own |= schedule_arguments(train, 10**6)  # of as many steps as it takes
    made = instance(config_class, config, {**arguments, "output_dir": train.output_dir or "unused"}, own)
    from transformers import Trainer

    check_parts(Trainer, made, None)


def _check_positions(config: RecipeConfig) -> None:
    room = learned_positions(config.model)
    if room is None:
        return
    sampled = max((getattr(config, name, 0) for name in SAMPLED), default=0) if config.kind == "prompt" else 0
    if config.data.max_length + sampled <= room:
        return
    beside = f" and {sampled} sampled ones" if sampled else ""
    fix = f"Set data.max_length={room - sampled}" if room > sampled else "Sample fewer tokens"
    raise SettingsError(
        f"{config.model.name_or_path} has positions for {room:,} tokens; data.max_length={config.data.max_length:,}"
        f"{beside} would be more.",
        f"{fix}, or use a model that reads more.",
    )


def _check_losses(config: RecipeConfig) -> None:
    """That TRL's trainer of the recipe knows the loss, which it would say at the first step."""
    own = config.loss_type
    if isinstance(own, list):
        for name in own:
            _check_loss("loss_type", name, "dpo")
        weights: list[Any] = config.loss_weights
        if weights and len(weights) != len(own):
            raise SettingsError(f"loss_weights has {len(weights)} numbers for {len(own)} losses.", "Give one each.")
        if hasattr(config, "label_smoothing"):
            check_smoothing(config)
        divergence = config.train.extra.get("f_divergence_type", DIVERGENCES[0])
        if divergence not in DIVERGENCES:
            message = f"train.extra.f_divergence_type: {divergence!r} is not a divergence of this trainer."
            raise SettingsError(message, f"Known: {', '.join(DIVERGENCES)}")
    elif (extra := config.train.extra.get("loss_type")) is not None:
        _check_loss("train.extra.loss_type", extra, config.kind)


def _check_loss(setting: str, name: Any, trainer: str) -> None:
    known = LOSSES.get(trainer, ())
    if known and name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise SettingsError(f"{setting}: {name!r} is not a loss of this trainer.", f"{hint}Known: {', '.join(known)}")
