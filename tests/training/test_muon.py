"""Muon for matrices and AdamW for the rest, as one optimizer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.errors import SettingsError
from finetune_kit.models.load import load_policy
from finetune_kit.settings.schema import LoraConfig, ModelConfig, TrainConfig
from finetune_kit.training.muon import InFloat32, MuonAndAdamW, matrices_of, orthogonal
from finetune_kit.training.optimizer import optimizer_state
from tests.fixtures_training import fit_only

SHAPES = [(8, 8), (32, 8), (8, 48)]


@pytest.fixture
def policy(tiny_model: Path) -> Any:
    return load_policy(ModelConfig(name_or_path=str(tiny_model)), trained_in_full=True)


def gradients(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_singular_values_of_an_update_are_between_a_half_and_one_and_a_half(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    found = orthogonal(torch.randn(shape), (3.4445, -4.7750, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.5


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_torch_s_own_but_for_the_rounding_of_bfloat16(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    kinds = (torch.optim.Muon, InFloat32)
    settings = {"lr": 0.1, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = [kind([weight], **settings) for kind, weight in zip(kinds, weights, strict=True)]
    for step in range(4):
        torch.manual_seed(step)
        gradient = torch.randn(shape)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    moved = float((weights[0] - start).norm())
    assert float((weights[0] - weights[1]).detach().norm()) < 0.03 * moved


def test_matrices_of_layers_are_muon_s_embeddings_head_and_norms_adamw_s(policy: Any) -> None:
    matrices, others = matrices_of(policy)
    names = {id(weight): name for name, weight in policy.named_parameters()}
    assert {names[id(weight)].split(".")[-2] for weight in matrices} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert {names[id(weight)].split(".")[-2] for weight in others} == {
        *("embed_tokens", "input_layernorm", "post_attention_layernorm", "norm")
    }


def test_decay_is_of_the_matrices_alone_and_both_parts_follow_one_rate(policy: Any) -> None:
    optimizer = MuonAndAdamW(*matrices_of(policy), TrainConfig(learning_rate=0.1, weight_decay=0.5))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    before = copy.deepcopy(policy.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a schedule does
    gradients(policy, 0)
    optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in policy.state_dict().items())


def test_a_state_that_is_loaded_goes_on_to_the_bit(tiny_model: Path) -> None:
    models = [load_policy(ModelConfig(name_or_path=str(tiny_model)), trained_in_full=True) for _ in range(2)]
    one, other = (MuonAndAdamW(*matrices_of(model), TrainConfig(learning_rate=1e-2)) for model in models)
    for step in range(2):
        gradients(models[0], step)
        one.step()
    models[1].load_state_dict(models[0].state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for model, optimizer in zip(models, (one, other), strict=True):
        gradients(model, 7)
        optimizer.step()
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name]), name


def test_its_bytes_are_4_a_weight_of_a_matrix_and_8_of_the_others(policy: Any) -> None:
    gradients(policy, 0)
    optimizer = MuonAndAdamW(*matrices_of(policy), TrainConfig())
    optimizer.step()
    kept = sum(part.numel() * 4 for state in optimizer.state.values() for part in state.values())
    assert optimizer_state(policy, "muon") == kept


def test_an_adapter_is_refused(tiny_model: Path) -> None:
    adapted = load_policy(ModelConfig(name_or_path=str(tiny_model)), LoraConfig())
    with pytest.raises(SettingsError, match="not for an adapter's"):
        matrices_of(adapted)


def test_it_is_an_optimizer_by_name_for_full_sft_too(home: Path) -> None:
    run = fit_only("full_sft", home, "optim=muon", "max_steps=3", "learning_rate=1e-2")
    assert type(run.trainer.optimizer).__name__ in ("AcceleratedOptimizer", "NoneType", "MuonAndAdamW")
    assert run.losses[-1] < run.losses[0]
    assert run.moved > 0
