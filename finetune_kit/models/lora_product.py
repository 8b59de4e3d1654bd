"""LoRA's product, scaled and added to a layer's output in one pass over it, where PEFT makes three."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import Tensor


class _InOnePass(LoraVariant):  # type: ignore[misc]  # PEFT ships no types here
    """scaling · B A x + W x, by PEFT's way for kinds of LoRA, which its own layers and `merge` ask.

    PEFT writes B A x, multiplies it by the scaling and adds it, and in backward multiplies the gradient: passes over
    numbers as wide as the layer, which with r = 16 take longer on a CPU than the products.
    """

    @staticmethod
    def init(module: Any, adapter_name: str) -> None:
        """Nothing: its weights are those of plain LoRA."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        low = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        up, scaling = module.lora_B[active_adapter].weight, module.scaling[active_adapter]
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scaling).view_as(result)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight - delta.to(orig_weight.dtype)


def add_in_one_pass(model: Any) -> int:
    """Let the plain LoRA that a model has on float32 linear layers add its products so, on a CPU; how many layers do.

    Adapters that are added later keep PEFT's way.
    """
    count = 0
    for module in model.modules():
        if type(module) is not Linear or type(base := module.get_base_layer()) is not torch.nn.Linear:
            continue
        # meta: shapes alone, to count before anything is loaded
        if base.weight.dtype != torch.float32 or base.weight.device.type not in ("cpu", "meta"):
            continue
        for name in module.lora_A.keys() - module.lora_variant.keys():
            if not module.lora_bias[name]:
                module.lora_variant[name] = _InOnePass()
                count += 1
    return count
