"""Pairs of answers: every layout becomes prompt, chosen and rejected; what is not a pair is dropped with its reason."""

import json
import math

import pytest
import yaml

from finetune_kit.data.load import Data, load_data
from finetune_kit.data.preview import preview_json
from finetune_kit.data.records import Preference
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.settings.schema import DataConfig
from tests.data.test_chat import shipped
from tests.fixtures_data import bpe_tokenizer, write_jsonl

TOKENIZER = bpe_tokenizer()
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"}]


def load(tmp_path, rows, kind="preference", **settings) -> Data:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    given = {"held_out_size": 0, "max_lost": 1.0, **settings}
    return load_data(DataConfig(path=path, **given), kind, bpe_tokenizer())


def one(tmp_path, row, **settings) -> Preference:
    """The only pair of a row."""
    (record,) = load(tmp_path, [row], **settings).train_records
    return record


def said(record: Preference) -> tuple[str, str, str]:
    """Last turn of the prompt, chosen, rejected."""
    return record.prompt[-1]["content"], record.chosen[0]["content"], record.rejected[0]["content"]


LAYOUTS = {
    "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "a prompt of turns": {"prompt": TURNS, "chosen": "good", "rejected": "bad"},
    "whole conversations": {
        "chosen": [*TURNS, {"role": "assistant", "content": "good"}],
        "rejected": [*TURNS, {"role": "assistant", "content": "bad"}],
    },
    "transcripts": {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: bad",
    },
    "answers and scores beside them": {"prompt": "q", "responses": ["bad", "so so", "good"], "scores": [1, 2, 4.5]},
    "answers and ranks beside them": {"prompt": "q", "answers": ["bad", "good"], "ranks": [2, 1]},
    "answers with a rating inside": {
        "instruction": "q",
        "completions": [{"response": "good", "overall_score": 8.5}, {"response": "bad", "overall_score": 3}],
    },
    "answers with a rank inside": {
        "prompt": "q",
        "answers": [{"answer": "bad", "rank": 7}, {"answer": "good", "rank": 1}],
    },
    "two answers and a winner": {"question": "q", "response_a": "bad", "response_b": "good", "winner": "model_b"},
    "two answers and three votes": {"prompt": "q", "response_a": "good", "response_b": "bad", "votes": ["A", "b", "a"]},
    "two answers and counted votes": {"prompt": "q", "answer_1": "bad", "answer_2": "good", "votes": {"1": 1, "2": 4}},
    "two answers and a number's sign": {
        "context": [{"role": "user", "content": "q"}],
        "response1": "good",
        "response2": "bad",
        "overall_preference": -2,
    },
    "two answers and the better one's number": {
        "prompt": "q",
        "response_0": "bad",
        "response_1": "good",
        "better_response_id": 1,
    },
    "two answers and two scores": {"question": "q", "answer_0": "bad", "answer_1": "good", "score_0": -1, "score_1": 1},
    "OpenAI's files": {
        "input": {"messages": [{"role": "user", "content": "q"}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": "good"}],
        "non_preferred_output": [{"role": "assistant", "content": "bad"}],
    },
    "LLaMA-Factory's turns": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory's alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "messages and two texts": {"messages": TURNS, "chosen": "good", "rejected": "bad"},
    "SHP, the first": {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9},
    "SHP, the second": {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_B": 9},
    "capitals": {"Prompt": "q", "Chosen": "good", "Rejected": "bad"},
    "chosen_response": {"instruction": "q", "chosen_response": "good", "rejected_response": "bad"},
    "preferred": {"question": "q", "preferred": "good", "dispreferred": "bad"},
    "turns as JSON text": {
        "chosen": json.dumps([*TURNS, {"role": "assistant", "content": "good"}]),
        "rejected": json.dumps([*TURNS, {"role": "assistant", "content": "bad"}]),
    },
    "WebGPT's question in an object": {
        "question": {"dataset": "eli5", "id": "x", "full_text": "q"},
        "answer_0": "bad",
        "answer_1": "good",
        "score_0": -0.5,
        "score_1": 0.5,
    },
    "LLaMA-Factory's list of the good and the bad": {"instruction": "q", "input": "", "output": ["good", "bad"]},
    "win and lose": {"prompt": "q", "win": "good", "lose": "bad"},
    "an edited answer": {"prompt": "q", "original_response": "bad", "edited_response": "good"},
    "stack-exchange-paired": {"question": "q", "response_j": "good", "response_k": "bad"},
    "columns A and B": {"prompt": "q", "A": "bad", "B": "good", "winner": "B"},
    "columns A and B, numbered by hand": {"prompt": "q", "response_0": "bad", "response_1": "good", "label": 1},
    "two conversations and annotators": {
        "conversation_a": [*TURNS, {"role": "assistant", "content": "good"}],
        "conversation_b": [*TURNS, {"role": "assistant", "content": "bad"}],
        "annotations": [{"overall_pref": "A-is-slightly-better"}, {"overall_pref": "tie"}],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_pair(tmp_path, name):
    assert said(one(tmp_path, LAYOUTS[name])) == ("q", "good", "bad")


@pytest.mark.parametrize("names", [("A", "B"), ("response_a", "response_b"), ("a", "b")])
def test_a_0_or_1_over_answers_with_letters_is_refused_with_the_two_ways_to_say_which_it_is(tmp_path, names):
    row = {"prompt": "q", names[0]: "one", names[1]: "other", "label": 0}
    with pytest.raises(
        DataError, match=rf"label is 0, which does not say whether {names[0]} or {names[1]} is"
    ) as caught:
        one(tmp_path, row)
    for fix, chosen in zip(caught.value.fix.split("data.columns=")[1:], ("one", "other"), strict=True):
        said_columns = yaml.safe_load(fix.split("'")[1])
        assert said(one(tmp_path, row, columns=said_columns))[1] == chosen


def test_a_list_of_three_outputs_is_no_pair(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: output is a list of 3 texts; a pair is two"):
        one(tmp_path, {"instruction": "q", "output": ["a", "b", "c"]})


def test_rows_of_one_scored_answer_each_are_paired_by_their_prompt_the_best_against_the_worst(tmp_path):
    scores = [("q", "bad", 1), ("r", "so so", 2), ("q", "good", 4), ("r", "fine", 3)]  # as HelpSteer2 has them
    rows = [{"prompt": p, "response": r, "helpfulness": score, "verbosity": 2} for p, r, score in scores]
    data = load(tmp_path, rows)
    assert [said(record) for record in data.train_records] == [("q", "good", "bad"), ("r", "fine", "so so")]
    assert data.train["margin"] == [3.0, 1.0]
    assert data.ledger.unused_columns == {"verbosity": 2}
    with pytest.raises(DataError, match=r"rows.jsonl:3: responses holds 1 answers; a pair needs two"):
        load(tmp_path, [*rows[:2], {**rows[0], "prompt": "s"}, *rows[2:]])


def test_a_conversation_that_ends_with_an_answer_is_no_prompt_of_two_others(tmp_path):
    turns = [*TURNS, {"role": "assistant", "content": "a third"}]
    with pytest.raises(DataError, match=r"rows.jsonl:1: messages ends with an answer"):
        one(tmp_path, {"messages": turns, "chosen": "good", "rejected": "bad"})


def test_the_margin_is_the_labels_own_difference_and_nan_where_it_is_not_known(tmp_path):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = [
        {**pair, "margin": 0.5},
        {**pair, "prompt": "r", "score_chosen": 9, "score_rejected": 6},
        {**pair, "prompt": "s", "metadata": "{'score_chosen': 4.0, 'score_rejected': 3.0}"},
        {**pair, "prompt": "t", "metadata": "no Python"},
    ]
    margins = load(tmp_path, rows).train["margin"]
    assert margins[:3] == [0.5, 3.0, 1.0]
    assert math.isnan(margins[3])
    assert one(tmp_path, LAYOUTS["answers and scores beside them"]).margin == 3.5
    assert one(tmp_path, LAYOUTS["two answers and three votes"]).margin == pytest.approx(1 / 3)


def test_all_pairs_of_4_scored_answers_are_6_and_the_tied_one_is_dropped(tmp_path):
    row = {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 2, 3]}
    data = load(tmp_path, [row], pairs="all")
    assert said(data.train_records[0])[1:] == ("d", "a")
    assert len(data.train_records) == 5
    assert data.ledger.train.dropped == {"tie: both answers have the same score": 1}


def test_all_pairs_of_rows_that_have_only_one_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.pairs=all has no effect: rows.jsonl has one pair a row"):
        one(tmp_path, LAYOUTS["columns"], pairs="all")


def test_what_is_no_pair_is_dropped_with_its_reason(tmp_path):
    rows = [
        {"prompt": "kept", "chosen": "good", "rejected": "bad"},
        {"prompt": "1", "chosen": "same ", "rejected": " same"},
        {"prompt": "2", "chosen": "", "rejected": "bad"},
        {"prompt": "3", "chosen": "good", "rejected": " "},
        {"prompt": "4", "chosen": "x", "rejected": "y"},
        {"prompt": "4", "chosen": "y", "rejected": "x"},
        {"prompt": "5", "chosen": "good", "rejected": "bad " * 400},
        {
            "prompt": "6",
            "chosen": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}, TURNS[1]],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
    ]
    data = load(tmp_path, rows, max_length=200)
    assert data.ledger.train.dropped == {
        "chosen and rejected are equal": 1,
        "empty chosen": 1,
        "empty rejected": 1,
        "contradictory: the same two answers preferred both ways round": 2,
        "longer than max_length=200": 1,
        "the sides part before the last answer": 1,
    }
    assert (data.ledger.train.rows, data.ledger.train.trained) == (8, 1)


def test_a_training_pair_that_is_held_out_the_other_way_round_is_dropped_on_both_sides(tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}, LAYOUTS["columns"]])
    rows = [{"prompt": "q", "chosen": "y", "rejected": "x"}, {"prompt": "r", "chosen": "a", "rejected": "b"}]
    data = load(tmp_path, rows, held_out_path=held, held_out_size=None)
    assert [split.lost for split in data.ledger.splits.values()] == [1, 1]


def test_a_prompt_column_beside_whole_conversations_is_not_said_twice(tmp_path):
    record = one(tmp_path, {"prompt": "q ", **LAYOUTS["whole conversations"]})
    assert [turn["content"] for turn in record.prompt] == ["hi", "hello", "q"]
    with pytest.raises(DataError, match="do not hold the prompt column's text"):
        one(tmp_path, {"prompt": "something else", **LAYOUTS["whole conversations"]})


def test_an_instruction_has_its_input_below(tmp_path):
    record = one(tmp_path, {"instruction": "add", "input": "1 2", "chosen": "3", "rejected": "4"})
    assert said(record) == ("add\n\n1 2", "3", "4")


def test_a_tie_in_words_is_no_vote_for_the_answer_a(tmp_path):
    answers = {"response_a": "good", "response_b": "bad"}
    rows = [{"prompt": "q", **answers, "preference": "a tie"}, {"prompt": "r", **answers, "preference": "A"}]
    data = load(tmp_path, rows)
    assert data.ledger.train.dropped == {"tie: as many votes for the one as for the other": 1}
    assert said(data.train_records[0]) == ("r", "good", "bad")


def test_an_answer_marked_as_not_trained_is_still_a_side_of_its_pair(tmp_path):
    chosen = [{"role": "assistant", "content": "good", "train": False}]
    assert said(one(tmp_path, {"prompt": "q", "chosen": chosen, "rejected": "bad"})) == ("q", "good", "bad")


def test_votes_that_balance_are_a_tie_and_counted(tmp_path):
    row = LAYOUTS["two answers and three votes"]
    data = load(
        tmp_path,
        [row, {**row, "prompt": "r", "votes": ["a", "b"]}, {**row, "prompt": "s", "winner": None, "votes": ["tie"]}],
    )
    assert data.ledger.train.dropped == {"tie: as many votes for the one as for the other": 2}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": None}, "rejected: content is null"),
        ({"chosen": "good", "rejected": "bad"}, "share no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "margin is text"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "2 responses and 1 scores; expected as many"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, None]}, "the score of answer 2 is null"),
        ({"prompt": "q", "response_a": "a", "response_b": "b", "winner": "x"}, "names none of the two answers"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, message):
    # the first row shows the columns; the second one is broken
    whole = {name: value if value is not None else "x" for name, value in row.items()}
    with pytest.raises(DataError, match=rf"rows\.jsonl:\d.*{message}"):
        load(tmp_path, [whole, row] if None in row.values() else [row])


def test_both_sides_have_the_prompt_as_it_is_served_and_end_with_the_end_token(tmp_path):
    data = load(tmp_path, [{"prompt": "what is it?", "chosen": "good", "rejected": "bad"}])
    row = data.train[0]
    assert TOKENIZER.decode(row["prompt_ids"]) == "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(row["chosen_ids"]) == "good<|im_end|>"
    assert TOKENIZER.decode(row["rejected_ids"]) == "bad<|im_end|>"
    assert data.end_token_ids == [TOKENIZER.convert_tokens_to_ids("<|im_end|>")]
    counts = data.ledger.train
    answers = len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert (counts.samples, counts.supervised_tokens) == (2, answers)
    assert counts.tokens == 2 * len(row["prompt_ids"]) + answers
    shown = preview_json(data, TOKENIZER)["samples"]
    assert [(sample["side"], sample["supervised_text"]) for sample in shown] == [
        ("chosen", ["good<|im_end|>"]),
        ("rejected", ["bad<|im_end|>"]),
    ]


def test_pairs_are_a_liked_and_a_disliked_answer_to_a_recipe_that_takes_those(tmp_path):
    data = load(tmp_path, [LAYOUTS["columns"]], kind="labelled_completion")
    assert data.kind == "labelled_completion"
    assert [(TOKENIZER.decode(row["completion_ids"]), row["label"]) for row in data.train] == [
        ("good<|im_end|>", True),
        ("bad<|im_end|>", False),
    ]
    labelled = load(tmp_path, [{"prompt": "q", "completion": "good", "label": True}], kind="labelled_completion")
    assert labelled.train[0]["label"] is True


def test_a_pair_is_a_prompt_to_a_recipe_that_takes_prompts(tmp_path):
    data = load(tmp_path, [LAYOUTS["transcripts"]], kind="prompt")
    assert TOKENIZER.decode(data.train[0]["prompt_ids"]).endswith("q<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("task", ["word_sequence_reversal", "chain_sum", "spell_backward", "letter_counting"])
def test_a_task_gives_its_right_answer_against_a_wrong_one_that_its_scorer_scores_lower(task):
    config = DataConfig(path=f"reasoning_gym/{task}", size=40, held_out_size=20)
    data = load_data(config, "preference", bpe_tokenizer())
    assert data.ledger.train.trained == 40
    for record in data.train_records:
        _, right, wrong = said(record)
        assert data.score(right, record.metadata) - data.score(wrong, record.metadata) == pytest.approx(record.margin)
        assert record.margin > 0
    again = load_data(config, "preference", bpe_tokenizer(), seed=1)
    assert [said(record) for record in again.held_out_records] == [said(record) for record in data.held_out_records]
    assert [said(record) for record in again.train_records] != [said(record) for record in data.train_records]


def test_wrong_answers_are_as_often_longer_as_shorter():
    data = load_data(DataConfig(path="reasoning_gym/word_sequence_reversal", size=200), "preference", bpe_tokenizer())
    longer = sum(len(row["rejected_ids"]) > len(row["chosen_ids"]) for row in data.train)
    shorter = sum(len(row["rejected_ids"]) < len(row["chosen_ids"]) for row in data.train)
    assert abs(longer - shorter) < 40  # of 200: two standard deviations of a fair coin are 28


def test_marks_on_earlier_turns_train_no_earlier_answer_where_the_template_rewrites_history(tmp_path):
    tokenizer = shipped("qwen3")
    earlier = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "train": True}, TURNS[2]]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": earlier, "chosen": "good", "rejected": "bad"}])
    data = load_data(DataConfig(path=path, held_out_size=0), "preference", tokenizer)
    sides = [tokenizer.decode(data.train[0][name], skip_special_tokens=True) for name in ("chosen_ids", "rejected_ids")]
    assert [side.strip() for side in sides] == ["good", "bad"]
    assert "hello" in tokenizer.decode(data.train[0]["prompt_ids"])
