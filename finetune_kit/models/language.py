"""The language model of a checkpoint: the class of transformers that loads it, and what beside it is left alone.

A checkpoint that reads pictures or sound, too, is loaded as the class that it was saved as. Its language model is
trained on text; the towers and projectors beside it stay frozen, and are saved again with it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.models.coverage import decoder_of, size_of

CAUSAL = "AutoModelForCausalLM"
MULTIMODAL = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# what a processor is made of, beside the tokenizer, in a folder of a model that reads more than text
PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "audio_processor_config.json", "feature_extractor_config.json"),
)
# classes with a head of labels; one of a whole text may be a reward model, and is told apart elsewhere
NO_TEXT = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForImageClassification")
LOOK = 8  # tokens of a row that tells whether a model sees ahead
AHEAD = 1e-3  # the share of the last token's own change, from which on a change before it is none of rounding
# how diffusion models are called, of transformers and of code of their own: LLaDA, Dream, SDAR
DIFFUSION = re.compile(r"llada|dream|sdar|.*diffusion", re.IGNORECASE)
TAKE_ANOTHER = "Use a model that writes from left to right, such as a Llama, Qwen, Gemma or Mistral."


def auto_class(config: Any, name: str) -> str:
    """The auto class of transformers that loads the language model of a config, as the class it was saved as.

    `name`: the model's, for people. Raises SettingsError, with the reason, where it is not a language model.
    """
    own = (getattr(config, "architectures", None) or [""])[0]
    if is_diffusion(config):
        raise SettingsError(
            f"model.name_or_path={name} is a diffusion model ({own or config.model_type}), which fills a block of text "
            "in again and again; the recipes train the next token from those in front of it.",
            TAKE_ANOTHER,
        )
    for kind in (CAUSAL, *MULTIMODAL):
        if kind in (getattr(config, "auto_map", None) or {}):  # code of the model's own
            return kind
    known = {kind: found for kind in (CAUSAL, *MULTIMODAL) if (found := _class_name(kind, config))}
    order = (*MULTIMODAL, CAUSAL) if has_parts(config) else (CAUSAL, *MULTIMODAL)
    chosen = next((kind for kind in (CAUSAL, *MULTIMODAL) if known.get(kind) == own), None)
    chosen = chosen or next((kind for kind in order if kind in known), "")
    if reason := _no_language_model(config, own, chosen):
        raise SettingsError(f"model.name_or_path={name} {reason}.", TAKE_ANOTHER)
    return chosen


def is_diffusion(config: Any) -> bool:
    """Whether a config is that of a diffusion model, by its name, its class's, or the size of its canvas."""
    names = (getattr(config, "architectures", None) or [""])[0], config.model_type or ""
    return any(map(DIFFUSION.match, names)) or getattr(config, "canvas_length", None) is not None


def class_of(model: Any) -> str:
    """The auto class that loads a model which is in memory."""
    own = type(model).__name__
    kinds = (CAUSAL, *MULTIMODAL)
    return next((kind for kind in kinds if _class_name(kind, model.config) == own), CAUSAL)


def has_parts(config: Any) -> bool:
    """Whether a config has one of its own for the language model, or for a tower beside it."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return any(part is not None for part in parts)


def _class_name(kind: str, config: Any) -> str:
    """The class that an auto class makes of a config; "" for none."""
    from transformers.models.auto import modeling_auto

    names = {
        CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MULTIMODAL[0]: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MULTIMODAL[1]: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    found = names[kind].get(config.model_type, "")
    return str(found if isinstance(found, str) else found[0])


def _no_language_model(config: Any, own: str, chosen: str) -> str:
    """Why a config is not that of a model which writes text from left to right; "" where it is.

    own: the class that it was saved as, chosen: the auto class that would load it, "" for none.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as LABELS

    # a judge of pictures is loaded as a language model by transformers' tables, and lacks that one's head
    own = str(LABELS[config.model_type]) if chosen and config.model_type in LABELS else own
    kind = own or config.model_type
    if own.endswith(NO_TEXT):
        return f"is a {own}, which labels what it reads and writes no text"
    if own.endswith("ForMaskedLM"):
        return f"is a {own}, which fills in hidden words from both sides and writes none from left to right"
    if getattr(config, "is_encoder_decoder", False) and own != _class_name(CAUSAL, config):
        return f"is an encoder-decoder ({kind}), whose answers are read through its encoder; the recipes train decoders"
    if not chosen:
        return f"is a {kind}, which writes no text: transformers {transformers.__version__} has no language model of it"
    if getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) is None:  # of BLT, four stacks
        return f"is a {kind}, whose config has no num_hidden_layers: transformers makes no cache for it to write with"
    if getattr(config, "axial_pos_embds", False):  # Reformer
        size = " x ".join(map(str, config.axial_pos_shape))
        return f"is a {kind}, which trains on rows of exactly {size} tokens alone (axial_pos_embds in its config.json)"
    if chosen == CAUSAL:
        return ""
    taken = _class_name(chosen, config)
    parameters = inspect.signature(getattr(transformers, taken).forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [name for name in needed if name not in ("self", "input_ids")]
    if needed or "input_ids" not in {p.name for p in parameters}:
        wants = f"needs {', '.join(needed)} in each call" if needed else "takes no token ids"
        return f"is a {taken}, which {wants}: it cannot be trained on text alone"
    return ""


def refuses_text(model: Any) -> str:
    """Why a model without weights (on torch's meta device) that reads more than text takes no text alone in training;
    "" where it does, or where that cannot be told without weights."""
    import torch

    if not hasattr(model, "score") and model.get_output_embeddings() is None:  # Nemotron-H Omni
        return f"is a {type(model).__name__}, which holds a whole language model with its head as one of its parts"
    ids = torch.zeros((1, 4), dtype=torch.long, device="meta")
    try:
        model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (ValueError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        if isinstance(error, AttributeError):  # as Qwen3-Omni's thinker does, whose config lacks what it asks for
            return f"cannot be run on text alone: {said}" if "Config' object has no attribute" in said else ""
        asked = any(word in said for word in ("pixel_values", "input_features", "image", "audio", "required"))
        return f"takes no text alone: {type(model).__name__} says: {said}" if asked else ""
    except Exception:  # what depends on a number cannot be run without one
        return ""
    finally:
        model.eval()
    return ""


def check_order(model: Any, name: str) -> None:
    """Raises SettingsError for a model whose tokens see those behind them; `name`: the model's, for people."""
    if not sees_ahead(model):
        return
    text = model.config.get_text_config()
    switch = next((key for key in ("is_decoder", "causal", "is_causal") if getattr(text, key, None) is False), "")
    said = f" {switch}=true in its config.json is for weights that were trained so." if switch else ""
    raise SettingsError(
        f"model.name_or_path={name} reads from both sides: in a {type(model).__name__} each token sees those behind "
        f"it{f' ({switch}=false)' if switch else ''}, so that it would learn to copy the next one, not to write it.",
        TAKE_ANOTHER + said,
    )


def sees_ahead(model: Any) -> bool:
    """Whether a token of a model sees those behind it: its loss would then be that of a word that it reads.

    Of a loaded one, two rows tell that differ in their last token alone. Of one without weights (on torch's meta
    device), the masks tell that it asks transformers for, or the settings of one that makes its own, if there are such,
    or those masks themselves. What cannot run on a few tokens is not judged.
    """
    import torch

    if _device(model).type == "meta":
        return _asks_to_see_ahead(model)
    words = min(model.config.get_text_config().vocab_size, 256)
    row = torch.randint(words, (LOOK,), generator=torch.Generator().manual_seed(0))
    other = torch.cat([row[:-1], (row[-1:] + words // 2) % words])
    found = _run(model, torch.stack([row, other]))
    if found is None:
        return False
    moved = (found.logits[0] - found.logits[1]).float().norm(dim=-1)
    rounding = AHEAD if found.logits.dtype == torch.float32 else 100 * AHEAD
    return bool(moved[:-1].max() > rounding * moved[-1])


def _device(model: Any) -> Any:
    """Where a model's words are: XLNet makes its first weight on the CPU, whatever is asked for."""
    words = getattr(model.get_input_embeddings(), "weight", None)
    return model.device if words is None else words.device


def _asks_to_see_ahead(model: Any) -> bool:
    import torch
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    seen: list[bool] = []

    def watched(make: Any) -> Any:
        def mask(*args: Any, mask_function: Any = None, **given: Any) -> Any:
            with contextlib.suppress(Exception), torch.device("cpu"):  # one that asks the tokens cannot be told
                seen.append(bool(mask_function(0, 0, torch.tensor(0), torch.tensor(LOOK - 1))))
            return make(*args, mask_function=mask_function, **given)

        return mask

    before = dict(MASKS)
    try:
        for name, make in before.items():
            MASKS[name] = watched(make)
        _run(model, torch.zeros((1, LOOK), dtype=torch.long))
    finally:
        for name, make in before.items():
            MASKS[name] = make
    text = model.config.get_text_config()
    # XLM's word, XLNet's, and that of the many like BERT
    words = [getattr(text, name, None) for name in ("causal", "attn_type", "is_decoder")]
    return any(seen) if seen else words[0] is False or words[1] == "bi" or words[2] is False or _leaves_open(model)


def _leaves_open(model: Any) -> bool:
    """Whether a model without weights makes masks of its own, as CPM-Ant does, of which none bars its first token from
    the last one. Masks are made of ids and places, not of weights: on real ids they are real numbers, and meet what is
    none where they are used."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    barred: list[bool] = []  # of each mask; True, too, for what may be one and cannot be looked into

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, name = kwargs or {}, func.__name__
            tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
            if not any(one.is_meta for one in tensors):
                return func(*args, **kwargs)
            for one in tensors:
                if one.dim() < 2 or min(one.shape[-2:]) < LOOK:
                    continue
                if one.dtype == torch.bool:
                    barred.append(one.is_meta or "masked_fill" not in name or bool(_corner(one)))
                elif not one.is_meta and _corner(one) < -1e4:
                    barred.append(True)
            if "attention" in name:  # whose own mask is not a tensor
                barred.append(True)
            return func(*tree_map_only(torch.Tensor, to_meta, args), **tree_map_only(torch.Tensor, to_meta, kwargs))

    def to_meta(one: Any) -> Any:
        return one.to("meta")

    ids = torch.arange(LOOK)[None] + 1  # 0 is the pad token of CPM-Ant
    try:
        with torch.no_grad(), Masks():  # type: ignore[no-untyped-call]  # torch's own has no types
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except Exception:  # as of _run
        return False
    return bool(barred) and not any(barred)


def _corner(mask: Any) -> Any:
    """What a mask has for the first token of a row and the last one."""
    return mask[..., -LOOK, -1].flatten()[0].item()


def _run(model: Any, ids: Any) -> Any:
    """What a model says of rows of token ids; None where it does not take them."""
    import torch

    was_training, ids = model.training, ids.to(_device(model))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # some draw what they hash by
            return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # of what a model refuses, or cannot do without weights, there is no one class
        return None
    finally:
        model.train(was_training)


def settle_text(model: Any) -> None:
    """Let text through Llama 4 (transformers 5.24, TRL 1.16): its own class asks the output of its language model for
    the states of pictures, so that every call fails; its backbone goes by a name that it has not, where TRL looks for
    it; and TRL reads how many experts there are by a name that its config does not know. So through Kosmos 2.5, whose
    class has no backbone: its language model, with a head, is one part of it, and its output has no last state."""
    text = model.config.get_text_config()
    if text.model_type == "llama4_text":
        type(text).attribute_map = {**type(text).attribute_map, "num_experts": "num_local_experts"}
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        model.language_model.register_forward_hook(_without_pictures)
        vars(model)["text_backbone"] = model.language_model.model  # no child: weights keep their names
        model.base_model_prefix = "text_backbone"
    if type(model).__name__ == "Kosmos2_5ForConditionalGeneration":
        vars(model)["text_backbone"] = model.text_model.model
        model.base_model_prefix = "text_backbone"


def settle_saved(model: Any) -> None:
    """Let the row of Youtu's pad token be read as it was saved (transformers 5.24): where its config names that token,
    as TRL writes it there, each loading fills the row with zeros, and it is one of the head, too."""
    text = model.config.get_text_config()
    if text.model_type == "youtu":
        text.pad_token_id = None


def _without_pictures(module: Any, args: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def parts_beside(model: Any) -> dict[str, Any]:
    """{full name: module or parameter} of what a model has beside its language model and its embeddings, such as a
    vision tower and a projector; without those of an adapter on it."""
    import torch
    from transformers import PreTrainedModel

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not has_parts(base.config):
        return {}
    decoder = decoder_of(base)
    ends = {id(part) for part in (base.get_input_embeddings(), base.get_output_embeddings()) if part is not None}
    score = getattr(base, "score", None)
    ends |= {id(score)} if score is not None else set()

    def is_tower(module: Any) -> bool:
        """Whether a child of the decoder has a model of another config in it."""
        inner = (part for part in module.modules() if isinstance(part, PreTrainedModel))
        return any(type(part.config) is not type(decoder.config) for part in inner)

    def beside(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if module is decoder:
            yield from ((prefix + name, child) for name, child in module.named_children() if is_tower(child))
            return
        for name, child in module.named_children():
            if id(child) in ends:
                continue
            if child is decoder or any(part is decoder for part in child.modules()):
                yield from beside(child, f"{prefix}{name}.")
            elif next(child.parameters(), None) is not None:
                yield prefix + name, child
        for name, parameter in module.named_parameters(recurse=False):
            yield prefix + name, torch.nn.ParameterList([parameter])

    return dict(beside(base, ""))


def left_alone(model: Any) -> dict[str, int]:
    """{name of a part beside the language model: how many parameters}; a weight in 4 bits counts as one."""
    return {name: sum(map(size_of, part.parameters())) for name, part in parts_beside(model).items()}


def freeze_beside(model: Any) -> None:
    """Let nothing but the language model be trained: text gives the rest no gradient, and weight decay must not."""
    for part in parts_beside(model).values():
        part.requires_grad_(False)


def said(parts: dict[str, int]) -> str:
    """The parts that are left alone, in words; "" for none."""
    return ", ".join(f"{name} ({count:,} parameters)" for name, count in parts.items())
