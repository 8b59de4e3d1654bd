"""Our settings become the trainer's arguments, or are refused: none is silently without effect."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, SFTConfig

from finetune_kit.data.load import load_data
from finetune_kit.errors import FinetuneKitError, ResourceError, SettingsError
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import TrainConfig
from finetune_kit.training.arguments import INERT, make_arguments, training_arguments
from finetune_kit.training.steps import steps
from tests.fixtures_training import fit_only, prepare, settings

# A value other than FAST's and the default for every field of TrainConfig.
CHANGED = {
    "output_dir": "elsewhere",
    "learning_rate": "3e-4",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "3",
    "max_tokens_per_batch": "60",
    "train_sampling_strategy": "group_by_length",
    "num_train_epochs": "2",
    "max_steps": "7",
    "warmup_steps": "1",
    "lr_scheduler_type": "cosine",
    "optim": "adafactor",
    "weight_decay": "0.1",
    "max_grad_norm": "0.5",
    "neftune_noise_alpha": "5",
    "gradient_checkpointing": "true",
    "logging_steps": "3",
    "save_steps": "4",
    "seed": "5",
    "report_to": "[tensorboard]",
    "extra": "{adam_beta2: 0.9}",
}
# These act in fit.py and guard.py instead; tests/training/test_fit.py and test_guard.py show how.
IN_FIT = {
    *("eval_steps", "early_stopping_patience", "metric_for_best_model", "padding_free", "save_total_limit"),
    *("on_nonfinite", "decay_steps"),  # of a schedule whose steps build.py counts: tests/recipes/test_pretrain.py
}


def arguments_of(home: Path, *words: str) -> dict[str, Any]:
    config = settings("lora_sft", home, *words)
    data = load_data(config.data, "prompt_completion", load_tokenizer(config.model))
    return training_arguments(SFTConfig, config, data)


def test_every_field_of_train_config_is_covered_here_or_in_test_fit() -> None:
    assert {field.name for field in dataclasses.fields(TrainConfig)} == set(CHANGED) | IN_FIT


@pytest.mark.parametrize("name", CHANGED)
def test_every_field_of_train_config_changes_the_trainers_arguments(home: Path, name: str) -> None:
    assert arguments_of(home, f"train.{name}={CHANGED[name]}") != arguments_of(home)


def test_the_arguments_are_those_of_a_cpu_in_float32_with_our_own_evaluation(home: Path) -> None:
    arguments = make_arguments(SFTConfig, config := settings("lora_sft", home), data_of(config))
    assert arguments.use_cpu
    assert not arguments.bf16
    assert not arguments.fp16
    assert not arguments.gradient_checkpointing
    assert not arguments.logging_nan_inf_filter
    assert arguments.eval_strategy == "no"
    assert arguments.report_to == []
    assert arguments.max_length is None


def data_of(config: Any) -> Any:
    return load_data(config.data, "prompt_completion", load_tokenizer(config.model))


class TestExtra:
    def test_adam_beta2_reaches_the_trainer_and_moves_the_weights_otherwise(self, home: Path) -> None:
        plain, changed = fit_only("lora_sft", home), fit_only("lora_sft", home, "train.extra.adam_beta2=0.5")
        assert changed.trainer.args.adam_beta2 == 0.5
        assert plain.trainer.args.adam_beta2 == 0.999
        assert plain.moved != changed.moved

    def test_a_schedule_with_arguments_of_its_own_gets_them(self, home: Path) -> None:
        words = ("lr_scheduler_type=cosine_with_min_lr", "train.extra.lr_scheduler_kwargs={min_lr: 1e-4}")
        run = fit_only("lora_sft", home, *words, "learning_rate=1e-3", "max_steps=4")
        assert run.history[0]["learning_rate"] == 1e-3
        rates = [line["learning_rate"] for line in run.history]
        # the fourth of 4 steps is three quarters down the cosine from 1e-3 to 1e-4
        assert rates[-1] == pytest.approx(1e-4 + (1e-3 - 1e-4) * (1 + math.cos(0.75 * math.pi)) / 2)

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("train.extra.adam_beta3=0.9", "Did you mean train.extra.adam_beta"),
            ("train.extra.learning_rate=1e-3", "train.learning_rate"),
            ("train.extra.max_length=10", "set by finetune_kit"),
            ("train.extra.bf16=true", "set by finetune_kit"),
            ("train.extra.length_column_name=size", "lengths are counted in the rows"),
            ("train.extra.adam_beta2=much", "expected float or int, found 'much'"),
            ("train.extra.adam_beta2=true", "expected float or int, found True"),
            ("train.extra.data_seed=0.5", "expected int or null, found 0.5"),
            ("train.extra.assistant_only_loss=true", "see the data section"),
            ("train.extra.per_device_eval_batch_size=2", "measured by finetune_kit"),
            ("train.extra.load_best_model_at_end=true", "measured by finetune_kit"),
            ("train.extra.fp16=true", "model.dtype"),
            ("train.extra.resume_from_checkpoint=x", "resumes from its newest whole checkpoint"),
            ("train.extra.push_to_hub=true", "a run is pushed by the hub section"),
            ("train.extra.hub_token=secret", "a run is pushed by the hub section"),
            ("train.extra.loss_type=nonsense", "nonsense"),
        ],
    )
    def test_what_cannot_act_is_refused_with_the_reason(self, home: Path, word: str, said: str) -> None:
        with pytest.raises(SettingsError) as caught:
            prepare("lora_sft", home, word)
        assert said in str(caught.value)
        assert not list(home.glob("run*/*"))

    def test_every_inert_name_is_an_argument_of_a_trainer(self) -> None:
        names = [field.name for config in (SFTConfig, DPOConfig) for field in dataclasses.fields(config)]
        for word in (word for words in INERT.values() for word in words):
            assert any(name == word or (word.endswith("*") and name.startswith(word[:-1])) for name in names), word


class TestRefused:
    @pytest.mark.parametrize(
        ("word", "error", "said"),
        [
            ("optim=adamw_troch", SettingsError, "adamw_torch"),
            ("optim=grokadamw", ResourceError, "pip install grokadamw"),
            ("lr_scheduler_type=cosin", SettingsError, "cosine"),
            ("lr_scheduler_type=reduce_lr_on_plateau", SettingsError, "lr_scheduler_type=cosine"),
            ("lr_scheduler_type=cosine_with_min_lr", SettingsError, "train.extra.lr_scheduler_kwargs"),
            ("report_to=[nonsense]", SettingsError, "tensorboard"),
            ("report_to=[wandb]", ResourceError, "pip install wandb"),
            ("warmup_steps=-1", SettingsError, "warmup_steps"),
            ("weight_decay=-1", SettingsError, "weight_decay"),
            ("save_total_limit=0", SettingsError, "save_total_limit"),
            ("eval_steps=0", SettingsError, "eval_steps"),
            ("max_steps=0", SettingsError, "max_steps"),
            ("learning_rate=5", SettingsError, "learning_rate"),
            ("num_train_epochs=0", SettingsError, "num_train_epochs"),
            ("early_stopping_patience=2", SettingsError, "eval_steps"),
            ("metric_for_best_model=exact_match", SettingsError, "eval_steps"),
        ],
    )
    def test_it_says_why_and_leaves_no_folder(
        self, home: Path, word: str, error: type[FinetuneKitError], said: str
    ) -> None:
        with pytest.raises(error) as caught:
            prepare("lora_sft", home, word)
        assert said in str(caught.value)
        assert not list(home.glob("run*"))

    def test_a_metric_that_is_not_measured_is_refused_before_training_and_the_known_ones_named(
        self, home: Path
    ) -> None:
        words = ("eval_steps=1", "metric_for_best_model=exact_macht", "evaluate.size=2")
        with pytest.raises(SettingsError, match="Known: loss, exact_match"):
            prepare("lora_sft", home, *words)
        with pytest.raises(SettingsError, match=r"Known: loss$"):
            prepare("lora_sft", home, *words[:2], "evaluate.size=0")


class TestSteps:
    @pytest.mark.parametrize(
        "words",
        [
            ("max_steps=-1",),
            ("max_steps=-1", "num_train_epochs=2.5"),
            ("max_steps=-1", "per_device_train_batch_size=3", "gradient_accumulation_steps=4"),
            ("max_steps=6",),
        ],
    )
    def test_the_number_of_steps_said_before_is_the_number_taken(self, home: Path, words: tuple[str, ...]) -> None:
        run = fit_only("lora_sft", home, *words)
        assert steps(run.config, run.data)["steps"] == run.trainer.state.max_steps == run.history[-1]["step"]


def test_4_bit_weights_are_not_cut_into_shards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="load_in_4bit: FSDP was asked for, and 4-bit weights are not cut"):
        fit_only("qlora_sft", home)
