"""lm-evaluation-harness on a loaded model: its numbers are ours, and nothing is fetched that was not asked for."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.cli.results import _asked
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.evaluation import harness
from finetune_kit.evaluation.choices import measure_choices, read_choices
from finetune_kit.evaluation.harness import Asked, Scores, listed
from finetune_kit.settings.schema import EvaluateConfig
from tests.fixtures_cli import ROOT
from tests.fixtures_evaluation import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()
TASK = """task: my_quiz
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def quiz(folder: Path) -> Path:
    rows = [
        {
            "question": f"What is {n} + {n}?",
            "choices": [f"{2 * n}", f"about {n}", "many things"][: 2 + n % 2],
            "answer": n % 2,
        }
        for n in range(24)
    ]
    (folder / "quiz.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "quiz.jsonl"


@pytest.mark.long
@pytest.mark.parametrize("own_file", [False, True])
def test_our_multiple_choice_is_lm_eval_s_row_by_row(
    own_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows, model = quiz(tmp_path), tiny_llama()
    if own_file:
        (tmp_path / "my_quiz.yaml").write_text(TASK.format(rows=rows))
    asked = Asked(("my_quiz",), folder=tmp_path) if own_file else Asked((str(rows),))
    name = "my_quiz" if own_file else "quiz"
    harness.check(asked)
    theirs = harness.run_tasks(model, TOKENIZER, asked, batch_size=4)
    ours = measure_choices(model, TOKENIZER, "quiz", read_choices(str(rows), 1000), EvaluateConfig())
    assert theirs.rows[name, "acc"] == ours.right()
    assert theirs.rows[name, "acc_norm"] == ours.right(normalised=True)
    assert theirs.totals[name, "acc"] == pytest.approx(sum(ours.right()) / 24)
    assert capfd.readouterr().err == ""
    few = harness.run_tasks(model, TOKENIZER, Asked(asked.tasks, limit=5, num_fewshot=1, folder=asked.folder), 4)
    assert len(few.rows[name, "acc"]) == 5


@pytest.mark.long
def test_the_task_files_that_are_shipped_run_on_local_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    arc = [{"query": f"Question: {n}?", "choices": ["a", "bb"], "gold": n % 2} for n in range(4)]
    sums = [{"question": f"{n} + 1?", "answer": f"It is more. #### {n + 1}"} for n in range(4)]
    for name, rows in (("arc", arc), ("gsm8k", sums)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for file in (ROOT / "docs/tasks").glob("*.yaml"):
        text = file.read_text().replace("max_gen_toks: 256", "max_gen_toks: 4")
        (tmp_path / file.name).write_text(text)
    asked = Asked(("local_arc", "local_gsm8k"), folder=tmp_path)
    harness.check(asked)
    found = harness.run_tasks(tiny_llama(), TOKENIZER, asked, batch_size=2)
    assert {key: len(rows) for key, rows in found.rows.items()} == {
        ("local_arc", "acc"): 4,
        ("local_arc", "acc_norm"): 4,
        ("local_gsm8k", "exact_match,last-number"): 4,
    }


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quiz.jsonl": "nothing.jsonl"}, "Unable to find .*nothing.jsonl"),
        ({"{{question}}": "{{nosuch}}"}, "does not fit its rows: UndefinedError: 'nosuch' is undefined"),
        ({"doc_to_choice: choices": "doc_to_choice: options"}, "does not fit its rows: ValueError: malformed"),
    ],
)
def test_a_task_file_that_does_not_fit_its_rows_is_told_so(
    wrong: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = TASK.format(rows=quiz(tmp_path))
    for old, new in wrong.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "my_quiz.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        harness.run_tasks(tiny_llama(), TOKENIZER, Asked(("my_quiz",), limit=2, folder=tmp_path), 4)


@pytest.mark.long
def test_two_files_of_one_name_are_two_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    paths = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        paths.append(str(quiz(tmp_path / name)))
    found = harness.run_tasks(tiny_llama(), TOKENIZER, Asked(tuple(paths), limit=2), 4)
    assert [task for task, metric in found.rows if metric == "acc"] == ["one/quiz", "other/quiz"]


@pytest.mark.long
def test_a_task_that_does_not_exist_is_told_with_its_neighbour() -> None:
    with pytest.raises(SettingsError, match="--tasks: arc_eazy is not a task of the harness") as error:
        harness.check(Asked(("arc_eazy",)))
    assert error.value.fix == "Did you mean arc_easy?"


def test_without_the_package_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ResourceError, match="--tasks needs lm-evaluation-harness") as error:
        harness.check(Asked(("arc_easy",)))
    assert error.value.fix == "pip install 'finetune-kit[harness]'"


def test_base_and_tuned_are_compared_row_by_row_in_the_direction_of_the_metric() -> None:
    key, loss = ("arc", "acc"), ("text", "loss")
    before = Scores({key: [0.0] * 30, loss: [2.0 + at for at in range(30)]}, {key: True, loss: False}, version="0.4.13")
    after = Scores({key: [1.0] * 25 + [0.0] * 5, loss: [1.0 + at * 1.01 for at in range(30)]}, before.higher_is_better)
    asked = Asked(("arc", "text"), limit=30, num_fewshot=0, apply_chat_template=True)
    report = harness.report(before, after, asked, EvaluateConfig(bootstrap_samples=200))
    assert [(line["name"], line["verdict"]) for line in report.metrics] == [
        ("arc acc", "better"),
        ("text loss", "better"),
    ]
    assert (report.wins, report.ties, report.losses) == (25, 5, 0)
    assert report.details["harness"]["command"].endswith(
        "evaluate DIR --tasks arc,text --limit 30 --num-fewshot 0 --apply-chat-template"
    )
    assert "0 examples before each question, in the chat template, at most 30 rows" in report.details["harness"]["said"]
    with pytest.raises(DataError, match="gave no score of single rows"):
        harness.report(Scores({}, {}), Scores({}, {}), asked, EvaluateConfig())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, 5, None, False, None), "--limit has no effect without --tasks"),
        ((None, None, 0, False, None), "--num-fewshot has no effect without --tasks"),
        ((None, None, None, True, None), "--apply-chat-template has no effect without --tasks"),
        ((["arc"], None, None, False, Path("none")), "--task-files none: no such folder"),
    ],
)
def test_an_option_of_tasks_without_them_is_refused(given: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        _asked(*given)


def test_tasks_may_be_several_words_or_one_with_commas() -> None:
    assert listed(["a,b", "a"]) == ("a", "b")
    assert "1 example before" in Asked(("a",), num_fewshot=1).in_words()
    assert listed(["arc_easy,hellaswag", "rows.jsonl"]) == ("arc_easy", "hellaswag", "rows.jsonl")
