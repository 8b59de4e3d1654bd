"""Which setting a name means that somebody wrote, and what to say where it means none."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path

from finetune_kit.errors import SettingsError

SHOW = "python -m finetune_kit show"

# Ours: the names that people know it by from other toolkits, older releases or other sections.
_ELSEWHERE = {
    "lora.r": "lora_r lora_rank rank adapter_rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_modules",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.name_or_path": "model_name_or_path base_model model_name checkpoint_dir",
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.attn_implementation": "flash_attention flash_attn",
    "data.path": "dataset datasets dataset_name dataset_path data_files train_file",
    "data.name": "dataset_config dataset_config_name",
    "data.split": "dataset_train_split",
    "data.max_length": "max_seq_length max_seq_len sequence_len cutoff_len block_size",
    "data.packing": "sample_packing packed",
    "data.held_out_size": "val_set_size test_size test_split_size val_size",
    "data.held_out_path": "eval_dataset validation_file test_file eval_file",
    "data.size": "max_samples max_train_samples num_samples limit",
    "data.train_on": "mask_history roles_to_train train_on_inputs assistant_only_loss",
    "data.system_prompt": "system default_system",
    "train.learning_rate": "lr",
    "train.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size",
    "train.gradient_accumulation_steps": "grad_accum gradient_accumulation",
    "train.max_tokens_per_batch": "max_tokens batch_max_tokens max_batch_tokens token_budget",
    "train.train_sampling_strategy": "group_by_length length_group",
    "train.num_train_epochs": "num_epochs epochs max_epochs n_epochs",
    "train.max_steps": "steps total_steps num_steps",
    "train.warmup_steps": "warmup_ratio warmup num_warmup_steps",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.optim": "optimizer",
    "train.max_grad_norm": "max_norm clip_grad_norm gradient_clipping",
    "train.neftune_noise_alpha": "neftune noise_alpha",
    "train.gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
    "train.output_dir": "out out_dir output save_dir",
    "train.logging_steps": "log_every_n_steps log_every",
    "train.eval_steps": "eval_interval evals_per_epoch eval_every",
    "train.save_steps": "save_interval saves_per_epoch save_every",
    "train.early_stopping_patience": "early_stopping_steps patience",
    "evaluate.size": "val_max_samples max_eval_samples",
    "evaluate.batch_size": "per_device_eval_batch_size eval_batch_size",
    "hub.model_id": "hub_model_id repo_id",
    "hub.push": "push_to_hub",
    "hub.private": "hub_private_repo",
    "hub.strategy": "hub_strategy",
}
KNOWN_ELSEWHERE = {name: ours for ours, names in _ELSEWHERE.items() for name in names.split()}


def find_name(written: str, known: Sequence[str], everywhere: Sequence[str], recipe: str, origin: str) -> str:
    """The dotted key that `written` means: itself, or the only key that ends so; dashes count as underscores.

    `known` are the recipe's keys, `everywhere` those of all sections. Raises SettingsError with the nearest right name.
    """
    key = written.replace("-", "_")
    if key in known:
        return key
    bare = [name for name in known if _last(name) == key]
    if bare and KNOWN_ELSEWHERE.get(key) in known:  # batch_size is one of ours, and elsewhere it is another of ours
        bare.append(KNOWN_ELSEWHERE[key])
    if len(bare) > 1:
        raise SettingsError(f"{written}: say which one ({origin}): {' or '.join(bare)}.")
    if bare:
        return bare[0]
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        raise SettingsError(f"{written} is a section, not a setting ({origin}).", f"Such as {inside[0]}=…")
    meant = KNOWN_ELSEWHERE.get(key) or KNOWN_ELSEWHERE.get(_last(key))
    meant = meant or next((name for name in everywhere if key in (name, _last(name))), "")
    section = (meant or key).partition(".")[0]
    if section in _sections(everywhere) - _sections(known):
        name = f" ({meant} is the setting's name.)" if meant else ""
        raise SettingsError(
            f"{written} has no effect in {recipe}: the recipe has no section '{section}' ({origin}).",
            f"Leave it out, or take another recipe: python -m finetune_kit list.{name}",
        )
    meant = meant or _nearest(key, known)
    fix = f"Did you mean {meant}? " if meant else ""
    raise SettingsError(f"{written}: unknown setting ({origin}).", f"{fix}See all: {SHOW} {recipe}")


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _sections(keys: Sequence[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def _nearest(key: str, known: Sequence[str]) -> str:
    """The key whose whole or last name is spelled most like `key` or its last name; "" where none is near."""
    names = {spelling: name for name in known for spelling in (name, _last(name))}
    near = difflib.get_close_matches(key, names, n=1) or difflib.get_close_matches(_last(key), names, n=1)
    return names[near[0]] if near else ""


def near_path(path: str) -> str:
    """ "Did you mean runs/lora_sft? " for a path that is not there, where one beside it is spelled like it; else ""."""
    place, there = Path(path).expanduser(), []
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        there = sorted(entry.name for entry in place.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, there, n=1, cutoff=0.75)
    if not near:  # another ending, or another case
        near = [name for name in there if Path(name).stem.lower() == place.stem.lower()][:1]
    return f"Did you mean {Path(path).parent / near[0]}? " if near else ""
