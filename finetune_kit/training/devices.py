"""What a run needs on each of several devices, and what the devices send each other, for each way to cut the model.

From the parts of one device's memory (memory.py). With N devices, weights W, gradients G, optimizer state S, what was
gathered for the moment B, and all else of a step A, in bytes on each device:

    data parallel      W + 2 G + S + A          gradients once more in the buckets that are sent
    ZeRO-2             W + (G + S) / N + B + A  B: the gradients of one block
    FSDP2, ZeRO-3      (W + G + S) / N + B + A  B: embeddings, head and two blocks, with their gradients

Sent by each device in an optimizer step of p passes, with f = (N - 1) / N; T: the trained weights. Sources: Rajbhandari
et al. 2020 (arXiv 1910.02054), sections 5 and 7; Zhao et al. 2023 (arXiv 2304.11277), section 3.

    data parallel      2 f G
    ZeRO-2             f (p G + T)
    FSDP2, ZeRO-3      f p (2 W + G)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_kit.config import RecipeConfig
from finetune_kit.data.load import Data
from finetune_kit.training.arguments import micro_batch
from finetune_kit.training.memory import memory
from finetune_kit.training.rehearsal import blocks_of

# the launcher's files for them, in the order in which they should be tried: each sends more than the one before
FILES = {
    "data parallel": "accelerate_config.yaml",
    "ZeRO-2": "docs/accelerate/zero2.yaml",
    "FSDP2": "docs/accelerate/fsdp2.yaml",
}


@dataclass(frozen=True)
class Share:
    """One way to spread a run over devices: bytes on each, and bytes that each sends in an optimizer step."""

    sharding: str
    bytes: int
    sent: int

    @property
    def file(self) -> str:
        return FILES[self.sharding]


def shares(config: RecipeConfig, data: Data, policy: Any, devices: int) -> list[Share]:
    """The ways that this run can go on `devices` devices, the one that sends least first.

    `policy`: the empty one of `config`. Of 4-bit weights and of PPO's own loop each device holds the whole.
    """
    parts = memory(config, data, policy)
    weights, gradients, state = parts["weights"], parts["gradients"], parts["optimizer_state"]
    rest = sum(parts.values()) - weights - gradients - state
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    share = (devices - 1) / devices
    found = [Share("data parallel", weights + 2 * gradients + state + rest, int(2 * share * gradients))]
    if config.model.load_in_4bit or hasattr(config, "num_ppo_epochs"):
        return found
    _, passes = micro_batch(config.train, data.packed)
    every = [_bytes(block) for block in blocks_of(policy)]
    whole, whole_gradients = _bytes(policy)
    block, block_gradients = every[0] if every else (0, whole_gradients)
    root = whole - sum(size for size, _ in every) + whole_gradients - sum(size for _, size in every)
    cut = (gradients + state) // devices
    sent = int(share * (passes * gradients + trained))
    found.append(Share("ZeRO-2", weights + cut + block_gradients + rest, sent))
    gathered = root + 2 * block + block_gradients
    sent = int(share * passes * (2 * weights + gradients))
    found.append(Share("FSDP2", weights // devices + cut + gathered + rest, sent))
    return found


def _bytes(module: Any) -> tuple[int, int]:
    """(weights, their gradients in float32), of what is trained."""
    parameters = list(module.parameters())
    gradients = sum(4 * parameter.numel() for parameter in parameters if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters), gradients
