"""What a chat template can do, found by looking at what it renders.

A probe conversation is rendered once per template. From it follows how an answer ends, and whether system turns, tools,
tool calls and tool results come out at all; adapt.py writes as text what would vanish, and the ledger says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune_kit.data.records import THOUGHTS, Message
from finetune_kit.data.rendering import render
from finetune_kit.errors import DataError, SecurityError

Note = Callable[[str], None]

# Set on a tokenizer that has none. The end token after each answer is what generation stops at.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one template writes a conversation.

    `template`: its text. `parts`: contents must be `[{"type": "text", "text": …}]`. `system`, `tools`: rendered at all;
    `several`, `late`: system turns behind the first one, and behind other turns. `calls`: arguments of
    a tool call as "object" or as JSON "string"; "text" where calls or results are not rendered.
    `reasoning`: the key of a message whose thought is rendered, "" if there is none. `tail`: what follows an
    answer that is the last turn; `end`: its beginning up to and with the end token, "" where there is none; its last
    token is `end_id`.
    """

    template: str
    parts: bool
    system: bool
    several: bool
    late: bool
    tools: bool
    calls: str
    reasoning: str
    tail: str
    end: str
    end_id: int | None


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are matched whole in any text (special and other added ones)."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}


def last_added(tokenizer: Any, text: str) -> int:
    """The id of the added token that a text ends with, the longest one."""
    tokens = added_tokens(tokenizer)
    return tokens[max((token for token in tokens if token and text.endswith(token)), key=len)]


def template_of(tokenizer: Any, tools: bool = False) -> str:
    """The chat template of conversations with or without tools, chosen of several as transformers does."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template(tools=[_PROBE_TOOL] if tools else None))
    except ValueError as error:
        raise DataError(
            f"The tokenizer has several chat templates and none for these conversations: {error}",
            "Name one of them `default`, or use another model: model.name_or_path=…",
        ) from None


def dialect_of(tokenizer: Any, kwargs: dict[str, Any] | None = None, tools: bool = False) -> Dialect:
    """The tokenizer's dialect, of conversations with tools where it has another template for those.

    Raises DataError where the template cannot render a question and an answer.
    """
    template = template_of(tokenizer, tools)
    return _probe(tokenizer, template, str(tokenizer.eos_token), json.dumps(kwargs or {}, sort_keys=True))


@lru_cache(maxsize=16)
def _probe(tokenizer: Any, template: str, eos: str, kwargs_json: str) -> Dialect:
    kwargs = json.loads(kwargs_json)

    def shown(messages: list[Message], words: list[str], tools: list[dict[str, Any]] | None = None) -> str:
        """The rendering if all `words` come out in it, else ""."""
        try:
            text = render(tokenizer, messages, tools, kwargs, template=template)
        except SecurityError:
            raise
        except Exception:  # a template is somebody else's program and may raise anything; it means "cannot"
            return ""
        return text if all(word in text for word in words) else ""

    question: Message = {"role": "user", "content": "ProbeQuestion"}
    answer: Message = {"role": "assistant", "content": "ProbeAnswer"}
    words, parts = ["ProbeQuestion", "ProbeAnswer"], False
    text = shown([question, answer], words)
    if not text:
        parts = True
        text = shown(as_parts([question, answer]), words)
    if not text:
        raise DataError(
            "The model's chat template does not render a user turn and an answer: "
            + _complaint(tokenizer, kwargs, template),
            "Give the tokenizer a working chat_template, or use another model: model.name_or_path=…",
        )
    write = as_parts if parts else list
    system: Message = {"role": "system", "content": "ProbeSystem"}
    late: Message = {"role": "system", "content": "ProbeLate"}
    thinking = [key for key in THOUGHTS if _shows_thought(shown, write, question, {**answer, key: "ProbeThought"})]
    has_system = bool(shown(write([system, question, answer]), [*words, "ProbeSystem"]))
    tail = text[text.rindex("ProbeAnswer") + len("ProbeAnswer") :]
    end = _leading_end(tail, list(added_tokens(tokenizer)))
    return Dialect(
        template=template,
        parts=parts,
        system=has_system,
        several=bool(shown(write([system, late, question, answer]), [*words, "ProbeSystem", "ProbeLate"])),
        late=all(
            shown(write([*first, *turns]), [*words, "ProbeLate", *(turn["content"] for turn in first)])
            for first in (([], [system]) if has_system else ([],))
            for turns in ([question, answer, late, question, answer], [question, late, answer])
        ),
        tools=bool(shown(write([question, answer]), [*words, "probe_tool"], [_PROBE_TOOL])),
        calls=_probe_calls(shown, write, question, answer),
        reasoning=thinking[0] if thinking else "",
        tail=tail,
        end=end,
        end_id=last_added(tokenizer, end) if end else None,
    )


def _shows_thought(shown: Callable[..., str], write: Callable[..., Any], question: Message, answer: Message) -> bool:
    return bool(shown(write([question, answer]), ["ProbeQuestion", "ProbeAnswer", "ProbeThought"]))


_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "ProbeDescription",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "ProbeKey"}}},
    },
}


def _probe_calls(shown: Callable[..., str], write: Callable[..., Any], question: Message, answer: Message) -> str:
    call = {"type": "function", "function": {"name": "probe_call", "arguments": {"probe_key": "ProbeValue"}}}
    messages = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ProbeResult"},
        answer,
    ]
    wanted = ["probe_call", "probe_key", "ProbeValue", "ProbeResult", "ProbeAnswer"]
    for form in ("object", "string"):
        if shown(write(with_ids(messages, as_string=form == "string")), wanted):
            return form
    return "text"


def _complaint(tokenizer: Any, kwargs: dict[str, Any], template: str) -> str:
    probe = [{"role": "user", "content": "ProbeQuestion"}, {"role": "assistant", "content": "ProbeAnswer"}]
    try:
        render(tokenizer, probe, None, kwargs, template=template)
    except SecurityError:
        raise
    except Exception as error:  # as above: the template's own words, whatever they are
        return str(error)
    return "the words do not come out."


def _leading_end(tail: str, tokens: list[str]) -> str:
    """`tail` up to and with the first run of adjacent added tokens, `<|end|>` of `<|end|>\\n<eos>`; "" if none."""
    starts = [(tail.index(token), -len(token), token) for token in tokens if token and token in tail]
    if not starts:
        return ""
    position, _, token = min(starts)
    stop = position + len(token)
    while following := [token for token in tokens if token and tail.startswith(token, stop)]:
        stop += len(max(following, key=len))
    return tail[:stop]


def prepare_tokenizer(tokenizer: Any, conversations: bool) -> list[str]:
    """Give a tokenizer without a chat template the fallback one, where the data are conversations; says so in words.

    It is set on the tokenizer, so it is saved and served with the model. Raises DataError without an end token.
    """
    if tokenizer.chat_template or not conversations:
        return []
    if not tokenizer.eos_token:
        raise DataError(
            "The tokenizer has neither a chat template nor an end token: no answer would ever end.",
            "Set tokenizer.eos_token in the model's folder, or use another model: model.name_or_path=…",
        )
    bos = "{{ bos_token }}" if bos_prefix(tokenizer) else ""
    tokenizer.chat_template = bos + FALLBACK_TEMPLATE
    return [
        "The tokenizer has no chat template. It was given a plain one (User: / Assistant: turns between blank lines, "
        f"{tokenizer.eos_token} after each answer), which is saved with the model."
    ]


def bos_prefix(tokenizer: Any) -> list[int]:
    """[bos id] where the tokenizer itself begins a plain text with it, else []."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id else []


def as_parts(messages: list[Message]) -> list[Message]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def with_ids(messages: list[Message], as_string: bool) -> list[Message]:
    """Calls numbered in order where the data have no ids (some templates demand nine characters), results to match."""
    written: list[Message] = []
    count, waiting = 0, []
    for message in messages:
        if message.get("tool_calls"):
            numbered = []
            for call in message["tool_calls"]:
                count += 1
                function = dict(call["function"])
                if as_string:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                numbered.append({"id": f"call{count:05d}", **call, "function": function})
            waiting = [call["id"] for call in numbered]
            message = {**message, "tool_calls": numbered}
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            message = {**message, "tool_call_id": waiting.pop(0)}
        written.append(message)
    return written
