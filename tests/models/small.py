"""Small random models of any architecture, in folders of their own."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from tests.models.architectures import auto_class, tiny_config

# sizes that must fit together, or that some call by a name which means another thing elsewhere
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {"n_groups": 2, "chunk_size": 16},
}


def write_model(model_type: str, folder: Path, tiny_model: Path, **changed: Any) -> Path:
    """Save a random model of an architecture with the tokenizer of the tiny one; `changed`: settings of its config."""
    config = tiny_config(model_type)
    for name, value in {**OWN.get(model_type, {}), **changed}.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auto_class(model_type).from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
