"""Memory that `check` predicts beside the peak of the same run: two steps on the embedded model, one process each.

    python benchmarks/memory.py [--only qlora_sft] [--table memory.md]

Measured is the kernel's high-water mark of the process's resident memory (VmHWM; Linux), loading included. Predicted is
`finetune_kit check`'s, made in a process that loads no weights. Every row of data is cut at the length in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VARIANTS = (
    ("full_sft",),
    ("lora_sft",),
    ("lora_sft", "gradient_checkpointing=true"),
    ("qlora_sft",),
)
SHAPES = ((2, 128), (4, 256))  # rows in a batch, tokens in a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="recipes whose name begins so")
    parser.add_argument("--table", type=Path, help="write the table to this file, too")
    parser.add_argument("--child", choices=("measure", "predict"), help=argparse.SUPPRESS)
    arguments, words = parser.parse_known_args()
    if arguments.child:
        print(json.dumps(predict(*words) if arguments.child == "predict" else measure(*words)))
        return
    lines = [
        "| run | batch | predicted MiB | measured MiB | difference | by part |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    for variant in VARIANTS:
        for rows, length in SHAPES:
            if variant[0].startswith(arguments.only):
                lines.append(compare(variant, rows, length))
                print(lines[-1], flush=True)
    if arguments.table:
        arguments.table.write_text("\n".join(lines) + "\n")


def compare(variant: tuple[str, ...], rows: int, length: int) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [*variant, *write_data(Path(scratch), rows, length)]
        parts, measured = (child(kind, words) for kind in ("predict", "measure"))
    predicted, peak = sum(parts.values()), measured["peak"]
    shown = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.0f}" for name, size in parts.items())
    run = " ".join(variant)
    return (
        f"| {run} | {rows} × {length} | {predicted / 2**20:,.0f} | {peak / 2**20:,.0f} | {predicted / peak - 1:+.1%} "
        f"| {shown} |"
    )


def write_data(folder: Path, rows: int, length: int) -> list[str]:
    """Rows for several batches, which all have `length` tokens, one short held-out row; the settings that use them."""
    text = " ".join(f"word {number}" for number in range(length))
    lines = [json.dumps({"prompt": f"Count from {row}.", "completion": text}) for row in range(4 * rows)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "Count.", "completion": "word 0"}))
    return [
        f"data.path={folder / 'rows.jsonl'}",
        f"data.held_out_path={folder / 'held_out.jsonl'}",
        f"max_length={length}",
        f"per_device_train_batch_size={rows}",
        "evaluate.size=0",
    ]


def child(kind: str, words: list[str]) -> dict[str, int]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, *words], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def settings(recipe: str, *words: str) -> tuple[Any, Any]:
    from finetune_kit import recipe as recipes
    from finetune_kit.config import resolve

    found = recipes.load(recipe)
    return found, resolve(found.config_class, found.name, None, words)


def predict(recipe: str, *words: str) -> dict[str, int]:
    """Bytes by part."""
    from finetune_kit.data.load import load_data
    from finetune_kit.model.load import load_tokenizer
    from finetune_kit.training.plan import plan

    _, config = settings(recipe, *words)
    tokenizer = load_tokenizer(config.model)
    parts: dict[str, int] = plan(config, load_data(config.data, "prompt_completion", tokenizer))["memory_bytes"]
    return parts


def measure(recipe: str, *words: str) -> dict[str, int]:
    """Bytes at the peak of two real steps."""
    from finetune_kit.training.trial import measure_step

    measure_step(*settings(recipe, *words))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(status["VmHWM"].split()[0]) * 1024}


if __name__ == "__main__":
    main()
