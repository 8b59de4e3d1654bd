"""kill -9 and signals on real commands: nothing is lost, and the run ends as if nothing had happened."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from finetune_kit.training.checkpoint import broken, checkpoints, read_manifest, step_of
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


@pytest.mark.long
def test_stopped_twice_and_killed_6_times_it_ends_as_the_run_that_nobody_stopped(home: Path) -> None:
    run = home / "lora_sft-1"
    assert kill_when(start(home, "lora_sft", run.name), (run / "checkpoint-3").is_dir, signal.SIGTERM) == 75
    said, kept = (home / f"{run.name}.log").read_text(), checkpoints(run)[-1]
    assert broken(kept) == ""
    line = f"stopped: by SIGTERM; {run.name}/{kept.name} is what it resumes from, with the same command: python -m"
    assert said.strip().splitlines()[-1].startswith(line)
    assert "Traceback" not in said
    process = start(home, "lora_sft", run.name)
    assert stopped_at_once(process, at_file(run, "checkpoint-*/optimizer.pt")) == 75
    assert "stopped at once by a second signal, SIG" in (home / f"{run.name}.log").read_text()
    assert [broken(path) for path in checkpoints(run)] == [""] * len(checkpoints(run))
    assert step_of(checkpoints(run)[-1]) >= step_of(kept)
    assert survive(home, "lora_sft", 1, kills=6, seed=1) >= 5  # it may end before the last one
    assert f"which resumes from step {kept.name.rpartition('-')[2]}." in (home / f"{run.name}.log").read_text()


def stopped_at_once(process: subprocess.Popen[str], moment: Callable[[], bool]) -> int | None:
    """Two signals in one moment; the exit code, or None where the command ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)  # another one: two that are alike would be one
            return process.wait()
        time.sleep(0.0005)
    return None


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_8_times_each_recipe_ends_as_the_run_that_nobody_killed(home: Path, recipe: str) -> None:
    killed = survive(home, recipe, 2, kills=8, seed=0)
    print(f"KILLS {recipe} {killed}")  # pytest -rP shows it
    assert killed >= 7  # it may end before the last one


@pytest.mark.long
@pytest.mark.parametrize("pattern", FILES)
def test_killed_when_a_file_of_each_kind_appears(home: Path, pattern: str) -> None:
    run = home / f"lora_sft-at-{FILES.index(pattern)}"
    killed = kill_when(start(home, "lora_sft", run.name), at_file(run, pattern, 3 if "/" in pattern else 1))
    print(f"KILLS at {pattern} {int(killed is not None)}")
    assert killed is not None or pattern == "report.json"  # the last one that it writes
    if not finished(run):
        assert start(home, "lora_sft", run.name).wait() == 0
    assert_same_end(run, whole(home, "lora_sft"))


@pytest.mark.long
def test_with_a_signal_on_the_second_of_two_processes_both_commit_and_end_with_75_and_go_on_exactly(home: Path) -> None:
    def launch(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        return start(home, "lora_sft", folder, [*command, "finetune_kit"])

    assert launch("two-whole").wait() == 0
    run, process = home / "two", launch("two")

    def second() -> psutil.Process:
        workers = psutil.Process(process.pid).children(recursive=True)
        return next(worker for worker in workers if worker.environ().get("RANK") == "1")

    while not (run / "checkpoint-3").is_dir():
        assert process.poll() is None
        time.sleep(0.01)
    second().send_signal(signal.SIGTERM)
    assert process.wait() != 0  # the launcher has an exit code of its own
    said, kept = (home / "two.log").read_text(), checkpoints(run)[-1]
    assert said.count(f"two/{kept.name} is what it resumes from") == 1
    assert "exitcode  : 75" in said
    assert broken(kept) == ""
    assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_0.json", "trainer_1.json"} <= read_manifest(kept)[
        "files"
    ].keys()
    assert launch("two").wait() == 0
    assert_same_end(run, home / "two-whole")
