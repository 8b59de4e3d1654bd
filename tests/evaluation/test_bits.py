"""Bits a byte of held-out text: the same for every tokenizer, and for characters of several bytes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.data.load import load_data
from finetune_kit.evaluation.compare import compare
from finetune_kit.evaluation.measure import measure, of_texts
from finetune_kit.models.load import load_policy
from finetune_kit.models.new import NewModelConfig, settle
from finetune_kit.models.new_tokenizer import train_tokenizer
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import DataConfig, EvaluateConfig, ModelConfig

PLAIN = "".join(f"The {n}th gull saw {n * n} rocks.\n" for n in range(40))
WIDE = "".join(f"第{n}只海鸥 🙂 naïve über {n}。\n" for n in range(40))


def held_out(folder: Path, text: str, tokenizer: Any) -> Any:
    (folder / "train.txt").write_text("Other words for training alone.\n" * 3)
    (folder / "held.txt").write_text(text)
    config = DataConfig(path=str(folder / "train.txt"), held_out_path=str(folder / "held.txt"), max_length=17)
    return load_data(config, "text", tokenizer)


def uniform(tokenizer: Any) -> Any:
    """A model that finds every word equally likely."""
    config = NewModelConfig(depth=1, hidden_size=16)
    settle(config, tokenizer, 0)
    model = load_policy(config, trained_in_full=True)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    return model


@pytest.mark.parametrize("text", [PLAIN, WIDE], ids=["one byte a character", "up to four"])
@pytest.mark.parametrize("words", [266, 320])
def test_a_model_that_knows_nothing_needs_the_log_of_its_words_for_each_token(
    text: str, words: int, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer([PLAIN + WIDE], words)
    data = held_out(tmp_path, text, tokenizer)
    settings = EvaluateConfig(size=0, general_text=False, bootstrap_samples=50)
    found = measure(uniform(tokenizer), tokenizer, data, settings)
    runs = data.held_out_records
    tokens = sum(len(tokenizer(run.text, add_special_tokens=False)["input_ids"]) for run in runs) + 1  # and the end
    assert sum(found.tokens) == tokens
    assert sum(found.text_bytes) == len(text.encode())
    line = next(one for one in compare(found, found, settings).metrics if one["name"] == "held_out_bits_per_byte")
    assert line["before"] == pytest.approx(tokens * math.log2(len(tokenizer)) / len(text.encode()), rel=1e-5)
    assert line["n"] == len(runs)


def test_bytes_are_those_of_the_text_whatever_the_tokens(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))  # a word a byte, none in front of a text
    data = held_out(tmp_path, PLAIN, tokenizer)
    nats, counted = of_texts(data, [1.0] * len(data.held_out), tokenizer)
    assert sum(nats) == len(data.held_out)
    # the first byte of each text is predicted from nothing
    assert counted == [len(record.text.encode()) - 1 for record in data.held_out_records]


def test_a_text_that_begins_with_a_part_of_a_character_counts_all_of_its_bytes(
    tmp_path: Path, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))
    data = held_out(tmp_path, WIDE, tokenizer)
    _, counted = of_texts(data, [1.0] * len(data.held_out), tokenizer)
    assert sum(counted) == len(WIDE.encode())
