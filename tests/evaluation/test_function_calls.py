# ruff: noqa: E501
"""Calls judged by structure, with none run, on rows that list tools."""

import json
from typing import Any

import pytest

from finetune_kit.data.calls import ParsedCall
from finetune_kit.data.load import load_data
from finetune_kit.data.records import PromptCompletion
from finetune_kit.evaluation import function_calls
from finetune_kit.evaluation.compare import compare
from finetune_kit.evaluation.function_calls import Called, asked_for_calls, details, entries, judged
from finetune_kit.evaluation.measure import measure
from finetune_kit.generation.generate import Completion
from finetune_kit.settings.schema import DataConfig, EvaluateConfig
from tests.fixtures_data import assistant, bpe_tokenizer, conversation, user, write_jsonl
from tests.generation.test_tool_loop import tiny

AREA = {"type": "function", "function": {"name": "area", "parameters": {"type": "object", "properties": {"side": {"type": "integer"}}, "required": ["side"]}}}  # fmt: skip


def calling(side: Any) -> dict[str, Any]:
    return assistant("", tool_calls=[{"type": "function", "function": {"name": "area", "arguments": {"side": side}}}])


def row(*turns: dict[str, Any], **metadata: Any) -> PromptCompletion:
    record = conversation(user("Q"), *turns, tools=[AREA])
    record.metadata = metadata
    return record


def test_a_row_is_asked_for_its_first_turn_that_calls_and_else_for_its_last_answer() -> None:
    several = row(assistant("Hi"), user("Now?"), calling(3), {"role": "tool", "content": "9"}, assistant("9"))
    assert asked_for_calls(several) == (several.messages[:3], [{"name": "area", "arguments": {"side": 3}}])
    assert asked_for_calls(row(assistant("No."))) == ([user("Q")], [])
    assert asked_for_calls(conversation(user("Q"), assistant("A"))) is None


@pytest.mark.parametrize(
    ("made", "right", "named", "valid"),
    [
        ([ParsedCall("area", {"side": 3})], True, True, [True]),
        ([ParsedCall("area", {"side": 4})], False, True, [True]),
        ([ParsedCall("area", {"side": "3"})], False, True, [False]),
        ([ParsedCall("other", {"side": 3})], False, False, [False]),
        ([ParsedCall("area", {}, "the call could not be read")], False, True, [False]),
        ([ParsedCall("area", {"side": 3})] * 2, False, False, [True, True]),
        ([], False, False, []),
    ],
)  # fmt: skip
def test_names_arguments_and_types_make_a_call_right(
    made: list[ParsedCall], right: bool, named: bool, valid: list[bool]
) -> None:
    wanted = [{"name": "area", "arguments": {"side": 3}}]
    found = judged(row(calling(3)), wanted, made)
    assert (found.right, found.named, found.valid) == (right, named, valid)
    accepted = judged(
        row(calling(9), ground_truth=[{"area": {"side": [9, 3]}}]), [{"name": "area", "arguments": {"side": 9}}], made
    )
    assert accepted.right is right


def test_shares_are_those_of_their_rows() -> None:
    call, wants = {"name": "area", "arguments": {"side": 3}}, [{"name": "area", "arguments": {"side": 3}}]
    good, bad = Called("a", wants, [call], True, True, [True]), Called("b", wants, [], False, False, [])
    needless, quiet = Called("c", [], [call], False, False, [False]), Called("d", [], [], True, True, [])
    before, after = [bad] * 30 + [needless] * 30, [good] * 20 + [bad] * 10 + [quiet] * 30
    lines = entries(before, after, EvaluateConfig(bootstrap_samples=100))
    assert [(line["name"], line["before"], line["n"], line["verdict"]) for line in lines] == [
        ("calls_right", 0.0, 30, "better"), ("needless_calls", 1.0, 30, "better"),
    ]  # fmt: skip
    assert lines[0]["after"] == pytest.approx(2 / 3)
    said = details(before, after)
    assert said["before"] == {"rows_that_want_some": 30, "rows_that_want_none": 30, "call": 0.0, "named": 0.0, "right": 0.0, "valid": 0.0}  # fmt: skip
    assert said["after"]["valid"] == 1.0


def test_a_model_s_answers_are_read_as_calls_and_the_report_leads_with_them(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [
        {"messages": [user(f"Side {n}?"), calling(n) if n % 2 else assistant("Nothing to compute here.")], "tools": [AREA]}
        for n in range(100)
    ]  # fmt: skip
    tokenizer = bpe_tokenizer()
    data = load_data(
        DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", made), held_out_size=60), "prompt_completion", tokenizer
    )
    config = EvaluateConfig(general_text=False, bootstrap_samples=50, max_new_tokens=4)
    model = tiny(tokenizer)
    before = measure(model, tokenizer, data, config)
    assert len(before.called) == 60
    assert not any(called.right for called in before.called if called.wanted)

    def perfect(model: Any, tokenizer: Any, prompts: list[list[int]], **more: Any) -> list[Completion]:
        texts = [tokenizer.decode(ids).rpartition("Side ")[2].partition("?")[0] for ids in prompts]
        answers = [
            f'<tool_call>\n{json.dumps({"name": "area", "arguments": {"side": int(text)}})}\n</tool_call>' if int(text) % 2 else "No"
            for text in texts
        ]  # fmt: skip
        return [Completion(tokenizer(text)["input_ids"], text, True) for text in answers]

    monkeypatch.setattr(function_calls, "generate", perfect)
    after = measure(model, tokenizer, data, config)
    report = compare(before, after, config).to_json()
    assert report["main"] == "calls_right"
    line = report["metrics"][0]
    assert (line["before"], line["after"], line["verdict"]) == (0.0, 1.0, "better")
    assert report["function_calls"]["after"]["rows_that_want_none"] + line["n"] == 60
    assert report["wins"] == line["n"]
