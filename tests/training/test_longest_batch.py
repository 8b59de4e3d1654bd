"""The longest rows are tried before the first step: nothing of the run changes, and what does not fit shows at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import ResourceError
from finetune_kit.training import fit as fitting
from finetune_kit.training.fit import fit
from finetune_kit.training.progress import hooks
from tests.fixtures_training import ROWS, Trained, fit_only, largest_difference, prepare, write_rows

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}" * (1 + n % 3), "rejected": f"no {n}"} for n in range(40)]
LABELLED = [{"prompt": f"{n} =", "completion": f"it is {n}" * (1 + n % 3), "label": bool(n % 2)} for n in range(40)]
DROPOUT = "lora.lora_dropout=0.3"
RECIPES = {
    "full_sft": (ROWS, "neftune_noise_alpha=5"),
    "lora_sft": (ROWS, DROPOUT),
    "qlora_sft": (ROWS, DROPOUT),
    "reward_model": (PAIRS, DROPOUT),
    "dpo": (PAIRS, DROPOUT),
    "kto": (LABELLED, DROPOUT),
    "orpo": (PAIRS, DROPOUT),
}
TIMES = {"seconds", "peak_memory_gib", "tokens_per_second", "step_time"}


def lines(run: Trained) -> list[dict[str, float]]:
    return [{name: number for name, number in line.items() if name not in TIMES} for line in run.history]


def passes_of(run: Trained) -> list[tuple[int, torch.Tensor]]:
    """(optimizer steps behind it, token ids) of each pass in training."""
    seen: list[tuple[int, torch.Tensor]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.append((run.trainer.state.global_step, kwargs["input_ids"]))

    run.model.register_forward_pre_hook(note, prepend=True, with_kwargs=True)
    return seen


LONG = ("reward_model", "qlora_sft", "kto", "orpo")  # beside lora_sft, full_sft and dpo they try the same rows


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in RECIPES]
)
def test_every_number_of_a_run_is_the_same_to_the_bit_with_the_trial_and_without(
    home: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, word = RECIPES[recipe]
    write_rows(home / "rows.jsonl", rows)
    words = ("max_steps=4", "gradient_accumulation_steps=2", "logging_steps=2", "learning_rate=1e-2", word)
    run = prepare(recipe, home, *words)
    torch.manual_seed(1)
    run.history = fit(run.trainer, run.config.train, run.score)
    monkeypatch.setattr(fitting, "trying_longest_batch", lambda trainer: hooks())
    plain = prepare(recipe, home, *words)
    torch.manual_seed(1)
    plain.history = fit(plain.trainer, plain.config.train, plain.score)
    assert lines(run) == lines(plain)
    assert len(run.losses) == 3
    assert largest_difference(run.weights, plain.weights) == 0


def test_the_first_pass_has_the_longest_rows_of_all_and_moves_nothing(home: Path) -> None:
    run = prepare("lora_sft", home, "max_steps=2", "per_device_train_batch_size=3", "train.padding_free=false")
    seen = passes_of(run)
    begun: dict[str, Any] = {}

    def note(*_: Any, **__: Any) -> None:
        begun.setdefault("weights", run.weights)

    run.trainer.add_callback(hooks(on_step_begin=note))
    fit(run.trainer, run.config.train, run.score)
    lengths = sorted((len(ids) for row in run.data.train for ids, _ in sequences(row).values()), reverse=True)
    assert [step for step, _ in seen] == [0, 0, 1]
    assert tuple(seen[0][1].shape) == (3, lengths[0])
    assert int((seen[0][1] != run.tokenizer.pad_token_id).sum()) >= sum(lengths[:3]) - 3  # an end may be the pad token
    assert largest_difference(begun["weights"], run.start) == 0


def test_where_passes_are_cut_by_tokens_the_largest_one_of_the_epoch_is_tried(home: Path) -> None:
    run = prepare("lora_sft", home, "max_steps=2", "train.max_tokens_per_batch=150", "train.padding_free=false")
    seen = passes_of(run)
    fit(run.trainer, run.config.train, run.score)
    layout = run.trainer.train_dataset.layout
    slots = [layout.slots(rows) for rows in layout.epoch(0)]
    assert len(set(slots)) > 3
    assert seen[0][1].numel() == max(slots) <= 150


def test_rows_that_will_not_fit_end_the_run_before_its_first_step(home: Path) -> None:
    rows = [*ROWS[:38], {"prompt": "9 =", "completion": "nine " * 30}, {"prompt": "8 =", "completion": "eight " * 30}]
    write_rows(home / "rows.jsonl", rows)
    run = prepare("lora_sft", home, "max_steps=40", "per_device_train_batch_size=1", "held_out_size=1")

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and kwargs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    run.model.register_forward_pre_hook(refuse, prepend=True, with_kwargs=True)
    with pytest.raises(ResourceError, match="Out of memory in training with 1 row at once"):
        fit(run.trainer, run.config.train, run.score)
    assert run.trainer.state.global_step == 0


def test_gradients_and_the_optimizer_s_state_take_their_room_in_the_trial(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    plain = torch.empty

    def empty(*sizes: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            made.append(sizes[0])
        return plain(*sizes, **options)

    monkeypatch.setattr(torch, "empty", empty)
    run = fit_only("lora_sft", home, "max_steps=1")
    assert made == [sum(8 * weight.numel() + 4 for weight in run.weights.values())]
