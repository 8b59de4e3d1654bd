"""recipes/ppo.py from the first row to the proven artifact."""

import json
from pathlib import Path

import pytest

from finetune_kit import recipe
from finetune_kit.run_folder.claim import claim
from finetune_kit.settings.load import resolve
from tests.rl.fixtures import settings, write_home


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run: 2 updates on a task with its own scorer and a penalty for long answers."""
    home = write_home(tmp_path_factory.mktemp("recipe"))
    (home / "short.py").write_text(
        "def short(prompts, completions, records): return [-len(c) / 100 for c in completions]"
    )
    config = settings(
        home,
        "data.path=reasoning_gym/word_sequence_reversal",
        "data.size=24",
        "held_out_size=4",
        f"reward.sources=[task, {home / 'short.py'}:short]",
        "evaluate.size=4",
        "evaluate.max_new_tokens=8",
        "evaluate.bootstrap_samples=50",
        f"output_dir={home / 'ppo'}",
    )
    claim(config)
    return recipe.load(str(recipe.folder() / "ppo.py")).run(config).folder


def test_the_folder_holds_policy_value_report_and_record(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    assert files >= {"adapter_model.safetensors", "value.safetensors", "report.json", "report.html", "metrics.jsonl"}
    assert not [name for name in files if name.startswith("value_adapter")]
    saved = json.loads((run / "adapter_config.json").read_text())
    assert saved["task_type"] == "CAUSAL_LM"


def test_the_report_has_the_tasks_score_before_and_after_on_4_held_out_problems(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    metric = next(metric for metric in report["metrics"] if metric["name"] == "task_score")
    assert metric["n"] == 4
    assert len(report["samples"]) == 4
    assert report["reload_max_logit_difference"] < 1e-4
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert report["kl_spent"] == last["objective/kl"]
    assert f"KL spent: {last['objective/kl']:.2f} nats a completion." in report["verdict"]


def test_both_rewards_are_in_the_log_by_name(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["objective/scores"] == pytest.approx(line["reward/task"] + line["reward/short"], abs=1e-6)
        assert line["reward/short"] < 0


@pytest.mark.parametrize(("recipe_name", "word"), [("ppo", "max_new_tokens"), ("grpo", "max_completion_length")])
def test_held_out_prompts_are_answered_in_the_41_tokens_that_are_sampled_unless_told_otherwise(
    recipe_name: str, word: str
) -> None:
    made = recipe.load(recipe_name)
    config = resolve(made.config_class, made.word, None, [f"{word}=41"])
    assert (config.evaluate.max_new_tokens, config.origins["evaluate.max_new_tokens"]) == (41, word)
    config = resolve(made.config_class, made.word, None, [f"{word}=41", "evaluate.max_new_tokens=9"])
    assert config.evaluate.max_new_tokens == 9
