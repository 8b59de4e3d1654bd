"""Tiny random models of every causal architecture that transformers knows: the shapes of its own config, made small."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

# what configs call their sizes: a name that a config has gets this value
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "time_step_rank"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok", "max_window_layers"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 512),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 261),
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "mamba_expand": 2,
    "sliding_window": 64,
    "pad_token_id": 0,
    "eos_token_id": 3,
}

# what some call by a name that means another thing elsewhere, or want to fit together
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_chunk_size": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_chunk_size": 16},
    "mamba2": {"num_heads": 4, "head_dim": 32, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {"n_groups": 2, "chunk_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "falcon": {"num_kv_heads": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"num_key_value_heads": 2},
}


def tiny_config(model_type: str) -> Any:
    """The config of an architecture with every layer kind once, hidden size 64, and 261 words."""
    config = CONFIG_MAPPING[model_type]()
    text = config.get_text_config()
    for part in (text, getattr(config, "vision_config", None), getattr(config, "audio_config", None)):
        if part is not None:
            _shrink(part)
    return config


def _shrink(config: Any) -> None:
    lists = {name: value for name, value in config.to_dict().items() if isinstance(value, list)}
    layers = config.to_dict().get("num_hidden_layers")
    if config.to_dict().get("per_layer_config"):  # some layers' sizes differ from those of the others
        config.per_layer_config = {}
    for name, value in SMALL.items():
        old = getattr(config, name, None)
        if isinstance(old, int) and not isinstance(old, bool):
            with contextlib.suppress(AttributeError):  # of some it is worked out from other settings
                setattr(config, name, value)
    if getattr(config, "kv_lora_rank", None):  # keys are made from the latent for each query head
        config.num_key_value_heads = config.num_attention_heads
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if kinds:
        with contextlib.suppress(AttributeError):  # of some it is worked out from other settings
            config.layer_types = (kinds * 2)[: max(2, len(kinds))]
            config.num_hidden_layers = len(config.layer_types)
    for name, each in lists.items():  # one for each layer
        if name != "layer_types" and layers and len(each) == layers:
            with contextlib.suppress(AttributeError):
                setattr(config, name, (list(dict.fromkeys(each)) * layers)[: config.num_hidden_layers])
    for name, value in OWN.get(config.model_type, {}).items():
        setattr(config, name, value)


def empty_model(model_type: str) -> Any:
    """The same as a model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


def write_model(model_type: str, folder: Path, tiny_model: Path, **changed: Any) -> Path:
    """Save a random model of an architecture with the tokenizer of the tiny one; `changed`: settings of its config."""
    config = tiny_config(model_type)
    for name, value in changed.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder
