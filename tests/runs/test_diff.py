"""diff A B: what is said of two runs, and that run.yaml repeats a run."""

import json
from pathlib import Path

import pytest

from finetune_kit.runs.save import Artifact
from tests.fixtures_cli import cli
from tests.fixtures_training import train


@pytest.fixture(scope="module")
def again(lora_run: Artifact) -> Path:
    """The run again, by its run.yaml through the command."""
    said = cli("run", lora_run.folder / "run.yaml")
    assert said.code == 0, said.err
    return lora_run.folder.with_name("run1-2")


def test_run_yaml_repeats_a_run_with_equal_losses_metrics_and_weights(lora_run: Artifact, again: Path) -> None:
    assert (again / "adapter_model.safetensors").read_bytes() == (
        lora_run.folder / "adapter_model.safetensors"
    ).read_bytes()
    found = json.loads(cli("diff", lora_run.folder, again, "--json").out)
    assert found["settings"] == found["data"] == found["versions"] == []
    assert len(found["results"]) >= 3
    assert all(line["a"] == line["b"] for line in found["results"])
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (lora_run.folder, again)
    ]
    assert losses[0] == losses[1]
    said = cli("diff", lora_run.folder, again)
    assert said.code == 0
    assert said.out.startswith("settings: the same\ndata: the same\nversions: the same\n")
    assert said.out.rstrip().endswith("All results are equal.")


def test_what_differs_is_named_with_where_it_came_from(lora_run: Artifact, home: Path) -> None:
    other = train("lora_sft", home, "max_steps=1", "evaluate.size=3", "data.size=30").folder
    record = (other / "run.yaml").read_text()
    (other / "run.yaml").write_text(record.replace("  trl: ", "  trl: 0"))
    said = cli("diff", lora_run.folder, other, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    settings = {line["name"]: line for line in found["settings"]}
    assert settings["train.max_steps"] == {
        "name": "train.max_steps",
        "a": 5,
        "b": 1,
        "origin_a": "command line",
        "origin_b": "command line",
    }
    assert settings["data.size"]["a"] is None
    assert (settings["data.size"]["origin_a"], settings["data.size"]["origin_b"]) == ("recipe", "command line")
    assert "train.seed" not in settings
    assert "train.output_dir" not in settings
    assert {"fingerprint", "train rows"} <= {line["name"] for line in found["data"]}
    assert [line["name"] for line in found["versions"]] == ["trl"]
    said = cli("diff", lora_run.folder, other)
    for text in (
        "train.max_steps",
        "5 (command line)",
        "1 (command line)",
        "unset (recipe)",
        "Not all results are equal",
    ):
        assert text in said.out


def test_a_folder_that_is_no_run_ends_with_code_2(lora_run: Artifact, tmp_path: Path) -> None:
    said = cli("diff", lora_run.folder, tmp_path)
    assert said.code == 2
    assert f"{tmp_path} is not a run's folder" in said.err
