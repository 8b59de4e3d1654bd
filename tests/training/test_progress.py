"""metrics.jsonl is for programs, the lines on the screen are for people; both come from the same numbers."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from finetune_kit.system import progress_bar
from finetune_kit.training import progress
from finetune_kit.training.progress import Record, peak_memory_gib
from tests.fixtures_training import fit_only


def test_each_line_has_its_units_in_its_names(home: Path) -> None:
    run = fit_only("lora_sft", home)
    for line in run.history:
        assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens"} <= line.keys()
        assert {"tokens_per_second", "seconds", "peak_memory_gib"} <= line.keys()
        assert line["tokens_per_second"] > 0


def test_tokens_count_what_is_not_padding(home: Path) -> None:
    run = fit_only("lora_sft", home, "max_steps=-1", "num_train_epochs=1")
    assert run.history[-1]["tokens"] == sum(map(len, run.data.train["input_ids"]))
    counts = [line["tokens"] for line in run.history]
    assert counts == sorted(counts)


def test_without_a_terminal_each_logged_step_is_one_line_with_loss_speed_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=said, width=200))
    record = Record(tmp_path)
    state = SimpleNamespace(global_step=5, max_steps=20)
    record.on_train_begin(None, state, None)
    record.on_log(None, state, None, logs={"loss": 1.25, "num_tokens": 1000.0})
    record.on_log(None, state, None, logs={"train_runtime": 3.0})
    record.close()
    lines = said.getvalue().strip().splitlines()
    assert len(lines) == 1
    assert "step 5/20  loss 1.2500" in lines[0]
    assert "tokens/s" in lines[0]
    assert "s left" in lines[0]
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1.25]


def test_on_a_terminal_there_is_a_bar_with_loss_speed_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=said, width=120, force_terminal=True))
    record = Record(tmp_path)
    state = SimpleNamespace(global_step=5, max_steps=20)
    record.on_train_begin(None, state, None)
    record.on_step_end(None, state, None)
    record.on_log(None, state, None, logs={"loss": 1.25, "num_tokens": 1000.0})
    record.close()
    assert "5/20" in said.getvalue()
    assert "loss 1.2500" in said.getvalue()


def test_tokens_a_second_leave_out_what_is_measured_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 40.0, 60.0, 60.0, 60.0, 60.0])
    record = Record(tmp_path)
    state = SimpleNamespace(global_step=5, max_steps=20)
    record.on_train_begin(None, state, None)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    record.last_time = record.started = progress.time.perf_counter()
    with record.beside("measuring"):  # from 10 to 40 s
        pass
    record.on_log(None, state, None, logs={"loss": 1.0, "num_tokens": 600.0})  # at 60 s
    assert record.history[-1]["tokens_per_second"] == 20.0
    assert record.history[-1]["seconds"] == 60.0


def test_the_last_step_has_its_line_whatever_logging_steps_is(home: Path) -> None:
    run = fit_only("lora_sft", home, "max_steps=4", "logging_steps=3")
    assert [line["step"] for line in run.history] == [1, 3, 4]


def test_without_a_terminal_a_long_measurement_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(progress_bar, "console", Console(file=said, width=200))
    monkeypatch.setattr(progress_bar, "GAP", 3.0)  # tests/conftest.py has none of it said
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: float(next(now)))
    tell = progress_bar.progress_bar("before")
    for done in range(13):
        tell("answers", done, 12)
    lines = said.getvalue().splitlines()
    assert lines[0] == "before: answers, 12 rows"
    assert lines[1] == "before: answers, 2 of 12"
    assert 3 <= len(lines) <= 7


def test_peak_memory_is_that_of_this_process() -> None:
    assert 0.1 < peak_memory_gib() < 100
