"""Turns as people write them (OpenAI, ShareGPT, transcripts) to checked messages. Every refusal names row and turn."""

from __future__ import annotations

import ast
import json
import re
from typing import Any, TypeGuard

from finetune_kit.data.records import ROLES, THOUGHTS, Message
from finetune_kit.errors import DataError
from finetune_kit.system import parsing

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_KEPT = ("tool_call_id", "name")
EXCHANGES = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("question", "answer"))
_CONTENTS = ("content", "value", "text")
_FLAGS = ("train", "weight", "loss")
_CALLS = ("tool_calls", "function_call")
MEDIA = (
    *("image", "images", "image_url", "image_urls", "image_path", "image_paths"),
    *("audio", "audios", "video", "videos"),
)
ONLY_TEXT = "Text alone is trained, of models that read pictures or sound, too: remove the row, or the part."
_MARKS = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")


def messages_of(turns: Any, where: str) -> list[Message]:
    """A list of turns, `{role, content}` or `{from, value}`, as checked messages.

    Raises DataError naming `where` and the turn: not a list, empty, unknown role, content that is missing, null, empty
    or no text. An empty system turn is left out; an empty answer is kept (it is dropped and counted later).
    """
    turns = turns_in(turns)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse_json(turns, where)
    if not isinstance(turns, list):
        raise DataError(f"{where}: expected a list of messages, found {describe(turns)}.", _FIX)
    if not turns:
        raise DataError(f"{where}: the list of messages is empty.", "Give it at least a user and an assistant turn.")
    turns = [turn for item in turns for turn in exchange_of(item) or [item]]
    messages = [_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, start=1)]
    return [message for message in messages if message["role"] != "system" or message["content"].strip()]


def exchange_of(item: Any) -> list[dict[str, Any]]:
    """The turns of an item that is a question with its answer, {input, output}, and maybe a system text; [] of all
    other items."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return []
    names = next((pair for pair in EXCHANGES if isinstance(item.get(pair[0]), str) and pair[1] in item), None)
    if names is None:
        return []
    system = [{"role": "system", "content": item["system"]}] if item.get("system") else []
    return [*system, *({"role": role, "content": item[name]} for role, name in zip(ROLES[1:3], names, strict=True))]


def is_turn(item: Any) -> bool:
    """Whether a value is one turn of a conversation, whoever speaks and under whatever key he does."""
    if not isinstance(item, dict):
        return False
    named = item.get("role", item.get("from"))
    return isinstance(named, str) and any(name in item for name in (*_CONTENTS, *_CALLS))


def turns_in(value: Any, column: str = "") -> Any:
    """Turns that a table has as text, in JSON or as Python writes them, as a list; any other value as it is.

    What a `column` of plain text says is a text, and tools are none.
    """
    if column in ("text", "tools", "functions") or not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        turns = parsing.parse(value, strict=False)
    except parsing.NotJSON:
        try:
            turns = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    said = isinstance(turns, list) and turns and all(map(is_turn, turns))
    # the roles have to be known: an answer may be a list of letters, each with a `from` and a `text`
    known = said and all(str(turn.get("role", turn.get("from"))).strip().lower() in ROLE_NAMES for turn in turns)
    return turns if known else value


def in_turn(messages: list[Message], where: str, merge: bool) -> list[Message]:
    """A conversation that goes by turns: the user's first, and none after another one of the user's.

    What a chat template makes of others differs from model to model. `merge`: user turns in a row become one, with a
    blank line between them. Raises DataError for what is left.
    """
    kept: list[Message] = []
    for message in messages:
        last = kept[-1]["role"] if kept else "system"
        if message["role"] == "assistant" and not any(turn["role"] != "system" for turn in kept):
            raise DataError(
                f"{where}: the conversation begins with an assistant turn, which answers nothing.",
                "Write the user's turn before it, or remove the row.",
            )
        if message["role"] == last == "user":
            if not merge:
                raise DataError(f"{where}: two user turns in a row.", "Join such turns: data.merge_turns=true")
            kept[-1] = {**kept[-1], "content": f"{kept[-1]['content']}\n\n{message['content']}"}
            continue
        kept.append(message)
    return kept


_FIX = 'Expected: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {describe(turn)}; expected an object with role and content.", _FIX)
    named = turn.get("role", turn.get("from"))
    role = ROLE_NAMES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        known = ", ".join(name for name in ROLE_NAMES if name not in ROLES)
        found = "has no role" if named is None else f"has the unknown role {named!r}"
        raise DataError(f"{where} {found}.", f"Roles: {', '.join(ROLES)} (also understood: {known}).")
    check_media(turn, where)
    content = next((turn[name] for name in _CONTENTS if turn.get(name) is not None), None)
    thought = next((turn[name] for name in THOUGHTS if turn.get(name) is not None), None)
    if isinstance(content, list):
        content, inside = _thoughts_apart(content)
        thought = inside if thought is None else thought
    message: Message = {"role": role}
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": tool_calls_of(content, where)}
    else:
        calls = turn.get("tool_calls") or turn.get("function_call")
        if calls:
            message["tool_calls"] = tool_calls_of(calls, where)
        message["content"] = _content(content, role, bool(calls), where)
    message |= {name: turn[name] for name in _KEPT if turn.get(name) is not None}
    if thought is not None and thought != "":
        message[THOUGHTS[0]] = text_of(thought, f"{where} ({role}): its thought")
    flag = next((turn[name] for name in _FLAGS if turn.get(name) is not None), None)
    if flag is not None:
        if flag not in (0, 1):
            raise DataError(f"{where}: train is {flag!r}; expected true or false.")
        message["train"] = bool(flag)
    return message


def _thoughts_apart(parts: list[Any]) -> tuple[list[Any], str | None]:
    """(the other parts of a content, the text of those of type thinking or reasoning)."""
    kinds = ("thinking", "reasoning")
    said = [part for part in parts if isinstance(part, dict) and part.get("type") in kinds]
    texts = [
        next((part[key] for key in (part["type"], "text") if isinstance(part.get(key), str)), None) for part in said
    ]
    if not said or None in texts:
        return parts, None
    return [part for part in parts if part not in said], "\n\n".join(text for text in texts if text)


def unused_keys(turn: dict[str, Any]) -> list[str]:
    """Keys of a turn that say something which is in no message."""
    known: set[str] = {"role", "from", *_KEPT}
    for names in (_CONTENTS, THOUGHTS, _FLAGS, _CALLS):
        known.update([name for name in names if turn.get(name) is not None][:1])
    calls = next((turn[name] for name in _CALLS if turn.get(name)), None)
    inside = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [
        *(key for key, value in turn.items() if key not in known and value is not None and value not in ("", [], {})),
        *(f"tool_calls[].{key}" for call in inside for key in call if key not in _IN_A_CALL),
    ]


_IN_A_CALL = ("id", "type", "index", "function", "name", "arguments", "parameters")


def check_media(holder: dict[str, Any], where: str) -> None:
    """Raises DataError where a row or a turn has pictures or sound."""
    name = next((name for name in holder if holder[name] and str(name).lower() in MEDIA), "")
    if name:
        raise DataError(
            f"{where}: `{name}` holds what is not text, and without it the text says something else.",
            f"Remove the row, or train on the text alone: data.columns='{{{name}: unused}}'",
        )


def _content(content: Any, role: str, calls: bool, where: str) -> str:
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else describe(part)
                raise DataError(f"{where} ({role}) has a part that is not text: {kind!r}.", ONLY_TEXT)
        content = "".join(part["text"] for part in content)
    if content is None and calls:
        return ""
    if role == "tool" and isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    text = text_of(content, f"{where} ({role})")
    if role == "user" and not text.strip():
        raise DataError(f"{where} ({role}) has empty content.", "Remove the row, or write the turn.")
    return text


def side_of(value: Any, role: str, where: str) -> list[Message]:
    """One side of a pair: a list of turns, one turn, or text that is one."""
    if is_turn(value):
        value = [value]
    if isinstance(value, list):
        return messages_of(value, where)
    return [{"role": role, "content": text_of(value, where)}]


def text_of(value: Any, where: str) -> str:
    """`value` if it is text; DataError otherwise."""
    if isinstance(value, str):
        return value
    found = "null or missing" if value is None else describe(value)
    raise DataError(f"{where}: content is {found}; expected text.", "Remove the row, or write it as a string.")


def describe(value: Any) -> str:
    """A value's JSON type in words, with its beginning."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"


def tool_calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls from a list, one call or JSON, as `[{"type": "function", "function": {"name", "arguments": object}}]`."""
    if isinstance(value, str):
        value = parse_json(value, where)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a tool call has no name: {describe(call)}.", _CALL)
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: arguments of {function['name']}") if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where}: arguments of {function['name']} are {describe(arguments)}; expected an object.", _CALL
            )
        identity = {"id": call["id"]} if call.get("id") is not None else {}
        _check_numbers(arguments, f"{where}: arguments of {function['name']}")
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


_CALL = 'Expected: {"name": "…", "arguments": {…}}'


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Tools from a list or JSON text, each as `{"type": "function", "function": {…}}`; None if there are none."""
    if isinstance(value, str):
        value = parse_json(value, f"{where}: tools") if value.strip() else None
    if not value:
        return None
    definitions = value if isinstance(value, list) else [value]
    wrapped = []
    for tool in definitions:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: a tool has no name: {describe(tool)}.", 'Expected: {"name": "…", "parameters": {…}}'
            )
        _check_numbers(function, f"{where}: tool {function['name']}")
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return wrapped


def _check_numbers(value: Any, where: str) -> None:
    """Raises DataError for NaN, or a number too large for a float (1e999), which JSON cannot write."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise DataError(
            f"{where}: a number is infinite or NaN, which is not JSON.", "Write a number, or null."
        ) from None


def parse_json(text: str, where: str) -> Any:
    """JSON inside a column; DataError with its place in the text."""
    try:
        return parsing.parse(text, strict=False)
    except parsing.NotJSON as error:
        raise DataError(f"{where}: expected JSON, found {text[:40]!r} ({error.what}).") from None


def is_transcript(value: Any) -> TypeGuard[str]:
    """Text of the hh-rlhf kind: turns after `Human:` and `Assistant:`, each on a new paragraph."""
    if not isinstance(value, str):
        return False
    first = _MARKS.search(value)
    return first is not None and not value[: first.start()].strip() and "\n\nAssistant:" in value


def transcript_of(text: str, where: str) -> list[Message]:
    """Turns of a transcript; turns in a row by one speaker are joined by a blank line."""
    pieces = _MARKS.split(text)
    messages: list[Message] = []
    for speaker, said in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{said.strip()}".strip()
        else:
            messages.append({"role": role, "content": said.strip()})
    if not messages:
        raise DataError(f"{where}: no turn found; expected '\\n\\nHuman: …\\n\\nAssistant: …'.")
    return messages
