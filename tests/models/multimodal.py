"""Tiny random checkpoints that read pictures or sound besides text, as folders with the tests' tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from finetune_kit.models.language import auto_class
from tests.models.architectures import _shrink

WORDS = 261  # of the tokenizer; ids from here on stand for pictures
# what the shapes of other tokens than text need to fit to each other
OWN: dict[str, dict[str, Any]] = {
    "glm4v": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
}
ENDS = ("pad_token_id", "eos_token_id", "bos_token_id")
SMALLER = {"num_position_embeddings": 16, "depth": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]}


def parts(config: Any) -> list[Any]:
    """A config and those inside it."""
    inner = [getattr(config, name, None) for name in config.sub_configs or {}]
    return [config, *(part for found in inner if found is not None for part in parts(found))]


def tiny_multimodal(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the class that a checkpoint of this kind is saved as."""
    config = CONFIG_MAPPING[kind]()
    for part in parts(config):
        _shrink(part)
        for name, value in SMALLER.items():
            if hasattr(part, name):
                setattr(part, name, value)
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int) and name not in ENDS:
                setattr(part, name, WORDS + 1)
    text = config.get_text_config()
    text.vocab_size = WORDS + 3
    for name, value in OWN.get(kind, {}).items():
        setattr(text, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, auto_class(config, kind)).from_config(config).to(dtype)


def write_multimodal(kind: str, folder: Path, tokenizer: Path) -> Path:
    """Save one with the tokenizer of another folder. Returns `folder`."""
    tiny_multimodal(kind).save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special")):
            shutil.copy(path, folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 14, "width": 14}}')
    return folder
