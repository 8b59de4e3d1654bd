"""Held-out bits a byte of tiny Shakespeare after pretraining from nothing, by seed, with what it took.

    python benchmarks/pretraining.py                       # the recipe as it is, seeds 0, 1 and 2
    python benchmarks/pretraining.py optim=adamw_torch learning_rate=4e-3
    python benchmarks/pretraining.py --tokenizer           # 8,192 words from 10 MB

Each run is a process of its own. Seconds are those of the training steps (metrics.jsonl), measuring left out; CPU
seconds are of the whole process, all its threads counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def train(folder: Path, seed: int, words: list[str]) -> dict[str, float]:
    """Figures of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["run", "pretrain", f"train.seed={seed}", f"output_dir={folder / str(seed)}", "eval_steps=null", *words]
    done = subprocess.run([sys.executable, "-m", "finetune_kit", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = json.loads((folder / str(seed) / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / str(seed) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    measured = next(line for line in report["metrics"] if line["name"] == "held_out_bits_per_byte")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"bits": measured["after"], "seconds": last["seconds"], "cpu": cpu, "tokens": last["tokens"]}


def time_tokenizer() -> None:
    """Seconds for 8,192 words from 10 MB, and whether the ids are those of the library tokenizers alone."""
    from importlib.resources import files

    from finetune_kit.models.new_tokenizer import train_tokenizer

    text = (files("finetune_kit.data") / "assets/shakespeare.txt").read_text(encoding="utf-8")
    texts = [text[start : start + 4096] for start in range(0, len(text), 4096)] * 9
    size, begin, cpu = sum(len(part.encode()) for part in texts), time.perf_counter(), time.process_time()
    tokenizer = train_tokenizer(texts, 8192)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    print(f"{len(tokenizer):,} words from {size / 1e6:.1f} MB in {seconds:.1f} s, {cpu:.1f} CPU seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="settings of pretrain, key=value")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokenizer", action="store_true")
    given = parser.parse_args()
    if given.tokenizer:
        return time_tokenizer()
    print("| seed | held-out bits/byte | training, s | CPU s | tokens |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        bits = []
        for seed in range(given.seeds):
            found = train(Path(scratch), seed, given.words)
            bits.append(found["bits"])
            figures = f"{found['seconds']:.0f} | {found['cpu']:.0f} | {found['tokens']:,.0f}"
            print(f"| {seed} | {found['bits']:.3f} | {figures} |", flush=True)
    print(f"\nmean {statistics.mean(bits):.3f}, worst {max(bits):.3f}")


if __name__ == "__main__":
    main()
