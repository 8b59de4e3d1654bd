"""The tables of docs/scale.md: memory on each of 8 GPUs and what they send, computed from shapes; nothing is run.

    python benchmarks/scale.py [--devices 8] [--tokens 2048]

Models of 8 and 70 thousand million weights, in the shapes of Llama 3.1, with a vocabulary of 128,256. The numbers are
those of `finetune_kit check --devices`, as it would print them on a machine with GPUs that have bfloat16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from finetune_kit.models import device

device.device = lambda: torch.device("cuda")  # before anything else imports it: the plan is one for GPUs
device.computes_in_bfloat16 = lambda: True

from finetune_kit import recipe as recipes  # noqa: E402 - takes the device from above
from finetune_kit.data.load import load_data  # noqa: E402 - takes the device from above
from finetune_kit.models import shapes  # noqa: E402 - takes the device from above
from finetune_kit.models import tokenizer as tokenizers  # noqa: E402 - takes the device from above
from finetune_kit.models.tiny import write_tiny_model  # noqa: E402 - takes the device from above
from finetune_kit.planning.devices import shares  # noqa: E402 - takes the device from above
from finetune_kit.settings.load import resolve  # noqa: E402 - takes the device from above

SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
HEAD = """| model | run | sharding | GiB on each GPU | of it for training | GiB sent by each in a step |
| --- | --- | --- | --- | --- | --- |"""
METHODS = (
    ("full_sft",),
    ("lora_sft",),
    ("qlora_sft",),
    ("reward_model",),
    ("dpo",),
    ("dpo", "lora.r=0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="in a row; a pair has two rows")
    arguments = parser.parse_args()
    print(HEAD)
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in SHAPES.items():
            folder = shapes_alone(Path(scratch) / name, shape)
            for method in METHODS:
                for line in lines(name, folder, method, arguments.devices, arguments.tokens):
                    print(line, flush=True)


def shapes_alone(folder: Path, shape: dict[str, int]) -> Path:
    """A model's folder with its tokenizer and config, and no weights."""
    write_tiny_model(folder)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    own = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False}
    config |= {**shape, **own, "max_position_embeddings": 131072, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lines(name: str, folder: Path, method: tuple[str, ...], devices: int, tokens: int) -> list[str]:
    recipe, *words = method
    answer = "a" * (tokens - 64)  # a byte is a token here; the rest is the prompt and the template
    rows = folder.parent / "rows.jsonl"
    row = {"prompt": "q", "chosen": answer, "rejected": "b" + answer, "completion": answer}
    kept = ("prompt", "completion") if recipe.endswith("_sft") else ("prompt", "chosen", "rejected")
    rows.write_text("\n".join(json.dumps({key: f"{row[key]}{n}" for key in kept}) for n in range(9)))
    own = [f"data.max_length={tokens}", "per_device_train_batch_size=1", "gradient_checkpointing=true"]
    given = [f"model.name_or_path={folder}", f"data.path={rows}", "held_out_size=1", *own, *words]
    config = resolve(recipes.load(recipe).config_class, recipe, None, given)
    tokenizer = tokenizers.load_tokenizer(config.model, weights=False)
    data = load_data(config.data, config.kind, tokenizer)
    lora = getattr(config, "lora", None)
    policy = shapes.empty_policy(config.model, lora, trained_in_full=lora is None)
    found = []
    for way in shares(config, data, policy, devices):
        sizes = [f"{size / 2**30:.1f}" for size in (way.bytes, way.training)]
        cells = (name, " ".join(method), way.sharding, *sizes, f"{way.sent / 2**30:.2f}")
        found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    main()
