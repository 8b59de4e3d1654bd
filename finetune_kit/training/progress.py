"""What a run says while it trains: a progress bar for people, metrics.jsonl for programs."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from finetune_kit import distributed
from finetune_kit.system.files import peak_memory, write_whole
from finetune_kit.system.terminal import GAP, NO_ROOM, console, doing, moved, shown_by

__all__ = ["NO_ROOM", "Record", "console", "hooks", "peak_memory_gib"]


def peak_memory_gib() -> float:
    """Highest memory so far: of the GPU where there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_memory() / 2**30


class Record:
    """Appends one line a logged step to metrics.jsonl and shows it; `history` holds the same lines.

    tokens counts the real (not padding) tokens that went through the model since the start of training.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.history: list[dict[str, float]] = []
        self.bar: Progress | None = None
        self.seconds = 0.0  # of training before this process took the run up
        self.started = self.last_time = time.perf_counter()
        self.last_tokens = 0.0
        self.idle = 0.0  # seconds since the last line that went into measuring and saving
        self.said_at = 0.0
        self.work = contextlib.ExitStack()  # names the step, while nothing else does
        self.behind = False  # metrics.jsonl lacks lines that the disk had no room for

    def state(self) -> dict[str, Any]:
        """For a checkpoint, so that the run continues with the same lines."""
        seconds = time.perf_counter() - self.started
        return {"history": list(self.history), "tokens": self.last_tokens, "seconds": round(seconds, 2)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a checkpoint's state back, and cut metrics.jsonl back to it; {}: nothing has been recorded yet."""
        self.history[:] = state.get("history", [])
        self.last_tokens, self.seconds = state.get("tokens", 0.0), state.get("seconds", 0.0)
        self.started = time.perf_counter() - self.seconds
        if distributed.is_main() and (self.history or self.path.exists()):
            self._write_all()

    def _write_all(self) -> None:
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.history))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last_time = self.said_at = time.perf_counter()
        self.started, self.idle = self.last_time - self.seconds, 0.0
        self.close()  # of an attempt that memory was too small for
        self.work.enter_context(shown_by(self._show, f"step {state.global_step + 1}/{state.max_steps}"))
        if not console.is_terminal:
            return
        times = (TimeElapsedColumn(), TimeRemainingColumn(compact=True))
        columns = (BarColumn(12), MofNCompleteColumn(), *times, TextColumn("{task.fields[said]}"))
        self.bar = Progress(TextColumn("training"), *columns, console=console)
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, said="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control is not None and state.global_step >= state.max_steps:
            control.should_log = True  # the curve ends where the training does
        if self.bar:
            self.bar.update(self.task, completed=state.global_step)
        if control is None:
            return
        self.now(state.global_step + 1, state.max_steps)
        if self.bar:
            return
        now = time.perf_counter()
        gap = max(GAP, (now - self.started) / max(state.global_step, 1) * state.max_steps / 100)
        if now - self.said_at >= gap and not control.should_log:
            self.say(f"step {state.global_step}/{state.max_steps}")

    def now(self, step: int, steps: int, what: str = "") -> None:
        """The step that is being made, and what of it: "step 3/32", "sampling, 8 of 32"."""
        if self.bar and what:
            moved(what)
        elif not self.bar:
            moved(f"step {min(step, steps)}/{steps}{': ' if what else ''}{what}")

    def _show(self, what: str) -> None:
        if self.bar:
            self.bar.update(self.task, said=what)

    @contextlib.contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Work that is not a training, such as measuring held-out rows: its seconds stay out of tokens_per_second."""
        started = time.perf_counter()
        with doing(what):
            yield
        self.idle += time.perf_counter() - started

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:  # the trainer's summary at the end
            return
        now = time.perf_counter()
        line = {"step": state.global_step, **{name: value for name, value in logs.items() if name != "num_tokens"}}
        said = f"loss {logs['loss']:.4f}"
        if "num_tokens" in logs:  # not every trainer counts them
            rate = (logs["num_tokens"] - self.last_tokens) / max(now - self.last_time - self.idle, 1e-9)
            line |= {"tokens": logs["num_tokens"], "tokens_per_second": round(rate, 1)}
            said += f"  {rate:,.0f} tokens/s"
            self.last_tokens = logs["num_tokens"]
        self.last_time, self.idle = now, 0.0
        line |= {"seconds": round(now - self.started, 2), "peak_memory_gib": round(peak_memory_gib(), 3)}
        self.write(line)
        self._advance(said, state)

    def write(self, line: dict[str, float]) -> None:
        self.history.append(line)
        if not distributed.is_main():
            return
        try:
            if self.behind:
                self._write_all()
            else:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            self.behind = False
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            if not self.behind:
                self.say(f"note: {self.path} cannot be written: {error.strerror}. Its lines are kept for later.")
            self.behind = True

    def close(self) -> None:
        self.work.close()
        if self.behind:
            with contextlib.suppress(OSError):
                self._write_all()
        if self.bar:
            self.bar.stop()
            self.bar = None

    def say(self, text: str) -> None:
        self.said_at = time.perf_counter()
        console.print(text)

    def _advance(self, text: str, state: Any) -> None:
        if self.bar:
            self.bar.update(self.task, completed=state.global_step, said=text)
            return
        left = (time.perf_counter() - self.started) / max(state.global_step, 1) * (state.max_steps - state.global_step)
        self.say(f"step {state.global_step}/{state.max_steps}  {text}  {left:,.0f} s left")


def hooks(**events: Callable[..., None]) -> Any:
    """A callback of transformers made of plain functions, named by event (on_step_end=…)."""
    from transformers import TrainerCallback

    return type("Hooks", (TrainerCallback,), {name: staticmethod(event) for name, event in events.items()})()
