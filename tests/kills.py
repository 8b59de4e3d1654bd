"""Real `run` commands that are killed, run again until they end, and compared with the one that nobody killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from finetune_kit.training.checkpoint import checkpoints, step_of
from tests.fixtures_training import write_rows

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}", "rejected": f"no {n}"} for n in range(40)]
LABELLED = [{"prompt": f"{n} =", "completion": f"it is {n}" * (1 + n % 3), "label": bool(n % 2)} for n in range(40)]
REWARD = """
def score(prompts, completions, records):
    return [sum(letter.isascii() and letter.islower() for letter in text) / 12 for text in completions]
"""
WORDS = (
    *("model.name_or_path=tiny", "max_steps=30", "per_device_train_batch_size=4", "logging_steps=4", "save_steps=1"),
    *(
        "held_out_size=3",
        "evaluate.size=2",
        "evaluate.general_text=false",
        "evaluate.safety=null",
        "evaluate.bootstrap_samples=50",
    ),
)
DROPOUT = "lora.lora_dropout=0.2"
RECIPES = {
    "lora_sft": ("data.path=rows.jsonl", DROPOUT, "gradient_accumulation_steps=2", "eval_steps=7"),
    "full_sft": ("data.path=rows.jsonl", "neftune_noise_alpha=5"),
    "qlora_sft": ("data.path=rows.jsonl", DROPOUT),
    "reward_model": ("data.path=pairs.jsonl", DROPOUT),
    "dpo": ("data.path=pairs.jsonl", DROPOUT, "eval_steps=7"),
    "kto": ("data.path=labelled.jsonl", DROPOUT),
    "ppo": (
        *("data.path=prompts.jsonl", "reward.sources=[./reward.py:score]", "max_steps=12", "batch_size=8"),
        *("num_mini_batches=2", "num_ppo_epochs=1", "max_new_tokens=6"),
    ),
}
# files whose making is the moment: while one, or what comes after it, is being written
BEGINNING = ("identity.json", "run.yaml", "ledger.json", "metrics.jsonl", ".trash-*")
CHECKPOINT = tuple(
    f"checkpoint-*/{name}"
    for name in (
        *("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "trainer_0.json", "progress.json", ".MANIFEST.json.new", "MANIFEST.json"),
    )
)
END = (
    *("adapter_model.safetensors", "base.json", "tokenizer.json", "report.html", "ancestry.json", "README.md"),
    "report.json",
)
FILES = (*BEGINNING, *CHECKPOINT, *END)
# what these write in the place of it
CHECKPOINT_OF = {
    "ppo": tuple(f"checkpoint-*/{name}" for name in ("state.safetensors", "state.json", ".MANIFEST.json.new")),
    "full_sft": ("checkpoint-*/model.safetensors", *CHECKPOINT[2:]),
}
END_OF = {"ppo": ("value.safetensors", *END), "full_sft": ("model.safetensors", "config.json", *END[2:])}
TIMES = {"seconds", "peak_memory_gib", "tokens_per_second"}


def furnish(folder: Path) -> Path:
    """A folder with the tiny model, its embeddings 4 times as large, and the rows of all recipes."""
    from tests.rl.fixtures import write_home

    write_home(folder)
    prompts = [{"prompt": f"{n} + {n} ="} for n in range(40)]
    answered = [{**row, "completion": f"{n + n}" + " exactly" * (n % 4)} for n, row in enumerate(prompts)]
    for name, rows in {"rows": answered, "pairs": PAIRS, "labelled": LABELLED, "prompts": prompts}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    return folder


def start(home: Path, recipe: str, folder: str, launcher: list[str] | None = None) -> subprocess.Popen[str]:
    """The public command, in a process of its own, or in those of a launcher."""
    own = {word.split("=")[0] for word in RECIPES[recipe]}
    words = [word for word in WORDS if word.split("=")[0] not in own]
    launched = launcher or [sys.executable, "-m", "finetune_kit"]
    command = [*launched, "run", recipe, *words, *RECIPES[recipe], f"output_dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FINETUNE_KIT_CACHE": str(home / "cache")}
    log = (home / f"{folder}.log").open("a")
    return subprocess.Popen(command, cwd=home, env=environment, text=True, stdout=log, stderr=log)


def finished(run: Path) -> bool:
    return (run / "report.json").is_file()


def whole(home: Path, recipe: str) -> Path:
    """The run that nobody kills, made once."""
    folder = home / f"{recipe}-whole"
    if not finished(folder):
        assert start(home, recipe, folder.name).wait() == 0, (home / f"{folder.name}.log").read_text()[-2000:]
    return folder


def kill_when(process: subprocess.Popen[str], moment: Callable[[], bool], number: int = signal.SIGKILL) -> int | None:
    """Send a signal as soon as `moment()`, and return the exit code; None where the command ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(number)
            return process.wait()
        time.sleep(0.0005)
    return None


def at_file(run: Path, pattern: str, count: int = 1) -> Callable[[], bool]:
    """When a file of this pattern has been made for the `count`-th time; what is there already counts as none."""
    before = files(run, pattern)
    seen: set[tuple[Path, int]] = set()

    def moment() -> bool:
        seen.update(files(run, pattern) - before)
        return len(seen) >= count

    return moment


def files(run: Path, pattern: str) -> set[tuple[Path, int]]:
    """Those of a pattern, with their numbers: one that is written anew has another."""
    found = set()
    for path in run.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            found.add((path, path.stat().st_ino))
    return found


def at_random(run: Path, draw: random.Random, most: int) -> Callable[[], bool]:
    """At a random time: up to 0.3 s after the process has begun the run, or after a checkpoint, up to the `most`-th."""
    count, wait, since = draw.randint(0, most), draw.uniform(0, 0.3), [0.0]
    begun = at_file(run, "checkpoint-*/MANIFEST.json", count) if count else at_file(run, "identity.json")

    def moment() -> bool:
        if not since[0] and begun():
            since[0] = time.monotonic()
        return bool(since[0]) and time.monotonic() - since[0] > wait

    return moment


def drawn(run: Path, recipe: str, draw: random.Random, most: int) -> Callable[[], bool]:
    """A moment before the last step: at random, or when a file is made, one of a checkpoint up to `most` times."""
    pattern = draw.choice([*BEGINNING, *CHECKPOINT_OF.get(recipe, CHECKPOINT)])
    if draw.random() < 0.4:
        return at_random(run, draw, most)
    return at_file(run, pattern, draw.randint(1, most) if "/" in pattern else 1)


def lines(run: Path) -> list[dict[str, float]]:
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("time/")} for line in every]


def assert_same_end(run: Path, expected: Path) -> None:
    """Weights, metrics and report of two finished runs are equal, times aside."""
    assert lines(run) == lines(expected)
    weights = sorted(path.name for path in expected.glob("*.safetensors"))
    assert weights == sorted(path.name for path in run.glob("*.safetensors"))
    for name in weights:
        one, other = load_file(run / name), load_file(expected / name)
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (run, expected)]
    assert reports[0]["metrics"] == reports[1]["metrics"]


def survive(home: Path, recipe: str, number: int, kills: int, seed: int) -> int:
    """Kill a run `kills` times, the last time at its end, run it again until it ends, and compare it.

    Returns how often it was killed. Each time it resumes from a checkpoint no older than the last one that counted.
    """
    draw, run, killed, kept = random.Random(f"{recipe} {seed}"), home / f"{recipe}-{number}", 0, -1
    steps = next(int(word.split("=")[1]) for word in (*RECIPES[recipe], *WORDS) if word.startswith("max_steps="))
    for left in range(kills, 0, -1):
        now = checkpoints(run)
        assert not now or step_of(now[-1]) >= kept
        kept = step_of(now[-1]) if now else -1
        moment = drawn(run, recipe, draw, most=max(1, steps // (kills + 2)))
        if left == 1:
            moment = at_file(run, draw.choice(END_OF.get(recipe, END)))
        process = start(home, recipe, run.name)
        if kill_when(process, moment) is None:
            assert process.returncode == 0, (home / f"{run.name}.log").read_text()[-3000:]
            break
        killed += 1
    if not finished(run):
        assert start(home, recipe, run.name).wait() == 0, (home / f"{run.name}.log").read_text()[-3000:]
    assert_same_end(run, whole(home, recipe))
    return killed
