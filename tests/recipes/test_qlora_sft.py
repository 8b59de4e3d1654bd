"""qlora_sft: an adapter in float32 on a base in 4 bits, and the answers where that cannot be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, RwkvConfig

from finetune_kit.errors import SettingsError
from finetune_kit.models import quantization
from finetune_kit.models.load import load_policy
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_training import prepare, train

PEAK = """
import threading, time
import accelerate, bitsandbytes, torch, transformers
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.models.load import load_base

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

transformers.AutoModelForCausalLM
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_base(ModelConfig(load_in_4bit=True))
done.set()
watcher.join()
print(peak[0] - before, model.get_memory_footprint() / 2**20)
"""


def in_4_bits(tiny_model: Path) -> ModelConfig:
    return ModelConfig(name_or_path=str(tiny_model), load_in_4bit=True)


def test_a_whole_run_saves_an_adapter_that_a_fresh_process_reloads_on_the_4_bit_base_to_1e_4(home: Path) -> None:
    artifact = train("qlora_sft", home, "max_steps=4", "learning_rate=1e-2")
    loss = next(entry for entry in artifact.report.metrics if entry["name"] == "held_out_loss")
    assert loss["after"] < loss["before"]
    assert (artifact.folder / "adapter_model.safetensors").is_file()


def test_linear_layers_are_4_bit_nf4_with_double_quantisation_and_all_that_trains_is_float32(home: Path) -> None:
    trained = prepare("qlora_sft", home)
    layer = trained.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.weight.dtype) == ("nf4", True, torch.uint8)
    assert layer.compute_dtype == torch.float32  # a CPU
    assert {parameter.dtype for parameter in trained.model.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_measurement_leaves_the_gradient_of_all_4_bit_layers_as_it_was(home: Path) -> None:
    # on CPUs with bfloat16 units bitsandbytes repacks a layer at its first product without gradients, and has no
    # gradient through it from then on
    model = load_policy(in_4_bits(home / "tiny"), LoraConfig())
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14  # 7 in each of 2 layers
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        model.eval()(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()
    first = model.get_base_model().model.layers[0].mlp.up_proj.lora_B["default"].weight
    assert float(first.grad.abs().max()) > 0


def test_an_update_at_the_small_rate_2e_5_moves_every_element_of_the_adapter(home: Path) -> None:
    # in bfloat16, which TRL casts adapters to, most of them would stay where they are
    from tests.fixtures_training import fit_only

    trained = fit_only("qlora_sft", home, "learning_rate=2e-5", "max_steps=3", "lora.r=4")
    for name, weight in trained.weights.items():
        if "lora_A" in name:
            assert float((weight != trained.start[name]).float().mean()) > 0.99


@pytest.mark.long
def test_loading_in_4_bits_never_holds_the_513_mib_of_the_model_in_float32_not_even_30_percent_of_them() -> None:
    """Anonymous memory (pages of the mapped file left out) of a fresh process while SmolLM2-135M loads."""
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory is read from /proc, which this system does not have")
    # what glibc keeps of freed tensors for later is not held by anyone: each goes back to the system at once
    plain = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, env=plain)
    peak, footprint = map(float, done.stdout.split())
    assert footprint < 160
    assert peak < 0.3 * 513


def test_4_bits_cannot_be_trained_in_full(tiny_model: Path) -> None:
    with pytest.raises(SettingsError, match="quantised weights cannot be trained"):
        load_policy(in_4_bits(tiny_model), trained_in_full=True)


def test_a_base_that_is_quantised_already_or_changes_its_weights_is_refused() -> None:
    config = GPT2Config(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SettingsError, match=r"quantised already .gptq"):
        quantization.check_base(config, "some/model-gptq")
    with pytest.raises(SettingsError, match="RWKV/rwkv-4-169m-pile divides its weights outside training"):
        quantization.check_base(RwkvConfig(), "RWKV/rwkv-4-169m-pile")


def test_a_device_without_4_bit_kernels_is_refused_and_a_cpu_is_told_what_it_lacks() -> None:
    with pytest.raises(SettingsError, match="cannot train on mps"):
        quantization.check_device(torch.device("mps"))
    (note,) = quantization.check_device(torch.device("cpu"))
    assert "paged optimizers act as plain ones" in note


@pytest.mark.long
def test_4_bit_training_goes_on_from_its_own_adapter(home: Path) -> None:
    first = train("qlora_sft", home, "max_steps=3", "learning_rate=1e-2")
    second = train("qlora_sft", home, f"lora.init_from={first.folder}")
    ended = next(entry for entry in first.report.metrics if entry["name"] == "held_out_loss")["after"]
    started = next(entry for entry in second.report.metrics if entry["name"] == "held_out_loss")["before"]
    assert started == pytest.approx(ended, abs=1e-6)


def test_an_adapter_to_go_on_from_keeps_its_rank_and_refuses_another(home: Path) -> None:
    first = train("lora_sft", home, "lora.r=4", "lora.target_modules=[q_proj,v_proj]")
    policy = load_policy(ModelConfig(name_or_path=str(home / "tiny")), LoraConfig(init_from=str(first.folder)))
    assert policy.peft_config["default"].r == 4
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in policy.parameters()) == 2 * 2 * 2  # A and B of two modules in two layers
    wrong = LoraConfig(r=8, init_from=str(first.folder))
    with pytest.raises(SettingsError, match=r"lora.r=8: the adapter in .* has 4"):
        load_policy(ModelConfig(name_or_path=str(home / "tiny")), wrong)


def test_a_folder_without_an_adapter_is_nothing_to_go_on_from(home: Path) -> None:
    with pytest.raises(SettingsError, match="no adapter there"):
        load_policy(ModelConfig(name_or_path=str(home / "tiny")), LoraConfig(init_from=str(home)))
