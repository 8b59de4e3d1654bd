"""The packed forward gives the padded model's numbers, for every family it accepts, and says why where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
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
    Qwen2MoeConfig,
    Qwen3Config,
)

from finetune_kit.models import adapters
from finetune_kit.models.load import load_policy
from finetune_kit.packing import attention, forward, head, proof, segments
from finetune_kit.packing import plan as layout
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_training import prepare
from tests.packing import varlen

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


def attend_by(monkeypatch: pytest.MonkeyPatch, attends: Callable[..., torch.Tensor]) -> None:
    """Let a kernel attend on the CPU as torch's does on CUDA, whatever the type and the heads."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda device: attends)
    monkeypatch.setattr(attention, "refusal", lambda *given: "")


@pytest.fixture(params=["SDPA by segment", "a varlen kernel"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that takes this runs as on a CPU, and as on CUDA with the stand-in for the kernel."""
    if request.param == "a varlen kernel":
        attend_by(monkeypatch, varlen.reference)


both = pytest.mark.usefixtures("both_ways")


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
    return logits.float().log_softmax(-1)[inputs["attention_mask"].bool()]


def loss_and_gradient(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_equal_training(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    padded_loss, padded = loss_and_gradient(model, inputs)
    assert forward.enable(model) == ""
    loss, gradient = loss_and_gradient(model, inputs)
    assert abs(loss - padded_loss) < 1e-5
    assert float((gradient - padded).norm() / padded.norm()) < 1e-5


@both
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_the_padded_models_to_1e_4_on_either_padding_side(family: str, side: str) -> None:
    model, inputs = make(FAMILIES[family]), batch(side=side)
    expected = log_probs(model, inputs)
    if (family, side) == ("gpt2", "left"):  # learned positions count the padding unless they are told: tokens first
        expected = log_probs(model, batch(side="right"))
    assert forward.enable(model) == ""
    assert float((log_probs(model, inputs) - expected).abs().max()) < 1e-4


@both
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_padded_models_to_1e_5(family: str) -> None:
    assert_equal_training(make(FAMILIES[family]).train(), batch())


@both
@pytest.mark.parametrize("shared", [0, 1, 7, 8, 9, 17, 18])
def test_beginnings_of_every_length_from_0_to_a_whole_row_are_exact(shared: int) -> None:
    assert_equal_training(make(FAMILIES["llama"]).train(), batch(shared))


@both
@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=4, use_dora=True), LoraConfig(r=4, use_rslora=True)])
def test_adapters_get_the_padded_models_gradients(lora: LoraConfig) -> None:
    model = adapters.attach(make(FAMILIES["llama"]), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_equal_training(model.train(), batch())


@both
def test_gradient_checkpointing_changes_nothing() -> None:
    model = make(FAMILIES["llama"]).train()
    model.gradient_checkpointing_enable()
    assert_equal_training(model, batch())


@both
def test_one_row_alone_and_a_batch_without_padding_are_exact() -> None:
    inputs = {name: rows[:1] for name, rows in batch().items()}
    assert_equal_training(make(FAMILIES["llama"]).train(), inputs)


@both
def test_five_rows_of_79_tokens_go_through_the_layers_as_52_with_one_head_row_a_label() -> None:
    model, inputs = make(FAMILIES["llama"]), batch()
    assert forward.enable(model) == ""
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
    assert forward.enable(model) == ""
    seen: dict[str, int] = {}
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.update(layers=o.shape[1]))
    model.train()(**batch())
    assert seen["layers"] == 79
    model.eval()(**batch())
    assert seen["layers"] == 52


@both
def test_generation_is_as_before_with_the_packed_forward_on() -> None:
    model, inputs = make(FAMILIES["llama"]), batch(side="left")
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    assert forward.enable(model) == ""
    assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), expected)


def layer_tokens(model: Any) -> list[int]:
    """Filled with the tokens that each forward pass sends through the first layer."""
    seen: list[int] = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.base_model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[0] * o.shape[1]))
    return seen


@both
@pytest.mark.parametrize("windowed", WINDOWED)
@pytest.mark.parametrize("shared", [0, 9, 17])
def test_a_row_of_30_tokens_under_a_sliding_window_of_26_is_packed_and_exact(windowed: str, shared: int) -> None:
    model, inputs = make(WINDOWED[windowed]).train(), batch(shared)
    whole = make(WINDOWED[windowed]) if windowed == "every layer" else None
    assert_equal_training(model, inputs)
    seen = layer_tokens(model)
    log_probs(model, inputs)
    assert seen == [79 - 2 * (shared if shared >= layout.WORTH_SHARING else 0) - 3]
    if whole is not None:  # the window acts: without it the numbers are others
        inside = log_probs(whole, inputs)
        whole.config.sliding_window = None
        for layer in whole.model.layers:
            layer.self_attn.config.sliding_window = None
        assert float((log_probs(whole, inputs) - inside).abs().max()) > 1e-4


NO_WINDOW: dict[str, Any] = {
    "None": MistralConfig(**SHAPE, sliding_window=None),
    "0": Qwen2MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "a number that is not used": Qwen2Config(**SHAPE, use_sliding_window=False, sliding_window=26),
}


@both
@pytest.mark.parametrize("window", NO_WINDOW)
def test_rows_of_a_model_without_a_window_are_packed_however_its_config_says_so(window: str) -> None:
    config = NO_WINDOW[window]
    if window == "0":
        config.sliding_window = 0  # as its checkpoints have it
    model, inputs = make(config), batch()
    expected = log_probs(model, inputs)
    assert forward.enable(model) == ""
    seen = layer_tokens(model)
    assert float((log_probs(model, inputs) - expected).abs().max()) < 1e-4
    assert seen[0] < 79


def test_a_window_that_attention_is_not_told_keeps_longer_rows_padded_and_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend = forward.attend

    def untold(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attend(*args, **kwargs)

    monkeypatch.setattr(forward, "attend", untold)
    model, inputs = make(WINDOWED["every layer"]), batch()
    expected = log_probs(model, inputs)
    assert forward.enable(model) == ""
    seen = layer_tokens(model)
    assert torch.equal(log_probs(model, inputs), expected)
    assert seen == [5 * 30]
    log_probs(model, inputs)
    assert caplog.messages == [
        "padded batches: rows are longer than sliding_window=26, of which this model does not tell attention"
    ]


def test_rows_longer_than_a_chunk_of_attention_stay_padded_and_a_line_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = make(FAMILIES["llama"]), batch()
    model.config.attention_chunk_size = 26
    assert forward.enable(model) == ""
    seen = layer_tokens(model)
    for _ in range(2):
        log_probs(model, inputs)
    assert seen == [5 * 30, 5 * 30]
    assert ["attention_chunk_size=26" in line for line in caplog.messages] == [True]
    short = {name: rows[:, :20] for name, rows in inputs.items()}
    log_probs(model, short)
    assert seen[2] == 20 + 20 + 18 + 3 - 2 * 12


@both
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
    assert forward.enable(model) == "the packed forward needs sdpa attention, not eager"
    assert torch.equal(log_probs(model, inputs), expected)
    assert model.config._attn_implementation == "eager"


def test_the_attention_of_the_packed_forward_is_not_written_into_a_saved_config(tmp_path: Any) -> None:
    model = make(FAMILIES["llama"])
    assert forward.enable(model) == ""
    model.save_pretrained(tmp_path)
    assert forward.ATTENTION not in (tmp_path / "config.json").read_text()


def test_a_row_that_moves_another_is_noticed_and_the_padded_forward_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = forward.attend

    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, packed: Any = None, **kwargs: Any) -> Any:
        leak = 0.01 * value.mean(dim=2, keepdim=True) if packed is not None else 0
        return attend(module, query, key, value + leak, mask, packed=packed, **kwargs)

    monkeypatch.setattr(forward, "attend", leaking)
    model = make(FAMILIES["llama"])
    assert "differ" in forward.enable(model)
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


@both
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
    assert forward.enable(model) == ""
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1]))
    scores, packed_gradient = scores_and_gradient()
    assert float((scores - expected).abs().max()) < 1e-5
    assert float((packed_gradient - gradient).norm() / gradient.norm()) < 1e-5
    assert seen == [8 + 12 + 16 + 20 + 4 * (10 + 1)]  # each prompt once


ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@both
@pytest.mark.parametrize("own_head", [False, True])
def test_what_trls_head_measures_of_each_label_is_laid_out_in_padded_rows(own_head: bool) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, inputs = make(FAMILIES["llama"]), batch()
    add_fused_lm_head(model, outputs=ALL)

    def outputs_and_gradient() -> tuple[Any, torch.Tensor]:
        model.zero_grad()
        output = model(**inputs, fused_lm_head=True)
        output.loss.backward()
        return output, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected, gradient = outputs_and_gradient()
    assert forward.enable(model, own_head=own_head) == ""
    found, packed_gradient = outputs_and_gradient()
    assert found.log_probs.shape == (5, 29)
    for name in ("loss", *ALL[:-1]):
        assert float((getattr(found, name) - getattr(expected, name)).detach().abs().max()) < 1e-5, name
    assert torch.equal(found.label_mask, expected.label_mask)
    assert torch.equal(found.is_top1, expected.is_top1)
    assert float((packed_gradient - gradient).norm() / gradient.norm()) < 1e-5


@pytest.mark.parametrize("trained", ["hidden", "hidden weight bias"])
@pytest.mark.parametrize("chunk", [1, 7 * 97, 2**23])
def test_the_own_heads_numbers_and_gradients_are_those_of_log_softmax_in_chunks_of_1_7_and_20_rows(
    monkeypatch: pytest.MonkeyPatch, chunk: int, trained: str
) -> None:
    monkeypatch.setattr(head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    parts = {"hidden": (20, 32), "weight": (97, 32), "bias": (97,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in parts.items()}
    for name in trained.split():
        tensors[name].requires_grad_()
    hidden, weight, bias = tensors.values()
    targets, by = torch.arange(0, 80, 4), torch.randn(20, generator=generator)
    found = head.label_log_probs(hidden, weight, bias, targets, ALL[1:])
    logits = hidden @ weight.T + bias
    every = logits.log_softmax(-1)
    expected = {
        "log_probs": every[torch.arange(20), targets],
        "entropy": -(every.exp() * every).sum(-1),
        "log_sum_sq_probs": (2 * every).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == targets,
    }
    for name, numbers in expected.items():
        assert torch.allclose(found[name].float(), numbers.float(), atol=1e-5), name
    inputs = [tensors[name] for name in trained.split()]
    for ours, plain in zip(
        torch.autograd.grad((found["log_probs"] * by).sum(), inputs),
        torch.autograd.grad((expected["log_probs"] * by).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, plain, atol=1e-4)


def test_on_smollm2_the_own_head_proves_equal_and_is_the_one_that_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.trainer.utils import add_fused_lm_head

    scored: list[int] = []
    scores = head.label_log_probs
    monkeypatch.setattr(
        head, "label_log_probs", lambda hidden, *rest: scored.append(len(hidden)) or scores(hidden, *rest)
    )
    model, inputs = load_policy(ModelConfig(), None), batch()
    add_fused_lm_head(model, outputs=ALL)
    assert forward.enable(model, own_head=True) == ""
    scored.clear()
    model(**inputs, fused_lm_head=True)
    assert scored == [int((inputs["labels"][:, 1:] != -100).sum())]


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_the_own_heads_numbers_over_49152_words_are_exact_to_2e_5(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((49152, 64), generator=generator) * 0.3
    hidden, targets = torch.randn((9, 64), generator=generator), torch.arange(9)
    bias = torch.full((49152,), shift)
    found = head.label_log_probs(hidden, weight, bias, targets, ("entropy", "log_sum_sq_probs"))
    every = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected = {
        "log_probs": every[torch.arange(9), targets],
        "entropy": -(every.exp() * every).sum(-1),
        "log_sum_sq_probs": (2 * every).logsumexp(-1),
    }
    assert {name: float((found[name] - exact).abs().max()) < 2e-5 for name, exact in expected.items()} == dict.fromkeys(
        expected, True
    )


def test_the_own_head_of_no_label_at_all_says_nothing() -> None:
    found = head.label_log_probs(
        torch.zeros(0, 32), torch.zeros(97, 32), None, torch.zeros(0, dtype=torch.long), ALL[1:]
    )
    assert {name: numbers.shape for name, numbers in found.items()} == dict.fromkeys(ALL, (0,))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_where_trls_head_misses_what_a_model_does_before_its_logits_its_losses_are_of_the_logits(scale: float) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, inputs = make(FAMILIES["llama"]), batch()
    # as a width's multiplier, of whose name TRL has not heard
    model.lm_head.register_forward_pre_hook(lambda module, args: (scale * args[0],))
    expected = make_log_probs(model, inputs)
    add_fused_lm_head(model, temperature=0.7, outputs=ALL)
    said = proof.settle_head(model, 0.7, ALL)
    assert said.startswith("TRL's fused head is off by") if scale != 1 else said == ""
    for packed_too in (False, True):
        if packed_too:
            assert forward.enable(model) == ""
        with torch.no_grad():
            found = model(**inputs, fused_lm_head=True, use_cache=False)
        wanted = inputs["labels"][:, 1:] != -100
        assert float((found.log_probs - expected)[wanted].abs().max()) < 1e-4
        assert not found.log_probs[~wanted].any()
        assert abs(float(found.loss + expected[wanted].mean())) < 1e-4


def make_log_probs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(b, t - 1), of each next token, at the temperature 0.7."""
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return (logits / 0.7).log_softmax(-1)[:, :-1].gather(2, inputs["input_ids"][:, 1:, None])[..., 0]


def test_a_head_with_a_temperature_keeps_its_own_numbers() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model, inputs = make(FAMILIES["llama"]), batch()
    add_fused_lm_head(model, temperature=0.7, outputs=ALL)
    expected = model(**inputs, fused_lm_head=True)
    assert forward.enable(model, own_head=True) == ""
    found = model(**inputs, fused_lm_head=True)
    assert float((found.log_probs - expected.log_probs).detach().abs().max()) < 1e-5


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
        assert forward.enable(model) == ""
        unique = 8 + 12 + 16 + 20 + 4 * (10 + 1)  # each prompt once
        assert self.flop(lambda: model(**inputs, fused_lm_head=True)) == unique * a_token + 8 * supervised * a_label

    def test_a_label_costs_two_products_with_the_head_in_a_step(self) -> None:
        from trl.trainer.utils import add_fused_lm_head

        model, inputs = make(FAMILIES["llama"]), batch()
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)  # the gradient goes through the head, and no further
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        assert forward.enable(model, own_head=True) == ""
        unique = 12 + 18 + 13 + 6 + 3  # of the five rows
        labels = int((inputs["labels"][:, 1:] != -100).sum())
        found = self.flop(lambda: model(**inputs, fused_lm_head=True).loss.backward())
        assert found == unique * self.per_token(model) + labels * 2 * 2 * 32 * 97

    def test_a_reward_costs_the_unique_tokens_in_the_layers_and_32_multiplications_a_slot_in_the_head(self) -> None:
        config = copy.deepcopy(FAMILIES["llama"])
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        inputs = padded(pairs_of_rows())
        slots, a_token = inputs["input_ids"].numel(), self.per_token(model)
        assert self.flop(lambda: model(**inputs)) == slots * (a_token + 2 * 32)
        assert forward.enable(model) == ""
        assert self.flop(lambda: model(**inputs)) == (8 + 12 + 16 + 20 + 44) * a_token + slots * 2 * 32


@both
def test_a_routers_loss_over_packed_rows_is_that_over_padded_ones() -> None:
    from transformers import Qwen3MoeConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
    model = make(Qwen3MoeConfig(**SHAPE, **experts, output_router_logits=True)).train()
    inputs = batch()
    expected = model(**inputs, use_cache=False)
    assert forward.enable(model) == ""
    seen = layer_tokens(model)
    found = model(**inputs, use_cache=False)
    assert seen == [52]
    assert float((found.aux_loss - expected.aux_loss).detach().abs()) < 1e-6
    assert float((found.loss - expected.loss).detach().abs()) < 1e-5


def top_left(query: Any, key: Any, value: Any, queries: Any, keys: Any, *longest: int, **kwargs: Any) -> Any:
    """A kernel whose diagonal begins at the first key: queries behind a shared beginning see too little."""
    pairs = zip(query.split(queries.diff().tolist()), varlen.zip_split(key, value, keys), strict=True)
    alone = [(own, *(states[: len(own)] for states in seen)) for own, seen in pairs]
    lengths = [torch.tensor([0, len(own)], dtype=torch.int32) for own, *_ in alone]
    each = zip(alone, lengths, strict=True)
    return torch.cat([varlen.reference(*one, own, own, len(one[0]), len(one[0]), **kwargs) for one, own in each])


def forgetful(*given: Any, **kwargs: Any) -> Any:
    """A kernel that sees 40 keys back at most."""
    return varlen.reference(*given, **{**kwargs, "window_size": (40, 0)})


def one_way(query: Any, key: Any, *given: Any, **kwargs: Any) -> Any:
    """A kernel that lets no gradient through to the queries and keys."""
    return varlen.reference(query.detach(), key.detach(), *given, **kwargs)


def out_of_order(*given: Any, **kwargs: Any) -> Any:
    raise RuntimeError("no kernel image is available")


class TestVarlen:
    """The path that CUDA takes, with a stand-in for its kernel; the kernel itself where there is one."""

    def test_the_stand_in_takes_the_arguments_that_torchs_kernel_takes(self) -> None:
        assert varlen.same_arguments()

    def test_one_call_a_layer_is_told_the_lengths_of_queries_and_of_the_keys_each_segment_sees(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[Any] = []

        def noting(*given: Any, **kwargs: Any) -> Any:
            told.append((*(part.tolist() for part in given[3:5]), *given[5:], kwargs))
            return varlen.reference(*given, **kwargs)

        attend_by(monkeypatch, noting)
        model = make(WINDOWED["the second layer"])
        assert forward.enable(model) == ""
        told.clear()
        log_probs(model, batch())
        # 12 shared tokens, what three rows have behind them, and two equal rows of 3
        queries, keys = told[0][0], told[0][1]
        lengths = zip(*(torch.tensor(ends).diff().tolist() for ends in (queries, keys)), strict=True)
        assert sorted(lengths) == [(3, 3), (6, 18), (12, 12), (13, 25), (18, 30)]
        longest = (18, 30)
        plain, windowed = ({"scale": 8**-0.5, "window_size": size, "enable_gqa": True} for size in ((-1, 0), (25, 0)))
        assert told == [(queries, keys, *longest, plain), (queries, keys, *longest, windowed)]

    def test_rows_that_share_nothing_hand_over_their_keys_as_they_are(self) -> None:
        inputs = batch(shared=0)
        plan = layout.make_plan(inputs["input_ids"][:4], inputs["attention_mask"][:4], share=True)
        told = attention.make_varlen(plan.segments, varlen.reference, torch.device("cpu"))
        assert told.seen is None
        assert told.queries.tolist() == told.keys.tolist()

    def test_under_autocast_the_kernel_gets_bfloat16_though_rotated_queries_are_float32(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        types: set[Any] = set()

        def noting(*given: Any, **kwargs: Any) -> Any:
            types.update(part.dtype for part in given[:3])
            return varlen.reference(*given, **kwargs)

        attend_by(monkeypatch, noting)
        model, inputs = make(FAMILIES["qwen3"]), batch()
        with torch.autocast("cpu", torch.bfloat16):
            expected = log_probs(model, inputs)
        assert forward.enable(model) == ""
        types.clear()
        with torch.autocast("cpu", torch.bfloat16):
            found = log_probs(model, inputs)
        assert types == {torch.bfloat16}
        assert proof._difference([found], [expected], exact=False) < proof.ROUGH_TOLERANCE / 5

    def test_attention_dropout_is_left_to_sdpa(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[int] = []

        def noting(*given: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return varlen.reference(*given, **kwargs)

        attend_by(monkeypatch, noting)
        config = copy.deepcopy(FAMILIES["llama"])
        config.attention_dropout = 0.5
        model = make(config)
        assert forward.enable(model) == ""
        calls.clear()
        first, other = (loss_and_gradient(model.train(), batch())[0] for _ in range(2))
        assert first != other
        assert calls == []
        log_probs(model.eval(), batch())
        assert len(calls) == 2

    @pytest.mark.parametrize(
        ("attends", "dtype", "reason"),
        [
            (top_left, torch.float32, "log-probabilities differ by"),
            (top_left, torch.bfloat16, "log-probabilities differ by"),
            (forgetful, torch.float32, "log-probabilities differ by"),
            (one_way, torch.float32, "gradients of packed and padded rows differ by"),
            (one_way, torch.bfloat16, "gradients of packed and padded rows differ by"),
            (out_of_order, torch.bfloat16, "does not take a packed row (RuntimeError)"),
        ],
    )
    def test_a_broken_kernel_is_noticed_at_the_start_and_batches_stay_padded(
        self, attends: Any, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attend_by(monkeypatch, attends)
        model, inputs = make(FAMILIES["llama"]).to(dtype), batch()
        generator = torch.Generator().manual_seed(3)
        rows = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in (120, 90)]
        if attends is not forgetful:  # that one is right on rows of up to 40 tokens
            assert reason in forward.enable(make(FAMILIES["llama"]).to(dtype))
        expected = log_probs(model, inputs)
        assert reason in forward.enable(model, rows)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(log_probs(model, inputs), expected)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_right_kernel_is_trusted_in_bfloat16(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        attend_by(monkeypatch, varlen.reference)
        rows = batch()["input_ids"].tolist()[:3]
        assert forward.enable(make(FAMILIES[family]).to(torch.bfloat16), rows) == ""

    def test_a_run_tries_the_kernel_on_its_own_first_rows_and_says_why_it_stays_padded(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        attend_by(monkeypatch, forgetful)
        prepare("lora_sft", home)
        assert "note: padded batches: packed and padded log-probabilities differ by" in capsys.readouterr().err
        attend_by(monkeypatch, varlen.reference)
        prepare("lora_sft", home)
        assert "padded" not in capsys.readouterr().err

    def test_a_call_in_a_type_that_the_kernel_lacks_stays_padded_and_a_line_says_so_once(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        attend_by(monkeypatch, varlen.reference)
        model, inputs = make(FAMILIES["llama"]), batch()
        assert forward.enable(model) == ""
        seen = layer_tokens(model)
        log_probs(model, inputs)
        monkeypatch.setattr(attention, "refusal", lambda device, dtype, config: f"no kernel for {dtype}")
        for _ in range(2):
            log_probs(model, inputs)
        assert seen == [52, 150, 150]
        assert caplog.messages == ["padded batches: no kernel for torch.float32"]

    @pytest.mark.parametrize(
        ("device", "dtype", "head_dim", "reason"),
        [
            ("cpu", torch.float32, 6, ""),
            ("mps", torch.bfloat16, 64, "the packed forward is not proven on mps yet"),
            ("cuda", torch.bfloat16, 64, ""),
            ("cuda", torch.float16, 256, ""),
            ("cuda", torch.float32, 64, "varlen attention does not compute in float32"),
            ("cuda", torch.bfloat16, 60, "varlen attention takes heads of 8, 16, … 256 numbers, not 60"),
            ("cuda", torch.bfloat16, 264, "varlen attention takes heads of 8, 16, … 256 numbers, not 264"),
        ],
    )
    def test_what_the_kernel_cannot_do_is_known_before_it_is_called(
        self, device: str, dtype: torch.dtype, head_dim: int, reason: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(attention, "computes_in_bfloat16", lambda: True)
        config = LlamaConfig(**{**SHAPE, "head_dim": head_dim})
        assert attention.refusal(torch.device(device), dtype, config) == reason

    def test_an_old_gpu_and_a_torch_without_varlen_attention_have_no_such_candidate(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cuda, given = torch.device("cuda"), (torch.bfloat16, FAMILIES["llama"])
        monkeypatch.setattr(attention, "computes_in_bfloat16", lambda: False)
        assert attention.refusal(cuda, *given) == "varlen attention needs a GPU with bfloat16 units"
        monkeypatch.setattr(attention, "computes_in_bfloat16", lambda: True)
        monkeypatch.setattr(attention, "_installed_flash", lambda device: [])
        assert [one.kind for one in attention.candidates(cuda, *given)] == ["varlen", "segments", "flex"]
        monkeypatch.setattr(attention, "varlen_kernel", lambda device: None)
        assert "has no varlen attention: torch 2.10 has it" in attention.refusal(cuda, *given)
        assert [one.kind for one in attention.candidates(cuda, *given)] == ["segments", "flex"]
        assert attention.candidates(torch.device("mps"), *given) == []

    @pytest.mark.parametrize("torchs", varlen.SIGNATURES)
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
    def test_the_kernel_of_each_torch_from_2_10_on_is_called_by_what_it_takes(
        self, torchs: str, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attend_by(monkeypatch, varlen.SIGNATURES[torchs])
        assert_equal_training(make(FAMILIES[family]).train(), batch())

    @pytest.mark.parametrize("torchs", varlen.SIGNATURES)
    def test_a_window_and_a_scale_are_kept_to_whatever_the_kernel_of_a_torch_takes(
        self, torchs: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attend_by(monkeypatch, varlen.SIGNATURES[torchs])
        assert_equal_training(make(WINDOWED["the second layer"]).train(), batch())
        scaled = GemmaConfig(**SHAPE)
        model = make(scaled)
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
        assert_equal_training(model.train(), batch())

    def test_torchs_own_kernel_takes_the_call_forward_and_backward_by_its_shapes(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.nn.attention.varlen import varlen_attn

        inputs = batch()
        plan = layout.make_plan(inputs["input_ids"], inputs["attention_mask"], share=True)
        told = attention.make_varlen(plan.segments, varlen_attn, torch.device("cpu"))
        assert told.seen is not None
        with FakeTensorMode(allow_non_fake_inputs=True):
            states = [torch.empty(1, heads, 52, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)]
            output, _ = forward.attend(None, *states, None, packed=replace(plan, varlen=told), sliding_window=26)
            assert output.shape == (1, 52, 4, 8)
            output.sum().backward()
            assert [part.grad.shape for part in states] == [part.shape for part in states]

    def choose(
        self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], attends: Any = varlen.reference
    ) -> tuple[str, Any]:
        """What packed.enable says of three candidates that take so long, and how it then packs."""
        from torch.nn.attention.flex_attention import create_mask
        from torch.nn.functional import scaled_dot_product_attention

        def dense(query: Any, key: Any, value: Any, block_mask: Any, scale: Any, enable_gqa: bool) -> Any:
            """Flex attention's mask, seen by SDPA: on a CPU flex attention has no backward pass."""
            sees = create_mask(block_mask.mask_mod, None, None, query.shape[2], key.shape[2], device="cpu")
            return scaled_dot_product_attention(query, key, value, sees, scale=scale, enable_gqa=enable_gqa)

        monkeypatch.setattr(segments, "_flex_eager", lambda: dense)
        attend_by(monkeypatch, attends)
        used: list[str] = []
        found = [
            attention.Candidate(kind, kind, lambda kind=kind: used.append(kind))  # type: ignore[misc]  # bound here
            for kind in ("varlen", "segments", "flex")
        ]
        monkeypatch.setattr(attention, "candidates", lambda *given: found)

        def clock(step: Any) -> float:
            step()
            return seconds[used[-1]]

        monkeypatch.setattr(attention, "clock_of", lambda device: clock)
        model = make(FAMILIES["llama"]).train()
        padded_loss, gradient = loss_and_gradient(model, batch())
        said = forward.enable(model, batch()["input_ids"].tolist()[:3])
        loss, found_gradient = loss_and_gradient(model, batch())
        assert abs(loss - padded_loss) < 1e-5
        assert float((found_gradient - gradient).norm() / gradient.norm()) < 1e-4
        return said, forward.packing_of(model)

    @pytest.mark.parametrize("fastest", ["varlen", "segments", "flex"])
    def test_of_right_candidates_the_fastest_attends_and_is_named(
        self, fastest: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seconds = {"varlen": 0.003, "segments": 0.003, "flex": 0.003, fastest: 0.001}
        said, way = self.choose(monkeypatch, seconds)
        assert (said, way.attends.kind) == ("", fastest)
        line = way.chosen
        assert line.startswith(f"packed rows: {fastest} attends (in one layer, forward and backward: {fastest} 1.00 ms")

    @pytest.mark.parametrize("wrong", [top_left, one_way])
    def test_a_wrong_one_is_refused_though_it_is_the_fastest_and_the_next_one_attends(
        self, wrong: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        seconds = {"varlen": 0.001, "segments": 0.002, "flex": 0.003}
        said, way = self.choose(monkeypatch, seconds, wrong)
        assert (said, way.attends.kind) == ("", "segments")
        assert any("packed rows: not by varlen" in line and "differ by" in line for line in caplog.messages)

    def test_one_that_fails_when_it_is_timed_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seconds = {"varlen": 0.001, "segments": 0.003, "flex": 0.002}
        said, way = self.choose(monkeypatch, seconds, out_of_order)
        assert (said, way.attends.kind) == ("", "flex")

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's varlen kernel needs a GPU: pytest -m gpu")
    @pytest.mark.parametrize("window", [None, 26])
    def test_on_a_gpu_torchs_own_kernel_gives_the_stand_ins_numbers_and_gradients(self, window: int | None) -> None:
        cuda, inputs = torch.device("cuda"), batch()
        plan = layout.make_plan(inputs["input_ids"], inputs["attention_mask"], share=True)
        real = attention.varlen_kernel(cuda)
        assert real is not None
        generator = torch.Generator().manual_seed(4)
        drawn = [torch.randn(1, heads, 52, 64, generator=generator).bfloat16() for heads in (4, 2, 2)]
        found: list[list[torch.Tensor]] = []
        for device, attends in ((torch.device("cpu"), varlen.reference), (cuda, real)):
            states = [part.to(device).detach().requires_grad_() for part in drawn]  # each a leaf of its own
            told = attention.make_varlen(plan.segments, attends, device)
            given = {"packed": replace(plan.to(device), varlen=told), "sliding_window": window}
            output, _ = forward.attend(None, *states, None, **given)
            output.float().square().sum().backward()
            found.append([part.detach().float().cpu() for part in (output, *(state.grad for state in states))])
        for one, two in zip(*found, strict=True):
            assert float((one - two).norm() / two.norm()) < 0.02
