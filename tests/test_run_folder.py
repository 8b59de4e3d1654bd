"""Which folder a run gets, and what is in it before training."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_kit.config import RecipeConfig, resolve
from finetune_kit.errors import SettingsError
from finetune_kit.run_folder import begin, claim, versions

LEDGER = SimpleNamespace(to_json=lambda: {"rows": 3})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*words: str, file: Path | None = None) -> RecipeConfig:
    return resolve(RecipeConfig, "lora_sft", file, words)


def test_without_a_name_runs_are_numbered_from_2() -> None:
    claimed = []
    for _ in range(3):
        settings = config()
        claimed.append(str(claim(settings)))
        begin(settings, LEDGER)
    assert claimed == ["runs/lora_sft", "runs/lora_sft-2", "runs/lora_sft-3"]


def test_claiming_a_folder_creates_nothing(folder: Path) -> None:
    settings = config("output_dir=out/run")
    assert claim(settings) == Path("out/run")
    assert settings.train.output_dir == "out/run"
    assert list(folder.iterdir()) == []


def test_a_folder_that_holds_something_is_refused_and_a_free_one_named(folder: Path) -> None:
    (folder / "run").mkdir()
    claim(config("output_dir=run"))  # empty: nothing to lose
    (folder / "run" / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError) as caught:
        claim(config("output_dir=run"))
    assert caught.value.message == "train.output_dir=run is not empty; nothing in it was touched."
    assert caught.value.fix == "Choose: output_dir=run-2"
    (folder / "run" / "run.yaml").write_text("")
    (folder / "run-2").mkdir()
    with pytest.raises(SettingsError, match="holds another run") as caught:
        claim(config("output_dir=run"))
    assert caught.value.fix == "Choose: output_dir=run-3"
    assert (folder / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_folder_that_cannot_be_made_is_refused_at_once(name: str, folder: Path) -> None:
    (folder / "file").write_text("mine")
    with pytest.raises(SettingsError, match=rf"train.output_dir={name} (is not empty|cannot be made)"):
        claim(config(f"output_dir={name}"))


def test_a_run_yaml_run_again_goes_beside_its_own_folder_time_after_time() -> None:
    settings = config("output_dir=out/run", "seed=3")
    claim(settings)
    begin(settings, LEDGER)
    again = config(file=Path("out/run/run.yaml"))
    assert claim(again) == Path("out/run-2")
    begin(again, LEDGER)
    assert claim(config(file=Path("out/run-2/run.yaml"))) == Path("out/run-2-2")
    # a copy of the file elsewhere, or a name given now, is a name that the user chose
    Path("run.yaml").write_text(Path("out/run/run.yaml").read_text())
    for words, file in ((), Path("run.yaml")), (("output_dir=out/run",), Path("out/run/run.yaml")):
        with pytest.raises(SettingsError, match="holds another run"):
            claim(config(*words, file=file))


def test_what_is_known_before_training_is_written_first() -> None:
    settings = config("output_dir=run", "seed=3")
    claim(settings)
    assert begin(settings, LEDGER) == Path("run")
    assert sorted(path.name for path in Path("run").iterdir()) == ["ledger.json", "run.yaml"]
    assert json.loads(Path("run/ledger.json").read_text()) == {"rows": 3}
    again = config(file=Path("run/run.yaml"))
    assert (again.train, again.data, again.model) == (settings.train, settings.data, settings.model)


def test_versions_name_python_this_package_and_the_stack() -> None:
    found = versions()
    assert {"python", "finetune_kit", "torch", "transformers", "trl", "peft", "datasets"} <= set(found)
    assert found["torch"][0].isdigit()
