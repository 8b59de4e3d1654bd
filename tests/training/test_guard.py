"""A number that is not finite stops the run before it reaches a weight."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import NumericsError
from finetune_kit.training.fit import fit
from finetune_kit.training.guard import Guard, finite
from finetune_kit.training.progress import hooks
from tests.fixtures_training import Trained, largest_difference, prepare, write_rows

STATE = SimpleNamespace(global_step=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_10000_is_found(bad: float) -> None:
    numbers = torch.ones(100, 100)
    assert finite([numbers, torch.zeros(3)])
    numbers[57, 3] = bad
    assert not finite([numbers, torch.zeros(3)])


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logged_loss_or_norm_that_is_not_finite_stops_the_run(name: str, bad: float) -> None:
    guard = Guard("stop", None, None)  # type: ignore[arg-type]  # neither is looked at
    guard.on_log(None, STATE, None, logs={"loss": 1.0, "grad_norm": 0.0})
    guard.on_log(None, STATE, None, logs={"train_runtime": math.nan})
    with pytest.raises(NumericsError, match=f"{name} is {bad} at step 3"):
        guard.on_log(None, STATE, None, logs={"loss": 1.0, "grad_norm": 1.0, name: bad})


def poisoned(run: Trained, steps: set[int], kept: dict[int, dict[str, torch.Tensor]]) -> None:
    """Makes the gradients of these steps NaN, and keeps the weights after each step."""
    state = run.trainer.state

    def poison(module: Any, args: Any, output: Any) -> Any:
        return output * math.nan if module.training and run.trainer.state.global_step + 1 in steps else output

    run.model.get_input_embeddings().register_forward_hook(poison)
    assert state.global_step == 0

    def keep(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept[state.global_step] = run.weights

    run.trainer.add_callback(hooks(on_step_end=keep))


def scored(run: Trained) -> list[dict[str, float]]:
    run.history = fit(run.trainer, run.config.train, lambda model, metric: {"loss": 1.0})
    return [line for line in run.history if "loss" in line]


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_a_skipped_step_moves_nothing_is_counted_and_leaves_no_nan_in_the_log(home: Path, recipe: str) -> None:
    run = prepare(recipe, home, "max_steps=5", "learning_rate=1e-3", "train.on_nonfinite=skip", "weight_decay=0.1")
    kept: dict[int, dict[str, torch.Tensor]] = {0: run.start}
    poisoned(run, {3}, kept)
    logged = scored(run)
    assert largest_difference(kept[3], kept[2]) == 0
    assert largest_difference(kept[4], kept[3]) > 0
    assert [line["step"] for line in logged] == [1, 2, 4, 5]
    assert all(math.isfinite(number) for line in logged for number in line.values())
    assert [line.get("skipped_steps", 0) for line in logged] == [0, 0, 1, 1]


def test_the_loss_of_a_log_line_is_the_mean_of_the_steps_that_moved(home: Path) -> None:
    words = ("max_steps=4", "learning_rate=0", "per_device_train_batch_size=4")
    each = scored(prepare("lora_sft", home, *words))
    run = prepare("lora_sft", home, *words, "logging_steps=4", "train.on_nonfinite=skip")
    poisoned(run, {3}, {})
    losses = [line["loss"] for line in each]
    assert scored(run)[-1]["loss"] == pytest.approx((losses[1] + losses[3]) / 2, abs=1e-6)


def test_more_than_3_skipped_steps_in_a_row_stop_the_run_with_the_rows_and_the_checkpoint(home: Path) -> None:
    words = ("max_steps=9", "learning_rate=1e-3", "train.on_nonfinite=skip", "save_steps=1")
    run = prepare("lora_sft", home, *words)
    poisoned(run, {2, 3, 4, 5}, {})
    with pytest.raises(NumericsError, match="step 5") as caught:
        scored(run)
    assert "4th step in a row" in caught.value.message
    assert f"The last good checkpoint is {run.folder / 'checkpoint-4'}." in caught.value.message


def test_a_rollback_puts_weights_and_optimizer_of_the_last_checkpoint_back(home: Path) -> None:
    words = (
        "max_steps=6",
        "learning_rate=1e-3",
        "train.on_nonfinite=rollback",
        "save_steps=2",
        "lr_scheduler_type=linear",
    )
    run = prepare("lora_sft", home, *words)
    kept: dict[int, dict[str, torch.Tensor]] = {0: run.start}
    poisoned(run, {4}, kept)
    logged = scored(run)
    assert largest_difference(kept[3], kept[2]) > 0
    assert largest_difference(kept[4], kept[2]) == 0
    optimizer = torch.load(run.folder / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert {int(state["step"]) for state in optimizer["state"].values()} == {
        4
    }  # 2 of the checkpoint, and steps 5 and 6
    assert [line["learning_rate"] for line in logged] == pytest.approx([1e-3 * left / 6 for left in (6, 5, 4, 2, 1)])


def test_a_rollback_without_a_checkpoint_stops_and_says_what_to_set(home: Path) -> None:
    run = prepare("lora_sft", home, "train.on_nonfinite=rollback")
    poisoned(run, {1}, {})
    with pytest.raises(NumericsError, match="no checkpoint to go back to") as caught:
        scored(run)
    assert "save_steps" in caught.value.fix


@pytest.mark.parametrize("recipe", ["lora_sft", "dpo"])
def test_the_message_names_the_rows_of_the_step_with_their_lengths(home: Path, recipe: str) -> None:
    if recipe == "dpo":
        pairs = [{"prompt": f"{n} + {n} =", "chosen": str(2 * n), "rejected": "no"} for n in range(40)]
        write_rows(home / "rows.jsonl", pairs)
    run = prepare(recipe, home, "per_device_train_batch_size=2", "gradient_accumulation_steps=2")
    poisoned(run, {1}, {})
    with pytest.raises(NumericsError) as caught:
        scored(run)
    named = re.findall(r"rows\.jsonl:(\d+) \((\d+) tokens\)", caught.value.message)
    assert len({number for number, _ in named}) == 4
    lengths = {
        (run.data.train_records[row["row"]].where, len(ids))
        for row in run.data.train
        for ids, _ in sequences(row).values()
    }
    assert {(f"rows.jsonl:{number}", int(length)) for number, length in named} <= lengths


def test_weights_that_became_nan_are_never_saved(home: Path) -> None:
    run = prepare("lora_sft", home, "max_steps=3", "save_steps=1")

    def burst(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:  # ahead of the move, which spreads it
            next(iter(run.trainer.optimizer.state.values()))["exp_avg"].fill_(math.inf)

    run.trainer.add_callback(hooks(on_pre_optimizer_step=burst))
    with pytest.raises(NumericsError, match="A weight is not finite after step 2; nothing is saved") as caught:
        scored(run)
    assert "checkpoint-1" in caught.value.message
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_a_nan_at_step_3_leaves_the_weights_of_step_2_and_no_loss_of_0_in_the_log(home: Path, recipe: str) -> None:
    run = prepare(recipe, home, "max_steps=6", "learning_rate=1e-3")
    kept: dict[str, dict[str, torch.Tensor]] = {}

    def poison(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kept["step 2"] = run.weights
            run.model.get_input_embeddings().register_forward_hook(lambda *seen: seen[2] * math.nan)

    run.trainer.add_callback(hooks(on_step_end=poison))
    with pytest.raises(NumericsError, match="step 3"):
        fit(run.trainer, run.config.train, lambda model, metric: {"loss": 1.0})
    assert largest_difference(run.weights, kept["step 2"]) == 0
    assert largest_difference(run.start, kept["step 2"]) > 0
    losses = logged(run)
    assert len(losses) == 2
    assert all(loss > 1 for loss in losses)


def logged(run: Trained) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
