"""A finished run can be measured again, on its own rows or on others, alone or beside other adapters of its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.cli import main
from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.models.adapters import attach
from finetune_kit.models.load import load_base
from finetune_kit.runs.save import Artifact
from finetune_kit.runs.saved import compare_adapters, compare_run, open_run
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_training import write_rows


@pytest.mark.parametrize("which", ["lora_run", "full_run"])
def test_measured_again_it_gives_the_numbers_of_its_report(which: str, request: pytest.FixtureRequest) -> None:
    run: Artifact = request.getfixturevalue(which)
    again = compare_run(open_run(run.folder, []))
    for was, now in zip(run.report.metrics, again.metrics, strict=True):
        assert now["name"] == was["name"]
        assert (now["before"], now["after"]) == pytest.approx((was["before"], was["after"]), abs=1e-5)
        assert now["verdict"] == was["verdict"]
    assert again.samples == run.report.samples


def test_data_path_measures_on_all_rows_of_another_file(full_run: Artifact, tmp_path: Path) -> None:
    other = [{"prompt": f"is {n} a number?", "completion": "yes"} for n in range(500, 505)]
    path = write_rows(tmp_path / "other.jsonl", [*other, {"prompt": "is 7000 a number?", "completion": "no"}])
    report = compare_run(open_run(full_run.folder, [f"data.path={path}", "evaluate.size=6"]))
    assert report.rows == {"held_out": 6, "answered": 6}
    exact = report.metrics[0]
    assert (exact["name"], exact["after"]) == ("exact_match", pytest.approx(5 / 6))
    assert report.samples[-1]["reference"] == "no"


def test_evaluate_settings_act(lora_run: Artifact) -> None:
    report = compare_run(open_run(lora_run.folder, ["evaluate.size=2", "evaluate.max_new_tokens=3"]))
    assert report.rows["answered"] == 2
    assert report.decoding["max_new_tokens"] == 3


@pytest.mark.parametrize("word", ["learning_rate=1", "train.seed=3", "model.dtype=float16", "lora.r=4"])
def test_words_that_cannot_act_are_refused(lora_run: Artifact, word: str) -> None:
    with pytest.raises(SettingsError, match="has no effect on a finished run"):
        open_run(lora_run.folder, [word])


def test_two_places_of_rows_to_measure_on_are_refused(lora_run: Artifact) -> None:
    with pytest.raises(SettingsError, match="both rows to measure on"):
        open_run(lora_run.folder, ["data.path=a.jsonl", "data.held_out_path=b.jsonl"])
    with pytest.raises(SettingsError, match="one path"):
        open_run(lora_run.folder, ["data.path=[a.jsonl, b.jsonl]"])


def test_a_folder_that_is_no_run_and_one_that_has_not_finished_are_told_apart(
    lora_run: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"no run\.yaml"):
        open_run(tmp_path, [])
    shutil.copyfile(lora_run.folder / "run.yaml", tmp_path / "run.yaml")
    with pytest.raises(SettingsError, match="has not finished"):
        open_run(tmp_path, [])


def plain_adapter(folder: Path, model: Path, seed: int, scale: float = 1.0, **lora: Any) -> Path:
    """A random adapter of `model` as plain PEFT saves it, with nothing of a run in its folder."""
    base = load_base(ModelConfig(name_or_path=str(model)))
    torch.manual_seed(seed)
    adapted = attach(base, LoraConfig(r=4, **lora))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1 * scale)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_several_adapters_are_each_compared_with_one_base_and_leave_no_trace_for_the_next(
    lora_run: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    run = open_run(lora_run.folder, ["evaluate.size=3"])
    one = plain_adapter(tmp_path / "one", tiny_model, 1, use_dora=True)
    two = plain_adapter(tmp_path / "two", tiny_model, 2, modules_to_save=["lm_head"])
    together = compare_adapters(run, [one, two])
    assert list(together.reports) == [lora_run.folder.name, "one", "two"]
    assert (together.base, together.notes) == (tiny_model.name, [])
    for name, folder in (("one", one), ("two", two)):
        alone = compare_adapters(run, [folder])
        assert alone.reports[name].metrics == together.reports[name].metrics
    own = together.reports[lora_run.folder.name]
    for was, now in zip(compare_run(run).metrics, own.metrics, strict=True):
        assert (now["before"], now["after"]) == pytest.approx((was["before"], was["after"]), abs=1e-5)
    before = {tuple(entry["before"] for entry in report.metrics) for report in together.reports.values()}
    after = {tuple(entry["after"] for entry in report.metrics) for report in together.reports.values()}
    assert (len(before), len(after)) == (1, 3)
    assert json.loads(json.dumps(together.to_json()))["adapters"]["two"]["rows"] == own.rows


def test_the_adapters_of_a_fully_trained_run_are_measured_on_its_own_weights(
    full_run: Artifact, tmp_path: Path
) -> None:
    folder = plain_adapter(tmp_path / "on_top", full_run.folder, 1)
    compared = compare_adapters(open_run(full_run.folder, []), [folder])
    assert list(compared.reports) == ["on_top"]
    entries = compared.reports["on_top"].metrics
    trained = {entry["name"]: entry["after"] for entry in full_run.report.metrics}
    assert {entry["name"]: pytest.approx(entry["before"], abs=1e-5) for entry in entries} == trained


def test_an_adapter_run_with_another_seed_is_told_to_have_perhaps_seen_the_rows(
    lora_run: Artifact, tmp_path: Path
) -> None:
    other = shutil.copytree(lora_run.folder, tmp_path / "other")
    text = (other / "run.yaml").read_text()
    (other / "run.yaml").write_text(text.replace("\n  seed: 0\n", "\n  seed: 5\n"))
    run = open_run(lora_run.folder, ["evaluate.size=0"])
    compared = compare_adapters(run, [other])
    assert len(compared.notes) == 1
    assert "another train.seed: it may have seen rows that are measured here" in compared.notes[0]
    reports = list(compared.reports.values())
    assert reports[0].metrics == reports[1].metrics


def test_folders_that_are_no_adapter_of_this_base_are_refused(
    lora_run: Artifact, tiny_model: Path, tmp_path: Path
) -> None:
    run = open_run(lora_run.folder, ["evaluate.size=0"])

    def refused(folder: Path, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            compare_adapters(run, [folder])

    refused(tiny_model, SettingsError, r"is not an adapter: it has no adapter_config\.json")
    refused(lora_run.folder, SettingsError, "is given twice")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text("{}")
    refused(pickled, SettingsError, "peft_type is None; expected one of PEFT's")
    (pickled / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(pickled, SettingsError, r"holds no adapter_model\.safetensors")
    (pickled / "adapter_model.bin").write_bytes(b"")
    refused(pickled, SecurityError, "as a pickle")
    wider = other_model(tmp_path / "wider", hidden_size=32)
    refused(plain_adapter(tmp_path / "a", wider, 0), SettingsError, "an adapter of another model: size mismatch")
    deeper = other_model(tmp_path / "deeper", num_hidden_layers=3)
    refused(plain_adapter(tmp_path / "b", deeper, 0), SettingsError, "14 of its 42 weights have no place in it")
    shallower = other_model(tmp_path / "shallower", num_hidden_layers=1)
    queries = plain_adapter(tmp_path / "c", shallower, 0, target_modules=["q_proj"])
    refused(queries, SettingsError, "0 of its 2 weights have no place in it, 2 places no weight")
    other = shutil.copytree(lora_run.folder, tmp_path / "other")
    record = json.loads((other / "base.json").read_text())
    (other / "base.json").write_text(json.dumps({**record, "weights": "0" * 64}))
    refused(other, SettingsError, "the same shapes, other weights")


def other_model(folder: Path, **shape: int) -> Path:
    """A random model of another shape with the tiny model's layer names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {"vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**{**usual, **shape}, num_attention_heads=4, num_key_value_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_command_prints_one_table_with_a_column_for_each_adapter(
    lora_run: Artifact, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    folders = [plain_adapter(tmp_path / name, tiny_model, seed) for seed, name in enumerate(("first", "second"))]
    words = ["evaluate", str(lora_run.folder), *(f"--adapter={folder}" for folder in folders), "evaluate.size=2"]
    for more in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["finetune_kit", *words, *more])
        with pytest.raises(SystemExit) as stop:
            main.main()
        assert not stop.value.code
        printed = capsys.readouterr().out
        if more:
            assert list(json.loads(printed)["adapters"]) == [lora_run.folder.name, "first", "second"]
        else:
            head = next(line for line in printed.splitlines() if "base" in line and "first" in line)
            assert head.index("base") < head.index(lora_run.folder.name) < head.index("first") < head.index("second")
            assert all(f"\n{name}: " in printed for name in ("first", "second"))


@pytest.mark.parametrize("named", ["./inside.py", "other/inside.py"])
def test_a_run_yaml_that_names_code_in_its_own_folder_is_refused_and_the_code_not_run(
    tmp_path: Path, named: str
) -> None:
    code = tmp_path / named
    code.parent.mkdir(exist_ok=True)
    code.write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    for word in (named, str(code)):
        (tmp_path / "run.yaml").write_text(f"recipe: {word}")
        (tmp_path / "model.safetensors").touch()
        with pytest.raises(SecurityError, match="would be run as code"):
            open_run(tmp_path, [])
    assert not (tmp_path / "marker").exists()
