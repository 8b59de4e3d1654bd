"""Rewrite a conversation so that a chat template of its dialect loses nothing of it."""

from __future__ import annotations

import json
from typing import Any

from finetune_kit.data.records import THOUGHTS, Message
from finetune_kit.data.rendering import silent
from finetune_kit.data.template import Dialect, Note, as_parts, with_ids


def adapt(
    messages: list[Message], tools: list[dict[str, Any]] | None, dialect: Dialect, note: Note = silent
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The conversation as this dialect can write it: what it has no words for becomes text, and `note` is told.

    A prefix of the conversation that stops before an assistant turn is adapted to a prefix of the result, so that
    serving sees what training saw.
    """
    calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if dialect.reasoning:
        messages = [_thought_apart(message) for message in messages]
    if tools and not dialect.tools:
        messages, tools = _tools_in_system(messages, tools), None
        note("The chat template ignores tools: they are listed in the system turn.")
    if calls and dialect.calls == "text":
        messages = _calls_as_text(messages)
        note("The chat template ignores tool calls or results: they are written as <tool_call> and <tool_response>.")
    elif calls:
        messages = with_ids(messages, as_string=dialect.calls == "string")
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if not dialect.late and any(message["role"] == "system" for message in messages[first:]):
        messages = [*messages[:first], *_late_in_user(messages[first:])]
        note("The chat template has no place for a late system turn: its text is put into the user turn beside it.")
    if first > 1 and not (dialect.system and dialect.several):
        joined = "\n\n".join(message["content"] for message in messages[:first])
        messages = [{**messages[0], "content": joined}, *messages[first:]]
        note("The chat template has one system turn: several in a row are joined by a blank line.")
    if not dialect.system and messages and messages[0]["role"] == "system":
        messages = _system_in_user(messages)
        note("The chat template has no system turn: its text is put at the head of the first user turn.")
    if dialect.reasoning and dialect.reasoning != THOUGHTS[0]:
        messages = [_renamed(message, THOUGHTS[0], dialect.reasoning) for message in messages]
    return (as_parts(messages) if dialect.parts else messages), tools


def _renamed(message: Message, old: str, new: str) -> Message:
    return {new if name == old else name: value for name, value in message.items()}


def _late_in_user(messages: list[Message]) -> list[Message]:
    """System turns as part of the user's turn that follows, or else of the one before, or else as one of the user's.

    Of a prefix that stops before an assistant turn it makes the same.
    """
    written: list[Message] = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "system":
            waiting.append(message["content"])
            if index + 1 < len(messages) and messages[index + 1]["role"] in ("system", "user"):
                continue
            if written and written[-1]["role"] == "user":
                written[-1] = {**written[-1], "content": "\n\n".join([written[-1]["content"], *waiting])}
            else:
                written.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        elif waiting:
            written.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            written.append(message)
    return written


def _thought_apart(message: Message) -> Message:
    """A thought written into the answer as `<think>…</think>`, moved to where the template reads thoughts."""
    before, closed, after = message["content"].partition("</think>")
    if message["role"] != "assistant" or not closed or message.get("reasoning_content"):
        return message
    return {**message, "content": after.lstrip(), "reasoning_content": before.strip().removeprefix("<think>").strip()}


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Calls as text of the assistant's turn, results as a user turn; results in a row share one turn."""
    written: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if index and messages[index - 1]["role"] == "tool":
                written[-1]["content"] += "\n" + result
            else:
                written.append({"role": "user", "content": result})
            continue
        if message.get("tool_calls"):
            blocks = [message["content"]] if message["content"] else []
            for call in message["tool_calls"]:
                function = {name: call["function"][name] for name in ("name", "arguments")}
                blocks.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            message["content"] = "\n".join(blocks)
        written.append(message)
    return written


def _tools_in_system(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        f"You may call these tools:\n<tools>\n{listed}\n</tools>\n"
        'To call one, answer with\n<tool_call>\n{"name": its name, "arguments": {…}}\n</tool_call>'
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": messages[0]["content"] + "\n\n" + text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _system_in_user(messages: list[Message]) -> list[Message]:
    system, rest = messages[0]["content"], messages[1:]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": system}, *rest]
