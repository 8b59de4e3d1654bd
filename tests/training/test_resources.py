"""Too little memory, too little disk: what a run does, and that it is the same run."""

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.errors import ResourceError
from finetune_kit.runs import save
from finetune_kit.training import resources
from finetune_kit.training.fit import fit
from finetune_kit.training.progress import hooks
from tests.fixtures_cli import cli
from tests.fixtures_training import (
    FAST,
    Trained,
    fit_only,
    largest_difference,
    largest_file,
    limit_files,
    prepare,
    write_rows,
)

Usage = namedtuple("Usage", "total used free")
WORDS = ("max_steps=5", "learning_rate=1e-2", "per_device_train_batch_size=8", "lora.lora_dropout=0")


def short_of_memory(run: Trained, most: int, from_step: int = 0) -> list[int]:
    """Batches of more than `most` sequences run out of memory from a step on; the sizes of those that were tried."""
    tried: list[int] = []

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and run.trainer.state.global_step >= from_step:
            tried.append(len(kwargs["input_ids"]))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    run.model.register_forward_pre_hook(refuse, prepend=True, with_kwargs=True)
    return tried


def finish(run: Trained) -> Trained:
    run.history = fit(run.trainer, run.config.train, lambda model, metric: {"loss": 1.0})
    return run


@pytest.mark.long
@pytest.mark.parametrize("from_step", [0, 2])
@pytest.mark.parametrize("recipe", ["lora_sft", "full_sft"])
def test_8_rows_that_do_not_fit_become_4_passes_of_2_and_the_losses_stay_within_1e_6(
    home: Path, recipe: str, from_step: int
) -> None:
    words = WORDS if recipe == "lora_sft" else WORDS[:3]
    whole = fit_only(recipe, home, *words)
    run = prepare(recipe, home, *words)
    tried = short_of_memory(run, most=2, from_step=from_step)
    finish(run)
    assert tried[:2] == [8, 4]
    assert set(tried[2:]) <= {2, 1}
    assert run.losses == pytest.approx(whole.losses, abs=1e-6)
    assert [line["step"] for line in run.history if "loss" in line] == [1, 2, 3, 4, 5]
    assert largest_difference(run.weights, whole.weights) < 1e-4
    said = [line for line in run.history if "per_device_train_batch_size" in line]
    passes = [(line["per_device_train_batch_size"], line["gradient_accumulation_steps"]) for line in said]
    assert passes == [(4, 2), (2, 4)]
    assert {line["step"] for line in said} == {from_step}
    assert "per_device_train_batch_size" in (run.folder / "metrics.jsonl").read_text()
    assert run.trainer.args.gradient_accumulation_steps == 4


def test_pairs_are_halved_too_and_keep_their_losses(home: Path) -> None:
    pairs = [{"prompt": f"{n} + {n} =", "chosen": str(2 * n), "rejected": "no" * (n % 3 + 1)} for n in range(43)]
    write_rows(home / "rows.jsonl", pairs)
    whole = fit_only("dpo", home, *WORDS)
    run = prepare("dpo", home, *WORDS)
    short_of_memory(run, most=8)  # a pair is two sequences
    finish(run)
    assert run.losses == pytest.approx(whole.losses, abs=1e-5)


def test_one_row_that_does_not_fit_ends_with_code_5_and_three_ways_out(home: Path) -> None:
    run = prepare("lora_sft", home, *WORDS)
    tried = short_of_memory(run, most=0)
    with pytest.raises(ResourceError) as caught:
        finish(run)
    assert tried == [8, 4, 2, 1]
    assert caught.value.message == "Out of memory in training with 1 row at once."
    assert caught.value.fix == (
        "The cheapest ways out: train.gradient_checkpointing=true (about 1.3x the time); a smaller data.max_length; "
        "run qlora_sft (4-bit weights)."
    )


@pytest.mark.parametrize(("rows", "fewer"), [(8, 4), (6, 3), (9, 3), (7, 1), (2, 1)])
def test_a_batch_is_cut_into_whole_parts(rows: int, fewer: int) -> None:
    assert resources.fewer(rows) == fewer


def disk(monkeypatch: pytest.MonkeyPatch, free: dict[int, int], run: Trained) -> None:
    """A disk with so many bytes free at these steps, and plenty else."""
    usage = lambda path: Usage(0, 0, free.get(run.trainer.state.global_step, 2**40))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_not_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare("lora_sft", home, "max_steps=5", "save_steps=1", "save_total_limit=9")
    disk(monkeypatch, {2: 0, 3: 10_000}, run)
    finish(run)
    assert sorted(path.name for path in run.folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 4, 5)]


def test_a_disk_that_stays_full_ends_with_code_5_after_three_checkpoints_and_keeps_the_last_good_one(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare("lora_sft", home, "max_steps=9", "save_steps=1")
    disk(monkeypatch, dict.fromkeys(range(2, 9), 0), run)
    with pytest.raises(ResourceError, match="3 checkpoints in a row could not be written") as caught:
        finish(run)
    assert caught.value.exit_code == 5
    assert str(run.folder / "checkpoint-1") in caught.value.message
    assert run.trainer.state.global_step == 4
    assert (run.folder / "checkpoint-1" / "MANIFEST.json").is_file()


def test_a_disk_without_room_for_the_result_is_refused_before_the_first_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare("lora_sft", home, "max_steps=9")
    disk(monkeypatch, {0: 2**20}, run)
    with pytest.raises(ResourceError, match=r"has 1.0 MiB free; the run leaves about 16.\d MiB"):
        finish(run)
    assert run.trainer.state.global_step == 0


def full_after(run: Trained, steps: set[int], size: int) -> None:
    """No file can be larger, from the end of each of these steps until the next one has begun."""

    def fill(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in steps:
            limit_files(size)

    def clear(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        limit_files(None)

    run.trainer.add_callback(hooks(on_step_end=fill, on_pre_optimizer_step=clear, on_train_end=clear))


WRITTEN = {"metrics.jsonl": 400, "adapter_model.safetensors": 60_000, "optimizer.pt": 200_000}


@pytest.mark.long
@pytest.mark.parametrize("name", WRITTEN)
def test_a_disk_that_fills_up_in_the_middle_of_a_file_costs_that_checkpoint_and_no_step(
    home: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("max_steps=6", "save_steps=1", "save_total_limit=9", "learning_rate=1e-3")
    whole = fit_only("lora_sft", home, *words)
    run = prepare("lora_sft", home, *words)
    size = (whole.folder / "checkpoint-6" / name).stat().st_size if name != "metrics.jsonl" else 2**20
    assert size > WRITTEN[name] > 0
    full_after(run, {2, 3, 6}, WRITTEN[name])
    capfd.readouterr()
    finish(run)
    said = capfd.readouterr().err
    assert sorted(path.name for path in run.folder.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 4, 5)]
    assert run.losses == whole.losses
    assert largest_difference(run.weights, whole.weights) == 0
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    if name != "metrics.jsonl":  # there what is said has no room either
        assert said.count("note: no checkpoint is written") == 3


def test_a_disk_that_fills_up_in_the_middle_of_three_checkpoints_ends_with_code_5_and_the_same_command_goes_on(
    home: Path,
) -> None:
    words = ("max_steps=5", "save_steps=1", "learning_rate=1e-3", f"output_dir={home / 'run'}")
    whole = fit_only("lora_sft", home, *words[:3])
    run = prepare("lora_sft", home, *words)
    full_after(run, {2, 3, 4}, 60_000)
    with (
        largest_file(2**40),  # as it was, however it ends
        pytest.raises(ResourceError, match=r"3 checkpoints in a row could not be written: .*File too large") as caught,
    ):
        finish(run)
    assert caught.value.exit_code == 5
    assert caught.value.message.endswith(f"The last good checkpoint is {home / 'run' / 'checkpoint-1'}.")
    assert caught.value.fix == "Make room, and run the same command again: it resumes from there."
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-1"]
    again = finish(prepare("lora_sft", home, *words))
    assert again.losses == whole.losses
    assert largest_difference(again.weights, whole.weights) == 0
    assert json.loads((run.folder / "checkpoint-5" / "MANIFEST.json").read_text())["step"] == 5


def test_a_best_checkpoint_that_could_not_be_written_is_not_what_the_run_ends_with(home: Path) -> None:
    run = prepare("lora_sft", home, "max_steps=4", "eval_steps=1", "save_steps=9", "learning_rate=1e-2")
    scores = iter([4.0, 3.0, 5.0, 6.0])  # the best one, that of step 2, does not fit
    kept: dict[int, Any] = {}
    run.trainer.add_callback(
        hooks(on_step_end=lambda args, state, *_, **__: kept.update({state.global_step: run.weights}))
    )
    full_after(run, {2}, 60_000)
    fit(run.trainer, run.config.train, lambda model, metric: {"loss": next(scores)})
    assert largest_difference(run.weights, kept[1]) == 0


def test_a_folder_into_which_no_checkpoint_can_be_written_is_refused_before_the_first_step(home: Path) -> None:
    run = prepare("lora_sft", home, "max_steps=2")
    with (
        largest_file(60_000),
        pytest.raises(ResourceError, match=r"A checkpoint cannot be written into .*File too") as caught,
    ):
        finish(run)
    assert "output_dir=" in caught.value.fix
    assert run.trainer.state.global_step == 0
    assert not list(run.folder.glob(".trash*"))


def test_a_result_that_does_not_fit_ends_with_code_5_and_the_same_command_writes_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    words = ("run", "lora_sft", "model.name_or_path=tiny", "data.path=rows.jsonl", "output_dir=run", *FAST)
    plain = save.save_weights

    def limited(*given: Any) -> None:
        with largest_file(60_000):
            plain(*given)

    with monkeypatch.context() as patched:
        patched.setattr(save, "save_weights", limited)
        said = cli(*words)
    assert said.code == 5, said.err
    message, fix = said.err[said.err.index("error: ") :].splitlines()
    assert re.fullmatch(
        r"error: The result could not be written: .*File too large.*\. The last good checkpoint is run/checkpoint-2\.",
        message,
    )
    assert fix == "Make room, and run the same command again: it resumes from there."
    assert not (home / "run" / "report.json").exists()
    trained = (home / "run" / "metrics.jsonl").read_text()
    said = cli(*words)
    assert said.code == 0, said.err
    assert "resumes from step 2" in said.out
    assert (home / "run" / "metrics.jsonl").read_text() == trained
    assert json.loads((home / "run" / "report.json").read_text())["out_of_memory"] == []
