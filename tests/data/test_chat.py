"""Masks, for any chat template: the answers and their end tokens are supervised, what precedes is what is served."""

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_kit.data.adapt import adapt
from finetune_kit.data.chat import end_token_ids, render_prompt, samples_of, truncate, untrainable
from finetune_kit.data.records import PromptCompletion, Text
from finetune_kit.data.template import dialect_of
from finetune_kit.data.token_ids import text_ids
from finetune_kit.errors import DataError
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import CHATML, assistant, bpe_tokenizer, conversation, made, spelled, user

# Templates as the model families publish them, written out here so that each oracle can be read beside its template.
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SILENT_SYSTEM = (  # a system turn is accepted and renders nothing
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (  # the prompt opens a thought that the history leaves out
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<User>' + message['content'] }}"
    "{% else %}{{ '<Assistant>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)

TWO_TURNS = (user("Hello there"), assistant("Hi!"), user("7 - 3?"), assistant("It is 4."))

_TRL = importlib.util.find_spec("trl")
assert _TRL is not None
assert _TRL.origin is not None
TRL_TEMPLATES = Path(_TRL.origin).parent / "chat_templates"
SHIPPED = sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
# Every token that the shipped templates write whole; the markers of thoughts are such tokens in those families too.
SHIPPED_TOKENS = """
    <BOS> </s> <|im_start|> <|im_end|> <|eot_id|> <|start_header_id|> <|end_header_id|> <|end|> <|user|> <|assistant|>
    <|system|> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|END_RESPONSE|> <|START_RESPONSE|> <end_of_turn>
    <start_of_turn> <turn|> <|turn> <|return|> <|start|> <|channel|> <|message|> <|call|> <end_of_utterance> <｜User｜>
    <｜Assistant｜> <｜end▁of▁sentence｜> <|eot|> <|eom|> <think> </think> <|observation|>
""".split()  # noqa: SIM905 - a list of forty strings would fill the page


def shipped(name: str):
    template = (TRL_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return bpe_tokenizer(template, SHIPPED_TOKENS, bos="<BOS>", eos="<EOS>")


@pytest.mark.parametrize("name", SHIPPED)
def test_in_every_template_trl_ships_exactly_the_answers_and_their_end_tokens_are_supervised(name):
    tokenizer = shipped(name)
    samples = made(conversation(*TWO_TURNS), tokenizer)
    spans = [(sample, span) for sample in samples for span in sample.turns]
    assert len(spans) == 2
    ends = end_token_ids(tokenizer)
    for (sample, (start, stop)), answer in zip(spans, ("Hi!", "It is 4."), strict=True):
        supervised = tokenizer.decode(sample.input_ids[start:stop])
        assert supervised.count(answer) == 1
        assert sample.input_ids[stop - 1] in ends
        # After the answer comes nothing but end tokens, and the user's words are nowhere in it.
        assert set(re.findall(r"<[^<>]*>|[^<>]+", supervised.partition(answer)[2])) <= {*SHIPPED_TOKENS, "<EOS>"}
        assert "Hello there" not in supervised
        assert "7 - 3?" not in supervised
    for sample in samples:
        assert all(label in (-100, index) for index, label in zip(sample.input_ids, sample.labels, strict=True))
        assert sum(label >= 0 for label in sample.labels) == sum(stop - start for start, stop in sample.turns)


@pytest.mark.parametrize("name", SHIPPED)
def test_in_every_template_trl_ships_the_tokens_before_an_answer_are_the_tokens_that_are_served(name):
    tokenizer = shipped(name)
    samples = made(conversation(*TWO_TURNS), tokenizer)
    prompts = [render_prompt(tokenizer, list(TWO_TURNS[:i])) for i in (1, 3)]
    starts = [(sample, start) for sample in samples for start, _ in sample.turns]
    assert [sample.input_ids[:start] for sample, start in starts] == prompts


def test_the_trl_templates_are_found():
    assert len(SHIPPED) >= 30


ORACLES = {
    "chatml": (
        bpe_tokenizer(),
        [
            "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦Hi!<|im_end|>⟧\n"
            "<|im_start|>user\n7 - 3?<|im_end|>\n<|im_start|>assistant\n⟦It is 4.<|im_end|>⟧"
        ],
    ),
    "llama-3": (
        bpe_tokenizer(
            LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|begin_of_text|>", "<|eot_id|>"
        ),
        [
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hi!<|eot_id|>⟧"
            "<|start_header_id|>user<|end_header_id|>\n\n7 - 3?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 4.<|eot_id|>⟧"
        ],
    ),
    "mistral": (
        bpe_tokenizer(MISTRAL, (), "<s>", "</s>"),
        ["<s>[INST] Hello there [/INST]⟦ Hi!</s>⟧[INST] 7 - 3? [/INST]⟦ It is 4.</s>⟧"],
    ),
    "gemma": (
        bpe_tokenizer(GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
        [
            "<bos><start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\n⟦Hi!<end_of_turn>⟧\n"
            "<start_of_turn>user\n7 - 3?<end_of_turn>\n<start_of_turn>model\n⟦It is 4.<end_of_turn>⟧"
        ],
    ),
    "qwen3, thinking: history loses its thoughts, so each turn is a sample": (
        bpe_tokenizer(
            (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8"),
            ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        ),
        [
            "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHi!<|im_end|>⟧",
            "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
            "<|im_start|>user\n7 - 3?<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 4.<|im_end|>⟧",
        ],
    ),
    "phi: the end token is <|end|>, not the eos at the very end": (
        bpe_tokenizer(PHI, ("<|user|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>"),
        [
            "<|user|>\nHello there<|end|>\n<|assistant|>\n⟦Hi!<|end|>⟧\n"
            "<|user|>\n7 - 3?<|end|>\n<|assistant|>\n⟦It is 4.<|end|>⟧"
        ],
    ),
    "deepseek-r1: the thought that the prompt opens is closed before the answer": (
        bpe_tokenizer(DEEPSEEK, ("<User>", "<Assistant>", "<think>", "</think>"), "<bos>", "<eos>"),
        [
            "<bos><User>Hello there<Assistant><think>\n⟦</think>\n\nHi!<eos>⟧",
            "<bos><User>Hello there<Assistant>Hi!<eos><User>7 - 3?<Assistant><think>\n⟦</think>\n\nIt is 4.<eos>⟧",
        ],
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_two_turns_are_masked_as_written_down_by_hand(name):
    tokenizer, expected = ORACLES[name]
    assert [spelled(sample, tokenizer) for sample in made(conversation(*TWO_TURNS), tokenizer)] == expected


@pytest.mark.parametrize("template", [GEMMA, SILENT_SYSTEM], ids=["refused", "rendered as nothing"])
def test_a_system_turn_the_template_has_no_place_for_heads_the_first_user_turn_and_is_noted(template):
    tokenizer = bpe_tokenizer(
        template, ("<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"), "<bos>", "<eos>"
    )
    record = conversation({"role": "system", "content": "Be kind."}, user("Hello"), assistant("Hi!"))
    notes: list[str] = []
    (sample,) = made(record, tokenizer, notes)
    assert "user\nBe kind.\n\nHello<" in spelled(sample, tokenizer)
    assert sample.input_ids[: sample.turns[0][0]] == render_prompt(tokenizer, record.messages[:2])
    assert notes == ["The chat template has no system turn: its text is put at the head of the first user turn."]


def test_a_thought_in_the_data_is_trained_where_the_prompt_opens_one():
    tokenizer, _ = ORACLES["deepseek-r1: the thought that the prompt opens is closed before the answer"]
    expected = "<bos><User>Hello<Assistant><think>\n⟦Be polite.\n</think>\n\nHi!<eos>⟧"
    apart = conversation(user("Hello"), assistant("Hi!", reasoning_content="Be polite."))
    inline = conversation(user("Hello"), assistant("<think>\nBe polite.\n</think>\n\nHi!"))
    assert [spelled(made(record, tokenizer)[0], tokenizer) for record in (apart, inline)] == [expected, expected]


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_8", "qwen3_5_think", "gptoss", "glm4moe", "nemotron_3_nano", "gemma4_v5"]
)
def test_a_thought_is_trained_the_same_whether_it_stands_apart_or_in_the_answer(name):
    tokenizer = shipped(name)
    apart = conversation(user("Hello"), assistant("Hi!", reasoning_content="Be polite."))
    inline = conversation(user("Hello"), assistant("<think>\nBe polite.\n</think>\n\nHi!"))
    (one,), (other,) = made(apart, tokenizer), made(inline, tokenizer)
    assert one.input_ids == other.input_ids
    assert "Be polite." in spelled(one, tokenizer).partition("⟦")[2]
    assert spelled(one, tokenizer).count("<think>") <= 1


def test_a_thought_the_template_does_not_render_is_noted():
    notes: list[str] = []
    made(conversation(user("Hello"), assistant("Hi!", reasoning_content="Be polite.")), bpe_tokenizer(), notes)
    assert notes == ["The chat template does not render reasoning_content here: it is not trained."]


def test_with_thinking_switched_off_qwen3_is_trained_on_what_it_will_be_served():
    tokenizer, _ = ORACLES["qwen3, thinking: history loses its thoughts, so each turn is a sample"]
    record = conversation(user("Hello"), assistant("Hi!", reasoning_content="Be polite."))
    (sample,) = made(record, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert spelled(sample, tokenizer).endswith("assistant\n<think>\n\n</think>\n\n⟦Hi!<|im_end|>⟧")


def test_a_template_without_an_end_token_gets_eos_and_each_turn_its_own_sample():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" \
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip
    tokenizer = bpe_tokenizer(template, (), eos="</s>")
    notes: list[str] = []
    samples = made(conversation(*TWO_TURNS), tokenizer, notes)
    assert [spelled(sample, tokenizer) for sample in samples] == [
        "user: Hello there\nassistant: ⟦Hi!</s>⟧",
        "user: Hello there\nassistant: Hi!\nuser: 7 - 3?\nassistant: ⟦It is 4.</s>⟧",
    ]
    assert len(notes) == 1


def test_where_tokens_merge_over_the_boundary_the_sample_still_begins_with_the_served_prompt():
    # The prompt ends "the answ", the answer continues "er is 4": a tokenizer of whole words would merge the two.
    template = "{% for m in messages %}{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}{% endfor %}"
    tokenizer = bpe_tokenizer(template, (), eos="</s>")
    question, answer = user("the answ"), assistant("er is 4")
    prompt = tokenizer("the answ")["input_ids"]
    assert tokenizer("the answer is 4")["input_ids"][: len(prompt)] != prompt, "the corpus no longer makes them merge"
    (sample,) = made(conversation(question, answer), tokenizer)
    assert sample.input_ids[: len(prompt)] == prompt
    assert spelled(sample, tokenizer) == "the answ⟦er is 4</s>⟧"


def test_a_doubled_bos_is_an_error():
    tokenizer = bpe_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML, bos="<s>")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the sample begins with two <s>"):
        made(conversation(*TWO_TURNS), tokenizer)


def test_a_template_that_changes_the_answer_is_an_error_with_both_texts():
    template = CHATML.replace("message['content']", "message['content'] | replace('4', '5')")
    with pytest.raises(DataError, match=r"rows.jsonl:1: the supervised text is not the answer.*It is 4.*It is 5"):
        made(conversation(*TWO_TURNS), bpe_tokenizer(template))


def test_a_refusal_of_the_template_is_passed_on_in_its_own_words_with_the_row():
    tokenizer, _ = ORACLES["mistral"]
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*Conversation roles must alternate"):
        made(conversation(user("a"), user("b"), assistant("c")), tokenizer)


def test_an_answer_may_contain_the_end_token_and_is_still_trained_whole():
    (sample,) = made(conversation(user("Write it"), assistant("<|im_end|> ends a turn")), bpe_tokenizer())
    assert spelled(sample, bpe_tokenizer()).endswith("⟦<|im_end|> ends a turn<|im_end|>⟧")


def test_train_on_last_and_the_train_flag_choose_the_turns():
    tokenizer = bpe_tokenizer()

    def trained(*messages, **settings):
        text = "".join(spelled(sample, tokenizer) for sample in made(conversation(*messages), tokenizer, **settings))
        return [piece.partition("<|im_end|>⟧")[0] for piece in text.split("⟦")[1:]]

    turns = (user("a"), assistant("one"), user("b"), assistant("two"))
    assert trained(*turns) == ["one", "two"]
    assert trained(*turns, train_on="last") == ["two"]
    assert trained(user("a"), assistant("one", train=False), user("b"), assistant("two")) == ["two"]
    assert trained(user("a"), assistant("one", train=True), user("b"), assistant("two"), train_on="last") == [
        "one",
        "two",
    ]
    assert trained(user("a"), assistant("one"), user("b"), assistant("", train=True)) == ["one"]


def test_why_a_conversation_cannot_be_trained_is_said():
    assert untrainable([user("a"), assistant("b")], "all") == ""
    assert untrainable([user("a"), assistant("  ")], "all") == "empty answer"
    assert untrainable([user("a"), assistant("b", train=False)], "all") == "no turn to train (train: false on each)"
    assert untrainable([assistant("b")], "all") == "nothing comes before the answer"


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Look outside.", "parameters": {"type": "object"}},
}
TOOL_TURNS = (
    user("Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    assistant("It is sunny."),
)


def test_tool_calls_a_template_ignores_are_written_as_text_and_noted():
    tokenizer, notes = bpe_tokenizer(), []
    (sample,) = made(conversation(*TOOL_TURNS, tools=[TOOL]), tokenizer, notes)
    text = spelled(sample, tokenizer)
    assert '⟦<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧' in text
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in text
    assert text.startswith("<|im_start|>system\nYou may call these tools:\n<tools>\n{")
    assert text.endswith("⟦It is sunny.<|im_end|>⟧")
    assert len(notes) == 2


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "llama3_1", "gptoss", "deepseekv3"])
def test_tool_calls_a_template_knows_are_written_its_own_way_and_supervised(name):
    tokenizer, notes = shipped(name), []
    samples = made(conversation(*TOOL_TURNS, tools=[TOOL]), tokenizer, notes)
    supervised = ["".join(tokenizer.decode(s.input_ids[a:b]) for a, b in s.turns) for s in samples]
    assert "get_weather" in "".join(supervised)
    assert "It is sunny." in "".join(supervised)
    assert "sunny" not in "".join(supervised).replace("It is sunny.", "")
    assert not any("tool calls" in note for note in notes)


def test_adapting_a_prefix_gives_a_prefix_so_that_serving_sees_what_training_saw():
    dialect = dialect_of(bpe_tokenizer(SILENT_SYSTEM))
    messages = [{"role": "system", "content": "Be kind."}, *TOOL_TURNS]
    whole, _ = adapt(messages, [TOOL], dialect)
    for stop in (2, 4):
        part, _ = adapt(messages[:stop], [TOOL], dialect)
        assert whole[: len(part)] == part


def test_templates_that_read_lists_of_parts_are_given_them():
    tokenizer = shipped("smolvlm")
    assert dialect_of(tokenizer).parts
    assert "Assistant:⟦ Hi!<end_of_utterance>⟧" in spelled(made(conversation(*TWO_TURNS), tokenizer)[0], tokenizer)


def test_a_cut_keeps_the_start_and_trains_no_end_token_of_a_cut_turn():
    tokenizer = bpe_tokenizer()
    (whole,) = made(conversation(*TWO_TURNS), tokenizer)
    start, stop = whole.turns[1]
    cut = truncate(whole, stop - 1)
    assert cut.input_ids == whole.input_ids[: stop - 1]
    assert cut.labels[-1] == whole.input_ids[stop - 2] != tokenizer.eos_token_id
    assert truncate(whole, start).turns == whole.turns[:1]
    assert truncate(whole, whole.turns[0][0]) is None
    assert truncate(whole, len(whole.input_ids)) is whole


words = st.text(st.sampled_from("ab 4é漢\n<|im_end|>.,"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_whatever_is_said_each_answer_comes_back_and_each_prompt_is_the_one_served(pairs):
    tokenizer = bpe_tokenizer()
    messages = [turn for question, answer in pairs for turn in (user(question), assistant(answer))]
    spans = [(sample, *span) for sample in made(conversation(*messages), tokenizer) for span in sample.turns]
    spans.sort(key=lambda span: span[1])
    assert len(spans) == len(pairs)
    for i, (sample, start, stop) in enumerate(spans):
        assert tokenizer.decode(sample.input_ids[start:stop]) == pairs[i][1] + "<|im_end|>"
        assert sample.input_ids[:start] == render_prompt(tokenizer, messages[: 2 * i + 1])


@settings(max_examples=60, deadline=None)
@given(words, st.integers(2, 40), st.booleans())
def test_text_is_cut_into_blocks_with_nothing_lost(text, max_length, ends):
    tokenizer = bpe_tokenizer()
    whole = text_ids(tokenizer, text) + ([tokenizer.eos_token_id] if ends else [])
    blocks = samples_of(Text("a.txt:1", text, ends), tokenizer, DataConfig(max_length=max_length))
    if len(whole) < 2:
        assert blocks == []
        return
    # each token but the first is predicted once; a block begins with the last token of the one before
    assert [index for block in blocks for index in block.labels if index != -100] == whole[1:]
    assert [block.input_ids[0] for block in blocks] == whole[: -1 : max_length - 1]
    assert all(1 < len(block.input_ids) <= max_length for block in blocks)
    assert all(block.labels == [-100, *block.input_ids[1:]] for block in blocks)


def test_the_end_tokens_are_the_templates_and_the_tokenizers():
    tokenizer, _ = ORACLES["phi: the end token is <|end|>, not the eos at the very end"]
    assert [tokenizer.decode([index]) for index in end_token_ids(tokenizer)] == ["<|end|>", "<|endoftext|>"]


def test_bare_strings_are_joined_as_they_are_and_end_with_eos():
    tokenizer = bpe_tokenizer(template=None)
    record = PromptCompletion(
        "a.jsonl:1", [user("the answ", plain=True), assistant("er is 4", plain=True)], as_strings=True
    )
    (sample,) = made(record, tokenizer)
    assert spelled(sample, tokenizer) == "the answ⟦er is 4<|im_end|>⟧"
    assert sample.input_ids[: sample.turns[0][0]] == render_prompt(tokenizer, record.messages[:1])


SYSTEM = {"role": "system", "content": "Be kind."}
LATE = {"role": "system", "content": "Be brief."}
FIRST_SYSTEM_ALONE = (  # one system turn at the beginning, all others are passed over in silence
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% endif %}" + SILENT_SYSTEM
)
LAST_SYSTEM_WINS = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}"
    "{% if ns.system %}{{ '<|im_start|>system\n' + ns.system + '<|im_end|>\n' }}{% endif %}" + SILENT_SYSTEM
)


def test_system_turns_that_the_template_shows_stay_where_they_are():
    notes: list[str] = []
    (sample,) = made(conversation(SYSTEM, LATE, user("a"), assistant("b"), LATE, user("c"), assistant("d")),
                     bpe_tokenizer(), notes)  # fmt: skip
    roles = re.findall(r"<\|im_start\|>(\w+)", spelled(sample, bpe_tokenizer()))
    assert roles == ["system", "system", "user", "assistant", "system", "user", "assistant"]
    assert notes == []


@pytest.mark.parametrize(
    "template", [FIRST_SYSTEM_ALONE, LAST_SYSTEM_WINS, SILENT_SYSTEM], ids=["first", "last", "none"]
)
@pytest.mark.parametrize(
    "turns",
    [
        (SYSTEM, LATE, user("a"), assistant("b")),
        (SYSTEM, user("a"), assistant("b"), LATE, user("c"), assistant("d")),
        (SYSTEM, user("a"), LATE, assistant("b")),
        (user("a"), assistant("b"), LATE, LATE, assistant("d")),
        (SYSTEM, user("a"), assistant("b"), user("c"), LATE, assistant("d")),
    ],
    ids=["two at first", "between", "before the answer", "alone", "behind the user's"],
)
def test_system_turns_that_the_template_passes_over_are_kept_as_text_and_noted(template, turns):
    tokenizer, notes = bpe_tokenizer(template), []
    (sample,) = made(conversation(*turns), tokenizer, notes)
    text = spelled(sample, tokenizer)
    for turn in turns:
        assert turn["content"] in text
    assert notes
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
    assert sample.input_ids[: sample.turns[-1][0]] == render_prompt(tokenizer, list(turns[:last]))
    assert len(sample.turns) == sum(turn["role"] == "assistant" for turn in turns)


@pytest.mark.parametrize("name", SHIPPED)
def test_in_every_template_trl_ships_every_turn_is_shown_or_the_row_is_refused_with_the_reason(name):
    tokenizer = shipped(name)
    turns = (
        SYSTEM,
        LATE,
        user("Hello"),
        assistant("Hi!"),
        LATE | {"content": "Be quick."},
        user("7 - 3?"),
        assistant("4"),
    )
    text = "".join(spelled(sample, tokenizer) for sample in made(conversation(*turns), tokenizer))
    assert all(turn["content"] in text for turn in turns)
    assert all(turn["content"] in tokenizer.decode(render_prompt(tokenizer, list(turns[:-1]))) for turn in turns[:-1])


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_template_that_leaves_a_turn_out_is_found_whoever_speaks(role):
    skips = f"{{% if not ('secret' in message['content'] and message['role'] == '{role}') %}}"
    template = CHATML.replace("{{ '<|im_start|>' + message", skips + "{{ '<|im_start|>' + message", 1).replace(
        "{% endfor %}", "{% endif %}{% endfor %}", 1
    )
    turns = [user("a secret q"), assistant("a secret answer"), user("c"), assistant("d")]
    with pytest.raises(DataError, match=rf"rows.jsonl:1: the chat template leaves out turn \d \({role}\)"):
        made(conversation(*turns), bpe_tokenizer(template), train_on="last")
    with pytest.raises(DataError, match="prompt: the chat template leaves out turn"):
        render_prompt(bpe_tokenizer(template), turns[:3])


def test_a_switch_that_a_template_takes_out_of_a_text_is_no_loss():
    template = CHATML.replace("message['content']", "message['content'] | replace('/no_think', '')")
    (sample,) = made(conversation(SYSTEM | {"content": "Be kind. /no_think"}, user("a"), assistant("b")),
                     bpe_tokenizer(template))  # fmt: skip
    assert "Be kind." in spelled(sample, bpe_tokenizer(template))


def test_of_named_templates_rows_with_tools_take_tool_use_and_the_others_the_default():
    tokenizer = bpe_tokenizer()
    tool_use = (TRL_TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = {"default": SILENT_SYSTEM, "tool_use": tool_use}
    notes: list[str] = []
    (with_tools,) = made(conversation(*TOOL_TURNS, tools=[TOOL]), tokenizer, notes)
    alone = bpe_tokenizer(tool_use)
    (expected,) = made(conversation(*TOOL_TURNS, tools=[TOOL]), alone)
    assert (with_tools.input_ids, notes) == (expected.input_ids, [])
    assert render_prompt(tokenizer, list(TOOL_TURNS[:3]), [TOOL]) == render_prompt(alone, list(TOOL_TURNS[:3]), [TOOL])
    assert with_tools.input_ids[: with_tools.turns[0][0]] == tokenizer.apply_chat_template(
        list(TOOL_TURNS[:1]), tools=[TOOL], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]  # fmt: skip
    (plain,) = made(conversation(*TWO_TURNS), tokenizer)
    assert plain.input_ids == made(conversation(*TWO_TURNS), bpe_tokenizer(SILENT_SYSTEM))[0].input_ids


def test_named_templates_without_a_default_are_refused_with_their_names():
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(DataError, match=r"several chat templates and none for these conversations.*rag"):
        made(conversation(*TWO_TURNS), tokenizer)
