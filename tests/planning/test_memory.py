"""Memory is predicted from shapes: to the byte where tensors stay, and the step that is rehearsed is the real one."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    TrainerCallback,
)

from finetune_kit.data.load import load_data
from finetune_kit.models.device import device, planning_for
from finetune_kit.models.quantized_experts import Weight4bit
from finetune_kit.models.shapes import empty_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning import fake_step
from finetune_kit.planning.fake_step import Batch, Live, Setting, _loss, _rehearse, step_bytes
from finetune_kit.planning.memory import Quantised, four_bit, longest_batch, memory, settle_types, weights
from finetune_kit.planning.plan import plan
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from finetune_kit.training.optimizer import optimizer_scratch, optimizer_state
from tests.fixtures_training import Trained, prepare, settings, write_rows
from tests.models.architectures import write_small


def stored(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(model: Any) -> Iterator[torch.Tensor]:
    """Every tensor that a model keeps: parameters, buffers, and the state of quantised weights."""
    yield from model.buffers()
    for parameter in model.parameters():
        stack = isinstance(parameter, Weight4bit)
        yield parameter.codes if stack else parameter
        state = parameter.state if stack else getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor)) if part else ()


def empty(model: ModelConfig, lora: LoraConfig | None) -> tuple[Any, Quantised]:
    policy = empty_policy(model, lora, trained_in_full=lora is None)
    return policy, settle_types(policy, model)


def planned(run: Trained) -> dict[str, int]:
    policy, _ = empty(run.config.model, getattr(run.config, "lora", None))
    return memory(run.config, run.data, policy)


class Counting(TrainerCallback):  # type: ignore[misc]  # transformers ships no types here
    """What lies in gradients when the optimizer is about to step, and in its state when it has."""

    gradients = state = 0

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.gradients = stored(p.grad for p in model.parameters() if p.grad is not None)

    def on_optimizer_step(self, *args: Any, optimizer: Any, **kwargs: Any) -> None:
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        self.state = stored(value for state in states for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("full_sft", []),
        ("lora_sft", []),
        ("lora_sft", ["use_dora=true", "modules_to_save=[lm_head]"]),
        ("qlora_sft", []),
        ("qlora_sft", ["target_modules=[q_proj]", "bnb_4bit_use_double_quant=false"]),
    ],
)
def test_weights_and_gradients_and_state_are_exact_to_the_byte(home: Path, recipe: str, words: list[str]) -> None:
    run, counting = prepare(recipe, home, "max_steps=1", *words), Counting()
    parts = planned(run)
    assert parts["weights"] == stored(held(run.model))
    run.trainer.add_callback(counting)
    run.trainer.train()
    assert (parts["gradients"], parts["optimizer_state"]) == (counting.gradients, counting.state)


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_a_mixture_in_4_bits_is_planned_to_the_byte_and_its_step_is_the_real_one(tmp_path: Path, kind: str) -> None:
    write_small(kind, tmp_path / "tiny")
    write_rows(tmp_path / "rows.jsonl")
    run = prepare("qlora_sft", tmp_path, "per_device_train_batch_size=8", "data.size=8")
    parts = planned(run)
    assert parts["weights"] == stored(held(run.model))
    experts = [weight for name, weight in run.model.named_parameters() if name.endswith("gate_up_proj")]
    assert experts
    assert all(isinstance(weight, Weight4bit) for weight in experts)
    run.trainer.current_gradient_accumulation_steps = 1  # as in its own loop, which the router's loss asks
    assert parts["gradients"] + parts["activations"] == pytest.approx(most_alive(run), rel=0.03)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "adafactor", "sgd"]
)
def test_each_optimizer_s_state_is_exact_to_the_byte(home: Path, optim: str) -> None:
    # matrices of 8192, 4096 and 2048 weights: above, at and below what 8 bits begin with; and an embedding
    run, counting = prepare("full_sft", home, "max_steps=1", f"optim={optim}"), Counting()
    run.trainer.add_callback(counting)
    run.trainer.train()
    assert optimizer_state(empty(run.config.model, None)[0], optim) == counting.state


def test_4_bit_weights_take_half_a_byte_and_their_scales() -> None:
    assert four_bit(64 * 256, double=False) == 8192 + 64 + 4 * 256
    assert four_bit(64 * 256, double=True) == 8192 + 64 + 256 + 4 + 4 + 1024
    assert four_bit(65, double=False) == 33 + 64 + 4 * 2
    assert four_bit(4096 * 14336, double=True) / (4096 * 14336) == pytest.approx(4.127 / 8, abs=2e-4)  # QLoRA's bits


# the step


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("full_sft", ("gradient_accumulation_steps=2",)),
        ("full_sft", ("padding_free=false", "gradient_checkpointing=true")),
        ("lora_sft", ()),
        ("lora_sft", ("padding_free=false",)),
        ("lora_sft", ("gradient_checkpointing=true",)),
        ("qlora_sft", ()),
    ],
)
def test_the_step_that_is_rehearsed_is_the_real_one(home: Path, recipe: str, words: tuple[str, ...]) -> None:
    # every row goes into one batch, so that the longest batch is the one that is trained
    run = prepare(recipe, home, "per_device_train_batch_size=8", "data.size=8", *words)
    parts = planned(run)
    assert parts["gradients"] + parts["activations"] == pytest.approx(most_alive(run), rel=0.02)


def most_alive(run: Trained) -> int:
    """Most bytes alive in the trainer's own forward and backward pass, the weights aside."""
    run.trainer.create_optimizer()
    passes = run.config.train.gradient_accumulation_steps
    batch = next(iter(run.trainer.get_train_dataloader()))
    live = Live(run.model)
    live.known |= {tensor.untyped_storage()._cdata for tensor in held(run.model)}
    run.trainer.model.train()
    if run.config.train.gradient_checkpointing:
        run.model.gradient_checkpointing_enable()
    with live:
        for _ in range(passes):
            run.trainer.training_step(run.trainer.model, dict(batch), 8)
    return max(live.most)


@pytest.mark.parametrize(
    ("batch", "lora", "checkpointing"),
    [
        (Batch(1, 8, False, 7), None, False),  # the gradients of six blocks are the most
        (Batch(8, 128, True, 100), None, False),  # their activations are
        (Batch(8, 128, True, 100), LoraConfig(), True),
    ],
    ids=["full 1 x 8", "full 8 x 128", "lora 8 x 128 checkpointed"],
)
def test_three_blocks_tell_what_six_need(
    tmp_path: Path, tiny_model: Path, batch: Batch, lora: LoraConfig | None, checkpointing: bool
) -> None:
    policy, _ = empty(shapes(tmp_path, tiny_model, LlamaConfig(**{**LLAMA, "num_hidden_layers": 6})), lora)
    setting = Setting(checkpointing, accumulates=lora is None and batch.rows == 8, on_gpu=False)
    assert step_bytes(policy, batch, setting) == pytest.approx(
        max(_rehearse(policy, range(6), batch, setting)), rel=0.005
    )
    assert len(list(policy.parameters())) == (57 if lora is None else 57 + 2 * 6 * 7)  # the policy is as it was


def test_on_a_gpu_a_step_keeps_half_the_activations_and_one_tile_of_logits(tmp_path: Path, tiny_model: Path) -> None:
    policy, _ = empty(shapes(tmp_path, tiny_model, LlamaConfig(**{**LLAMA, "vocab_size": 65536})), LoraConfig())
    on_cpu, on_gpu = (
        step_bytes(policy, Batch(4, 256, False, 1000), Setting(False, False, on_gpu=on_gpu)) for on_gpu in (False, True)
    )
    assert on_gpu < on_cpu / 5  # the CPU's head has eight tiles of logits at once, in float32
    short = step_bytes(policy, Batch(4, 256, False, 500), Setting(False, False, on_gpu=True))
    assert on_gpu - short == pytest.approx(500 * 32768 * 2, rel=0.1)  # logits only where a label is, in bfloat16


def test_on_a_gpu_rows_are_planned_without_padding_and_by_the_varlen_kernel(home: Path) -> None:
    run = prepare("lora_sft", home, "data.size=8")
    policy, _ = empty(run.config.model, run.config.lora)  # type: ignore[attr-defined]
    on_cpu = longest_batch(run.config, run.data, policy).plan
    with planning_for("cuda"):
        on_gpu = longest_batch(run.config, run.data, policy).plan
    assert on_cpu is not None
    assert on_gpu is not None
    assert on_gpu.segments == on_cpu.segments
    assert on_cpu.varlen is None
    assert on_gpu.varlen is not None
    assert on_gpu.varlen.kernel is varlen_attn
    padded = replace(run.config, train=replace(run.config.train, padding_free=False))
    with planning_for("cuda"):
        free, whole = (memory(config, run.data, policy)["activations"] for config in (run.config, padded))
    assert 0 < free < whole


def test_packed_text_goes_through_in_one_row(home: Path) -> None:
    (home / "book.txt").write_text("\n\n".join(f"The {n}th line says {n} times {n} is {n * n}." for n in range(99)))
    run = prepare("lora_sft", home, f"data.path={home / 'book.txt'}", "max_length=64")
    batch = longest_batch(run.config, run.data, run.model)
    assert (batch.rows, batch.width, batch.end_to_end, batch.plan) == (1, 64, True, None)


# settings


SETTINGS = {
    "per_device_train_batch_size=2": {"activations": "less"},
    "gradient_checkpointing=true": {"activations": "less"},
    "max_length=64": {"activations": "less"},
    "padding_free=false": {"activations": "more"},
    "packing=true": {"activations": "more"},  # one row of 1024 tokens; unpacked, four rows that begin alike have 900
    "optim=sgd": {"optimizer_state": "less"},
    "optim=adafactor": {"optimizer_state": "less"},
    "lora.r=32": {"weights": "more", "gradients": "more", "optimizer_state": "more", "activations": "more"},
}


@pytest.mark.parametrize("word", SETTINGS)
def test_a_setting_moves_its_own_part_of_the_memory(home: Path, word: str) -> None:
    write_rows(home / "rows.jsonl", [{"prompt": f"{n}?", "completion": "and so on " * 20} for n in range(12)])
    usual, other = (sizes(home, *words) for words in ((), (word,)))
    moved = {name: "less" if other[name] < usual[name] else "more" for name in usual if other[name] != usual[name]}
    moved.pop("heap", None)  # it follows the activations
    assert moved == SETTINGS[word]


def sizes(home: Path, *words: str) -> dict[str, int]:
    config = settings("lora_sft", home, *words)
    data = load_data(config.data, "prompt_completion", load_tokenizer(config.model))
    return memory(config, data, empty_policy(config.model, config.lora, trained_in_full=False))  # type: ignore[attr-defined]


def alive(config: Any, batch: Batch) -> int:
    """Most bytes alive in a real step of a model of random weights, all of it trained."""
    model = AutoModelForCausalLM.from_config(config).train()
    with Live(model) as live:
        _loss(model, batch, Setting(False, False, on_gpu=False)).backward()
    return max(live.most)


MOE = {"num_hidden_layers": 5, "moe_intermediate_size": 32, "head_dim": 16}
DEEPSEEK = {
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": None},
    **{"head_dim": 8, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
}


@pytest.mark.parametrize(
    ("kind", "own"),
    [(MixtralConfig, {"num_local_experts": 4}), (Qwen3MoeConfig, {"num_experts": 8}), (DeepseekV3Config, DEEPSEEK)],
    ids=["Mixtral", "Qwen3-MoE", "DeepSeek-V3"],
)
def test_a_step_of_a_mixture_of_experts_is_the_real_one_within_2_percent(kind: Any, own: dict[str, Any]) -> None:
    # the first three blocks of DeepSeek-V3 are dense: blocks of each kind are rehearsed
    config, batch = kind(**{**LLAMA, **MOE, **own}), Batch(4, 64, False, 200)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
    rehearsed = step_bytes(policy, batch, Setting(False, False, on_gpu=False))
    assert rehearsed == pytest.approx(alive(config, batch), rel=0.02)
    assert policy.config.num_hidden_layers == len(policy.model.layers) == 5  # it is as it was


@pytest.mark.long
def test_a_loop_over_the_tokens_of_long_rows_is_told_from_short_ones_within_5_percent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"lru_width": 64, "head_dim": 16, "num_hidden_layers": 4}
    config, batch = RecurrentGemmaConfig(**{**LLAMA, **own}), Batch(2, 96, False, 190)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(fake_step, "SHORT", (8, 16))
    monkeypatch.setattr(fake_step, "MOST_IN_A_BLOCK", 1000)
    found = step_bytes(policy, batch, Setting(False, False, on_gpu=False))
    assert (
        "activations are those of rows of 8 and 16 tokens, drawn out: the forward pass of one block takes more than"
        in caplog.text
    )
    assert found == pytest.approx(alive(config, batch), rel=0.05)


def test_a_loop_that_assigns_to_slices_is_left_without_ending_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own = {"lru_width": 64, "head_dim": 16, "num_hidden_layers": 2}
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(RecurrentGemmaConfig(**{**LLAMA, **own}))
    monkeypatch.setattr(fake_step, "SHORT", (2, 3))
    for most in range(800, 806):  # somewhere in the loop of its forward pass, and at each kind of operation there
        monkeypatch.setattr(fake_step, "MOST_OPERATIONS", most)
        with contextlib.suppress(fake_step.TooLong):  # the short rows may be too long for it, too
            step_bytes(policy, Batch(2, 96, False, 190), Setting(False, False, on_gpu=False))
    assert "takes more than 805 operations" in caplog.text


# another device


def for_cuda(home: Path, recipe: str, *words: str, kind: str | None = "cuda") -> dict[str, Any]:
    with planning_for(kind):
        config = settings(recipe, home, *words)
        data = load_data(config.data, "prompt_completion", load_tokenizer(config.model))
        return plan(config, data)


def test_on_a_laptop_a_plan_for_cuda_halves_frozen_weights_and_says_bfloat16_and_the_kernel(home: Path) -> None:
    here, there = (for_cuda(home, "lora_sft", kind=kind) for kind in (None, "cuda"))
    assert here["planned_for"] == {
        **{"device": "cpu", "frozen": "float32", "trained": "float32", "arithmetic": "float32"},
        **{"rows": "packed", "attention": "sdpa, segment by segment"},
    }
    assert there["planned_for"] == {
        **{"device": "cuda", "frozen": "bfloat16", "trained": "float32", "arithmetic": "bfloat16"},
        **{"rows": "packed", "attention": "torch's varlen kernel"},
    }
    frozen = here["parameters"] - here["trainable_parameters"]
    assert here["memory_bytes"]["weights"] - there["memory_bytes"]["weights"] == 2 * frozen
    for part in ("gradients", "optimizer_state"):
        assert here["memory_bytes"][part] == there["memory_bytes"][part]
    assert there["memory_bytes"]["cuda_context"] == 512 * 2**20
    assert "libraries" not in there["memory_bytes"]
    assert there["memory_bytes"]["heap"] == 0
    assert device().type == "cpu"  # planned for no longer


@pytest.mark.parametrize(
    ("recipe", "words", "frozen", "rows"),
    [
        ("qlora_sft", (), "4-bit", "packed"),
        ("full_sft", (), None, "packed"),
        ("lora_sft", ("padding_free=false",), "bfloat16", "padded (train.padding_free=false)"),
        ("lora_sft", ("model.attn_implementation=eager",), "bfloat16", "padded (the packed forward needs sdpa"),
        ("lora_sft", ("packing=true",), "bfloat16", "end to end, by TRL"),
    ],
)
def test_what_a_plan_for_cuda_takes_for_granted_is_named(
    home: Path, recipe: str, words: tuple[str, ...], frozen: str | None, rows: str
) -> None:
    known = for_cuda(home, recipe, *words)["planned_for"]
    assert (known.get("frozen"), known["arithmetic"]) == (frozen, "bfloat16")
    assert known["rows"].startswith(rows)


def test_on_cuda_the_unfused_adamw_needs_the_roots_of_all_second_moments_for_the_moment(home: Path) -> None:
    policy = empty(settings("full_sft", home).model, None)[0]
    with planning_for("cuda"):
        found = [optimizer_scratch(policy, optim) for optim in ("adamw_torch", "adamw_torch_fused", "auto")]
    assert found == [4 * sum(p.numel() for p in policy.parameters()), 0, 0]
    assert optimizer_scratch(policy, "adamw_torch") == 0  # here, on a CPU, it goes weight by weight


# published shapes

LLAMA = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def shapes(folder: Path, tiny_model: Path, config: Any, **words: Any) -> ModelConfig:
    """A model of which there is only config.json and a tokenizer."""
    target = folder / "shapes"
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).write_bytes((tiny_model / name).read_bytes())
    config.save_pretrained(target)
    return ModelConfig(name_or_path=str(target), **words)


def counted(policy: Any) -> tuple[int, int]:
    """(all parameters, trained ones)."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def test_llama_3_1_8b_has_8_030_261_248_parameters_and_needs_exactly_16_7_gb_with_lora(
    home: Path, tmp_path: Path, tiny_model: Path
) -> None:
    run = prepare("lora_sft", home, "per_device_train_batch_size=1")
    run.config.model = shapes(tmp_path, tiny_model, LlamaConfig(**LLAMA_8B), dtype="bfloat16")
    policy, _ = empty(run.config.model, LoraConfig())
    assert counted(policy) == (8_030_261_248 + 41_943_040, 41_943_040)
    parts = planned(run)
    rotation = 4 * 128  # rotary frequencies, one for every second of a head's 128 numbers, kept twice
    # the base in bfloat16; the adapter, its gradients and AdamW's two moments in float32, a step's number a tensor
    assert parts["weights"] == 2 * 8_030_261_248 + 4 * 41_943_040 + rotation
    assert parts["gradients"] == 4 * 41_943_040
    assert parts["optimizer_state"] == 2 * 4 * 41_943_040 + 4 * 2 * 7 * 32
    assert 2**27 < parts["activations"] < 2**30  # one short row


def test_llama_3_1_8b_in_4_bits_has_6_4_gb_and_its_embeddings_in_float32(tmp_path: Path, tiny_model: Path) -> None:
    model = shapes(tmp_path, tiny_model, LlamaConfig(**LLAMA_8B), load_in_4bit=True)
    policy, quantised = empty(model, LoraConfig())
    static = weights(policy, model, quantised) + 4 * 41_943_040 + optimizer_state(policy, "auto")
    # published figures keep embeddings, head and norms in bfloat16; prepare_model_for_kbit_training makes them float32
    unquantised = 2 * 128256 * 4096 + 65 * 4096
    assert static - 2 * unquantised == pytest.approx(6.4e9, rel=0.01)
