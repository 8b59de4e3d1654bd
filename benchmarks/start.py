"""Time from process start to the first optimizer step, and the losses, beside `trl sft` on the same tokens.

    python benchmarks/start.py [--rounds 2] [--steps 4]

Both train the embedded model with the same LoRA settings, rate and order of rows, on tokens that finetune_kit made; the
runs take turns. Times are of the wall clock and noisy: compare them within one call only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, BATCH, RATE = 64, 4, 5e-4
# how each says the loss of a step
LOSS = {"finetune_kit": r"^step \d+/\d+  loss ([\d.]+)", "trl sft": r"'loss': '?([\d.]+)"}
TRL = Path(sys.executable).with_name("trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_inputs(folder)
        times: dict[str, list[float]] = {"finetune_kit": [], "trl sft": []}
        losses: dict[str, list[float]] = {}
        for turn in range(arguments.rounds):
            for name, command in commands(folder, model, turn, arguments.steps).items():
                first, found = watch(command, LOSS[name])
                times[name].append(first)
                losses[name] = found
                print(f"round {turn + 1}  {name:13s} first step after {first:5.1f} s", flush=True)
    print()
    for name, seconds in times.items():
        shown = " ".join(f"{loss:.4f}" for loss in losses[name])
        print(f"{name:13s} median {statistics.median(seconds):5.1f} s to the first step; losses {shown}")


def write_inputs(folder: Path) -> str:
    """rows.jsonl for finetune_kit, tokens/train.jsonl with the same tokens and labels for TRL. Returns the model."""
    from finetune_kit.data.load import load_data
    from finetune_kit.models.embedded import embedded_folder
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.schema import DataConfig, ModelConfig

    questions = [(f"What is {n} plus {n * 7 % 23}?", str(n + n * 7 % 23)) for n in range(ROWS + 1)]
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in questions]
    (folder / "rows.jsonl").write_text("\n".join(lines[:-1]))
    (folder / "held_out.jsonl").write_text(lines[-1])
    config = DataConfig(path=str(folder / "rows.jsonl"), held_out_path=str(folder / "held_out.jsonl"))
    data = load_data(config, "prompt_completion", load_tokenizer(ModelConfig()))
    (folder / "tokens").mkdir()
    with (folder / "tokens" / "train.jsonl").open("w") as file:
        for row in data.train:
            file.write(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) + "\n")
    return str(embedded_folder())


def commands(folder: Path, model: str, turn: int, steps: int) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "finetune_kit", "run", "lora_sft", f"data.path={folder / 'rows.jsonl'}"]
    ours += [f"data.held_out_path={folder / 'held_out.jsonl'}", f"output_dir={folder / f'ours-{turn}'}"]
    ours += ["evaluate.size=0", "evaluate.general_text=false", f"learning_rate={RATE}", "warmup_steps=0"]
    ours += [f"per_device_train_batch_size={BATCH}", f"max_steps={steps}", "logging_steps=1"]
    theirs = [str(TRL), "sft", "--model_name_or_path", model, "--dataset_name", str(folder / "tokens")]
    theirs += ["--output_dir", str(folder / f"theirs-{turn}"), "--use_cpu", "--bf16", "false", "--seed", "0"]
    theirs += ["--gradient_checkpointing", "false", "--learning_rate", str(RATE), "--max_steps", str(steps)]
    theirs += ["--per_device_train_batch_size", str(BATCH), "--logging_steps", "1", "--save_strategy", "no"]
    theirs += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0"]
    theirs += ["--lora_target_modules", "all-linear", "--report_to", "none"]
    return {"finetune_kit": ours, "trl sft": theirs}


def watch(command: list[str], pattern: str) -> tuple[float, list[float]]:
    """(seconds until the first line with a loss, all losses) of a command."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    started, first, losses, said = time.perf_counter(), 0.0, [], []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for line in process.stdout or ():
        said.append(line)
        if found := re.search(pattern, line):
            first = first or time.perf_counter() - started
            losses.append(float(found[1]))
    if process.wait() or not losses:
        sys.exit("".join(said[-20:]))
    return first, losses


if __name__ == "__main__":
    main()
