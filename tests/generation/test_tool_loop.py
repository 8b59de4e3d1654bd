# ruff: noqa: E501
"""The tool loop: a replayed conversation has the token ids of training, for any template, and rows don't wait in vain."""

import threading
import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_kit.data.calls import parse_calls, syntax_of
from finetune_kit.data.chat import end_token_ids, render_prompt, samples_of
from finetune_kit.errors import DataError
from finetune_kit.generation import tool_loop
from finetune_kit.generation.generate import generate
from finetune_kit.generation.tool_loop import answer_with_tools, sampling, turns_of
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.settings.schema import DataConfig
from finetune_kit.tools import tool
from finetune_kit.tools.tool import Tool, ToolError
from tests.data.test_chat import shipped
from tests.fixtures_data import assistant, bpe_tokenizer, conversation, user

RESULTS: list[Any] = ["24", 10.0, "", "a long <|im_end|> result, cut. " * 40, {"é": None}, -0.5]
ECHO = {
    "type": "function",
    "function": {
        "name": "echo",
        "description": "Give a result",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "description": "Which"}, "of": {"type": "string", "description": "What"}},
            "required": ["number"],
        },
    },
}  # fmt: skip
BOX = Toolbox({"echo": Tool(ECHO, lambda arguments, seconds: RESULTS[int(arguments["number"])], waits=False)})
# templates of ten families: JSON in marks, JSON alone, JSON behind a name, one marked piece an argument, text of ours
TEN = ["plain", "qwen2_5", "qwen3", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "lfm2_2_5", "gemma4", "phi3_5"]


def template(name: str) -> Any:
    return bpe_tokenizer() if name == "plain" else shipped(name)


def tiny(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()


def call(number: int, of: str = "x y") -> dict[str, Any]:
    return {"type": "function", "function": {"name": "echo", "arguments": {"number": number, "of": of}}}


def calling(*numbers: int, said: str = "") -> list[dict[str, Any]]:
    turns = [{"role": "tool", "name": "echo", "content": tool.text_of(RESULTS[number])} for number in numbers]
    return [assistant(said, tool_calls=[call(number) for number in numbers]), *turns]


class Script:
    """Draws, for each row, the next token that training has, and checks that all before it are training's."""

    def __init__(self, tokenizer: Any, conversations: list[list[dict[str, Any]]], model: Any = None) -> None:
        record = [conversation(*turns, tools=[ECHO]) for turns in conversations]
        self.samples = [
            [sample.input_ids[:stop] for sample in samples_of(row, tokenizer, DataConfig()) for _, stop in sample.turns]
            for row in record
        ]
        self.model, self.drawn = model, 0

    def __call__(self, logits: Any, rows: list[list[int]]) -> list[int]:
        tokens = []
        for place, ids in enumerate(rows):
            count = len(ids)
            fits = [part for row in self.samples for part in row if count < len(part) and part[:count] == ids]
            assert fits, "what the loop has written is not what training has"
            tokens.append(min(fits, key=len)[len(ids)])
            self.drawn += 1
            if self.model is not None:
                alone = self.model(input_ids=torch.tensor([ids])).logits[0, -1]
                torch.testing.assert_close(logits[place], alone, rtol=0, atol=1e-4)
        return tokens


@pytest.mark.parametrize("name", TEN)
def test_a_replayed_conversation_has_the_token_ids_of_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "LONGEST", 40)
    tokenizer = template(name)
    chats = [
        [user("Which?"), *calling(1), *calling(2), *calling(3), assistant("All of them.")],
        [user("And this?"), *calling(4), assistant("None.")],
        [user("No tool."), assistant("Indeed.")],
    ]
    assert "[cut: 40 of" in chats[0][6]["content"]
    script = Script(tokenizer, chats)
    asked = [(turns[:1], [ECHO]) for turns in chats]
    answers = answer_with_tools(
        tiny(tokenizer), tokenizer, asked, BOX, max_new_tokens=2000, end_token_ids=end_token_ids(tokenizer), draw=script
    )
    assert [len(answer.calls) for answer in answers] == [3, 1, 0]
    assert all(made.valid and made.ok for answer in answers for made in answer.calls)
    for answer, said in zip(answers, ("All of them.", "None.", "Indeed."), strict=True):
        assert answer.text.strip().endswith(said)
    assert all(answer.ended for answer in answers)
    for answer, samples in zip(answers, script.samples, strict=True):
        if answer.after:
            whole = samples[-1]
            assert whole[len(whole) - len(answer.after) :] == answer.after
            labels = [token for token, own in zip(answer.after, answer.own, strict=True) if own]
            assert labels[: len(answer.ids)] == answer.ids


@pytest.mark.parametrize("name", ["plain", "qwen2_5", "glm4moe", "deepseekv3"])
def test_several_calls_in_one_turn_are_carried_out_in_order(name: str) -> None:
    tokenizer = template(name)
    chats = [[user("Which?"), *calling(0, 1, said="Let me see."), assistant("Both.")]]
    script = Script(tokenizer, chats)
    ends = end_token_ids(tokenizer)
    answer = answer_with_tools(
        tiny(tokenizer), tokenizer, [(chats[0][:1], [ECHO])], BOX, max_new_tokens=500, end_token_ids=ends, draw=script
    )[0]
    assert [made.result for made in answer.calls] == ["24", "10.0"]
    assert answer.text.strip().endswith("Both.")


def test_the_cache_gives_the_logits_of_a_whole_pass_while_rows_stand_still_and_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "LONGEST", 30)
    tokenizer = template("plain")
    chats = [
        [user("Q"), *calling(3), assistant("One.")],
        [user("A longer question?"), *calling(0), *calling(1), assistant("Four.")],
        [user("None"), assistant("A plain answer.")],
    ]
    model = tiny(tokenizer)
    script = Script(tokenizer, chats, model)

    def slow(arguments: dict[str, Any], seconds: float) -> Any:
        time.sleep(0.02)
        return RESULTS[int(arguments["number"])]

    box = Toolbox({"echo": Tool(ECHO, slow)})
    ends = end_token_ids(tokenizer)
    asked = [(turns[:1], [ECHO]) for turns in chats]
    answers = answer_with_tools(model, tokenizer, asked, box, max_new_tokens=500, end_token_ids=ends, draw=script)
    assert [answer.text for answer in answers] == ["One.", "Four.", "A plain answer."]
    assert script.drawn > 60


def test_a_row_goes_on_while_the_tool_of_another_one_is_at_work() -> None:
    tokenizer, others_done = template("plain"), threading.Event()
    chats = [
        [user("Slow"), *calling(0), assistant("Late.")],
        [user("Quick"), assistant("A much longer answer at once.")],
    ]
    script = Script(tokenizer, chats)

    def blocked(arguments: dict[str, Any], seconds: float) -> Any:
        assert others_done.wait(30), "the other row waited for this tool"
        return RESULTS[0]

    def draw(logits: Any, rows: list[list[int]]) -> list[int]:
        tokens = script(logits, rows)
        for ids, token in zip(rows, tokens, strict=True):
            if [*ids, token] == script.samples[1][-1]:
                others_done.set()
        return tokens

    box, ends = Toolbox({"echo": Tool(ECHO, blocked)}), end_token_ids(tokenizer)
    asked = [(turns[:1], [ECHO]) for turns in chats]
    answers = answer_with_tools(
        tiny(tokenizer), tokenizer, asked, box, max_new_tokens=500, end_token_ids=ends, draw=draw
    )
    assert [answer.text for answer in answers] == ["Late.", "A much longer answer at once."]


def written(tokenizer: Any, *texts: str) -> Any:
    """A draw that writes these turns, whatever the logits."""
    turns = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    left = [token for turn in turns for token in turn]
    return lambda logits, rows: [left.pop(0) for _ in rows]


@pytest.mark.parametrize(
    ("turn", "result", "valid"),
    [
        ('<tool_call>{"name":"echo","arguments":{"number":0}}</tool_call>', "24", True),
        ('<tool_call>\n{"name": "echo", "arguments": {"number": 0', "Error: the call could not be read: its arguments are no JSON", False),
        ("<tool_call>\nnonsense\n</tool_call>", "Error: the call could not be read: it is not written as a call is", False),
        ('<tool_call>\n{"name": "echo", "arguments": [1]}\n</tool_call>', "Error: the call could not be read: its arguments are not an object", False),
        ('<tool_call>\n{"name": "eko", "arguments": {}}\n</tool_call>', "Error: there is no tool 'eko'; known: echo, fails", False),
        ('<tool_call>\n{"name": "echo", "arguments": {}}\n</tool_call>', "Error: arguments: number is missing", False),
        ('<tool_call>\n{"name": "fails", "arguments": {}}\n</tool_call>', "Error: on purpose", True),
    ],
)  # fmt: skip
def test_what_goes_wrong_comes_back_to_the_model_as_text(turn: str, result: str, valid: bool) -> None:
    tokenizer = template("plain")

    def fails(arguments: dict[str, Any], seconds: float) -> Any:
        raise ToolError("on purpose")

    schema = {"type": "function", "function": {"name": "fails", "parameters": {"type": "object", "properties": {}}}}
    box = Toolbox({**BOX.tools, "fails": Tool(schema, fails)})
    draw = written(tokenizer, f"{turn}<|im_end|>", "Done.<|im_end|>")
    answer = answer_with_tools(
        tiny(tokenizer), tokenizer, [([user("Q")], box.schemas)], box, max_new_tokens=300, end_token_ids=[], draw=draw
    )[0]
    assert [(made.result, made.valid) for made in answer.calls] == [(result, valid)]
    assert (answer.text, answer.ended) == ("Done.", True)
    shown = tokenizer.decode(answer.after)
    assert f"<|im_start|>user\n<tool_response>\n{result}\n</tool_response><|im_end|>" in shown
    assert turn in shown  # as the model wrote it


def test_calls_beyond_the_most_and_tokens_beyond_the_most_end_it() -> None:
    tokenizer, one = (
        template("plain"),
        '<tool_call>\n{"name": "echo", "arguments": {"number": 0}}\n</tool_call><|im_end|>',
    )
    box = Toolbox(BOX.tools, max_calls=2)
    asked = [([user("Q")], [ECHO])]
    draw = written(tokenizer, one, one, one, "Done.<|im_end|>")
    answer = answer_with_tools(tiny(tokenizer), tokenizer, asked, box, max_new_tokens=999, end_token_ids=[], draw=draw)[
        0
    ]
    assert [made.ok for made in answer.calls] == [True, True, False]
    assert answer.calls[2].result == "Error: no more than 2 calls in one answer"
    count = len(tokenizer(one)["input_ids"])
    draw = written(tokenizer, one, one, one)
    cut = answer_with_tools(
        tiny(tokenizer), tokenizer, asked, BOX, max_new_tokens=count + 5, end_token_ids=[], draw=draw
    )
    assert (len(cut[0].ids), cut[0].ended, len(cut[0].calls)) == (count + 5, False, 1)
    draw = written(tokenizer, one, one, one)
    room = answer_with_tools(
        tiny(tokenizer),
        tokenizer,
        asked,
        BOX,
        max_new_tokens=999,
        end_token_ids=[],
        draw=draw,
        positions=len(cut[0].after),
    )
    assert not room[0].ended


def test_a_tool_that_is_not_built_in_is_asked_for_and_may_be_refused() -> None:
    tokenizer, asked_for = template("plain"), []

    def allow(tool: Tool, arguments: dict[str, Any]) -> bool:
        asked_for.append((tool.name, arguments))
        return False

    own = Tool(ECHO, lambda arguments, seconds: pytest.fail("it ran"), built_in=False)
    one = '<tool_call>\n{"name": "echo", "arguments": {"number": 0}}\n</tool_call><|im_end|>'
    box, draw = Toolbox({"echo": own}, allow=allow), written(tokenizer, one, "No.<|im_end|>")
    answer = answer_with_tools(
        tiny(tokenizer), tokenizer, [([user("Q")], [ECHO])], box, max_new_tokens=300, end_token_ids=[], draw=draw
    )[0]
    assert asked_for == [("echo", {"number": 0})]
    assert answer.calls[0].result == "Error: the user does not allow this call"


def test_a_template_whose_calls_cannot_be_read_back_is_refused_and_so_is_none() -> None:
    with pytest.raises(DataError, match="cannot be read back"):
        syntax_of(shipped("muse_glimmer"))
    with pytest.raises(DataError, match="no chat template"):
        syntax_of(bpe_tokenizer(None))


@pytest.mark.parametrize(
    "text",
    ["Plain words.", 'An answer with {"name": "echo", "arguments": {}} in it.', "{}", "2 < 3", ""],
)  # fmt: skip
def test_an_answer_that_only_looks_like_a_call_is_an_answer(text: str) -> None:
    for name in ("plain", "llama3_1", "qwen3"):
        assert parse_calls(syntax_of(template(name)), text) == (text, [])


def test_turns_of_calls_are_those_of_data() -> None:
    made = tool_loop.Call("echo", {"number": 1}, "10.0", True, True, 0.1)
    answer, results = turns_of("So:", [made])
    assert [answer, *results] == [
        assistant("So:", tool_calls=[{"type": "function", "function": {"name": "echo", "arguments": {"number": 1}}}]),
        {"role": "tool", "name": "echo", "content": "10.0"},
    ]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_where_no_tool_is_called_the_answer_is_that_of_generate(penalty: float) -> None:
    tokenizer = template("plain")
    model, chats = tiny(tokenizer), [[user("Q")], [user("A longer question, which is padded.")]]
    prompts = [render_prompt(tokenizer, turns, [ECHO]) for turns in chats]
    ends = end_token_ids(tokenizer)
    plain = generate(model, tokenizer, prompts, max_new_tokens=12, end_token_ids=ends, repetition_penalty=penalty)
    draw = sampling(seed=0, do_sample=False, repetition_penalty=penalty)
    asked = [(turns, [ECHO]) for turns in chats]
    called = answer_with_tools(model, tokenizer, asked, BOX, max_new_tokens=12, end_token_ids=ends, draw=draw)
    assert [(one.ids, one.text, one.ended) for one in called] == [(one.ids, one.text, one.ended) for one in plain]


def test_samples_follow_from_the_seed_and_from_what_may_be_drawn() -> None:
    tokenizer = template("plain")
    model, asked = tiny(tokenizer), [([user("Q")], [ECHO])]

    def drawn(**settings: Any) -> list[int]:
        settings = {"seed": 1, **settings}
        return answer_with_tools(
            model, tokenizer, asked, BOX, max_new_tokens=12, end_token_ids=[], draw=sampling(**settings)
        )[0].ids

    assert drawn() == drawn() != drawn(seed=2)
    likeliest = drawn(do_sample=False)
    assert drawn(top_k=1) == drawn(top_p=1e-9) == drawn(min_p=1.0) == drawn(temperature=1e-6) == likeliest


def test_a_stop_text_ends_an_answer() -> None:
    tokenizer = template("plain")
    answer = answer_with_tools(
        tiny(tokenizer), tokenizer, [([user("Q")], [ECHO])], BOX, max_new_tokens=50, end_token_ids=[],
        draw=written(tokenizer, "One. STOP and more words that are not reached"), stop=["STOP"],
    )[0]  # fmt: skip
    assert (answer.text, answer.ended) == ("One. ", True)
