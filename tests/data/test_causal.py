"""One rendering and one call of the tokenizer give what a rendering and a call for each prefix give."""

from typing import Any

import pytest

from finetune_kit.data import chat, token_ids
from finetune_kit.data.causal import Cuts, cuts_of, prefixes_of
from finetune_kit.data.load import load_data
from finetune_kit.data.rendering import render
from finetune_kit.settings.schema import DataConfig
from tests.fixtures_data import CHATML, assistant, bpe_tokenizer, user, write_jsonl

TURNS = [
    {"role": "system", "content": "Be brief."},
    user(" Hi \n"),
    assistant("\nHello!"),
    user("7 - 3?"),
    assistant("4"),
]
LOOP = "{% for message in messages %}"
FIRST = CHATML.replace(LOOP, LOOP + "{% if loop.first and messages[0]['role'] != 'system' %}S:\n{% endif %}", 1)
SLICED = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set said = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set said = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}"
    "{% if loop.index0 == 0 and said %}{% set text = said + '\n' + m['content'] %}{% else %}"
    "{% set text = m['content'] %}{% endif %}{{ '<|im_start|>' + text | trim + '<|im_end|>' }}{% endfor %}"
)
AHEAD = {
    "the last turn": "{% for m in messages %}{{ m.content }}{% if loop.last %}!{% endif %}{% endfor %}",
    "the next turn": "{% for m in messages %}{{ m.content }}{{ loop.nextitem is defined }}{% endfor %}",
    "how many turns": "{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}",
    "turns from behind": "{% for m in messages %}{{ m.content }}{{ messages[-1].content }}{% endfor %}",
    "a list of them": "{% set all = messages %}{% for m in messages %}{{ m.content }}{{ all }}{% endfor %}",
    "whether it asks": "{% for m in messages %}{{ m.content }}{{ add_generation_prompt }}{% endfor %}",
    "the last turn behind": "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[0].content }}",
    "two loops": "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}x{% endfor %}",
    "some turns": "{% for m in messages if m.role != 'x' %}{{ m.content }}{% endfor %}",
    "the clock": "{% for m in messages %}{{ m.content }}{{ strftime_now('%S') }}{% endfor %}",
    "what grows": "{% for m in messages %}{% set a = m.content + 'b' %}{% set c = a + a %}{{ c }}{% endfor %}",
    "a product": "{% for m in messages %}{{ m.content }}{{ 'a' * 9 }}{% endfor %}",
}


@pytest.mark.parametrize("template", [CHATML, FIRST, SLICED], ids=["chatml", "first", "sliced"])
def test_one_rendering_has_the_text_of_every_prefix(template: str) -> None:
    tokenizer = bpe_tokenizer(template)
    prefixes = prefixes_of(tokenizer, template, {})
    assert prefixes is not None
    for turns in (TURNS, TURNS[1:], TURNS[:3]):
        texts = prefixes.of(turns)
        assert texts is not None
        for stop in range(1, len(turns) + 1):
            assert texts[stop] + prefixes.opening == render(tokenizer, turns[:stop], None, {}, True, template)
            assert texts[stop] + prefixes.closing == render(tokenizer, turns[:stop], None, {}, False, template)


@pytest.mark.parametrize("template", AHEAD.values(), ids=AHEAD)
def test_a_template_that_looks_ahead_or_could_grow_is_rendered_for_each_prefix(template: str) -> None:
    assert prefixes_of(bpe_tokenizer(template), template, {}) is None


def test_turns_with_more_than_text_are_rendered_for_each_prefix() -> None:
    prefixes = prefixes_of(bpe_tokenizer(), CHATML, {})
    assert prefixes is not None
    assert prefixes.of([user("a"), assistant("b", reasoning_content="c")]) is None
    assert prefixes.of([user("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]) is None
    assert prefixes.of([user("a\U0010ffff"), assistant("b")]) is None


def test_the_ids_of_a_prefix_that_ends_in_a_special_token_are_read_off_the_ids_of_the_whole() -> None:
    tokenizer = bpe_tokenizer()
    prefixes = prefixes_of(tokenizer, CHATML, {})
    assert prefixes is not None
    cuts = cuts_of(tokenizer, prefixes.opening)
    assert cuts is not None
    texts = prefixes.of(TURNS)
    assert texts is not None
    whole = token_ids.ids_of(tokenizer, texts[5])
    for stop in (2, 4):
        prompt, both = texts[stop] + prefixes.opening, texts[stop + 1].rstrip("\n")
        assert cuts.before_answer(prompt, whole) == token_ids.ids_of(tokenizer, prompt)
        assert cuts.with_answer(both, whole) == token_ids.ids_of(tokenizer, both)


@pytest.mark.parametrize("other", ["<|im_start|>assistant", "|><|im", "start", ">x"])
def test_a_token_that_another_one_shares_characters_with_cuts_nothing(other: str) -> None:
    tokenizer = bpe_tokenizer(specials=("<|im_start|>", "<|im_end|>", other))
    assert cuts_of(tokenizer, "<|im_start|>assistant\n") is None


def test_a_template_without_a_token_before_the_answer_has_no_cuts() -> None:
    assert cuts_of(bpe_tokenizer(), "Assistant: ") is None


def test_rows_have_the_same_ids_and_labels_one_by_one_and_together(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"messages": [user(f"q {n}"), assistant("a" * (n % 9)), *([user("more"), assistant(f"b {n}")] * (n % 3))]}
        for n in range(1, 60)
    ]
    config = DataConfig(path=write_jsonl(tmp_path / "rows.jsonl", rows), max_length=60, max_lost=1)
    calls = []
    tokenizer = bpe_tokenizer()
    monkeypatch.setattr(
        token_ids, "ids_of_all", lambda t, texts: calls.append(texts) or [token_ids.ids_of(t, x) for x in texts]
    )
    fast = load_data(config, "prompt_completion", tokenizer)
    assert len(calls) == 2  # of the training rows, and of the held-out ones
    booked = fast.ledger.splits.values()
    assert sum(map(len, calls)) == sum(counts.rows - counts.dropped["empty answer"] for counts in booked)
    monkeypatch.setattr(chat, "prefixes_of", lambda *_: None)
    slow = load_data(config, "prompt_completion", bpe_tokenizer())
    for split in ("train", "held_out"):
        assert getattr(fast, split).to_dict() == getattr(slow, split).to_dict()
    assert fast.ledger == slow.ledger


def test_a_row_is_refused_before_the_ones_behind_it_whatever_their_faults(tmp_path: Any) -> None:
    template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('no') }}{% endif %}"
        "{{ '<|im_start|>' + m.content | replace('x', '') + '<|im_end|>' }}{% endfor %}"
    )
    rows = [{"prompt": f"q{n}", "completion": "yes"} for n in range(20)]
    rows += [{"prompt": "q", "completion": "axb"}, {"prompt": "no", "completion": "a"}]
    config = DataConfig(
        path=write_jsonl(tmp_path / "rows.jsonl", rows), held_out_path=write_jsonl(tmp_path / "h.jsonl", rows[:2])
    )
    with pytest.raises(chat.DataError, match=r"rows.jsonl:21: the supervised text is not the answer"):
        load_data(config, "prompt_completion", bpe_tokenizer(template))


def test_cuts_find_nothing_where_the_ids_are_of_another_text() -> None:
    cuts = Cuts({"<e>": 5}, "<e>", [7])
    assert cuts.before_answer("a<e>b<e>", [1, 5, 2]) is None
    assert cuts.with_answer("a", [1, 5]) is None
