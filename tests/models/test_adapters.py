"""An adapter goes where its settings say, or the settings are refused by name."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from finetune_kit.errors import SettingsError
from finetune_kit.models import adapters
from finetune_kit.models.adapters import attach, find_targets, is_adapter, load_adapter, restore
from finetune_kit.models.coverage import OUTSIDE, Matrix
from finetune_kit.models.lora_product import add_in_one_pass
from finetune_kit.settings.schema import LoraConfig

ALL = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), 2)
PROBE = torch.arange(5, 45).unsqueeze(0)


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(PROBE).logits
    return found


class TestProductInOnePass:
    """LoRA's product is PEFT's, and merges as PEFT's does."""

    @pytest.fixture
    def adapted(self, model: Any) -> Any:
        adapted = attach(model, LoraConfig(lora_dropout=0.3))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
        return adapted

    def test_all_14_layers_have_it_and_none_with_dora(self, model: Any, tiny_model: Path) -> None:
        adapted = attach(model, LoraConfig())
        assert sum(bool(getattr(module, "lora_variant", None)) for module in adapted.modules()) == 14
        assert add_in_one_pass(adapted) == 0
        other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        assert add_in_one_pass(attach(other, LoraConfig(use_dora=True))) == 0

    @pytest.mark.parametrize("training", [False, True])
    def test_logits_and_gradients_are_those_of_peft_to_1e_5(self, adapted: Any, training: bool) -> None:
        def look() -> list[torch.Tensor]:
            adapted.train(training).zero_grad()
            torch.manual_seed(0)  # of the dropout
            found = adapted(PROBE.view(4, 10)).logits
            found.logsumexp(-1).sum().backward()
            return [found.detach(), *(w.grad.clone() for w in adapted.parameters() if w.requires_grad)]

        ours = look()
        for module in adapted.modules():
            getattr(module, "lora_variant", {}).clear()
        peft = look()
        assert len(ours) == 29
        assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(ours, peft, strict=True))

    @pytest.mark.parametrize("safe", [False, True])
    def test_merged_it_gives_the_logits_of_the_adapter_and_unmerged_again_too(self, adapted: Any, safe: bool) -> None:
        expected = logits(adapted.eval())
        adapted.merge_adapter(safe_merge=safe)
        assert torch.allclose(logits(adapted), expected, atol=1e-5)
        adapted.unmerge_adapter()
        assert torch.allclose(logits(adapted), expected, atol=1e-5)
        assert torch.allclose(logits(adapted.merge_and_unload()), expected, atol=1e-5)


def kinds(model: Any, lora: LoraConfig) -> dict[str, int]:
    return dict(Counter(name.rsplit(".", 1)[-1] for name in find_targets(model, lora).matched))


class TestTargets:
    def test_all_linear_is_the_7_layers_of_each_of_2_blocks_and_not_the_head(self, model: Any) -> None:
        assert kinds(model, LoraConfig()) == ALL
        adapted = attach(model, LoraConfig())
        assert len(adapted.targeted_module_names) == 14
        assert not any("lm_head" in name for name in adapted.targeted_module_names)

    @pytest.mark.parametrize("wanted", ["q_proj", ["q_proj"]])
    def test_one_name_may_be_given_bare_or_as_a_list(self, model: Any, wanted: str | list[str]) -> None:
        lora = LoraConfig(target_modules=wanted)
        assert kinds(model, lora) == {"q_proj": 2}
        assert len(attach(model, lora).targeted_module_names) == 2

    def test_a_full_name_adapts_that_layer_alone(self, model: Any) -> None:
        name = "model.layers.1.mlp.down_proj"
        assert kinds(model, LoraConfig(target_modules=[name])) == {"down_proj": 1}
        assert attach(model, LoraConfig(target_modules=[name])).targeted_module_names == [name]

    def test_gpt2_keeps_its_layers_as_conv1d_and_they_are_found(self) -> None:
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
        assert kinds(gpt2, LoraConfig()) == {"c_attn": 2, "c_proj": 4, "c_fc": 2}

    @pytest.mark.parametrize(("given", "meant"), [("q_proj", "c_attn"), ("v_proj", "c_attn"), ("up_proj", "c_fc")])
    def test_of_a_fused_layer_the_parts_name_the_layer_that_holds_them(self, given: str, meant: str) -> None:
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
        with pytest.raises(SettingsError, match=f"'{given}' is not a linear layer") as caught:
            find_targets(gpt2, LoraConfig(target_modules=[given]))
        assert f"lora.target_modules=[{meant}]" in caught.value.fix

    def test_a_misspelt_name_among_right_ones_is_refused_with_the_near_ones(self, model: Any) -> None:
        with pytest.raises(SettingsError, match="'q_prj' is not a linear layer") as caught:
            find_targets(model, LoraConfig(target_modules=["v_proj", "q_prj"]))
        assert caught.value.fix.startswith("Did you mean q_proj")
        assert "down_proj (2)" in caught.value.fix

    @pytest.mark.parametrize("name", ["self_attn", "embed_tokens", "model", "Linear"])
    def test_a_module_that_is_no_linear_layer_is_refused_with_the_linear_ones(self, model: Any, name: str) -> None:
        with pytest.raises(SettingsError, match=f"'{name}' is not a linear layer") as caught:
            find_targets(model, LoraConfig(target_modules=[name]))
        assert "q_proj (2)" in caught.value.fix

    def test_an_adapter_on_the_head_is_refused_and_the_way_to_train_it_named(self, model: Any) -> None:
        with pytest.raises(SettingsError, match="lm_head") as caught:
            find_targets(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
        assert "lora.modules_to_save=[lm_head]" in caught.value.fix

    @pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
    def test_a_misspelt_module_to_save_is_refused_whatever_the_targets(self, model: Any, targets: Any) -> None:
        with pytest.raises(SettingsError, match="'lm_haed' is not a module") as caught:
            find_targets(model, LoraConfig(target_modules=targets, modules_to_save=["lm_haed"]))
        assert "lm_head" in caught.value.fix

    def test_a_model_of_which_no_layer_can_be_adapted_is_refused_with_the_most_frequent_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        every = [
            *(Matrix(f"layers.{at}.q", "q", 4, False, "PEFT would lose it") for at in range(3)),
            Matrix("router", "router", 4, False, "a router"),
            *(Matrix(f"tower.{at}", "fc", 4, False, OUTSIDE) for at in range(9)),
        ]
        monkeypatch.setattr(adapters, "matrices", lambda model: every)
        with pytest.raises(SettingsError, match="no layer of this model can be adapted: PEFT would lose it") as caught:
            find_targets(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)), LoraConfig())
        assert "lora.r=0" in str(caught.value.fix)


class TestAttach:
    @pytest.mark.parametrize(
        "changes", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}]
    )
    def test_a_fresh_adapter_changes_nothing_yet(self, model: Any, changes: dict[str, Any]) -> None:
        before = logits(model)
        assert (logits(attach(model, LoraConfig(**changes)).eval()) - before).abs().max() <= 1e-5

    def test_only_the_adapter_is_trained_and_in_float32_over_a_bfloat16_base(self, tiny_model: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
        trained = {name: p for name, p in attach(base, LoraConfig()).named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert all("lora_" in name for name in trained)
        assert len(trained) == 28

    def test_rank_16_on_a_64_by_64_layer_has_2048_parameters(self, model: Any) -> None:
        adapted = attach(model, LoraConfig(target_modules=["model.layers.0.self_attn.q_proj"]))
        assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == 16 * (64 + 64)

    def test_a_head_to_save_is_trained_beside_its_tied_embedding_which_stays(self, model: Any) -> None:
        adapted = attach(model, LoraConfig(modules_to_save=["lm_head"]))
        head = [name for name, p in adapted.named_parameters() if p.requires_grad and "lm_head" in name]
        assert len(head) == 1
        assert not adapted.get_input_embeddings().weight.requires_grad


class TestSavedWeights:
    @pytest.mark.parametrize(
        "changes", [{}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}]
    )
    def test_a_checkpoint_is_restored_bit_by_bit(self, model: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
        adapted = attach(model, LoraConfig(**changes))
        scramble(adapted, seed=1)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        expected = logits(adapted.eval())
        scramble(adapted, seed=2)
        assert (logits(adapted) - expected).abs().max() > 1e-2
        restore(adapted, tmp_path)
        assert torch.equal(logits(adapted), expected)

    def test_a_full_checkpoint_in_several_files_is_restored_ties_and_all(self, model: Any, tmp_path: Path) -> None:
        scramble(model, seed=1)
        expected = logits(model)
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        scramble(model, seed=2)
        restore(model, tmp_path)
        assert torch.equal(logits(model), expected)

    def test_a_loaded_adapter_is_frozen_and_can_be_switched_off(
        self, model: Any, tiny_model: Path, tmp_path: Path
    ) -> None:
        base = logits(model)
        adapted = attach(model, LoraConfig())
        scramble(adapted, seed=1)
        adapted.save_pretrained(tmp_path, save_embedding_layers=False)
        fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        loaded = load_adapter(fresh, str(tmp_path)).eval()
        assert is_adapter(loaded)
        assert not any(p.requires_grad for p in loaded.parameters())
        assert (logits(loaded) - logits(adapted.eval())).abs().max() <= 1e-6
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), base)


def scramble(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1)
