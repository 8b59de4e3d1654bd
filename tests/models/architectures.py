"""Tiny random models of every causal architecture that transformers knows: the shapes of its own config, made small."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES

from finetune_kit.models.language import has_parts, settle_text
from finetune_kit.models.tiny import write_tiny_model

MOST_PARAMETERS = 130_000_000  # nearly all of them a frozen tower's
EIGHT = torch.arange(5, 13)[None]
# what configs call their sizes: a name that a config has gets this value
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "lru_width", "embedding_size"), 64),
    **dict.fromkeys(("embedding_dim", "ple_embed_dim", "dim_model", "moe_latent_size", "codebook_size"), 64),
    **dict.fromkeys(
        (
            "adapter_in_dim",
            "adapter_input_size",
            "adapter_out_dim",
            "projector_input_dim",
            "projector_output_dim",
            "vision_output_dim",
            "text_hidden_size",
        ),
        64,
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "feed_forward_size", "d_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "indexer_budget", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("attention_head_dim", "base_channels"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "max_window_layers"), 2),
    **dict.fromkeys(
        ("num_kv_heads", "swa_num_key_value_heads", "heads_per_ngram", "moe_k", "moe_topk", "num_experts_per_token"), 2
    ),
    **dict.fromkeys(("zero_expert_num", "attn_layer_period"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("dim_head", "d_head", "attention_head_size", "index_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "swa_head_dim", "linear_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "num_expert_group", "attn_layer_offset"), 1),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 261),
    **dict.fromkeys(("ngram_vocab_size_base", "encoder_hash_byte_group_vocab"), 64),
    "swa_num_attention_heads": 4,
    "q_lora_rank": 24,
    "dim_model_base": 64,
    "qk_rope_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "mamba_expand": 2,
    "sliding_window": 64,
    "index_n_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 3,
}
# what some configs leave open, though their own models need it
OPEN = {
    **dict.fromkeys(("num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "head_dim")),
    **dict.fromkeys(("moe_intermediate_size", "num_experts")),
}
OPEN = {name: SMALL.get(name, 1) for name in OPEN} | {"num_buckets": 4, "top_k_experts": 2}
OPEN |= {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 32}
OPEN |= {"indexer_compress_ratio": 2}
# sizes that must fit together in a way of one architecture's own; a dictionary is of a part of its config
OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 133,
        "audio_token_offset": 197,
        "audio_config": {"codebook_size": 64, "codebook_dim": 64},
    },
    "blt": {"decoder_config": {"hidden_size_global": 64}, "encoder_config": {"hidden_size_global": 64}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "dory": {
        "layer_types": None,
        "rope_parameters": None,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
    },
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "qk_head_dim": 8, "head_dim": 8}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [(0, 0)],
        "spatial_target_layers": [0, 1, 0, 1],
    },
    "granite_docling": {"vision_config": {"out_hidden_size": 64}},
    "mistral4": {"qk_nope_head_dim": 16, "qk_head_dim": 32, "head_dim": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark": {"audio_config": {"out_hidden_size": 64}},
    "paddleocr_vl": {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 4]}}},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "rwkv": {"attention_hidden_size": 64},
    "step3p7": {"text_config": {"sliding_window": 64}},
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": 2},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@functools.cache
def _found(model_type: str) -> Any:
    ways: tuple[Callable[[str], Any], ...] = (_by_values, functools.partial(_by_values, fill=True), _by_attributes)
    built, first = None, None
    for way in ways:
        try:
            config = way(model_type)
            _split_rotary(config.get_text_config())
            with torch.device("meta"):
                empty = auto_class(model_type).from_config(copy.deepcopy(config))
        except Exception as error:  # whatever a config or a model refuses about small shapes
            first = first or error
            continue
        if _reads(model_type, config, empty):
            return config
        built = built or config
    if built is None:
        assert first is not None
        raise first
    return built


def _split_rotary(text: Any) -> None:
    """Give positions in time, height and width their shares of a small head; the class has those of a large one."""
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in (getattr(text, "ignore_keys_at_rope_validation", None) or ()):
        half = (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2
        half = int(half * rope.get("partial_rotary_factor", 1))
        rope.setdefault("mrope_section", [half // 3, half // 3, half - 2 * (half // 3)])


def _reads(model_type: str, config: Any, empty: Any) -> bool:
    """Whether a small model reads eight tokens: what shapes must fit together some find out only then."""
    if sum(parameter.numel() for parameter in empty.parameters()) > MOST_PARAMETERS:
        return False
    with torch.random.fork_rng(), torch.no_grad(), torch.device("cpu"):
        try:
            model = auto_class(model_type).from_config(copy.deepcopy(config)).float().eval()
            settle_text(model)
            read_eight(model)
        except Exception:  # of what a model makes of shapes that do not fit there is no one class
            return False
    return True


def read_eight(model: Any) -> None:
    """One forward pass, without a cache where it may be left out; raises what the model raises."""
    takes = inspect.signature(model.forward).parameters
    model(input_ids=EIGHT, **({"use_cache": False} if "use_cache" in takes else {}))


def tiny_config(model_type: str) -> Any:
    """The config of an architecture with every layer kind once, hidden size 64, and 261 words.

    Raises what its own class raises where it cannot be made small by these general rules.
    """
    return copy.deepcopy(_found(model_type))


def _by_attributes(model_type: str) -> Any:
    """By changing what the default config says, for those that cannot be built anew from what they say."""
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    for part in (text, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
        if part is not None:
            _shrink(part)
    return config


def _shrink(config: Any) -> None:
    for name, value in SMALL.items():
        old = getattr(config, name, None)
        if isinstance(old, int) and not isinstance(old, bool):
            setattr(config, name, value)
    if getattr(config, "kv_lora_rank", None):  # keys are made from the latent for each query head
        config.num_key_value_heads = config.num_attention_heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:
        with contextlib.suppress(AttributeError):  # of some it is worked out from other settings
            config.layer_types = (kinds * 2)[: max(2, len(kinds))]
            config.num_hidden_layers = len(config.layer_types)


def _by_values(model_type: str, fill: bool = False) -> Any:
    """By building the config anew from small values. `fill`: what it leaves open, too."""
    known = CONFIG_MAPPING[model_type]
    return known.from_dict(_with(_small(known().to_dict(), fill), OWN.get(model_type, {})))


def _with(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with an architecture's own in their place, in its parts, too."""
    parts = {name: _with(values[name] or {}, value) for name, value in own.items() if isinstance(value, dict)}
    return values | own | parts


def _small(values: dict[str, Any], fill: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layers = next((values[name] for name in LAYERS if isinstance(values.get(name), int)), 0)
    kept = _kept_layers(values, layers)
    for name, value in values.items():
        if isinstance(value, dict) and name == "per_layer_config":
            place = {int(layer): _small(own, fill) for layer, own in value.items()}
            found[name] = {at: place[layer] for at, layer in enumerate(kept) if layer in place}
        elif isinstance(value, dict) and name.endswith("config"):
            found[name] = _small(value, fill)
        elif isinstance(value, list) and len(value) == layers and layers > len(kept):
            found[name] = [value[layer] for layer in kept]
        elif name in LAYERS and isinstance(value, int):
            found[name] = len(kept)
        elif name == "num_kv_shared_layers" and value:
            found[name] = len(kept) // 2
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            found[name] = SMALL[name]
        elif name in ("attn_layer_indices", "attn_layers_indices") and value is None:
            found[name] = [1]  # a hybrid whose default has no attention
        elif fill and value is None and name in OPEN:
            found[name] = OPEN[name]
        elif fill and name == "vocabulary_map" and value is None:  # ids of what stands for pictures
            found[name] = {"<image>": 260, "<|extra_200|>": 259, "IMGIMGA": 258, "<|visual token 000000|>": 258}
        elif fill and name == "is_decoder":
            found[name] = True
        elif fill and name == "layer_types" and value is None:
            found[name] = ["full_attention"] * len(kept)
        elif fill and name == "rope_parameters" and value == {}:
            plain = {"rope_type": "default", "rope_theta": 10000.0}
            found[name] = dict.fromkeys(values.get("layer_types") or (), plain) or plain
        else:
            found[name] = value
    if "vision_config" in found:  # of Qwen's omni models only the checkpoints' own files have it
        found.setdefault("vision_start_token_id", 257)
    if found.get("kv_lora_rank"):
        found["num_key_value_heads"] = found["num_attention_heads"]
    if {"num_heads", "head_dim", "expand"} <= found.keys():  # a state space, whose heads make up all its width
        found["num_heads"] = found["expand"] * found["hidden_size"] // found["head_dim"]
    if "mamba_d_ssm" in found:
        found["mamba_d_ssm"] = found["mamba_n_heads"] * found["mamba_d_head"]
    if "hybrid_layer_ids" in found:
        found["hybrid_layer_ids"] = [at for at, layer in enumerate(kept) if layer in values["hybrid_layer_ids"]]
    if "block_types" in found:  # a pattern that the layers repeat
        found["block_types"] = list(dict.fromkeys(found["block_types"]))
    if found.pop("num_layers_per_stack", None):  # its own config works out how often each stack's layers count
        found["num_hidden_layers"] = 2
    if fill and "attn_config" in found:
        found["attn_config"] |= {"rope_theta": 10000.0, "clip_qkv": 8}  # as Dbrx's checkpoints have them
    if set(found.get("layer_types") or ()) == {"linear_attention"} and "num_attention_heads" in found:
        found["layer_types"][-1] = "full_attention"  # a hybrid whose default has none
    if "qk_head_dim" in found:
        found["qk_head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    if "attention_hidden_size" in found:  # of layers that read what they get beside the words
        found["attention_hidden_size"] = 2 * found["hidden_size"]
    if "qk_nope_head_dim" in found and values.get("head_dim") != values.get("qk_rope_head_dim"):
        found["head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    return found


def _kept_layers(values: dict[str, Any], layers: int) -> list[int]:
    """The places of the first layer of each kind, twice where the last ones share what the first ones made."""
    own = values.get("per_layer_config") or {}
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == layers]
    kinds: dict[str, list[int]] = {}
    for layer in range(layers):
        kind = [one[layer] for one in lists if isinstance(one[layer], str)]
        kinds.setdefault(repr((kind, own.get(layer, own.get(str(layer))))), []).append(layer)
    if not kinds:
        return [0, 1]
    first = sorted(places[0] for places in kinds.values())
    if values.get("num_kv_shared_layers"):
        return first * 2
    return first if len(first) > 1 else [0, min(1, layers - 1)]


def empty_model(model_type: str) -> Any:
    """The same as a model without weights."""
    with torch.device("meta"):
        return auto_class(model_type).from_config(tiny_config(model_type))


def auto_class(model_type: str) -> Any:
    """What makes it: a causal language model's class, or, of one that reads images, too, that of those."""
    causal, images = (names.get(model_type) for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, IMAGES))
    both = causal and images and has_parts(CONFIG_MAPPING[model_type]())  # its checkpoints read images
    return AutoModelForCausalLM if causal and not both else AutoModelForImageTextToText


def write_small(model_type: str, folder: Path) -> None:
    """Save one with random weights and the tiny model's tokenizer, once it has read eight tokens."""
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(tiny_config(model_type)).float().eval()
    settle_text(model)
    with torch.no_grad():
        read_eight(model)
    write_tiny_model(folder)
    for path in (folder / "model.safetensors", folder / "config.json"):
        path.unlink()
    model.save_pretrained(folder)
