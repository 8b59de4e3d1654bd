"""The settings of PPO, by the field's names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.adapters import is_adapter
from finetune_kit.rewards.settings import RewardConfig
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.schema import ToolsRecipeConfig, TrainConfig, section, setting


@dataclass
class PPOSettings(ToolsRecipeConfig):
    """What PPO adds to a recipe's sections. An update is: sample, score, then epochs of mini-batches.

    train.max_steps and num_train_epochs count updates and passes over the prompts; per_device_train_batch_size is rows
    in one forward pass, and gradients add up over the passes of a mini-batch.
    """

    reward: RewardConfig = section(RewardConfig)
    batch_size: int = setting(64, "completions sampled in one update, over all devices", "rows", within="[1, inf)")
    num_mini_batches: int = setting(4, "optimizer steps in one pass over the update's completions", within="[1, inf)")
    num_ppo_epochs: int = setting(4, "passes over the update's completions", within="[1, inf)")
    max_new_tokens: int = setting(64, "longest completion", "tokens", within="[1, inf)")
    temperature: float = setting(1.0, "temperature of sampling and of every log-probability", within="(0, inf)")
    missing_eos_penalty: float = setting(
        1.0, "taken off the score of a completion that does not end", within="[0, inf)"
    )
    kl_coef: float = setting(0.05, "price of one nat away from the reference", within="[0, inf)")
    kl_estimator: Literal["k1", "k3"] = setting("k1", "k1: log p - log q, unbiased; k3: never negative, less noise")
    adaptive_kl_target: float | None = setting(
        None, "steer kl_coef towards this KL per completion; unset: fixed", "nats", within="(0, inf)"
    )
    adaptive_kl_horizon: int = setting(10_000, "completions in which kl_coef may move by 20 %", within="[1, inf)")
    gamma: float = setting(1.0, "discount of later rewards", within="[0, 1]")
    lam: float = setting(0.95, "GAE: 0 trusts the value one token ahead, 1 only the rewards", within="[0, 1]")
    whiten_rewards: bool = setting(False, "scale each update's token rewards to variance 1")
    whiten_advantages: bool = setting(True, "scale each update's advantages to mean 0 and variance 1")
    cliprange: float = setting(0.2, "clip range of the ratio to the sampling policy", within="(0, 1)")
    cliprange_value: float = setting(0.2, "clip range of the value, as a distance", within="(0, inf)")
    vf_coef: float = setting(0.1, "weight of the value's loss", within="[0, inf)")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus", within="[0, inf)")
    target_kl: float | None = setting(
        None, "stop an update's epochs once the policy is this far from the sampling one", "nats a token", "(0, inf)"
    )
    value_model: Literal["shared", "adapter", "separate"] = setting(
        "shared", "the value: a head on the policy's trunk, on its own adapter, or on its own model"
    )
    value_init_from: str | None = setting(None, "folder of a reward model that the value starts from")
    use_vllm: bool = setting(False, "sample with vLLM (a GPU, a LoRA policy, one process)")
    vllm_gpu_memory_utilization: float = setting(0.3, "share of the GPU's memory that vLLM takes", within="(0, 1)")
    max_kl: float = setting(100.0, "KL per completion above which the run stops", "nats", within="(0, inf)")
    min_entropy: float = setting(1e-3, "entropy below which the run stops", "nats a token", within="[0, inf)")
    min_length: float = setting(1.2, "mean length, end token included, below which the run stops", "tokens", "[0, inf)")
    max_constant_updates: int = setting(5, "updates with all scores alike after which the run stops", within="[1, inf)")

    def check_itself(self) -> None:
        check_settings(self, distributed.count())


# train settings that PPO's own loop has no use for, and why
INERT = {
    "gradient_accumulation_steps": "passes of a step follow from batch_size, num_mini_batches and per_device_…",
    "max_tokens_per_batch": "rows of a pass are per_device_train_batch_size",
    "train_sampling_strategy": "prompts are drawn by the seed, and completions have no length before they are sampled",
    "neftune_noise_alpha": "noise would be part of the ratio",
    "eval_steps": "the held-out answers are measured before and after",
    "extra": "PPO's loop is our own and has no other arguments",
    "report_to": "its log is metrics.jsonl",
}


def check_settings(config: PPOSettings, devices: int) -> None:
    """Raises SettingsError for batch sizes that do not divide, and for settings that have no effect."""
    if sharding := distributed.sharding():
        raise SettingsError(
            f"{sharding} was asked for, and PPO's loop shares gradients alone: each device holds the whole model.",
            "Use accelerate_config.yaml; docs/scale.md says what fits.",
        )
    parts = devices * config.num_mini_batches
    if config.batch_size % parts:
        near = max(1, round(config.batch_size / parts)) * parts
        raise SettingsError(
            f"batch_size={config.batch_size} does not divide into {config.num_mini_batches} mini-batches "
            f"on {devices} device{'s' if devices > 1 else ''}: {config.batch_size} / {parts} is not whole.",
            f"Set batch_size={near}, or another num_mini_batches.",
        )
    for name, reason in INERT.items():
        if getattr(config.train, name) != getattr(TrainConfig(), name):
            raise SettingsError(f"train.{name} has no effect in PPO: {reason}.", "Leave it out.")
    if config.hub.strategy == "every_save":
        raise SettingsError(
            "hub.strategy=every_save has no effect in PPO: its checkpoints hold no model's files.", "Leave it out."
        )
    if config.train.optim not in ("auto", "adamw_torch", "adamw_torch_fused"):
        raise SettingsError(f"train.optim={config.train.optim}: PPO's optimizer is AdamW.", "Leave it out.")
    if config.use_vllm and config.tools:
        raise SettingsError("use_vllm=true samples without tools.", "Leave out one of the two.")
    if not config.use_vllm and config.vllm_gpu_memory_utilization != PPOSettings.vllm_gpu_memory_utilization:
        raise SettingsError("vllm_gpu_memory_utilization has no effect without use_vllm=true.", "Leave it out.")
    _check_value(config)
    if config.adaptive_kl_target is not None and config.kl_coef == 0:
        raise SettingsError("adaptive_kl_target has no effect with kl_coef=0: nothing times anything.", "Set kl_coef.")


def _check_value(config: PPOSettings) -> None:
    """That the value can be of its kind, and start from what it is to start from."""
    lora = config.lora
    if config.value_model == "adapter" and (lora is None or lora.r == 0):
        raise SettingsError(
            "value_model=adapter needs a policy with an adapter; this one is trained in full.",
            "Set value_model=shared or separate.",
        )
    if config.value_init_from is None:
        return
    if config.value_model == "shared":
        raise SettingsError(
            "value_init_from: a head fits the trunk it was trained on, and value_model=shared has the policy's.",
            "Set value_model=adapter (reward model with an adapter) or separate (in full).",
        )
    named, folder = config.value_init_from, Path(config.value_init_from).expanduser()
    if config.value_model == "adapter" and not (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"value_init_from={named}: no adapter there, and value_model=adapter needs one.",
            f"{near_path(named)}Set value_model=separate for a reward model trained in full.",
        )
    if config.value_model == "separate" and not (folder / "config.json").is_file():
        raise SettingsError(
            f"value_init_from={named}: no whole model there, and value_model=separate needs one.",
            f"{near_path(named)}Set value_model=adapter for a reward model with an adapter.",
        )


def check_prompts(prompts: list[list[int]], data: Data, policy: Any, max_new_tokens: int) -> None:
    """Raises DataError where the model's context has no room for a prompt and its completion."""
    room = getattr(policy.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for row, prompt in enumerate(prompts):
        if len(prompt) + max_new_tokens > room:
            raise DataError(
                f"{data.train_records[data.train[row]['row']].where}: a prompt of {len(prompt)} tokens and "
                f"max_new_tokens={max_new_tokens} do not fit the model's context of {room}.",
                f"Set max_new_tokens to at most {room - len(prompt)}, or remove the row.",
            )
    if is_adapter(policy) and policy.active_peft_config.is_prompt_learning:
        raise SettingsError("PPO trains LoRA adapters or the whole model; this adapter is a learned prompt.")
