"""An adapter covers what its settings say on every architecture, and what it leaves out has a reason."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from finetune_kit.errors import SettingsError
from finetune_kit.models.adapters import attach, covered, find_targets
from finetune_kit.models.coverage import LOST, OUTSIDE, READ_PAST, RESCALED, ROUTER, matrices
from finetune_kit.settings.schema import LoraConfig
from tests.models.architectures import empty_model, tiny_config

# each kind of layer once: dense, fused, Conv1D, hybrid, state space, experts with and without shared ones, vision tower
KINDS = (
    *("llama", "gpt2", "phi3", "qwen3_5", "granitemoehybrid", "nemotron_h", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("deepseek_v3", "gpt_oss", "llama4_text", "phimoe", "jetmoe", "kimi_linear", "gemma3", "minimax"),
)
EXPERTS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "phimoe", "granitemoehybrid")


def check_every_matrix(model_type: str) -> None:
    model = empty_model(model_type)
    matrix_names = {matrix.name for matrix in matrices(model)}
    wanted = {matrix.name for matrix in matrices(model) if not matrix.reason}
    weights = {
        name if own == "weight" else f"{name}.{own}"
        for name, module in model.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.dim() > 1 and not own.endswith("bias") and not isinstance(module, nn.Embedding)
    }
    heads = {"lm_head"} | {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    listed = matrix_names | {name.removesuffix(".weight") for name in matrix_names}
    assert weights - heads <= listed  # each weight matrix is on the list
    with torch.device("meta"):
        adapted = attach(model, LoraConfig())
    assert {*adapted.targeted_module_names, *adapted.targeted_parameter_names} == wanted  # PEFT took what was meant
    found = covered(adapted)
    assert all(found.reasons[kind] for kind in found.left_out)
    assert sum(found.covered.values()) == len(wanted)
    assert sum(found.trained.values()) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert all(found.trained.values())


@pytest.mark.parametrize("model_type", KINDS)
def test_each_weight_matrix_of_a_layer_is_adapted_or_left_out_for_a_reason(model_type: str) -> None:
    check_every_matrix(model_type)


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING))
def test_so_it_is_on_every_causal_architecture(model_type: str) -> None:
    try:
        tiny_config(model_type)
        empty_model(model_type)
    except Exception as error:  # whatever its config refuses about small shapes
        pytest.skip(f"no small model of it can be made: {type(error).__name__}")
    check_every_matrix(model_type)


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_adapted_and_routers_never(model_type: str) -> None:
    with torch.device("meta"):
        found = covered(attach(empty_model(model_type), LoraConfig()))
    assert any(kind.startswith("experts.") for kind in found.covered)
    routers = [kind for kind, reason in found.reasons.items() if reason == ROUTER]
    assert routers
    assert not any("router" in kind.lower() or kind in ("gate", "shared_expert_gate") for kind in found.covered)
    assert found.share > 0.95


def test_deepseeks_first_dense_layer_and_shared_experts_are_covered_too() -> None:
    with torch.device("meta"):
        found = covered(attach(empty_model("deepseek_v3"), LoraConfig()))
    assert found.covered["gate_proj"] == 2  # of layer 0, and of the shared expert of layer 1
    assert found.covered["experts.gate_up_proj"] == 1


def test_a_vision_tower_is_left_alone_whatever_its_layers_are_called() -> None:
    with torch.device("meta"):
        adapted = attach(empty_model("gemma3"), LoraConfig())
    assert all("vision" not in name for name in adapted.targeted_module_names)
    assert {name.rsplit(".", 1)[-1] for name in adapted.targeted_module_names} >= {"q_proj", "down_proj"}
    assert OUTSIDE in covered(adapted).reasons.values()


@pytest.mark.parametrize(
    ("model_type", "past"),
    [
        ("mamba", {"x_proj", "dt_proj", "out_proj"}),
        ("granitemoehybrid", {"out_proj"}),  # which PEFT would take
        ("dbrx", {"experts.w1", "experts.v1", "experts.w2"}),  # by the module around theirs
        ("bloom", set()),  # a slice, of a way to compute that is off
        ("llama", set()),
    ],
)
def test_layers_whose_weight_is_read_past_an_adapter_are_left_out(model_type: str, past: set[str]) -> None:
    found = {matrix.kind for matrix in matrices(empty_model(model_type)) if matrix.reason == READ_PAST}
    assert found == past


def test_a_linear_layer_with_a_product_of_its_own_is_adapted_as_a_parameter() -> None:
    with torch.device("meta"):
        adapted = attach(empty_model("deepseek_v4"), LoraConfig())
    grouped = [name for name in adapted.targeted_parameter_names if "o_a_proj" in name]
    assert grouped
    assert all(name.endswith("o_a_proj.weight") for name in grouped)
    assert not any("o_a_proj" in name for name in adapted.targeted_module_names)


def test_what_peft_refuses_on_state_space_models_is_left_out_and_said() -> None:
    with torch.device("meta"):
        found = covered(attach(empty_model("nemotron_h"), LoraConfig()))
    assert found.reasons["out_proj"] == READ_PAST
    with pytest.raises(SettingsError, match="'out_proj' cannot be adapted"):
        find_targets(empty_model("nemotron_h"), LoraConfig(target_modules=["out_proj"]))


def test_a_layer_whose_adapter_peft_would_read_under_another_name_is_left_out() -> None:
    model = empty_model("laguna")  # PEFT reads `shared_experts` as `shared_experts.`
    lost = {matrix.name for matrix in matrices(model) if matrix.reason == LOST}
    assert lost == {f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert "model.layers.0.mlp.gate_proj" in find_targets(model, LoraConfig()).matched


def test_experts_whose_adapter_peft_would_read_under_another_name_are_left_out() -> None:
    model = empty_model("mistral_large4")  # PEFT reads `.mlp.experts.` as `.mlp.mlp.experts.`
    lost = {matrix.kind for matrix in matrices(model) if matrix.reason == LOST}
    assert lost == {"experts.gate_up_proj", "experts.down_proj", "gate_proj", "up_proj", "down_proj"}
    assert find_targets(model, LoraConfig()).parameters == []


def test_layers_that_rwkv_rescales_outside_training_are_left_out_with_the_reason() -> None:
    left = {matrix.name.split(".", 3)[-1] for matrix in matrices(empty_model("rwkv")) if matrix.reason == RESCALED}
    assert left == {"attention.output", "feed_forward.value"}


def test_a_head_that_is_called_decoder_is_not_taken_for_the_layers() -> None:
    found = {matrix.name for matrix in matrices(empty_model("modernbert-decoder")) if matrix.reason}
    assert found == {"lm_head.dense"}


@pytest.mark.parametrize(("name", "value"), [("lora_dropout", 0.1), ("use_dora", True)])
def test_what_parameters_cannot_have_is_refused_with_the_modules_that_can(name: str, value: Any) -> None:
    model = empty_model("qwen3_moe")
    with pytest.raises(SettingsError, match=rf"lora.{name}=.*experts.down_proj") as caught:
        find_targets(model, LoraConfig(**{name: value}))
    assert "lora.target_modules=[k_proj,o_proj,q_proj,v_proj]" in caught.value.fix
    find_targets(model, LoraConfig(target_modules=["q_proj"], **{name: value}))


class TestTargetParameters:
    def test_experts_alone_beside_named_modules(self) -> None:
        lora = LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
        found = find_targets(empty_model("mixtral"), lora)
        assert len(found.matched) == 4
        assert found.parameters == ["down_proj"]

    def test_a_name_that_is_none_is_refused_with_those_that_are(self) -> None:
        with pytest.raises(SettingsError, match=r"'experts\.w1' is not a parameter") as caught:
            find_targets(
                empty_model("mixtral"), LoraConfig(target_modules=["q_proj"], target_parameters=["experts.w1"])
            )
        assert "experts.gate_up_proj" in caught.value.fix

    def test_beside_all_linear_it_has_no_effect_and_is_refused(self) -> None:
        with pytest.raises(SettingsError, match="has no effect beside"):
            find_targets(empty_model("mixtral"), LoraConfig(target_parameters=["experts.down_proj"]))

    @pytest.mark.parametrize("name", ["down_proj", "up_proj", "gate_proj"])
    def test_the_name_of_an_experts_layer_leads_to_its_parameter(self, name: str) -> None:
        with pytest.raises(SettingsError, match=f"'{name}' is not a linear layer") as caught:
            find_targets(empty_model("qwen3_moe"), LoraConfig(target_modules=["q_proj", name]))
        assert "lora.target_parameters=[experts." in caught.value.fix


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_fresh_adapter_on_experts_changes_nothing_and_merged_it_gives_its_own_logits(model_type: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type)).float().eval()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = model(ids).logits
        adapted = attach(model, LoraConfig()).eval()
        assert torch.allclose(adapted(ids).logits, before, atol=1e-5)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
        expected = adapted(ids).logits
        assert (expected - before).abs().max() > 1e-3
        assert torch.allclose(adapted.merge_and_unload()(ids).logits, expected, atol=1e-4)
