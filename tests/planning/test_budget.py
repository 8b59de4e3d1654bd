"""What fits into a given memory: the rows of a step are kept, the least is given up, and each way is a command."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.errors import SettingsError
from finetune_kit.planning.budget import read_size
from tests.fixtures_cli import Said, cli


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24G", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("16000MiB", 16000 * 2**20),
        ("1.5 tib", 3 * 2**39),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["24", "GiB", "-1GiB", "24 gigs", ""])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="such as 24GiB"):
        read_size(text)


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to check in; `shapes` has a model of 13 million parameters, of which there is no weight."""
    monkeypatch.chdir(home)
    (home / "shapes").mkdir()
    for path in (home / "tiny").iterdir():
        if path.suffix != ".safetensors":
            (home / "shapes" / path.name).write_bytes(path.read_bytes())
    config = json.loads((home / "tiny" / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "head_dim": 128}
    (home / "shapes" / "config.json").write_text(json.dumps(config))
    return home


def check(recipe: str, *words: str) -> Said:
    usual = ["model.name_or_path=shapes", "data.path=rows.jsonl", "evaluate.size=0", "held_out_size=1"]
    return cli("check", recipe, *usual, *words)


def planned(recipe: str, *words: str) -> tuple[int, dict[str, Any]]:
    said = check(recipe, *words, "--json")
    return said.code, json.loads(said.out)["plan"]


def test_a_run_that_fits_is_said_to_and_ends_with_0(folder: Path) -> None:
    code, plan = planned("lora_sft", "--memory", "24GiB")
    needed = sum(plan["memory_bytes"].values())
    assert code == 0
    assert plan["ways"] == [{"recipe": "lora_sft", "words": [], "bytes": needed, "fits": True}]


@pytest.mark.long
def test_a_run_that_does_not_fit_ends_with_5_and_ways_that_keep_the_rows_of_a_step(folder: Path) -> None:
    needed = sum(planned("full_sft")[1]["memory_bytes"].values())
    code, plan = planned("full_sft", "--memory", f"{needed // 2**20 - 1}MiB")
    asked, *others = plan["ways"]
    assert code == 5
    assert asked == {"recipe": "full_sft", "words": [], "bytes": needed, "fits": False}
    assert [way["recipe"] for way in others] == sorted(way["recipe"] for way in others)  # full, lora, qlora
    assert any(way["fits"] for way in others)
    for way in others:
        given = dict(word.split("=") for word in way["words"])
        rows = int(given.get("per_device_train_batch_size", 8)) * int(given.get("gradient_accumulation_steps", 1))
        assert rows == plan["rows_in_a_step"] == 8
        assert way["fits"] == (way["bytes"] <= plan["memory_room"])


@pytest.mark.long
def test_the_words_of_a_way_are_a_run_that_needs_what_was_said(folder: Path) -> None:
    _, plan = planned("lora_sft", "--memory", "600MiB")
    way = next(way for way in plan["ways"] if len(way["words"]) == 3)
    code, again = planned(way["recipe"], *way["words"])
    assert code == 0
    assert sum(again["memory_bytes"].values()) == way["bytes"]
    assert again["steps"] == plan["steps"]


@pytest.mark.long
def test_the_nearest_way_is_a_command_to_type(folder: Path) -> None:
    sizes = {recipe: sum(planned(recipe)[1]["memory_bytes"].values()) for recipe in ("full_sft", "lora_sft")}
    said = check("full_sft", "train.optim=auto", "--memory", f"{sizes['lora_sft'] // 2**20 + 1}MiB")
    assert said.code == 5
    message, other, command = said.err.splitlines()[-3:]
    assert message.startswith("error: full_sft needs about ")
    assert "python -m finetune_kit run lora_sft model.name_or_path=shapes" in command
    assert "train.optim=auto" in command
    assert other.startswith("On a CUDA GPU it needs about ")
    assert other.endswith("plan for one with --device cuda.")
    assert "What fits into" in said.out


def test_a_size_that_cannot_be_read_ends_with_2(folder: Path) -> None:
    said = check("lora_sft", "--memory", "24 gigs")
    assert said.code == 2
    assert "--memory 24 gigs: expected a size such as 24GiB" in said.err


@pytest.mark.long
def test_a_room_too_small_for_anything_says_so(folder: Path) -> None:
    said = check("qlora_sft", "--memory", "100MiB")
    assert said.code == 5
    assert "None of the ways tried fits" in said.err


def test_a_model_without_weights_can_be_checked_but_not_measured_or_run(folder: Path) -> None:
    assert check("lora_sft").code == 0
    for said in (check("lora_sft", "--measure"), cli("run", "lora_sft", "model.name_or_path=shapes")):
        assert said.code == 2
        assert "shapes holds no *.safetensors file." in said.err


def test_for_another_device_the_plan_says_so_and_nothing_is_measured_here(folder: Path) -> None:
    said = check("lora_sft", "--device", "cuda", "--memory", "80GiB")
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert "planned for a CUDA GPU: frozen weights bfloat16, trained weights float32, arithmetic bfloat16" in words
    assert "rows packed, attention by torch's varlen kernel" in words
    for words, message in (
        (("--device", "cuda", "--measure"), "--measure trains two steps here, on cpu, not on cuda."),
        (("--device", "tpu"), "--device tpu: expected cuda, cpu or mps."),
    ):
        refused = check("lora_sft", *words)
        assert refused.code == 2
        assert message in refused.err


def test_of_config_json_alone_a_run_is_planned_with_the_embedded_tokenizer_and_says_so(folder: Path) -> None:
    for path in (folder / "shapes").iterdir():
        if path.name != "config.json":
            path.unlink()
    said = check("lora_sft", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["plan"]["assumed"] == [
        "shapes has no tokenizer: tokens are counted, and rows rendered, by smollm2-135m's"
    ]


def test_a_model_without_a_tokenizer_is_not_run_and_the_error_names_what_is_missing(folder: Path) -> None:
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "bare" / name).write_bytes((folder / "tiny" / name).read_bytes())
    said = cli("run", "lora_sft", "model.name_or_path=bare", "data.path=rows.jsonl")
    assert said.code == 2
    assert "bare has no tokenizer: there is neither a tokenizer.json nor another vocabulary file." in said.err
