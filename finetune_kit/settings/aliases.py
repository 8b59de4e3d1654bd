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
    "lora.lora_alpha": "alpha lora_scaling",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_modules",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.name_or_path": (
        "model_name_or_path base_model model_name checkpoint_dir model_path pretrained base checkpoint"
    ),
    "model.revision": "model_revision",
    "model.dtype": "torch_dtype bf16 fp16 precision",
    "model.attn_implementation": "flash_attention flash_attn",
    "data.path": (
        "dataset datasets dataset_name dataset_path data_files data_file data_path data_dir dataset_dir "
        "train_file file files "
        "filename file_name file_path training_file train_data training_data train_dataset jsonl csv input "
        "inputs folder rows"
    ),
    "data.name": "dataset_config dataset_config_name",
    "data.split": "dataset_train_split",
    "data.max_length": (
        "max_seq_length max_seq_len sequence_len sequence_length seq_length seq_len cutoff_len block_size "
        "context_length max_len"
    ),
    "data.packing": "sample_packing packed pack",
    "data.held_out_size": "val_set_size test_size test_split_size val_size",
    "data.held_out_path": (
        "eval_dataset validation_file test_file eval_file test_datasets val_file validation_data test_data eval_data"
    ),
    "data.size": "max_samples max_train_samples num_samples limit",
    "data.train_on": "mask_history roles_to_train train_on_inputs assistant_only_loss",
    "data.system_prompt": "system default_system",
    "train.learning_rate": "lr rate peak_lr max_lr",
    "train.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size batch bs batchsize",
    "train.gradient_accumulation_steps": "grad_accum gradient_accumulation grad_accumulation accumulation_steps ga",
    "train.max_tokens_per_batch": "max_tokens batch_max_tokens max_batch_tokens token_budget",
    "train.train_sampling_strategy": "group_by_length length_group",
    "train.num_train_epochs": "num_epochs epochs max_epochs n_epochs epoch",
    "train.max_steps": "steps total_steps num_steps iters iterations max_iters",
    "train.warmup_steps": "warmup_ratio warmup num_warmup_steps",
    "train.lr_scheduler_type": "lr_scheduler scheduler",
    "train.optim": "optimizer optimiser",
    "train.max_grad_norm": "max_norm clip_grad_norm gradient_clipping",
    "train.neftune_noise_alpha": "neftune noise_alpha",
    "train.gradient_checkpointing": "activation_checkpointing enable_activation_checkpointing",
    "train.output_dir": "out out_dir output save_dir output_path save_path run_dir",
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
    "train.report_to": (
        "wandb use_wandb wandb_project tracker trackers logger mlflow use_mlflow tensorboard use_tensorboard"
    ),
    "train.seed": "random_seed random_state",
    "evaluate.metrics": "metric eval_metrics compute_metrics",
    "evaluate.max_new_tokens": "max_generate_length eval_max_new_tokens",
    "data.columns": "column_mapping field_instruction field_output text_column prompt_column response_column",
    "data.chat_template_kwargs": "enable_thinking template_kwargs",
}
KNOWN_ELSEWHERE = {name: ours for ours, names in _ELSEWHERE.items() for name in names.split()}


# Settings of other toolkits for what is done here in another way, or by itself.
_DONE_OTHERWISE = {
    "adapter finetuning_type use_peft peft use_lora lora peft_method stage task training_type method trainer rl": (
        "the recipe says it: lora_sft, qlora_sft, full_sft, dpo, … (python -m finetune_kit list)"
    ),
    "do_train do_eval do_predict overwrite_output_dir overwrite_cache": "run trains, and measures before and after",
    "template chat_template conversation prompt_template prompt_format eot_tokens special_tokens": (
        "the model's own chat template is used, with its end token"
    ),
    "type dataset_type model_type tokenizer_type format ds_type formatting": (
        "found by looking at the rows or the model"
    ),
    "dataset_prepared_path preprocessing_num_workers dataset_processes dataset_num_proc num_workers plot_loss strict": (
        "nothing to set: leave it out"
    ),
    "wandb_entity wandb_run_id wandb_watch wandb_name wandb_log_model": ("in the environment: WANDB_NAME, …"),
    "load_in_8bit quantization_bit quantization quantize bits": "model.load_in_4bit, or the recipe qlora_sft",
    "tokenizer_config tokenizer tokenizer_name tokenizer_name_or_path": "the tokenizer in the model's folder is used",
    "tf32 local_rank device device_map num_gpus gpus fsdp": "docs/scale.md: accelerate launch",
    "liger use_liger_kernel neat_packing unsloth": "train.padding_free does that by itself",
    "verbose debug_mode logging_dir": "nothing to set: leave it out",
}
DONE_OTHERWISE = {name: reason for names, reason in _DONE_OTHERWISE.items() for name in names.split()}


class UnknownSetting(SettingsError):
    """A name that is not a setting. `meant`: the right one, or why there is none; "" where nothing is near."""

    def __init__(self, written: str, origin: str, meant: str, recipe: str) -> None:
        self.written, self.origin, self.meant = written, origin, meant
        reason = meant if " " in meant else f"Did you mean {meant}?" if meant else ""
        fix = " ".join(filter(None, [reason, f"See all: {SHOW} {recipe}"])) if " " not in meant else f"{reason}."
        super().__init__(f"{written}: unknown setting ({origin}).", fix)


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
            f"Leave it out, or use another recipe: python -m finetune_kit list.{name}",
        )
    reason = DONE_OTHERWISE.get(_last(key), "")
    raise UnknownSetting(written, origin, meant or reason or _nearest(key, known), recipe)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _sections(keys: Sequence[str]) -> set[str]:
    return {key.partition(".")[0] for key in keys}


def _nearest(key: str, known: Sequence[str]) -> str:
    """The key whose whole or last name is spelled most like `key` or its last name; "" where none is near."""
    names = {spelling: name for name in known for spelling in (name, _last(name))}
    near = difflib.get_close_matches(key, names, n=1) or difflib.get_close_matches(_last(key), names, n=1)
    return names[near[0]] if near else ""


# Commands of other tools, and what people type for ours.
_COMMANDS = {
    "run": "train training finetune fine-tune fine_tune finetuning tune ft fit launch start resume go",
    "evaluate": "eval test benchmark score measure metrics",
    "generate": "chat infer inference predict ask talk sample complete completion api serve",
    "check": "plan validate preview dry-run dryrun dry_run preprocess lint inspect estimate",
    "list": "ls recipes methods models",
    "show": "info describe explain settings config options help",
    "merge": "export fuse convert",
    "push": "upload publish share",
    "diff": "compare",
    "copy": "cp clone new init eject",
    "doctor": "env debug version versions diagnose",
}
_RECIPES = {
    "lora_sft": "sft lora finetune instruct instruction chat",
    "full_sft": "full full_finetune full-finetune pretrain pt cpt dora",
    "qlora_sft": "qlora qlora-sft 4bit",
    "reward_model": "rm reward reward-model reward_trainer",
    "dpo": "ipo simpo cpo preference preferences",
    "ppo": "rlhf rl rlaif",
    "grpo": "dapo rlvr gspo r1",
}
COMMANDS = {word: ours for ours, words in _COMMANDS.items() for word in words.split()}
RECIPES = {word: ours for ours, words in _RECIPES.items() for word in words.split()}


def near_path(path: str) -> str:
    """ "Did you mean runs/lora_sft? " for a path that is not there, where one beside it is spelled like it; else ""."""
    place, there = Path(path).expanduser(), []
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        if place.exists():
            return ""  # it is there, and is something else
        there = sorted(entry.name for entry in place.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, there, n=1, cutoff=0.75)
    if not near:  # another ending, or another case
        near = [name for name in there if Path(name).stem.lower() == place.stem.lower()][:1]
    return f"Did you mean {Path(path).parent / near[0]}? " if near else ""


def together(problems: Sequence[SettingsError]) -> SettingsError:
    """All that is wrong with the settings in one error: a line each, of unknown names with the right ones beside."""
    if len(problems) == 1:
        return problems[0]
    unknown = [problem for problem in problems if isinstance(problem, UnknownSetting)]
    wide = max((len(f"{problem.origin}  {problem.written}") for problem in unknown), default=0)
    lines = []
    for problem in unknown:
        name = f"{problem.origin}  {problem.written}"
        lines.append(f"  {name:<{wide}}  →  {problem.meant or 'unknown; nothing is spelled like it'}")
    lines += [f"  {problem.message}  {problem.fix}".rstrip() for problem in problems if problem not in unknown]
    return SettingsError("\n".join([f"{len(problems)} mistakes in the settings:", *lines]), f"See all: {SHOW} RECIPE")
