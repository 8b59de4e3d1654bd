"""A config.json's shapes are counted before anything is allocated."""

import json
from pathlib import Path

import pytest

from finetune_kit.errors import SettingsError
from finetune_kit.model.folder import check_config, check_model

SHAPE = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 261}


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"vocab_size": 10**12}, "at least 119,209 GiB in 16 bits"),
        ({"num_hidden_layers": 10**7}, "10,000,000 layers of width 64"),
        ({"hidden_size": 10**7}, "at least 7"),
    ],
)
def test_shapes_that_no_machine_holds_are_refused(changed: dict[str, int], text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    check_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **changed}))
    with pytest.raises(SettingsError, match=text):
        check_config(tmp_path / "config.json")


def test_a_model_with_an_adapter_beside_it_is_refused_for_transformers_would_load_that_one_s_base(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/model"}')
    with pytest.raises(SettingsError, match="holds a model and an adapter"):
        check_model(tmp_path)
