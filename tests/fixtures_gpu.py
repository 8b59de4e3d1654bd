"""A bfloat16 GPU's arithmetic on a CPU: products of trainers, measuring and 4-bit weights in bfloat16, frozen weights
in bfloat16, trained ones in float32."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from finetune_kit.models import device
from finetune_kit.runs import verify


@contextlib.contextmanager
def bfloat16_gpu() -> Iterator[None]:
    """In here the device computes in bfloat16. One switch, which everything asks."""
    with mock.patch.object(device, "_has_bfloat16_units", return_value=True):
        yield


@contextlib.contextmanager
def reloading_here(seen: list[dict[str, Any]]) -> Iterator[None]:
    """The fresh process's own program runs in this one, which takes a tenth of its time; `seen`: what it was given."""

    def run(program: Path, argument: str, _: dict[str, str]) -> tuple[int, str]:
        seen.append(json.loads(argument))
        argv, path = mock.patch.object(sys, "argv", ["-c", argument]), mock.patch.object(sys, "path", [*sys.path])
        with argv, path, mock.patch.dict(sys.modules):
            exec(compile(program.read_text(), str(program), "exec"), {"__name__": "__main__"})  # our own text
        return 0, ""

    with mock.patch.object(verify, "in_a_fresh_process", run):
        yield


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return content
