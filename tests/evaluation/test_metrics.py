"""evaluation/metrics.py: scores by hand-made cases, and which metric the data allow."""

import json
import math
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import evaluate
import pytest

from finetune_kit.data.records import PromptCompletion
from finetune_kit.errors import NumericsError, ResourceError, SettingsError
from finetune_kit.evaluation.metrics import answer_of, choose_metrics, final_number, final_number_match, score_rows

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def data_of(references, score=None):
    records = [
        PromptCompletion(f"x:{n}", [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}], None, {})
        for n, text in enumerate(references, 1)
    ]
    return SimpleNamespace(held_out_records=records, score=score)


def scores(name, predictions, references, **data):
    (metric,) = choose_metrics([name], data_of(references, **data))
    where = [f"x:{n}" for n in range(1, len(references) + 1)]
    metadata = [{"answer": reference} for reference in references]
    return score_rows(metric, predictions, references, metadata, where)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.50 dollars.", "1234.5"),
        ("so 3 + 4 = 7", "7"),
        ("5-3", "3"),
        ("it fell to -3", "-3"),
        ("it fell to −3 degrees", "-3"),
        ("-$40", "-40"),
        ("He pays $1,000,000.", "1000000"),
        ("half is .5", "0.5"),
        ("in 1999, 12 cats", "12"),
        ("9 wrong\n#### 18 and 20", "18"),
        ("#### 1,080\nDone in 3 steps", "1080"),
        ("version2.", "2"),
        ("none at all", None),
        ("7 but ####", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_final_number_is_equal_as_a_number_and_a_reference_without_one_is_compared_as_text():
    assert final_number_match("It is 18.00!", "9 * 2 = 18\n#### 18") == 1.0
    assert final_number_match("It is 19", "#### 18") == 0.0
    assert final_number_match("no idea", "#### 18") == 0.0
    assert final_number_match("no  idea", "no idea") == 1.0
    assert final_number_match("7", "no idea") == 0.0


def test_exact_match_counts_runs_of_white_space_as_one_and_nothing_else():
    assert scores("exact_match", ["a  b\n", "A b", "a b.", ""], ["a b", "a b", "a b", "a b"]) == [1.0, 0.0, 0.0, 0.0]


def test_a_thought_is_not_part_of_the_answer():
    assert answer_of("<think>maybe 3\n</think>\n\n4") == "4"
    assert answer_of("<think>never closed 4") == "<think>never closed 4"
    assert scores("exact_match", ["<think>so 5</think> 4"], ["<think>2+2</think>\n4"]) == [1.0]


def test_task_score_is_the_datas_own_scorer_with_each_rows_metadata():
    got = scores("task_score", ["x", "y z", "q"], ["x", "y", "z"], score=lambda text, meta: meta["answer"] in text)
    assert got == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error_naming_the_row(broken):
    with pytest.raises(NumericsError, match=f"x:2: task_score gave {broken}"):
        scores("task_score", ["a", "b"], ["a", "b"], score=lambda text, meta: broken if text == "b" else 1.0)


def test_rouge_is_the_f1_of_the_longest_common_subsequence():
    # reference 4 words, prediction 3, common subsequence "the cat sat" 3: F1 = 2 * (1 * 0.75) / 1.75
    assert scores("rouge", ["the cat sat", "x", ""], ["the cat sat down"] * 3) == pytest.approx([1.5 / 1.75, 0.0, 0.0])


def test_bleu_is_1_for_equal_texts_even_of_two_words_and_0_without_a_common_word():
    got = scores("bleu", ["good day", "one two three four", "so", ""], ["good day", "one two three four", "no", "no"])
    assert got == pytest.approx([1.0, 1.0, 0.0, 0.0])
    assert 0.0 < scores("bleu", ["one two three five"], ["one two three four"])[0] < 1.0


@pytest.mark.parametrize(("name", "module"), [("rouge", "rouge_score"), ("bleu", "sacrebleu")])
def test_a_metric_whose_package_is_missing_names_the_pip_command(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    for loaded in [loaded for loaded in sys.modules if loaded.startswith(module + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    with pytest.raises(ResourceError, match=f"pip install {module.replace('_', '-')}"):
        choose_metrics([name], data_of(["a"]))


def test_metrics_are_evaluate_metrics_that_give_the_mean_and_each_row():
    (metric,) = choose_metrics(["exact_match"], data_of(["a"]))
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == "exact_match"
    for _ in range(2):  # an object can be used again
        result = metric.compute(predictions=["a", "b", "c"], references=["a", "b", "x"])
        assert result == {"exact_match": pytest.approx(2 / 3), "per_row": [1.0, 1.0, 0.0]}


def names_of(references, score=None):
    return [metric.name for metric in choose_metrics([], data_of(references, score))]


def test_unnamed_metrics_are_what_the_data_allow():
    numbered = ["so\n#### 4"] * 9
    assert names_of([*numbered, "no number"], score=lambda text, meta: 1.0) == ["task_score"]
    assert names_of([*numbered, "no number"]) == ["final_number"]  # 90 %
    assert names_of(["#### 4", "#### four", "yes"]) == ["exact_match"]  # 33 % have a number there
    assert names_of(["word " * 8] * 2 + ["word " * 90]) == ["exact_match"]  # the median has 8 words
    assert names_of(["word " * 9] * 3) == []
    assert names_of(["", "", "word"]) == []  # tool calls have no text
    assert names_of([]) == []


def test_an_unknown_metric_is_answered_with_the_near_one_or_with_the_setting_for_hub_scripts():
    with pytest.raises(SettingsError, match="Did you mean exact_match"):
        choose_metrics(["exact_mach"], data_of(["a"]))
    with pytest.raises(SettingsError, match=r"evaluate\.hub_metrics=\[perspective\]"):
        choose_metrics(["perspective"], data_of(["a"]))


def test_task_score_without_a_scorer_in_the_data_is_refused():
    with pytest.raises(SettingsError, match="task_score needs data with a scorer"):
        choose_metrics(["task_score"], data_of(["a"]))


def test_no_script_is_loaded_unless_hub_metrics_names_it(monkeypatch):
    loaded = []
    monkeypatch.setattr(evaluate, "load", lambda name: loaded.append(name) or SimpleNamespace(name=name))
    choose_metrics(["exact_match", "rouge", "bleu", "final_number"], data_of(["a"]))
    assert loaded == []
    assert [metric.name for metric in choose_metrics(["exact_match"], data_of(["a"]), ["wer"])] == [
        "exact_match",
        "wer",
    ]
    assert loaded == ["wer"]


def test_a_hub_metric_is_scored_row_by_row_from_the_entry_of_its_own_name(tmp_path):
    folder = tmp_path / "length_gap"
    folder.mkdir()
    (folder / "length_gap.py").write_text(
        "import datasets\nimport evaluate\n\n"
        "class LengthGap(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        text = datasets.Value('string')\n"
        "        features = datasets.Features({'predictions': text, 'references': text})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n\n"
        "    def _compute(self, predictions, references):\n"
        "        gap = sum(abs(len(p) - len(r)) for p, r in zip(predictions, references))\n"
        "        return {'rows': len(predictions), 'length_gap': gap}\n"
    )
    (metric,) = choose_metrics([], data_of(["long " * 20]), [str(folder)])
    assert score_rows(metric, ["abc", "a"], ["a", "a"], [{}, {}], ["x:1", "x:2"]) == [2.0, 0.0]


def test_a_hub_metric_that_cannot_be_loaded_is_a_resource_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def unreachable(name):
        raise FileNotFoundError(f"Couldn't find a module script for {name}")

    monkeypatch.setattr(evaluate, "load", unreachable)
    with pytest.raises(ResourceError, match=r"evaluate\.hub_metrics: 'nope' could not be loaded"):
        choose_metrics([], data_of(["a"]), ["nope"])


def test_gsm8k_answers_all_hold_a_final_number_equal_to_the_text_after_the_mark():
    path = DATA / "gsm8k_test.jsonl"
    if not path.exists():
        pytest.skip(f"REAL DATA MISSING: {path}")
    answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(answers) > 100
    for answer in answers:
        assert final_number(answer) == Decimal(answer.split("####")[1].strip().replace(",", ""))
    assert names_of(answers) == ["final_number"]
