"""Real data sets, with no setting but the path: everything is found, masked and accounted for."""

import math

import pytest

from finetune_kit.data.ledger import REPEATED
from finetune_kit.data.load import load_data
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import bpe_tokenizer, shared

# name -> (kind, rows)
SETS = {
    "gsm8k_test.jsonl": ("prompt_completion", 500),
    "dolly_hhrlhf_test.jsonl": ("prompt_completion", 100),
    "glaive_toolcall_test.jsonl": ("prompt_completion", 50),
    "self_instruct_seed.jsonl": ("prompt_completion", 175),
    "tinyshakespeare_test.txt": ("text", 28),
    "wikitext2_valid.txt": ("text", 302),
}


@pytest.mark.parametrize("name", SETS)
def test_a_real_data_set_needs_no_setting_but_its_path(name):
    kind, rows = SETS[name]
    tokenizer = bpe_tokenizer()
    # max_length is wide because the tokenizer of these tests writes few characters a token.
    data = load_data(DataConfig(path=shared(name), max_length=16384), "prompt_completion", tokenizer)
    ledger = data.ledger
    assert data.kind == kind
    assert ledger.train.rows + ledger.held_out.rows == rows
    assert ledger.train.lost == ledger.held_out.lost - ledger.held_out.dropped[REPEATED] == 0
    assert ledger.train.supervised_tokens == sum(label >= 0 for row in data.train["labels"] for label in row)
    if kind == "prompt_completion":
        ends = set(data.end_token_ids)
        assert all(row["input_ids"][-1] == row["labels"][-1] in ends for row in data.train)


def test_glaive_trains_the_calls_and_not_the_results():
    tokenizer = bpe_tokenizer()
    data = load_data(
        DataConfig(path=shared("glaive_toolcall_test.jsonl"), max_length=16384), "prompt_completion", tokenizer
    )
    supervised = [
        tokenizer.decode([label for label in labels if label >= 0], skip_special_tokens=True)
        for labels in data.train["labels"]
    ]
    assert sum("<tool_call>" in text for text in supervised) > len(supervised) / 2
    assert not any("<tool_response>" in text for text in supervised)


# name -> (rows, what the ledger finds in them, pairs whose labels have a margin)
PAIRS = {
    "hh_harmless_train.jsonl": (1812, {"empty chosen": 4}, 0),
    "hh_harmless_test.jsonl": (500, {}, 0),
    "ultrafeedback_train.jsonl": (
        999,
        {"chosen and rejected are equal": 4, "empty rejected": 1, "empty chosen": 1},
        993,
    ),
    "ultrafeedback_test.jsonl": (200, {"chosen and rejected are equal": 1}, 199),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_sets_are_split_into_prompt_and_two_answers_and_their_defects_are_found(name):
    rows, defects, margins = PAIRS[name]
    data = load_data(DataConfig(path=shared(name), max_length=65536), "preference", bpe_tokenizer())
    train, held_out = data.ledger.train, data.ledger.held_out
    assert train.rows + held_out.rows == rows
    assert train.dropped + held_out.dropped == defects
    known = [margin for split in (data.train, data.held_out) for margin in split["margin"] if not math.isnan(margin)]
    assert len(known) == margins
    assert all(record.prompt[-1]["role"] == "user" for record in data.train_records)
    assert all(record.chosen[-1]["role"] == record.rejected[-1]["role"] == "assistant" for record in data.train_records)


def test_truthfulqa_has_columns_nobody_could_guess_and_one_setting_maps_them():
    columns = {"Question": "question", "Best Answer": "answer"}
    config = DataConfig(path=shared("truthfulqa.jsonl"), columns=columns)
    data = load_data(config, "prompt_completion", bpe_tokenizer())
    assert data.ledger.train.rows + data.ledger.held_out.rows == 817
