"""Every recipe with a bfloat16 GPU's arithmetic on a CPU: run, resumed, merged, and measured again."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_kit import recipe as recipes
from finetune_kit.artifact import Artifact
from finetune_kit.errors import Stopped
from finetune_kit.finished import compare_run, open_run
from finetune_kit.merge import merge
from finetune_kit.run_folder import claim
from finetune_kit.training import stopping
from tests.fixtures_gpu import bfloat16_gpu, reloading_here, report
from tests.fixtures_training import settings, write_rows

REWARD = """
def score(prompts, completions, records):
    return [float(len(text) % 3) for text in completions]
"""
ONLINE = ("reward.sources=[{home}/reward.py:score]", "evaluate.size=2", "evaluate.max_new_tokens=4")
PPO = ("max_new_tokens=4", "batch_size=4", "num_mini_batches=1", "num_ppo_epochs=1", *ONLINE)
GROUPS = ("num_generations=2", "max_completion_length=4", *ONLINE)
PAIRS = ("data.path={home}/pairs.jsonl",)
FULL, FOUR_BITS = "lora.r=0", "model.load_in_4bit=true"
RUNS = {
    "lora_sft": ("lora_sft",),
    "lora_sft with a whole head": ("lora_sft", "lora.modules_to_save=[lm_head]", "lora.use_dora=true"),
    "full_sft": ("full_sft",),
    "qlora_sft": ("qlora_sft",),
    "reward_model": ("reward_model", *PAIRS),
    "reward_model full": ("reward_model", FULL, *PAIRS),
    "reward_model 4-bit": ("reward_model", FOUR_BITS, *PAIRS),
    "dpo": ("dpo", *PAIRS),
    "dpo full": ("dpo", FULL, *PAIRS),
    "dpo 4-bit": ("dpo", FOUR_BITS, *PAIRS),
    "kto": ("kto", *PAIRS),
    "kto full": ("kto", FULL, *PAIRS),
    "kto 4-bit": ("kto", FOUR_BITS, *PAIRS),
    "orpo": ("orpo", *PAIRS),
    "orpo full": ("orpo", FULL, *PAIRS),
    "orpo 4-bit": ("orpo", FOUR_BITS, *PAIRS),
    "ppo": ("ppo", *PPO),
    "ppo full": ("ppo", FULL, *PPO),
    "ppo 4-bit": ("ppo", FOUR_BITS, *PPO),
    "grpo": ("grpo", *GROUPS),
    "grpo full": ("grpo", FULL, *GROUPS),
    "grpo 4-bit": ("grpo", FOUR_BITS, *GROUPS),
    "rloo": ("rloo", *GROUPS),
    "rloo full": ("rloo", FULL, *GROUPS),
    "rloo 4-bit": ("rloo", FOUR_BITS, *GROUPS),
}
MERGED = [name for name in RUNS if "full" not in name and "reward" not in name]
SEEN: list[dict[str, Any]] = []


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    with bfloat16_gpu(), reloading_here(SEEN):
        yield


@pytest.fixture(scope="module")
def house(shared_home: Path) -> Path:
    """`shared_home` with pairs and a reward, too."""
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f"{2 * n}", "rejected": f"{n} no"} for n in range(40)]
    write_rows(shared_home / "pairs.jsonl", pairs)
    (shared_home / "reward.py").write_text(REWARD)
    return shared_home


@pytest.fixture(scope="module")
def run(house: Path) -> Any:
    """The finished run of a name in RUNS, made when it is first asked for: stopped after its first step, and resumed."""
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            recipe, *words = RUNS[name]
            more = [f"output_dir={house / name.replace(' ', '_')}", "save_steps=1", "max_steps=2"]
            config = settings(recipe, house, *(word.format(home=house) for word in [*words, *more]))
            for stop in (True, False):
                claim(config)
                with stopped_after_a_step() if stop else contextlib.nullcontext():
                    made[name] = recipes.load(recipe).run(config)
        return made[name]

    return make


@contextlib.contextmanager
def stopped_after_a_step() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stopping, "asked", lambda _: True)
        yield


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_stopped_resumed_proven_and_measured_again_with_its_reports_numbers(name: str, run: Any) -> None:
    artifact = run(name)
    results, adapter = report(artifact.folder), (artifact.folder / "adapter_config.json").is_file()
    assert 0 <= results["reload_max_logit_difference"] <= results["reload"]["tolerance"]
    assert results["reload"]["dtype"] == ("bfloat16" if adapter else "float32")
    steps = [json.loads(line)["step"] for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[:2] == [1, 2]
    again = compare_run(open_run(artifact.folder, []))
    assert [entry["name"] for entry in again.metrics] == [entry["name"] for entry in artifact.report.metrics]
    for was, now in zip(artifact.report.metrics, again.metrics, strict=True):
        assert (now["before"], now["after"]) == pytest.approx((was["before"], was["after"]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", MERGED)
def test_an_adapter_is_merged_and_the_merged_model_proven(name: str, run: Any, tmp_path: Path) -> None:
    results = merge(run(name).folder, tmp_path / "out").results
    assert results["reload_max_logit_difference"] == 0
    found = results["candidates"][results["candidate"]]
    # rounded once more to 8 bits of mantissa: far less than a nat, and next to nothing where it stays in 4-bit's own
    assert 0 <= found["kl_per_token"] < 1e-3
    source = results["kl_measured_on"]["source"]
    assert source in ("general text", "held-out rows", "chosen held-out answers", "liked held-out answers") or (
        source == "its answers to held-out prompts" and name.split()[0] in ("ppo", "grpo", "rloo")
    )
