"""Tokenizer and policy, from the embedded default, a local folder or the Hub. Safetensors only."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import SettingsError
from finetune_kit.models import adapters, language, quantization
from finetune_kit.models.adapter_config import read_adapter_config
from finetune_kit.models.device import computes_in_bfloat16, device, weight_dtype
from finetune_kit.models.folder import check_weights
from finetune_kit.models.generation_config import mend_generation_config
from finetune_kit.models.new import NewModelConfig, is_new, scale_residual
from finetune_kit.models.provenance import check_base
from finetune_kit.models.source import load_model_config, log_once, plain_errors, public_name, source_of
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from finetune_kit.system.terminal import doing

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load_base(
    model: ModelConfig, trained_in_full: bool = False, auto_class: str | None = None, **own: Any
) -> PreTrainedModel:
    """The language model on its device, in evaluation mode; with model.load_in_4bit quantised while it loads.

    `auto_class`: of transformers, for another head. `own`: further settings of the model's config, such as num_labels.
    A checkpoint that reads more than text is loaded as its own class; what is not part of the language model is frozen.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    if isinstance(model, NewModelConfig) and is_new(model):
        return random_weights(model)
    quantised = {}
    packing: Any = nullcontext()
    writes = auto_class is None
    auto_class = auto_class or language_class(model)
    own_heads = ("score.",) if own else ("no head",)  # a new head is random
    if model.load_in_4bit:
        if trained_in_full:
            raise SettingsError("model.load_in_4bit: quantised weights cannot be trained.", "Run qlora_sft")
        for note in quantization.check_device(device()):
            log_once(note)
        quantization.check_base(load_model_config(model), model.name_or_path)
        quantised = {"quantization_config": quantization.quantization_config(model, device(), computes_in_bfloat16())}
        packing = quantization.packing_stacks()
    disable_progress_bar()
    with plain_errors(model), doing(f"loading {public_name(model.name_or_path)}"), packing:
        source = source_of(model, weights=True)
        base: PreTrainedModel
        base, loading = getattr(transformers, auto_class).from_pretrained(
            **source,
            **quantised,
            **own,
            adapter_kwargs={"local_files_only": source["local_files_only"]},  # it looks for an adapter there, too
            dtype=weight_dtype(model, trained_in_full),
            attn_implementation=model.attn_implementation,
            device_map={"": device()},  # each tensor goes straight to its device: no second copy of the model
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers fills them with random numbers and only warns
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(own_heads)):
        raise SettingsError(
            f"model.name_or_path={model.name_or_path} lacks {len(missing)} of its weights, such as {missing[0]}.",
            "Download all of its files again.",
        )
    if model.load_in_4bit:
        quantization.keep_exact(base)
    if base.base_model is base and hasattr(base, "model"):
        # Llama 4's text model names its backbone by the word of the multimodal one, and transformers and TRL miss it
        base.base_model_prefix = "model"
    if writes:
        mend_generation_config(base.generation_config, model.name_or_path)
    language.freeze_beside(base)
    language.settle_text(base)
    return base.eval()


def random_weights(model: NewModelConfig) -> PreTrainedModel:
    """A new model on its device, in evaluation mode: the same weights for the same shapes and model.seed."""
    import torch
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    shapes = load_model_config(model)
    kind = getattr(transformers, language.auto_class(shapes, model.name_or_path))
    with doing("making the model"), plain_errors(model), torch.random.fork_rng():
        torch.manual_seed(model.seed)
        base: PreTrainedModel = kind.from_config(
            shapes,
            trust_remote_code=model.trust_remote_code,
            dtype=weight_dtype(model, trained_in_full=True),
            attn_implementation=model.attn_implementation,
        )
    scale_residual(base)
    language.freeze_beside(base)
    language.settle_text(base)
    return base.to(device()).eval()


def language_class(model: ModelConfig) -> str:
    """The auto class of transformers that loads the language model. Raises SettingsError where there is none."""
    return language.auto_class(load_model_config(model), model.name_or_path)


def load_dequantised(model: ModelConfig) -> PreTrainedModel:
    """The 4-bit language model, dequantised."""
    return dequantised(load_base(model))


def dequantised(base: PreTrainedModel) -> PreTrainedModel:
    """A 4-bit model with its weights written out again in the type it was loaded in, a layer at a time."""
    import torch
    from transformers.pytorch_utils import Conv1D

    swapped = [name for name, module in base.named_modules() if vars(module).get("source_cls") is Conv1D]
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel("ERROR")  # says that it does as it is told
    base.dequantize()
    quantization.unpack_stacks(base)
    for name in swapped:  # GPT-2's layers keep their weight the other way round, and dequantize() leaves them turned
        linear = base.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(*linear.weight.shape)
        layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous()), linear.bias
        base.set_submodule(name, layer)
    return base.eval()


def load_adapted(model: ModelConfig, folder: Path, base: PreTrainedModel | None = None) -> PeftModel:
    """The base of a saved adapter with that adapter, frozen; `base` where it is loaded already.

    A vocabulary that the run made longer is made as long again. Raises SettingsError for an adapter of another base.
    """
    if base is None:
        base = load_base(model)
        base = (
            quantization.prepare(base) if model.load_in_4bit else base
        )  # as in training: norms and embeddings in float32
    check_base(model, folder)  # now that its files are here
    rows = _saved_vocabulary(base, folder)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return adapters.load_adapter(base, str(folder)).eval()


def _saved_vocabulary(base: PreTrainedModel, folder: Path) -> int | None:
    """Rows of the embeddings or of the head that an adapter carries in full; None where it carries neither."""
    from safetensors import safe_open

    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {f"base_model.model.{name}.weight" for name, module in base.named_modules() if module in ends}
    check_weights(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found = names.intersection(file.keys())
        return int(file.get_slice(found.pop()).get_shape()[0]) if found else None


def load_policy(
    model: ModelConfig, lora: LoraConfig | None = None, *, trained_in_full: bool = False, seed: int = 0
) -> Any:
    """The model to train: with an adapter where `lora` is given and its rank is not 0, else in full.

    Raises SettingsError for a model, or an adapter to start from, that scores texts and writes none.
    """
    from transformers import set_seed

    check_writes(model, lora)
    if lora is not None and lora.r == 0:
        lora, trained_in_full = None, True
    if lora is not None and lora.init_from:
        check_base(model, adapters.take_adapter_settings(lora))
    base = load_base(model, trained_in_full)
    language.check_order(base, model.name_or_path)
    if beside := language.said(language.left_alone(base)):
        log_once(f"note: {public_name(model.name_or_path)}: only its language model is trained; left alone: {beside}")
    if lora is None:
        return base
    if model.load_in_4bit:
        base = quantization.prepare(base)
    if lora.init_from:
        return adapters.continue_adapter(base, lora, adapters.take_adapter_settings(lora))
    set_seed(seed)  # the adapter's A starts at random
    return adapters.attach(base, lora)


def check_writes(model: ModelConfig, lora: LoraConfig | None) -> None:
    """Raises SettingsError for what scores texts and writes none, be it the model or the adapter to start from, and
    for a model that is not a language model."""
    config = load_model_config(model)
    named = [("model.name_or_path", model.name_or_path, config.architectures or [])]
    if lora is not None and lora.init_from:
        saved = Path(lora.init_from).expanduser()
        task = read_adapter_config(saved)["task_type"] if (saved / "adapter_config.json").is_file() else None
        named.append(("lora.init_from", lora.init_from, ["ForSequenceClassification"] if task == "SEQ_CLS" else []))
    for setting, value, architectures in named:
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            raise SettingsError(
                f"{setting}={value} is a classifier, such as a reward model: it scores texts and writes none.",
                "Name a language model, or the run that this one was trained from.",
            )
    language.auto_class(config, model.name_or_path)
