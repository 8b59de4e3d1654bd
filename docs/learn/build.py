"""Run all lessons as notebooks: NN_name.ipynb with outputs and pictures, and the same as a page of HTML.

    python docs/learn/build.py build/learn            all (make learn)
    python docs/learn/build.py build/learn 1 2        these

Needs the extra `learn`: pip install 'finetune-kit[learn]'
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbconvert
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
LIMIT = 3600  # seconds for one cell, on the slowest machine that we want to wait for


def notebook_of(lesson: Path) -> nbformat.NotebookNode:
    """The lesson as a notebook that has not been run."""
    notebook = jupytext.read(lesson, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def build(lesson: Path, folder: Path) -> Path:
    """Run a lesson in a kernel of its own, in the lessons' folder; returns the executed notebook's path.

    Raises nbclient's CellExecutionError where an assertion of the lesson does not hold."""
    notebook = notebook_of(lesson)
    NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(lesson.parent)}}).execute()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{lesson.stem}.ipynb"
    nbformat.write(notebook, path)
    page, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    path.with_suffix(".html").write_text(page, encoding="utf-8")
    return path


def lessons(numbers: list[str]) -> list[Path]:
    """The lessons of these numbers, or all of them."""
    every = sorted(HERE.glob("[0-9][0-9]_*.py"))
    return [lesson for lesson in every if not numbers or str(int(lesson.name[:2])) in numbers]


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(
            f"Expected a folder, and the numbers of lessons if not all. Run: python {sys.argv[0]} build/learn"
        )
    for lesson in lessons(sys.argv[2:]):
        begin = time.perf_counter()
        path = build(lesson, Path(sys.argv[1]))
        print(f"{path}  {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
