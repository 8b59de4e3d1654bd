"""A run starts from another one: adapter or whole model, with the whole line in its card."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from finetune_kit.errors import SettingsError
from finetune_kit.models.load import load_base
from finetune_kit.run_folder.lineage import ANCESTRY, start_from_run
from finetune_kit.runs.merge import merge
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import compare_run, model_of, open_run
from finetune_kit.runs.verify import probe_logits
from finetune_kit.settings.schema import ModelConfig
from tests.fixtures_cli import cli
from tests.fixtures_training import fit_only, furnish_pairs, prepare, settings, train, write_rows

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}", "rejected": f"no {n}"} for n in range(40)]
PROBE = list(range(5, 40))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = furnish_pairs(tmp_path_factory.mktemp("chain"), tiny_model, PAIRS)
    write_rows(folder / "answers.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    return folder


@pytest.fixture(scope="module")
def sft(home: Path) -> Artifact:
    return train("lora_sft", home, f"data.path={home / 'answers.jsonl'}", "max_steps=6", "learning_rate=1e-2")


@pytest.fixture(scope="module")
def dpo(home: Path, sft: Artifact) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_KIT_CACHE", str(home / "cache"))
        return train("dpo", home, f"model.name_or_path={sft.folder}", "max_steps=4", "learning_rate=5e-3")


def test_a_run_of_an_adapter_as_the_start_is_its_base_with_that_adapter(home: Path, sft: Artifact) -> None:
    config = settings("dpo", home, f"model.name_or_path={sft.folder}")
    start_from_run(config)
    assert (config.model.name_or_path, config.lora.init_from) == (str(home / "tiny"), str(sft.folder))
    start_from_run(config)  # a second time it finds nothing to do
    run = prepare("dpo", home, f"model.name_or_path={sft.folder}")
    assert (
        float((probe_logits(run.model, PROBE) - probe_logits(model_of(open_run(sft.folder, [])), PROBE)).abs().max())
        < 1e-5
    )


def test_dpo_from_sft_begins_at_ln_2_and_ends_as_one_adapter_of_the_first_base(sft: Artifact, dpo: Artifact) -> None:
    first = json.loads((dpo.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    before = next(entry for entry in dpo.report.metrics if entry["name"] == "held_out_loss")["before"]
    after = next(entry for entry in sft.report.metrics if entry["name"] == "held_out_loss")["after"]
    assert before == pytest.approx(after, rel=0.1)  # other held-out rows of the same questions
    assert json.loads((dpo.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_the_card_tells_the_whole_line_without_local_paths(home: Path, sft: Artifact, dpo: Artifact) -> None:
    line = json.loads((dpo.folder / ANCESTRY).read_text())
    assert [(entry["recipe"], entry["start"]) for entry in line] == [("lora_sft", "tiny"), ("dpo", sft.folder.name)]
    card = (dpo.folder / "README.md").read_text()
    assert "## Where it comes from" in card
    assert "1. lora_sft of tiny on answers.jsonl" in card
    assert f"2. dpo of {sft.folder.name} on rows.jsonl" in card
    assert str(home) not in card + json.dumps(line)


def test_a_run_can_be_opened_after_the_run_it_came_from_is_gone(home: Path, dpo: Artifact, tmp_path: Path) -> None:
    copy = shutil.copytree(dpo.folder, tmp_path / "moved")
    text = (copy / "run.yaml").read_text()
    (copy / "run.yaml").write_text(text.replace("run1", "gone"))
    said = cli("evaluate", copy, "evaluate.size=0", "evaluate.general_text=false")
    assert said.code == 0, said.err
    assert "held-out loss" in said.out


def test_evaluate_gives_the_numbers_of_the_report_again_against_the_adapter_it_started_from(dpo: Artifact) -> None:
    again = {entry["name"]: entry for entry in compare_run(open_run(dpo.folder, [])).metrics}
    for entry in dpo.report.metrics:
        for side in ("before", "after"):
            assert again[entry["name"]][side] == pytest.approx(entry[side], abs=1e-4), entry["name"]


def test_merged_it_is_the_start_of_a_run_that_trains_all_weights(home: Path, sft: Artifact, tmp_path: Path) -> None:
    merged = merge(sft.folder, tmp_path / "merged")
    expected = probe_logits(model_of(open_run(sft.folder, [])), PROBE)
    assert float((probe_logits(load_base(ModelConfig(str(merged.folder))), PROBE) - expected).abs().max()) < 1e-4
    run = fit_only("dpo", home, f"model.name_or_path={merged.folder}", "lora.r=0", "learning_rate=1e-3")
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    line = json.loads((merged.folder / ANCESTRY).read_text())
    assert [entry["recipe"] for entry in line] == ["lora_sft"]


def test_a_4_bit_run_goes_on_in_4_bits(home: Path, sft: Artifact) -> None:
    first = train("qlora_sft", home, f"data.path={home / 'answers.jsonl'}")
    run = prepare("dpo", home, f"model.name_or_path={first.folder}")
    assert run.config.model.load_in_4bit
    assert run.model.get_base_model().is_loaded_in_4bit


def refused(home: Path, *words: str, recipe: str = "dpo") -> str:
    with pytest.raises(SettingsError) as caught:
        prepare(recipe, home, *words)
    return str(caught.value)


def test_what_cannot_be_a_start_is_refused_with_what_can(home: Path, sft: Artifact, tmp_path: Path) -> None:
    start = f"model.name_or_path={sft.folder}"
    assert "lora.init_from are both adapters" in refused(home, start, f"lora.init_from={sft.folder}")
    assert f"merge {sft.folder} merged" in refused(home, start, "lora.r=0")
    assert f"merge {sft.folder} merged" in refused(home, start, recipe="full_sft")
    assert f"merge {sft.folder} merged" in refused(home, f"lora.init_from={sft.folder}", "lora.r=0")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(sft.folder / name, alone)
    assert "is an adapter without its run.yaml" in refused(home, f"model.name_or_path={alone}")


def test_the_adapters_own_shape_is_kept_and_another_one_refused(home: Path, sft: Artifact) -> None:
    assert "the adapter in" in refused(home, f"model.name_or_path={sft.folder}", "lora.r=4")
    run = prepare("dpo", home, f"model.name_or_path={sft.folder}")
    assert {weight.shape[0] for name, weight in run.weights.items() if "lora_A" in name} == {16}
    assert torch.stack([weight.abs().max() for name, weight in run.weights.items() if "lora_B" in name]).min() > 0
