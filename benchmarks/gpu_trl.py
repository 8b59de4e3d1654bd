"""Ours beside TRL's own trainers on one GPU, at the shapes of Llama-3.1-8B and Qwen3-0.6B, in turns.

    python benchmarks/gpu_trl.py [--shape 8B] [--jobs sft_lora dpo] [--rounds 2] [--steps 8] [--rows 8]
                             [--answers FILE] [--pairs FILE] [--max-length 2048] [--gradient-checkpointing]
    python benchmarks/gpu_trl.py --device cpu --shape tiny     # that the program runs; its figures say nothing

bfloat16, an adapter of rank 16 on all linear layers, fused AdamW: the sides and jobs of benchmarks/methods.py, which
says what --rows, --steps and the files are. Neither time nor memory depends on what weights say: random ones are
written once, to a temporary folder (16 GB for 8B) or to --folder, and each side loads them in a process of its own.
Prints real tokens a second, the peak of the GPU's tensors from the first step on, and the multiplications that its
first step was for (benchmarks/flop.py), a second, as a share of the card's best torch.mm in bfloat16, which is measured
first.

TRL has its best documented settings: `trl`, flash attention where flash-attn is installed, and the reference of DPO
computed once; `trl_packed`, packing besides, with about as many tokens a step. Losses of `ours` and `trl` are of the
same rows and compared; those of packed rows are of others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import methods

LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
# the models' own config.json
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {
        **{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_parameters": LLAMA3_ROPE},
        "tie_word_embeddings": False,
    },
    "0.6B": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "1.7B": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144},
        **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        **{"rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "135M": {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
        **{"rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": {},  # that of finetune_kit/models/tiny.py
}
JOBS = ["sft_lora", "sft_qlora", "sft_full", "dpo", "reward"]


def options() -> argparse.ArgumentParser:
    parser = methods.common_options(__doc__ or "", SIDES, JOBS)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help="where the random weights are written, or lie already")
    parser.add_argument("--json", action="store_true", help="a line of figures for each side, as it ends, instead")
    parser.set_defaults(jobs=["sft_lora", "dpo"], steps=8, rows=8, max_length=2048)
    return parser


def main() -> None:
    arguments = options().parse_args()
    if arguments.child:
        print(json.dumps(methods.measure(*arguments.child, arguments, SIDES, by_formula=True)))
        return
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here. That the program runs is seen with: --device cpu --shape tiny")
    best = 0.0 if arguments.json else matrix_peak(arguments.device)
    if not arguments.json:
        print(f"{card(arguments.device)}: torch.mm at its best {best / 1e12:.2f} TFLOP/s")
    if not arguments.json and importlib.util.find_spec("flash_attn") is None:
        print("flash-attn is not installed: TRL attends with SDPA")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "config.json").is_file():
            write_model(folder, arguments.shape, arguments.device)
        own = {"CUDA_VISIBLE_DEVICES": ""} if arguments.device == "cpu" else {}
        run = partial(methods.child, script=__file__, more=("--model", str(folder)), **own)
        for job in arguments.jobs:
            who = [who for who in arguments.who if who != "trl_packed" or job.startswith("sft")]  # TRL packs no pairs
            if arguments.json:
                for one in who:
                    print(json.dumps({"job": job, "who": one, **run(job, one)}), flush=True)
                continue
            show(job, methods.turns(job, who, arguments.rounds, run), best)


def card(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "this CPU"


def matrix_peak(device: str) -> float:
    """Floating-point operations a second of torch.mm at its best, in bfloat16 on a GPU, in float32 on a CPU."""
    import torch

    on_gpu = device == "cuda"
    sizes = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 4096)) if on_gpu else ((512, 512, 512),)
    rates = []
    for rows, inner, columns in sizes:
        dtype = torch.bfloat16 if on_gpu else torch.float32
        one, two = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
        one, two = one.to(dtype), two.to(dtype)
        for _ in range(8):  # the first ones warm up
            if on_gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(10):
                torch.mm(one, two)
            if on_gpu:
                torch.cuda.synchronize()
            rates.append(10 * 2 * rows * inner * columns / (time.perf_counter() - started))
    if on_gpu:
        torch.cuda.empty_cache()
    return max(rates)


def write_model(folder: Path, shape: str, device: str) -> None:
    """A model of random weights in bfloat16, drawn on the device, with the embedded model's tokenizer."""
    from finetune_kit.models.tiny import write_tiny_model

    if shape == "tiny":
        write_tiny_model(folder)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = some_tokenizer(folder)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape], **ends), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def some_tokenizer(folder: Path) -> Any:
    """The embedded model's; where its package is not installed, one of a token a byte."""
    from transformers import AutoTokenizer

    from finetune_kit.errors import FinetuneKitError
    from finetune_kit.models.tiny import write_tiny_model
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.schema import ModelConfig

    try:
        return load_tokenizer(ModelConfig())
    except (FinetuneKitError, ImportError):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            return AutoTokenizer.from_pretrained(write_tiny_model(Path(scratch)))


def trl(job: str, config: Any, tokenizer: Any, data: Any, clock: methods.Clock, **best: Any) -> Any:
    """TRL over the same batches, with flash attention where it is installed; its head is TRL's own kernel."""
    if clock.on_gpu and importlib.util.find_spec("flash_attn") is not None:
        config.model.attn_implementation = "flash_attention_2"
    more = {"precompute_ref_log_probs": True} if job == "dpo" else {}
    return methods.theirs(job, config, tokenizer, data, clock, **more, **best)


def trl_packed(job: str, config: Any, tokenizer: Any, data: Any, clock: methods.Clock) -> Any:
    """TRL over full rows, as many as have the tokens of an unpacked step."""
    tokens = sum(map(len, data.train["input_ids"])) / len(data.train) * config.train.per_device_train_batch_size
    rows = max(1, round(tokens / config.data.max_length))
    packing = {"packing": True, "max_length": config.data.max_length, "per_device_train_batch_size": rows}
    return trl(job, config, tokenizer, data, clock, **packing)


def show(job: str, found: dict[str, list[dict[str, Any]]], best: float) -> None:
    print(f"\n{job}\n| | real tokens/s | peak MiB | of the best torch.mm | GFLOP a real token | padded | losses |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    speeds = {who: statistics.median(one["real"] / one["seconds"] for one in rounds) for who, rounds in found.items()}
    for who, rounds in found.items():
        rates, last = sorted(one["real"] / one["seconds"] for one in rounds), rounds[-1]
        flop, peak = last["flop"] / last["first_real"], max(one["peak"] for one in rounds)
        print(
            f"| {who} | {speeds[who]:,.0f} ({rates[0]:,.0f} to {rates[-1]:,.0f}) | {peak:,} "
            f"| {flop * speeds[who] / best:.1%} | {flop / 1e9:.2f} | {1 - last['all_real'] / last['slots']:.0%} "
            f"| {' '.join(f'{loss:.4f}' for loss in last['losses'])} |",
            flush=True,
        )
    methods.show_spent(found)
    if "ours" not in found:
        return
    for who in found:
        if who != "ours":
            print(f"ours / {who}: {speeds['ours'] / speeds[who]:.2f}")
    if "trl" in found:
        pairs = zip(found["ours"][-1]["losses"], found["trl"][-1]["losses"], strict=True)
        print(f"losses of ours and trl differ by up to {max(abs(one - two) for one, two in pairs):.1e}")


SIDES = {"ours": methods.ours, "trl": trl, "trl_packed": trl_packed}

if __name__ == "__main__":
    main()
