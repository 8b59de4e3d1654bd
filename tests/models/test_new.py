"""A model from random weights: its shapes, how it begins, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from finetune_kit.errors import SettingsError
from finetune_kit.models.load import load_policy
from finetune_kit.models.new import NEW, NewModelConfig, check_shapes, settle, shape_of
from finetune_kit.models.shapes import empty_policy
from finetune_kit.models.source import load_model_config
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import ModelConfig


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))


def made(tokenizer: Any, seed: int = 0, **shapes: Any) -> Any:
    config = NewModelConfig(**shapes)
    settle(config, tokenizer, seed)
    return load_policy(config, trained_in_full=True)


def config_folder(folder: Path, config: Any) -> str:
    folder.mkdir()
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("depth", "shape"), [(4, (4, 128, 384, 2, 2)), (12, (12, 384, 1024, 6, 6)), (32, (32, 1024, 2752, 16, 16))]
)
def test_depth_alone_says_layers_width_mlp_and_heads(depth: int, shape: tuple[int, ...]) -> None:
    assert shape_of(NewModelConfig(depth=depth)) == shape


def test_each_shape_has_a_name_of_its_own(tokenizer: Any) -> None:
    own = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
    config = made(tokenizer, **own, num_key_value_heads=2, max_position_embeddings=512).config
    assert {name: getattr(config, name) for name in own} == own
    assert (config.num_key_value_heads, config.max_position_embeddings) == (2, 512)


def test_it_is_a_llama_with_the_words_and_special_tokens_of_its_tokenizer(tokenizer: Any) -> None:
    model = made(tokenizer, depth=1)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not model.training


@pytest.mark.parametrize("depth", [1, 4])
def test_what_writes_into_the_residual_stream_begins_smaller_by_the_root_of_twice_the_layers(
    depth: int, tokenizer: Any
) -> None:
    model = made(tokenizer, depth=depth, hidden_size=128)
    for layer in model.model.layers:
        for inner in (layer.self_attn.q_proj, layer.mlp.up_proj):
            assert float(inner.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        for outer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert float(outer.weight.detach().std()) == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.05)


def test_the_same_seed_makes_the_same_weights_another_one_others_and_neither_moves_the_random_state(
    tokenizer: Any,
) -> None:
    before = torch.get_rng_state()
    one, same, other = (made(tokenizer, seed, depth=1).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_another_model_s_architecture_is_taken_with_fresh_weights_and_the_words_of_this_tokenizer(
    tokenizer: Any, tmp_path: Path
) -> None:
    shapes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = config_folder(tmp_path / "q", Qwen3Config(vocab_size=1000, head_dim=16, num_key_value_heads=1, **shapes))
    model = made(tokenizer, config=folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert (model.config.vocab_size, model.config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    assert float(model.model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def test_a_tokenizer_with_more_words_than_the_config_is_refused_with_both_numbers(
    tokenizer: Any, tmp_path: Path
) -> None:
    config = NewModelConfig(config=config_folder(tmp_path / "small", LlamaConfig(vocab_size=200)))
    settle(config, tokenizer, 0)
    with pytest.raises(SettingsError) as error:
        load_model_config(config)
    assert f"has 200 words, the tokenizer has {len(tokenizer)}." in error.value.message
    assert "tokenizer.vocab_size=200" in error.value.fix


def test_a_plan_has_the_shapes_that_the_run_will_have(tokenizer: Any) -> None:
    config = NewModelConfig(depth=2)
    settle(config, tokenizer, 0)
    planned = sum(weight.numel() for weight in empty_policy(config, None, trained_in_full=True).parameters())
    assert planned == sum(weight.numel() for weight in load_policy(config, trained_in_full=True).parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name_or_path": "smollm2-135m"}, "Take its architecture: model.config=smollm2-135m"),
        ({"load_in_4bit": True}, "model.load_in_4bit has no effect on random weights"),
        ({"revision": "main"}, "model.revision has no effect"),
        ({"config": "some/model", "depth": 6}, "model.depth has no effect: model.config=some/model has all shapes"),
        ({"num_attention_heads": 3}, "128 over 3 heads is 42.6667 numbers each; expected an even number."),
        ({"hidden_size": 33}, "Set an even model.hidden_size."),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "does not divide the 4 heads"),
        ({"max_position_embeddings": 128}, "model.max_position_embeddings=256"),
    ],
)
def test_shapes_that_cannot_be_or_cannot_act_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as error:
        check_shapes(NewModelConfig(**given), max_length=256)
    assert said in str(error.value)


def test_a_config_that_is_not_there_is_told_by_the_setting_that_names_it() -> None:
    with pytest.raises(SettingsError, match=r"model\.config=./nowhere: no such folder"):
        load_model_config(NewModelConfig(config="./nowhere"))


def test_once_it_has_weights_it_is_loaded_from_its_folder(tiny_model: Path) -> None:
    saved = replace(NewModelConfig(), name_or_path=str(tiny_model))
    assert load_model_config(saved).vocab_size == json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert NewModelConfig().name_or_path == NEW
