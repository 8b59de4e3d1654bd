"""A config.json's shapes are counted before anything is allocated."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from finetune_kit.errors import SettingsError
from finetune_kit.models import folder
from finetune_kit.models.folder import check_config, check_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import ModelConfig

SHAPE = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 261}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"vocab_size": 10**12}, "at least 119,209 GiB in 16 bits"),
        ({"num_hidden_layers": 10**7}, "10,000,000 layers of width 64"),
        ({"hidden_size": 10**7}, "at least 7"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected 1 or more"),
        ({"hidden_size": -64}, "hidden_size is -64; expected 1 or more"),
        ({"vocab_size": 0}, "vocab_size is 0; expected 1 or more"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0; expected 1 or more"),
        ({"n_positions": -1}, "n_positions is -1; expected 1 or more"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads and 3 of num_key_value_heads do not fit"),
        ({"num_attention_heads": 4, "num_key_value_heads": 8}, "4 heads and 8 of num_key_value_heads do not fit"),
        ({"num_local_experts": 4, "num_experts_per_tok": 5}, "4 experts and 5 of num_experts_per_tok do not fit"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; expected a number above 0"),
        ({"attention_dropout": 2}, r"attention_dropout is 2; expected a number in \[0, 1\)"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; expected 0 or more"),
        ({"initializer_range": float("nan")}, "nan"),
        ({"text_config": {**SHAPE, "max_position_embeddings": 0}}, "max_position_embeddings is 0"),
        ({"architectures": [3]}, "architectures is [[]3[]]; expected a list of names"),
        ({"architectures": "x"}, "architectures is 'x'; expected a list of names"),
    ],
)
def test_shapes_that_no_machine_holds_are_refused(changed: dict[str, object], text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    check_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **changed}))
    with pytest.raises(SettingsError, match=text):
        check_config(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2", "gemma3", "jamba", "mamba2", "glm5_next"])
def test_the_shapes_that_transformers_gives_an_architecture_pass(kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    check_config(tmp_path / "config.json")


def test_a_model_with_an_adapter_beside_it_is_refused_for_transformers_would_load_that_one_s_base(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(SettingsError, match="holds a model and an adapter"):
        check_model(tmp_path)


@pytest.mark.parametrize("name", folder.SETTINGS)
@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b'"x"', b"null", b"\xff\xfe\x00"])
def test_a_file_of_settings_that_is_no_object_is_named_with_the_way_out(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=rf"{name}.*(cannot be read as JSON|expected a JSON object)") as caught:
        check_model(tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", [1, None, "x"]),
        ("generation_config.json", "pad_token_id", {}),
        ("tokenizer_config.json", "chat_template", 3),
        ("tokenizer_config.json", "chat_template", ["x"]),
        ("tokenizer_config.json", "chat_template", {"default": 1}),
        ("tokenizer_config.json", "eos_token", ["x"]),
        ("tokenizer_config.json", "pad_token", {"content": 3}),
        ("tokenizer_config.json", "padding_side", "middle"),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("special_tokens_map.json", "bos_token", 3),
    ],
)
def test_a_setting_of_another_kind_is_named_with_its_file(name: str, key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / name).write_text(json.dumps({key: value}))
    with pytest.raises(SettingsError, match=rf"{name}: {key} is .*; expected"):
        check_model(tmp_path)


def test_settings_as_they_are_written_pass(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2], "pad_token_id": null, "top_p": 0.9}')
    tokenizer = {
        "eos_token": {"content": "</s>", "special": True},
        "pad_token": None,
        "chat_template": [{"name": "default", "template": "x"}],
        "model_max_length": 1e30,
        "padding_side": "left",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    check_model(tmp_path)


@pytest.mark.parametrize("content", ['{"a": ', "[]", "null"])
def test_a_torn_tokenizer_is_named_by_its_file_also_in_a_run_s_folder(
    content: str, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run)
    (run / "tokenizer.json").write_text(content)
    for name, saved in ((run, None), (tiny_model, run)):
        with pytest.raises(
            SettingsError, match=r"run/tokenizer.json(:1 cannot be read as JSON|: expected a JSON object)"
        ):
            load_tokenizer(ModelConfig(name_or_path=str(name)), saved)
