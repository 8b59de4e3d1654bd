"""Formats are found by looking: rows as people publish them, to the same two turns."""

import json

import pytest

from finetune_kit.data.load import load_records
from finetune_kit.data.records import LabelledCompletion, Preference, PromptCompletion, prompt_of, reference_of
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import assistant, user, write_jsonl

QUESTION, ANSWER = "How many?", "Four."
TURNS = [user(QUESTION), assistant(ANSWER)]
TRANSCRIPT = f"\n\nHuman: {QUESTION}\n\nAssistant: {ANSWER}"

SAME_TWO_TURNS = {
    "messages": {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]},
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "sharegpt": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "sharegpt, an empty system turn": {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "messages as JSON text": {"messages": json.dumps(TURNS)},
    "conversation": {"conversation": TURNS},
    "chat": {"chat": TURNS},
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "instruction and response": {"instruction": QUESTION, "response": ANSWER},
    "self-instruct": {"instruction": QUESTION, "instances": [{"input": "", "output": ANSWER}]},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and completion as turns": {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
    "prompt and response": {"prompt": QUESTION, "response": ANSWER, "id": 7},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "query and response": {"query": QUESTION, "response": ANSWER},
    "a transcript": {"text": TRANSCRIPT},
    "problem and solution": {"problem": QUESTION, "solution": ANSWER},
    "problem and answer": {"problem": QUESTION, "answer": ANSWER},
    "question and solution": {"question": QUESTION, "solution": ANSWER},
    "prompt and answer": {"prompt": QUESTION, "answer": ANSWER},
    "input and output": {"input": QUESTION, "output": ANSWER},
    "inputs and targets": {"inputs": QUESTION, "targets": ANSWER},
    "human and assistant": {"human": QUESTION, "assistant": ANSWER},
    "capitals": {"Question": QUESTION, "Answer": ANSWER},
    "capitals and spaces": {"Instruction ": QUESTION, "Input": "", "OUTPUT": ANSWER},
    "capital messages": {"Messages": TURNS},
    "capital roles": {"conversations": [{"from": "Human", "value": QUESTION}, {"from": "GPT", "value": ANSWER}]},
    "dialog": {"dialog": TURNS},
    "exchanges": {"conversation": [{"input": QUESTION, "output": ANSWER}]},
    "messages as Python's text": {"messages": repr(TURNS)},
    "sides as JSON text": {"prompt": json.dumps(TURNS[:1]), "completion": json.dumps(TURNS[1:])},
}


def read(tmp_path, *rows, kind="prompt_completion", **settings):
    return load_records(write_jsonl(tmp_path / "rows.jsonl", list(rows)), DataConfig(**settings), kind)


@pytest.mark.parametrize("name", SAME_TWO_TURNS)
def test_a_question_and_an_answer_come_out_as_two_turns(name, tmp_path):
    (record,) = read(tmp_path, SAME_TWO_TURNS[name])
    assert isinstance(record, PromptCompletion)
    assert record.messages == TURNS
    assert record.where == "rows.jsonl:1"
    assert prompt_of(record) == TURNS[:1]
    assert reference_of(record) == ANSWER


def test_alpaca_input_follows_the_instruction_and_system_becomes_a_turn(tmp_path):
    (record,) = read(tmp_path, {"instruction": "Add.", "input": "2 and 2", "output": ANSWER, "system": "Be brief."})
    assert record.messages == [{"role": "system", "content": "Be brief."}, user("Add.\n\n2 and 2"), assistant(ANSWER)]


def test_self_instruct_gives_one_record_for_each_instance(tmp_path):
    instances = [{"input": "1", "output": "one"}, {"input": "2", "output": "two"}]
    records = read(tmp_path, {"instruction": "Spell.", "instances": instances})
    assert [(record.where, reference_of(record)) for record in records] == [
        ("rows.jsonl:1.1", "one"),
        ("rows.jsonl:1.2", "two"),
    ]


def test_tool_calls_of_sharegpt_and_of_openai_come_out_the_same(tmp_path):
    tools = [{"name": "look", "parameters": {}}]
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "tools": json.dumps(tools),
    }
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    openai = {
        "messages": [
            user("Weather?"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
            assistant("Sunny."),
        ],
        "tools": [{"type": "function", "function": tools[0]}],
    }
    (one,), (other,) = read(tmp_path, sharegpt), read(tmp_path, openai)
    assert one.messages == other.messages
    assert one.tools == other.tools == [{"type": "function", "function": tools[0]}]
    assert one.messages[1]["tool_calls"][0]["function"]["arguments"] == {"at": "sky"}
    assert reference_of(one) == "Sunny."


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": False}])
def test_a_turn_can_be_marked_as_not_trained(flag, tmp_path):
    (record,) = read(tmp_path, {"messages": [user("a"), assistant("b", **flag), user("c"), assistant("d")]})
    assert [message.get("train") for message in record.messages] == [None, False, None, None]


def test_hh_transcripts_are_split_at_the_last_turn_they_share(tmp_path):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    (record,) = read(tmp_path, {"chosen": start + "good", "rejected": start + "bad"}, kind="preference")
    assert isinstance(record, Preference)
    assert record.prompt == [user("a"), assistant("b"), user("c")]
    assert (record.chosen, record.rejected) == ([assistant("good")], [assistant("bad")])


def test_transcripts_that_part_early_keep_the_turns_after_the_parting(tmp_path):
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    (record,) = read(tmp_path, {"chosen": chosen, "rejected": "\n\nHuman: a\n\nAssistant: x"}, kind="preference")
    assert record.prompt == [user("a")]
    assert [turn["content"] for turn in record.chosen] == ["b", "c", "d"]


def test_equal_sides_of_a_preference_still_have_one_answer_each(tmp_path):
    (record,) = read(tmp_path, {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, kind="preference")
    assert (record.prompt, record.chosen, record.rejected) == ([TURNS[0]], [TURNS[1]], [TURNS[1]])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": ANSWER, "rejected": "Five.", "margin": 2},
        {"prompt": QUESTION, "chosen": TURNS, "rejected": [TURNS[0], assistant("Five.")], "margin": 2},
        {"prompt": [TURNS[0]], "chosen": [TURNS[1]], "rejected": [assistant("Five.")], "margin": 2},
    ],
    ids=["text", "whole conversations", "turns"],
)
def test_explicit_preferences_come_out_the_same(row, tmp_path):
    (record,) = read(tmp_path, row, kind="preference")
    assert (record.prompt, record.chosen, record.rejected, record.margin) == (
        [TURNS[0]], [TURNS[1]], [assistant("Five.")], 2,
    )  # fmt: skip


LABELLED = {
    "question and answer": {"question": QUESTION, "answer": ANSWER, "label": 1},
    "messages": {"messages": TURNS, "label": True},
    "LLaMA-Factory's turns": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}],
        "kto_tag": True,
    },
    "LLaMA-Factory's alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER, "kto_tag": "true"},
    "a word": {"prompt": QUESTION, "completion": ANSWER, "label": "good"},
    "thumbs": {"prompt": QUESTION, "response": ANSWER, "thumbs_up": True},
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_answers_of_every_layout_come_out_the_same_and_are_refused_where_all_would_be_learned(name, tmp_path):
    row = LABELLED[name]
    (record,) = read(tmp_path, row, kind="labelled_completion")
    assert isinstance(record, LabelledCompletion)
    assert (record.prompt, record.completion, record.label) == (TURNS[:1], TURNS[1:], True)
    column = next(name for name in row if name in ("label", "kto_tag", "thumbs_up"))
    with pytest.raises(
        DataError, match=rf"{column} says which answers were liked.*\n.*columns='\{{{column}: unused\}}'"
    ):
        read(tmp_path, row)
    (kept,) = read(tmp_path, row, columns={column: "unused"})
    assert kept.messages == TURNS
    (prompt,) = read(tmp_path, row, kind="prompt")
    assert (prompt.messages, prompt.completion) == (TURNS[:1], ANSWER)


PAIR = {"prompt": QUESTION, "completion": ANSWER}
MIXED = {
    "turns": ([PAIR, PAIR, {"messages": TURNS}], 3, "messages .*It has messages, and no completion, prompt"),
    "the first row": ([{"messages": TURNS}, PAIR, PAIR], 1, "than that of rows.jsonl:2: messages"),
    "a label": ([PAIR, {**PAIR, "label": False}], 2, "labelled completions .*It has label"),
    "a label of another kind": ([{**PAIR, "label": "x"}] * 2 + [{**PAIR, "label": 0}], 3, "labelled completions"),
    "another pair": ([PAIR, {"instruction": "a", "output": "b"}], 2, "has no prompt, completion, as rows.jsonl:1 has"),
    "a misspelt column": ([PAIR, {"promt": "a", "completion": "b"}], 2, "has no prompt, .* it has completion, promt"),
    "text": ([PAIR, {"text": "a"}], 2, "plain text"),
    "text after transcripts": ([{"text": TRANSCRIPT}] * 2 + [{"text": "a"}], 3, "plain text"),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_row_of_another_layout_than_the_others_is_the_one_that_is_named(name, tmp_path):
    rows, number, message = MIXED[name]
    with pytest.raises(DataError, match=rf"^rows.jsonl:{number}\b.*{message}"):
        read(tmp_path, *rows)


def test_a_text_that_looks_like_a_transcript_among_texts_is_a_text_and_a_prompt_needs_no_answer(tmp_path):
    assert len(read(tmp_path, {"text": "a"}, {"text": TRANSCRIPT})) == 2
    with_and_without = read(tmp_path, PAIR, {"prompt": "b"}, kind="prompt")
    assert [record.completion for record in with_and_without] == [ANSWER, ""]


def test_an_answer_of_json_that_only_looks_like_turns_stays_a_text(tmp_path):
    answer = '[{"from": "Ann", "text": "Hi"}]'
    (record,) = read(tmp_path, {"prompt": QUESTION, "completion": answer})
    assert record.messages[1] == assistant(answer)


def test_labelled_completions_are_not_taken_for_answers_to_learn(tmp_path):
    row = {"prompt": QUESTION, "completion": "Five.", "label": False}
    (record,) = read(tmp_path, row, kind="labelled_completion")
    assert isinstance(record, LabelledCompletion)
    assert record.label is False
    with pytest.raises(DataError, match="look like labelled completions"):
        read(tmp_path, row)


def test_prompts_come_from_prompts_and_from_conversations_without_their_last_answer(tmp_path):
    for row in ({"prompt": QUESTION}, {"question": QUESTION, "answer": ANSWER}, {"messages": TURNS}):
        (record,) = read(tmp_path, row, kind="prompt")
        assert record.messages == [TURNS[0]]


def test_columns_are_renamed_before_anything_is_looked_at(tmp_path):
    row = {"Question": QUESTION, "Best Answer": ANSWER, "answer": "another"}
    (record,) = read(tmp_path, row, columns={"Question": "question", "Best Answer": "answer"})
    assert record.messages == TURNS


def test_a_column_that_is_not_there_is_a_settings_error_with_the_near_miss(tmp_path):
    with pytest.raises(SettingsError, match=r"no column 'Qestion'; found Best, Question.\nDid you mean Question\?"):
        read(tmp_path, {"Question": "a", "Best": "b"}, columns={"Qestion": "question"})
    with pytest.raises(SettingsError, match=r"Question cannot be 'quesion'. Did you mean question\?"):
        read(tmp_path, {"Question": "a", "Best": "b"}, columns={"Question": "quesion"})


def test_columns_nobody_could_guess_are_named_with_the_way_to_map_them(tmp_path):
    with pytest.raises(
        DataError, match=r"found columns q, reply; this recipe needs .*\n.*data.columns='\{my_question: prompt"
    ):
        read(tmp_path, {"q": "a", "reply": "b"})


def test_the_wrong_kind_names_what_it_looks_like_and_what_is_needed(tmp_path):
    row = {"prompt": QUESTION, "chosen": ANSWER, "rejected": "Five."}
    with pytest.raises(DataError, match=r"which look like preference .* needs prompt-completion rows"):
        read(tmp_path, row)
    with pytest.raises(DataError, match=r"needs preference rows"):
        read(tmp_path, {"question": QUESTION, "answer": ANSWER}, kind="preference")


BAD = {
    "null content": (TURNS[0] | {"content": None}, r" \(user\): content is null or missing; expected text"),
    "no content": ({"role": "user"}, r" \(user\): content is null or missing"),
    "a number": (TURNS[0] | {"content": 4}, r" \(user\): content is a number \('4'\); expected text"),
    "empty": (TURNS[0] | {"content": " "}, r" \(user\) has empty content"),
    "an image": (TURNS[0] | {"content": [{"type": "image"}]}, r" \(user\) has a part that is not text: 'image'"),
    "unknown role": (TURNS[0] | {"role": "narrator"}, r" has the unknown role 'narrator'.\nRoles: system, user"),
    "no role": ({"content": "a"}, r" has no role"),
    "no object": ("hello", r" is text \('hello'\); expected an object"),
    "a call without a name": ({"role": "assistant", "tool_calls": [{"function": {}}]}, r": a tool call has no name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_turn_is_an_error_with_file_row_and_turn(name, tmp_path):
    turn, message = BAD[name]
    with pytest.raises(DataError, match=r"^rows.jsonl:2: message 1" + message):
        read(tmp_path, {"messages": TURNS}, {"messages": [turn, TURNS[1]]})


def test_empty_messages_and_conversations_without_an_answer_are_errors(tmp_path):
    for row, message in (
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": None}, "expected a list of messages, found null"),
        ({"messages": [TURNS[0]]}, "no assistant turn, so nothing to learn; roles: user"),
    ):
        with pytest.raises(DataError, match=rf"rows.jsonl:2: {message}"):
            read(tmp_path, {"messages": TURNS}, row)
    with pytest.raises(DataError, match=r"rows.jsonl:2: answer: content is null or missing"):
        read(tmp_path, {"question": "a", "answer": "b"}, {"question": "a", "answer": None})
