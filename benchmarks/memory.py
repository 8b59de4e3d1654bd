"""Memory that `check` predicts beside the peak of the same run: two steps on the embedded model, one process each.

    python benchmarks/memory.py [--only qlora_sft] [--table memory.md]
    python benchmarks/memory.py --holes

Measured is the kernel's high-water mark of the process's resident memory (VmHWM; Linux) from its start to the end of
the second step; on a GPU, torch.cuda.max_memory_allocated, with what `check` counts for CUDA's context added to it.
Predicted is `finetune_kit check`'s, made in a process that loads no weights. Every row of data is cut
at the length in the table. --holes measures on other models, of random weights, what HEAP_HOLES of planning/memory.py
says; the embedded model has no part in that number.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
# --holes: hidden size, blocks, words (a whole tile of TRL's head or more: of a part, the rest is never touched);
# recipe; rows, tokens
OTHERS = (
    ((256, 8, 32768), ("full_sft",), (4, 256)),
    ((256, 24, 32768), ("lora_sft",), (4, 128)),
    ((512, 8, 65536), ("lora_sft",), (8, 64)),
    ((512, 16, 32768), ("full_sft",), (4, 128)),
    ((512, 16, 40960), ("lora_sft", "gradient_checkpointing=true"), (4, 256)),
    ((768, 12, 32768), ("qlora_sft",), (2, 256)),
)
LIMIT = 180  # seconds that one process may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="recipes whose name begins so")
    parser.add_argument("--table", type=Path, help="write the table to this file, too")
    parser.add_argument("--holes", action="store_true", help="the share of holes in the C library's heap, instead")
    parser.add_argument("--child", choices=("measure", "predict"), help=argparse.SUPPRESS)
    arguments, words = parser.parse_known_args()
    if arguments.child:
        print(json.dumps(predict(*words) if arguments.child == "predict" else measure(*words)))
        return
    if arguments.holes:
        holes()
        return
    lines = [
        "| run | batch | predicted MiB | measured MiB | predicted / measured | by part |",
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
    parts, peak = both(variant, rows, length)
    predicted = sum(parts.values())
    shown = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.0f}" for name, size in parts.items() if size)
    return (
        f"| {' '.join(variant)} | {rows} × {length} | {predicted / 2**20:,.0f} | {peak / 2**20:,.0f} "
        f"| {predicted / peak:.2f} | {shown} |"
    )


def both(variant: tuple[str, ...], rows: int, length: int) -> tuple[dict[str, int], int]:
    """(predicted bytes by part, measured peak in bytes)."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [*variant, *write_data(Path(scratch), rows, length)]
        return child("predict", words), child("measure", words)["peak"]


def holes() -> None:
    """What the peak has beyond the prediction's other parts, as HEAP_HOLES counts it, for each of OTHERS."""
    from finetune_kit.planning.memory import HEAP_HOLES

    shares = []
    for (hidden, blocks, words), variant, batch in OTHERS:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), hidden, blocks, words)
            parts, peak = both((*variant, f"model.name_or_path={folder}"), *batch)
        found = peak - sum(parts.values()) + parts["heap"]
        shares.append(HEAP_HOLES * found / parts["heap"])
        print(
            f"{hidden} wide, {blocks} blocks, {words} words, {' '.join(variant)}, {batch[0]} × {batch[1]}: activations "
            f"{parts['activations'] / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, holes {shares[-1]:.2f}",
            flush=True,
        )
    print(f"median {statistics.median(shares):.2f}")


def write_model(folder: Path, hidden: int, blocks: int, words: int) -> None:
    """A Llama of random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_kit.models.tiny import write_tiny_model

    write_tiny_model(folder)
    shape = {"hidden_size": hidden, "num_hidden_layers": blocks, "vocab_size": words, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, intermediate_size=3 * hidden, num_attention_heads=8, num_key_value_heads=4)
    LlamaForCausalLM(config).save_pretrained(folder)


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
        "max_steps=2",
        f"output_dir={folder / 'run'}",
    ]


def child(kind: str, words: list[str]) -> dict[str, int]:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT,
    )
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepared(recipe: str, words: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """(settings, tokenizer, data)"""
    from finetune_kit import recipe as recipes
    from finetune_kit.data.load import load_data
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.load import resolve

    found = recipes.load(recipe)
    config = resolve(found.config_class, found.name, None, words)
    tokenizer = load_tokenizer(config.model)
    return config, tokenizer, load_data(config.data, "prompt_completion", tokenizer)


def predict(recipe: str, *words: str) -> dict[str, int]:
    """Bytes by part."""
    from finetune_kit.planning.plan import plan

    config, _, data = prepared(recipe, words)
    parts: dict[str, int] = plan(config, data)["memory_bytes"]
    return parts


def measure(recipe: str, *words: str) -> dict[str, int]:
    """Bytes at the peak of two real steps, loading included."""
    from trl import SFTConfig, SFTTrainer

    from finetune_kit.models.load import load_policy
    from finetune_kit.training.begin import begin
    from finetune_kit.training.build import build
    from finetune_kit.training.fit import fit

    config, tokenizer, data = prepared(recipe, words)
    lora = getattr(config, "lora", None)
    policy = load_policy(config.model, lora, trained_in_full=lora is None)
    trainer = build(SFTTrainer, SFTConfig, config, policy, tokenizer, data)
    begin(config, tokenizer, data, policy)
    fit(trainer, config.train, dict)
    if policy.device.type == "cuda":
        import torch

        from finetune_kit.planning.memory import GPU_CONTEXT

        return {"peak": torch.cuda.max_memory_allocated() + GPU_CONTEXT}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(status["VmHWM"].split()[0]) * 1024}


if __name__ == "__main__":
    main()
