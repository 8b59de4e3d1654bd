"""What the lessons share: the text, the short form, pictures, cells of earlier lessons, and the tests of exercises.

    python docs/learn/01_bigram.py      run a lesson
    python docs/learn/lesson.py 1       run the test of its exercise: it fails until you solve it

FINETUNE_KIT_LESSON=short runs a lesson with fewer steps; FINETUNE_KIT_PICTURES=FOLDER writes its pictures there.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
Value = TypeVar("Value")


def choose(whole: Value, short: Value) -> Value:
    """`whole` in a lesson that runs in full, `short` in one that runs in its short form."""
    return short if os.environ.get("FINETUNE_KIT_LESSON") == "short" else whole


def shakespeare() -> tuple[str, str]:
    """Tiny Shakespeare, as this package ships it: the first 90 % to train on, the last 10 % held out."""
    text = (files("finetune_kit.data") / "assets/shakespeare.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) * 9 // 10) + 2  # between two speeches
    return text[:cut], text[cut:]


def plot(name: str, draw: Callable[[Any], None]) -> None:
    """Call draw(axes) in a notebook, which shows the picture, and where FINETUNE_KIT_PICTURES names a folder to write
    `name`.png into. Elsewhere nothing is drawn, and matplotlib is not needed."""
    folder, notebook = os.environ.get("FINETUNE_KIT_PICTURES"), "ipykernel" in sys.modules
    if not folder and not notebook:
        return
    if not notebook:
        import matplotlib

        matplotlib.use("agg")  # no screen is needed
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    draw(axes)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / f"{name}.png", dpi=110)
    if notebook:
        plt.show()
    plt.close(figure)


def cell(lesson: str, tag: str) -> ModuleType:
    """The cells of another lesson that carry `tag`, run as a module: how lesson 7 has the model of lesson 6."""
    module = ModuleType(f"{lesson}.{tag}")
    sys.modules[module.__name__] = module
    exec(compile(source_of(lesson, tag), str(HERE / f"{lesson}.py"), "exec"), module.__dict__)
    return module


def source_of(lesson: str, tag: str) -> str:
    """The text of those cells."""
    parts = re.split(r"^(# %%.*)$", (HERE / f"{lesson}.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [body for head, body in zip(parts[1::2], parts[2::2], strict=True) if f'"{tag}"' in head]
    if not found:
        raise ValueError(f"lesson {lesson} has no cell with the tag {tag}")
    return "\n".join(found)


def try_exercise(check: Callable[[Any], None], exercise: Any) -> None:
    """Run an exercise's test and say how it went, so that the lesson itself runs to its end either way."""
    try:
        check(exercise)
    except (AssertionError, NotImplementedError) as error:
        print(f"exercise: not solved yet ({str(error) or 'an assertion of its test does not hold'})")
    else:
        print("exercise: solved")


def main() -> None:
    number = sys.argv[1] if len(sys.argv) == 2 else ""
    found = sorted(HERE.glob(f"{number.zfill(2)}_*.py"))
    if not number.isdigit() or not found:
        raise SystemExit(f"Expected the number of a lesson, 1 to 12. Run: python {sys.argv[0]} 1")
    os.environ["FINETUNE_KIT_LESSON"] = "short"
    names = runpy.run_path(str(found[0]))
    names["check"](names["exercise"])


if __name__ == "__main__":
    main()
