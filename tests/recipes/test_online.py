"""grpo and rloo: TRL's trainers on our prompts and rewards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.generation import decoding
from finetune_kit.training.steps import steps
from tests.fixtures_training import fit_only, prepare, train, write_rows
from tests.rl.fixtures import write_home

LOWER = """
def score(prompts, completions, records):
    assert all(prompt.endswith("=") for prompt in prompts) and len(records) == len(prompts)
    return [sum(letter.isascii() and letter.islower() for letter in text) / 12 for text in completions]

def nothing(prompts, completions, records):
    return [float("nan") for text in completions]
"""
SMALL = (
    "max_completion_length=12",
    "evaluate.max_new_tokens=12",
    "per_device_train_batch_size=16",
    "learning_rate=1e-2",
    "max_steps=30",
)
RECIPES = ("grpo", "rloo")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_home(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{n} + {n} ="} for n in range(40)])
    (tmp_path / "rewards.py").write_text(LOWER)
    return tmp_path


def rewarded(home: Path, function: str = "score") -> str:
    return f"reward.sources=[{home / 'rewards.py'}:{function}]"


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_whole_run_raises_the_reward_and_reports_it_on_the_same_held_out_prompts(home: Path, recipe: str) -> None:
    words = ("lora.r=0", "learning_rate=3e-3", "held_out_size=8", "evaluate.size=8", "max_steps=60")
    run = train(recipe, home, rewarded(home), *SMALL[:3], *words)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(line["reward"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last > 2 * first
    judged = next(entry for entry in run.report.metrics if entry["name"] == "reward")
    assert judged["n"] == 8
    assert judged["after"] > judged["before"]
    assert (run.folder / "model.safetensors").is_file()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_prompts_that_are_sampled_from_are_the_tokens_of_the_data(home: Path, recipe: str) -> None:
    run = prepare(recipe, home, rewarded(home), *SMALL)
    prompts = [run.trainer.train_dataset[index]["prompt"] for index in range(3)]
    ids = run.trainer._tokenize_prompts(prompts)[0]
    assert ids == [list(row) for row in run.data.train[:3]["prompt_ids"]]
    assert set(run.trainer.eos_token_ids) == set(run.data.end_token_ids)


@pytest.mark.parametrize("recipe", RECIPES)
def test_tools_and_markers_in_a_prompt_are_sampled_from_as_they_are_served(home: Path, recipe: str) -> None:
    fake = "1 <|im_end|>\n<|im_start|>assistant\n2 ="
    tool = {"name": "look", "description": "<|im_start|>", "parameters": {}}
    rows = [{"prompt": f"{n} {fake}", "tools": [tool], "system": "<|im_end|>"} for n in range(40)]
    write_rows(home / "rows.jsonl", rows)
    run = fit_only(recipe, home, rewarded(home), *SMALL, "max_steps=1", "save_steps=1")
    assert run.data.ledger.special_rows == 40
    prompts = [run.trainer.train_dataset[index]["prompt"] for index in (5, 0, 3)]
    ids = run.trainer._tokenize_prompts(prompts)[0]
    assert ids == [list(run.data.train[index]["prompt_ids"]) for index in (5, 0, 3)]
    tokenizer = run.trainer.processing_class
    markers = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [ids[0].count(marker) for marker in markers] == [3, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_start|>")


@pytest.mark.parametrize("recipe", ["grpo", pytest.param("rloo", marks=pytest.mark.long)])
def test_steps_are_counted_as_the_trainer_counts_them(home: Path, recipe: str) -> None:
    run = fit_only(recipe, home, rewarded(home), *SMALL, "max_steps=-1", "num_train_epochs=1")
    planned = steps(run.config, run.data)
    assert planned["steps"] == run.trainer.state.max_steps == 37 * 8 // 16


@pytest.mark.long
def test_a_price_on_the_kl_divergence_keeps_the_policy_nearer_to_the_reference(home: Path) -> None:
    free = fit_only("grpo", home, rewarded(home), *SMALL)
    held = fit_only("grpo", home, rewarded(home), "beta=5", *SMALL)
    assert held.moved != free.moved
    assert held.history[-1]["kl"] < 0.5


def test_two_rewards_are_added_with_their_weights(home: Path) -> None:
    (home / "short.py").write_text("def score(prompts, completions, records):\n    return [1.0 for _ in completions]\n")
    sources = f"reward.sources=[{home / 'rewards.py'}:score, {home / 'short.py'}:score]"
    run = fit_only("grpo", home, sources, "reward.weights=[1, 3]", *SMALL, "max_steps=1")
    line = run.history[0]
    assert line["reward"] == pytest.approx(line["rewards/score_1/mean"] + 3, abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_cannot_be_is_refused(home: Path, recipe: str) -> None:
    with pytest.raises(SettingsError, match="16 completions, which are not whole groups of num_generations=5"):
        prepare(recipe, home, rewarded(home), *SMALL, "num_generations=5")
    with pytest.raises(SettingsError, match=r"train\.eval_steps has no effect"):
        prepare(recipe, home, rewarded(home), *SMALL, "eval_steps=5")
    with pytest.raises(SettingsError, match="have no scorer of their own"):
        prepare(recipe, home, *SMALL)
    with pytest.raises(NumericsError, match=r"reward nothing is nan at rows\.jsonl"):
        fit_only(recipe, home, rewarded(home, "nothing"), *SMALL)
    write_rows(home / "rows.jsonl", [{"text": "plain"}] * 4)
    with pytest.raises(DataError, match="this recipe needs prompt rows"):
        prepare(recipe, home, rewarded(home), *SMALL)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rewards_that_tell_nothing_apart_stop_the_run_after_5_steps_with_what_to_do(home: Path, recipe: str) -> None:
    (home / "rewards.py").write_text("def score(completions, **_): return [0.5 for _ in completions]")
    with pytest.raises(NumericsError, match=r"scored alike in 5 logged steps in a row, up to step 5") as caught:
        fit_only(recipe, home, rewarded(home), *SMALL)
    assert "a reward in smaller steps" in caught.value.fix


def test_rewards_that_once_told_something_apart_are_told_and_the_run_goes_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "rewards.py").write_text(
        "def score(completions, trainer_state=None):\n"
        "    varied = trainer_state is None or trainer_state.global_step < 1\n"
        "    return [number * varied for number in range(len(completions))]"
    )
    run = fit_only("grpo", home, rewarded(home), *SMALL, "max_steps=7")
    assert len([line for line in run.history if "reward" in line]) == 7
    assert capsys.readouterr().err.count("nothing can be learned from that any more") == 1


ANSWERS = """
def ours(prompts, completions, records):
    return [len(text) / 12 + (record.metadata["points"] == 3) for text, record in zip(completions, records)]

def trl(completions, completion_ids, answer, trainer_state, log_metric, **columns):
    assert set(columns) >= {"points", "log_extra", "prompts"} and len(answer) == len(completion_ids)
    log_metric("right", sum(text.strip() == right for text, right in zip(completions, answer)) / len(answer))
    return [None if int(right) % 4 == 0 else len(text) / 12 for text, right in zip(completions, answer)]
"""


@pytest.mark.parametrize("recipe", [*RECIPES, "ppo"])
def test_rewards_see_the_columns_of_a_file_and_none_leaves_a_row_out(home: Path, recipe: str) -> None:
    write_rows(home / "rows.jsonl", [{"prompt": f"{n} + {n} =", "answer": 2 * n, "points": 3} for n in range(40)])
    (home / "rewards.py").write_text(ANSWERS)
    sources = f"reward.sources=[{home / 'rewards.py'}:ours, {home / 'rewards.py'}:trl]"
    if recipe == "ppo":
        words = ("max_new_tokens=12", "batch_size=16", "num_mini_batches=2", "missing_eos_penalty=0")
        line = train(recipe, home, sources, *words, "max_steps=1", "evaluate.size=2").folder / "metrics.jsonl"
        found = json.loads(line.read_text().splitlines()[0])
        assert found["right"] == 0.0
        assert found["reward/ours"] > 1 > found["reward/trl"] > 0
    else:
        found = fit_only(recipe, home, sources, *SMALL, "max_steps=1").history[0]
        assert found["right"] == 0.0
        assert found["rewards/ours/mean"] > 1 > found["rewards/trl/mean"] > 0


@pytest.mark.parametrize("recipe", [*RECIPES, "ppo"])
def test_rows_to_which_no_reward_applies_move_nothing(home: Path, recipe: str) -> None:
    (home / "rewards.py").write_text(
        "def score(completions, prompts):\n"
        "    return [None if int(p[0]) % 2 else len(c) for c, p in zip(completions, prompts)]"
    )
    if recipe == "ppo":
        words = ("max_new_tokens=12", "batch_size=16", "num_mini_batches=2", "missing_eos_penalty=0", "kl_coef=0")
        folder = train(recipe, home, rewarded(home), *words, "max_steps=1", "evaluate.size=2").folder
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["objective/scores"] > 1
    else:
        assert fit_only(recipe, home, rewarded(home), *SMALL, "max_steps=1").history[0]["reward"] > 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_trl_samples_by_recorded_steps_where_they_can_be_recorded_and_draws_the_same(
    home: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare(recipe, home, rewarded(home), *SMALL[1:], "max_completion_length=24", "lora.lora_dropout=0")
    ids = torch.tensor([[0, 0, 40, 41, 42], [50, 51, 52, 53, 54]])
    wanted = run.trainer.generation_config
    drawn, recorded = [], []

    def capture(step: Any) -> Any:
        recorded.append(1)
        return step

    seconds = iter(range(1000, 0, -1))  # the recorded step, timed second, is the faster one
    monkeypatch.setattr(decoding, "seconds_of", lambda step, device: step() or next(seconds))
    for found in (None, capture):
        monkeypatch.setattr(decoding, "capturing", lambda device, found=found: found)
        torch.manual_seed(0)
        with torch.no_grad():
            mask = (ids != 0).long()
            drawn.append(run.trainer.model.generate(input_ids=ids, attention_mask=mask, generation_config=wanted))
    assert torch.equal(drawn[0], drawn[1])
    assert len(recorded) == 2  # in the proof, and for the batch
