"""Plain TRL under the tests that this package has to pass: what becomes of a run that is killed, cut off or harmed?

    python benchmarks/reliability.py [--kills 12] [--cuts 2 5 8 10] [--no-harm] [--no-signal]

Each trial is a process of TRL's SFTTrainer on a random two-layer model, with an adapter, dropout and shuffling, and
resumes with `resume_from_checkpoint=True`, as TRL's own scripts do, and is compared with one that nothing happened to.

- kills: kill -9 when a file of the newest checkpoint appears, a file drawn anew each time;
- cuts: the run ends after so many steps with a checkpoint, and continues: inside a line of the log, mid-epoch, …;
- harm: each file of the newest of two checkpoints with a flipped bit, cut in half, emptied or deleted;
- signal: SIGTERM in the middle.

The same tests of this package: tests/test_kill.py, tests/training/test_resume.py, tests/training/test_checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

STEPS = 20  # of an epoch of 10: 40 rows, 4 a step
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
ALIKE = "as the uninterrupted run"
SCRIPT = """
import json, sys
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer
home, folder, steps, save_steps, stop = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
rows = [{"prompt": f"{n} + {n} =", "completion": f"{2 * n}"} for n in range(40)]
class Cut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == stop:
            control.should_save = control.should_training_stop = True
set_seed(0)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(home / "tiny"),
    processing_class=AutoTokenizer.from_pretrained(home / "tiny"),
    args=SFTConfig(
        folder, max_steps=steps, save_steps=save_steps, save_total_limit=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, logging_steps=4, use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to=[], disable_tqdm=True, seed=0, learning_rate=1e-2,
    ),
    train_dataset=Dataset.from_list(rows),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_dropout=0.2, target_modules="all-linear"),
    callbacks=[Cut()],
)
trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))
if trainer.state.global_step == steps:
    trainer.save_model(folder)
    lines = [[line["step"], line["loss"], line["grad_norm"]] for line in trainer.state.log_history if "loss" in line]
    Path(folder, "log.json").write_text(json.dumps(lines))
"""


def start(home: Path, folder: Path, save_steps: int = 1, stop: int = 0) -> subprocess.Popen[str]:
    """A run of STEPS steps, or one that ends after `stop` of them; it continues where the folder has a checkpoint."""
    command = [sys.executable, "-c", SCRIPT, str(home), str(folder), *map(str, (STEPS, save_steps, stop))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def go_on(home: Path, folder: Path, save_steps: int = 1) -> str:
    """How a run ends that is started again: its weights and its log, beside those of the uninterrupted one."""
    again = start(home, folder, save_steps)
    said = (again.communicate()[1] or "").strip().splitlines()
    if again.returncode:
        return f"cannot resume: {said[-1][:120] if said else 'no message'}"
    weights, log = ((folder / name, home / "whole" / name) for name in ("adapter_model.safetensors", "log.json"))
    if weights[0].read_bytes() != weights[1].read_bytes():
        return "other weights, without a word"
    return ALIKE if log[0].read_text() == log[1].read_text() else "equal weights, another log"


def kill(home: Path, number: int) -> str:
    draw, folder = random.Random(number), home / f"killed-{number}"
    process = start(home, folder)
    step, name = draw.randint(2, STEPS - 2), draw.choice(FILES)
    while process.poll() is None and not any((folder / f"checkpoint-{n}" / name).exists() for n in range(step, STEPS)):
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return go_on(home, folder)


def cut(home: Path, step: int) -> str:
    folder = home / f"cut-{step}"
    start(home, folder, save_steps=1000, stop=step).communicate()
    return go_on(home, folder, save_steps=1000)


def harm(home: Path, half: Path, name: str, how: str) -> str:
    folder = home / f"harmed-{name}-{how}"
    shutil.copytree(half, folder)
    path = folder / "checkpoint-10" / name
    content = path.read_bytes()
    if how == "deleted":
        path.unlink()
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    return go_on(home, folder)


def terminate(home: Path) -> str:
    folder = home / "terminated"
    process = start(home, folder, save_steps=3)
    while process.poll() is None and not (folder / "checkpoint-6" / "trainer_state.json").exists():
        time.sleep(0.0005)
    before = sorted(path.name for path in folder.glob("checkpoint-*"))
    process.send_signal(signal.SIGTERM)
    process.communicate()
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    return f"exit code {process.returncode}, {'no checkpoint of its own' if kept == before else 'a checkpoint'}"


def show(what: str, ends: dict[str, str]) -> None:
    for trial, end in ends.items():
        print(json.dumps({what: trial, "end": end}))
    print(f"{what}: {json.dumps(Counter(end.split(':')[0] for end in ends.values()))}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--cuts", type=int, nargs="*", default=[2, 5, 10, 15], help="steps; an epoch has 10")
    parser.add_argument("--no-harm", action="store_true")
    parser.add_argument("--no-signal", action="store_true")
    arguments = parser.parse_args()
    from finetune_kit.models.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        write_tiny_model(home / "tiny")
        assert start(home, home / "whole").wait() == 0
        show("cut after step", {str(step): cut(home, step) for step in arguments.cuts})
        if not arguments.no_harm:
            start(home, home / "half", stop=10).communicate()
            hows = ("flipped", "cut", "emptied", "deleted")
            show("harmed", {f"{name} {how}": harm(home, home / "half", name, how) for name in FILES for how in hows})
        if not arguments.no_signal:
            show("SIGTERM", {"in the middle": terminate(home)})
        show("killed", {str(number): kill(home, number) for number in range(arguments.kills)})


if __name__ == "__main__":
    main()
