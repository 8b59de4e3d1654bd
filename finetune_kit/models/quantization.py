"""4-bit weights by bitsandbytes: on which devices, with which arithmetic, and without what (arXiv 2305.14314)."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.models.coverage import LOST, READ_PAST, changed_in_place, matrices, plain_modules, read_past
from finetune_kit.settings.schema import ModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


def quantization_config(model: ModelConfig, device: torch.device, bfloat16: bool) -> BitsAndBytesConfig:
    """How transformers is to quantise the linear layers while it loads them, tensor by tensor.

    `bfloat16`: whether the device computes in it.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype(device, bfloat16),
    )


def compute_dtype(device: torch.device, bfloat16: bool) -> torch.dtype:
    """What 4-bit weights are unpacked to for a product: bfloat16 where the device computes in it, else float16, else
    float32. On a CPU without bfloat16 units that type is 20 to 160 times slower."""
    import torch

    if bfloat16:
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def check_device(device: torch.device) -> list[str]:
    """What 4-bit training has to do without on this device, in words. Raises where it is impossible altogether."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            "model.load_in_4bit needs the package bitsandbytes, which is not installed.",
            "Run: pip install 'finetune-kit[qlora]'",
        )
    if device.type not in ("cuda", "cpu", "xpu"):
        raise SettingsError(
            f"model.load_in_4bit: bitsandbytes cannot train on {device.type}.",
            "Train an adapter on unquantised weights: run lora_sft",
        )
    if device.type != "cpu":
        return []
    return [
        "4-bit on a CPU: the arithmetic is float32 and each product unpacks its weights first, so a step takes longer "
        "than lora_sft's; paged optimizers act as plain ones, and 8-bit optimizers are slower than fused AdamW"
    ]


def check_base(config: Any, name: str) -> None:
    """Raises SettingsError for a base that is quantised already, or whose weights do not stay as they are."""
    present = getattr(config, "quantization_config", None)
    if present:
        method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
        raise SettingsError(
            f"model.load_in_4bit: {name} is quantised already ({method}).",
            "Name the unquantised model, or leave model.load_in_4bit out.",
        )
    if getattr(config, "rescale_every", 0) > 0:  # RWKV
        raise SettingsError(
            f"model.load_in_4bit: {name} divides its weights outside training, which 4-bit weights cannot follow.",
            "Use lora_sft, or leave model.load_in_4bit out.",
        )


def keep_exact(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs with bfloat16 units (Linear4bit.forward).

    At the first product without gradients it rounds the scales to bfloat16 for good, and the layer's products have no
    gradient from then on: a model that was measured once could not be trained.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def prepare(base: Any) -> Any:
    """Freeze the base and put what is not quantised (embeddings, norms, head, routers) into float32."""
    from finetune_kit.models import quantized_experts

    quantized_experts.freeze(base)
    return base


def packing_stacks() -> AbstractContextManager[None]:
    """In here a model that loads in 4 bits has its stacks of experts in 4 bits, too."""
    from finetune_kit.models import quantized_experts

    return quantized_experts.packing(stacked, changed_in_place)


def unpack_stacks(base: Any) -> None:
    """Write them out again, in the type that they were loaded in."""
    from finetune_kit.models import quantized_experts

    quantized_experts.unpack(base)


def layers(model: Any) -> dict[str, Any]:
    """{name: layer} of what bitsandbytes' layers take the place of, of a model without weights, as transformers
    chooses them: linear layers, but for heads and those of `stacked`. Names are those without an adapter."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    kept += [name.removesuffix(".weight") for name in stacked(model) if name.endswith(".weight")]
    kept += changed_in_place(model)
    return {
        name: module
        for name, module in plain_modules(model).items()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def stacked(model: Any) -> list[str]:
    """Names of the parameters that are kept in 4 bits though no layer of bitsandbytes holds them: the stacks of
    experts, layers that an adapter can only reach by their parameter, and those whose weight is read past them."""
    layers_read = [f"{name}.weight" for name in read_past(model)]
    every, modules = matrices(model), plain_modules(model)
    # what is no module is a parameter, with an adapter or read past one
    stacks = [m.name for m in every if m.parameter or (m.reason in (READ_PAST, LOST) and m.name not in modules)]
    return [*layers_read, *stacks]
