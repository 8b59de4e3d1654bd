# ruff: noqa: E501
"""What the report says of tools: scores with and without them, and how they were called."""

from pathlib import Path
from typing import Any

import pytest

from finetune_kit.data.load import load_data
from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.compare import compare, held_out_scores
from finetune_kit.evaluation.measure import Measurement, measure
from finetune_kit.evaluation.tools import calling, same_call, same_calls, tools_report, tools_sentence
from finetune_kit.generation.generate import Call, Completion
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.settings.schema import DataConfig, EvaluateConfig
from finetune_kit.tools.load import load_tools
from tests.fixtures_data import bpe_tokenizer, write_jsonl
from tests.generation.test_tool_loop import tiny

CONFIG = EvaluateConfig(bootstrap_samples=200)


def call(expression: str, result: str = "24", valid: bool = True, ok: bool = True) -> Call:
    return Call("calculator", {"expression": expression}, result, valid, ok, 0.5)


def wanted(*expressions: str) -> list[dict[str, Any]]:
    return [{"name": "calculator", "arguments": {"expression": expression}} for expression in expressions]


def answered(*answers: tuple[str, list[Call]], wants: list[list[dict[str, Any]]]) -> Measurement:
    return Measurement(
        with_tools=True,
        completions=[Completion([1], text, True, calls) for text, calls in answers],
        wanted=wants,
        metrics={"task_score": [1.0] * len(answers)},
        bare={"task_score": [0.0] * len(answers)},
    )


def test_the_shares_are_those_of_their_rows() -> None:
    side = answered(
        ("It is 24.", [call("48/2")]),  # used, and the very call
        ("No idea.", [call("1+1", "2"), call("24*", "Error: …", ok=False)]),  # not used, not the calls
        ("Hello", [call("", "Error: …", valid=False, ok=False)]),  # needless, not valid
        ("Hi", []),  # none wanted, none made
        ("Missed", []),
        wants=[wanted("48/2"), wanted("1+1"), [], [], wanted("3")],
    )
    found = calling(side)
    assert found == {
        "answers_that_call": 0.6, "calls": 4, "calls_per_row": 0.8, "valid": 0.75, "failed": pytest.approx(1 / 3),
        "used": 0.5, "rows_that_want_none": 2, "needless": 0.5, "rows_that_want_some": 3, "missed": pytest.approx(1 / 3),
        "matched": pytest.approx(1 / 3), "seconds_in_tools": 2.0, "seconds_per_call": 0.5,
    }  # fmt: skip


def test_a_result_that_a_later_call_takes_up_is_used() -> None:
    used = answered(("Seventy-two.", [call("48/2"), call("48+24", "72")]), wants=[[]])
    assert calling(used)["used"] == 1.0
    assert calling(answered(("Seventy-two.", [call("48/2")]), wants=[[]]))["used"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "other", "same"),
    [
        ({"a": 3}, {"a": 3.0}, True), ({"a": "3"}, {"a": 3}, False), ({"a": True}, {"a": 1}, False), ({}, {}, True),
        ({"a": " Paris"}, {"a": "paris"}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": {"b": ["X"]}}, {"a": {"b": ["x"]}}, True), ({"a": None}, {"a": None}, True), ({"a": []}, {"a": {}}, False),
    ],
)  # fmt: skip
def test_calls_are_compared_by_structure(arguments: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert same_call("f", arguments, {"name": "f", "arguments": other}) is same
    assert not same_call("g", arguments, {"name": "f", "arguments": other})


def test_several_calls_match_in_any_order_each_once() -> None:
    assert same_calls([call("2"), call("1")], wanted("1", "2"))
    assert not same_calls([call("1"), call("1")], wanted("1", "2"))
    assert not same_calls([call("1")], wanted("1", "1"))


def test_with_and_without_the_tools_are_compared_row_by_row() -> None:
    side = answered(*[("24", [call("48/2")])] * 40, wants=[wanted("48/2")] * 40)
    report = tools_report(side, side, CONFIG)
    score = report["after"]["scores"][0]
    assert (score["name"], score["without"], score["with"], score["difference"]) == ("task_score", 0.0, 1.0, 1.0)
    assert score["interval"][0] > 0.8
    said = tools_sentence(report)
    assert "Without the tools task_score is 0.000, with them 1.000" in said
    assert "100.0% of the answers call, 100.0% of 40 calls are valid" in said


def test_rows_that_want_a_call_have_a_score_of_their_own() -> None:
    side = answered(*[("24", [call("48/2")])] * 30, *[("no", [])] * 10, wants=[*[wanted("48/2")] * 30, *[[]] * 10])
    side.metrics, side.bare = {"task_score": [1.0] * 30 + [0.0] * 10}, {"task_score": [0.0] * 40}
    report = tools_report(side, side, CONFIG)
    scores = [(line["rows"], line["n"], line["without"], line["with"]) for line in report["after"]["scores"]]
    assert scores == [("all", 40, 0.0, 0.75), ("that want a call", 30, 0.0, 1.0)]
    assert "On the 30 rows that want a call: without the tools task_score is 0.000, with them 1.000" in (
        tools_sentence(report)
    )


def test_a_model_is_measured_both_ways_on_the_same_prompts_and_the_report_has_it(tmp_path: Path) -> None:
    rows = [{"question": f"{n} * 7?", "answer": f"<<{n}*7={n * 7}>>It is\n#### {n * 7}"} for n in range(60)]
    tokenizer = bpe_tokenizer()
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows), tools=["calculator"], held_out_size=20)
    data = load_data(config, "prompt_completion", tokenizer)
    toolbox = Toolbox(load_tools(["calculator"]))
    measuring = EvaluateConfig(size=4, max_new_tokens=6, general_text=False, bootstrap_samples=50)
    side = measure(tiny(tokenizer), tokenizer, data, measuring, toolbox=toolbox)
    assert side.prompts == [str(record.messages[0]["content"]) for record in data.held_out_records[:4]]
    assert side.decoding["tools"] == ["calculator"]
    assert [len(wants) for wants in side.wanted] == [1] * 4
    report = compare(side, side, measuring).to_json()
    assert report["tools"]["after"]["scores"][0]["name"] == "final_number"
    assert report["tools"]["after"]["calls"]["missed"] == 1.0
    assert report["samples"][0]["calls"] == [[], []]
    scores = held_out_scores(tiny(tokenizer), tokenizer, data, measuring, toolbox=toolbox)
    assert list(scores) == ["loss"]  # while it trains, of which no answer is asked
    quick = measure(tiny(tokenizer), tokenizer, data, measuring, toolbox=toolbox, both_ways=False)
    assert quick.bare == {}
    with pytest.raises(SettingsError, match=r"tools have no effect: evaluate.size is 0"):
        measure(tiny(tokenizer), tokenizer, data, EvaluateConfig(size=0), toolbox=toolbox)
