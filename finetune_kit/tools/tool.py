"""What a tool is: a name, a schema, and what it gives back to arguments; and how a call is checked and carried out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST = 4000  # characters of a result that the model is given
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
    # names that data sets write for these
    "dict": (dict,),
    "float": (int, float),
    "tuple": (list,),
    "list": (list,),
    "bool": (bool,),
    "int": (int,),
    "str": (str,),
}


class ToolError(Exception):
    """Why a call gave no result, in words for the model, which continues with them."""


@dataclass(frozen=True)
class Tool:
    """`schema`: as transformers' get_json_schema makes it, {"type": "function", "function": {…}}.

    `call(arguments, seconds)` gives the result, any value of JSON, or raises ToolError; it keeps to `seconds` itself.
    `built_in`: it runs no code of the user's. `waits`: it may take long enough for other rows to continue meanwhile.
    """

    schema: dict[str, Any]
    call: Callable[[dict[str, Any], float], Any]
    built_in: bool = True
    waits: bool = True

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])


@dataclass(frozen=True)
class Outcome:
    """What came of one call: the `text` for the model, whether the call was `valid` (a known tool, arguments of its
    schema), whether it was carried out without an error, and the seconds that it took."""

    text: str
    valid: bool
    ok: bool
    seconds: float = 0.0


def carry_out(tools: dict[str, Tool], name: str, arguments: Any, seconds: float) -> Outcome:
    """Check a call and run it; whatever goes wrong is text for the model, and none of it raises."""
    tool = tools.get(name)
    if tool is None:
        known = ", ".join(tools) or "none"
        return Outcome(f"Error: there is no tool {name[:100]!r}; known: {known}", valid=False, ok=False)
    if wrong := misfit(arguments, tool.schema["function"].get("parameters") or {}):
        return Outcome(f"Error: {wrong}", valid=False, ok=False)
    started = time.perf_counter()
    try:
        text, ok = text_of(tool.call(arguments, seconds)), True
    except ToolError as error:
        text, ok = cut(f"Error: {error}"), False
    return Outcome(text, valid=True, ok=ok, seconds=time.perf_counter() - started)


def text_of(result: Any) -> str:
    """A result as the model is given it: a text as it is, any other value as JSON (`10.0`, `null`, `{"a": 1}`)."""
    if isinstance(result, str):
        return cut(result)
    try:
        return cut(json.dumps(result, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return cut(str(result))


def cut(text: str) -> str:
    """The text up to LONGEST characters, with a word on what was cut. Half characters, which no tokenizer takes, are
    question marks."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n[cut: {LONGEST:,} of {len(text):,} characters]"


def misfit(value: Any, schema: dict[str, Any], name: str = "arguments") -> str:
    """Why a value is none of its JSON schema (type, properties, required, items, enum, anyOf), in words; "" where it
    is. A keyword that is not among these does not refuse anything; an argument that the schema does not name does."""
    if options := schema.get("anyOf"):
        fits = any(not misfit(value, option, name) for option in options)
        return "" if fits else f"{name}: {_shown(value)} is none of what is expected"
    if "enum" in schema and value not in schema["enum"]:
        return f"{name}: expected one of {json.dumps(schema['enum'], ensure_ascii=False)}, found {_shown(value)}"
    wanted = schema.get("type")
    if value is None and schema.get("nullable"):
        return ""
    kinds = [kind for kind in (wanted if isinstance(wanted, list) else [wanted]) if kind in TYPES]
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{name}: expected {' or '.join(kinds)}, found {_shown(value)}"
    if isinstance(value, dict) and isinstance(schema.get("properties"), dict):
        return _misfit_object(value, schema, name)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        found = (misfit(item, schema["items"], f"{name}[{index}]") for index, item in enumerate(value))
        return next(filter(None, found), "")
    return ""


def _misfit_object(value: dict[str, Any], schema: dict[str, Any], name: str) -> str:
    properties = schema["properties"]
    if missing := [key for key in schema.get("required") or () if key not in value]:
        return f"{name}: {missing[0]} is missing"
    if unknown := [key for key in value if key not in properties and not schema.get("additionalProperties")]:
        return f"{name}: there is no {unknown[0][:100]!r}; known: {', '.join(properties) or 'none'}"
    inside = (misfit(part, properties[key], key) for key, part in value.items() if key in properties)
    return next(filter(None, inside), "")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which Python takes for a number
        return bool in TYPES[kind]
    if isinstance(value, float) and int in TYPES[kind] and float not in TYPES[kind]:
        return math.isfinite(value) and value.is_integer()  # 3.0 is a whole number in JSON
    return isinstance(value, TYPES[kind])


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
