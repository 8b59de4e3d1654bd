"""Folders that several test files start from."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_kit.models.tiny import write_tiny_model
from finetune_kit.runs import verify
from finetune_kit.runs.save import Artifact
from finetune_kit.system import terminal
from tests.fixtures_training import train, write_rows
from tests.warm import FRESH, Warm


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of a CPU wherever they run: a GPU is seen by those alone that are of one, with `-m gpu`. What a command
    says does not depend on how fast they run: nothing that takes long is named, but where a test asks for it. Prepared
    rows are kept where a test asks for it, too."""
    terminal.FIRST = terminal.GAP = 3600.0
    os.environ.setdefault("FINETUNE_KIT_CACHE_GIB", "0")
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


class CheckpointCallback:
    """How many modules were imported when the collector was last told to leave all objects alone."""

    modules = 0


@pytest.fixture(autouse=True)
def imports_kept() -> None:
    """A run collects garbage four times, 0.4 s each, most of it a walk over what transformers and TRL have imported:
    objects that the collector need not look at again."""
    if len(sys.modules) > CheckpointCallback.modules + 500:
        gc.collect()
        gc.freeze()
        CheckpointCallback.modules = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def branches() -> Iterator[None]:
    """Proofs of runs inside the test process branch off one Python; `python -m finetune_kit` starts a fresh one."""
    if sys.platform != "linux":
        yield
        return
    warm = Warm()
    verify.in_a_fresh_process = warm
    yield
    verify.in_a_fresh_process = FRESH
    warm.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer model with its tokenizer, as a local folder. Read only."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder of its own with `tiny` (the model) and `rows.jsonl` (40 sums, answers of 1 to 28 bytes)."""
    return furnish(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The same for all tests of one file: for runs that several of them look at."""
    return furnish(tmp_path_factory.mktemp("shared"), tiny_model)


def furnish(folder: Path, tiny_model: Path) -> Path:
    (folder / "tiny").symlink_to(tiny_model, target_is_directory=True)
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """A whole run of lora_sft: 5 steps, held-out losses after 2, 4 and 5, checkpoints, 3 answers. Read only."""
    home = furnish(tmp_path_factory.mktemp("lora"), tiny_model)
    words = ("max_steps=5", "eval_steps=2", "save_steps=2", "evaluate.size=3", "learning_rate=1e-2")
    return train("lora_sft", home, *words)


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Artifact:
    """A whole run of full_sft, 60 steps on 40 questions that all have the answer "yes", 20 held out. Read only."""
    home = furnish(tmp_path_factory.mktemp("full"), tiny_model)
    write_rows(home / "rows.jsonl", [{"prompt": f"is {n} a number?", "completion": "yes"} for n in range(40)])
    words = ("max_steps=60", "learning_rate=5e-3", "held_out_size=20", "evaluate.size=20", "logging_steps=20")
    return train("full_sft", home, *words)
