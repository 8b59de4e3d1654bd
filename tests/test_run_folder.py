"""Which folder a run gets, and what is in it before training."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
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


def finish(folder: Path) -> None:
    (folder / "report.json").write_text("{}")


def test_without_a_name_runs_are_numbered_from_2() -> None:
    claimed = []
    for _ in range(3):
        settings = config()
        claimed.append(str(claim(settings)))
        finish(begin(settings, LEDGER, {"data": "abc"}))
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


def test_a_run_yaml_run_again_goes_beside_its_own_finished_folder_time_after_time() -> None:
    settings = config("output_dir=out/run", "seed=3")
    claim(settings)
    finish(begin(settings, LEDGER, {"data": "abc"}))
    again = config(file=Path("out/run/run.yaml"))
    assert claim(again) == Path("out/run-2")
    finish(begin(again, LEDGER, {"data": "abc"}))
    assert claim(config(file=Path("out/run-2/run.yaml"))) == Path("out/run-2-2")
    # a copy of the file elsewhere, or a name given now, is a name that the user chose
    Path("run.yaml").write_text(Path("out/run/run.yaml").read_text())
    for words, file in ((), Path("run.yaml")), (("output_dir=out/run",), Path("out/run/run.yaml")):
        with pytest.raises(SettingsError, match="holds another run"):
            claim(config(*words, file=file))


class TestAnUnfinishedRun:
    """It goes on where its settings are asked for again, and nothing else happens to it."""

    @staticmethod
    def begun(*words: str) -> RecipeConfig:
        settings = config(*words)
        claim(settings)
        begin(settings, LEDGER, {"data": "abc", "tokenizer": "one"})
        return settings

    def test_the_same_settings_go_on_in_its_folder_and_others_get_the_next_name(self) -> None:
        self.begun("seed=3")
        assert claim(config("seed=3")) == Path("runs/lora_sft")
        assert claim(config("seed=4")) == Path("runs/lora_sft-2")
        self.begun("seed=4")
        assert claim(config("seed=3")) == Path("runs/lora_sft")
        assert claim(config("seed=4")) == Path("runs/lora_sft-2")
        finish(Path("runs/lora_sft"))
        assert claim(config("seed=3")) == Path("runs/lora_sft-3")

    def test_of_several_the_newest_goes_on_and_a_run_yaml_means_its_own(self) -> None:
        for number in ("", "-2", "-10"):
            self.begun(f"output_dir=runs/lora_sft{number}")
        assert claim(config()) == Path("runs/lora_sft-10")
        assert claim(config(file=Path("runs/lora_sft/run.yaml"))) == Path("runs/lora_sft")

    def test_settings_that_change_no_result_may_differ(self) -> None:
        self.begun("output_dir=run")
        for word in ("save_steps=3", "logging_steps=1", "save_total_limit=9", "evaluate.bootstrap_samples=9"):
            assert claim(config("output_dir=run", word)) == Path("run")

    def test_in_a_folder_that_is_named_each_differing_setting_is_said_with_both_values(self) -> None:
        self.begun("output_dir=run", "seed=3")
        with pytest.raises(SettingsError) as caught:
            claim(config("output_dir=run", "learning_rate=1e-3"))
        assert caught.value.message == (
            "run holds an unfinished run with other settings: train.learning_rate 2e-05 → 0.001, train.seed 3 → 0."
        )
        assert caught.value.fix == "Begin another run: output_dir=run-2"

    def test_what_can_be_changed_on_the_way_is_opened_key_by_key(self) -> None:
        self.begun("output_dir=run")
        changed = config("output_dir=run", "learning_rate=1e-3", "max_steps=9")
        with pytest.raises(SettingsError) as caught:
            claim(changed)
        assert "--allow-changed train.learning_rate,train.max_steps" in caught.value.fix
        changed.allow_changed = ("train.learning_rate",)
        with pytest.raises(SettingsError, match=r"other settings: train.max_steps -1 → 9\."):
            claim(changed)
        changed.allow_changed = ("train.learning_rate", "train.max_steps")
        assert claim(changed) == Path("run")
        begin(changed, LEDGER, {"data": "abc", "tokenizer": "one"})
        assert claim(config("output_dir=run", "learning_rate=1e-3", "max_steps=9")) == Path("run")  # it is its own now

    @pytest.mark.parametrize("key", ["train.seed", "data.path", "train.per_device_train_batch_size"])
    def test_what_would_not_act_or_change_the_past_cannot_be_opened(self, key: str) -> None:
        self.begun("output_dir=run")
        again = config("output_dir=run")
        again.allow_changed = (key,)
        with pytest.raises(SettingsError, match=f"--allow-changed {key}") as caught:
            claim(again)
        assert "train.max_steps" in caught.value.fix

    def test_opening_a_key_where_nothing_is_unfinished_is_refused(self) -> None:
        settings = config()
        settings.allow_changed = ("train.max_steps",)
        with pytest.raises(SettingsError, match="no unfinished run"):
            claim(settings)

    @pytest.mark.parametrize(("stamp", "said"), [("data", "other data"), ("tokenizer", "another tokenizer")])
    def test_other_data_or_another_tokenizer_is_refused(self, stamp: str, said: str) -> None:
        settings = self.begun("output_dir=run")
        with pytest.raises(SettingsError, match=f"{said}.* → xyz"):
            begin(settings, LEDGER, {"data": "abc", "tokenizer": "one", stamp: "xyz"})

    def test_one_that_a_living_process_trains_is_left_alone(self, folder: Path) -> None:
        self.begun("output_dir=run")
        self.begun("output_dir=other")  # this process lets go of the first
        hold = "import fcntl, os; fcntl.flock(os.open('run', os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); input()"
        with subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(SettingsError, match="is being trained by another process"):
                claim(config("output_dir=run"))
            other.kill()
        assert claim(config("output_dir=run")) == Path("run")


def test_what_is_known_before_training_is_written_first() -> None:
    settings = config("output_dir=run", "seed=3")
    claim(settings)
    assert begin(settings, LEDGER, {"data": "abc"}) == Path("run")
    assert sorted(path.name for path in Path("run").iterdir()) == ["identity.json", "ledger.json", "run.yaml"]
    assert json.loads(Path("run/ledger.json").read_text()) == {"rows": 3}
    again = config(file=Path("run/run.yaml"))
    assert (again.train, again.data, again.model) == (settings.train, settings.data, settings.model)


def test_versions_name_python_this_package_and_the_stack() -> None:
    found = versions()
    assert {"python", "finetune_kit", "torch", "transformers", "trl", "peft", "datasets"} <= set(found)
    assert found["torch"][0].isdigit()


ELSEWHERE = """
import sys
from types import SimpleNamespace
from finetune_kit.config import RecipeConfig, resolve
from finetune_kit.run_folder import begin, claim, is_being_trained
for line in sys.stdin:
    act, *words = line.split()
    try:
        settings = resolve(RecipeConfig, "lora_sft", None, words)
        said = claim(settings)
        if act == "begin":
            begin(settings, SimpleNamespace(to_json=lambda: {}), {"data": "abc"})
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
    print(said, flush=True)
"""


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[Callable[[str], str]]:
    """Another process that claims and begins runs in the same folder; a line to it gives what it says."""
    other = subprocess.Popen(
        [sys.executable, "-c", ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    assert other.stdin is not None
    assert other.stdout is not None

    def say(line: str) -> str:
        assert other.stdin is not None
        assert other.stdout is not None
        print(line, file=other.stdin, flush=True)
        return other.stdout.readline().strip()

    yield say
    other.stdin.close()
    other.wait()
    other.stdout.close()


def test_of_two_processes_each_has_a_name_of_its_own_from_the_first_moment(elsewhere: Callable[[str], str]) -> None:
    mine = config()
    assert claim(mine) == Path("runs/lora_sft")
    assert elsewhere("claim") == "runs/lora_sft-2"  # nothing is there yet
    assert not Path("runs").exists()
    begin(mine, LEDGER, {"data": "abc"})
    assert elsewhere("begin") == "runs/lora_sft-2"
    assert "is being trained by another process" in elsewhere("begin output_dir=runs/lora_sft")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["lora_sft", "lora_sft-2"]
    named = config("output_dir=out")
    claim(named)
    assert "out is being trained by another process" in elsewhere("claim output_dir=out")


def test_a_look_at_other_runs_locks_none_of_them(elsewhere: Callable[[str], str]) -> None:
    assert elsewhere("begin output_dir=runs/lora_sft-7 seed=7") == "runs/lora_sft-7"
    assert elsewhere("begin output_dir=runs/lora_sft seed=1") == "runs/lora_sft"  # and lets go of the other one
    assert claim(config("seed=3")) == Path("runs/lora_sft-2")  # has looked at both
    assert elsewhere("claim output_dir=runs/lora_sft-7 seed=7") == "runs/lora_sft-7"


def test_a_folder_with_something_in_it_is_never_begun_in_even_where_nobody_claimed_it(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    for settings in (config(f"output_dir={folder}"), config()):
        with pytest.raises(SettingsError, match=r"not empty; nothing in it was touched|no folder was claimed"):
            begin(settings, LEDGER, {"data": "abc"})
    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_what_a_killed_start_left_behind_is_removed_by_the_next_one() -> None:
    Path(".run.999999.new").mkdir()
    settings = config("output_dir=run")
    claim(settings)
    begin(settings, LEDGER, {"data": "abc"})
    assert [path.name for path in Path().iterdir()] == ["run"]
