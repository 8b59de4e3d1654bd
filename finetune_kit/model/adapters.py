"""Attach a LoRA adapter, with every target module checked by name first."""

from __future__ import annotations

import difflib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.config import LoraConfig
from finetune_kit.errors import SettingsError

if TYPE_CHECKING:
    from peft import PeftModel


def linear_names(model: Any) -> dict[str, int]:
    """How often each linear layer's own name (q_proj, …) occurs in the model, the language-model head left out."""
    import torch

    head = model.get_output_embeddings()
    names: dict[str, int] = {}
    for name, module in model.named_modules():
        # GPT-2 keeps its linear layers as Conv1D
        if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D") and module is not head:
            leaf = name.rsplit(".", 1)[-1]
            names[leaf] = names.get(leaf, 0) + 1
    return names


def check_targets(model: Any, lora: LoraConfig) -> dict[str, int]:
    """{module name: layers it matches}. Raises SettingsError for a name that matches none, naming near ones."""
    linear = linear_names(model)
    if lora.target_modules == "all-linear":
        return linear
    wanted = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    everything = {name for name, _ in model.named_modules() if name}
    matched: dict[str, int] = {}
    for name in wanted:
        if name == "lm_head":
            raise SettingsError(
                "lora.target_modules: TRL does not train an adapter on lm_head, and it merges wrong if tied.",
                "Train the whole head instead: lora.modules_to_save=[lm_head]",
            )
        count = sum(full == name or full.endswith("." + name) for full in everything)
        if not count:
            near = difflib.get_close_matches(name, linear, n=3, cutoff=0.5)
            hint = f"Did you mean {', '.join(near)}? " if near else ""
            found = ", ".join(f"{leaf} ({times})" for leaf, times in linear.items())
            raise SettingsError(f"lora.target_modules: '{name}' is no module of this model.", f"{hint}It has: {found}")
        matched[name] = count
    for name in lora.modules_to_save:
        if not any(full == name or full.endswith("." + name) for full in everything):
            near = difflib.get_close_matches(name, {full.rsplit(".", 1)[-1] for full in everything}, n=3, cutoff=0.4)
            raise SettingsError(
                f"lora.modules_to_save: '{name}' is no module of this model.", f"Near: {', '.join(near)}"
            )
    return matched


def matched_modules(model: PeftModel) -> dict[str, int]:
    """{module name: adapted layers} of a model with an adapter."""
    return dict(Counter(name.rsplit(".", 1)[-1] for name in model.targeted_module_names))


def attach(model: Any, lora: LoraConfig) -> PeftModel:
    """The model with a fresh float32 adapter: B is zero, so it still computes what it did."""
    import peft

    if lora.r < 1:
        raise SettingsError(f"lora.r: expected 1 or more, found {lora.r}.")
    check_targets(model, lora)
    if model.get_input_embeddings().weight.device.type == "meta":
        return peft.get_peft_model(model, peft_config(lora), low_cpu_mem_usage=True)
    return peft.get_peft_model(model, peft_config(lora))


def peft_config(lora: LoraConfig) -> Any:
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def load_adapter(model: Any, folder: str) -> PeftModel:
    """The model with a saved adapter, frozen, for evaluation and generation."""
    import peft

    return peft.PeftModel.from_pretrained(model, folder)


def is_adapter(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def restore(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint folder of this very model back into it (adapter or full, safetensors only)."""
    import peft
    from safetensors.torch import load_file

    if is_adapter(model):
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    state = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(shard))
    # tied weights are saved under one name; the other one shares the tensor and is filled with it
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(model._tied_weights_keys or ()), missing
