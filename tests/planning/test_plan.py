"""The plan of a run is counted from shapes, without a weight in memory, and agrees with the run itself."""

from pathlib import Path
from typing import Any

import pytest

from finetune_kit.data.load import load_data
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning.plan import plan
from tests.fixtures_training import fit_only, prepare, settings


def planned(recipe: str, home: Path, *words: str) -> dict[str, Any]:
    config = settings(recipe, home, *words)
    return plan(config, load_data(config.data, "prompt_completion", load_tokenizer(config.model)))


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft"])
def test_parameters_are_those_of_the_real_policy(home: Path, recipe: str) -> None:
    found, model = planned(recipe, home), prepare(recipe, home).model
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["trainable_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_target_modules_are_named_with_their_number_of_layers(home: Path) -> None:
    assert planned("lora_sft", home, "target_modules=[q_proj, down_proj]")["target_modules"] == {
        "q_proj": 2,
        "down_proj": 2,
    }
    assert len(planned("lora_sft", home)["target_modules"]) == 7
    assert planned("full_sft", home)["target_modules"] == {}


def test_gradient_checkpointing_and_smaller_batches_lower_the_activations(home: Path) -> None:
    usual = planned("full_sft", home)["memory_bytes"]["activations"]
    assert planned("full_sft", home, "gradient_checkpointing=true")["memory_bytes"]["activations"] < usual
    assert planned("full_sft", home, "per_device_train_batch_size=1")["memory_bytes"]["activations"] < usual


def test_nothing_is_written_and_no_weight_is_read(home: Path) -> None:
    before = sorted(home.iterdir())
    (home / "shapes").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (home / "shapes" / name).write_bytes((home / "tiny" / name).read_bytes())
    header = (home / "tiny" / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(header[:8], "little")  # of the list of shapes; behind it a hole where the weights are
    with (home / "shapes" / "model.safetensors").open("wb") as file:
        file.write(header[:length])
        file.truncate(len(header))
    assert planned("lora_sft", home, f"model.name_or_path={home / 'shapes'}")["steps"] == 2
    assert sorted(path for path in home.iterdir() if path.name != "shapes") == before


def test_steps_of_packed_text_are_planned_within_a_tenth(home: Path) -> None:
    (home / "book.txt").write_text("\n\n".join(f"The {n}th line says {n} times {n} is {n * n}." for n in range(200)))
    words = (f"data.path={home / 'book.txt'}", "max_length=64", "max_steps=-1", "per_device_train_batch_size=1")
    run = fit_only("lora_sft", home, *words, "logging_steps=50")
    assert planned("lora_sft", home, *words)["steps"] == pytest.approx(run.trainer.state.max_steps, rel=0.1)


def test_a_step_of_ppo_is_an_update_of_batch_size_prompts(home: Path) -> None:
    config = settings("ppo", home, "max_steps=-1", "num_train_epochs=3", "batch_size=8")
    planned = plan(config, load_data(config.data, config.kind, load_tokenizer(config.model)))
    assert (planned["rows_in_an_epoch"], planned["rows_in_a_step"], planned["steps"]) == (37, 8, 14)  # 3 * 37 / 8
