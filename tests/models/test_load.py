"""What may be a model, which type its weights get, and what is said where it cannot be had."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune_kit.errors import FinetuneKitError, ResourceError, SecurityError, SettingsError
from finetune_kit.models.device import computes_in_bfloat16, device, weight_dtype
from finetune_kit.models.embedded import NAME
from finetune_kit.models.load import load_base, load_policy
from finetune_kit.models.provenance import BASE_RECORD, base_record, check_base
from finetune_kit.models.shapes import empty_policy
from finetune_kit.models.source import public_name, resolve_name
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from finetune_kit.system import network
from tests.models.small import write_model


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_act": "zzz"}, r"config\.json: hidden_act is 'zzz', which transformers does not know"),
        ({"rope_parameters": {"rope_type": "zzz"}}, r"config\.json: .*rope_type is 'zzz', which transformers does not"),
        ({"num_attention_heads": 0}, r"config\.json: num_attention_heads is 0; expected 1 or more"),
        ({"hidden_size": "x"}, r"copied cannot be loaded: .*hidden_size"),
    ],
)
def test_a_setting_that_transformers_cannot_take_is_named(changed: dict[str, object], said: str, copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(SettingsError, match=said):
        empty_policy(ModelConfig(name_or_path=str(copied)), None, trained_in_full=True)


class TestName:
    def test_a_local_folder_and_a_hub_id_are_taken_as_they_are(self, tiny_model: Path) -> None:
        assert resolve_name(str(tiny_model)) == str(tiny_model)
        assert resolve_name("owner/model") == "owner/model"
        assert resolve_name("gpt2") == "gpt2"

    @pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "~/no-such-folder", "a/b/c"])
    def test_a_path_that_is_not_there_is_said_to_be_missing_and_the_offline_default_named(self, name: str) -> None:
        with pytest.raises(SettingsError, match="no such folder") as caught:
            resolve_name(name)
        assert NAME in caught.value.fix

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_weights_as_a_pickle_are_refused_as_a_danger(self, copied: Path, name: str) -> None:
        (copied / "model.safetensors").rename(copied / name)
        with pytest.raises(SecurityError, match=name) as caught:
            load_base(ModelConfig(name_or_path=str(copied)))
        assert caught.value.exit_code == 6

    def test_a_folder_without_weights_an_adapter_and_no_model_are_told_apart(self, copied: Path) -> None:
        (copied / "model.safetensors").unlink()
        with pytest.raises(SettingsError, match=r"no \*\.safetensors"):
            load_base(ModelConfig(name_or_path=str(copied)))
        (copied / "config.json").unlink()
        with pytest.raises(SettingsError, match="not a model"):
            load_base(ModelConfig(name_or_path=str(copied)))
        (copied / "adapter_config.json").write_text("{}")
        with pytest.raises(SettingsError, match="is an adapter"):
            load_base(ModelConfig(name_or_path=str(copied)))

    def test_for_others_a_folder_is_its_name_and_a_hub_id_stays(self, tiny_model: Path) -> None:
        assert public_name(str(tiny_model)) == "tiny"
        assert public_name(str(tiny_model) + "/") == "tiny"
        assert public_name("owner/model") == "owner/model"


class TestUnreachable:
    @pytest.mark.parametrize("load", [load_tokenizer, load_base])
    def test_a_hub_model_without_the_hub_is_one_line_at_once_with_the_way_out(
        self, load: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import time

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        network.hub_reachable.cache_clear()
        started = time.perf_counter()
        try:
            with pytest.raises(ResourceError, match="cannot be reached") as caught:
                load(ModelConfig(name_or_path="no-such-owner/no-such-model"))  # type: ignore[operator]  # either loader
        finally:
            network.hub_reachable.cache_clear()
        assert time.perf_counter() - started < 10
        assert f"model.name_or_path={NAME}" in caught.value.fix
        assert len(caught.value.message.splitlines()) == 1


class TestType:
    def test_on_this_machine_weights_are_float32_unless_a_gpu_has_bfloat16(self) -> None:
        expected = torch.bfloat16 if computes_in_bfloat16() else torch.float32
        assert weight_dtype(ModelConfig(), trained_in_full=False) == expected
        assert weight_dtype(ModelConfig(), trained_in_full=True) == torch.float32

    def test_a_frozen_base_takes_the_type_asked_for(self, tiny_model: Path) -> None:
        base = load_base(ModelConfig(name_or_path=str(tiny_model), dtype="bfloat16"))
        assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
        assert base.device.type == device().type
        assert not base.training

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_weights_trained_in_full_are_refused_in_16_bits(self, dtype: str) -> None:
        with pytest.raises(SettingsError, match="need float32") as caught:
            weight_dtype(ModelConfig(dtype=dtype), trained_in_full=True)  # type: ignore[arg-type]  # a str, not a Literal
        assert "lora_sft" in caught.value.fix

    def test_attn_implementation_reaches_the_model(self, tiny_model: Path) -> None:
        base = load_base(ModelConfig(name_or_path=str(tiny_model), attn_implementation="eager"))
        assert base.config._attn_implementation == "eager"


class TestTokenizer:
    def test_it_pads_on_the_right_with_its_own_pad_token(self, tiny_model: Path) -> None:
        tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<|pad|>")

    @pytest.mark.parametrize("stated", [None, "<|im_end|>"])
    def test_a_pad_token_that_is_missing_or_ends_turns_is_replaced_by_a_spare_one(
        self, copied: Path, stated: str | None
    ) -> None:
        settings = json.loads((copied / "tokenizer_config.json").read_text())
        (copied / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": stated}))
        tokenizer = load_tokenizer(ModelConfig(name_or_path=str(copied)))
        assert tokenizer.pad_token not in (None, "<|im_end|>")
        assert tokenizer.pad_token_id < 5

    def test_without_an_end_token_no_answer_could_end(self, copied: Path) -> None:
        settings = json.loads((copied / "tokenizer_config.json").read_text())
        (copied / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
        with pytest.raises(SettingsError, match="no end token"):
            load_tokenizer(ModelConfig(name_or_path=str(copied)))


class TestPolicy:
    def test_the_seed_decides_the_adapters_start(self, tiny_model: Path) -> None:
        model = ModelConfig(name_or_path=str(tiny_model))
        starts = [adapter_weights(model, seed) for seed in (1, 1, 2)]
        assert torch.equal(starts[0], starts[1])
        assert not torch.equal(starts[0], starts[2])

    def test_an_empty_policy_has_the_shapes_and_no_storage(self, tiny_model: Path) -> None:
        model = ModelConfig(name_or_path=str(tiny_model))
        for lora in (None, LoraConfig()):
            empty = empty_policy(model, lora, trained_in_full=lora is None)
            real = load_policy(model, lora, trained_in_full=lora is None)
            assert {p.device.type for p in empty.parameters()} == {"meta"}
            assert shapes(empty) == shapes(real)

    def test_a_target_that_does_not_exist_is_refused_before_a_weight_is_loaded(self, tiny_model: Path) -> None:
        with pytest.raises(FinetuneKitError, match="q_prj"):
            empty_policy(ModelConfig(name_or_path=str(tiny_model)), LoraConfig(target_modules=["q_prj"]), False)


def adapter_weights(model: ModelConfig, seed: int) -> torch.Tensor:
    return torch.cat(
        [p.flatten() for name, p in load_policy(model, LoraConfig(), seed=seed).named_parameters() if "lora_A" in name]
    )


def shapes(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_an_adapter_s_base_with_an_infinite_number_in_its_config_is_known_again(
    tmp_path: Path, tiny_model: Path
) -> None:
    base = ModelConfig(name_or_path=str(write_model("mamba2", tmp_path / "mamba2", tiny_model)))
    (tmp_path / BASE_RECORD).write_text(json.dumps(base_record(base)))
    assert "Infinity" in (tmp_path / BASE_RECORD).read_text()
    check_base(base, tmp_path)
    with pytest.raises(SettingsError, match="is an adapter of mamba2"):
        check_base(ModelConfig(name_or_path=str(tiny_model)), tmp_path)
