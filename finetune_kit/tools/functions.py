"""A user's own Python function as a tool. It runs in processes of its own, so that a call that hangs can be ended and
nothing that it does to its process reaches the training."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from finetune_kit.errors import SettingsError
from finetune_kit.tools.tool import Tool, ToolError

STARTS = 120.0  # seconds that an import may take
PACKAGE = Path(__file__).parents[2]


def function_tool(source: str) -> Tool:
    """The tool of `my_tools.py:lookup`. Its schema is made from the function's types and docstring.

    Raises SettingsError where there is no such file or function, the import fails, or types or docstring are missing.
    """
    path, _, name = source.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"tools: {source}: no such file: {path}.", "Such as: tools=my_tools.py:lookup")
    try:
        first = _Worker(file, name)
    except ToolError as error:
        raise SettingsError(
            f"tools: {source}: {error}.",
            'It wants types and a docstring with "Args:" that says each argument, as transformers\' get_json_schema.',
        ) from None
    idle = [first]

    def call(arguments: dict[str, Any], seconds: float) -> Any:
        try:
            worker = idle.pop()
        except IndexError:
            worker = _Worker(file, name, "again")  # its schema is known, and takes transformers to be made
        try:
            return worker.call(arguments, seconds)
        finally:
            if worker.process.poll() is None:
                idle.append(worker)

    return Tool(first.schema, call, built_in=False)


class _Worker:
    """One process with the function. `schema`: the function's. Raises ToolError where it cannot be started."""

    def __init__(self, file: Path, name: str, *more: str) -> None:
        paths = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune_kit.tools.function_child", str(file), name, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": paths},
        )
        weakref.finalize(self, _Worker.end, self.process)
        assert self.process.stdout
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()
        said = self._next(STARTS)
        if "schema" not in said:
            raise ToolError(said.get("error", "its process ended"))
        self.schema: dict[str, Any] = said["schema"]

    def call(self, arguments: dict[str, Any], seconds: float) -> str:
        """The result as text. Raises ToolError with what the function raised, or where it takes too long."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(arguments) + "\n")
            self.process.stdin.flush()
        said = self._next(seconds)
        if "error" in said:
            raise ToolError(said["error"])
        return str(said["result"])

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            self.end(self.process)
            raise ToolError(f"it took more than {seconds:g} seconds") from None
        if not line:
            self.end(self.process)
            raise ToolError(f"its process ended with code {self.process.returncode}")
        found: dict[str, Any] = json.loads(line)
        return found

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        """End the process, if it still runs."""
        process.kill()
        process.wait()


def _read(out: IO[str], lines: queue.SimpleQueue[str]) -> None:
    """Hand on each line, and "" at the end."""
    for line in out:
        lines.put(line)
    lines.put("")
