"""The tokenizer of a new model: its ids, that nothing is lost in it, and what it keeps for turns and tools."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from finetune_kit.data.template import bos_prefix, dialect_of
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.new import NewModelConfig
from finetune_kit.models.new_tokenizer import (
    FEWEST,
    RESERVED,
    SPECIAL,
    TokenizerConfig,
    check_tokenizer,
    make_tokenizer,
    train_tokenizer,
)

TEXT = (files("finetune_kit.data") / "assets/shakespeare.txt").read_text(encoding="utf-8")
WORDS = 400


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([TEXT[:50_000]], WORDS)


def by_hand(texts: list[str], words: int) -> Tokenizer:
    """The same by the library tokenizers alone."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    plain.decoder = decoders.ByteLevel()
    plain.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=words,
            special_tokens=[*SPECIAL, *RESERVED],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return plain


def test_its_ids_are_those_of_tokenizers(tokenizer: Any) -> None:
    plain = by_hand([TEXT[:50_000]], WORDS)
    other = TEXT[200_000:210_000] + " naïve 漢字 🙂 2026\r\n\t"
    assert tokenizer(other, add_special_tokens=False)["input_ids"] == plain.encode(other).ids
    assert len(tokenizer) == WORDS


@pytest.mark.long
def test_8192_words_from_10_mb_have_the_ids_of_tokenizers_and_lose_nothing() -> None:
    texts = [TEXT[start : start + 4096] for start in range(0, len(TEXT), 4096)] * 9
    large = train_tokenizer(texts, 8192)
    assert len(large) == 8192
    assert large(TEXT, add_special_tokens=False)["input_ids"] == by_hand(texts, 8192).encode(TEXT).ids
    assert large.decode(large(TEXT)["input_ids"], skip_special_tokens=True) == TEXT


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    kept = _once()
    ids = kept(text, add_special_tokens=False)["input_ids"]
    assert kept.decode(ids) == text


_kept: list[Any] = []


def _once() -> Any:
    if not _kept:
        _kept.append(train_tokenizer([TEXT[:20_000]], 300))
    return _kept[0]


def test_every_one_of_the_256_bytes_comes_back() -> None:
    every = "".join(map(chr, range(0x250))) + "\U0001f642\uffff"
    kept = _once()
    assert kept.decode(kept(every, add_special_tokens=False)["input_ids"]) == every


def test_a_text_begins_with_the_token_that_also_ends_it_and_pad_is_another(tokenizer: Any) -> None:
    assert bos_prefix(tokenizer) == [tokenizer.eos_token_id] == [tokenizer.bos_token_id]
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    assert tokenizer("a")["input_ids"] == [
        tokenizer.bos_token_id,
        *tokenizer("a", add_special_tokens=False)["input_ids"],
    ]


def test_words_for_turns_and_tools_are_one_token_each_from_the_start(tokenizer: Any) -> None:
    for word in (*SPECIAL, *RESERVED):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1
    shown = tokenizer.decode(
        tokenizer("<|im_start|><tool_call>x</tool_call><|im_end|>")["input_ids"], skip_special_tokens=True
    )
    assert shown == "<tool_call>x</tool_call>"


def test_digits_are_words_of_their_own(tokenizer: Any) -> None:
    assert len(tokenizer("2026", add_special_tokens=False)["input_ids"]) == 4


def test_its_template_writes_system_turns_tools_calls_and_results_and_ends_answers(tokenizer: Any) -> None:
    found = dialect_of(tokenizer, {}, True)
    assert (found.system, found.tools, found.calls, found.end) == (True, True, "object", "<|im_end|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    text = tokenizer.apply_chat_template(turns, tools=[tool], tokenize=False)
    assert text.startswith("<|endoftext|><|im_start|>system\nBe brief.\n\nYou may call these tools:\n<tools>\n{")
    assert text.count("Be brief.") == 1
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )


def test_saved_and_loaded_by_transformers_it_is_the_same(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Enter 3 GHOSTS — <|im_start|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")


def test_a_vocabulary_smaller_than_the_bytes_is_refused_with_the_smallest_that_is_not() -> None:
    with pytest.raises(SettingsError, match="256 bytes and 10 special tokens are 266 words already") as error:
        check_tokenizer(TokenizerConfig(vocab_size=FEWEST - 1))
    assert "tokenizer.vocab_size=266 or more" in error.value.fix
    check_tokenizer(TokenizerConfig(vocab_size=FEWEST))
    assert len(train_tokenizer(["aa ab"], FEWEST)) == FEWEST


def test_a_text_with_fewer_pairs_than_words_gives_a_smaller_vocabulary_and_the_model_its_size() -> None:
    model = NewModelConfig()
    made = make_tokenizer(TokenizerConfig(vocab_size=1000), model, ["to be or not to be"], seed=5)
    assert FEWEST < len(made) == model.rows < 1000
    assert (model.seed, model.ids["eos_token_id"]) == (5, made.eos_token_id)


def test_no_text_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match="no text to train the tokenizer on"):
        train_tokenizer([], 300)


def test_another_model_s_tokenizer_is_taken_without_reading_a_text(tiny_model: Path) -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    model = NewModelConfig()
    made = make_tokenizer(TokenizerConfig(name_or_path=str(tiny_model)), model, unread(), seed=0)
    assert model.rows == len(made) == 261
    with pytest.raises(SettingsError, match=r"tokenizer\.name_or_path=./nowhere: no such"):
        make_tokenizer(TokenizerConfig(name_or_path="./nowhere"), model, unread(), seed=0)
    with pytest.raises(SettingsError, match="vocab_size=500 has no effect"):
        check_tokenizer(TokenizerConfig(name_or_path="x", vocab_size=500))
