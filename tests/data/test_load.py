"""From a path to tokens and a ledger in which every row is accounted for."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_kit.data.ledger import Ledger, same_key
from finetune_kit.data.load import Data, load_data, load_records
from finetune_kit.data.records import PromptCompletion, Text, reference_of
from finetune_kit.data.split import RULE, held_out_count, labels, source_rows, split_off
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.settings.schema import DataConfig
from finetune_kit.system import network
from tests.fixtures_cli import ROOT
from tests.fixtures_data import assistant, bpe_tokenizer, conversation, user, write_jsonl


def pairs(count, start=0, answer="answer"):
    return [{"question": f"question {i}?", "answer": f"{answer} {i}"} for i in range(start, start + count)]


def load(tmp_path, rows, kind="prompt_completion", tokenizer=None, seed=0, **settings) -> Data:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load_data(DataConfig(path=path, **settings), kind, tokenizer or bpe_tokenizer(), seed)


def questions(records):
    return [record.messages[0]["content"] for record in records]


def test_the_columns_are_tokens_labels_and_the_row_they_came_from(tmp_path):
    tokenizer = bpe_tokenizer()
    data = load(tmp_path, pairs(40), tokenizer=tokenizer)
    assert data.kind == "prompt_completion"
    assert (len(data.train), len(data.held_out)) == (32, 8)
    assert data.train.column_names == ["input_ids", "labels", "row"]
    assert str(data.train.features["input_ids"].feature.dtype) == "int32"
    for row in data.train:
        supervised = [index for index, label in zip(row["input_ids"], row["labels"], strict=True) if label == index]
        assert tokenizer.decode(supervised) == reference_of(data.train_records[row["row"]]) + "<|im_end|>"
    assert data.end_token_ids == [tokenizer.eos_token_id]
    assert not data.packed
    assert data.score is None


def test_the_same_seed_gives_the_same_data_and_another_one_another_split(tmp_path):
    one, same, other = (load(tmp_path, pairs(100), seed=seed) for seed in (0, 0, 1))
    assert questions(one.held_out_records) == questions(same.held_out_records)
    assert one.ledger.fingerprint == same.ledger.fingerprint
    assert questions(one.held_out_records) != questions(other.held_out_records)


@pytest.mark.parametrize(
    ("size", "rows", "expected"),
    [
        *((None, 1, 1), (None, 3, 1), (None, 60, 12), (None, 99, 19), (None, 100, 20), (None, 400, 20)),
        *((None, 401, 20), (None, 1000, 50), (None, 5000, 250), (None, 10_000, 256)),
        *((0.25, 100, 25), (7, 100, 7), (0, 100, 0), (0.001, 100, 1)),
    ],
)
def test_held_out_are_5_percent_with_at_least_20_where_there_are_100_or_what_is_asked_for(size, rows, expected):
    assert held_out_count(size, rows) == expected


def test_the_rule_is_told_in_the_same_words_wherever_it_is_told():
    told = next(item for item in dataclasses.fields(DataConfig) if item.name == "held_out_size").metadata["help"]
    assert told.endswith(f"unset: {RULE}")
    assert RULE in (ROOT / "docs" / "data.md").read_text()


def test_prompts_and_answers_that_both_sides_have_are_counted_in_a_note(tmp_path):
    held = [{"question": "question 3?", "answer": "another"}, {"question": "new?", "answer": "ANSWER  4"}]
    data = load(tmp_path, pairs(50), held_out_path=write_jsonl(tmp_path / "held.jsonl", held))
    assert "1 of 2 held-out prompts are in training rows, too: there memory counts as skill" in data.ledger.notes
    assert "1 of 2 held-out answers are in training rows, too: there memory counts as skill" in data.ledger.notes
    apart = load(tmp_path, pairs(50), held_out_path=write_jsonl(tmp_path / "held.jsonl", pairs(2, 90)))
    assert not [note for note in apart.ledger.notes if "in training rows, too" in note]


def test_rows_with_the_same_prompt_stay_on_one_side():
    records = [conversation(user(f"q{i % 50}"), assistant(f"a{i}")) for i in range(200)]
    train, held = split_off(records, 20, seed=0)
    assert len(held) == 20
    assert not set(questions(train)) & set(questions(held))


def test_one_prompt_for_all_rows_can_still_be_split_but_one_row_cannot():
    train, held = split_off([conversation(user("go"), assistant(f"a{i}")) for i in range(20)], None, seed=0)
    assert (len(train), len(held)) == (16, 4)
    with pytest.raises(DataError, match=r"There is one row, so none can be held out.*\n.*data.held_out_path=FILE"):
        split_off([conversation(user("a"), assistant("b"))], None, seed=0)


def test_training_rows_that_are_held_out_too_are_removed_and_counted(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [*pairs(3), {"question": "QUESTION  5?", "answer": "Answer\n5"}])
    data = load(tmp_path, pairs(100), held_out_path=held)
    assert data.ledger.train.dropped == {"also held out": 4}
    assert data.ledger.train.rows == 100
    assert not set(questions(data.train_records)) & {"question 0?", "question 1?", "question 2?", "question 5?"}
    with pytest.raises(DataError, match=r"10 of 100 train rows would be lost \(10%, allowed 5%\): 10 × also held out"):
        load(tmp_path, pairs(100), held_out_path=write_jsonl(tmp_path / "held.jsonl", pairs(10)))


def test_20_copies_of_a_held_out_row_are_one_row_and_nothing_is_lost_by_that(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [*pairs(1, 90) * 20, *pairs(2, 91)])
    data = load(tmp_path, pairs(50), held_out_path=held)
    assert len(data.held_out_records) == 3
    assert data.ledger.held_out.dropped == {"said by another held-out row": 19}
    assert any("only 3 held-out rows: too few to judge" in note for note in data.ledger.notes)


def labelled(count, liked):
    rows = [{"prompt": f"question {i}?", "completion": f"answer {i}", "label": i in liked} for i in range(count)]
    return {"kind": "labelled_completion", "rows": rows}


@pytest.mark.parametrize(("count", "liked"), [(60, (7, 50)), (10, (0, 4)), (400, range(0, 400, 50))])
def test_both_labels_are_on_both_sides_of_a_split_whatever_the_seed(tmp_path, count, liked):
    made = labelled(count, liked)
    records = load_records(write_jsonl(tmp_path / "rows.jsonl", made["rows"]), DataConfig(), made["kind"])
    for seed in range(20):
        train, held = split_off(records, None, seed)
        assert labels(train) == labels(held) == {True, False}
        assert len(held) == held_out_count(None, count)


def test_the_only_disliked_row_is_trained_and_a_note_says_that_none_is_held_out(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", labelled(30, {*range(30)} - {7})["rows"])
    for seed in range(5):
        data = load_data(DataConfig(path=path), "labelled_completion", bpe_tokenizer(), seed)
        assert not all(data.train["label"])
        assert "no disliked row is held out" in " ".join(data.ledger.notes)


def test_disliked_rows_alone_are_no_held_out_rows(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", labelled(30, range(0, 30, 2))["rows"])
    bad = [{"prompt": f"other {i}?", "completion": "no", "label": False} for i in range(20)]
    config = DataConfig(path=path, held_out_path=write_jsonl(tmp_path / "held.jsonl", bad))
    with pytest.raises(DataError, match=r"All 20 held-out rows are disliked .*\n.*data.held_out_path"):
        load_data(config, "labelled_completion", bpe_tokenizer())


def test_of_100_pairs_kto_holds_out_20_pairs_with_both_answers_of_each(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(100)]
    data = load_data(
        DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows)), "labelled_completion", bpe_tokenizer()
    )
    assert len(data.held_out_records) == 40
    assert source_rows(record.where for record in data.held_out_records) == 20


def test_duplicates_are_counted_and_kept(tmp_path):
    data = load(
        tmp_path, [*pairs(50), *pairs(1), *pairs(1)], held_out_path=write_jsonl(tmp_path / "held.jsonl", pairs(2, 90))
    )
    assert data.ledger.train.duplicates == 2
    assert len(data.train) == 52


def test_a_folder_brings_its_own_held_out_rows(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", pairs(30))
    write_jsonl(tmp_path / "set" / "test.jsonl", pairs(7, 100))
    data = load_data(DataConfig(path=str(tmp_path / "set")), "prompt_completion", bpe_tokenizer())
    assert (len(data.train), len(data.held_out)) == (30, 7)


def test_sources_are_mixed_by_weight_without_replacement_as_far_as_the_scarcest_lasts(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", pairs(100, answer=name)) for name in ("one", "two")]
    held = write_jsonl(tmp_path / "held.jsonl", pairs(5, 500))
    config = DataConfig(path=paths, weights=[3, 1], held_out_path=held)
    data = load_data(config, "prompt_completion", bpe_tokenizer())
    answers = [reference_of(record).split()[0] for record in data.train_records]
    assert (answers.count("one"), answers.count("two")) == (100, 33)
    assert len({same_key(record) for record in data.train_records}) == 133
    assert any("33 of the 100 training rows" in note for note in data.ledger.notes)
    unweighted = load_data(DataConfig(path=paths, held_out_path=held), "prompt_completion", bpe_tokenizer())
    assert len(unweighted.train) == 200


def test_weights_that_do_not_fit_the_paths_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data.weights=\[1.0, 2.0\]: expected one number for each of 1 paths"):
        load(tmp_path, pairs(10), weights=[1.0, 2.0])


def test_different_kinds_of_rows_do_not_mix(tmp_path):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "some words"}] * 9)
    with pytest.raises(DataError, match=r"different kinds of rows: .*prompt_completion .* and text|text .* and prompt"):
        load_data(
            DataConfig(path=[text, write_jsonl(tmp_path / "r.jsonl", pairs(9))]), "prompt_completion", bpe_tokenizer()
        )


def test_size_draws_training_rows_and_leaves_the_held_out_ones(tmp_path):
    data = load(tmp_path, pairs(100), size=10)
    assert (len(data.train), len(data.held_out)) == (10, 20)


def test_empty_answers_are_dropped_and_counted_but_more_than_max_lost_is_an_error(tmp_path):
    rows = [*pairs(99), {"question": "empty?", "answer": " "}]
    data = load(tmp_path, rows, held_out_path=write_jsonl(tmp_path / "held.jsonl", pairs(2, 200)))
    assert data.ledger.train.dropped == {"empty answer": 1}
    assert {"split": "train", "where": "rows.jsonl:100", "what": "dropped: empty answer"} in data.ledger.listed
    assert "empty?" not in questions(data.train_records)
    with pytest.raises(DataError, match=r"1 × empty answer. First: rows.jsonl:100.\n.*data.max_lost=0.01"):
        load(tmp_path, rows, held_out_path=str(tmp_path / "held.jsonl"), max_lost=0.0)


def test_a_max_length_that_leaves_nothing_names_the_smallest_that_would_do(tmp_path):
    tokenizer = bpe_tokenizer()
    whole = [len(ids) for ids in load(tmp_path, pairs(40), held_out_size=0, tokenizer=tokenizer).train["input_ids"]]
    with pytest.raises(DataError, match=r"No supervised token is left in any train row at data.max_length=5") as error:
        load(tmp_path, pairs(40), held_out_size=0, max_length=5)
    smallest, keeps_all = [int(word) for word in error.value.fix.replace("=", " ").split() if word.isdigit()]
    assert keeps_all == max(whole)
    with pytest.raises(DataError):
        load(tmp_path, pairs(40), held_out_size=0, max_length=smallest - 1)
    assert len(load(tmp_path, pairs(40), held_out_size=0, max_length=smallest, max_lost=1.0).train) >= 1
    assert load(tmp_path, pairs(40), held_out_size=0, max_length=keeps_all).ledger.train.truncated == 0


def test_truncated_rows_are_counted_with_what_was_cut(tmp_path):
    long = {"question": "long?", "answer": "word " * 100}
    data = load(
        tmp_path, [*pairs(39), long], held_out_path=write_jsonl(tmp_path / "held.jsonl", pairs(2, 200)), max_length=64
    )
    counts = data.ledger.train
    assert (counts.rows, counts.trained, counts.truncated) == (40, 39, 1)
    assert counts.truncated_tokens > 100
    assert max(map(len, data.train["input_ids"])) == 64
    assert {"split": "train", "where": "rows.jsonl:40", "what": f"truncated by {counts.truncated_tokens} tokens"} in (
        data.ledger.listed
    )


rows_of_any_length = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=4, max_size=20)


@settings(max_examples=25, deadline=None)
@given(rows=rows_of_any_length, max_length=st.integers(20, 120))
def test_whatever_the_rows_and_max_length_the_ledger_adds_up(tmp_path_factory, rows, max_length):
    tmp_path = tmp_path_factory.mktemp("rows")
    written = [
        {"question": f"{i} " + "why " * asked, "answer": "so " * answered} for i, (asked, answered) in enumerate(rows)
    ]
    try:
        data = load(tmp_path, written, max_length=max_length, max_lost=1.0)
    except DataError:
        return  # nothing was left, or nothing could be held out
    for counts, split in ((data.ledger.train, data.train), (data.ledger.held_out, data.held_out)):
        assert counts.trained + counts.truncated + sum(counts.dropped.values()) == counts.rows
        assert counts.tokens == sum(map(len, split["input_ids"]))
        assert counts.supervised_tokens == sum(label >= 0 for labels in split["labels"] for label in labels)
        assert counts.samples == len(split)
        assert len(set(split["row"])) == counts.trained + counts.truncated
    assert data.ledger.train.rows + data.ledger.held_out.rows == len(written)
    listed = [item for item in data.ledger.listed if item["split"] == "train"]
    assert len(listed) == data.ledger.train.truncated + data.ledger.train.lost
    json.dumps(data.ledger.to_json())


def test_the_fingerprint_sees_content_and_order_but_not_the_path(tmp_path):
    def fingerprint(rows, name="rows"):
        (tmp_path / name).mkdir(exist_ok=True)
        return load(tmp_path / name, rows, held_out_size=0).ledger.fingerprint

    rows = pairs(5)
    assert fingerprint(rows) == fingerprint(rows, "elsewhere")
    assert fingerprint(rows) != fingerprint(rows[::-1])
    assert fingerprint(rows) != fingerprint([*rows[:4], {"question": "question 4?", "answer": "answer  4"}])


def test_a_ledger_that_does_not_add_up_is_a_bug_of_ours():
    ledger = Ledger()
    ledger.train.rows = 1
    with pytest.raises(AssertionError, match="does not add up"):
        ledger.check(1.0)


def test_plain_text_is_packed_and_each_document_ends(tmp_path):
    tokenizer = bpe_tokenizer()
    rows = [{"text": f"document number {i} " * 20} for i in range(30)]
    data = load(tmp_path, [*rows, {"text": ""}], held_out_size=3, tokenizer=tokenizer, max_length=50, max_lost=0.5)
    assert data.kind == "text"
    assert data.packed
    assert all(isinstance(record, Text) for record in data.train_records)
    assert sum(ids[-1] == tokenizer.eos_token_id for ids in data.train["input_ids"]) == len(data.train_records)
    assert data.ledger.train.dropped + data.ledger.held_out.dropped == {"empty text": 1}
    assert load(tmp_path, rows, packing=False).packed is False


def test_a_tokenizer_without_a_template_is_given_one_for_conversations_and_says_so(tmp_path):
    tokenizer = bpe_tokenizer(template=None, specials=(), eos="</s>")
    data = load(tmp_path, pairs(20), tokenizer=tokenizer)
    assert tokenizer.decode(data.train[0]["input_ids"]) == "User:\nquestion 0?\n\nAssistant:\nanswer 0</s>"
    assert "was given a plain one" in data.ledger.notes[0]
    assert tokenizer.chat_template is not None


def test_bare_prompts_and_completions_need_no_template(tmp_path):
    tokenizer = bpe_tokenizer(template=None, specials=(), eos="</s>")
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" {i + 1}"} for i in range(400)]
    data = load(tmp_path, rows, tokenizer=tokenizer)
    assert tokenizer.chat_template is None
    assert tokenizer.decode(data.train[0]["input_ids"]) == "0 plus 1 is 1</s>"
    templated = load(tmp_path, rows)
    assert templated.ledger.notes == []
    bare = load(tmp_path, rows, apply_chat_template=False)
    assert bare.ledger.notes == ["Prompts and completions are trained as bare text, without a chat template."]


def test_settings_that_cannot_act_on_these_rows_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="apply_chat_template=false needs prompt and completion strings"):
        load(tmp_path, pairs(9), apply_chat_template=False)
    rows = [{"prompt": f"{i}", "completion": "a"} for i in range(9)]
    with pytest.raises(SettingsError, match="system_prompt has no effect"):
        load(tmp_path, rows, apply_chat_template=False, system_prompt="Be kind.")


def test_a_system_prompt_is_given_to_conversations_that_have_none(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "Mine."}, user(f"{i}"), assistant("b")]} for i in range(2)]
    plain = [{"messages": [user(f"{i}?"), assistant("b")]} for i in range(8)]
    data = load(tmp_path, [*rows, *plain], system_prompt="Yours.", held_out_size=0)
    assert [record.messages[0]["content"] for record in data.train_records] == ["Mine."] * 2 + ["Yours."] * 8


@pytest.mark.parametrize("offline", ["0", "1"])
def test_an_unreachable_hub_is_said_at_once_with_the_offline_default(offline, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    # The library reads the variable when it is first imported; here the test came too late for that.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    network.hub_reachable.cache_clear()
    with pytest.raises(ResourceError, match=r"data.path=nobody/nothing: .*\n.*data.path=reasoning_gym/"):
        load_data(DataConfig(path="nobody/nothing"), "prompt_completion", bpe_tokenizer())
    network.hub_reachable.cache_clear()


def test_preferences_and_prompts_are_found_and_counted(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad"} for i in range(20)]
    data = load(tmp_path, rows, kind="preference")
    assert data.kind == "preference"
    assert data.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "margin", "row"]
    assert (data.ledger.train.trained, data.ledger.held_out.trained) == (16, 4)
    prompts = load(tmp_path, pairs(20), kind="prompt")
    assert prompts.kind == "prompt"
    assert not any(isinstance(record, PromptCompletion) for record in prompts.train_records)


ROW = {"question": "how many apples?", "answer": "4", "level": 2, "source": {"name": "a", "tags": ["x", "y"]}}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "folder", "hub"])
def test_a_prompt_keeps_every_column_of_its_row_and_the_answer_wherever_it_was_read(tmp_path, name, monkeypatch):
    import datasets

    rows = [{**ROW, "question": f"{number} apples?"} for number in range(20)]
    path = tmp_path / name
    if name == "folder":
        write_jsonl(path.mkdir() or path / "train.jsonl", rows)
    elif name == "hub":
        monkeypatch.setattr("finetune_kit.data.sources.hub_reachable", lambda: True)
        monkeypatch.setattr(datasets, "load_dataset", lambda *given, **named: datasets.Dataset.from_list(rows))
        path = "someone/apples"
    elif name == "rows.parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name == "rows.json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    data = load_data(DataConfig(path=str(path)), "prompt", bpe_tokenizer())
    assert data.score is None
    for record in [*data.train_records, *data.held_out_records]:
        assert record.metadata == {**ROW, "question": record.messages[-1]["content"]}
        assert record.completion == reference_of(record) == "4"


@pytest.mark.parametrize(
    ("row", "columns", "answer"),
    [
        ({"prompt": "2+2", "answer": 4}, {}, "4"),
        ({"question": "2+2", "answer": 4.5}, {}, "4.5"),
        ({"prompt": "2+2", "ground_truth": "4", "solution": "two and two"}, {}, "4"),
        ({"instruction": "add", "input": "2+2", "output": "4"}, {}, "4"),
        ({"prompt": [user("2+2")], "completion": [assistant("4")]}, {}, "4"),
        ({"messages": [user("2+2"), assistant("4")]}, {}, "4"),
        ({"prompt": "2+2", "chosen": "4", "rejected": "5"}, {}, "4"),
        ({"frage": "2+2", "antwort": "4"}, {"frage": "prompt", "antwort": "completion"}, "4"),
        ({"prompt": "2+2", "answer": ["4", "four"]}, {}, ""),
        ({"prompt": "2+2", "task": "gsm8k"}, {}, ""),
    ],
)
def test_the_answer_beside_a_prompt_is_found_under_its_usual_names(tmp_path, row, columns, answer):
    data = load(tmp_path, [row] * 3, "prompt", columns=columns, held_out_size=0)
    assert [record.completion for record in data.train_records] == [answer] * 3
    assert [record.metadata for record in data.train_records] == [row] * 3  # as read, under their own names


def test_the_fingerprint_of_prompts_sees_the_columns_that_a_reward_may_judge_by(tmp_path):
    rows = [{"prompt": f"{number}", "level": 1} for number in range(4)]
    one, other = (load(tmp_path, [*rows, {"prompt": "last", "level": level}], "prompt") for level in (1, 2))
    assert one.ledger.fingerprint != other.ledger.fingerprint
