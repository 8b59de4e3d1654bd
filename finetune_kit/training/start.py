"""What would end a run late is looked for before anything is read: the model's shapes and the settings say it."""

from __future__ import annotations

import difflib
from typing import Any

from finetune_kit.config import RecipeConfig
from finetune_kit.errors import SettingsError
from finetune_kit.model.load import learned_positions

# TRL's names, by recipe or kind of rows; where a trainer looks at the name only in its first step
LOSSES = {
    "dpo": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "labelled_completion": ("kto", "apo_zero_unpaired"),
    "prompt": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"),
    "prompt_completion": ("nll", "dft"),
}
SAMPLED = ("max_new_tokens", "max_completion_length")  # of recipes that sample: tokens beside those of the prompt


def check_start(config: RecipeConfig) -> None:
    """Raises SettingsError for samples longer than the model's positions, and for losses that TRL does not have."""
    _check_losses(config)
    _check_positions(config)


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
        f"{fix}, or take a model that reads more.",
    )


def _check_losses(config: RecipeConfig) -> None:
    """That TRL's trainer of the recipe knows the loss, which it would say at the first step."""
    own = getattr(config, "loss_type", None)
    if isinstance(own, list):
        if not own:
            raise SettingsError("loss_type is empty: nothing would be learned.", "Such as loss_type=[sigmoid]")
        for name in own:
            _check_loss("loss_type", name, "dpo")
        weights: list[Any] = getattr(config, "loss_weights", [])
        if weights and len(weights) != len(own):
            raise SettingsError(f"loss_weights has {len(weights)} numbers for {len(own)} losses.", "Give one each.")
    elif (name := config.train.extra.get("loss_type")) is not None:
        _check_loss("train.extra.loss_type", name, config.kind)


def _check_loss(setting: str, name: Any, trainer: str) -> None:
    known = LOSSES.get(trainer, ())
    if known and name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise SettingsError(f"{setting}: {name!r} is no loss of this trainer.", f"{hint}Known: {', '.join(known)}")
