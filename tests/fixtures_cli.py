"""The command line: `cli` in this process, `python` as a process of its own."""

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from finetune_kit.cli.main import main

ROOT = Path(__file__).parents[1]


@dataclass
class Said:
    """What a command ended with and said."""

    code: int
    out: str
    err: str


def cli(*words: str | Path) -> Said:
    """`finetune_kit WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["finetune_kit", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    return Said(int(code), out.getvalue(), err.getvalue())


def python(*words: str | Path, cwd: Path, **environment: str) -> Said:
    """`python WORDS` in a process of its own, with warnings and threads as a user has them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    return Said(done.returncode, done.stdout, done.stderr)
