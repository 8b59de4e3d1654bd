"""lm-evaluation-harness (the extra `harness`): its own code on a loaded model, its scores of every row.

Tasks are the harness's by name (their data are then fetched from the Hub), those of YAML files in a folder that the
user names, or a file of questions with choices, which becomes a task here and needs no network.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import shlex
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_kit.data.files import DATA_SUFFIXES, suffix_of
from finetune_kit.errors import DataError, ResourceError, SecurityError, SettingsError
from finetune_kit.evaluation.choices import name_of, read_choices
from finetune_kit.evaluation.compare import Report
from finetune_kit.evaluation.intervals import SHARE, entry
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.settings.schema import EvaluateConfig
from finetune_kit.system.network import hub_reachable

EXTRA = "pip install 'finetune-kit[harness]'"
NEAR = 0.7  # how alike the name of a task must be that was perhaps meant
EVERY = 10**9  # questions: all of a file's


@dataclass(frozen=True)
class Asked:
    """Which tasks, and how. `limit`: rows of each. `num_fewshot`: None: the task's own. `folder`: of YAML files."""

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    folder: Path | None = None

    def in_words(self) -> str:
        """How the rows were written and scored."""
        shots = "the tasks' own number of examples" if self.num_fewshot is None else f"{self.num_fewshot} examples"
        shots = "1 example" if self.num_fewshot == 1 else shots
        chat = "in the chat template" if self.apply_chat_template else "without a chat template"
        rows = f"at most {self.limit} rows a task" if self.limit else "all rows"
        return f"{shots} before each question, {chat}, {rows}"


@dataclass
class Scores:
    """Of one model: for each (task, metric) the score of every row, in the harness's order; whether more is better."""

    rows: dict[tuple[str, str], list[float]]
    higher_is_better: dict[tuple[str, str], bool]
    totals: dict[tuple[str, str], float] = field(default_factory=dict)  # what the harness itself says
    version: str = ""


def check(asked: Asked) -> None:
    """Raises ResourceError where the harness is not installed, SettingsError for a task that does not exist. Nothing is
    fetched."""
    _harness()
    manager = _manager(asked)
    known = set(manager.all_tasks) if manager is not None else set()
    named = [task for task in asked.tasks if not is_file(task)]
    for task in named:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=1, cutoff=NEAR)
            raise SettingsError(
                f"--tasks: {task} is not a task of the harness{f' or of {asked.folder}' if asked.folder else ''}.",
                f"Did you mean {near[0]}?" if near else "A file of questions is a task, too: --tasks rows.jsonl",
            )


def is_file(task: str) -> bool:
    return suffix_of(Path(task)) in DATA_SUFFIXES


def run_tasks(model: Any, tokenizer: Any, asked: Asked, batch_size: int) -> Scores:
    """The harness's scores of the model. Raises as `check`, and ResourceError where a task's data cannot be loaded."""
    harness = _harness()
    from jinja2 import UndefinedError
    from lm_eval.models.huggingface import HFLM

    with tempfile.TemporaryDirectory() as scratch, _quiet(), evaluation_mode(model):
        files = [task for task in asked.tasks if is_file(task)]
        tasks = [_task_of(task, name_of(task, files), Path(scratch)) if task in files else task for task in asked.tasks]
        language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            found = harness.simple_evaluate(
                model=language_model,
                tasks=tasks,
                num_fewshot=asked.num_fewshot,
                limit=asked.limit,
                apply_chat_template=asked.apply_chat_template,
                task_manager=_manager(asked, every=True),
                bootstrap_iters=0,
                log_samples=True,
            )
        except FileNotFoundError as error:
            raise DataError(
                f"--tasks: {' '.join(str(error).split())[:200]}",
                "Paths in a task file begin in the folder that you start in.",
            ) from None
        except OSError as error:  # a connection's, or a file's that is not in the cache
            offline = "" if hub_reachable() else " The Hub cannot be reached."
            raise ResourceError(
                f"--tasks: the data of {', '.join(asked.tasks)} cannot be loaded.{offline} "
                f"{' '.join(str(error).split())[:200]}",
                "Give a file of questions (--tasks rows.jsonl), or a task file over local data (--task-files DIR).",
            ) from None
        except (UndefinedError, ValueError, SyntaxError, LookupError, TypeError) as error:
            if isinstance(error, ValueError) and "unsafe" in str(error):
                raise SecurityError(
                    f"--tasks: {', '.join(asked.tasks)} would run code that the model writes; nothing here does that.",
                    "Use the harness's own command in a sandbox: lm_eval --confirm_run_unsafe_code",
                ) from None
            if asked.folder is None:
                raise
            raise DataError(
                f"--tasks: {', '.join(asked.tasks)} of {asked.folder} does not fit its rows: "
                f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
                "doc_to_text, doc_to_choice and doc_to_target name the rows' columns. Where it happened: --debug",
            ) from error
    return _scores(found)


def _scores(found: dict[str, Any]) -> Scores:
    rows: dict[tuple[str, str], list[float]] = {}
    better: dict[tuple[str, str], bool] = {}
    totals: dict[tuple[str, str], float] = {}
    for task, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                if isinstance(value := sample.get(metric), int | float):  # others are not means over rows
                    name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                    rows.setdefault((task, name), []).append(float(value))
                    better[task, name] = bool(found["higher_is_better"].get(task, {}).get(metric, True))
                    total = found["results"].get(task, {}).get(f"{metric},{sample['filter']}")
                    if isinstance(total, int | float):
                        totals[task, name] = float(total)
    return Scores(rows, better, totals, str(found.get("lm_eval_version", "")))


def report(before: Scores, after: Scores, asked: Asked, config: EvaluateConfig) -> Report:
    """A line for each metric of each task, base and tuned on the same rows, each with a paired interval."""
    lines = []
    for key, scores in before.rows.items():
        within = SHARE if all(0 <= value <= 1 for value in [*scores, *after.rows[key]]) else None
        name, better = " ".join(key), before.higher_is_better[key]
        lines.append(entry(name, scores, after.rows[key], config, higher_is_better=better, within=within))
    if not lines:
        raise DataError(f"--tasks: {', '.join(asked.tasks)} gave no score of single rows.", "Use other tasks.")
    first, main = next(iter(before.rows)), lines[0]
    gains = [now - was for was, now in zip(before.rows[first], after.rows[first], strict=True)]
    words = ["--tasks", ",".join(asked.tasks)]
    words += ["--limit", str(asked.limit)] if asked.limit else []
    words += ["--num-fewshot", str(asked.num_fewshot)] if asked.num_fewshot is not None else []
    words += ["--apply-chat-template"] if asked.apply_chat_template else []
    words += ["--task-files", str(asked.folder)] if asked.folder else []
    found = ", ".join(
        f"{line['name']} {line['before']:.3f} → {line['after']:.3f} ({line['verdict']})" for line in lines
    )
    return Report(
        metrics=lines,
        main=main["name"],
        verdict=f"{found}.",
        improved=main["verdict"] == "better",
        wins=sum(gain > 0 for gain in gains),
        ties=sum(gain == 0 for gain in gains),
        losses=sum(gain < 0 for gain in gains),
        rows={" ".join(key): len(scores) for key, scores in before.rows.items()},
        samples=[],
        decoding={"harness": f"lm-evaluation-harness {before.version}", "rows": asked.in_words()},
        seconds={},
        details={
            "harness": {
                "said": asked.in_words(),
                "version": before.version,
                "command": f"python -m finetune_kit evaluate DIR {shlex.join(words)}",
            }
        },
    )


def _task_of(source: str, name: str, scratch: Path) -> dict[str, Any]:
    """A file of questions with choices as a task of the harness's `multiple_choice`."""
    questions = read_choices(source, EVERY, "--tasks")
    rows = scratch / f"{name.replace('/', '_')}.jsonl"
    lines = [{"context": item.context, "choices": list(item.choices), "gold": item.gold} for item in questions]
    rows.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(scratch / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _manager(asked: Asked, every: bool = False) -> Any:
    """Knows the tasks by name; None where files alone are asked for. Its own tasks take seconds to list."""
    from lm_eval.tasks import TaskManager

    if all(map(is_file, asked.tasks)):
        return TaskManager(include_defaults=False) if every else None
    if asked.folder is not None:
        own = TaskManager(include_path=str(asked.folder), include_defaults=False)
        if set(asked.tasks) <= {*own.all_tasks, *filter(is_file, asked.tasks)}:
            return own
    return TaskManager(include_path=str(asked.folder) if asked.folder else None)


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise ResourceError("--tasks needs lm-evaluation-harness, which is not installed.", EXTRA) from None
    return lm_eval


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's notes and bars; what it finds wrong is raised."""
    logger, was = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(), _no_stderr():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(was)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The descriptor, too: the harness asks git for a hash, which complains outside of a repository."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def listed(tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks as written on the command line: several words, or one with commas; each once."""
    return tuple(dict.fromkeys(part.strip() for word in tasks for part in word.split(",") if part.strip()))
