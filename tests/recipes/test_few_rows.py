"""A handful of rows: a run trains on them, or says what it lacks; it never ends well having trained on nothing."""

from pathlib import Path

import pytest

from finetune_kit import recipe as recipes
from finetune_kit.data.load import load_data
from finetune_kit.data.records import LabelledCompletion, Record
from finetune_kit.data.split import split_off
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.training.begin import rows_in_words
from finetune_kit.training.steps import steps
from tests.fixtures_data import assistant, user
from tests.fixtures_training import fit_only, prepare, settings, write_rows

LONG = "def score(completions, **columns): return [len(text) / 9 for text in completions]"


@pytest.fixture
def prompts(home: Path) -> Path:
    """3 prompts, of which one is held out, and a reward."""
    write_rows(home / "rows.jsonl", [{"prompt": f"{n} + {n} =", "difficulty": n} for n in range(3)])
    (home / "rewards.py").write_text(LONG)
    return home


def few(home: Path) -> tuple[str, str]:
    return f"reward.sources=[{home / 'rewards.py'}:score]", "held_out_size=1"


@pytest.mark.parametrize("recipe", ["grpo", "rloo"])
def test_2_prompts_that_make_no_whole_step_are_refused_with_the_size_that_makes_one(recipe: str, prompts: Path) -> None:
    with pytest.raises(DataError, match=r"2 training prompts have 16 completions .* a step takes 32: none") as caught:
        prepare(recipe, prompts, *few(prompts), "per_device_train_batch_size=32", "num_generations=8")
    assert caught.value.fix == "Set train.per_device_train_batch_size=16, or give 4 prompts or more."
    assert not (prompts / "run1").exists()
    words = ("num_generations=8", "max_completion_length=4", "max_steps=1")
    run = fit_only(recipe, prompts, *few(prompts), *words, "per_device_train_batch_size=16")
    assert run.trainer.state.global_step == 1
    assert rows_in_words(run.data).startswith("2 training prompts (0 truncated, 0 dropped), 1 held out; ")
    assert "trained on" not in rows_in_words(run.data)


def test_the_size_that_makes_a_whole_step_is_one_over_passes_and_processes_too(prompts: Path) -> None:
    words = ("num_generations=4", "per_device_train_batch_size=8", "gradient_accumulation_steps=2")
    config = settings("grpo", prompts, *few(prompts), *words)
    data = load_data(config.data, config.kind, load_tokenizer(config.model), seed=0)
    with pytest.raises(DataError) as caught:
        steps(config, data)
    assert caught.value.fix == "Set train.per_device_train_batch_size=4, or give 4 prompts or more."
    with pytest.raises(DataError) as caught:
        steps(config, data, processes=8)
    assert caught.value.fix == "Give 32 prompts or more."


def test_ppo_says_what_the_data_lack_and_how_often_a_prompt_is_in_an_update(
    prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("max_steps=1", "max_new_tokens=4", "batch_size=8", "num_mini_batches=1", "evaluate.max_new_tokens=4")
    recipe = recipes.load("ppo")
    recipe.module.save = lambda *_: None  # type: ignore[attr-defined]
    recipe.run(settings("ppo", prompts, *few(prompts), *words, "missing_eos_penalty=0"))
    said = capsys.readouterr().err
    assert "2 training prompts (0 truncated, 0 dropped), 1 held out" in said
    assert "note: fewer prompts than batch_size=8: each is in an update 4 times" in said
    assert "note: given to rewards at most: difficulty (3 rows)" in said
    assert "note: only 1 held-out rows: too few to judge" in said


def test_rows_that_fill_no_batch_end_in_a_message_and_not_in_a_run_of_0_steps(home: Path) -> None:
    write_rows(home / "rows.jsonl", [{"prompt": f"{n} + {n} =", "completion": "2"} for n in range(4)])
    with pytest.raises(DataError, match=r"fill no step of 8 a device, so nothing was trained"):
        fit_only("lora_sft", home, "per_device_train_batch_size=8", "train.extra={dataloader_drop_last: true}")


@pytest.mark.parametrize("recipe", ["lora_sft", "grpo", "rloo", "ppo"])
def test_a_run_that_could_measure_nothing_is_refused_before_it_trains_and_leaves_nothing(
    recipe: str, prompts: Path
) -> None:
    words = few(prompts)[:1] + (("per_device_train_batch_size=8",) if recipe in ("grpo", "rloo") else ())
    if recipe == "lora_sft":
        write_rows(prompts / "rows.jsonl")
        words = ()
    with pytest.raises(DataError, match=r"No row is held out") as caught:
        recipes.load(recipe).run(settings(recipe, prompts, *words, "held_out_size=0", "model.dtype=float32"))
    assert caught.value.fix == "Hold some out: data.held_out_size=20, or give others: data.held_out_path=FILE"
    if recipe != "lora_sft":
        with pytest.raises(SettingsError, match=r"evaluate.size=0 and evaluate.general_text=false nothing is measured"):
            recipes.load(recipe).run(settings(recipe, prompts, *words, "held_out_size=1", "evaluate.size=0"))
    assert not list(prompts.glob("run*/*"))


@pytest.mark.parametrize("seed", range(4))
def test_of_a_liked_and_a_disliked_answer_the_liked_one_is_trained_on(seed: int) -> None:
    records: list[Record] = [
        LabelledCompletion(name, [user(name)], [assistant("so")], label) for name, label in (("a", True), ("b", False))
    ]
    kept, held = split_off(records, None, seed)
    assert [record.where for record in (*kept, *held)] == ["a", "b"]
