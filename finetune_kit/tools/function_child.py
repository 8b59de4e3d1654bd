"""The process that a user's own tools run in: it imports the file, says the function's schema, then answers calls.

A line of JSON in ({"a": 1}, the arguments), a line out ({"result": …} or {"error": "…"}); what the function prints goes
to stderr. Started by functions.py as: python -m finetune_kit.tools.function_child FILE NAME [again]
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit.tools.tool import text_of


def imported(file: Path, name: str) -> Callable[..., Any]:
    """The function `name` of a file. Raises what the file raises, AttributeError where it has none."""
    sys.path.append(str(file.resolve().parent))  # last: nothing beside the file hides a library
    spec = importlib.util.spec_from_file_location(f"finetune_kit_tool_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise AttributeError(f"{file} has no function {name}")
    return function  # type: ignore[no-any-return]


def schema_of(function: Callable[..., Any]) -> dict[str, Any]:
    """transformers' own schema of a function with types and a docstring; what it gives back is not told the model."""
    from transformers.utils import get_json_schema

    schema: dict[str, Any] = get_json_schema(function)
    schema["function"].pop("return", None)
    return schema


def answer(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, str]:
    """What a call gives, as text; what it raises is text, too."""
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            raise TypeError("is async; write it without")
        return {"result": text_of(result)}
    except Exception as error:
        return {"error": text_of(f"{type(error).__name__}: {error}")}


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=out, flush=True)

    try:
        function = imported(Path(sys.argv[1]), sys.argv[2])
        say({"schema": schema_of(function) if len(sys.argv) == 3 else {}})
    except (Exception, SystemExit) as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    for line in sys.stdin:
        say(answer(function, json.loads(line)))


if __name__ == "__main__":
    main()
