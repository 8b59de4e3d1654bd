"""kill -9 and signals on real commands: nothing is lost, and the run ends as if nothing had happened."""

import random
import signal
from pathlib import Path

import pytest

from finetune_kit.training.checkpoint import broken, checkpoints
from tests.kills import (
    FILES,
    RECIPES,
    assert_same_end,
    at_file,
    finished,
    furnish,
    kill_when,
    start,
    survive,
    whole,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("kills"))


def test_stopped_once_and_killed_6_times_it_ends_as_the_run_that_nobody_stopped(home: Path) -> None:
    run = home / "lora_sft-1"
    assert kill_when(start(home, "lora_sft", run.name), (run / "checkpoint-3").is_dir, signal.SIGTERM) == 75
    said, kept = (home / f"{run.name}.log").read_text(), checkpoints(run)[-1]
    assert broken(kept) == ""
    line = f"stopped: by SIGTERM; {run.name}/{kept.name} is what it goes on from, with the same command: python -m"
    assert said.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in said
    assert survive(home, "lora_sft", 1, kills=6, seed=1) >= 5  # it may end before the last one
    assert f"which goes on from step {kept.name.rpartition('-')[2]}." in (home / f"{run.name}.log").read_text()


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_8_times_each_recipe_ends_as_the_run_that_nobody_killed(home: Path, recipe: str) -> None:
    print(f"KILLS {recipe} {survive(home, recipe, 2, kills=8, seed=0)}")


@pytest.mark.long
@pytest.mark.parametrize("pattern", FILES)
def test_killed_when_a_file_of_each_kind_appears(home: Path, pattern: str) -> None:
    run = home / f"lora_sft-at-{FILES.index(pattern)}"
    killed = kill_when(start(home, "lora_sft", run.name), at_file(run, pattern, random.Random(pattern)))
    print(f"KILLS at {pattern} {int(killed is not None)}")
    if not finished(run):
        assert start(home, "lora_sft", run.name).wait() == 0
    assert_same_end(run, whole(home, "lora_sft"))
