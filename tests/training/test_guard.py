"""A number that is not finite stops the run before it reaches a weight."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_kit.errors import NumericsError
from finetune_kit.training.fit import fit, hooks
from finetune_kit.training.guard import finite_gradients, finite_log
from tests.fixtures_training import Trained, largest_difference, prepare

STATE = SimpleNamespace(global_step=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_gradient_among_10000_is_found(bad: float) -> None:
    model = torch.nn.Linear(100, 100)
    model(torch.ones(1, 100)).sum().backward()
    finite_gradients(None, STATE, None, model=model)
    assert model.weight.grad is not None
    model.weight.grad[57, 3] = bad
    with pytest.raises(NumericsError, match="step 4") as caught:
        finite_gradients(None, STATE, None, model=model)
    assert "learning_rate" in caught.value.fix


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_logged_loss_or_norm_that_is_not_finite_stops_the_run(name: str, bad: float) -> None:
    finite_log(None, STATE, None, logs={"loss": 1.0, "grad_norm": 0.0})
    finite_log(None, STATE, None, logs={"train_runtime": math.nan})
    with pytest.raises(NumericsError, match=f"{name} is {bad} at step 3"):
        finite_log(None, STATE, None, logs={"loss": 1.0, "grad_norm": 1.0, name: bad})


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
