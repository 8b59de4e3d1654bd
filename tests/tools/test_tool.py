"""Tools by name, their schemas, and calls that go wrong: each becomes text."""

from pathlib import Path

import pytest

from finetune_kit.errors import FinetuneKitError
from finetune_kit.tools.load import load_tools
from finetune_kit.tools.tool import LONGEST, Tool, carry_out, misfit, text_of

LOOKUP = '''
import os, time
calls = 0


def lookup(word: str, times: int = 1) -> dict:
    """
    Look a word up.

    Args:
        word: The word
        times: How often
    """
    global calls
    calls += 1
    print("noise on stdout")
    if word == "slow":
        time.sleep(60)
    if word == "die":
        os._exit(3)
    if word == "bad":
        raise ValueError("bad word")
    if word == "float":
        return 10.0
    return {"word": word * times, "calls": calls, "process": os.getpid()}


def silent(x):
    return x
'''


@pytest.fixture(scope="module")
def lookup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tool]:
    file = tmp_path_factory.mktemp("tools") / "my_tools.py"
    file.write_text(LOOKUP)
    return load_tools([f"{file}:lookup"])


def test_a_function_s_schema_is_transformers_own_and_tells_no_return(lookup: dict[str, Tool]) -> None:
    function = lookup["lookup"].schema["function"]
    assert function["description"] == "Look a word up."
    assert function["parameters"]["properties"]["times"] == {"type": "integer", "description": "How often"}
    assert function["parameters"]["required"] == ["word"]
    assert "return" not in function
    assert not lookup["lookup"].built_in


def test_a_function_runs_outside_this_process_and_survives_its_errors_and_its_end(lookup: dict[str, Tool]) -> None:
    import json
    import os

    first = json.loads(carry_out(lookup, "lookup", {"word": "a", "times": 3}, 20).text)
    assert first["word"] == "aaa"
    assert first["process"] != os.getpid()
    assert carry_out(lookup, "lookup", {"word": "bad"}, 20).text == "Error: ValueError: bad word"
    assert json.loads(carry_out(lookup, "lookup", {"word": "a"}, 20).text)["process"] == first["process"]
    assert carry_out(lookup, "lookup", {"word": "die"}, 20).text == "Error: its process ended with code 3"
    assert carry_out(lookup, "lookup", {"word": "float"}, 20).text == "10.0"
    late = carry_out(lookup, "lookup", {"word": "slow"}, 0.3)
    assert (late.text, late.valid, late.ok) == ("Error: it took more than 0.3 seconds", True, False)
    assert json.loads(carry_out(lookup, "lookup", {"word": "b"}, 20).text)["calls"] == 1  # a fresh process


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("nothing", {}, "there is no tool 'nothing'; known: lookup"),
        ("lookup", {}, "arguments: word is missing"),
        ("lookup", {"word": 1}, "word: expected string, found 1"),
        ("lookup", {"word": "a", "times": "two"}, 'times: expected integer, found "two"'),
        ("lookup", {"word": "a", "times": True}, "times: expected integer, found true"),
        ("lookup", {"word": "a", "more": 1}, "arguments: there is no 'more'; known: word, times"),
        ("lookup", ["a"], "arguments: expected object"),
    ],
)
def test_a_call_that_does_not_fit_is_told_the_model_and_runs_nothing(
    lookup: dict[str, Tool], name: str, arguments: object, said: str
) -> None:
    outcome = carry_out(lookup, name, arguments, 20)
    assert outcome.text.startswith(f"Error: {said}")
    assert not outcome.valid
    assert outcome.seconds == 0


@pytest.mark.parametrize(
    ("value", "schema", "fits"),
    [
        (3.0, {"type": "integer"}, True), (3.5, {"type": "integer"}, False), (3, {"type": "float"}, True),
        (None, {"type": ["string", "null"]}, True), (None, {"type": "string", "nullable": True}, True),
        ("b", {"enum": ["a", "b"]}, True), ("c", {"type": "string", "enum": ["a", "b"]}, False),
        ([1, "a"], {"type": "array", "items": {"type": "integer"}}, False), ({}, {"type": "dict"}, True),
        (1, {"anyOf": [{"type": "string"}, {"type": "number"}]}, True), (True, {"type": "number"}, False),
        ([], {"anyOf": [{"type": "string"}, {"type": "number"}]}, False), ("x", {}, True),
        ({"a": 1}, {"type": "object", "properties": {}, "additionalProperties": True}, True),
        ({"a": {"b": "x"}}, {"properties": {"a": {"properties": {"b": {"type": "integer"}}}}}, False),
    ],
)  # fmt: skip
def test_arguments_are_checked_by_their_schema(value: object, schema: dict[str, object], fits: bool) -> None:
    assert (misfit(value, schema) == "") is fits


@pytest.mark.parametrize(
    ("result", "text"),
    [("", ""), ("a\nb", "a\nb"), (10.0, "10.0"), (10, "10"), (None, "null"), ({"é": [1.5, "ü"]}, '{"é": [1.5, "ü"]}'),
     ({1, }, "{1}"), ("\ud800", "?")],
)  # fmt: skip
def test_a_result_is_a_text_as_it_is_or_json(result: object, text: str) -> None:
    assert text_of(result) == text


def test_a_long_result_is_cut_and_says_so() -> None:
    text = text_of("é" * (LONGEST + 5))
    assert text == "é" * LONGEST + "\n[cut: 4,000 of 4,005 characters]"
    assert text_of("é" * LONGEST) == "é" * LONGEST


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("calculater", "Did you mean calculator"), ("/nowhere/x.py:f", "no such file"), ("search:/nowhere", "no such"),
        ("{}:nothing", "has no function nothing"), ("{}:silent", "no docstring"), ("x.py", "there is no tool"),
    ],
)  # fmt: skip
def test_a_tool_that_is_none_is_refused_with_what_was_meant(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "my_tools.py").write_text(LOOKUP)
    with pytest.raises(FinetuneKitError, match=said):
        load_tools([source.format(tmp_path / "my_tools.py")])


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(FinetuneKitError, match="two of them are called calculator"):
        load_tools(["calculator", "calculator"])


def test_search_finds_the_passage_and_says_its_file_and_leaves_links_out_alone(tmp_path: Path) -> None:
    texts, secret = tmp_path / "texts", tmp_path / "secret.txt"
    texts.mkdir()
    secret.write_text("The zebra is secret.")
    (texts / "a.txt").write_text(
        "Zebras live in herds.\n\n" + "Filler about nothing. " * 36 + "\n\nOstriches run fast."
    )
    (texts / "b.jsonl").write_text('{"text": "Penguins swim."}\n{"q": "Owls", "a": "fly at night"}\n')
    (texts / "link.txt").symlink_to(secret)
    tools = load_tools([f"search:{texts}"])
    best = tools["search"].call({"query": "ostriches"}, 5)
    assert best[0] == {"source": "a.txt", "text": "Ostriches run fast."}
    assert tools["search"].call({"query": "owls night"}, 5)[0]["source"] == "b.jsonl"
    assert all("secret" not in passage["text"] for passage in tools["search"].call({"query": "zebra zebras"}, 5))
    assert carry_out(tools, "search", {"query": "xylophone"}, 5).text.startswith("Error: nothing found")
    with pytest.raises(FinetuneKitError, match="no text found"):
        load_tools([f"search:{secret.parent / 'texts' / 'b.jsonl'}", f"search:{_empty(tmp_path)}"])


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"
