"""SIGTERM ends every command with 75 (resumable) or 143 and SIGINT with 130, wherever it comes, and as nothing else."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_kit.cli import main as command_line
from finetune_kit.system import signals
from tests.fixtures_cli import Said, cli, python

# `AT NUMBER WORDS`: the command, which gets the signal when it imports AT, or calls it (module:function)
SCRIPT = """
import importlib, importlib.abc, os, runpy, sys
at, number = sys.argv.pop(1), int(sys.argv.pop(1))
module, _, function = at.partition(":")
class Importing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), number)
if function:
    home = importlib.import_module(module)
    whole = getattr(home, function)
    def calling(*given, **named):
        os.kill(os.getpid(), number)
        return whole(*given, **named)
    setattr(home, function, calling)
else:
    sys.meta_path.insert(0, Importing())
runpy.run_module("finetune_kit", run_name="__main__", alter_sys=True)
"""
TINY = ("model.name_or_path=tiny", "data.path=rows.jsonl", "max_steps=2", "evaluate.size=2", "output_dir=run")
SHORT = (*TINY, "held_out_size=3", "evaluate.bootstrap_samples=20", "evaluate.general_text=false")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


def signalled(home: Path, at: str, number: int, *words: str | Path) -> Said:
    said = python("-c", SCRIPT, at, str(int(number)), *words, cwd=home)
    assert "Traceback" not in said.err
    assert "error: " not in said.err
    assert f"stopped: by {signal.Signals(number).name}" in said.err
    return said


@pytest.fixture(autouse=True)
def _no_run_was_before() -> None:
    signals.resumable(False)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_the_command_line_is_imported_ends_list(home: Path, number: signal.Signals) -> None:
    assert signalled(home, "typer", number, "list").code == CODES[number]


def test_a_signal_while_check_imports_transformers_is_no_broken_model(home: Path) -> None:
    assert signalled(home, "transformers.models.llama", signal.SIGINT, "check", "lora_sft", *TINY).code == 130


def test_a_signal_before_a_run_has_begun_ends_it_with_75_and_leaves_nothing(home: Path) -> None:
    said = signalled(home, "finetune_kit.models.load:load_base", signal.SIGTERM, "run", "lora_sft", *SHORT)
    assert said.code == 75
    assert "before its first checkpoint, so that it starts over, with the same command: python -m" in said.err
    assert sorted(path.name for path in home.iterdir()) == ["rows.jsonl", "tiny"]


@pytest.mark.long
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    "at",
    [
        *("torch", "trl", "peft", "finetune_kit.evaluation.compare:measure", "finetune_kit.data.load:load_data"),
        *("finetune_kit.evaluation.metrics:score_rows", "finetune_kit.training.checkpoint:commit"),
        *("finetune_kit.runs.save:save_weights", "finetune_kit.runs.save:reload_logits"),
    ],
)
def test_a_signal_at_any_stage_of_a_run_ends_it_resumable(home: Path, at: str, number: signal.Signals) -> None:
    said = signalled(home, at, number, "run", "lora_sft", *SHORT)
    assert said.code == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert "with the same command: python -m finetune_kit run" in said.err
    assert python("-m", "finetune_kit", "run", "lora_sft", *SHORT, cwd=home).code == 0


@pytest.mark.long
@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_every_command_on_a_finished_run(home: Path, number: signal.Signals) -> None:
    assert python("-m", "finetune_kit", "run", "lora_sft", *SHORT, cwd=home).code == 0
    for at, words in (
        ("finetune_kit.runs.saved:open_run", ("evaluate", "run")),
        ("transformers", ("evaluate", "run")),
        ("finetune_kit.models.load:load_base", ("generate", "run", "hello")),
        ("finetune_kit.models.load:load_base", ("merge", "run", "merged")),
        ("finetune_kit.runs.hub:prepare", ("push", "run", "somebody/something")),
        ("finetune_kit.runs.diff:difference", ("diff", "run", "run")),
        ("finetune_kit.recipe:copy", ("copy", "dpo", "mine.py")),
        ("finetune_kit.settings.schema:leaves", ("show", "dpo")),
        ("transformers", ("doctor",)),
    ):
        assert signalled(home, at, number, *words).code == CODES[number], words


@pytest.mark.parametrize(
    ("made_of_it", "caught"),
    [
        (lambda: (_ for _ in ()).throw(ValueError("from a library")), "an error of another kind"),
        (lambda: (_ for _ in ()).throw(SystemExit(1)), "an exit of its own"),
        (lambda: None, "nothing at all"),
    ],
)
def test_what_a_library_makes_of_a_signal_is_seen_through(made_of_it, caught, monkeypatch: pytest.MonkeyPatch) -> None:
    def swallow() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            made_of_it()

    monkeypatch.setattr(command_line.recipes, "BUILTIN", ("dpo",))
    monkeypatch.setattr(command_line.recipes, "summary", lambda name: swallow() or "")
    with signals.heeded():
        said = cli("list")
    assert (said.code, said.err) == (130, "stopped: by SIGINT\n"), caught


def test_sigterm_counts_where_both_came() -> None:
    with signals.heeded(), signals.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert (signals.came, signals.exit_code()) == (["SIGTERM"], 143)
        signals.resumable(True)
        assert signals.exit_code() == 75
        signals.resumable(False)
    assert signals.came == []


# standard output


def test_a_reader_that_has_read_enough_ends_list_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} -m finetune_kit list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[0].startswith("pretrain")
    assert done.stdout.splitlines()[1] == "0"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_under_standard_output_is_said_and_ends_with_5(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "finetune_kit", "list"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == f"error: Standard output cannot be written: {os.strerror(errno.ENOSPC)}."


def test_a_stream_of_ascii_alone_gets_escapes_as_json_writes_them(tmp_path: Path) -> None:
    said = python("-m", "finetune_kit", "show", "dpo", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert said.code == 0, said.err
    assert "sigmoid, ipo, hinge, sft, \\u2026" in said.out
