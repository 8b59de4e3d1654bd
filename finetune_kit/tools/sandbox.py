"""`python`: a program of the model's, run by a process that the operating system has shut in.

A process of its own with an empty environment, no open file but its three pipes, limits on time, memory, processes and
output, and behind Landlock and seccomp (sandbox_child.py), which no Python can talk its way out of. If the system
lacks them, it refuses. An interpreter made for it, pydantic-monty 1.4, was weighed: docs/tools.md says why not.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finetune_kit.errors import ResourceError
from finetune_kit.tools.tool import LONGEST, Tool, ToolError

CHILD = Path(__file__).with_name("sandbox_child.py")
MEMORY = 256 * 2**20  # bytes of addresses, the interpreter's 40 MiB among them
MOST_OUTPUT = 4 * LONGEST  # bytes that are read before the program is ended
REFUSED = 97  # as in sandbox_child.py
SHUT_IN = b"shut in\n"  # what the child says before it reads the program


def python_tool() -> Tool:
    """The tool. Raises ResourceError where this system cannot shut a process in."""
    try:
        run_python("1", 20.0)
    except ToolError as error:
        raise ResourceError(
            f"The tool python is not available here: {error}.",
            "It needs Linux 5.13 or later with Landlock and seccomp, on x86_64 or aarch64. Leave python out of tools.",
        ) from None
    return Tool(_SCHEMA, lambda arguments, seconds: run_python(arguments["code"], seconds))


def run_python(program: str, seconds: float) -> str:
    """What the program prints, with the value of its last line where that is an expression.

    Raises ToolError with its error, and where it takes more than `seconds`, the memory or the output that it may have.
    """
    if not sys.platform.startswith("linux"):
        raise ToolError(f"there is no Landlock and seccomp on {sys.platform}")
    command = [sys.executable, "-I", "-S", "-E", "-B", str(CHILD), str(math.ceil(seconds) + 1), str(MEMORY)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        close_fds=True,
        start_new_session=True,
    )
    try:
        output, errors, late = _talk(process, program.encode(errors="replace"), seconds)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
    if not errors.startswith(SHUT_IN):
        raise ToolError(_text(errors) or "the process ended before the program began")
    if late:
        raise ToolError(late)
    errors = errors.removeprefix(SHUT_IN)
    if process.returncode != 0:
        printed = f"{_text(output)}\n" if output else ""
        why = _text(errors) or f"the program was ended by signal {-process.returncode}"
        raise ToolError(f"{printed}{why}".strip())
    return _text(output)


def _talk(process: subprocess.Popen[bytes], program: bytes, seconds: float) -> tuple[bytes, bytes, str]:
    """(output, errors, why it was ended or "") of a process that is given a program."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    found = {process.stdout: b"", process.stderr: b""}
    until, left = time.monotonic() + seconds, memoryview(program)
    with selectors.DefaultSelector() as ready:
        for pipe in found:
            ready.register(pipe, selectors.EVENT_READ)
        ready.register(process.stdin, selectors.EVENT_WRITE)
        while any(key.fileobj in found for key in ready.get_map().values()):
            wait = until - time.monotonic()
            if wait <= 0:
                return found[process.stdout], found[process.stderr], f"the program took more than {seconds:g} seconds"
            for key, _ in ready.select(wait):
                if key.fileobj is process.stdin:
                    try:
                        left = left[process.stdin.raw.write(left[:4096]) or 0 :]  # type: ignore[attr-defined]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        ready.unregister(process.stdin)
                        with contextlib.suppress(OSError):
                            process.stdin.close()
                    continue
                new = key.fileobj.raw.read(65536)  # type: ignore[union-attr]
                found[key.fileobj] += new  # type: ignore[index]
                if not new:
                    ready.unregister(key.fileobj)
                if len(found[key.fileobj]) > MOST_OUTPUT:  # type: ignore[index]
                    why = f"the program wrote more than {MOST_OUTPUT:,} bytes"
                    return found[process.stdout], found[process.stderr], why
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, until - time.monotonic()))
        return found[process.stdout], found[process.stderr], ""
    return found[process.stdout], found[process.stderr], f"the program took more than {seconds:g} seconds"


def _text(output: bytes) -> str:
    return output.decode(errors="replace").strip()


_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "python",
        "description": "Run a Python program and return what it prints. It has no files and no network.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The program"}},
            "required": ["code"],
        },
    },
}
