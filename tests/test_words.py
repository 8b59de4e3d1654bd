"""A wrong word leads to the right one: settings, files, commands and recipes of other tools, and of a tired hand."""

from pathlib import Path

import pytest

from finetune_kit.data.files import read_csv, read_jsonl
from finetune_kit.errors import DataError, SecurityError, SettingsError
from finetune_kit.recipe import load
from finetune_kit.run_folder.claim import same_finished
from finetune_kit.settings import values
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.checks import check_code
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from tests.fixtures_cli import cli


def settled(*words: str, recipe: str = "lora_sft", file: Path | None = None) -> RecipeConfig:
    return resolve(load(recipe).config_class, recipe, file, words)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *((f"{name}=x", "data.path") for name in ("data.file", "file", "dataset", "train_file", "data_files", "jsonl")),
        *((f"{name}=x", "model.name_or_path") for name in ("base_model", "model_name", "pretrained", "model_path")),
        ("epochs=3", "train.num_train_epochs"),
        ("lr=1e-4", "train.learning_rate"),
        ("bs=8", "train.per_device_train_batch_size"),
        ("use_wandb=true", "train.report_to"),
    ],
)
def test_another_tool_s_name_of_a_setting_leads_to_ours(word: str, meant: str) -> None:
    with pytest.raises(SettingsError) as error:
        settled(word)
    assert f"Did you mean {meant}?" in error.value.fix


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("rows.jsonl", "data.path=rows.jsonl"),
        ("mine.csv", "data.path=mine.csv"),
        ("mine.yaml", "--config mine.yaml"),
        ("Qwen/Qwen3-0.6B", "model.name_or_path=Qwen/Qwen3-0.6B"),
        ("lr: 1e-4", "lr=1e-4"),
    ],
)
def test_a_word_without_an_equals_sign_is_answered_with_the_setting_it_belongs_to(word: str, fix: str) -> None:
    with pytest.raises(SettingsError, match=r"is not a setting: expected key=value\.") as error:
        settled(word)
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train", "lora_sft"], "python -m finetune_kit run lora_sft"),
        (["finetune"], "Did you mean run?"),
        (["eval", "runs/x"], "python -m finetune_kit evaluate runs/x"),
        (["chat", "runs/x"], "python -m finetune_kit generate runs/x"),
        (["lora_sft", "lr=1"], "python -m finetune_kit run lora_sft lr=1"),
        (["run", "lora_sft", "--model", "x"], "model.name_or_path=x"),
        (["run", "lora_sft", "--epochs=3"], "train.num_train_epochs=3"),
        (["run", "sft"], "Did you mean lora_sft?"),
        (["run", "reward-model"], "Did you mean reward_model?"),
        (["run", "rows.jsonl"], "run lora_sft data.path=rows.jsonl"),
    ],
)
def test_another_tool_s_command_leads_to_ours(words: list[str], fix: str) -> None:
    said = cli(*words)
    assert said.code == 2
    assert fix in said.err


def test_a_file_of_another_toolkit_is_answered_by_one_table_of_all_its_names(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yaml"
    file.write_text(
        "base_model: a/b\ndatasets:\n  - {path: c/d, type: alpaca}\nadapter: lora\nsequence_len: 2048\nflurb: 3\n"
        "learning_rate: fast\nweight_decay: -1\nlora_dropout: 0.05\n"
    )
    with pytest.raises(SettingsError, match=r"8 mistakes in the settings") as error:
        settled("train.max_grad_norm=-2", file=file)
    rows = error.value.message.splitlines()[1:]
    found = {row.split()[1]: row.split("→")[1].strip() for row in rows if "→" in row}
    assert found["base_model"] == "model.name_or_path"
    assert found["datasets"] == "data.path"
    assert found["sequence_len"] == "data.max_length"
    assert "the recipe says it" in found["adapter"]
    assert "nothing is spelled like it" in found["flurb"]
    assert any(row.startswith(f"  {file}:2  datasets") for row in rows)
    assert any("train.learning_rate" in row and "expected a number, found 'fast'" in row for row in rows)
    assert sum("expected a number in [0, inf)" in row for row in rows) == 2


def test_a_mistyped_path_is_answered_with_the_one_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_chats.jsonl").write_text("{}")
    Path("runs/lora_sft").mkdir(parents=True)
    assert near_path("my_chat.jsonl") == "Did you mean my_chats.jsonl? "
    assert near_path("my_chats.json") == "Did you mean my_chats.jsonl? "
    assert near_path("runs/lora_stf") == "Did you mean runs/lora_sft? "
    assert near_path("quite/else") == near_path("zzz") == near_path("\0") == ""
    assert "Did you mean runs/lora_sft?" in cli("evaluate", "runs/lora_stf").err


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_table_with_other_separators_is_read_and_it_is_said(
    mark: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f'prompt{mark}completion\n"a, b"{mark}1,5\n')
    assert read_csv(file) == [(2, {"prompt": "a, b", "completion": "1,5"})]
    assert f"separated by {mark!r}" in caplog.text
    file.write_text("prompt,completion;x\na;b,c\n")
    assert read_csv(file) == [(2, {"prompt": "a;b", "completion;x": "c"})]


@pytest.mark.parametrize(
    "text", ['[{"prompt": "a"}]', '[\n  {"prompt": "a"}\n]', '[{"prompt": "a"},\n{"prompt": "b"}]']
)
def test_a_json_list_named_jsonl_is_told_as_that(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"one JSON list, not an object a line") as error:
        read_jsonl(tmp_path / "rows.jsonl")
    assert "mv rows.jsonl rows.json" in error.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "a: &a {b: *a}\n",
        "a: &a [*a]\n",
        "a: " + "[" * 5000,
        "- " * 3000,
        "a: " + "{b: " * 5000,
        "a: |\n " + "z" * 300_000,
        "".join(f"a{n}: 1\n" for n in range(11_000)),
        "a: &a {x: 1}\nb: &a [*a, *a]\nc: *a\nd: &d [*d]\n",
    ],
    ids=[
        "ten levels of aliases",
        "recursive dict",
        "recursive list",
        "lists",
        "dashes",
        "dicts",
        "large",
        "many",
        "again",
    ],
)
def test_yaml_that_would_take_all_time_or_memory_is_refused_unbuilt(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SecurityError, match=r"run\.yaml"):
        values.load_file(tmp_path / "run.yaml")


def test_a_few_aliases_are_no_mistake() -> None:
    assert values.load_text("a: &a {r: 8}\nb: *a\nc: [*a, *a]\n", "x")["c"] == [{"r": 8}] * 2


@pytest.mark.parametrize(
    ("text", "recipe", "key"),
    [
        ("reward: {sources: [evil.py:score]}", "ppo", "reward.sources"),
        ("reward: {sources: [task, /proc/self/cwd/evil.py:score]}", "grpo", "reward.sources"),
        ("evaluate: {hub_metrics: [evil/metric]}", "lora_sft", "evaluate.hub_metrics"),
        ("train: {extra: {deepspeed: ../evil.json}}", "lora_sft", "train.extra.deepspeed"),
        ("train: {extra: {torch_compile_backend: evil}}", "lora_sft", "train.extra.torch_compile_backend"),
    ],
)
def test_a_settings_file_names_no_code_and_the_command_line_may(
    text: str, recipe: str, key: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    config = settled(recipe=recipe, file=tmp_path / "mine.yaml")
    with pytest.raises(SecurityError, match=r"a file names it, not you") as error:
        check_code(config)
    given = error.value.fix.split("'")[1]
    assert given.startswith(f"{key}=")
    check_code(settled(given, recipe=recipe, file=tmp_path / "mine.yaml"))
    check_code(settled(given, recipe=recipe))


def test_a_finished_run_of_the_same_settings_is_found_and_one_of_others_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from finetune_kit.run_folder.identity import settings_of

    monkeypatch.chdir(tmp_path)
    config = settled()
    folder = Path("runs/lora_sft")
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps({"settings": settings_of(config), "versions": {}}))
    assert same_finished(config, Path("runs/lora_sft-2")) is None  # it has not finished
    (folder / "report.json").write_text("{}")
    assert same_finished(config, Path("runs/lora_sft-2")) == folder
    assert same_finished(settled("lora.r=8"), Path("runs/lora_sft-2")) is None
    (folder / "identity.json").write_text("[")
    assert same_finished(config, Path("runs/lora_sft-2")) is None
