"""The commands as a person types them, one whole run of a recipe of one's own as a real process among them."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune_kit import errors
from finetune_kit import recipe as recipes
from finetune_kit.errors import SecurityError
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import leaves
from tests.fixtures_cli import Said, cli, python
from tests.fixtures_training import write_rows

FAST = (
    *("max_steps=2", "per_device_train_batch_size=4", "logging_steps=1", "held_out_size=3", "evaluate.size=2"),
    *(
        "evaluate.general_text=false",
        "evaluate.safety=null",
        "evaluate.bootstrap_samples=50",
        "evaluate.max_new_tokens=4",
    ),
)
COMMANDS = ("list", "show", "copy", "check", "run", "evaluate", "generate", "doctor")


def lines_of(said: Said) -> list[str]:
    return [line.rstrip() for line in said.out.splitlines()]


# help, list, show, copy


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_names_every_command(words: list[str]) -> None:
    said = cli(*words)
    assert said.code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command} ", said.out, re.MULTILINE), command
    assert "..." not in said.out.split("Commands:")[1]  # no summary is cut off


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    said = cli(command, "--help")
    assert said.code == 0
    assert said.out.startswith("Usage: ")


@pytest.mark.parametrize(
    ("words", "message", "fix"),
    [
        (["lst"], "No such command 'lst'. Did you mean 'list'?", "Did you mean list? python -m finetune_kit list …"),
        (["show"], "Missing argument 'RECIPE'.", "Settings are written key=value. See: python -m finetune_kit --help"),
        (
            ["run", "lora_sft", "--learning_rate=1e-4"],
            "No such option: --learning_rate",
            "Settings are written key=value, such as learning_rate=1e-4. See: python -m finetune_kit show lora_sft",
        ),
        (
            ["copy", "lora_sft"],
            "Missing argument",
            "Settings are written key=value. See: python -m finetune_kit --help",
        ),
    ],
)
def test_a_command_typed_wrong_ends_with_2_and_says_how_settings_are_written(
    words: list[str], message: str, fix: str
) -> None:
    said = cli(*words)
    assert said.code == 2
    assert message in said.err
    assert said.err.endswith(f"{fix}\n")


def test_list_names_every_recipe_with_its_first_line_in_reading_order() -> None:
    said = cli("list")
    assert said.code == 0
    assert lines_of(said)[: len(recipes.BUILTIN)] == [f"{name:<15}{recipes.summary(name)}" for name in recipes.BUILTIN]


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_show_prints_every_setting_with_value_unit_origin_and_help(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train:\n  learning_rate: 1e-4\n")
    said = cli("show", name, "--config", tmp_path / "mine.yaml", "max_steps=7", "data.columns={a: question}")
    assert said.code == 0
    text = " ".join(said.out.split())
    recipe = recipes.load(name)
    assert " ".join((recipe.module.__doc__ or "").split()) in text
    config = resolve(recipe.config_class, name, tmp_path / "mine.yaml", ["max_steps=7", "data.columns={a: question}"])
    for leaf in leaves(config):
        (line,) = [line for line in lines_of(said) if line.split(" ")[0] == leaf.key]
        value = "unset" if leaf.value is None else json.dumps(leaf.value, ensure_ascii=False).strip('"')
        origin = config.origins.get(leaf.key, "recipe")
        if len(origin) > 40:  # a long path folds into its column
            origin = origin[:20]
        for part in (value, leaf.unit, origin, leaf.help.split()[0]):
            assert part in line, leaf.key
    assert config.origins["train.learning_rate"].endswith("mine.yaml:2")


def test_a_copied_recipe_says_how_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = cli("copy", "lora_sft", "mine.py")
    assert said.out == "lora_sft is now yours in mine.py. Run it: python -m finetune_kit run ./mine.py\n"
    assert cli("show", "./mine.py").code == 0
    said = cli("copy", "lora_sft", "mine.py")
    assert (said.code, said.err) == (2, "error: mine.py exists already.\nChoose another name.\n")


# errors


def own_recipe(folder: Path, body: str) -> Path:
    file = folder / "own.py"
    file.write_text(
        '"""Mine."""\nfrom finetune_kit import errors\n'
        "from finetune_kit.settings.schema import RecipeConfig as Config\n\n\n"
        f"def run(config):\n    {body}\n"
    )
    return file


@pytest.mark.parametrize(
    ("error", "code"),
    [("SettingsError", 2), ("DataError", 3), ("NumericsError", 4), ("ResourceError", 5), ("SecurityError", 6)],
)
def test_each_kind_of_mistake_has_its_code_and_no_traceback_unless_asked_for(
    error: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = own_recipe(tmp_path, f'raise errors.{error}("found [this], expected that.", "Set it.")')
    said = cli("run", recipe)
    assert (said.code, said.err) == (code, "error: found [this], expected that.\nSet it.\n")
    assert getattr(errors, error).exit_code == code
    said = cli("run", recipe, "--debug")
    assert said.code == code
    assert "Traceback (most recent call last)" in said.err
    assert said.err.endswith("error: found [this], expected that.\nSet it.\n")


def test_a_bug_in_a_recipe_keeps_its_traceback_and_ends_with_1(tmp_path: Path) -> None:
    said = python("-m", "finetune_kit", "run", own_recipe(tmp_path, "return 1 / 0"), cwd=tmp_path)
    assert said.code == 1
    assert 'own.py", line 7, in run' in said.err
    assert said.err.endswith("ZeroDivisionError: division by zero\n")


def test_ctrl_c_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("run", own_recipe(tmp_path, "raise KeyboardInterrupt")).code == 130


def test_two_settings_files_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("recipe: lora_sft\n")
    said = cli("show", tmp_path / "a.yaml", "--config", tmp_path / "a.yaml")
    assert (said.code, "are both settings files" in said.err) == (2, True)


def test_require_takes_only_what_can_be_required(tmp_path: Path) -> None:
    said = cli("run", own_recipe(tmp_path, "return 1"), "--require", "luck")
    assert (said.code, said.err) == (2, "error: --require luck: expected improved or safe.\n")


# check


def test_check_counts_shows_plans_measures_when_asked_and_leaves_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    words = ("check", "lora_sft", "model.name_or_path=tiny", "data.path=rows.jsonl", *FAST)
    said = cli(*words)
    assert said.code == 0, said.err
    for text in ("37", "⟦", "<|im_end|>⟧", "sample length in tokens", "2 of 4 rows", "q_proj (2)", "activations"):
        assert text in said.out
    said = cli(*words, "--json", "--measure")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["rows"], found["plan"]["steps"], found["plan"]["rows_in_a_step"]) == (37, 2, 4)
    assert found["supervised_tokens"] == found["ledger"]["train"]["supervised_tokens"] > 37
    assert set(found["plan"]["memory_bytes"]) >= {"weights", "gradients", "optimizer_state", "activations"}
    assert 0 < found["plan"]["measured"]["seconds_a_step"] < 60
    assert found["plan"]["measured"]["peak_memory_gib"] > 0
    assert sorted(home.iterdir()) == before


# one whole run


@dataclass
class Run:
    """A finished run of a copied recipe, by a settings file and words, in another folder than the checkout."""

    home: Path
    folder: Path
    said: Said


@pytest.fixture(scope="module")
def run(shared_home: Path) -> Run:
    (shared_home / "settings").mkdir()
    assert python("-m", "finetune_kit", "copy", "lora_sft", "settings/mine.py", cwd=shared_home).code == 0
    text = "model:\n  name_or_path: tiny\ndata:\n  path: rows.jsonl\ntrain:\n  learning_rate: 1e-3\n"
    (shared_home / "settings" / "mine.yaml").write_text(text)
    said = python(
        "-m", "finetune_kit", "run", "settings/mine.py", "--config", "settings/mine.yaml", *FAST, cwd=shared_home
    )
    return Run(shared_home, shared_home / "runs" / "mine", said)


@pytest.fixture
def there(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(run.home)
    return run


def test_a_run_ends_with_0_the_table_the_folder_and_what_to_type_next(run: Run) -> None:
    assert run.said.code == 0, run.said.err
    assert lines_of(run.said)[0] == "mine of tiny on rows.jsonl, into runs/mine"
    for text in ("before", "after", "held-out loss", "The run is in runs/mine", "finetune_kit generate runs/mine"):
        assert text in run.said.out
    assert "Traceback" not in run.said.err
    assert "Warning" not in run.said.err


def test_a_run_leaves_what_the_design_promises(run: Run) -> None:
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"run.yaml", "ledger.json", "metrics.jsonl", "report.json", "report.html", "README.md"}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    report = json.loads((run.folder / "report.json").read_text())
    assert {"name", "before", "after", "difference", "interval", "n", "verdict"} <= set(report["metrics"][0])


OWN = ("--recipe", "settings/mine.py")  # the run's recipe is the user's own: no folder names code, who starts it does


def test_run_yaml_says_where_each_value_came_from_and_resolves_to_the_same_again(there: Run) -> None:
    with pytest.raises(SecurityError, match=r"names the recipe .*settings/mine\.py, which would be run as code"):
        recipes.load("runs/mine/run.yaml")
    recipe = recipes.load("settings/mine.py")
    again = resolve(recipe.config_class, recipe.word, Path("runs/mine/run.yaml"))
    first = resolve(recipe.config_class, recipe.word, Path("settings/mine.yaml"), FAST)
    first.train.output_dir = "runs/mine"
    assert {leaf.key: leaf.value for leaf in leaves(again)} == {leaf.key: leaf.value for leaf in leaves(first)}
    text = (there.folder / "run.yaml").read_text()
    assert "train.learning_rate: settings/mine.yaml:6" in text
    assert "train.max_steps: command line" in text
    assert "transformers: " in text


def test_the_same_run_again_goes_beside_it_and_require_improved_ends_with_4_where_it_is_not(there: Run) -> None:
    said = cli("run", "settings/mine.py", "--config", "runs/mine/run.yaml", "learning_rate=0", "--require", "improved")
    assert said.code == 4, said.err
    assert "into runs/mine-2" in said.out
    error = said.err[said.err.index("error: ") :]
    assert error.startswith("error: --require improved: ")
    assert error.endswith("The run is kept in runs/mine-2.\n")
    assert (there.home / "runs" / "mine-2" / "report.json").is_file()


def test_evaluate_gives_the_numbers_of_the_report_again(there: Run) -> None:
    said = cli("evaluate", "runs/mine", *OWN, "--json")
    assert said.code == 0, said.err
    again, report = json.loads(said.out), json.loads((there.folder / "report.json").read_text())
    assert [line["name"] for line in again["metrics"]] == [line["name"] for line in report["metrics"]]
    for new, old in zip(again["metrics"], report["metrics"], strict=True):
        assert new["after"] == pytest.approx(old["after"], abs=1e-5)
        assert new["n"] == old["n"]


def test_evaluate_takes_other_rows_and_refuses_what_cannot_act(there: Run) -> None:
    write_rows(there.home / "other.jsonl", [{"prompt": f"{n} =", "completion": str(n)} for n in range(5)])
    said = cli("evaluate", "runs/mine", *OWN, "data.path=other.jsonl", "--json")
    assert said.code == 0, said.err
    assert {line["n"] for line in json.loads(said.out)["metrics"] if line["name"] == "held_out_loss"} == {5}
    assert "held-out loss" in cli("evaluate", "runs/mine", *OWN, "data.path=other.jsonl").out
    said = cli("evaluate", "runs/mine", *OWN, "learning_rate=1")
    assert (said.code, "has no effect on a finished run" in said.err) == (2, True)
    assert cli("evaluate", "runs").code == 2


def test_generate_answers_a_prompt(there: Run) -> None:
    said = cli("generate", "runs/mine", *OWN, "1 + 1 =", "--max-new-tokens", "3")
    assert said.code == 0, said.err
    assert said.out.strip() or "cut off after 3 tokens" in said.err
