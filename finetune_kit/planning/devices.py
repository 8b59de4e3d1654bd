"""What a run needs on each of several devices, and what the devices send each other, for each way to cut the model.

From the parts of one device's memory (memory.py). With N devices, weights W, gradients G, optimizer state S, and all
else of a step A, in bytes; of a model in shards, B is what is gathered for the moment:

    data parallel      W + 2 G + S + A          gradients once more in the buckets that are sent
    ZeRO-2             W + (G + S) / N + B + A  B: the gradients of one block
    FSDP2, ZeRO-3      (W + G + S) / N + B + A  B: embeddings, head and two blocks, with the gradients of one

A model is loaded and measured whole on each device before it is cut, so that each needs W and what measuring takes.

Sent by each device in an optimizer step of p passes, with f = (N - 1) / N, and T the trained weights; w and g are W and
G in the type of the arithmetic, in which shards are gathered and reduced:

    data parallel      2 f G
    ZeRO-2             f (p G + T)
    FSDP2, ZeRO-3      f p (2 w + g)

Sources: Rajbhandari et al. 2020 (arXiv 1910.02054), sections 5 and 7; Zhao et al. 2023 (arXiv 2304.11277), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_kit.data.load import Data
from finetune_kit.models.coverage import layers_of
from finetune_kit.models.device import computes_in_bfloat16
from finetune_kit.planning.memory import memory
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.training.batching import micro_batch

# the launcher's files for them, in the order in which they should be tried: each sends more than the one before
FILES = {
    "data parallel": "accelerate_config.yaml",
    "ZeRO-2": "docs/accelerate/zero2.yaml",
    "FSDP2": "docs/accelerate/fsdp2.yaml",
}


@dataclass(frozen=True)
class Share:
    """One way to spread a run over devices: most bytes on each, those of training alone, and the bytes that each sends
    in an optimizer step."""

    sharding: str
    bytes: int
    training: int
    sent: int

    @property
    def file(self) -> str:
        return FILES[self.sharding]


def shares(config: RecipeConfig, data: Data, policy: Any, devices: int) -> list[Share]:
    """The ways that this run can be spread over `devices` devices, the one that gives up least first.

    `policy`: the empty one of `config`. Of 4-bit weights and of PPO's own loop each device holds the whole.
    """
    parts = memory(config, data, policy)
    weights, gradients, state = parts["weights"], parts["gradients"], parts["optimizer_state"]
    rest = sum(parts.values()) - weights - gradients - state
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    others = (devices - 1) / devices
    loaded = sum(parts.get(name, 0) for name in ("libraries", "cuda_context", "workspaces", "evaluation")) + weights

    def way(sharding: str, training: int, sent: float) -> Share:
        return Share(sharding, max(training, loaded), training, int(sent))

    found = [way("data parallel", weights + 2 * gradients + state + rest, 2 * others * gradients)]
    if config.model.load_in_4bit or config.batch_size is not None:
        return found
    _, passes = micro_batch(config.train, data, devices)
    blocks = list(layers_of(policy))
    of_block = max(map(_gradients, blocks), default=gradients)
    cut = (gradients + state) // devices
    found.append(way("ZeRO-2", weights + cut + of_block + rest, others * (passes * gradients + trained)))
    whole, block = _gathered(policy), max(map(_gathered, blocks), default=0)
    root = whole - sum(map(_gathered, blocks))  # embeddings and head: whole for all of the step
    reduced = gradients // 2 if computes_in_bfloat16() else gradients
    size = weights // devices + cut + root + 2 * block + of_block + rest
    found.append(way("FSDP2", size, others * passes * (2 * whole + reduced)))
    return found


def _gradients(module: Any) -> int:
    """Bytes of the gradients of what is trained, float32."""
    return sum(4 * parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _gathered(module: Any) -> int:
    """Bytes of the weights in the type that they are gathered in, which is that of the arithmetic."""
    widest = 2 if computes_in_bfloat16() else 4
    return sum(parameter.numel() * min(parameter.element_size(), widest) for parameter in module.parameters())
