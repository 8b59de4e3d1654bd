"""What a run is going to do and need, counted from shapes before anything is loaded."""

from __future__ import annotations

from typing import Any

from finetune_kit.config import RecipeConfig
from finetune_kit.data.load import Data
from finetune_kit.model.adapters import matched_modules
from finetune_kit.model.load import empty_policy
from finetune_kit.training.arguments import check_train, micro_batch, steps

# Bytes of optimizer state for each trained parameter: AdamW keeps two float32 moments, the 8-bit ones two bytes.
STATE_BYTES = {"adafactor": 0.1, "sgd": 0.0, "lion_32bit": 4.0, "lion_8bit": 1.0}


def plan(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, Any]:
    """Steps, parameters, matched modules and memory by part (bytes). Nothing is trained and no weight is loaded."""
    check_train(config.train)
    lora = getattr(config, "lora", None)
    policy = empty_policy(config.model, lora, trained_in_full=lora is None)
    parameters = list(policy.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        **steps(config, data, processes),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "target_modules": {} if lora is None else matched_modules(policy),
        "memory_bytes": memory(config, data, policy),
    }


def memory(config: RecipeConfig, data: Data, policy: Any) -> dict[str, int]:
    """Bytes by part. Weights, gradients and optimizer state follow from the shapes; activations are an estimate."""
    parameters = list(policy.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    optimizer = config.train.optim
    state = STATE_BYTES.get(optimizer, 2.0 if "8bit" in optimizer else 8.0)
    return {
        "weights": sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        "gradients": trained * 4,
        "optimizer_state": int(trained * state),
        "activations": activations(config, data, policy),
    }


def activations(config: RecipeConfig, data: Data, policy: Any) -> int:
    """Bytes kept for backward by one forward pass of the longest batch: an estimate for a Llama-like block.

    A block keeps, for each token, about 8 vectors of the hidden size (two norms and their inputs, queries, attention
    output, residuals), 4 of the key/value size and 4 of the feed-forward size; with gradient checkpointing one vector a
    block and one whole block. The head keeps one chunk of logits, at most 4096 tokens x 32768 words.
    """
    shape = policy.config.get_text_config()
    rows, _ = micro_batch(config.train, data.packed)
    longest = config.data.max_length if data.packed else max(map(len, data.train["input_ids"]))
    tokens = rows * longest
    heads = shape.num_attention_heads
    key_value = shape.hidden_size * (getattr(shape, "num_key_value_heads", None) or heads) // heads
    feed_forward = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    block = 8 * shape.hidden_size + 4 * key_value + 4 * feed_forward
    layers = shape.num_hidden_layers
    kept = layers * shape.hidden_size + block if config.train.gradient_checkpointing else layers * block
    head = min(tokens, 4096) * min(shape.vocab_size, 32768) * 2
    bytes_each = 2 if policy.dtype.itemsize == 2 else 4
    return int(tokens * kept * bytes_each + head * 4)
