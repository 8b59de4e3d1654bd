"""Experts in 4 bits: what they stand for, what trains beside them, and that nothing changes them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_kit.models.adapters import covered
from finetune_kit.models.coverage import changed_in_place
from finetune_kit.models.load import load_base, load_dequantised, load_policy
from finetune_kit.models.quantization import layers, stacked
from finetune_kit.models.quantized_experts import Weight4bit, compute_in_own_type, freeze, pack
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.models.architectures import empty_model, tiny_config, write_small

IDS = torch.arange(5, 45)[None]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def in_4_bits(folder: Path, kind: str) -> ModelConfig:
    write_small(kind, folder / kind)
    return ModelConfig(name_or_path=str(folder / kind), load_in_4bit=True)


def packed(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return pack(torch.randn(*shape, dtype=dtype), NF4)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_logits_are_those_of_the_numbers_that_the_4_bits_stand_for(tmp_path: Path, kind: str) -> None:
    model = in_4_bits(tmp_path, kind)
    base = load_base(model)
    names = {name.rsplit(".", 1)[-1] for name, weight in base.named_parameters() if isinstance(weight, Weight4bit)}
    assert names >= {"gate_up_proj", "down_proj"}
    plain = load_dequantised(model)
    assert not any(isinstance(weight, Weight4bit) for weight in plain.parameters())
    with torch.no_grad():
        assert torch.equal(base(IDS).logits, plain(IDS).logits)


def test_a_router_whose_weight_is_read_past_it_keeps_its_shape_in_4_bits(tmp_path: Path) -> None:
    base = load_base(in_4_bits(tmp_path, "longcat_flash"))
    read = [module.weight for name, module in base.named_modules() if name.endswith(".router.classifier")]
    assert read
    assert all(isinstance(weight, Weight4bit) for weight in read)
    with torch.no_grad():
        assert torch.isfinite(base(IDS).logits).all()


def test_experts_that_no_adapter_covers_are_in_4_bits_all_the_same() -> None:
    for kind in ("dbrx", "mistral_large4"):
        names = {name.rsplit(".", 1)[-1] for name in stacked(empty_model(kind))}
        assert names >= ({"w1", "v1", "w2"} if kind == "dbrx" else {"gate_up_proj", "down_proj"})


def test_an_adapter_covers_experts_and_dense_layers_of_4_bits_and_twice_the_same_pass_gives_the_same(
    tmp_path: Path,
) -> None:
    policy = load_policy(in_4_bits(tmp_path, "deepseek_v3"), LoraConfig())
    found = covered(policy)
    assert found.share > 0.99  # all but the router
    assert found.covered["experts.gate_up_proj"] == 1
    assert found.covered["gate_proj"] == 2  # of the first, dense layer, and of the shared expert
    frozen = {name: weight.unpacked() for name, weight in policy.named_parameters() if isinstance(weight, Weight4bit)}
    policy.train()
    policy(IDS, labels=IDS, use_cache=False).loss.backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if "lora_B" in name}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
        one, two = (policy.eval()(IDS).logits for _ in range(2))
    assert torch.equal(one, two)  # nothing of a pass is left in the weights
    assert all(torch.equal(policy.get_parameter(name).unpacked(), weight) for name, weight in frozen.items())


class TestAWeight:
    def test_it_has_the_shape_and_type_of_the_weight_and_half_a_byte_a_number(self) -> None:
        weight = packed(4, 96, 64)
        assert (tuple(weight.shape), weight.dtype, weight.requires_grad) == ((4, 96, 64), torch.float32, False)
        assert weight.codes.numel() == weight.numel() / 2
        assert isinstance(weight, torch.nn.Parameter)

    def test_any_operation_is_that_of_what_it_stands_for(self) -> None:
        weight, ids = packed(4, 96, 64), torch.randn(3, 64)
        whole = weight.unpacked()
        assert torch.equal(weight[2], whole[2])
        assert torch.equal(ids @ weight[1].t(), ids @ whole[1].t())
        assert torch.equal(torch.cat([weight, weight]), torch.cat([whole, whole]))
        assert torch.equal(weight.to(torch.bfloat16), whole.to(torch.bfloat16))

    def test_one_of_a_stack_is_read_in_inference_mode_too(self) -> None:
        weight = packed(4, 96, 64)
        whole = weight.unpacked()
        with torch.inference_mode():
            assert torch.equal(weight[1], whole[1])
            assert torch.equal(weight.view(2, 192, 64)[0], whole.view(2, 192, 64)[0])

    def test_a_copy_and_what_moves_keep_4_bits(self) -> None:
        weight = packed(4, 96, 64)
        assert isinstance(weight.detach(), Weight4bit)
        assert isinstance(weight.clone(), Weight4bit)
        module = torch.nn.Module()
        module.weight = weight
        assert isinstance(module.to("cpu").weight, Weight4bit)

    def test_what_would_change_it_is_refused(self) -> None:
        weight = packed(4, 96, 64)
        with pytest.raises(RuntimeError, match="would change a weight in 4 bits"):
            weight.data += 1

    def test_a_gradient_goes_through_to_the_input(self) -> None:
        weight, ids = packed(2, 96, 64), torch.randn(3, 64, requires_grad=True)
        (ids @ weight[0].t()).sum().backward()
        assert ids.grad is not None
        assert torch.allclose(ids.grad, weight.unpacked()[0].sum(0).expand(3, 64))


def test_in_16_bits_a_module_computes_in_its_own_type_and_answers_in_that_of_its_input(tmp_path: Path) -> None:
    write_small("mixtral", tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral", dtype=torch.bfloat16)
    experts = model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, pack(getattr(experts, name).data, NF4))
    freeze(model)
    compute_in_own_type(model)
    assert isinstance(experts.gate_up_proj, Weight4bit)
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    with torch.no_grad():
        logits = model(IDS).logits  # hidden states in float32 meet experts in bfloat16
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()


def test_a_layer_whose_weight_the_code_around_it_changes_stays_as_it_is_and_the_plan_knows_it() -> None:
    model = empty_model("gemma3n_text")  # a training pass clamps it in place
    kept = {name.rsplit(".", 1)[-1] for name in changed_in_place(model)}
    assert kept == {"prediction_coefs"}
    assert not any("prediction_coefs" in name for name in [*layers(model), *stacked(model)])


PEAK = """
import sys, threading, time
from finetune_kit.models.load import load_base
from finetune_kit.settings.schema import ModelConfig

def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not done:
        peaks.append(own())
        time.sleep(0.002)

peaks, done = [], False
for folder in sys.argv[1:]:  # the first one imports what loading needs
    peaks.clear()
    thread = threading.Thread(target=watch)
    done, before = False, own()
    thread.start()
    model = load_base(ModelConfig(name_or_path=folder, load_in_4bit=True))
    done = True
    thread.join()
    print(max(peaks) - before)
    del model
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells how much memory is a process's own")
def test_loading_a_mixture_in_4_bits_never_holds_it_in_full(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 1, 5):
        config = tiny_config("mixtral")
        config.update({"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": count})
        folder = tmp_path / str(count)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder)
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters()))
    folders = [str(tmp_path / name) for name in ("1", "1", "5")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True)
    _, small, large = map(int, done.stdout.split())
    assert large - small < 0.5 * (sizes[2] - sizes[1])
