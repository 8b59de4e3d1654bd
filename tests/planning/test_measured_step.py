"""Two real steps are measured in a folder that is thrown away."""

from pathlib import Path

import pytest

from finetune_kit import recipe as recipes
from finetune_kit.planning.measured_step import measure_step
from tests.fixtures_training import settings


@pytest.mark.long
def test_two_steps_are_timed_and_neither_settings_nor_folders_change(home: Path) -> None:
    words = ("max_steps=100", "eval_steps=1", "early_stopping_patience=1", "metric_for_best_model=exact_match")
    config = settings("lora_sft", home, *words, "evaluate.size=2", "save_steps=1", "logging_steps=50")
    measured = measure_step(recipes.load("lora_sft"), config)
    assert 0 < measured["seconds_a_step"] < 10
    assert measured["peak_memory_gib"] > 0
    assert config.train.max_steps == 100
    assert config.train.metric_for_best_model == "exact_match"
    assert {path.name for path in home.iterdir()} == {"tiny", "rows.jsonl"}
