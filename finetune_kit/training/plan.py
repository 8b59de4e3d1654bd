"""What a run is going to do and need, counted from shapes before anything is loaded."""

from __future__ import annotations

from typing import Any

from finetune_kit.config import RecipeConfig
from finetune_kit.data.load import Data
from finetune_kit.model.adapters import matched_modules
from finetune_kit.model.load import empty_policy
from finetune_kit.training.arguments import check_train, steps
from finetune_kit.training.batches import check_batches, padded_share, plan_layout
from finetune_kit.training.memory import memory


def plan(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, Any]:
    """Steps, parameters, matched modules and memory by part (bytes). Nothing is trained and no weight is loaded.

    padded_share: of the slots of a padded batch, those without a token; None where rows are packed, or sampled.
    """
    check_train(config.train)
    check_batches(config, data)
    lora = getattr(config, "lora", None)
    policy = empty_policy(config.model, lora, trained_in_full=lora is None)
    parameters = list(policy.parameters())
    unknown = data.packed or data.kind == "prompt"
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        **steps(config, data, processes),
        "padded_share": None if unknown else padded_share(plan_layout(config.train, data, processes)),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "target_modules": {} if lora is None else matched_modules(policy),
        "memory_bytes": memory(config, data, policy),
    }
