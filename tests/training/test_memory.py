"""Memory is predicted from shapes: to the byte where tensors stay, and the step that is rehearsed is the real one."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, TrainerCallback

from finetune_kit.config import LoraConfig, ModelConfig, TrainConfig
from finetune_kit.data.load import load_data
from finetune_kit.model.load import empty_policy, load_policy, load_tokenizer
from finetune_kit.training.memory import four_bit, memory, optimizer_state, settle_types, weights
from tests.fixtures_training import Trained, prepare, settings


def stored(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(model: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a model keeps: parameters, buffers, and the state of quantised weights."""
    for parameter in model.parameters():
        yield parameter
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        for part in (state, nested):
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor)) if part else ()
    yield from model.buffers()


@pytest.mark.parametrize("recipe", ["full_sft", "lora_sft", "qlora_sft"])
def test_weights_are_exact_to_the_byte(home: Path, recipe: str) -> None:
    run = prepare(recipe, home)
    assert predicted(run)["weights"] == stored(held(run.model))
