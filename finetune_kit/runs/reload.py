"""Run as a script in a fresh process: load a folder with plain transformers and PEFT, and write what it gives.

    python -I reload.py '{"folder": …, "probe": …}'        runs/verify.py starts it, and says what the JSON holds

`probe` names a safetensors file with token ids; the logits go to the same name with `.out` behind it. Nothing of this
package can help the weights along: its import is blocked. What transformers lacks comes as the path of a Python file:
`definition` defines the class that a reward model's card shows, `experts` is models/quantized_experts.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def main(given: dict[str, Any]) -> None:
    """Compute the logits of the probe. Raises whatever transformers and PEFT raise."""
    sys.path[:] = given["path"]
    sys.modules["finetune_kit"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file, save_file

    if given["definition"]:
        _module(given["definition"])
    model = _load(given).eval()
    ids = load_file(given["probe"])["ids"].to(given["device"])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits.float().cpu()
    save_file({"logits": logits.contiguous()}, given["probe"] + ".out")


def _load(given: dict[str, Any]) -> Any:
    """The model, in the arithmetic that it was trained in."""
    import torch
    import transformers

    folder, base, quantised, stacks = (given[name] for name in ("folder", "base", "quantised", "stacks"))
    rewards = given["kind"] == "AutoModelForSequenceClassification"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # it has to load, too
    experts: Any = _module(given["experts"]) if stacks else None
    with experts.packing(lambda _: stacks, lambda _: given["kept"]) if stacks else contextlib.nullcontext():
        model = getattr(transformers, given["kind"]).from_pretrained(
            base,
            **({"num_labels": 1} if rewards else {}),
            revision=given["revision"],
            trust_remote_code=given["trusted"],
            attn_implementation=given["attention"],
            quantization_config=transformers.BitsAndBytesConfig.from_dict(json.loads(quantised)) if quantised else None,
            dtype=getattr(torch, given["dtype"]),
            device_map={"": given["device"]},
            use_safetensors=True,
        )
    if type(model).__name__ == "Llama4ForConditionalGeneration":  # it asks its text for pictures (transformers 5.24)
        model.language_model.register_forward_hook(_without_pictures)
    for module in model.modules():  # bitsandbytes would round to bfloat16 on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if rewards:  # its head is trained in float32, whatever the other weights are in
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.score.float().register_forward_pre_hook(lambda head, inputs: (inputs[0].float(),))
    if stacks:
        experts.freeze(model)
    elif quantised:  # as in training: what is not quantised computes in float32
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if base == folder:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder)


def _without_pictures(module: Any, args: Any, output: Any) -> None:
    output.image_outputs = None


def _module(path: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
