"""Every recipe with a bfloat16 GPU's arithmetic on a CPU: run, resumed, merged, and measured again."""

import gc
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

from finetune_kit import recipe as recipes
from finetune_kit.errors import Stopped
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.models.load import load_base
from finetune_kit.run_folder.claim import claim
from finetune_kit.runs import saved as finished
from finetune_kit.runs.merge import merge
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import compare_run, open_run
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.training import stopping
from tests.fixtures_cli import cli
from tests.fixtures_gpu import bfloat16_gpu, reloading_here, report
from tests.fixtures_training import FAST, settings, write_rows

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
MERGED = [
    "lora_sft",
    "lora_sft with a whole head",
    "qlora_sft",
    *(f"{n} 4-bit" for n in ("dpo", "kto", "orpo", "ppo", "grpo")),
]
# one of each recipe, and each kind of weights; make test-long has them all
SHORT = (*(name for name in RUNS if " " not in name), "lora_sft with a whole head", "reward_model 4-bit", "ppo 4-bit")
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
    """The finished run of a name in RUNS, made when it is first asked for; the first of each recipe is stopped after a
    step, and resumed."""
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in made:
            recipe, *words = RUNS[name]
            more = [f"output_dir={house / name.replace(' ', '_')}", "save_steps=1", "max_steps=2"]
            config = settings(recipe, house, *(word.format(home=house) for word in [*words, *more]))
            claim(config)
            if name == recipe:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(stopping, "asked", lambda _: True)
                    with pytest.raises(Stopped):
                        recipes.load(recipe).run(config)
                claim(config)
            made[name] = recipes.load(recipe).run(config)
        return made[name]

    return make


def short_first(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in SHORT else pytest.mark.long) for name in names]


@pytest.mark.parametrize("name", short_first(RUNS))
def test_a_run_is_proven_and_measured_again_with_its_reports_numbers(name: str, run: Any) -> None:
    artifact = run(name)
    results, adapter = report(artifact.folder), (artifact.folder / "adapter_config.json").is_file()
    assert 0 <= results["reload_max_logit_difference"] <= results["reload"]["tolerance"]
    assert results["reload"]["dtype"] == ("bfloat16" if adapter else "float32")
    steps = [json.loads(line)["step"] for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[:2] == [1, 2]
    again = compare_run(open_run(artifact.folder, named_by_the_user(artifact.folder)))
    assert [entry["name"] for entry in again.metrics] == [entry["name"] for entry in artifact.report.metrics]
    for was, now in zip(artifact.report.metrics, again.metrics, strict=True):
        assert (now["before"], now["after"]) == pytest.approx((was["before"], was["after"]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", short_first(MERGED))
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


def test_a_judge_is_asked_again_and_one_that_is_gone_is_said(run: Any, house: Path, caplog: Any) -> None:
    artifact = run("grpo")
    assert artifact.report.metrics[0]["name"] == "reward"
    path, away = house / "reward.py", house / "away.py"
    words = named_by_the_user(artifact.folder)
    path.rename(away)
    try:
        again = compare_run(open_run(artifact.folder, words))
    finally:
        away.rename(path)
    assert "reward" not in [entry["name"] for entry in again.metrics]
    assert "without the rewards that the run was trained for" in caplog.text


def named_by_the_user(folder: Path) -> list[str]:
    """A run's reward as whoever evaluates it has to name it: run.yaml alone runs no function."""
    reward = yaml.safe_load((folder / "run.yaml").read_text()).get("reward")
    return [f"reward.sources=[{','.join(reward['sources'])}]"] if reward else []


@pytest.mark.parametrize("inside", [True, False])
def test_a_reward_that_run_yaml_alone_names_is_not_run_wherever_it_lies(
    run: Any, tmp_path: Path, inside: bool, caplog: Any
) -> None:
    folder = Path(shutil.copytree(run("grpo").folder, tmp_path / "theirs"))
    evil = (folder if inside else tmp_path) / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n{REWARD}")
    text = (folder / "run.yaml").read_text()
    named = next(word for word in text.split() if word.endswith("reward.py:score"))
    (folder / "run.yaml").write_text(text.replace(named, f"{evil}:score"))
    compare_run(open_run(folder, []))
    assert "which run.yaml names, not you" in caplog.text
    assert not (tmp_path / "marker").exists()


def test_weights_trained_in_full_are_measured_again_one_model_after_the_other(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_run(run("dpo full").folder, [])
    seen = []

    def load_and_count(*given: Any, **named: Any) -> Any:
        gc.collect()
        seen.append(sum(isinstance(thing, PreTrainedModel) and hasattr(thing, "lm_head") for thing in gc.get_objects()))
        return load_base(*given, **named)

    monkeypatch.setattr(finished, "load_base", load_and_count)
    compare_run(opened)
    assert len(seen) == 2
    assert seen[1] == seen[0]


def test_full_weights_are_measured_in_bfloat16_before_and_after_and_saved_in_float32(
    run: Any, tiny_model: Path
) -> None:
    model = load_base(ModelConfig(name_or_path=str(tiny_model)), trained_in_full=True)
    ids = torch.arange(5, 40)[None]
    with evaluation_mode(model):
        measured = model(ids).logits
    with torch.no_grad():
        plain = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids).logits
    assert torch.equal(measured, mixed)
    assert not torch.equal(measured.float(), plain)
    saved = load_file(run("full_sft").folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_4_bit_layers_are_unpacked_to_bfloat16_and_norms_and_embeddings_are_float32_on_both_sides(run: Any) -> None:
    model = finished.model_of(open_run(run("qlora_sft").folder, []))
    layer = model.get_base_model().model.layers[0]
    assert layer.self_attn.q_proj.base_layer.compute_dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32
    given = next(given for given in SEEN if given["folder"].endswith("qlora_sft"))
    assert (given["dtype"], bool(given["quantised"])) == ("bfloat16", True)


def test_on_the_command_line_a_run_ends_with_0_and_verify_proves_it_again(house: Path) -> None:
    words = (f"model.name_or_path={house / 'tiny'}", f"data.path={house / 'rows.jsonl'}", *FAST)
    said = cli("run", "lora_sft", *words, f"output_dir={house / 'told'}")
    assert said.code == 0, said.err
    said = cli("verify", house / "told")
    assert said.code == 0, said.err
    assert "gave the same outputs to 0.0e+00, in bfloat16 on cpu" in said.out
