"""prompt_file.py: every line is checked before any is asked, and what is answered is kept and not asked again."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_kit.errors import DataError, SettingsError
from finetune_kit.generation.prompt_file import Line, answered, append_answers, read_prompts
from tests.fixtures_data import write_jsonl

ROWS: list[dict[str, Any]] = [{"prompt": f"{n} + {n} =", "id": n} for n in range(7)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return Path(write_jsonl(tmp_path / "prompts.jsonl", ROWS))


class Answers:
    """An answerer whose answers tell their batch; it breaks off after `batches` of them."""

    def __init__(self, batches: int = 99) -> None:
        self.left, self.asked = batches, []

    def __call__(self, batch: list[Line]) -> list[dict[str, Any]]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        numbers = [line.number for line in batch]
        self.asked.append(numbers)
        return [{"completion": f"{line.messages[-1]['content']} of {numbers}\u2028"} for line in batch]


def go(prompts: Path, output: Path, answers: Answers, batch_size: int = 3, made_with: str = "m") -> None:
    lines = read_prompts(prompts)
    done = answered(lines, output, made_with)
    append_answers(lines, done, output, answers, made_with=made_with, batch_size=batch_size)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]


def test_a_line_is_the_row_number_its_own_fields_and_the_answer_in_the_order_of_the_prompts(
    prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "out.jsonl"
    go(prompts, output, Answers())
    assert [line["row"] for line in read(output)] == [1, 2, 3, 4, 5, 6, 7]
    first = {"row": 1, **ROWS[0], "completion": "0 + 0 = of [1, 2, 3]\u2028", "made_with": "m"}
    assert read(output)[0] == first
    assert list(read(output)[0]) == list(first)


def test_stopped_after_1_batch_of_3_and_resumed_the_file_is_that_of_an_uninterrupted_run(
    prompts: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    go(prompts, whole, Answers())
    with pytest.raises(KeyboardInterrupt):
        go(prompts, resumed, Answers(batches=1))
    assert len(read(resumed)) == 3
    answers = Answers()
    go(prompts, resumed, answers)
    assert answers.asked == [[4, 5, 6], [7]]
    assert resumed.read_bytes() == whole.read_bytes()
    untouched = Answers(batches=0)
    go(prompts, resumed, untouched)
    assert resumed.read_bytes() == whole.read_bytes()


def test_cut_off_after_any_byte_the_file_is_mended_and_ends_as_if_nothing_had_happened(
    prompts: Path, tmp_path: Path
) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    go(prompts, whole, Answers())
    content = whole.read_bytes()
    for length in range(0, len(content), 5):
        torn.write_bytes(content[:length])
        go(prompts, torn, Answers())
        assert torn.read_bytes() == content, f"cut after {length} of {len(content)} bytes"


def test_a_line_taken_out_of_the_middle_is_asked_again_in_its_old_batch(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    go(prompts, output, Answers())
    before = read(output)
    output.write_text("".join(json.dumps(line) + "\n" for line in before if line["row"] != 5))
    go(prompts, output, Answers())
    assert sorted(read(output), key=lambda line: line["row"]) == before


@pytest.mark.parametrize(
    "content",
    [
        "my notes",
        "my notes\n",
        '{"prompt": "mine"}\n',
        "\n",
        '{"row": 1}\n',
        "[1]\n",
        "\x00\x00\x00",
        '"row"\n{"row": ',
    ],
)
def test_a_file_that_holds_anything_else_is_refused_and_left_as_it_is(
    prompts: Path, tmp_path: Path, content: str
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(DataError, match="is not overwritten"):
        go(prompts, output, Answers())
    assert output.read_text() == content


def test_answers_to_other_prompts_by_another_model_or_with_other_settings_are_refused(
    prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    go(prompts, output, Answers())
    with pytest.raises(DataError, match=r"out\.jsonl:1 was answered by another model, or with other settings"):
        go(prompts, output, Answers(), made_with="other")
    write_jsonl(prompts, [*ROWS[:3], {"prompt": "new", "id": 3}, *ROWS[4:]])
    with pytest.raises(DataError, match=r"out\.jsonl:4 answers another prompt than line 4"):
        go(prompts, output, Answers())


def test_an_output_that_is_a_folder_is_refused(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is a folder"):
        go(prompts, tmp_path, Answers())


def test_more_prompts_at_the_end_of_the_file_are_answered_and_the_others_kept(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    go(prompts, output, Answers())
    write_jsonl(prompts, [*ROWS, {"prompt": "one more"}])
    answers = Answers()
    go(prompts, output, answers)
    assert answers.asked == [[7, 8]]
    assert [line["row"] for line in read(output)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_prompt_is_a_string_or_messages_whose_last_answer_is_not_fed_and_blank_lines_keep_their_numbers(
    tmp_path: Path,
) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "a"}, {"prompt": turns[:1]}, {"messages": turns}, {"messages": turns, "prompt": "ignored"}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    lines = read_prompts(path)
    assert [line.number for line in lines] == [1, 3, 5, 7]
    assert all(line.messages == turns[:1] for line in lines)
    assert lines[3].fields == rows[3]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": oops}', r"prompts\.jsonl:2:12: broken JSON"),
        ('{"prompt": NaN}', r"prompts\.jsonl:2: NaN is not JSON"),
        ("[1]", r"prompts\.jsonl:2: a row is list"),
        ('{"question": "a"}', r"prompts\.jsonl:2: neither `prompt` nor `messages`; found question"),
        ("{}", r"prompts\.jsonl:2: neither `prompt` nor `messages`; found no field"),
        ('{"prompt": " "}', r"prompts\.jsonl:2: the prompt is empty"),
        ('{"prompt": null}', r"prompts\.jsonl:2: prompt: content is null or missing"),
        ('{"prompt": 3}', r"prompts\.jsonl:2: prompt: content is a number"),
        ('{"messages": []}', r"prompts\.jsonl:2: the list of messages is empty"),
        (
            '{"messages": [{"role": "bard", "content": "a"}]}',
            r"prompts\.jsonl:2: message 1 has the unknown role 'bard'",
        ),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', r"prompts\.jsonl:2: an empty prompt"),
        ('{"prompt": "a", "tools": [{}]}', r"prompts\.jsonl:2: a tool has no name"),
        ('{"prompt": "a", "completion": "b"}', r"prompts\.jsonl:2: the field `completion` is one that the answers"),
        ('{"prompt": "\\ud800"}', r"prompts\.jsonl:2: half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_with_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "good"}\n' + row + "\n")
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_no_file_and_no_prompts_are_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
