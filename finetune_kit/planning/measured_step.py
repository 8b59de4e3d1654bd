"""Two real steps of a run, to know the time and the memory of one."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from finetune_kit.recipe import Recipe
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.training.progress import peak_memory_gib


def measure_step(recipe: Recipe, config: RecipeConfig) -> dict[str, float]:
    """Seconds of the second optimizer step and peak memory of the recipe itself, in a folder that is thrown away."""
    trial = copy.deepcopy(config)
    trial.train = dataclasses.replace(
        trial.train, max_steps=2, logging_steps=1, save_steps=None, eval_steps=None, report_to=[]
    )
    trial.train.early_stopping_patience, trial.train.metric_for_best_model = None, "loss"
    trial.evaluate = dataclasses.replace(trial.evaluate, size=0, metrics=[], hub_metrics=[], general_text=False)
    trial.evaluate.reward_model = None
    # the measurements before and after are not what is timed here
    trial.data = dataclasses.replace(trial.data, held_out_path=None, held_out_size=8)
    with tempfile.TemporaryDirectory() as scratch:
        trial.train.output_dir = str(Path(scratch) / "run")
        history: list[dict[str, Any]] = _steps(recipe, trial)
    return {"seconds_a_step": history[1]["seconds"] - history[0]["seconds"], "peak_memory_gib": peak_memory_gib()}


def _steps(recipe: Recipe, trial: RecipeConfig) -> list[dict[str, Any]]:
    import json

    recipe.run(trial)
    lines = (Path(trial.train.output_dir or "") / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "loss" in json.loads(line)]
