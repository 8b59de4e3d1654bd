"""models/reward.py: one float32 number a sequence, read at its end token, the same after saving and loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from finetune_kit.errors import SettingsError
from finetune_kit.models.load import load_adapted, load_base, load_policy
from finetune_kit.models.provenance import BASE_RECORD, base_record
from finetune_kit.models.reward import choose_pad_token, load_reward_model, load_saved, score_batch, score_rows
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.models import score_beside, shares_base
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.models.small import write_model

ROWS = [[40, 41, 42, 3], [50, 3], [60, 61, 62, 63, 64, 65, 3], [70, 71, 3], [80, 3]]  # 3: <|im_end|>


def rewards(folder: Path, lora: LoraConfig | None = None, seed: int = 0, **model: Any) -> Any:
    config = ModelConfig(name_or_path=str(folder), **model)
    tokenizer = load_tokenizer(config)
    return load_reward_model(config, lora, tokenizer, [tokenizer.eos_token_id], seed)


def again(base: Path, folder: Path, seed: int = 0, **model: Any) -> Any:
    config = ModelConfig(name_or_path=str(base), **model)
    tokenizer = load_tokenizer(config)
    return load_saved(config, folder, tokenizer, [tokenizer.eos_token_id], seed)


def moved(model: Any) -> Any:
    """The model with other values in all that is trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("lora", [LoraConfig(r=4), LoraConfig(r=0)], ids=["adapter", "full"])
def test_the_head_is_random_by_the_seed_alone_and_its_first_scores_are_within_1_of_0(
    tiny_model: Path, lora: LoraConfig
) -> None:
    one, same, other = (score_rows(rewards(tiny_model, lora, seed), ROWS) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert max(map(abs, one + other)) < 1
    assert len(set(one)) == len(ROWS)


def test_an_adapter_trains_its_own_matrices_and_the_head_in_float32_and_nothing_else(tiny_model: Path) -> None:
    model = rewards(tiny_model, LoraConfig(r=4), dtype="bfloat16")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score.modules_to_save" in name for name in trained)
    assert sum("score" in name for name in trained) == 1
    assert not any("score" in name and "lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.tensor([ROWS[0]])).logits.dtype == torch.float32


def test_with_rank_0_every_weight_is_trained(tiny_model: Path) -> None:
    model = rewards(tiny_model, LoraConfig(r=0))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}], ids=["32", "16", "4 bit"])
def test_a_saved_adapter_gives_equal_scores_under_any_seed_and_the_start_without_it(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = rewards(tiny_model, LoraConfig(r=4), seed=5, **settings)
    start = score_rows(model, ROWS)
    moved(model).save_pretrained(tmp_path)
    loaded = again(tiny_model, tmp_path, seed=5, **settings)
    assert score_rows(loaded, ROWS) == pytest.approx(score_rows(model, ROWS), abs=1e-5)
    with loaded.disable_adapter():
        assert score_rows(loaded, ROWS) == pytest.approx(start, abs=1e-5)
    other = again(tiny_model, tmp_path, seed=6, **settings)
    assert score_rows(other, ROWS) == pytest.approx(score_rows(model, ROWS), abs=1e-5)


def test_a_saved_full_model_gives_equal_scores_under_any_seed(tiny_model: Path, tmp_path: Path) -> None:
    model = moved(rewards(tiny_model, LoraConfig(r=0)))
    model.save_pretrained(tmp_path)
    load_tokenizer(ModelConfig(name_or_path=str(tiny_model))).save_pretrained(tmp_path)
    assert score_rows(again(tiny_model, tmp_path, seed=9), ROWS) == pytest.approx(score_rows(model, ROWS), abs=1e-6)
    # a reward model to resume from keeps its head
    assert score_rows(rewards(tmp_path, LoraConfig(r=4), seed=9), ROWS) == pytest.approx(
        score_rows(model, ROWS), abs=1e-6
    )


def test_a_causal_adapter_to_start_from_puts_its_weights_under_the_head(tiny_model: Path, tmp_path: Path) -> None:
    base = ModelConfig(name_or_path=str(tiny_model))
    policy = moved(load_policy(base, LoraConfig(r=4, modules_to_save=["lm_head"])))
    policy.save_pretrained(tmp_path, save_embedding_layers=False)
    model = rewards(tiny_model, LoraConfig(init_from=str(tmp_path)))
    for name, weight in load_file(tmp_path / "adapter_model.safetensors").items():
        if "lm_head" not in name:
            own = model.get_parameter(name.replace(".weight", ".default.weight"))
            assert torch.equal(own, weight)
            assert own.requires_grad
    ids = torch.tensor([ROWS[2]])
    causal = load_adapted(base, tmp_path, load_base(base)).get_base_model().model(ids).last_hidden_state
    assert torch.allclose(model.get_base_model().model(ids).last_hidden_state, causal, atol=1e-6)


def test_a_causal_adapter_on_experts_starts_a_reward_model_that_judges_beside_a_policy_without_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_model("mixtral", tmp_path / "mixtral", tiny_model)
    base = ModelConfig(name_or_path=str(folder))
    moved(load_policy(base, LoraConfig(r=4))).save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    judge = rewards(folder, LoraConfig(init_from=str(tmp_path / "sft")))
    experts = {name for name, p in judge.named_parameters() if p.requires_grad and ".experts." in name}
    weights = load_file(tmp_path / "sft" / "adapter_model.safetensors")
    assert len(experts) == sum(".experts." in name for name in weights) > 0
    judge.save_pretrained(tmp_path / "judge")
    (tmp_path / "judge" / BASE_RECORD).write_text(json.dumps(base_record(base)))
    policy = load_policy(base, LoraConfig(r=4, target_modules=["q_proj"])).eval()
    assert shares_base(tmp_path / "judge", base, policy)
    assert score_beside(policy, tmp_path / "judge")(policy, ROWS) == pytest.approx(score_rows(judge, ROWS), abs=1e-5)


def test_a_reward_adapter_to_start_from_goes_on_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    first = moved(rewards(tiny_model, LoraConfig(r=4)))
    first.save_pretrained(tmp_path)
    second = rewards(tiny_model, LoraConfig(init_from=str(tmp_path)), seed=3)
    assert score_rows(second, ROWS) == pytest.approx(score_rows(first, ROWS), abs=1e-6)
    assert sum("score" in name for name, p in second.named_parameters() if p.requires_grad) == 1


def test_an_adapter_with_layers_that_the_model_lacks_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    load_policy(ModelConfig(name_or_path=str(tiny_model)), LoraConfig(r=4)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    moved_up = {name.replace("layers.1.", "layers.2."): weight for name, weight in weights.items()}
    save_file(moved_up, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SettingsError, match="14 of its weights have no place in this model, and 14 places no weight"):
        rewards(tiny_model, LoraConfig(init_from=str(tmp_path)))


def test_4_bit_layers_pass_a_gradient_to_the_adapter_and_the_head(tiny_model: Path) -> None:
    model = moved(rewards(tiny_model, LoraConfig(r=4), load_in_4bit=True))
    model(input_ids=torch.tensor([ROWS[0]])).logits.sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)


def test_scores_come_in_the_order_of_the_rows_and_do_not_depend_on_their_company(tiny_model: Path) -> None:
    model = rewards(tiny_model)
    alone = [score_batch(model, [row])[0] for row in ROWS]
    told: list[int] = []
    assert score_rows(model, ROWS, 2, told.append) == pytest.approx(alone, abs=1e-6)
    assert told == [0, 2, 4, 5]
    assert score_batch(model, ROWS[::-1]) == pytest.approx(alone[::-1], abs=1e-6)


def test_the_end_token_is_what_is_scored_where_the_tokenizer_pads_with_it(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(config)
    tokenizer.pad_token = tokenizer.eos_token
    model = load_reward_model(config, None, tokenizer, [3])
    assert tokenizer.pad_token_id == model.config.pad_token_id != 3
    hidden = model.model(torch.tensor([ROWS[0]])).last_hidden_state
    assert score_rows(model, [ROWS[0], ROWS[2]])[0] == pytest.approx(model.score(hidden)[0, 3, 0].item(), abs=1e-6)
    # as it would be otherwise: with and without the end token the same score
    model.config.pad_token_id = 3
    assert score_rows(model, [ROWS[0]]) == pytest.approx(score_rows(model, [ROWS[0][:-1]]), abs=1e-6)


def test_a_pad_token_is_found_where_all_special_tokens_end_answers(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))
    kept = tokenizer.pad_token_id
    choose_pad_token(tokenizer, [3])
    assert tokenizer.pad_token_id == kept
    every = sorted(tokenizer.all_special_ids)
    choose_pad_token(tokenizer, every)
    assert tokenizer.pad_token_id == max(every) + 1


def test_a_classifier_with_2_labels_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2).save_pretrained(tmp_path)
    load_tokenizer(ModelConfig(name_or_path=str(tiny_model))).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="is a classifier with 2 labels; a reward model has one"):
        rewards(tmp_path)


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(tiny_model: Path) -> None:
    config = ModelConfig(name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(config)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(SettingsError, match="has embeddings for 261 tokens, its tokenizer has 262"):
        load_reward_model(config, None, tokenizer, [3])
