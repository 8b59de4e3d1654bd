"""reasoning_gym: the same held-out problems for every seed, none of them in training, and the task's own scorer."""

import sys

import pytest

from finetune_kit.data import tasks
from finetune_kit.data.load import load_data, load_records
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import bpe_tokenizer

TASK = "word_sequence_reversal"


def load(seed=0, **settings):
    config = DataConfig(path=f"reasoning_gym/{TASK}", **{"size": 50, "held_out_size": 20, **settings})
    return load_data(config, "prompt_completion", bpe_tokenizer(), seed)


def questions(records):
    return [record.metadata["question"] for record in records]


def test_held_out_problems_do_not_depend_on_the_seed_and_training_problems_do():
    one, other = load(seed=0), load(seed=1)
    assert questions(one.held_out_records) == questions(other.held_out_records)
    assert not set(questions(one.train_records)) & set(questions(other.train_records))
    assert not set(questions(one.train_records)) & set(questions(one.held_out_records))
    assert (len(one.train), len(one.held_out)) == (50, 20)
    assert one.train_records[2].where == f"reasoning_gym/{TASK}:3"


def test_256_problems_to_train_on_and_128_to_be_measured_on_are_the_default():
    data = load(size=None, held_out_size=None)
    assert (len(data.train), len(data.held_out)) == (256, 128)


def test_seed_ranges_cannot_meet():
    last_held_out = tasks.HELD_OUT_SEED + tasks.MOST_ROWS
    assert last_held_out < tasks.train_seed(0)
    last_trained = tasks.train_seed(0) + tasks.MOST_ROWS
    assert last_trained <= tasks.train_seed(1)
    with pytest.raises(SettingsError, match="at most 999,000"):
        tasks.task_rows(TASK, 1_000_000, 0)


def test_a_task_with_few_problems_draws_on_until_the_held_out_ones_are_avoided():
    options = {"min_words": 2, "max_words": 2}
    held = {record.metadata["question"] for record in load(options=options).held_out_records}
    data = load(options=options)
    assert len(data.train) == 50
    assert not held & set(questions(data.train_records))
    assert data.ledger.train.dropped == {}


def test_the_right_answer_scores_1_a_wrong_one_less_and_nonsense_0():
    data = load()
    for record in data.held_out_records:
        answer = record.messages[1]["content"]
        assert data.score(answer, record.metadata) == 1.0
        assert data.score(f" {answer}\n", record.metadata) == 1.0
        assert data.score("no idea", record.metadata) < 1.0
        assert data.score("", record.metadata) == 0.0


def test_an_unknown_task_or_option_names_the_near_ones():
    with pytest.raises(SettingsError, match=r"no task 'word_reversal'.\nDid you mean .*reasoning_gym/word_"):
        load_records("reasoning_gym/word_reversal", DataConfig())
    with pytest.raises(SettingsError, match=r"data.options.min_word: .* Did you mean min_words\?"):
        load(options={"min_word": 3})
    with pytest.raises(SettingsError, match=r"data.options: .* refuses \{'min_words': -1\}"):
        load(options={"min_words": -1})


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ResourceError, match=r"the package reasoning-gym.*\nRun: .* 'finetune-kit\[quickstart\]'"):
        load()
