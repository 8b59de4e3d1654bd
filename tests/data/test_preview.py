"""What people and programs are shown of the data."""

import io
import json

import pytest
from rich.console import Console

from finetune_kit.data.load import load_data
from finetune_kit.data.preview import lengths, preview_json, print_preview
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import bpe_tokenizer, write_jsonl

TOKENIZER = bpe_tokenizer()


@pytest.fixture
def data(tmp_path):
    rows = [{"question": f"[bold]{i}[/bold]?", "answer": "word " * i + "end"} for i in range(40)]
    return load_data(DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows)), "prompt_completion", TOKENIZER)


def shown(data, **settings):
    console = Console(file=io.StringIO(), width=100, **settings)
    print_preview(data, TOKENIZER, console, 2)
    return console.file.getvalue()


def test_without_colour_what_is_trained_stands_between_marks_and_markup_in_the_data_is_text(data):
    text = shown(data, color_system=None)
    assert "<|im_start|>user\n[bold]1[/bold]?<|im_end|>\n<|im_start|>assistant\n⟦word end<|im_end|>⟧" in text
    assert "sample length in tokens" in text
    assert "rows.jsonl:2" in text
    assert "\x1b" not in text


def test_with_colour_there_are_no_marks(data):
    text = shown(data, color_system="standard", force_terminal=True)
    assert "⟦" not in text
    assert "\x1b[1;32mword end" in text


def test_as_data_it_has_rows_tokens_ledger_lengths_and_the_supervised_text(data):
    preview = json.loads(json.dumps(preview_json(data, TOKENIZER, 2)))
    assert preview["rows"] == 32
    assert preview["supervised_tokens"] == data.ledger.train.supervised_tokens
    assert preview["ledger"]["train"]["trained"] == 32
    assert preview["samples"][0]["supervised_text"] == ["word end<|im_end|>"]
    assert preview["lengths"] == lengths(data) == [len(ids) for ids in data.train["input_ids"]]
    assert preview["end_tokens"] == ["<|im_end|>"]
