"""What a person gets wrong, through the real `run`: the exit code, at most three lines that say how to fix it, and
nothing half-written. All of it is refused before a weight is loaded."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_kit.data import files
from finetune_kit.models import load
from finetune_kit.system import network
from tests.fixtures_cli import Said, cli

ROW = '{"prompt": "1 + 1 =", "completion": "2"}'
USER, ANSWER = '{"role": "user", "content": "x"}', '{"role": "assistant", "content": "y"}'
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
        ("max_steps=0", ["train.max_steps (command line): 0 trains nothing."]),
        ("early_stopping_patience=2", ["has no effect without held-out losses on the way", "Add train.eval_steps=20"]),
        ("learning_rate", ["'learning_rate' is not a setting: expected key=value."]),
        ("output_dir=../../x; rm -rf ~", ["leads out of the folder you are in", "If it is meant: output_dir=/"]),
        ("output_dir=runs/\x1b[2J", ["has characters that cannot be printed"]),
        ("output_dir=.", ["is the folder you are in"]),
    ],
)
def test_a_setting_that_cannot_be_ends_with_code_2(word: str, texts: list[str]) -> None:
    mistakes(run(word), 2, *texts)


@pytest.mark.parametrize(("recipe", "beta"), [("dpo", "0"), ("kto", "-0.1"), ("orpo", "10.1")])
def test_a_beta_outside_of_0_to_10_ends_with_code_2(recipe: str, beta: str) -> None:
    mistakes(run(f"beta={beta}", recipe=recipe), 2, f"beta (command line): expected a number in (0, 10], found {beta}.")


def test_a_token_among_the_settings_ends_with_code_6_and_is_not_repeated(folder: Path) -> None:
    token = "hf_" + "Ab1" * 12
    for word in (f"train.extra.hub_token={token}", f"chat_template_kwargs={{key: {token}}}", f"model.revision={token}"):
        said = run(word)
        mistakes(said, 6, "holds what looks like a token", "HF_TOKEN")
        assert token not in said.err
    (folder / "mine.yaml").write_text(f"recipe: lora_sft\ntrain: {{extra: {{hub_token: {token}}}}}\n")
    said = cli("run", "mine.yaml")
    mistakes(said, 6, "train.extra (mine.yaml:2) holds what looks like a token")
    assert token not in said.err


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
        (ROWS + '{"prompt": "1 + 1 =", "completion": 2', ["rows.jsonl:9:", "broken JSON"]),
        (ROWS + "{'prompt': '1'}", ["rows.jsonl:9:2: broken JSON"]),
        (ROWS + '{"prompt": NaN, "completion": "2"}', ["rows.jsonl:9: NaN is not JSON."]),
        (ROWS + '{"prompt": "1", "prompt": "2", "completion": "2"}', ["rows.jsonl:9: 'prompt' is written twice"]),
        (ROWS + '{"prompt": "1", "completion": "\\ud83d"}', ["rows.jsonl:9: completion: character 1 is U+D83D"]),
        (ROWS + '{"prompt": "1", "completion": "a\\u0000b"}', ["rows.jsonl:9: completion: character 2 is U+0000"]),
        ('{"text": null}\n{"text": null}', ["rows.jsonl: all columns are empty in every row: text."]),
        ('{"text": ""}\n' * 9, ["There are 9 rows, all of them equal, so none can be held out"]),
        (ROWS + "[1, 2]", ["rows.jsonl:9: a row is list; expected an object."]),
        (ROWS + '{"prompt": "1", "completion": null}', ["rows.jsonl:9: completion: content is null or missing"]),
        (
            ROWS + '{"prompt": "1", "completion": 2}',
            ["rows.jsonl:9: completion: content is a number ('2'); expected text."],
        ),
        (ROWS + '{"prompt": "1", "completion": ["2", "3"]}', ["rows.jsonl:9: completion is a list of 2 texts"]),
        (ROWS + '{"prompt": "", "completion": "2"}', ["rows.jsonl:9: the prompt is empty."]),
        ('{"messages": []}', ["rows.jsonl:1: the list of messages is empty."]),
        ('{"messages": "hello"}', ["rows.jsonl:1: expected a list of messages, found text ('hello')."]),
        ('{"messages": [{"role": "boss", "content": "x"}]}', ["rows.jsonl:1: message 1 has the unknown role 'boss'."]),
        ('{"messages": [{"content": "x"}]}', ["rows.jsonl:1: message 1 has no role."]),
        ('{"messages": [{"role": "user", "content": null}]}', ["rows.jsonl:1: message 1 (user): content is null"]),
        ('{"messages": [{"role": "user", "content": 5}]}', ["rows.jsonl:1: message 1 (user): content is a number"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["rows.jsonl:1: no assistant turn, so nothing to learn"]),
        (
            f'{{"messages": [{ANSWER}, {USER}, {ANSWER}]}}',
            ["rows.jsonl:1: the conversation begins with an assistant turn"],
        ),
        (f'{{"messages": [{USER}, {USER}, {ANSWER}]}}', ["rows.jsonl:1: two user turns in a row.", "merge_turns=true"]),
        ('{"chosen": "a", "rejected": "b"}', ["found columns chosen, rejected", "this recipe needs prompt-completion"]),
        ('{"foo": "a", "bar": "b"}', ["found columns bar, foo", "data.columns="]),
        (ROW, ["There is one row, so none can be held out", "data.held_out_path=FILE"]),
    ],
)
def test_rows_that_cannot_be_trained_end_with_code_3_and_their_line(
    content: str, texts: list[str], folder: Path
) -> None:
    (folder / "rows.jsonl").write_text(content, encoding="utf-8")
    mistakes(run("data.path=rows.jsonl"), 3, *texts)


BAD_ROWS = (
    *('{"prompt": "1 + 1 =", "completion": 2', '{"prompt": NaN, "completion": "2"}', "[1, 2]", '{"prompt": "caf\xe9"}'),
    *('{"prompt": "1", "completion": "a\\u0000b"}', '{"prompt": "1", "completion": null}'),
)


def test_as_many_bad_rows_as_skip_bad_rows_says_are_left_out_and_counted_and_one_more_is_refused(folder: Path) -> None:
    more = "".join(f'{{"prompt": "{n} + {n} =", "completion": "{2 * n}"}}\n' for n in range(8, 40))
    text = "\n".join(BAD_ROWS[:3]) + "\n" + ROWS + "\n".join(BAD_ROWS[3:]) + "\n" + more
    (folder / "rows.jsonl").write_bytes(text.encode("latin-1"))
    words = ("model.name_or_path=tiny", "data.path=rows.jsonl", "data.held_out_size=4", "data.max_lost=0.2")
    said = cli("check", "lora_sft", "--json", *words, "data.skip_bad_rows=6")
    assert said.code == 0, said.err
    ledger = json.loads(said.out)["ledger"]
    assert ledger["train"]["dropped"] == {"cannot be read": 6}
    assert (ledger["train"]["rows"], ledger["train"]["trained"], ledger["held_out"]["rows"]) == (42, 36, 4)
    listed = {row["where"]: row["what"] for row in ledger["rows_not_kept_whole"]}
    assert list(listed) == [f"rows.jsonl:{line}" for line in (1, 2, 3, 12, 13, 14)]
    assert "NaN is not JSON" in listed["rows.jsonl:2"]
    assert "not UTF-8 (byte 0xe9)" in listed["rows.jsonl:12"]
    assert "content is null or missing" in listed["rows.jsonl:14"]
    mistakes(run(*words[1:], "data.skip_bad_rows=5"), 3, "rows.jsonl:14: completion: content is null or missing")
    mistakes(run(*words[1:3], "data.skip_bad_rows=6"), 3, "6 of 42 train rows would be lost", "6 × cannot be read")


def test_bad_lines_of_a_csv_and_bad_held_out_rows_are_left_out_alike(folder: Path) -> None:
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"{n} =,{n}\n" for n in range(30)) + "1,2,3\n")
    (folder / "held.jsonl").write_text('{"prompt": "held", "completion": "out"}\nno\n')
    words = ("model.name_or_path=tiny", "data.path=rows.csv", "data.held_out_path=held.jsonl", "data.max_lost=0.5")
    said = cli("check", "lora_sft", "--json", *words, "data.skip_bad_rows=2")
    assert said.code == 0, said.err
    ledger = json.loads(said.out)["ledger"]
    assert [ledger[split]["dropped"] for split in ("train", "held_out")] == [{"cannot be read": 1}] * 2
    assert "32: 3 fields" in ledger["rows_not_kept_whole"][0]["what"]


def test_user_turns_in_a_row_are_joined_by_a_blank_line_where_that_is_asked_for(folder: Path) -> None:
    turns = [{"role": "user", "content": text} for text in ("one", "two", "three")]
    rows = [[*turns, {"role": "assistant", "content": f"{n}"}, {"role": "user", "content": f"{n}?"}] for n in range(9)]
    lines = [json.dumps({"messages": [*row, {"role": "assistant", "content": "yes"}]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    words = ("model.name_or_path=tiny", "data.path=rows.jsonl", "data.merge_turns=true")
    said = cli("check", "lora_sft", "--json", *words)
    assert said.code == 0, said.err
    assert "one\n\ntwo\n\nthree" in json.loads(said.out)["samples"][0]["text"]


@pytest.mark.parametrize(
    "change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")], ids=["BOM", "CRLF"]
)
def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(change: Callable[[str], str], folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(change(ROWS).encode())
    said = cli("check", "lora_sft", "--json", "model.name_or_path=tiny", "data.path=rows.jsonl")
    assert said.code == 0, said.err
    assert json.loads(said.out)["rows"] == 7


def test_a_line_of_more_than_64_mib_ends_with_code_3_and_is_not_read_to_its_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGEST_LINE", 2**20)
    with (folder / "rows.jsonl").open("wb") as file:
        file.truncate(2**40)  # a terabyte that takes no room on the disk
    mistakes(run("data.path=rows.jsonl"), 3, "rows.jsonl:1: a line of more than 1 MiB.")


def test_text_that_the_tokenizer_cannot_write_ends_with_code_3_and_the_share(folder: Path) -> None:
    tokenizer = json.loads((folder / "tiny" / "tokenizer.json").read_text())
    for digit in "0123456789":
        del tokenizer["model"]["vocab"][digit]
    tokenizer["model"]["unk_token"] = "<|unk|>"
    target = copied(folder, "model")
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = run("model.name_or_path=model")
    mistakes(said, 3, "of the tokens are <|unk|>", "First: good.jsonl:", "model.name_or_path=")


PAIR = '{"prompt": "1 + 1 =", "chosen": "%s", "rejected": "%s"}\n'


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (
            PAIR % ("2", "3") + '{"prompt": "1", "chosen": "2"}\n',
            ["rows.jsonl:2: rejected: content is null or missing"],
        ),
        (PAIR % ("2", "2") + PAIR % ("3", "3"), ["2 × chosen and rejected are equal"]),
        (PAIR % ("", "2") + PAIR % ("", "3"), ["2 × empty chosen"]),
        (PAIR % ("2", "3") + PAIR % ("3", "2"), ["2 × contradictory: the same two answers preferred both ways round"]),
    ],
    ids=["rejected missing", "equal", "empty", "contradictory"],
)
def test_pairs_that_teach_nothing_end_with_code_3_and_their_number(
    content: str, texts: list[str], folder: Path
) -> None:
    (folder / "rows.jsonl").write_text(content)
    (folder / "held.jsonl").write_text(PAIR % ("held", "out"))
    mistakes(run("data.path=rows.jsonl", "data.held_out_path=held.jsonl", recipe="dpo"), 3, *texts)


def test_training_rows_that_are_all_held_out_too_end_with_code_3() -> None:
    mistakes(run("data.held_out_path=good.jsonl"), 3, "8 of 8 train rows would be lost", "8 × also held out")


def test_a_link_out_of_a_data_folder_ends_with_code_6_and_nothing_of_it_is_said(folder: Path) -> None:
    (folder / "secret.txt").write_text("hunter2")
    (folder / "theirs").mkdir()
    (folder / "theirs" / "rows.txt").symlink_to(folder / "secret.txt")
    said = run("data.path=theirs")
    mistakes(said, 6, "theirs/rows.txt is a link to", "outside the data's folder")
    assert "hunter2" not in said.err


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
        ("data.options={min_words: 3}", ["data.options has no effect: good.jsonl is not a reasoning_gym/ task."]),
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


def copied(folder: Path, name: str, **config: object) -> Path:
    """The tiny model, whole, in a folder of its own with these settings in its config.json."""
    target = folder / name
    shutil.copytree(folder / "tiny", target)
    settings = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**settings, **config}))
    return target


MARK = "open('ran', 'w').write('a stranger was here')\n"


@pytest.mark.parametrize(
    ("config", "code", "texts"),
    [
        (
            {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
            6,
            ["model can only be loaded by running code of its own", "model.trust_remote_code=true", "40 digits"],
        ),
        ({"_attn_implementation_internal": "evil/kernel"}, 6, ["asks for the attention kernel 'evil/kernel'"]),
        ({"_attn_implementation": "evil/kernel"}, 6, ["would be fetched and run as code (_attn_implementation)"]),
        ({"text_config": {"attn_implementation": "evil/kernel"}}, 6, ["would be fetched and run as code"]),
        ({"model_type": "llama\nimport os"}, 2, ["model_type is 'llama\\nimport os'"]),
        ({"model_type": "strange"}, 2, ["model.name_or_path=model cannot be loaded: ValueError"]),
        ({"hidden_size": 10**7}, 2, ["at least 745,063 GiB in 16 bits", "Nothing was allocated."]),
        ({"hidden_size": -5}, 2, ["config.json: hidden_size is -5; expected 1 or more."]),
        ({"intermediate_size": 0}, 2, ["config.json: intermediate_size is 0; expected 1 or more."]),
        ({"head_dim": 0}, 2, ["config.json: head_dim is 0; expected 1 or more."]),
        ({"quantization_config": 5}, 2, ["config.json: quantization_config is 5; expected an object of settings."]),
        ({"text_config": []}, 2, ["config.json: text_config is []; expected an object of settings."]),
        ({"hidden_size": "many"}, 2, ["cannot be loaded", "expected int, got str"]),
    ],
)
@pytest.mark.parametrize("command", ["check"])
def test_a_config_of_a_stranger_is_refused_before_anything_of_it_runs_or_is_allocated(
    command: str, config: dict[str, object], code: int, texts: list[str], folder: Path
) -> None:
    (copied(folder, "model", **config) / "evil.py").write_text(MARK)
    said = cli(command, "lora_sft", "model.name_or_path=model", "data.path=good.jsonl")
    mistakes(said, code, *texts)
    assert not (folder / "ran").exists()


def test_a_tokenizer_with_code_of_its_own_ends_with_code_6_and_a_known_model_s_own_code_stays_unused(
    folder: Path,
) -> None:
    target = copied(folder, "model", auto_map={"AutoModelForCausalLM": "evil.M"})
    (target / "evil.py").write_text(MARK)
    said = cli(
        "check", "lora_sft", "model.name_or_path=model", "data.path=good.jsonl"
    )  # a Llama, which transformers has
    assert said.code == 0, said.err
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["evil.T", None]}}
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    mistakes(run("model.name_or_path=model"), 6, "running code of its own")
    assert not (folder / "ran").exists()


def test_trust_remote_code_needs_the_command_line_and_a_commit_of_40_digits(folder: Path) -> None:
    trusting, pinned = "model.trust_remote_code=true", f"model.revision={'a1' * 20}"
    mistakes(run(trusting), 6, "model.revision is unset; expected the 40 digits of a commit")
    mistakes(run(trusting, "model.revision=main"), 6, "model.revision is main; expected the 40 digits")
    mistakes(run(trusting, pinned), 2, "tiny is not from the Hub")
    (folder / "mine.yaml").write_text(f"recipe: lora_sft\nmodel: {{trust_remote_code: true, revision: {'a1' * 20}}}\n")
    mistakes(
        cli("run", "mine.yaml"), 6, "model.trust_remote_code (mine.yaml:2): whoever runs it must say so, not a file"
    )
    (folder / "mine.yaml").write_text("recipe: lora_sft\nmodel: {attn_implementation: evil/kernel}\n")
    mistakes(cli("run", "mine.yaml"), 6, "evil/kernel would be fetched from the Hub and run as code")


def outside(model: Path, name: str) -> None:
    """An index that names this file for every weight."""
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / "inside.safetensors").write_bytes((model.parent / "outside.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "pytorch_model.bin"])
def test_an_index_that_leads_out_of_the_model_s_folder_ends_with_code_6(name: str, folder: Path) -> None:
    outside(copied(folder, "model"), name)
    mistakes(
        run("model.name_or_path=model"), 6, f"names the weights file '{name}', which is not a *.safetensors in the"
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model.safetensors", "link"), ("tokenizer.json", "fifo"), ("config.json", "folder"), ("config.json", "link")],
)
def test_a_link_a_fifo_or_a_folder_in_a_file_s_place_ends_with_code_6_and_does_not_hang(
    name: str, kind: str, folder: Path
) -> None:
    target = copied(folder, "model")
    (target / name).rename(folder / "elsewhere")
    (target / "other.safetensors").write_bytes(b"")  # the folder still looks like a model's
    make = {"link": lambda path: path.symlink_to(folder / "elsewhere"), "fifo": os.mkfifo, "folder": Path.mkdir}[kind]
    make(target / name)
    said = run("model.name_or_path=model")
    if name == "config.json" and kind != "link":
        mistakes(said, 2, "model.name_or_path=model is not a model: it has no config.json.")
    else:
        mistakes(said, 6, f"model/{name} is ", "outside the model's folder" if kind == "link" else "not a plain file")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("config.json", "{", ["model/config.json:1 cannot be read as JSON: broken JSON: Expecting property name"]),
        ("config.json", "[1]", ["model/config.json: expected a JSON object, found list."]),
        ("tokenizer.json", "{}", ["model.name_or_path=model cannot be loaded: KeyError"]),
        ("model.safetensors", "x" * 100, ["model/model.safetensors is broken or cut off"]),
        ("model.safetensors.index.json", '{"weight_map": []}', ["expected a weight_map of file names"]),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "none.safetensors"}}',
            ["names none.safetensors, which is not there."],
        ),
    ],
)
def test_a_broken_file_of_a_model_ends_with_code_2_and_its_name(
    name: str, content: str, texts: list[str], folder: Path
) -> None:
    (copied(folder, "model") / name).write_text(content)
    mistakes(run("model.name_or_path=model"), 2, *texts)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda weights, name: weights.pop(name),
            "lacks 1 of its weights, such as model.layers.0.mlp.down_proj.weight",
        ),
        (
            lambda weights, name: weights.update({name: weights[name][:-1].clone()}),
            "the shapes in config.json are not those of its weights",
        ),
    ],
    ids=["a weight is missing", "a weight has another shape"],
)
def test_weights_that_are_not_those_of_the_config_end_with_code_2(
    change: Callable[[dict[str, object], str], None], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    monkeypatch.undo()  # only loading can tell
    monkeypatch.chdir(folder)
    target = copied(folder, "model")
    weights = load_file(target / "model.safetensors")
    change(weights, "model.layers.0.mlp.down_proj.weight")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    mistakes(run("model.name_or_path=model"), 2, text)


def test_a_tokenizer_with_more_tokens_than_the_model_ends_with_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    tokenizer = json.loads((folder / "tiny" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["word"] = 999
    (copied(folder, "model") / "tokenizer.json").write_text(json.dumps(tokenizer))
    mistakes(run("model.name_or_path=model"), 2, "embeddings for 261 tokens, its tokenizer has 1,000")


# chat templates


@pytest.mark.parametrize(
    ("template", "code", "text"),
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            *(6, "takes more than 1.0 s"),
            marks=pytest.mark.long,
        ),
        ("{{ 'x' * 2000000 }}", 6, "characters for a conversation of"),
        ("{{ 'x' * 5000000000 }}", 6, "takes more than 1 GiB"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 3, "access to attribute '__class__'"),
        ("{{ messages.__class__.__init__.__globals__ }}", 3, "unsafe"),
        ("{{ raise_exception('no') }}", 3, "does not render a user turn and an answer: no"),
        ("{% for %}", 3, "does not render a user turn and an answer"),
    ],
)
def test_a_chat_template_that_runs_on_grows_or_breaks_out_is_refused(
    template: str, code: int, text: str, folder: Path
) -> None:
    plain = (folder / "tiny" / "chat_template.jinja").read_text()
    (copied(folder, "model") / "chat_template.jinja").write_text(template + plain)
    mistakes(run("model.name_or_path=model"), code, "The model's chat template", text)


def test_a_chat_template_that_only_runs_on_for_one_row_is_refused_at_that_row(folder: Path) -> None:
    late = "{% if '7 + 7' in messages[-1]['content'] %}{{ 'x' * 2000000 }}{% endif %}"
    plain = (folder / "tiny" / "chat_template.jinja").read_text()
    (copied(folder, "model") / "chat_template.jinja").write_text(late + plain)
    mistakes(run("model.name_or_path=model"), 6, "characters for a conversation of")


# adapters


def test_an_adapter_only_as_pickle_or_cut_off_is_refused_unread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    (folder / "adapter" / "adapter_model.bin").write_bytes(b"not read")
    mistakes(run("lora.init_from=adapter"), 2, "no adapter there (adapter_config.json, adapter_model.safetensors)")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"cut off")
    mistakes(run("lora.init_from=adapter"), 2, "adapter/adapter_model.safetensors is broken or cut off")


def test_a_revision_of_a_local_folder_has_no_effect() -> None:
    mistakes(run("model.revision=main"), 2, "model.revision=main has no effect: tiny is not from the Hub.")


def test_a_folder_that_is_no_model_ends_with_code_2(folder: Path) -> None:
    (folder / "nothing").mkdir()
    mistakes(run("model.name_or_path=nothing"), 2, "model.name_or_path=nothing is not a model: it has no config.json.")
    mistakes(run("model.name_or_path=./none"), 2, "model.name_or_path=./none: no such folder.", "smollm2-135m")


@pytest.mark.parametrize("command", [["run", "lora_sft"]])
def test_a_target_module_that_does_not_exist_is_answered_with_near_ones(
    command: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # which modules there are is only known from the model
    monkeypatch.chdir(folder)
    words = ["model.name_or_path=tiny", "data.path=good.jsonl", "output_dir=out/run", "target_modules=[q_proj, v_prj]"]
    said = cli(*command, *words)
    mistakes(said, 2, "lora.target_modules: 'v_prj' is not a linear layer", "Did you mean v_proj")
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
