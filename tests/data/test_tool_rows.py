# ruff: noqa: E501
"""What rows calculate becomes calls, with the calculator's own results; the rest is only offered the tools."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.data.chat import samples_of
from finetune_kit.data.load import load_data
from finetune_kit.data.records import Prompt, PromptCompletion, asked_of, prompt_of, reference_of
from finetune_kit.data.tasks import task_rows
from finetune_kit.data.tool_rows import calls_of, offer_tools
from finetune_kit.errors import SettingsError
from finetune_kit.settings.schema import DataConfig
from finetune_kit.tools.load import CALCULATOR
from tests.fixtures_data import assistant, bpe_tokenizer, conversation, user, write_jsonl

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


def spoken(record: PromptCompletion) -> list[tuple[str, str, list[str]]]:
    return [
        (turn["role"], turn["content"], [call["function"]["arguments"]["expression"] for call in turn.get("tool_calls", [])])
        for turn in record.messages
    ]  # fmt: skip


def test_gsm8k_s_annotations_become_calls_and_the_text_around_them_stays() -> None:
    record = conversation(user("How many?"), assistant(GSM8K))
    notes = offer_tools([record], ["calculator"])
    assert record.tools == [CALCULATOR]
    assert spoken(record) == [
        ("user", "How many?", []),
        ("assistant", "Natalia sold 48/2 =", ["48/2"]),
        ("tool", "24", []),
        ("assistant", "24 clips.\nShe sold 48+24 =", ["48+24"]),
        ("tool", "72", []),
        ("assistant", "72 clips.\n#### 72", []),
    ]
    assert asked_of(record) == [user("How many?")]
    assert len(prompt_of(record)) == 5
    assert reference_of(record).endswith("#### 72")
    assert [call["arguments"]["expression"] for call in calls_of(record)] == ["48/2", "48+24"]
    assert notes == ["1 of 1 rows are offered calculator (data.tools)", "1 of them call the calculator for what they calculate"]  # fmt: skip


def test_an_annotation_that_the_calculator_does_not_agree_with_stays_text_and_is_counted() -> None:
    record = conversation(user("Q"), assistant("A: 2*2=<<2*2=5>>5 and x=<<x=1>>1, 10/3=<<10/3=3.33>>3.33"))
    notes = offer_tools([record], ["calculator"])
    assert spoken(record)[1:] == [
        ("assistant", "A: 2*2=5 and x=1, 10/3=", ["10/3"]), ("tool", "3.3333333333", []), ("assistant", "3.33", []),
    ]  # fmt: skip
    assert notes[-1].startswith("2 calculations in their text")


def test_an_arithmetic_task_calls_its_expression_and_another_task_only_sees_the_tool() -> None:
    products, words = task_rows("products", 8, 7), task_rows("word_sequence_reversal", 4, 7)
    offer_tools([*products, *words], ["calculator"])
    for record in products:
        call, result, answer = record.messages[1:]
        assert call["tool_calls"][0]["function"]["arguments"]["expression"] == record.metadata["metadata"]["expression"]
        assert result["content"] == answer["content"] == record.metadata["answer"]
    assert all(len(record.messages) == 2 and record.tools == [CALCULATOR] for record in words)


def test_rows_with_tools_of_their_own_stay_as_they_are_and_where_all_have_the_setting_is_refused() -> None:
    own = [{"type": "function", "function": {"name": "mine", "parameters": {}}}]
    record = conversation(user("Q"), assistant(GSM8K), tools=own)
    with pytest.raises(SettingsError, match="every row lists tools of its own"):
        offer_tools([record], ["calculator"])
    other = Prompt("rows.jsonl:2", [user("Q")])
    assert len(offer_tools([record, other], ["calculator"])) == 1
    assert (record.tools, len(record.messages), other.tools) == (own, 2, [CALCULATOR])


def test_with_tools_a_run_of_assistant_turns_is_one_answer_and_without_user_all_is_asked() -> None:
    record = conversation(user("A"), assistant("B"), user("C"), assistant("D"))
    assert asked_of(record) == prompt_of(record)
    assert calls_of(record) == []
    assert asked_of(Prompt("x:1", [user("Q")])) == [user("Q")]
    assert calls_of(Prompt("x:1", [user("Q")])) is None  # it does not say
    problem = task_rows("products", 1, 7)[0]
    prompt = Prompt("x:1", problem.messages[:1], None, problem.metadata, problem.metadata["answer"])
    assert calls_of(prompt) == [
        {"name": "calculator", "arguments": {"expression": problem.metadata["metadata"]["expression"]}}
    ]


def test_what_the_calculator_gave_is_never_trained_and_the_call_is(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {
            "question": f"How many {number}?",
            "answer": f"It is {number}*7 = <<{number}*7={number * 7}>>so\n#### {number * 7}",
        }
        for number in range(40)
    ]
    path, tokenizer = write_jsonl(tmp_path / "rows.jsonl", rows), bpe_tokenizer()
    data = load_data(DataConfig(path=path, tools=["calculator"], held_out_size=20), "prompt_completion", tokenizer)
    assert data.ledger.train.rows + data.ledger.held_out.rows == 40
    row = next(row for row in data.train)
    supervised = tokenizer.decode([token for token in row["labels"] if token >= 0])
    record = data.train_records[row["row"]]
    result = next(turn["content"] for turn in record.messages if turn["role"] == "tool")
    assert '"calculator", "arguments": {"expression": "' in supervised
    assert f"<tool_response>\n{result}" in tokenizer.decode(row["input_ids"])
    assert "<tool_response>" not in supervised
    assert json.dumps(CALCULATOR)[:40] in tokenizer.decode(row["input_ids"])
    assert all(samples_of(record, tokenizer, DataConfig()) for record in data.held_out_records)


def test_a_prompt_whose_answer_may_call_ends_before_the_row_s_own_calls(tmp_path: Path) -> None:
    function = {"name": "calculator", "arguments": {"expression": "6*7"}}
    turns = [user("6 * 7?"), assistant("", tool_calls=[{"type": "function", "function": function}])]
    rows = [
        {"messages": [*turns, {"role": "tool", "name": "calculator", "content": "42"}, assistant(f"42, {n}")]}
        for n in range(30)
    ]
    path, tokenizer = write_jsonl(tmp_path / "rows.jsonl", rows), bpe_tokenizer()
    with_tools = load_data(DataConfig(path=path, tools=["calculator"], held_out_size=0), "prompt", tokenizer)
    assert [turn["role"] for turn in with_tools.train_records[0].messages] == ["user"]
    plain = load_data(DataConfig(path=path, held_out_size=0), "prompt", tokenizer)
    assert [turn["role"] for turn in plain.train_records[0].messages] == ["user", "assistant", "tool"]
