"""`reasoning_gym/<task>`: problems made by a generator, with the task's own scorer.

Generators seed item i with (seed + i). Held-out problems always come from seed 7, whatever the training seed, so that
every recipe and every seed is measured on the same ones; training problems come from (seed + 1) · 1,000,000. Ranges
of up to 999,000 problems therefore never meet; the same problem drawn twice is found by comparing questions.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
from collections.abc import Callable
from typing import Any

from finetune_kit.data.records import Preference, PromptCompletion, prompt_of
from finetune_kit.errors import DataError, ResourceError, SettingsError

PREFIX = "reasoning_gym/"
HELD_OUT_SEED = 7
SEED_STEP = 1_000_000
MOST_ROWS = 999_000
ATTEMPTS = 20  # at a wrong answer to one problem


def train_seed(seed: int) -> int:
    """The generator's seed for the training problems of a run."""
    return (seed + 1) * SEED_STEP


def task_rows(task: str, size: int, seed: int, options: dict[str, Any] | None = None) -> list[PromptCompletion]:
    """`size` problems from generator seeds [seed, seed + size), each a question and its right answer.

    `metadata` is the generator's entry (question, answer, metadata) and `task`, which `scorer` needs. Raises
    ResourceError without the package, SettingsError for an unknown task or option, DataError where it gives no answer.
    """
    if size > MOST_ROWS:
        raise SettingsError(f"data.size: {size:,} problems of {PREFIX}{task}; at most {MOST_ROWS:,}.")
    dataset = _generator(task, size, seed, options or {})
    rows = []
    for number in range(size):
        entry = dataset[number]
        where = f"{PREFIX}{task}:{number + 1}"
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            raise DataError(
                f"{where}: the task gives no answer to learn from.", f"Use another task than data.path={PREFIX}{task}."
            )
        messages = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": entry["answer"]}]
        rows.append(PromptCompletion(where, messages, metadata={"task": task, **entry}))
    return rows


def scorer(task: str, options: dict[str, Any] | None = None) -> Callable[[str, dict[str, Any]], float]:
    """The task's own score in [0, 1] of a completion, given the row's metadata."""
    dataset = _generator(task, 1, HELD_OUT_SEED, options or {})

    def score(completion: str, metadata: dict[str, Any]) -> float:
        try:
            value = float(dataset.score_answer(completion.strip(), metadata))
        except Exception:  # a task's parser meets a model's nonsense: what it cannot read is not the answer
            return 0.0
        return min(1.0, max(0.0, value))

    return score


def task_pairs(rows: list[PromptCompletion], seed: int, options: dict[str, Any] | None = None) -> list[Preference]:
    """Each problem with its right answer and a plausible wrong one: the right one with a piece moved, left out,
    repeated or taken from another answer.

    The task's own scorer has given the wrong one less; `margin` is the difference. Where no wrong one is found the
    record has its defect.
    """
    draw = random.Random(seed)
    score = scorer(rows[0].metadata["task"], options)
    answers = [str(row.messages[-1]["content"]) for row in rows]
    pairs = []
    for row, right in zip(rows, answers, strict=True):
        best = score(right, row.metadata)
        tried = (_spoiled(right, draw.choice(answers), draw) for _ in range(ATTEMPTS))
        wrong, margin = next(
            ((text, best - worse) for text in tried if text and (worse := score(text, row.metadata)) < best),
            ("", 0.0),
        )
        rejected = [{"role": "assistant", "content": wrong}]
        defect = "" if wrong else "no wrong answer found"
        pair = Preference(row.where, prompt_of(row), row.messages[-1:], rejected, None, margin, defect, row.metadata)
        pairs.append(pair)
    return pairs


def _spoiled(right: str, other: str, draw: random.Random) -> str:
    """The answer with one mistake in its pieces, or, where it is a single character, another problem's answer."""
    join, pieces = _pieces(right)
    others = _pieces(other)[1]
    if len(pieces) == 1:
        return other
    kind = draw.choice(("move", "leave out", "repeat", "take"))
    place = draw.randrange(len(pieces))
    if kind == "move":
        target = draw.randrange(len(pieces))
        pieces[place], pieces[target] = pieces[target], pieces[place]
    elif kind == "leave out":
        del pieces[place]
    elif kind == "repeat":
        pieces.insert(draw.randrange(len(pieces) + 1), pieces[place])
    else:
        pieces[place] = draw.choice(others)
    return join.join(pieces).strip()


def _pieces(answer: str) -> tuple[str, list[str]]:
    """(what joins them, the pieces): a list's entries, words, or characters."""
    for join in (", ", " "):
        if join in answer.strip():
            return join, answer.strip().split(join)
    return "", re.findall(r".", answer.strip(), re.DOTALL)


def _generator(task: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ResourceError(
            f"{PREFIX}{task} needs the package reasoning-gym, which is not installed.",
            "Run: pip install 'finetune-kit[quickstart]'   (or set data.path to your own data)",
        ) from None
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        raise SettingsError(
            f"data.path: reasoning_gym has no task {task!r}.",
            f"Did you mean {' or '.join(PREFIX + name for name in near)}?"
            if near
            else f"Tasks: {', '.join(sorted(DATASETS))}.",
        )
    known = [item.name for item in dataclasses.fields(DATASETS[task][1]) if item.name not in ("seed", "size")]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise SettingsError(
                f"data.options.{name}: {PREFIX}{task} has no such option."
                + (f" Did you mean {near[0]}?" if near else ""),
                f"Options: {', '.join(known)}.",
            )
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise SettingsError(f"data.options: {PREFIX}{task} refuses {options}: {error}") from None
