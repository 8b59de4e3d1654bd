"""Runs of the built-in recipes on the tiny model: `train` does a whole one here, `fit_only` its training alone."""

import contextlib
import itertools
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_kit import recipe as recipes
from finetune_kit.data.load import Data, load_data
from finetune_kit.run_folder.claim import claim
from finetune_kit.runs.save import Artifact
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.training.fit import fit

torch.set_num_threads(1)

# 2 optimizer steps, each logged, 3 held-out rows, nothing measured that a test does not ask for
FAST = (
    "max_steps=2",
    "per_device_train_batch_size=4",
    "warmup_steps=0",
    "logging_steps=1",
    "held_out_size=3",
    "evaluate.size=0",
    "evaluate.general_text=false",
    "evaluate.safety=null",
    "evaluate.bootstrap_samples=50",
)
SMALLEST = ("depth=1", "hidden_size=32", "tokenizer.vocab_size=300", "data.max_length=32", "eval_steps=null")
ROWS = [{"prompt": f"{n} + {n * n} =", "completion": f"{n + n * n}" + " exactly" * (n % 4)} for n in range(40)]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def furnish_pairs(folder: Path, tiny_model: Path, pairs: list[dict[str, Any]]) -> Path:
    """A folder with `tiny` (the model) and `rows.jsonl` (pairs)."""
    (folder / "tiny").symlink_to(tiny_model, target_is_directory=True)
    write_rows(folder / "rows.jsonl", pairs)
    return folder


def settings(recipe: str, folder: Path, *words: str) -> RecipeConfig:
    """The recipe's settings on the tiny model and rows in `folder`, FAST unless `words` say otherwise.

    The run's folder is the next free one of run1, run2, … in `folder`.
    """
    home = Path(folder)
    run = next(path for number in itertools.count(1) if not (path := home / f"run{number}").exists())
    if recipe in ("ppo", "grpo", "rloo"):
        words = ("evaluate.size=1", *words)  # prompts have no held-out loss, and a run measures something
    given = {word.split("=")[0].rsplit(".", 1)[-1] for word in words}
    places = [f"model.name_or_path={home / 'tiny'}", f"data.path={home / 'rows.jsonl'}", f"output_dir={run}"]
    if recipe == "pretrain":  # which makes its own model
        places = [f"data.path={home / 'text.txt'}", f"output_dir={run}", *SMALLEST]
    kept = [word for word in (*places, *FAST) if word.split("=")[0].rsplit(".", 1)[-1] not in given]
    found = recipes.load(recipe)
    return resolve(found.config_class, found.name, None, [*kept, *words])


def train(recipe: str, folder: Path, *words: str) -> Artifact:
    """A whole run in this process, the reload in a fresh one included (about 6 s)."""
    config = settings(recipe, folder, *words)
    claim(config)
    artifact: Artifact = recipes.load(recipe).run(config)
    return artifact


@dataclass
class Trained:
    """What training left in memory, and the weights that it started from."""

    model: Any
    trainer: Any
    tokenizer: Any
    data: Data
    config: RecipeConfig
    history: list[dict[str, float]]
    start: dict[str, torch.Tensor]
    score: Any

    @property
    def folder(self) -> Path:
        return Path(self.config.train.output_dir or "")

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.history if "loss" in line]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return trainable(self.model)

    @property
    def moved(self) -> float:
        """Largest change of any trained weight."""
        return largest_difference(self.start, self.weights)


class _Prepared(Exception):
    """Everything before the first step is done."""


def prepare(recipe: str, folder: Path, *words: str) -> Trained:
    """Everything up to the first step of a recipe, by the recipe itself."""
    found, config = recipes.load(recipe), settings(recipe, folder, *words)
    seen: dict[str, Any] = {}

    def load(*given: Any, **named: Any) -> Data:
        seen["data"] = load_data(*given, **named)
        return seen["data"]

    def stop(trainer: Any, train: Any, score: Any) -> None:
        seen["trainer"], seen["score"] = trainer, score
        raise _Prepared

    found.module.load_data, found.module.fit = load, stop  # type: ignore[attr-defined]
    with contextlib.suppress(_Prepared):
        found.run(config)
    trainer = seen["trainer"]
    start = trainable(trainer.model)
    return Trained(trainer.model, trainer, trainer.processing_class, seen["data"], config, [], start, seen["score"])


def fit_only(recipe: str, folder: Path, *words: str, score: Any = None) -> Trained:
    """Training without the measurement after it and without the artifact (about 0.3 s)."""
    run = prepare(recipe, folder, *words)
    run.history = fit(run.trainer, run.config.train, score or run.score)
    return run


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """In here the kernel refuses to make a file larger, in the middle of writing it, as a disk does that is full."""
    limit_files(size)
    try:
        yield
    finally:
        limit_files(None)


def limit_files(size: int | None) -> None:
    """The same from now on; None: files may be as large as they like."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


def norm(weights: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([weight.norm() for weight in weights.values()]).norm())
