# ruff: noqa: E501
"""Rows of BFCL: the answers are found beside them, and a ground truth accepts what it says and nothing else."""

from pathlib import Path
from typing import Any

import pytest

from finetune_kit.data.bfcl import NO_CALL, accepts
from finetune_kit.data.load import load_data
from finetune_kit.data.tool_rows import calls_of
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import bpe_tokenizer, write_jsonl

AREA = {
    "name": "geo.area",
    "description": "Compute an area.",
    "parameters": {"type": "dict", "properties": {"side": {"type": "float"}, "unit": {"type": "string"}}, "required": ["side"]},
}  # fmt: skip


def rows(count: int = 30) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(questions, answers): every third row wants no call."""
    asked = [
        {"id": f"{'irrelevance' if n % 3 == 2 else 'simple_python'}_{n}", "question": [[{"role": "user", "content": f"The area of {n}?"}]], "function": [AREA]}
        for n in range(count)
    ]  # fmt: skip
    answers = [
        {"id": row["id"], "ground_truth": [{"geo.area": {"side": [n, float(n)], "unit": ["", "cm"]}}]}
        for n, row in enumerate(asked)
        if n % 3 != 2
    ]
    return asked, answers


@pytest.mark.parametrize("place", ["possible_answer/rows.jsonl", "rows_answers.jsonl"])
def test_answers_are_found_beside_the_questions_and_a_row_that_wants_no_call_says_so(
    tmp_path: Path, place: str
) -> None:
    asked, answers = rows()
    path = write_jsonl(tmp_path / "rows.jsonl", asked)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    write_jsonl(tmp_path / place, answers)
    for given in (path, str(tmp_path)):  # a folder's answers are not rows
        data = load_data(DataConfig(path=given, held_out_size=20), "prompt_completion", bpe_tokenizer())
        records = {
            int(record.where.rpartition(":")[2]) - 1: record for record in (*data.train_records, *data.held_out_records)
        }
        assert len(records) == 30
        assert calls_of(records[4]) == [{"name": "geo.area", "arguments": {"side": 4}}]
        assert records[4].metadata == {"ground_truth": answers[3]["ground_truth"]}
        assert records[5].messages[-1]["content"] == NO_CALL
        assert records[5].tools[0]["function"]["name"] == "geo.area"
        assert calls_of(records[5]) == []


def test_rewards_get_the_ground_truth_with_the_prompt(tmp_path: Path) -> None:
    asked, answers = rows()
    merged = [{**row, **next((a for a in answers if a["id"] == row["id"]), {})} for row in asked]
    data = load_data(
        DataConfig(path=write_jsonl(tmp_path / "x.jsonl", merged), held_out_size=20), "prompt", bpe_tokenizer()
    )
    assert all(record.messages[-1]["role"] == "user" for record in data.train_records)
    assert any("ground_truth" in record.metadata for record in data.train_records)


TRUTH = [{"f": {"city": ["San Francisco, CA", "SF"], "days": [3], "rate": [1.5], "unit": ["", "metric"], "where": [{"age": [25], "jobs": [["a", "b"], ["b", "a"]]}]}}]  # fmt: skip
RIGHT = {"city": "san francisco CA", "days": 3, "rate": 1.5, "where": {"age": 25, "jobs": ["b", "a"]}}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True), ({"unit": "Metric"}, True), ({"days": 3.0}, True), ({"city": "SF"}, True),
        ({"unit": "mph"}, False), ({"days": "3"}, False), ({"days": True}, False), ({"city": "LA"}, False), ({"more": 1}, False),
        ({"where": {"age": 25}}, False), ({"where": {"age": 25, "jobs": ["a"]}}, False), ({"rate": None}, False), ({"city": 5}, False),
    ],
)  # fmt: skip
def test_a_ground_truth_accepts_its_values_and_no_others(change: dict[str, Any], right: bool) -> None:
    assert accepts(TRUTH, [{"name": "f", "arguments": {**RIGHT, **change}}]) is right
    assert not accepts(TRUTH, [{"name": "g", "arguments": {**RIGHT, **change}}])


def test_calls_are_matched_in_any_order_each_once_and_what_must_be_there_is() -> None:
    truth = [{"f": {"n": [1]}}, {"f": {"n": [2]}}]
    one, two = ({"name": "f", "arguments": {"n": n}} for n in (1, 2))
    assert accepts(truth, [two, one])
    assert not accepts(truth, [one, one])
    assert not accepts(truth, [one])
    assert not accepts(truth, [one, two, two])
    assert not accepts([{"f": {"n": [1]}}], [{"name": "f", "arguments": {}}])
