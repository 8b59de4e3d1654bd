"""adapter_config.json is looked at value by value before PEFT sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.models.adapter_config import read_adapter_config

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
}


def written(folder: Path, **values: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**GOOD, **values}))
    return folder


def test_what_peft_writes_itself_is_taken_and_what_is_missing_has_peft_s_values(tmp_path: Path) -> None:
    LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path)["r"] == 4
    assert read_adapter_config(written(tmp_path))["lora_dropout"] == 0.0
    for values in (
        {"target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj).*?)|(?:\bmodel\.[\d]{1,}\.mlp)"},
        {
            "auto_mapping": {
                "base_model_class": "LlamaModel",
                "parent_library": "transformers.models.llama.modeling_llama",
            }
        },
        {"lora_alpha": 16.0, "init_lora_weights": "pissa_niter_16", "rank_pattern": {"q_proj": 4}},
        {"of_a_newer_release": None, "another": False},
        {"megatron_core": "megatron.core", "loftq_config": {}, "layers_to_transform": [0, 1]},
    ):
        read_adapter_config(written(tmp_path, **values))


@pytest.mark.parametrize(
    "values",
    [
        {"megatron_core": "os"},
        {"megatron_config": {"a": 1}},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models", "more": "os"}},
        {"auto_mapping": "evil.py"},
        {"peft_type": "XLORA", "adapters": {"a": "evil/adapter"}},
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        {"target_modules": "(a+)+$"},
        {"target_modules": "(.*a|b*)*x"},
        {"rank_pattern": {"(q*)*": 4}},
        {"target_modules": "q" * 10_001},
    ],
)
def test_a_value_that_names_code_or_would_hang_is_refused_with_code_6(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SecurityError, match=r"adapter_config\.json"):
        read_adapter_config(written(tmp_path, **values))


@pytest.mark.parametrize(
    "values",
    [
        *({"peft_type": kind} for kind in (None, "MAGIC", 5, ["LORA"])),
        *({"r": rank} for rank in (0, -1, "8", 1.5, True, 10**9, [8])),
        *({"lora_alpha": alpha} for alpha in (0, "16", float("nan"), float("inf"))),
        *({"lora_dropout": dropout} for dropout in (1, -0.1, "0", {})),
        *({"target_modules": modules} for modules in (5, [5], {"a": 1}, "(")),
        {"modules_to_save": "lm_head"},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"layer_replication": [[0, 10**6]]},
        {"use_dora": "yes"},
        {"bias": "some"},
        {"init_lora_weights": "evil"},
        {"base_model_name_or_path": 5},
        {"task_type": []},
        {"of_a_newer_release": {"x": 1}},
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_with_code_2(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"adapter_config\.json"):
        read_adapter_config(written(tmp_path, **values))


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '"x"', '{"r": ' + "9" * 5000 + "}"])
def test_a_file_that_is_no_json_object_is_refused_with_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(SettingsError, match=r"adapter_config\.json"):
        read_adapter_config(tmp_path)
