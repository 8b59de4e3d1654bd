"""The class that puts a score on a sequence: transformers' own of an architecture, or one made from its backbone.

transformers has a sequence classifier for half of its language models. For the others the class is made here, in the
layout of its own ones: the backbone under its usual name, `score.weight` beside it. So transformers' own class reads
what was saved, once there is one. A run's card shows the text of the class, and the proof of what was saved runs that
text, in a process without this package.
"""

from __future__ import annotations

import inspect
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.models.language import is_diffusion

AUTO_CLASS = "AutoModelForSequenceClassification"
ANOTHER = "Use a causal language model, such as Llama, Qwen, Gemma or LFM2, as model.name_or_path."
DEFINITION = """\
from {config_module} import {config}
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from {parent_module} import {parent}


class {name}(GenericForSequenceClassification, {parent}):
    config_class, base_model_prefix = {config}, "{prefix}"
    __module__ = {parent}.__module__  # transformers reads its weights as those of its own classes

{forward}"""


# weights of these are renamed on their way from and to a file, by the name of the class
RENAMES = """\
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
register_checkpoint_conversion_mapping("{name}", get_checkpoint_conversion_mapping("{like}"), overwrite=True)
"""


def _forward() -> Any:
    """The method of the class, whose source is its text."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    def forward(self, input_ids, attention_mask=None, **more):  # type: ignore[no-untyped-def]
        mask = input_ids.new_ones(input_ids.shape) if attention_mask is None else attention_mask
        more = {"use_cache": False, **{key: value for key, value in more.items() if value is not None}}
        scores = self.score(self.base_model(input_ids, attention_mask=mask, **more).last_hidden_state)
        last = mask.cumsum(-1).argmax(-1)  # the last real token, whichever side is padded
        return SequenceClassifierOutput(logits=scores[range(len(last)), last])

    return forward


def loading(config: Any) -> tuple[str, str]:
    """What loads a model of this config under a score, and the Python that defines it: transformers' auto class and "",
    or the name of a class and its code.

    Raises SettingsError where transformers' class has a head of another kind than a layer `score`, and where there is
    neither a class nor a backbone that reads from left to right.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as OWN

    if is_diffusion(config):
        raise SettingsError(f"{config.model_type} is a diffusion model: no score can be put on it.", ANOTHER)
    text = config.get_text_config(decoder=True)
    if getattr(text, "num_hidden_layers", None) is None or not hasattr(text, "hidden_size"):  # BLT
        raise SettingsError(f"{config.model_type} is not one stack of layers: no score can be put on it.", ANOTHER)
    if getattr(text, "use_bidirectional_attention", None) is True:  # PaliGemma
        raise SettingsError(
            f"{config.model_type} reads a prompt from both sides, by token types: no score can be put on it.",
            ANOTHER,
        )
    known = config.model_type in OWN and type(config).__module__.startswith("transformers.")
    if known or AUTO_CLASS in (getattr(config, "auto_map", None) or {}):
        if known and not _has_score(own := MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]):
            raise SettingsError(
                f"{config.model_type}: transformers' {own.__name__} has a head of another kind than one layer `score`.",
                ANOTHER,
            )
        return AUTO_CLASS, ""
    backbone = MODEL_MAPPING.get(type(config), None)
    both = config.is_encoder_decoder or type(config).is_encoder_decoder  # a decoder alone has no class of its own
    if backbone is None or both or not backbone.__name__.endswith("Model"):
        why = "is an encoder-decoder" if both else "has no backbone of its own in transformers"
        raise SettingsError(f"{config.model_type} {why}: no score can be put on it.", ANOTHER)
    parent = _parent(backbone)
    name = f"{backbone.__name__.removesuffix('Model')}ForSequenceClassification"  # as transformers names its own
    code = DEFINITION.format(
        config_module=type(config).__module__,
        config=type(config).__name__,
        parent_module=parent.__module__,
        parent=parent.__name__,
        name=name,
        prefix=parent.base_model_prefix or "model",
        forward=inspect.getsource(_forward()).replace("  # type: ignore[no-untyped-def]", ""),
    )
    return name, code


def _parent(backbone: Any) -> Any:
    """The class that all models of an architecture have in common."""
    return next(base for base in backbone.__mro__ if base.__name__.endswith("PreTrainedModel"))


def _has_score(own: Any) -> bool:
    """Whether a class of transformers, or one that it takes its head from, makes a layer of that name."""
    makers = (inspect.unwrap(vars(one)["__init__"]) for one in own.__mro__ if "__init__" in vars(one))
    return any("score" in maker.__code__.co_names for maker in makers if inspect.isfunction(maker))


def definition(config: Any) -> str:
    """Python after which transformers' auto class loads models of this config under a score; "" where it does already.

    Raises SettingsError as loading does.
    """
    name, code = loading(config)
    like = _renamed_like(name)
    register = RENAMES.format(name=name, like=like) if code and like else ""
    register += (
        f"from transformers import {AUTO_CLASS}\n{AUTO_CLASS}.register({name}.config_class, {name}, exist_ok=True)"
    )
    return f"{code}\n\n{register}\n" if code else ""


def _renamed_like(name: str) -> str:
    """The language model's class whose weights are renamed by its name, as those of the class `name` must be; or ""."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    stem = name.removesuffix("ForSequenceClassification")
    found = (f"{stem}For{kind}" for kind in ("ConditionalGeneration", "CausalLM"))
    return next((like for like in found if get_checkpoint_conversion_mapping(like) is not None), "")


def make_known(config: Any) -> None:
    """Let transformers' auto class load models of this config under a score. Raises SettingsError as loading does."""
    name, code = loading(config)
    if code:
        _register(type(config), name)


def _register(config_class: Any, name: str) -> None:
    """Make the class that the text defines, and make it known."""
    from transformers import MODEL_MAPPING, AutoModelForSequenceClassification
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    if like := _renamed_like(name):
        conversion = get_checkpoint_conversion_mapping(like)
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    parent = _parent(MODEL_MAPPING[config_class])
    own = {
        "config_class": config_class,
        "base_model_prefix": parent.base_model_prefix or "model",
        "__module__": parent.__module__,
        "forward": _forward(),
    }
    made = type(name, (GenericForSequenceClassification, parent), own)
    AutoModelForSequenceClassification.register(config_class, made, exist_ok=True)
