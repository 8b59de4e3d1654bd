"""The packed forward gives the padded model's numbers, for every family it accepts, and says why where it does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from finetune_kit.config import LoraConfig, ModelConfig
from finetune_kit.model import adapters, packed
from finetune_kit.model.load import load_policy

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=64),
    "gemma": GemmaConfig(**SHAPE),
    "gpt2": GPT2Config(
        **{name: SHAPE[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        attn_pdrop=0,
        embd_pdrop=0,
        resid_pdrop=0,
    ),
}
WINDOWED: dict[str, Any] = {
    "every layer": MistralConfig(**SHAPE, sliding_window=26),
    "the second layer": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=26, max_window_layers=1),
}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def batch(shared: int = 12, side: str = "right") -> dict[str, torch.Tensor]:
    """Five rows of 30 to 3 tokens; the first three begin with the same `shared` tokens, the last two are equal."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 97, (length,), generator=generator) for length in (30, 25, 18, 3)]
    for text in texts[1:3]:
        text[:shared] = texts[0][: min(shared, len(text))]
    texts.append(texts[3].clone())
    ids, mask, labels = (torch.full((5, 30), value) for value in (0, 0, -100))
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(30 - len(text), 30)
        ids[row, place], mask[row, place] = text, 1
        labels[row, place] = torch.where(torch.arange(len(text)) >= len(text) // 2, text, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def log_probs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return logits.log_softmax(-1)[inputs["attention_mask"].bool()]


def loss_and_gradient(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal_training(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    padded_loss, padded = loss_and_gradient(model, inputs)
    assert packed.enable(model) == ""
    loss, gradient = loss_and_gradient(model, inputs)
    assert abs(loss - padded_loss) < 1e-5
    assert float((gradient - padded).norm() / padded.norm()) < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_the_padded_models_to_1e_4_on_either_padding_side(family: str, side: str) -> None:
    model, inputs = make(FAMILIES[family]), batch(side=side)
    expected = log_probs(model, inputs)
    if (family, side) == ("gpt2", "left"):  # learned positions count the padding unless they are told: tokens first
        expected = log_probs(model, batch(side="right"))
    assert packed.enable(model) == ""
    assert float((log_probs(model, inputs) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_padded_models_to_1e_5(family: str) -> None:
    assert_equal_training(make(FAMILIES[family]).train(), batch())


@pytest.mark.parametrize("shared", [0, 1, 7, 8, 9, 17, 18])
def test_beginnings_of_every_length_from_0_to_a_whole_row_are_exact(shared: int) -> None:
    assert_equal_training(make(FAMILIES["llama"]).train(), batch(shared))


@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True), LoraConfig(r=4, use_rslora=True)])
def test_adapters_get_the_padded_models_gradients(lora: LoraConfig) -> None:
    model = adapters.attach(make(FAMILIES["llama"]), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_training(model.train(), batch())


def test_gradient_checkpointing_changes_nothing() -> None:
    model = make(FAMILIES["llama"]).train()
    model.gradient_checkpointing_enable()
    assert_equal_training(model, batch())


def test_one_row_alone_and_a_batch_without_padding_are_exact() -> None:
    inputs = {name: rows[:1] for name, rows in batch().items()}
    assert_equal_training(make(FAMILIES["llama"]).train(), inputs)


def test_five_rows_of_79_tokens_go_through_the_layers_as_52_with_one_head_row_a_label() -> None:
    model, inputs = make(FAMILIES["llama"]), batch()
    assert packed.enable(model) == ""
    seen: dict[str, int] = {}
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.update(layers=o.shape[1]))
    model.lm_head.register_forward_hook(lambda m, i, o: seen.update(head=o.shape[0] * o.shape[1]))
    model(**inputs)
    assert int(inputs["attention_mask"].sum()) == 79
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    # 79 less the 12 shared tokens of two rows, less the 3 of the repeated row
    assert seen == {"layers": 79 - 24 - 3, "head": labels + 1}


def test_with_dropout_on_beginnings_are_not_shared() -> None:
    model = adapters.attach(make(FAMILIES["llama"]), LoraConfig(r=4, lora_dropout=0.1))
    assert packed.enable(model) == ""
    seen: dict[str, int] = {}
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.update(layers=o.shape[1]))
    model.train()(**batch())
    assert seen["layers"] == 79
    model.eval()(**batch())
    assert seen["layers"] == 52


def test_generation_is_as_before_with_the_packed_forward_on() -> None:
    model, inputs = make(FAMILIES["llama"]), batch(side="left")
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    assert packed.enable(model) == ""
    assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), expected)


def layer_tokens(model: Any) -> list[int]:
    """Filled with the tokens that each forward pass sends through the first layer."""
    seen: list[int] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.base_model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[0] * o.shape[1]))
    return seen


@pytest.mark.parametrize("windowed", WINDOWED)
@pytest.mark.parametrize("shared", [0, 9, 17])
def test_a_row_of_30_tokens_under_a_sliding_window_of_26_is_packed_and_exact(windowed: str, shared: int) -> None:
    model, inputs = make(WINDOWED[windowed]).train(), batch(shared)
    whole = make(WINDOWED[windowed]) if windowed == "every layer" else None
    assert_equal_training(model, inputs)
    seen = layer_tokens(model)
    log_probs(model, inputs)
    assert seen == [79 - 2 * (shared if shared >= packed.WORTH_SHARING else 0) - 3]
    if whole is not None:  # the window acts: without it the numbers are others
        inside = log_probs(whole, inputs)
        whole.config.sliding_window = None
        for layer in whole.model.layers:
            layer.self_attn.config.sliding_window = None
        assert float((log_probs(whole, inputs) - inside).abs().max()) > 1e-4


def test_a_window_that_attention_is_not_told_keeps_longer_rows_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = packed.attend

    def untold(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attend(*args, **kwargs)

    monkeypatch.setattr(packed, "attend", untold)
    model, inputs = make(WINDOWED["every layer"]), batch()
    expected = log_probs(model, inputs)
    assert packed.enable(model) == ""
    seen = layer_tokens(model)
    assert torch.equal(log_probs(model, inputs), expected)
    assert seen == [5 * 30]


def test_an_adapter_on_4_bit_weights_gets_the_padded_models_gradients(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model), load_in_4bit=True)
    model = load_policy(config, LoraConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_training(model.train(), batch())


def test_a_model_it_cannot_pack_keeps_its_own_numbers_and_gets_a_reason() -> None:
    model, inputs = make(Gemma2Config(**SHAPE)), batch()
    expected = log_probs(model, inputs)
    assert packed.enable(model) == "the packed forward needs sdpa attention, not eager"
    assert torch.equal(log_probs(model, inputs), expected)
    assert model.config._attn_implementation == "eager"


def test_the_attention_of_the_packed_forward_is_not_written_into_a_saved_config(tmp_path: Any) -> None:
    model = make(FAMILIES["llama"])
    assert packed.enable(model) == ""
    model.save_pretrained(tmp_path)
    assert packed.ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_row_that_moves_another_is_noticed_and_the_padded_forward_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = packed.attend

    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, packed: Any = None, **kwargs: Any) -> Any:
        leak = 0.01 * value.mean(dim=2, keepdim=True) if packed is not None else 0
        return attend(module, query, key, value + leak, mask, packed=packed, **kwargs)

    monkeypatch.setattr(packed, "attend", leaking)
    model = make(FAMILIES["llama"])
    assert "differ" in packed.enable(model)
    assert model.config._attn_implementation == "sdpa"


def pairs_of_rows() -> list[list[int]]:
    """Eight rows of four pairs, 30 to 9 tokens: the two of a pair begin with the same 8 to 20 tokens."""
    generator = torch.Generator().manual_seed(2)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 97, (count,), generator=generator).tolist()

    prompts = [draw(length) for length in (8, 12, 16, 20)]
    return [prompt + draw(length) for length in (10, 1) for prompt in prompts]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_scores_of_a_classifier_and_their_gradients_equal_the_padded_models(family: str) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    inputs = padded(pairs_of_rows())

    def scores_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        scores = model(**inputs).logits[:, 0]
        scores.square().sum().backward()
        return scores.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected, gradient = scores_and_gradient()
    assert packed.enable(model) == ""
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    scores, packed_gradient = scores_and_gradient()
    assert float((scores - expected).abs().max()) < 1e-5
    assert float((packed_gradient - gradient).norm() / gradient.norm()) < 1e-5
    assert seen == [8 + 12 + 16 + 20 + 4 * (10 + 1)]  # each prompt once


def test_log_probabilities_of_trls_head_are_laid_out_in_padded_rows() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, inputs = make(FAMILIES["llama"]), batch()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    expected = model(**inputs, fused_lm_head=True)
    assert packed.enable(model) == ""
    found = model(**inputs, fused_lm_head=True)
    assert found.log_probs.shape == (5, 29)
    assert float((found.log_probs - expected.log_probs).abs().max()) < 1e-5
    assert torch.equal(found.label_mask, expected.label_mask)
    assert torch.equal(found.is_top1, expected.is_top1)


class TestCounts:
    """What a batch of four pairs sends through the layers and the head, by torch's own count of multiplications."""

    @staticmethod
    def flop(call: Any) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            call()
        return int(counter.get_total_flops())

    @staticmethod
    def per_token(model: Any) -> int:
        """Multiplications and additions of one token in the linear layers below the head."""
        layers = [part for part in model.base_model.modules() if isinstance(part, torch.nn.Linear)]
        return sum(2 * part.in_features * part.out_features for part in layers)

    @pytest.mark.parametrize("supervised", [1, 5])
    def test_sft_and_dpo_cost_the_unique_tokens_in_the_layers_and_the_labels_in_the_head(self, supervised: int) -> None:
        from trl.trainer.utils import add_fused_lm_head

        model, inputs = make(FAMILIES["llama"]), padded(pairs_of_rows())
        lengths = inputs["attention_mask"].sum(dim=1)
        places = torch.arange(inputs["input_ids"].shape[1])
        answer = (places >= (lengths - supervised)[:, None]) & (places < lengths[:, None])
        inputs["labels"] = inputs["input_ids"].masked_fill(~answer, -100)
        add_fused_lm_head(model, outputs=("log_probs",))
        padded_flop = self.flop(lambda: model(**inputs, fused_lm_head=True))
        slots = inputs["input_ids"].numel()
        a_token, a_label = self.per_token(model), 2 * 32 * 97
        assert padded_flop == slots * a_token + (slots - 8) * a_label
        assert packed.enable(model) == ""
        unique = 8 + 12 + 16 + 20 + 4 * (10 + 1)  # each prompt once
        assert self.flop(lambda: model(**inputs, fused_lm_head=True)) == unique * a_token + 8 * supervised * a_label

    def test_a_reward_costs_the_unique_tokens_in_the_layers_and_32_multiplications_a_slot_in_the_head(self) -> None:
        config = copy.deepcopy(FAMILIES["llama"])
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        inputs = padded(pairs_of_rows())
        slots, a_token = inputs["input_ids"].numel(), self.per_token(model)
        assert self.flop(lambda: model(**inputs)) == slots * (a_token + 2 * 32)
        assert packed.enable(model) == ""
        assert self.flop(lambda: model(**inputs)) == (8 + 12 + 16 + 20 + 44) * a_token + slots * 2 * 32
