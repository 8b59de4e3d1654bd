"""How far a piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from finetune_kit.system.terminal import GAP, console, moved

MOST_LINES = 20  # about one piece of work, where there is no terminal


def progress_bar(when: str) -> Callable[[str, int, int], None]:
    """A function of (what, rows done, rows in all) that shows how far a measurement is: "before: answers 32 of 128"."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}
    began = last = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal began, last
        if not console.is_terminal:
            now = time.monotonic()
            if what not in tasks:
                console.print(f"{when}: {what}, {total} rows")
                tasks[what], began, last = None, now, now
            gap = max(GAP, (now - began) / max(done, 1) * total / MOST_LINES)
            if now - last >= gap and 0 < done < total:
                console.print(f"{when}: {what}, {done} of {total}")
                last = now
            moved(f"{when}: {what}, {done} of {total}")
            return
        if what not in tasks:
            bar.start()
            tasks[what] = bar.add_task(f"{when}: {what}", total=total)
        bar.update(tasks[what], completed=done)
        if bar.finished:
            bar.stop()

    return tell
