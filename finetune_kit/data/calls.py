"""How a chat template writes tool calls, learned from what it renders, and calls read out of what a model wrote.

A probe call is rendered once per template. What stands before its name, between name and arguments, and between two
calls is the template's syntax; arguments are JSON, JSON in a string, or one marked piece of text each.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune_kit.data.chat import written_turn
from finetune_kit.data.template import template_of
from finetune_kit.errors import DataError

_KEYS = ("probe_key", "probe_other")
_VALUES = ("ProbeValue", "ProbeOther")
_NUMBERS = (7531, 8642)
_MARK = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ParsedCall:
    """A call as the model wrote it. `error`: why it cannot be read, in words for the model; "" where it can."""

    name: str
    arguments: dict[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Pieces:
    """How arguments are written that are no JSON: what stands before the first key, between key and value, between a
    value and the next key, and behind the last value; and what a text among the values stands in, if anything."""

    first: str
    key_value: str
    following: str
    last: str
    quote: str


@dataclass(frozen=True)
class Syntax:
    """How one template writes calls.

    `head`: all up to a call's name; `between`: from a call's arguments to the next one's name; `middle`: from a name to
    its arguments; `pieces`: of arguments that are no JSON. `mark`: what no text has but a call, "" where there is none.
    `end_id`: the token that ends a turn with calls.
    """

    head: re.Pattern[str]
    middle: re.Pattern[str]
    between: re.Pattern[str] | None
    pieces: Pieces | None
    mark: str
    end_id: int


def syntax_of(tokenizer: Any, kwargs: dict[str, Any] | None = None) -> Syntax:
    """The syntax of a tokenizer's chat template. Raises DataError where its calls cannot be read back."""
    if not tokenizer.chat_template:
        raise DataError(
            "tools: the model's tokenizer has no chat template, so no turn of it can call one.",
            "Use a model with one: model.name_or_path=…",
        )
    template = template_of(tokenizer, True)
    return _learned(tokenizer, template, json.dumps(kwargs or {}, sort_keys=True))


def parse_calls(syntax: Syntax, text: str, schemas: list[dict[str, Any]] | None = None) -> tuple[str, list[ParsedCall]]:
    """(what the turn says before its calls, the calls). `text`: the turn with its special tokens, without its end.

    `schemas`: the tools', by whose types arguments are read that are no JSON.
    """
    start = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
    found = syntax.head.search(text, start)
    if found is None:
        broken = bool(syntax.mark) and syntax.mark in text[start:]
        said = text[start : text.index(syntax.mark, start)] if broken else text[start:]
        return _plain(said), [_unread("", "it is not written as a call is")] if broken else []
    content, calls, at = _plain(text[start : found.start()]), [], found.end()
    while True:
        call, at = _call(syntax, text, at, schemas)
        calls.append(call)
        following = None if call.error or not syntax.between else syntax.between.match(text, at)
        following = following or (None if syntax.head.pattern.startswith("^") else syntax.head.search(text, at))
        if following is None:
            return content, calls
        at = following.end()


def _plain(text: str) -> str:
    """What is said; "" where it holds marks of the template's own, which no content can be given."""
    return "" if re.search(r"<\|[^<>|]+\|>", text) else text.strip()


def _unread(name: str, why: str) -> ParsedCall:
    return ParsedCall(name or "unknown", {}, f"the call could not be read: {why}")


_NAME = re.compile(r"[\w.\-/]+")


def _call(syntax: Syntax, text: str, at: int, schemas: Any) -> tuple[ParsedCall, int]:
    """(the call whose name begins at a place, where its arguments end)."""
    named = _NAME.match(text, at)
    if named is None:
        return _unread("", "it has no name"), at
    name = named.group()
    middle = syntax.middle.match(text, named.end())
    if middle is None:
        return _unread(name, "its arguments do not follow its name"), named.end()
    if syntax.pieces:
        return _marked(syntax.pieces, text, name, middle.end(), schemas)
    try:
        arguments, end = _DECODER.raw_decode(text, middle.end())
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return _unread(name, "its arguments are no JSON"), middle.end()
    if not isinstance(arguments, dict):
        return _unread(name, "its arguments are not an object"), end
    return ParsedCall(name, arguments), end


def _marked(pieces: Pieces, text: str, name: str, at: int, schemas: Any) -> tuple[ParsedCall, int]:
    types = _types_of(name, schemas)
    arguments: dict[str, Any] = {}
    opening = pieces.first
    stop = f"(?={pieces.following}{_NAME.pattern}{pieces.key_value}|{pieces.last})"
    while True:
        key = re.compile(f"{opening}({_NAME.pattern}){pieces.key_value}").match(text, at)
        if key is None:
            return ParsedCall(name, arguments), at
        quoted = pieces.quote and re.compile(f"{pieces.quote}(.*?){pieces.quote}{stop}", re.DOTALL).match(
            text, key.end()
        )
        value = quoted or re.compile(f"(.*?){stop}", re.DOTALL).match(text, key.end())
        if value is None:
            return _unread(name, "an argument has no end"), key.end()
        arguments[key.group(1)] = value.group(1) if quoted else _typed(value.group(1), types.get(key.group(1)))
        at, opening = value.end(), pieces.following


def _types_of(name: str, schemas: Any) -> dict[str, Any]:
    for schema in schemas or ():
        function = schema.get("function", schema)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {key: part.get("type") for key, part in properties.items() if isinstance(part, dict)}
    return {}


def _typed(text: str, kind: Any) -> Any:
    """A value that is written without quotes: text where the schema wants text, else JSON where it is."""
    if kind in ("string", "str"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@lru_cache(maxsize=16)
def _learned(tokenizer: Any, template: str, kwargs_json: str) -> Syntax:
    kwargs = json.loads(kwargs_json)
    arguments = dict(zip(_KEYS, _VALUES, strict=True))

    def turn(names: list[str], given: dict[str, Any] = arguments) -> Any:
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name in names]
        question = {"role": "user", "content": "ProbeQuestion"}
        return written_turn(
            tokenizer, [question], {"role": "assistant", "content": "", "tool_calls": calls}, [_PROBE], kwargs
        )

    refusal = DataError(
        "tools: what the model's chat template makes of a tool call cannot be read back.",
        "Use another model: model.name_or_path=…",
    )
    one = turn(["probe_call"])
    text, name_at = one.completion, one.completion.find("probe_call")
    if name_at < 0:
        raise refusal
    name_end = name_at + len("probe_call")
    head = text[:name_at].rpartition("</think>")[2].lstrip()
    found = re.compile(r'(")?\{\s*\\*"probe_key').search(text, name_end)
    pieces = None
    if found:
        args_at = found.start()
        try:
            value, args_end = _DECODER.raw_decode(text, args_at)
        except ValueError:
            raise refusal from None
        if (json.loads(value) if isinstance(value, str) else value) != arguments:
            raise refusal
    else:
        found_texts = _parts(text, name_end, _VALUES)
        numbers = tuple(str(number) for number in _NUMBERS)
        plain = turn(["probe_call"], dict(zip(_KEYS, _NUMBERS, strict=True))).completion
        found_numbers = _parts(plain, plain.find("probe_call") + len("probe_call"), numbers)
        if found_texts is None or found_numbers is None:
            raise refusal
        quote = found_texts[1].removeprefix(found_numbers[1])
        args_at, args_end = name_end, text.find(_VALUES[1], name_end) + len(_VALUES[1]) + len(quote)
        first, key_value, following, last = map(_flexible, found_numbers)
        pieces = Pieces(first, key_value, following, last, re.escape(quote))
    try:
        both = turn(["probe_call", "probe_next"]).completion
    except DataError:  # a template that writes one call a turn
        both = ""
    second = both.find("probe_next")
    between = _between(both, text[:args_end], text[:name_at], second)
    mark = _MARK.match(head)
    anchored = r"^\s*" if head[:1] in "{[" and not mark else ""  # JSON alone is a call where it is all that is said
    syntax = Syntax(
        head=re.compile(anchored + _flexible(head)),
        middle=re.compile("" if pieces else _flexible(text[name_end:args_at])),
        between=re.compile(_flexible(between)) if between else None,
        pieces=pieces,
        mark=mark.group() if mark else "",
        end_id=one.end_id,
    )
    other = turn(["probe_next"]).completion
    if [(call.name, call.arguments) for call in parse_calls(syntax, other, [_PROBE])[1]] != [("probe_next", arguments)]:
        raise refusal
    return syntax


def _parts(text: str, at: int, values: tuple[str, ...]) -> tuple[str, str, str, str] | None:
    """What stands before, between and behind the probe's arguments of these values; None where they are not there."""
    words = (_KEYS[0], values[0], _KEYS[1], values[1])
    edges = [at]
    for word in words:
        place = text.find(word, edges[-1])
        if place < 0:
            return None
        edges += [place, place + len(word)]
    last = re.match(r"\s*<[^<>]+>|\s*\S", text[edges[-1] :])
    between = [text[edges[at] : edges[at + 1]] for at in (0, 2, 4)]
    return (between[0], between[1], between[2], last.group()) if last else None


def _between(both: str, first: str, before: str, second: int) -> str:
    """What stands between the first call's arguments and the second one's name, of a turn with both."""
    if second < 0 or not both.startswith(before):
        return ""
    at = next((place for place in range(len(first), len(before), -1) if both[:place] == first[:place]), 0)
    return both[at:second] if at == len(first) else ""


def _flexible(text: str) -> str:
    """A pattern of a text that leaves white space free, and numbers of calls."""
    text = re.sub(r"call0000\d", "\x00", text)
    pattern = ""
    for character in text:
        if character.isspace():
            continue
        one = r"[\w\-]+" if character == "\x00" else re.escape(character)
        pattern += rf"\s*{one}"
    trailing = r"\s*" if text and (text[-1].isspace() or text[-1] in ">:{[(") else ""
    return pattern + trailing


_PROBE = {
    "type": "function",
    "function": {
        "name": "probe_call",
        "description": "ProbeDescription",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": "A probe"} for key in _KEYS},
        },
    },
}
