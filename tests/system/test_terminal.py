"""Nothing that a terminal obeys reaches it from data, names or models, and no long piece of work is silent."""

import io
import json
import logging
import threading
import time
from pathlib import Path

import pytest

from finetune_kit.system import terminal
from finetune_kit.system.terminal import Console, as_json, doing, escaped
from tests.fixtures_cli import cli

EVIL = "a\x1b]0;owned\x07b\x9b2Jc\u202ed\x7f\r\ud83d"


def test_control_characters_are_shown_and_text_of_all_languages_stays() -> None:
    assert escaped(EVIL) == "a␛]0;owned␇b\ufffd2Jc\ufffdd␡␍\ufffd"
    for text in ("naïve 日本語 שלום مرحبا 👩\u200d🚀", "tab\tand\nline"):
        assert escaped(text) == text
    assert escaped("windows\r\nlines") == "windows\nlines"
    assert escaped(escaped(EVIL)) == escaped(EVIL)


@pytest.mark.parametrize("terminal_", [True, False])
def test_no_console_sends_them_in_texts_tables_or_titles(terminal_: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=terminal_, color_system=None)
    table = Table(EVIL, title=EVIL)
    table.add_row(Text(EVIL))
    console.print(table)
    console.print(EVIL, markup=False)
    console.print(Text(EVIL, style="bold"))
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\x7f", "\r"} & set(screen.getvalue())
    assert "owned" in screen.getvalue()


def test_json_has_the_same_values_and_none_of_them_raw() -> None:
    text = as_json({"a": EVIL[:-1]})
    assert json.loads(text) == {"a": EVIL[:-1]}
    assert not {"\x1b", "\x9b", "\u202e", "\x7f"} & set(text)


def test_names_of_settings_files_and_keys_of_rows_come_out_of_a_command_escaped(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    (home / "a\x1b[2Jb.jsonl").write_text('{"x\\u001b[2J": "1", "\\u009b2J": "2"}\n')
    (home / "c\x1b[2J.yaml").write_text("recipe: no\n")
    for words in (
        ("check", "lora_sft", "model.name_or_path=tiny", "data.path=a\x1b[2Jb.jsonl"),
        ("check", "c\x1b[2J.yaml"),
        ("check", "lora_sft", "x\x1b[2J=1"),
        ("run\x1b[2J",),
        ("evaluate", "no\x1b[2J"),
        ("run", "lora_sft", "--opt\x1b[2J"),
    ):
        said = cli(*words)
        assert said.code in (1, 2, 3), said.err
        assert not {"\x1b", "\x9b"} & set(said.out + said.err), words


def test_warnings_of_the_log_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.guard()
    assert logging.lastResort is not None
    record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s is gone", ("\x1b[2J",), None)
    assert logging.lastResort.format(record) == "␛[2J is gone"


def test_prose_wraps_between_words_at_80_columns_and_commands_stay_whole() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, soft_wrap=True, color_system=None)
    prose = "measured " * 20
    console.print(prose, markup=False)
    assert all(set(line.split()) == {"measured"} for line in screen.getvalue().splitlines())
    command = "python -m finetune_kit run lora_sft " + "data.path=rows.jsonl " * 5
    console.print(command, markup=False)
    assert command in screen.getvalue()


def test_work_that_takes_long_is_named_and_named_again_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    twice = threading.Event()

    def print_(text: str) -> None:
        said.append(text)
        if len(said) >= 2:
            twice.set()

    monkeypatch.setattr(terminal, "FIRST", 0.0)
    monkeypatch.setattr(terminal, "GAP", 0.0)
    monkeypatch.setattr(terminal.console, "print", print_)
    with doing("loading"), doing("reading rows"):
        assert twice.wait(20)
    assert said[0].startswith(("loading …", "reading rows …"))
    assert any(line.startswith("reading rows …") for line in said)


def test_work_that_moves_is_named_by_how_far_it_is_and_not_while_something_else_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    named = threading.Event()

    def print_(text: str) -> None:
        said.append(text)
        named.set()

    with doing("answering"):
        terminal.moved("answers, 8 of 32")
        terminal._work.heard = time.monotonic() + 3600  # a line of somebody else's
        monkeypatch.setattr(terminal, "GAP", 0.0)
        monkeypatch.setattr(terminal.console, "print", print_)
        with terminal._work.changed:
            terminal._work._anew(0.0)
        assert not named.wait(0.3)
        with terminal._work.changed:
            terminal._work.heard = 0.0
            terminal._work._anew(0.0)
        assert named.wait(20)
    assert all(line.startswith("answers, 8 of 32 …") for line in said)


def test_short_work_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "FIRST", 60.0)
    monkeypatch.setattr(terminal.console, "print", said.append)
    with doing("loading"):
        pass
    assert said == []


def test_lines_about_one_piece_of_work_grow_rarer_and_another_one_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    work = terminal._Work()
    monkeypatch.setattr(terminal, "FIRST", 1.0)
    monkeypatch.setattr(terminal, "GAP", 3.0)
    work.begun = ["running"]
    gaps = []
    for _ in range(6):
        gaps.append(round(work._grown(terminal.GAP)))
        work.lines["running"] += 1
    assert gaps == [3, 10, 30, 60, 60, 60]
    work.begun.append("saving")
    assert work._grown(terminal.FIRST) == 1.0


def test_a_table_in_a_log_has_120_columns_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.os, "isatty", lambda number: False)
    monkeypatch.delenv("COLUMNS", raising=False)
    assert Console(file=io.StringIO()).width == Console(file=io.StringIO()).options.max_width == 120
    assert Console(file=io.StringIO(), width=60).width == 60
    monkeypatch.setenv("COLUMNS", "77")
    assert Console(file=io.StringIO()).width == 77
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr(terminal.os, "isatty", lambda number: number == 0)  # `| less` has a terminal to fit into
    assert Console(file=io.StringIO()).width == 80
