"""Every column of a row is used or named, for every kind of record."""

import json

import pytest

from finetune_kit.data.load import Data, load_data, load_records
from finetune_kit.data.records import LabelledCompletion, Preference, PromptCompletion
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.settings.schema import DataConfig
from tests.data.test_chat import shipped
from tests.fixtures_data import assistant, bpe_tokenizer, made, spelled, user, write_jsonl

SYSTEM = {"role": "system", "content": "Be brief."}


def read(tmp_path, row, kind="prompt_completion", **settings):
    (record,) = load_records(write_jsonl(tmp_path / "rows.jsonl", [row]), DataConfig(**settings), kind)
    return record


def load(tmp_path, rows, kind="prompt_completion", **settings) -> Data:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load_data(DataConfig(path=path, held_out_size=0, **settings), kind, bpe_tokenizer())


# what a question and an answer are called in each kind of row, and how the record's turns come out
KINDS = {
    "prompt_completion": ({"question": "Why?", "answer": "So."}, lambda r: r.messages[:-1]),
    "instruction": ({"instruction": "Why?", "output": "So."}, lambda r: r.messages[:-1]),
    "bare": ({"prompt": "Why?", "completion": "So."}, lambda r: r.messages[:-1]),
    "instances": ({"instruction": "Why?", "instances": [{"output": "So."}]}, lambda r: r.messages[:-1]),
    "preference": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, lambda r: r.prompt),
    "ranked": ({"prompt": "Why?", "responses": ["So.", "No."], "scores": [2, 1]}, lambda r: r.prompt),
    "voted": ({"question": "Why?", "answer_0": "So.", "answer_1": "No.", "winner": "0"}, lambda r: r.prompt),
    "labelled_completion": ({"prompt": "Why?", "completion": "So.", "label": True}, lambda r: r.prompt),
    "prompt": ({"prompt": "Why?"}, lambda r: r.messages),
}
OTHERS = {name: name for name in ("preference", "labelled_completion", "prompt")}
OTHERS |= {"ranked": "preference", "voted": "preference"}


def kind_of(name):
    return OTHERS.get(name, "prompt_completion")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("system", ["system", "system_prompt", "system_message", "sys"])
def test_a_system_prompt_under_any_usual_name_becomes_a_turn_in_every_kind(name, system, tmp_path):
    row, turns = KINDS[name]
    record = read(tmp_path, {**row, system: "Be brief."}, kind_of(name))
    assert turns(record) == [SYSTEM, user("Why?")]


@pytest.mark.parametrize("name", KINDS)
def test_context_input_choices_and_earlier_turns_are_part_of_the_prompt_in_every_kind(name, tmp_path):
    row, turns = KINDS[name]
    more = {"history": [["Hi", "Hello!"]], "context": "A book.", "options": ["one", "two"]}
    said = turns(read(tmp_path, {**row, **more}, kind_of(name)))
    assert said[:2] == [user("Hi"), assistant("Hello!")]
    question = "question" in row
    asked = "A book.\n\nWhy?" if question else "Why?\n\nA book."
    assert said[2:] == [user(f"{asked}\nA. one\nB. two")]
    given = turns(read(tmp_path, {**row, "input": "A book."}, kind_of(name)))
    assert given == [user("Why?\n\nA book.")]


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_used_is_counted_and_named_once_in_every_kind(name, tmp_path):
    row, _ = KINDS[name]
    rows = [json.loads(json.dumps(row).replace("Why?", f"Why {i}?")) for i in range(4)]
    rows = [{**item, "source": "web", "difficulty": 3, "empty": ""} for item in rows]
    data = load(tmp_path, rows, kind_of(name))
    assert data.ledger.to_json()["unused_columns"] == {"source": 4, "difficulty": 4}
    notes = [note for note in data.ledger.notes if "difficulty (4 rows), source (4 rows)" in note]
    assert len(notes) == 1
    assert notes[0].startswith("given to rewards at most:" if name == "prompt" else "not used:")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("media", ["image", "images", "audio", "videos"])
def test_pictures_and_sound_are_refused_with_the_way_out_in_every_kind(name, media, tmp_path):
    row, turns = KINDS[name]
    with pytest.raises(DataError, match=rf"rows.jsonl:1: `{media}` holds what is not text.*\n.*{media}: unused"):
        read(tmp_path, {**row, media: ["a.png"]}, kind_of(name))
    kept = read(tmp_path, {**row, media: ["a.png"]}, kind_of(name), columns={media: "unused"})
    assert "a.png" not in str(turns(kept))  # what rewards are given has every column


def test_a_turn_with_pictures_is_refused_and_null_ones_are_not(tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl:1: message 1: `images` holds"):
        read(tmp_path, {"messages": [user("<image>", images=["a.png"]), assistant("b")]})
    assert read(tmp_path, {"messages": [user("a", images=None), assistant("b")], "images": []}).messages[0] == user("a")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought", "thoughts"])
def test_a_thought_in_a_column_or_in_a_turn_is_delivered_under_the_key_the_template_reads(key, tmp_path):
    column = read(tmp_path, {"question": "Why?", "answer": "So.", key: "Hm."})
    turn = read(tmp_path, {"messages": [user("Why?"), assistant("So.", **{key: "Hm."})]})
    assert column.messages == turn.messages == [user("Why?"), assistant("So.", reasoning_content="Hm.")]
    for name in ("qwen3", "gptoss"):  # which reads reasoning_content, and which thinking
        tokenizer, notes = shipped(name), []
        (sample,) = made(column, tokenizer, notes)
        assert "Hm." in spelled(sample, tokenizer).partition("⟦")[2], name
        assert notes == []


@pytest.mark.parametrize("key", ["cot", "Complex_CoT", "rationale", "chain_of_thought"])
def test_a_thought_in_a_column_of_another_name_is_one_too(key, tmp_path):
    record = read(tmp_path, {"Question": "Why?", "Answer": "So.", key: "Hm."})
    assert record.messages == [user("Why?"), assistant("So.", reasoning_content="Hm.")]


def test_columns_under_their_own_names_are_told_and_a_capital_image_is_one(tmp_path):
    rows = [{"Question": f"{i}?", "Answer": "a", "History": [], "Rating": 3} for i in range(4)]
    assert load(tmp_path, rows).ledger.unused_columns == {"Rating": 4}
    with pytest.raises(DataError, match=r"`Image` holds what is not text.*\n.*\{Image: unused\}"):
        read(tmp_path, {"Question": "a", "Answer": "b", "Image": "a.png"})


def test_a_thought_as_a_part_of_a_content_is_one_too(tmp_path):
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]
    record = read(tmp_path, {"messages": [user("Why?"), {"role": "assistant", "content": parts}]})
    assert record.messages[1] == assistant("So.", reasoning_content="Hm.")


def test_labelled_answers_have_their_thoughts_and_a_reason_for_a_preference_is_none(tmp_path):
    labelled = read(tmp_path, {**KINDS["labelled_completion"][0], "thinking": "Hm."}, "labelled_completion")
    assert isinstance(labelled, LabelledCompletion)
    assert labelled.completion == [assistant("So.", reasoning_content="Hm.")]
    data = load(tmp_path, [{**KINDS["preference"][0], "reasoning": "So is shorter."}], "preference")
    assert data.ledger.unused_columns == {"reasoning": 1}


def test_keys_of_turns_calls_and_answers_are_named_as_well(tmp_path):
    call = {"id": "1", "type": "function", "confidence": 1, "function": {"name": "look", "arguments": {}}}
    row = {"messages": [user("a", timestamp=7), assistant("", tool_calls=[call]), assistant("b", value="c")]}
    data = load(tmp_path, [row])
    assert data.ledger.unused_columns == {
        "messages[].timestamp": 1,
        "messages[].tool_calls[].confidence": 1,
        "messages[].value": 1,
    }
    answers = [{"response": "a", "score": 2, "model": "x"}, {"response": "b", "score": 1}]
    data = load(tmp_path, [{"prompt": "q", "completions": answers, "models": ["x", "y"]}], "preference")
    assert data.ledger.unused_columns == {"completions[].model": 1, "models": 1}


@pytest.mark.parametrize(
    "history",
    [
        [["Hi", "Hello!"]],
        [user("Hi"), assistant("Hello!")],
        json.dumps([["Hi", "Hello!"]]),
        "\n\nHuman: Hi\n\nAssistant: Hello!",
    ],
    ids=["pairs", "turns", "JSON", "a transcript"],
)
def test_earlier_turns_in_every_form_come_out_the_same(history, tmp_path):
    record = read(tmp_path, {"instruction": "Why?", "output": "So.", "history": history, "system": "Be brief."})
    assert record.messages == [SYSTEM, user("Hi"), assistant("Hello!"), user("Why?"), assistant("So.")]


def test_earlier_turns_that_cannot_be_read_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"history is text .*expected earlier turns.*\n.*\{history: unused\}"):
        read(tmp_path, {"instruction": "Why?", "output": "So.", "history": "we spoke"})


CHOICES = {
    "texts": {"choices": ["red", "blue"], "answer": 1},
    "labels and texts": {"choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answer": 1},
    "objects": {"options": [{"label": "A", "text": "red"}, {"label": "B", "text": "blue"}], "answer": "B. blue"},
    "by letter": {"options": {"A": "red", "B": "blue"}, "answer": "B. blue"},
    "one text": {"options": "\nA. red\nB. blue", "answer": "B. blue"},
    "ARC's and CommonsenseQA's": {"choices": {"label": ["A", "B"], "text": ["red", "blue"]}, "answerKey": "B"},
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_in_every_form_are_listed_below_the_question(name, tmp_path):
    record = read(tmp_path, {"question": "The sky?", **CHOICES[name]})
    assert record.messages == [user("The sky?\nA. red\nB. blue"), assistant("B. blue")]


KNOWN = {
    "HellaSwag": (
        {"ctx": "He", "ctx_a": "He", "endings": ["runs.", "is a pie."], "label": "0", "activity_label": "Run"},
        ("He\nA. runs.\nB. is a pie.", "A. runs."),
        {"ctx_a", "activity_label"},
    ),
    "OpenBookQA": (
        {"question_stem": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"},
        ("Why?\n1. so\n2. no", "2. no"),
        set(),
    ),
    "C-Eval": (
        {"question": "Why?", "A": "so", "B": "no", "C": "yes", "answer": "B"},
        ("Why?\nA. so\nB. no\nC. yes", "B"),
        set(),
    ),
    "SciQ": ({"question": "Why?", "correct_answer": "so", "distractor1": "no"}, ("Why?", "so"), {"distractor1"}),
    "SQuAD": (
        {"title": "T", "context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}},
        ("Ann ran.\n\nWho?", "Ann"),
        {"title"},
    ),
    "SQuAD, read by three": (
        {"context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann", "Ann", "An"], "answer_start": [0] * 3}},
        ("Ann ran.\n\nWho?", "Ann"),
        {"answers.text[1:]"},
    ),
    "WebGPT's question": (
        {"question": {"id": 1, "full_text": "Why?"}, "answer": "So."},
        ("Why?", "So."),
        {"question.id"},
    ),
    "PIQA": (
        {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        ("Open it.\nA. Pull.\nB. Push.", "B. Push."),
        set(),
    ),
    "WinoGrande": (
        {"sentence": "Ann saw Eve, and _ ran.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        ("Ann saw Eve, and _ ran.\nA. Ann\nB. Eve", "A. Ann"),
        set(),
    ),
    "BoolQ": (
        {"question": "did ann run", "passage": "Ann ran.", "answer": True, "title": "T"},
        ("Ann ran.\n\ndid ann run", "yes"),
        {"title"},
    ),
    "RACE": (
        {"article": "Ann ran.", "question": "Who?", "options": ["Eve", "Ann"], "answer": "B", "example_id": "1"},
        ("Ann ran.\n\nWho?\nA. Eve\nB. Ann", "B"),
        {"example_id"},
    ),
    "MedMCQA on the Hub": (
        {"question": "Why?", "opa": "so", "opb": "no", "opc": "c", "opd": "d", "cop": 0, "exp": "See."},
        ("Why?\nA. so\nB. no\nC. c\nD. d", "A. so"),
        {"exp"},
    ),
    "MedMCQA's first files": (
        {"question": "Why?", "opa": "so", "opb": "no", "opc": "c", "opd": "d", "cop": 4},
        ("Why?\nA. so\nB. no\nC. c\nD. d", "D. d"),
        set(),
    ),
    "TriviaQA": (
        {"question": "Who?", "answer": {"value": "Ann", "aliases": ["Ann", "Annie"], "type": "FreeForm"}},
        ("Who?", "Ann"),
        {"answer.aliases", "answer.type"},
    ),
    "AQuA": (
        {"question": "6 + 15?", "options": ["A)20", "B)21", "C)22"], "correct": "B"},
        ("6 + 15?\nA. 20\nB. 21\nC. 22", "B. 21"),
        set(),
    ),
    "options by letter": (
        {"question": "Why?", "Option A": "so", "option_b": "no", "answer": "B"},
        ("Why?\nA. so\nB. no", "B"),
        set(),
    ),
    "options by number": (
        {"question": "Why?", "option_1": "so", "option_2": "no", "option_3": "yes", "answer": 3},
        ("Why?\nA. so\nB. no\nC. yes", "C. yes"),
        set(),
    ),
    "a list of one answer": ({"question": "Why?", "answers": ["So."]}, ("Why?", "So."), set()),
    "a demonstration": ({"instruction": "Why?", "demonstration": "So."}, ("Why?", "So."), set()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_of_questions_are_read_as_what_they_say_and_the_rest_of_them_is_named(name, tmp_path):
    row, (question, answer), unused = KNOWN[name]
    data = load(tmp_path, [row])
    assert data.train_records[0].messages == [user(question), assistant(answer)]
    assert set(data.ledger.unused_columns) == unused
    prompt = read(tmp_path, row, "prompt")
    assert (prompt.messages, prompt.completion) == ([user(question)], answer)
    assert prompt.metadata == row


def test_a_question_without_an_answer_is_dropped_and_an_answer_that_is_many_texts_or_no_choice_is_refused(tmp_path):
    rows = [{"question": f"{n}?", "context": "C.", "answers": {"text": ["a"], "answer_start": [0]}} for n in range(3)]
    rows.append({"question": "Who?", "context": "C.", "answers": {"text": [], "answer_start": []}})
    assert load(tmp_path, rows, max_lost=0.5).ledger.train.dropped == {"empty answer": 1}
    with pytest.raises(DataError, match=r"rows.jsonl:1: answers is a list of 2 texts, which does not say whether one"):
        read(tmp_path, {"question": "Which?", "answers": ["red", "blue"]})
    with pytest.raises(DataError, match=r"rows.jsonl:1: answer_key is 'C'; the choices are A, B\."):
        read(tmp_path, {"question": "Which?", "choices": ["red", "blue"], "answerKey": "C"})


def test_the_number_of_a_choice_counts_from_where_the_file_shows_and_is_refused_where_it_does_not(tmp_path):
    def medical(*answers):
        choices = {"opa": "a", "opb": "b", "opc": "c", "opd": "d"}
        return [{"question": f"{n}?", **choices, "cop": answer} for n, answer in enumerate(answers)]

    def told(*answers):
        return [record.messages[-1]["content"] for record in load(tmp_path, medical(*answers)).train_records]

    assert told(1, 0, "2") == ["B. b", "A. a", "C. c"]
    assert told(1, 4) == ["A. a", "D. d"]
    data = load(tmp_path, medical(0, -1, 3), max_lost=0.5)
    assert (len(data.train), data.ledger.train.dropped) == (2, {"empty answer": 1})
    for unclear in ((1, 2), (0, 4)):
        with pytest.raises(
            DataError, match=rf"rows.jsonl:1: cop is {unclear[0]}, and nothing in the file says whether"
        ):
            load(tmp_path, medical(*unclear))
    with pytest.raises(DataError, match=r"rows.jsonl:1: label is 2, and there are 2 choices, from 0"):
        read(tmp_path, {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 2})


def test_a_score_on_a_scale_is_no_word_of_liking_and_0_and_1_are_by_a_setting(tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "a", "score": n % 2} for n in range(4)]
    with pytest.raises(DataError, match=r"score is a number on a scale, such as 0, and no word of liking") as caught:
        load(tmp_path, rows, "labelled_completion")
    assert "data.columns='{score: label}'" in caught.value.fix
    data = load(tmp_path, rows, "labelled_completion", columns={"score": "label"})
    assert data.train["label"] == [False, True, False, True]


def test_choices_that_the_question_lists_already_are_not_listed_again(tmp_path):
    data = load(tmp_path, [{"question": "red or blue?", "options": ["red", "blue"], "answer": "blue"}])
    assert data.train_records[0].messages[0] == user("red or blue?")
    assert data.ledger.unused_columns == {}
    labelled = {"question": "Which?\n(A) red\n(B) blue", "options": ["red", "blue"], "answer": 1}
    assert read(tmp_path, labelled).messages == [user("Which?\n(A) red\n(B) blue"), assistant("B. blue")]
    bare = read(tmp_path, {**labelled, "question": "red or blue?"})
    assert bare.messages[0] == user("red or blue?\nA. red\nB. blue")  # the answer names a label


def test_dolly_rows_keep_the_context_that_the_question_is_about(tmp_path):
    row = {"instruction": "Who?", "context": "Ann ran.", "response": "Ann.", "category": "qa"}
    record = read(tmp_path, row)
    assert isinstance(record, PromptCompletion)
    assert record.messages == [user("Who?\n\nAnn ran."), assistant("Ann.")]
    assert load(tmp_path, [row]).ledger.unused_columns == {"category": 1}


def test_a_column_called_unused_is_counted_and_not_named_and_two_cannot_have_one_name(tmp_path):
    rows = [{"question": f"{i}?", "answer": "a", "source": "web", "input": "x"} for i in range(4)]
    data = load(tmp_path, rows, columns={"source": "unused", "input": "unused"})
    assert data.train_records[0].messages[0]["content"] == "0?"
    assert data.ledger.unused_columns == {"source": 4, "input": 4}
    assert data.ledger.notes == []
    with pytest.raises(SettingsError, match="source and input cannot both be 'context'"):
        load(tmp_path, rows, columns={"source": "context", "input": "context"})


def test_a_column_that_another_one_takes_the_name_of_is_named(tmp_path):
    rows = [{"question": f"{i}?", "answer": "old", "better": "new"} for i in range(4)]
    data = load(tmp_path, rows, columns={"better": "answer"})
    assert data.ledger.unused_columns == {"answer": 4}


def test_bare_strings_stay_bare_beside_columns_that_are_not_used(tmp_path):
    assert read(tmp_path, {"prompt": "1 +", "completion": " 1", "id": 7}).as_strings
    assert not read(tmp_path, {"prompt": "1 +", "completion": " 1", "system": "Add."}).as_strings


def test_a_pair_of_whole_conversations_names_what_it_does_not_need(tmp_path):
    sides = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    row = {
        "prompt": "q",
        "prompt_id": "7",
        **sides,
        "messages": sides["chosen"],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    data = load(tmp_path, [row], "preference")
    (record,) = data.train_records
    assert isinstance(record, Preference)
    assert (record.prompt, record.margin) == ([user("q")], 5.0)
    assert data.ledger.unused_columns == {"prompt_id": 1, "messages": 1}


def test_plain_text_names_its_other_columns(tmp_path):
    data = load(tmp_path, [{"text": "some words here", "label": "pos", "id": "1"}])
    assert data.ledger.unused_columns == {"label": 1, "id": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_nulls_of_an_arrow_export_are_no_arguments_whatever_the_file(suffix, tmp_path):
    arguments = {"city": "Paris", "day": None}
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}, assistant("b")]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        import datasets

        datasets.Dataset.from_list([{"messages": messages}]).to_parquet(path)
    else:
        path.write_text(json.dumps({"messages": messages}))
    (record,) = load_records(str(path), DataConfig())
    assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
@pytest.mark.parametrize("form", ["object", "text"])
def test_a_number_too_large_for_a_float_in_a_call_or_a_tool_is_refused(number, form, tmp_path):
    arguments = f'{{"x": {number}}}' if form == "object" else json.dumps(f'{{"x": {number}}}')
    call = f'{{"function": {{"name": "look", "arguments": {arguments}}}}}'
    path = tmp_path / "rows.jsonl"
    turns = f'[{{"role": "user", "content": "q"}}, {{"role": "assistant", "tool_calls": [{call}]}}]'
    path.write_text(f'{{"messages": {turns}}}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*(a number is infinite or NaN|beyond what a number can hold)"):
        load_records(str(path), DataConfig())


@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n{"text": "b"}\n', '\n[{"text": "a"}]', '{"messages": []}'], ids=["rows", "list", "one"]
)
def test_json_rows_under_a_name_of_plain_text_are_refused(text, tmp_path):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(DataError, match=r"rows.txt holds rows of JSON.*\n.*mv rows.txt rows.json"):
        load_records(str(tmp_path / "rows.txt"), DataConfig())


def test_prose_that_begins_with_a_brace_is_plain_text_and_a_nul_in_it_is_named(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("{a} is a set\n[1] says so\n")
    assert load_records(str(path), DataConfig())[0].text.startswith("{a}")
    path.write_text("one\ntw\0o\n")
    with pytest.raises(DataError, match=r"rows.txt: a binary file, not text: byte 7 is 0"):
        load_records(str(path), DataConfig())


@pytest.mark.parametrize("last", [user("And now?"), {"role": "tool", "content": "21"}])
def test_a_conversation_that_waits_for_an_answer_is_a_prompt_with_its_last_turn(last, tmp_path):
    turns = [user("Hi"), assistant("Hello!"), last]
    record = read(tmp_path, {"messages": turns, "system": "Be brief.", "answer": 4}, "prompt")
    assert (record.messages, record.completion) == ([SYSTEM, *turns], "4")
    answered = read(tmp_path, {"messages": turns[:2], "answer": 4}, "prompt")
    assert (answered.messages, answered.completion) == ([user("Hi")], "Hello!")
    with pytest.raises(DataError, match="no assistant turn, so nothing to learn"):
        read(tmp_path, {"messages": [user("Hi")]})


def test_the_right_answer_of_a_prompt_with_choices_is_the_text_of_the_choice_and_a_number_that_is_none_stays(tmp_path):
    row = {"question": "Why?", "choices": ["one", "two"]}
    found = [read(tmp_path, {**row, "answer": answer}, "prompt").completion for answer in (1, 7, "two")]
    assert found == ["B. two", "7", "two"]
    assert read(tmp_path, {**row, "answer": 1}).messages[-1] == assistant("B. two")


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_an_empty_prompt_is_refused_in_every_kind(blank, tmp_path):
    for name in KINDS:
        row = {
            key: blank if key in ("prompt", "question", "instruction") else value
            for key, value in KINDS[name][0].items()
        }
        with pytest.raises(DataError, match=r"the prompt is empty|share no prompt"):
            read(tmp_path, row, kind_of(name))
    whole = {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    pair = read(tmp_path, {"prompt": blank, **whole}, "preference")
    assert (pair.prompt, pair.chosen) == ([user("Why?")], [assistant("So.")])


def test_functions_are_tools_and_a_system_column_of_parts_is_its_text(tmp_path):
    turns = [user("Why?"), assistant("So.")]
    tool = {"name": "look", "parameters": {}}
    record = read(tmp_path, {"messages": turns, "functions": [tool], "system": [{"text": "Be"}, {"text": "brief."}]})
    assert record.tools == [{"type": "function", "function": tool}]
    assert record.messages == [{"role": "system", "content": "Be\n\nbrief."}, *turns]


def test_rows_that_are_single_turns_of_a_tree_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"one turn \(prompter\) of a conversation"):
        read(tmp_path, {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hello"})
