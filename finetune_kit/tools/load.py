"""Tools from their names: calculator, python, search:<folder or file>, my_tools.py:function."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.tools.calculator import Refused, calculate
from finetune_kit.tools.tool import Tool, ToolError

KNOWN = "Known: calculator, python, search:<folder or file>, my_tools.py:function."
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Compute an arithmetic expression exactly.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "Such as 17 * (3 + 4) / 2"}},
            "required": ["expression"],
        },
    },
}


def load_tools(sources: Sequence[str]) -> dict[str, Tool]:
    """The tools by the names that a model calls them by, in order.

    Raises SettingsError (no such tool, two of one name), ResourceError (a package, or a sandbox, that is not there).
    """
    tools: dict[str, Tool] = {}
    for source in sources:
        tool = _loaded(source)
        if tool.name in tools:
            raise SettingsError(f"tools: two of them are called {tool.name}.", "Give each another name.")
        tools[tool.name] = tool
    return tools


def is_built_in(source: str) -> bool:
    """Whether a tool runs no code of the user's own."""
    return source in ("calculator", "python") or source.startswith("search:")


@cache
def _loaded(source: str) -> Tool:
    """Once a process: rows are read, and answers are measured, with the same tool."""
    return _load(source)


def _load(source: str) -> Tool:
    if source == "calculator":
        return Tool(CALCULATOR, _calculate, waits=False)
    if source == "python":
        from finetune_kit.tools.sandbox import python_tool

        return python_tool()
    if source.startswith("search:"):
        from finetune_kit.tools.search import search_tool

        return search_tool(source.removeprefix("search:"))
    path, _, name = source.rpartition(":")
    if path.endswith(".py") and name.isidentifier():
        from finetune_kit.tools.functions import function_tool

        return function_tool(source)
    near = difflib.get_close_matches(source, ("calculator", "python", "search:docs"), n=1)
    raise SettingsError(f"tools: there is no tool {source!r}.", f"Did you mean {near[0]}? {KNOWN}" if near else KNOWN)


def _calculate(arguments: dict[str, Any], seconds: float) -> str:
    """No time limit: the sizes of all numbers are bounded."""
    try:
        return calculate(arguments["expression"])
    except Refused as error:
        raise ToolError(str(error)) from None
