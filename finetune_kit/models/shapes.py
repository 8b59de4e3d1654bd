"""What a model's shapes tell before its weights are loaded: an adapter's coverage, positions, refusals."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import SettingsError
from finetune_kit.models import adapters, classifier, language
from finetune_kit.settings.schema import LoraConfig, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from finetune_kit.models.device import weight_dtype
from finetune_kit.models.load import language_class
from finetune_kit.models.source import load_model_config, plain_errors


def empty_policy(model: ModelConfig, lora: LoraConfig | None, trained_in_full: bool, scores: bool = False) -> Any:
    """The policy's shapes and types without weights (torch's meta device), to count before anything is loaded.

    `scores`: under a head that gives one number, as a reward model is trained, not under that of a language model.
    """
    import torch

    if lora is not None and lora.r == 0:
        lora, trained_in_full = None, True
    dtype = weight_dtype(model, trained_in_full)
    base = _empty(model, scores, dtype=dtype, attn_implementation=model.attn_implementation)
    with torch.device("meta"):
        if lora is not None and lora.init_from:
            adapters.take_adapter_settings(lora)
        return base if lora is None else adapters.attach(base, lora, "SEQ_CLS" if scores else "CAUSAL_LM")


def coverage_of(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """What an adapter with these settings covers of the model, and what it leaves out, in lines; nothing is loaded."""
    policy = empty_policy(model, lora, trained_in_full=False)
    return adapters.covered(policy).in_words() if adapters.is_adapter(policy) else []


def _empty(model: ModelConfig, scores: bool = False, **given: Any) -> PreTrainedModel:
    """The language model's shapes on torch's meta device, what is not part of it frozen as in training; `scores`: as in
    empty_policy."""
    import torch
    import transformers

    shapes = load_model_config(model)
    if scores:
        classifier.make_known(shapes)
        shapes.num_labels = 1
    kind = getattr(transformers, classifier.AUTO_CLASS if scores else language.auto_class(shapes, model.name_or_path))
    with plain_errors(model), torch.device("meta"):
        base: PreTrainedModel = kind.from_config(shapes, trust_remote_code=model.trust_remote_code, **given)
    language.freeze_beside(base)
    language.settle_text(base)
    return base


def check_text(model: ModelConfig, scores: bool = False) -> None:
    """Raises SettingsError for a model that reads more than text, and cannot be trained on text alone, and for one
    whose tokens see those behind them, as far as it can be told without weights. `scores`: as in empty_policy."""
    if scores and not language.has_parts(load_model_config(model)):
        return
    base = _empty(model, scores)
    beside = scores or language_class(model) in language.MULTIMODAL
    if beside and (reason := language.refuses_text(base)):
        raise SettingsError(f"model.name_or_path={model.name_or_path} {reason.rstrip('.')}.", language.TAKE_ANOTHER)
    if not scores:
        language.check_order(base, model.name_or_path)


def learned_positions(model: ModelConfig) -> int | None:
    """How many positions the model has a table for, learned or computed once; None where any length can be read."""
    shapes = load_model_config(model)
    if not isinstance(getattr(shapes.get_text_config(), "max_position_embeddings", None), int):
        return None
    try:
        return positions_of(_empty(model))
    except SettingsError:  # no language model, which is said elsewhere
        return None


def positions_of(model: Any) -> int | None:
    """The same of a model that is loaded, with an adapter or without."""
    import torch

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings()
    tables = [(name, part.weight) for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)]
    tables = [(name, weight) for name, weight in tables if words is None or weight is not words.weight]
    tables += [(name, buffer) for name, buffer in model.named_buffers() if buffer is not None]
    named = [weight for name, weight in tables if re.search(r"wpe|pos", name.rpartition(".")[2] or name)]
    # OPT and BART keep two rows more
    return most if any(weight.dim() > 1 and most <= weight.shape[0] <= most + 2 for weight in named) else None
