"""PPO on two processes: one run, not two."""

import os
import re
import subprocess
import sys

import pytest

from tests.fixtures_cli import ROOT
from tests.rl.fixtures import write_home


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What both processes of tests/rl/two_processes.py print, and then the lines of the first run's metrics.jsonl."""
    home = write_home(tmp_path_factory.mktemp("two"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    cpu = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [str(ROOT / "tests" / "rl" / "two_processes.py"), str(home)]
    done = subprocess.run([*command, *script], capture_output=True, text=True, check=False, env=cpu, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + (home / "run" / "metrics.jsonl").read_text()


def test_two_processes_take_8_different_prompts_each_and_end_with_the_same_weights_and_one_log(said: str) -> None:
    prompts = [set(found.split(", ")) for found in re.findall(r"PROMPTS \[([\d, ]+)\]", said)]
    assert [len(found) for found in prompts] == [8, 8]
    assert not prompts[0] & prompts[1]
    weights = re.findall(r"WEIGHTS (\S+)", said)
    assert weights[0] == weights[1]
    assert re.findall(r'"step": (\d+)', said) == ["1", "2"]


def test_a_reward_that_raises_on_one_process_stops_both(said: str) -> None:
    assert "RANK 1 STOPPED reward lower raised KeyError" in said
    assert "RANK 0 STOPPED reward lower raised KeyError" in said
