"""What training does: every setting that a user expects to act is seen to act, on the tiny model."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.compare import held_out_scores
from finetune_kit.settings.schema import TrainConfig
from finetune_kit.training.fit import fit
from finetune_kit.training.progress import hooks
from tests.fixtures_training import Trained, fit_only, largest_difference, norm, prepare


def lines(run: Trained) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run: Trained) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.folder.glob("checkpoint-*"))


class TestSteps:
    @pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
    def test_8_rows_at_once_equal_8_passes_of_1_row_within_1e_5(self, home: Path, recipe: str) -> None:
        same = ("max_steps=3", "learning_rate=1e-3")
        once = fit_only(recipe, home, *same, "per_device_train_batch_size=8", "gradient_accumulation_steps=1")
        cut = fit_only(recipe, home, *same, "per_device_train_batch_size=1", "gradient_accumulation_steps=8")
        supervised = [sum(label != -100 for label in row["labels"]) for row in once.data.train]
        assert len(set(supervised)) > 3  # the answers have unequal lengths, so a mean of means would differ
        assert once.losses == pytest.approx(cut.losses, abs=1e-5)
        assert largest_difference(once.weights, cut.weights) <= 1e-5
        assert once.moved > 1e-3

    @pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
    def test_the_same_seed_gives_bit_equal_weights_and_another_seed_does_not(self, home: Path, recipe: str) -> None:
        first, again, other = (fit_only(recipe, home, f"seed={seed}") for seed in (1, 1, 2))
        assert first.losses == again.losses
        assert largest_difference(first.weights, again.weights) == 0
        assert largest_difference(first.weights, other.weights) > 0

    def test_the_loss_of_each_step_equals_that_of_trl_on_the_same_tokens_within_1e_4(self, home: Path) -> None:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, set_seed
        from trl import SFTConfig, SFTTrainer

        ours = fit_only("lora_sft", home, "max_steps=5", "learning_rate=1e-3", "train.seed=3")
        masked = ours.data.train.map(lambda row: {"completion_mask": [int(label != -100) for label in row["labels"]]})
        base = AutoModelForCausalLM.from_pretrained(home / "tiny", dtype=torch.float32)
        set_seed(3)
        theirs = SFTTrainer(
            model=base,
            args=SFTConfig(
                str(home / "trl"),
                max_steps=5,
                learning_rate=1e-3,
                per_device_train_batch_size=4,
                logging_steps=1,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                seed=3,
                completion_only_loss=True,
            ),
            train_dataset=masked.select_columns(["input_ids", "completion_mask"]),
            processing_class=ours.tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        theirs.train()
        reference = [line["loss"] for line in theirs.state.log_history if "loss" in line]
        assert ours.losses == pytest.approx(reference, abs=1e-4)
        assert max(ours.losses) - min(ours.losses) > 0.01

    def test_num_train_epochs_2_passes_over_37_rows_twice_in_batches_of_10(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=10")
        assert len(run.data.train) == 37
        assert [line["step"] for line in run.history] == list(range(1, 2 * math.ceil(37 / 10) + 1))
        assert run.history[-1]["tokens"] == 2 * sum(map(len, run.data.train["input_ids"]))


def linear(step: int, warmup: int, steps: int) -> float:
    return step / warmup if step < warmup else (steps - step) / (steps - warmup)


def cosine(step: int, warmup: int, steps: int) -> float:
    return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def constant(step: int, warmup: int, steps: int) -> float:
    return min(1.0, step / warmup)


class TestLearningRate:
    @pytest.mark.parametrize(
        ("name", "formula"), [("linear", linear), ("cosine", cosine), ("constant_with_warmup", constant)]
    )
    @pytest.mark.parametrize("warmup", ["2", "0.25"])
    def test_8_steps_with_2_of_warm_up_or_a_quarter_follow_the_closed_form(
        self, home: Path, name: str, formula: Any, warmup: str
    ) -> None:
        words = (f"lr_scheduler_type={name}", f"warmup_steps={warmup}", "max_steps=8", "learning_rate=1e-3")
        rates = [line["learning_rate"] for line in fit_only("lora_sft", home, *words).history]
        assert rates == pytest.approx([1e-3 * formula(step, 2, 8) for step in range(8)])

    def test_a_constant_rate_stays(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "lr_scheduler_type=constant", "learning_rate=1e-3", "max_steps=3")
        assert [line["learning_rate"] for line in run.history] == [1e-3] * 3

    def test_a_rate_of_0_moves_nothing(self, home: Path) -> None:
        assert fit_only("full_sft", home, "learning_rate=0").moved == 0


class TestOptimizer:
    @pytest.mark.parametrize(
        "name",
        ["auto", "adamw_torch", "adafactor", "sgd", "adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit"],
    )
    def test_each_optimizer_moves_the_weights(self, home: Path, name: str) -> None:
        run = fit_only("full_sft", home, f"optim={name}", "learning_rate=1e-3")
        assert run.moved > 0
        assert all(torch.isfinite(weight).all() for weight in run.weights.values())

    def test_optimizers_differ_from_each_other(self, home: Path) -> None:
        moved = [fit_only("full_sft", home, f"optim={name}", "learning_rate=1e-3").moved for name in ("auto", "sgd")]
        assert moved[0] != moved[1]

    def test_weight_decay_of_1000_at_a_rate_of_1e_4_shrinks_the_matrices_to_81_percent_in_2_steps(
        self, home: Path
    ) -> None:
        words = ("learning_rate=1e-4", "lr_scheduler_type=constant")
        free, decayed = (fit_only("full_sft", home, *words, f"weight_decay={decay}") for decay in (0, 1000))
        matrices = [name for name, weight in free.start.items() if weight.ndim == 2]
        start, without, with_decay = (
            norm({name: weights[name] for name in matrices}) for weights in (free.start, free.weights, decayed.weights)
        )
        assert without / start == pytest.approx(1, abs=0.01)
        assert with_decay / without == pytest.approx((1 - 1e-4 * 1000) ** 2, abs=0.01)

    def test_max_grad_norm_bounds_the_length_of_a_step(self, home: Path) -> None:
        words = ("optim=sgd", "learning_rate=0.1", "max_steps=1", "lr_scheduler_type=constant")
        free, bound = (fit_only("full_sft", home, *words, f"max_grad_norm={most}") for most in (1000, 0.01))
        steps = [norm({name: run.weights[name] - run.start[name] for name in run.start}) for run in (free, bound)]
        assert steps[0] == pytest.approx(0.1 * free.history[0]["grad_norm"], rel=1e-3)
        assert steps[1] == pytest.approx(0.1 * 0.01, rel=1e-3)


class TestMemoryAndNoise:
    @pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
    def test_gradient_checkpointing_gives_the_same_losses_and_keeps_less_for_backward(
        self, home: Path, recipe: str
    ) -> None:
        plain, plain_bytes = self.kept_bytes(recipe, home, "false")
        saving, saving_bytes = self.kept_bytes(recipe, home, "true")
        assert saving.losses == pytest.approx(plain.losses, abs=1e-5)
        assert largest_difference(saving.weights, plain.weights) <= 1e-5
        assert saving_bytes < 0.6 * plain_bytes

    @staticmethod
    def kept_bytes(recipe: str, home: Path, setting: str) -> tuple[Trained, int]:
        kept = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run = fit_only(recipe, home, f"gradient_checkpointing={setting}", "learning_rate=1e-4")
        return run, kept

    @pytest.mark.long
    def test_compiled_packed_rows_give_the_same_losses_within_1e_5(self, home: Path) -> None:
        from torch._dynamo.utils import counters

        words = ("max_steps=3", "learning_rate=1e-3")
        eager = fit_only("lora_sft", home, *words)
        torch._dynamo.reset()
        counters.clear()
        compiled = fit_only("lora_sft", home, *words, "train.extra.torch_compile_backend=aot_eager")
        assert counters["stats"]["unique_graphs"] > 0
        assert compiled.losses == pytest.approx(eager.losses, abs=1e-5)
        assert largest_difference(compiled.weights, eager.weights) <= 1e-5

    def test_neftune_noise_changes_training_and_leaves_evaluation_alone(self, home: Path) -> None:
        words = ("learning_rate=0", "eval_steps=1")
        plain = fit_only("full_sft", home, *words)
        noisy = fit_only("full_sft", home, *words, "neftune_noise_alpha=5")
        assert all(abs(one - other) > 1e-4 for one, other in zip(plain.losses, noisy.losses, strict=True))
        evaluated = [[line["eval_loss"] for line in run.history if "eval_loss" in line] for run in (plain, noisy)]
        assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)
        assert len(evaluated[0]) == 2
        after = held_out_scores(noisy.model, noisy.tokenizer, noisy.data, noisy.config.evaluate)
        assert after["loss"] == pytest.approx(evaluated[0][0], abs=1e-6)

    def test_lora_dropout_changes_training(self, home: Path) -> None:
        plain, dropped = (fit_only("lora_sft", home, f"lora_dropout={share}") for share in (0, 0.5))
        assert plain.losses[1] != dropped.losses[1]

    def test_trained_weights_are_float32_even_over_a_bfloat16_base(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "model.dtype=bfloat16")
        assert {weight.dtype for weight in run.weights.values()} == {torch.float32}
        assert {p.dtype for p in run.model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert run.moved > 0

    @pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
    def test_without_padding_the_losses_are_the_same_and_the_layers_see_real_tokens_only(
        self, home: Path, recipe: str
    ) -> None:
        words = ("learning_rate=1e-3", "max_steps=3")
        padded, padded_tokens = self.layer_tokens(recipe, home, *words, "padding_free=false")
        free, free_tokens = self.layer_tokens(recipe, home, *words, "padding_free=true")
        assert free.losses == pytest.approx(padded.losses, abs=1e-5)
        assert largest_difference(free.weights, padded.weights) <= 1e-5
        assert free_tokens <= free.history[-1]["tokens"] < padded_tokens

    @staticmethod
    def layer_tokens(recipe: str, home: Path, *words: str) -> tuple[Trained, int]:
        """Tokens that went through the first layer; rows that begin alike are there once."""
        seen = 0

        def count(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            nonlocal seen
            seen += inputs[0].shape[0] * inputs[0].shape[1]

        def begin(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal seen
            seen = seen if state.global_step else 0  # those of the trial before the first step do not count

        run = prepare(recipe, home, *words)
        run.trainer.add_callback(hooks(on_step_begin=begin))
        base = run.model if recipe == "full_sft" else run.model.get_base_model()
        base.model.layers[0].register_forward_pre_hook(count)
        run.history = fit(run.trainer, run.config.train, lambda model, metric: {"loss": 1.0})
        return run, seen


class Scores:
    """Stands for the measurement: gives the numbers in turn."""

    def __init__(self, *numbers: float, name: str = "loss") -> None:
        self.numbers, self.name = iter(numbers), name

    def __call__(self, model: Any, metric: str) -> dict[str, float]:
        return {"loss": 1.0, self.name: next(self.numbers)}


class TestBestAndLast:
    def test_two_losses_in_a_row_that_are_no_better_stop_the_run_and_the_best_weights_win(self, home: Path) -> None:
        words = ("max_steps=9", "eval_steps=1", "early_stopping_patience=2", "learning_rate=1e-2")
        run = fit_only("lora_sft", home, *words, score=Scores(5, 4, 6, 4))
        assert run.history[-1]["step"] == 4
        assert checkpoints(run) == [2, 4]  # the best and the last
        best, last = (adapter_tensors(run, step) for step in (2, 4))
        assert largest_difference(best, in_memory(run, best)) == 0
        assert largest_difference(last, in_memory(run, last)) > 0

    def test_a_full_model_ends_with_its_best_weights_too(self, home: Path) -> None:
        words = ("max_steps=3", "eval_steps=1", "learning_rate=1e-2", "save_total_limit=1")
        run = fit_only("full_sft", home, *words, score=Scores(3, 5, 4))
        assert checkpoints(run) == [1, 3]  # with room for one only: the best one, and the one a killed run needs
        saved = load_file(run.folder / "checkpoint-1" / "model.safetensors")
        assert max(float((saved[name] - run.weights[name]).abs().max()) for name in saved) == 0

    def test_of_a_metric_of_the_report_more_is_better(self, home: Path) -> None:
        words = ("max_steps=3", "eval_steps=1", "metric_for_best_model=exact_match", "evaluate.size=2")
        run = fit_only("lora_sft", home, *words, score=Scores(0.1, 0.9, 0.5, name="exact_match"))
        assert run.trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert run.trainer.state.best_metric == 0.9

    def test_the_last_step_is_measured_and_kept_even_off_the_interval(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "max_steps=5", "eval_steps=2", score=Scores(3, 4, 5))
        assert [line["step"] for line in run.history if "eval_loss" in line] == [2, 4, 5]
        assert checkpoints(run) == [2, 5]

    def test_a_rate_that_ruins_the_model_is_stopped_by_its_own_held_out_loss(self, home: Path) -> None:
        words = ("max_steps=30", "eval_steps=1", "early_stopping_patience=2", "learning_rate=1", "optim=sgd")
        run = fit_only("full_sft", home, *words, "max_grad_norm=100", "lr_scheduler_type=constant")
        losses = [line["eval_loss"] for line in run.history if "eval_loss" in line]
        assert len(losses) < 30
        now = held_out_scores(run.model, run.tokenizer, run.data, run.config.evaluate)["loss"]
        assert now == pytest.approx(min(losses), abs=1e-6)


def adapter_tensors(run: Trained, step: int) -> dict[str, torch.Tensor]:
    saved: dict[str, torch.Tensor] = load_file(run.folder / f"checkpoint-{step}" / "adapter_model.safetensors")
    return saved


def in_memory(run: Trained, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(run.model, save_embedding_layers=False)
    return {name: state[name] for name in like}


class TestIntervals:
    def test_save_steps_2_of_5_with_room_for_3_leaves_checkpoints_2_4_5(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "max_steps=5", "save_steps=2", "save_total_limit=3")
        assert checkpoints(run) == [2, 4, 5]

    def test_save_total_limit_1_keeps_only_the_last_where_none_is_best(self, home: Path) -> None:
        assert checkpoints(fit_only("lora_sft", home, "max_steps=3", "save_steps=1", "save_total_limit=1")) == [3]

    def test_unasked_the_end_of_training_is_kept_and_with_save_steps_null_nothing(self, home: Path) -> None:
        assert checkpoints(fit_only("lora_sft", home)) == [2]
        assert checkpoints(fit_only("lora_sft", home, "save_steps=null")) == []

    def test_logging_steps_2_of_5_writes_the_first_and_every_second_step(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "max_steps=5", "logging_steps=2", "eval_steps=4")
        assert [(line["step"], "eval_loss" in line) for line in lines(run)] == [
            (1, False),
            (2, False),
            (4, True),
            (4, False),
            (5, True),
            (5, False),  # the last step has its line, whatever logging_steps says
        ]
        assert lines(run) == run.history

    def test_report_to_tensorboard_writes_event_files_inside_the_run_folder(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "report_to=[tensorboard]")
        assert list(run.folder.rglob("events.out.tfevents.*"))
        assert not list(fit_only("lora_sft", home).folder.rglob("events.out.tfevents.*"))

    @pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
    def test_no_pickle_of_arguments_no_card_and_no_local_path_is_left_in_a_checkpoint(
        self, home: Path, recipe: str
    ) -> None:
        run = fit_only(recipe, home, "save_steps=1")
        assert not list(run.folder.rglob("training_args.bin"))
        assert not list(run.folder.rglob("README.md"))
        for path in run.folder.glob("checkpoint-*/*.json"):
            assert path.name in ("trainer_state.json", "MANIFEST.json") or str(home) not in path.read_text(), path


class TestPacking:
    def test_samples_of_one_packed_row_do_not_see_each_other(self, home: Path) -> None:
        run = prepare("full_sft", home, "packing=true", "max_length=128")
        run.model.eval()
        row = next(row for row in run.trainer.train_dataset if len(row["seq_lengths"]) >= 3)
        batch = run.trainer.data_collator([row])
        assert batch["position_ids"][0, row["seq_lengths"][0]] == 0
        before = log_probabilities(run.model, batch)
        batch["input_ids"][0, 2] = (batch["input_ids"][0, 2] + 7) % 200 + 5
        after = log_probabilities(run.model, batch)
        change = (after - before).abs().amax(dim=-1)[0]
        first = row["seq_lengths"][0]
        assert change[2:first].max() > 1e-3
        assert change[first:].max() <= 1e-6

    def test_a_packed_sample_is_scored_as_if_it_were_alone(self, home: Path) -> None:
        run = prepare("full_sft", home, "packing=true", "max_length=128")
        run.model.eval()
        row = next(row for row in run.trainer.train_dataset if len(row["seq_lengths"]) >= 3)
        batch = run.trainer.data_collator([row])
        packed = log_probabilities(run.model, batch)
        start, stop = row["seq_lengths"][0], sum(row["seq_lengths"][:2])
        with torch.inference_mode():
            alone = run.model(batch["input_ids"][:, start:stop]).logits.log_softmax(dim=-1)
        assert (packed[:, start:stop] - alone).abs().max() <= 1e-5

    def test_packing_loses_no_token_and_trains_fewer_rows(self, home: Path) -> None:
        run = fit_only("lora_sft", home, "packing=true", "max_length=128", "max_steps=-1")
        assert sum(map(len, run.trainer.train_dataset["input_ids"])) == sum(map(len, run.data.train["input_ids"]))
        assert len(run.trainer.train_dataset) < len(run.data.train) / 2
        assert run.history[-1]["tokens"] == sum(map(len, run.data.train["input_ids"]))

    def test_plain_text_is_packed_unasked(self, home: Path) -> None:
        text = "\n\n".join(f"The {n}th line says that {n} times {n} is {n * n}." for n in range(200))
        (home / "book.txt").write_text(text)
        run = prepare("lora_sft", home, f"data.path={home / 'book.txt'}", "max_length=64")
        assert run.data.kind == "text"
        assert run.data.packed
        assert run.trainer.args.packing


def log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.inference_mode():
        scores: torch.Tensor = model(**inputs, use_cache=False).logits.log_softmax(dim=-1)
    return scores


def test_a_recipe_that_has_not_begun_its_run_is_told_the_line_it_lacks(tmp_path: Path) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=str(tmp_path)))
    with pytest.raises(SettingsError, match="holds no run that has begun") as caught:
        fit(trainer, TrainConfig(), dict)
    assert caught.value.fix == "Call begin(config, tokenizer, data, policy) before fit."
