"""What a person gets wrong, through the real `run`: the exit code, at most three lines that say how to mend it, and
nothing half-written. All of it is refused before a weight is loaded."""

import json
import time
from pathlib import Path

import pytest

from finetune_kit import network
from finetune_kit.model import load
from tests.fixtures_cli import Said, cli

ROW = '{"prompt": "1 + 1 =", "completion": "2"}'
ROWS = "\n".join(f'{{"prompt": "{n} + {n} =", "completion": "{2 * n}"}}' for n in range(8)) + "\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the tiny model and good rows; loading weights there is a failure."""

    def loaded(*arguments: object, **named: object) -> None:
        raise AssertionError("the weights were loaded before the mistake was found")

    monkeypatch.setattr(load, "load_base", loaded)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_model, target_is_directory=True)
    (tmp_path / "good.jsonl").write_text(ROWS)
    return tmp_path


def run(*words: str, recipe: str = "lora_sft") -> Said:
    """The command, given good settings wherever `words` say nothing else; leaves nothing behind."""
    usual = ["model.name_or_path=tiny", "data.path=good.jsonl", "output_dir=out/run", "max_steps=1"]
    given = {word.split("=")[0] for word in words}
    before = sorted(Path().rglob("*"))
    said = cli("run", recipe, *words, *(word for word in usual if word.split("=")[0] not in given))
    assert sorted(Path().rglob("*")) == before
    assert "Traceback" not in said.err
    return said


def mistakes(said: Said, code: int, *texts: str) -> None:
    assert said.code == code, said.err
    lines = said.err[said.err.index("error: ") :].splitlines()
    assert 1 <= len(lines) <= 3, said.err
    for text in texts:
        assert text in said.err


# settings


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("lerning_rate=1e-4", ["lerning_rate: unknown setting (command line).", "Did you mean train.learning_rate?"]),
        ("max_steps=many", ["train.max_steps (command line): expected a whole number, found 'many'."]),
        ("learning_rate=5", ["train.learning_rate (command line): expected a number in [0, 1], found 5."]),
        ("learning_rate=-1e-4", ["expected a number in [0, 1], found -0.0001."]),
        ("learning_rate=nan", ["expected a number, found 'nan'."]),
        ("max_steps=0", ["train.max_steps (command line): 0 trains nothing."]),
        ("early_stopping_patience=2", ["has no effect without held-out losses on the way", "Add train.eval_steps=20"]),
        ("optim=adamw_torc", ["'adamw_torc' is not known to transformers.", "Did you mean adamw_torch,"]),
        ("learning_rate", ["'learning_rate' is not a setting: expected key=value."]),
    ],
)
def test_a_setting_that_cannot_be_ends_with_code_2(word: str, texts: list[str]) -> None:
    mistakes(run(word), 2, *texts)


def test_a_setting_without_effect_in_this_recipe_ends_with_code_2() -> None:
    mistakes(run("lora.r=8", recipe="full_sft"), 2, "lora.r has no effect in full_sft")


def test_a_settings_file_is_named_with_its_line(folder: Path) -> None:
    (folder / "mine.yaml").write_text("# mine\ntrain:\n  learning_rate: fast\n")
    words = ("run", "lora_sft", "--config", "mine.yaml")
    mistakes(cli(*words), 2, "train.learning_rate (mine.yaml:3): expected a number, found 'fast'.")
    (folder / "mine.yaml").write_text("train:\n  learning_rat: 1e-4\n")
    mistakes(cli(*words), 2, "train.learning_rat: unknown setting (mine.yaml:2).", "Did you mean train.learning_rate?")


def test_a_settings_file_that_would_run_code_ends_with_code_6(folder: Path) -> None:
    (folder / "evil.yaml").write_text("train: !!python/object/apply:os.system ['touch ran']\n")
    mistakes(cli("run", "lora_sft", "--config", "evil.yaml"), 6, "evil.yaml: could not determine a constructor")
    assert not (folder / "ran").exists()


def test_an_output_folder_that_holds_another_run_is_not_touched(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "run.yaml").write_text("mine")
    mistakes(
        run("output_dir=old"), 2, "output_dir=old holds another run; nothing in it was touched.", "output_dir=old-2"
    )
    assert (folder / "old" / "run.yaml").read_text() == "mine"


def test_an_unknown_recipe_ends_with_code_2() -> None:
    mistakes(run(recipe="lora_stf"), 2, "'lora_stf' is not a recipe", "Did you mean lora_sft?")


# data


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("", ["rows.jsonl: no rows."]),
        ("\n\n", ["rows.jsonl: no rows."]),
        (ROWS + '{"prompt": "1 + 1 =", "completion": 2', ["rows.jsonl:9:", "broken JSON"]),
        (ROWS + "{'prompt': '1'}", ["rows.jsonl:9:2: broken JSON"]),
        (ROWS + '{"prompt": NaN, "completion": "2"}', ["rows.jsonl:9: NaN is not JSON."]),
        (ROWS + "[1, 2]", ["rows.jsonl:9: a row is list; expected an object."]),
        (ROWS + '{"prompt": "1", "completion": null}', ["rows.jsonl:9: completion: content is null or missing"]),
        (
            ROWS + '{"prompt": "1", "completion": 2}',
            ["rows.jsonl:9: completion: content is a number ('2'); expected text."],
        ),
        (ROWS + '{"prompt": "1", "completion": ["2"]}', ["rows.jsonl:9"]),
        (ROWS + '{"prompt": "", "completion": "2"}', ["rows.jsonl:9: the prompt is empty."]),
        ('{"messages": []}', ["rows.jsonl:1: the list of messages is empty."]),
        ('{"messages": "hello"}', ["rows.jsonl:1: expected a list of messages, found text ('hello')."]),
        ('{"messages": [{"role": "boss", "content": "x"}]}', ["rows.jsonl:1: message 1 has the unknown role 'boss'."]),
        ('{"messages": [{"content": "x"}]}', ["rows.jsonl:1: message 1 has no role."]),
        ('{"messages": [{"role": "user", "content": null}]}', ["rows.jsonl:1: message 1 (user): content is null"]),
        ('{"messages": [{"role": "user", "content": 5}]}', ["rows.jsonl:1: message 1 (user): content is a number"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["rows.jsonl:1: no assistant turn, so nothing to learn"]),
        ('{"chosen": "a", "rejected": "b"}', ["found columns chosen, rejected", "this recipe needs prompt-completion"]),
        ('{"foo": "a", "bar": "b"}', ["found columns bar, foo", "data.columns="]),
        (ROW, ["1 rows are too few, or too alike, to hold 1 out", "data.held_out_path=FILE"]),
    ],
)
def test_rows_that_cannot_be_trained_end_with_code_3_and_their_line(
    content: str, texts: list[str], folder: Path
) -> None:
    (folder / "rows.jsonl").write_text(content, encoding="utf-8")
    mistakes(run("data.path=rows.jsonl"), 3, *texts)


def test_bytes_that_are_no_utf8_end_with_code_3_and_their_line(folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(ROWS.encode() + '{"prompt": "café", "completion": "2"}'.encode("latin-1"))
    mistakes(run("data.path=rows.jsonl"), 3, "rows.jsonl:9: not UTF-8 (byte 0xe9).", "iconv -f LATIN1 -t UTF-8")


@pytest.mark.parametrize(
    ("path", "texts"),
    [
        ("none.jsonl", ["data.path=none.jsonl: no such file or folder."]),
        ("/no/such/folder", ["data.path=/no/such/folder: no such file or folder."]),
        ("good.xlsx", ["good.xlsx: cannot read this kind of file.", ".jsonl"]),
        ("empty", ["empty: found no data file."]),
    ],
)
def test_a_file_that_is_not_there_or_not_readable_ends_with_code_3(path: str, texts: list[str], folder: Path) -> None:
    (folder / "good.xlsx").write_text("x")
    (folder / "empty").mkdir()
    mistakes(run(f"data.path={path}"), 3, *texts)


def test_a_max_length_that_leaves_no_trained_token_names_the_smallest_that_would_do(folder: Path) -> None:
    said = run("data.max_length=5")
    mistakes(said, 3, "No supervised token is left in any train row at data.max_length=5.")
    (least,) = (
        int(word.split("=")[1]) for word in said.err.split() if word.startswith("data.max_length=") and "5." not in word
    )
    assert f"data.max_length={least} is the smallest that keeps one row" in said.err
    mistakes(run(f"data.max_length={least - 1}"), 3, "No supervised token is left")
    said = cli(
        "check",
        "lora_sft",
        "--json",
        "model.name_or_path=tiny",
        "data.path=good.jsonl",
        f"data.max_length={least}",
        "data.max_lost=1",
        "data.held_out_size=1",
    )
    assert said.code == 0, said.err
    assert json.loads(said.out)["supervised_tokens"] > 0


def test_more_than_5_percent_of_lost_rows_is_refused_with_the_setting_that_allows_it(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(ROWS + '{"prompt": "1", "completion": ""}\n')
    mistakes(run("data.path=rows.jsonl"), 3, "rows would be lost", "data.max_lost=")


@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("data.columns={nope: question}", ["data.columns: good.jsonl has no column 'nope'; found completion, prompt."]),
        ("data.path=reasoning_gym/chain_summ", ["reasoning_gym has no task 'chain_summ'", "reasoning_gym/chain_sum"]),
        ("data.split=test", ["data.split=test has no effect: no path is a Hub data set.", "Leave it out."]),
        ("data.name=main", ["data.name=main has no effect"]),
        ("data.revision=abc", ["data.revision=abc has no effect"]),
        ("data.options={min_words: 3}", ["data.options has no effect: good.jsonl is no reasoning_gym/ task."]),
        ("data.weights=[1, 2]", ["data.weights=[1.0, 2.0]: expected one number for each of 1 paths"]),
    ],
)
def test_data_settings_that_do_not_fit_the_data_end_with_code_2(word: str, texts: list[str]) -> None:
    mistakes(run(word), 2, *texts)


# models


def model_folder(folder: Path, *files: str) -> str:
    """The tiny model's folder with these files in place of its weights."""
    target = folder / "model"
    target.mkdir()
    for path in (folder / "tiny").iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    for name in files:
        (target / name).write_bytes(b"not read")
    return "model.name_or_path=model"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_weights_only_as_pickle_end_with_code_6_unread(name: str, folder: Path) -> None:
    mistakes(run(model_folder(folder, name)), 6, f"model has weights only as pickle ({name})", "as safetensors")


def test_a_model_folder_without_weights_ends_with_code_2(folder: Path) -> None:
    mistakes(run(model_folder(folder)), 2, "model holds no *.safetensors file.")


def test_a_revision_of_a_local_folder_has_no_effect() -> None:
    mistakes(run("model.revision=main"), 2, "model.revision=main has no effect: tiny is not from the Hub.")


def test_a_folder_that_is_no_model_ends_with_code_2(folder: Path) -> None:
    (folder / "nothing").mkdir()
    mistakes(run("model.name_or_path=nothing"), 2, "model.name_or_path=nothing is no model: it has no config.json.")
    mistakes(run("model.name_or_path=./none"), 2, "model.name_or_path=./none: no such folder.", "smollm2-135m")


@pytest.mark.parametrize("command", [["check", "lora_sft"], ["run", "lora_sft"]])
def test_a_target_module_that_does_not_exist_is_answered_with_near_ones(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # which modules there are is only known from the model
    monkeypatch.chdir(folder)
    words = ["model.name_or_path=tiny", "data.path=good.jsonl", "output_dir=out/run", "target_modules=[q_proj, v_prj]"]
    said = cli(*command, *words)
    mistakes(said, 2, "lora.target_modules: 'v_prj' is no ", "Did you mean v_proj")
    assert not (folder / "out").exists()


# the Hub


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    network.hub_reachable.cache_clear()


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("word", "texts"),
    [
        ("model.name_or_path=nobody/nothing", ["The Hub cannot be reached", "nobody/nothing", "smollm2-135m"]),
        ("data.path=nobody/nothing", ["the Hugging Face Hub cannot be reached", "data.path=reasoning_gym/"]),
    ],
)
def test_an_unreachable_hub_is_said_within_15_seconds_with_the_offline_default(word: str, texts: list[str]) -> None:
    started = time.monotonic()
    said = run(word)
    assert time.monotonic() - started < 15
    assert said.code == 5
    assert len(said.err.splitlines()) <= 4
    for text in texts:
        assert text in said.err
