"""The lessons of docs/learn: what they claim holds, their exercises can be solved, and what they name exists."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_cli import ROOT

LEARN = ROOT / "docs/learn"
LESSONS = sorted(LEARN.glob("[0-9][0-9]_*.py"))
SOLUTIONS = LEARN / "solutions"
NAMES = [lesson.stem for lesson in LESSONS]
PAGES = [*LESSONS, *sorted(SOLUTIONS.glob("*.py")), LEARN / "lesson.py", LEARN / "README.md"]
CODE = [page for page in PAGES if page.suffix == ".py"]

sys.path.insert(0, str(LEARN))  # as where Python runs a file of that folder
import lesson  # noqa: E402


@cache
def short(name: str) -> dict[str, Any]:
    """The names of a lesson that ran in its short form, with one thread; pictures as the environment says."""
    import torch
    from transformers.utils import logging

    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    os.environ["FINETUNE_KIT_LESSON"] = "short"
    try:
        return runpy.run_path(str(LEARN / f"{name}.py"))
    finally:
        del os.environ["FINETUNE_KIT_LESSON"]
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        logging.enable_progress_bar()


def test_there_are_twelve_lessons_each_with_a_solution() -> None:
    assert [name[:3] for name in NAMES] == [f"{number:02}_" for number in range(1, 13)]
    assert [solution.stem for solution in sorted(SOLUTIONS.glob("*.py"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_a_lesson_asserts_holds_in_its_short_form_and_it_draws(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINETUNE_KIT_PICTURES", str(tmp_path))
    short(name)
    said = capsys.readouterr().out
    assert "exercise: not solved yet" in said
    pictures = list(tmp_path.glob(f"{name[:2]}_*.png"))
    assert 1 <= len(pictures) <= 2
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_fails_before_it_is_solved_and_passes_with_its_solution(name: str) -> None:
    names = short(name)
    with pytest.raises((NotImplementedError, AssertionError)):
        names["check"](names["exercise"])
    names["check"](runpy.run_path(str(SOLUTIONS / f"{name}.py"))["exercise"])


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_s_test_refuses_an_answer_that_says_nothing(name: str) -> None:
    with pytest.raises((AssertionError, TypeError, AttributeError, ValueError)):
        short(name)["check"](lambda *_: None)


def test_the_command_that_tests_an_exercise_fails_until_it_is_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lesson.py", "2"])
    monkeypatch.setenv("FINETUNE_KIT_LESSON", "short")
    with pytest.raises(NotImplementedError, match="write tanh"):
        lesson.main()
    monkeypatch.setattr("sys.argv", ["lesson.py", "13"])
    with pytest.raises(SystemExit, match="Expected the number of a lesson, 1 to 12"):
        lesson.main()


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_lesson_runs_alone_in_its_own_process_in_2_gb(name: str) -> None:
    script = "import runpy, resource, sys; sys.path.insert(0, sys.argv[1].rpartition('/')[0]); "
    script += "runpy.run_path(sys.argv[1]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    said = subprocess.run(
        [sys.executable, "-c", script, str(LEARN / f"{name}.py")], capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr
    assert int(said.stdout.split()[-1]) < 2 * 1024 * 1024  # KiB


@pytest.mark.long
def test_a_lesson_becomes_a_notebook_with_outputs_and_a_page(tmp_path: Path) -> None:
    import nbformat

    build = importlib.import_module("build")
    path = build.build(LESSONS[0], tmp_path)
    cells = nbformat.read(path, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert any("bits a character" in output.get("text", "") for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Vectors, matrices, probability" in path.with_suffix(".html").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_opens_as_a_notebook_that_begins_with_its_title_and_ends_with_its_exercise(name: str) -> None:
    import jupytext

    cells = jupytext.read(LEARN / f"{name}.py", fmt="py:percent").cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith(f"# Lesson {int(name[:2])}: ")
    kinds = {cell.cell_type for cell in cells}
    assert kinds == {"markdown", "code"}
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "**You need**" in text
    assert "**You get**" in text
    assert "$" in text  # a formula
    assert "**For real:**" in text
    assert re.search(r"`recipes/\w+\.py`", text)
    assert re.search(r"`finetune_kit\.[\w.]+`", text)
    assert "## Exercise" in text
    assert cells[-1].source.rstrip().endswith("try_exercise(check, exercise)")


def dotted(page: Path) -> set[str]:
    return set(re.findall(r"\bfinetune_kit(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))


def found(name: str) -> Any:
    """The module, or what a module holds, that a dotted name says."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_dotted_name_and_file_of_a_page_exists(page: Path) -> None:
    for name in sorted(dotted(page)):
        found(name)
    for file in re.findall(r"`((?:recipes|docs|finetune_kit)/[\w/.]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / file).exists(), file


def test_a_name_that_is_not_there_would_be_seen() -> None:
    with pytest.raises(AttributeError):
        found("finetune_kit.rl.math.no_such_loss")
    assert "finetune_kit.rl.math.policy_loss" in dotted(LEARN / "11_preferences.py")


def test_every_command_that_the_lessons_name_is_one() -> None:
    from finetune_kit import recipe
    from finetune_kit.cli.main import app

    known = {item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\n# ", " ")
        for command, word in re.findall(r"python -m finetune_kit (\w+) (\w*)", text):
            assert command in known, (page.name, command)
            assert command not in ("run", "check", "show") or word in recipe.BUILTIN, (page.name, word)


@pytest.mark.parametrize(("name", "tag", "most"), [("02_gradients", "autograd", 80), ("06_transformer", "model", 200)])
def test_the_line_budgets_are_kept(name: str, tag: str, most: int) -> None:
    lines = [line for line in lesson.source_of(name, tag).splitlines() if line.strip()]
    assert 40 < len(lines) <= most


def test_links_of_the_course_lead_to_its_lessons() -> None:
    text = (LEARN / "README.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\]\((\d\d_\w+\.py)\)", text)) == [path.name for path in LESSONS]


def test_the_text_is_whole_ascii_and_its_parts_share_no_long_line() -> None:
    train, held_out = lesson.shakespeare()
    assert len(train) + len(held_out) == 1_115_394
    assert (train + held_out).isascii()
    assert 0.89 < len(train) / 1_115_394 < 0.91
    speeches = {speech for speech in train.split("\n\n") if len(speech) > 200}
    assert not speeches & set(held_out.split("\n\n"))
