"""Which folder a run gets, and what is in it before training."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.run_folder import lock
from finetune_kit.run_folder.claim import begin, claim
from finetune_kit.run_folder.identity import versions
from finetune_kit.settings import values
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system import files
from finetune_kit.system.parsing import read_object

LEDGER = SimpleNamespace(to_json=lambda: {"rows": 3})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*words: str, file: Path | None = None) -> RecipeConfig:
    return resolve(RecipeConfig, "lora_sft", file, words)


def release() -> None:
    """As when the process that trains ends."""
    for held in (lock._held, list(lock._reserved.values())):
        for number in held:
            os.close(number)
    lock._held.clear()
    lock._reserved.clear()


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
    """It continues where its settings are asked for again, and nothing else happens to it."""

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
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.settings.load import resolve
from finetune_kit.run_folder.claim import begin, claim
from finetune_kit.run_folder.lock import is_being_trained
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


@pytest.mark.parametrize("name", ["/proc/run", "x" * 300, "link", "link/run", "file/run", "x" * 250, "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_refused_in_the_first_second(name: str, folder: Path) -> None:
    (folder / "link").symlink_to("nowhere")
    (folder / "file").write_text("mine")
    with pytest.raises(SettingsError, match=r"train.output_dir=.* cannot be made and written into: "):
        claim(config(f"output_dir={name}"))
    assert sorted(path.name for path in folder.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": 3, "versions": {}}', "nothing of the kind"])
def test_a_torn_identity_is_a_message_and_one_beside_is_passed_over(content: str, folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "identity.json").write_text(content)
    with pytest.raises(SettingsError, match=r"identity\.json") as caught:
        claim(config("output_dir=run"))
    assert caught.value.fix.endswith("output_dir=run-2")
    (folder / "runs" / "lora_sft").mkdir(parents=True)
    (folder / "runs" / "lora_sft" / "identity.json").write_text(content)
    assert claim(config()) == Path("runs/lora_sft-2")


BEGIN = """
import sys
from types import SimpleNamespace
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.settings.load import resolve
from finetune_kit.errors import FinetuneKitError
import finetune_kit.run_folder.claim as run_folder
from finetune_kit.run_folder.claim import begin, claim
run_folder.reserve = lambda folder: True  # as where the folder for temporary files cannot be written
settings = resolve(RecipeConfig, "lora_sft", None, ["output_dir=run"])
claim(settings)
print(flush=True)
input()
try:
    begin(settings, SimpleNamespace(to_json=dict), {"data": "abc"})
    print("begun", flush=True)
    input()
except FinetuneKitError as error:
    print(error.message, flush=True)
"""


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes", "checkpoint-2/trainer_state.json", "checkpoint-2/x/deep"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_could_hang_in_a_run_that_would_go_on_is_a_message_and_a_run_beside_is_passed_over(
    name: str, kind: str, folder: Path
) -> None:
    for words in ((), ("output_dir=mine",)):
        settings = config(*words)
        claim(settings)
        run = begin(settings, LEDGER, {"data": "abc"})
        release()
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(run / name)
        else:
            (run / name).symlink_to("/dev/zero")
    with pytest.raises(SettingsError, match=rf"mine/{name} is not a plain file: .*hang"):
        claim(config("output_dir=mine"))
    assert str(claim(config())) == "runs/lora_sft-2"


@pytest.mark.parametrize("name", ["identity.json", "run.yaml"])
def test_a_pipe_in_place_of_a_file_of_settings_is_not_waited_for(name: str, folder: Path) -> None:
    os.mkfifo(folder / name)
    read = values.read_file if name == "run.yaml" else read_object
    with pytest.raises(SettingsError, match=rf"{name}.*not a plain file"):
        read(folder / name)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(SettingsError, match=rf"{name}.*not a plain file"):
        read(folder / name)


def test_of_two_commands_on_one_folder_at_the_same_moment_one_begins_and_the_other_is_told(folder: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", BEGIN], cwd=folder, **pipes) for _ in range(2)]
    for process in both:
        process.stdout.readline()  # both have found it free
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.stdout.readline().strip() for process in both)
    for process in both:
        process.communicate("\n")
    assert said == ["begun", "train.output_dir=run is being trained by another process."]
    assert [path.name for path in folder.iterdir()] == ["run"]


def test_what_a_killed_command_left_beside_is_removed_by_the_next_one(folder: Path) -> None:
    (folder / ".run.0badcafe.new").mkdir()
    os.utime(folder / ".run.0badcafe.new", (0, 0))
    settings = config("output_dir=run")
    claim(settings)
    begin(settings, LEDGER, {"data": "abc"})
    assert [path.name for path in folder.iterdir()] == ["run"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_told_and_the_run_goes_on(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "fcntl", SimpleNamespace(flock=flock, LOCK_SH=1, LOCK_EX=2, LOCK_NB=4))
    for _ in range(2):  # begun, and continued
        settings = config("output_dir=run")
        assert claim(settings) == Path("run")
        begin(settings, LEDGER, {"data": "abc"})
    assert [record.getMessage() for record in caplog.records] == [
        f"note: the file system of {folder} has no locks: do not start a second command on one run"
    ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_the_first_file_is_a_message_and_leaves_nothing(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(number, os.strerror(number))

    settings = config("output_dir=run")
    claim(settings)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ResourceError, match=rf"run cannot be written: {os.strerror(number)}\."):
        begin(settings, LEDGER, {"data": "abc"})
    assert list(folder.iterdir()) == []


def test_a_system_without_fcntl_and_resource_lists_and_claims(folder: Path) -> None:
    script = (
        "import sys\nsys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import finetune_kit.training.progress as progress, finetune_kit.data.template\n"
        "from finetune_kit.settings.schema import RecipeConfig\n"
        "from finetune_kit.settings.load import resolve\n"
        "from finetune_kit.run_folder.claim import claim\n"
        "print(claim(resolve(RecipeConfig, 'lora_sft')))\n"
        "sys.argv = ['finetune_kit', 'list']\nimport finetune_kit.cli.main\nfinetune_kit.cli.main.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs/lora_sft\npretrain")
