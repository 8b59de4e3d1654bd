"""kill -9 while plain TRL trains and saves: can it resume, and does it end as the run that nobody killed?

    python benchmarks/reliability.py --kills 20

Each trial is a process of TRL's SFTTrainer on a random two-layer model with `save_steps=1`. It is killed when a file of
its newest checkpoint appears, a file drawn anew each time, and started again with `resume_from_checkpoint=True`, as
TRL's own scripts do. The same test of this package is tests/test_kill.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 20
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
SCRIPT = """
import sys
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer
home, folder, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rows = [{"prompt": f"{n} + {n} =", "completion": f"{2 * n}"} for n in range(40)]
set_seed(0)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(home / "tiny"),
    processing_class=AutoTokenizer.from_pretrained(home / "tiny"),
    args=SFTConfig(
        folder, max_steps=steps, save_steps=1, save_total_limit=2, per_device_train_batch_size=4, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True, seed=0, learning_rate=1e-2,
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.2, target_modules="all-linear"),
)
trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
trainer.save_model(folder)
"""


def start(home: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(home), str(folder), str(STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_at(process: subprocess.Popen[str], folder: Path, draw: random.Random) -> str:
    """Kill the process when the drawn file of a checkpoint past a drawn step appears; returns which one."""
    step, name = draw.randint(2, STEPS - 2), draw.choice(FILES)
    while process.poll() is None and not any((folder / f"checkpoint-{n}" / name).exists() for n in range(step, STEPS)):
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return name


def trial(home: Path, number: int, expected: bytes) -> dict[str, str]:
    draw, folder = random.Random(number), home / f"run-{number}"
    name = kill_at(start(home, folder), folder, draw)
    again = start(home, folder)
    said = (again.communicate()[1] or "").strip().splitlines()
    if again.returncode:
        return {"killed at": name, "end": f"cannot resume: {said[-1][:120] if said else 'no message'}"}
    same = (folder / "adapter_model.safetensors").read_bytes() == expected
    return {"killed at": name, "end": "as the uninterrupted run" if same else "other weights, without a word"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    from finetune_kit.model.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_tiny_model(home / "tiny")
        assert start(home, home / "whole").wait() == 0
        expected = (home / "whole" / "adapter_model.safetensors").read_bytes()
        ends = [trial(home, number, expected) for number in range(kills)]
    for end in ends:
        print(json.dumps(end))
    print(
        f"{sum(end['end'] == 'as the uninterrupted run' for end in ends)} of {kills} ended as if nothing had happened"
    )


if __name__ == "__main__":
    main()
