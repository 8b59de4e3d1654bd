"""models/classifier.py: on every backbone a score is read at the last real token, by code that a card can show."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BlenderbotConfig,
    BltConfig,
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    PaliGemmaConfig,
    T5Config,
    TrOCRConfig,
)

from finetune_kit.errors import SettingsError
from finetune_kit.models.classifier import AUTO_CLASS, definition, loading
from finetune_kit.models.reward import load_reward_model, load_scorer, score_batch, score_rows
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.packing import forward
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.models.architectures import auto_class, tiny_config
from tests.models.small import write_model

ROWS = [[40, 41, 42, 3], [50, 3], [60, 61, 62, 63, 64, 65, 66, 67, 68, 3], [60, 61, 62, 63, 64, 65, 66, 67, 69, 3]]
# without a class in transformers: convolutions, state spaces with and without attention, experts, a vision tower whose
# language model is renamed on its way to a file
KINDS = ("lfm2", "mamba", "bamba", "gemma4_text", "llama4_text", "qwen2_vl")
# what reads the padding behind a row, so that the row's own score depends on it: not the head's doing
READS_PADDING = {"cpmant"}


def scorer(folder: Path) -> Any:
    config = ModelConfig(name_or_path=str(folder))
    tokenizer = load_tokenizer(config)
    return load_scorer(config, tokenizer, [tokenizer.eos_token_id])


def left(model: Any, rows: list[list[int]]) -> list[float]:
    """The rows' scores, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.no_grad():
        found: list[float] = model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return found


def check_scores(model_type: str, tmp_path: Path, tiny_model: Path) -> Any:
    """Scores alone are those in company, packed where it may pack; saved ones are read by the shown code alone."""
    base = write_model(model_type, tmp_path / "base", tiny_model)
    model = scorer(base)
    alone = [score_batch(model, [row])[0] for row in ROWS]
    assert score_rows(model, ROWS) == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 5) for score in alone}) == len(ROWS)
    # the backbone is the causal language model's
    causal = auto_class(model_type).from_pretrained(base).state_dict()
    shared = {name: tensor for name, tensor in model.base_model.state_dict().items() if "rotary" not in name}
    prefix = model.base_model_prefix
    assert all(torch.equal(causal[f"{prefix}.{name}"], tensor) for name, tensor in shared.items())
    name, code = loading(model.config)
    model.save_pretrained(tmp_path / "saved")
    shown: dict[str, Any] = {}
    exec(code or f"from transformers import {AUTO_CLASS}", shown)
    again, report = shown[name].from_pretrained(tmp_path / "saved", num_labels=1, output_loading_info=True)
    assert not report["missing_keys"]
    again.config.get_text_config().pad_token_id = 0
    assert [score_batch(again, [row])[0] for row in ROWS] == pytest.approx(alone, abs=1e-6)
    if not forward.enable(model):
        assert score_batch(model, ROWS) == pytest.approx(alone, abs=1e-5)
    return model


@pytest.mark.parametrize("model_type", KINDS)
def test_a_row_scores_alone_what_it_scores_in_company_padded_on_either_side_packed_and_after_saving(
    model_type: str, tmp_path: Path, tiny_model: Path
) -> None:
    model = check_scores(model_type, tmp_path, tiny_model)
    assert loading(model.config)[0] == type(model).__name__
    assert left(model, ROWS) == pytest.approx(score_rows(model, ROWS), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING))
def test_so_it_does_on_every_causal_architecture_or_is_refused_with_the_reason(
    model_type: str, tmp_path: Path, tiny_model: Path
) -> None:
    try:
        write_model(model_type, tmp_path / "small", tiny_model)
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")(torch.tensor(ROWS[:1]), use_cache=False)
    except Exception as error:  # whatever its config refuses about small shapes
        pytest.skip(f"no small model of it can be made: {type(error).__name__}")
    said = ""
    try:
        scorer(tmp_path / "small")
    except SettingsError as error:
        said = error.message
    if said:
        assert re.search("no score can be put on it|a head of another kind than one layer `score`", said)
        return
    if model_type not in READS_PADDING:
        check_scores(model_type, tmp_path, tiny_model)


def test_transformers_own_class_is_taken_where_there_is_one_and_its_code_is_not_shown() -> None:
    for model_type in ("llama", "qwen3", "gpt2", "mixtral", "qwen3_5", "gpt_oss"):
        assert loading(tiny_config(model_type)) == (AUTO_CLASS, "")
    assert definition(tiny_config("llama")) == ""


def test_every_architecture_without_one_gets_a_class_of_its_own_or_a_reason() -> None:
    made, refused = set(), set()
    for model_type in {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}:
        try:
            config = AutoConfig.for_model(model_type)
        except Exception:  # one that cannot be without settings
            continue
        try:
            name, code = loading(config)
        except SettingsError:
            refused.add(model_type)
            continue
        if code:
            compile(code, name, "exec")
            made.add(name)
    assert len(made) > 60
    assert len(refused) < 50
    assert {"Gemma4TextForSequenceClassification", "Lfm2ForSequenceClassification"} <= made


def test_what_no_score_can_be_put_on_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="trocr has no backbone of its own in transformers: no score can be put"):
        loading(TrOCRConfig())
    with pytest.raises(SettingsError, match="blenderbot is an encoder-decoder: no score can be put"):
        loading(BlenderbotConfig(is_encoder_decoder=False))  # as its decoder alone is saved
    with pytest.raises(SettingsError, match="bert: transformers' BertForSequenceClassification has a head of another"):
        loading(BertConfig())
    with pytest.raises(SettingsError, match="blt is not one stack of layers: no score can be put on it"):
        loading(BltConfig())
    with pytest.raises(SettingsError, match="musicgen is an encoder-decoder: no score can be put"):
        loading(MusicgenConfig(text_encoder=T5Config(), audio_encoder=EncodecConfig(), decoder=MusicgenDecoderConfig()))
    with pytest.raises(SettingsError, match="paligemma reads a prompt from both sides, by token types: no score"):
        loading(PaliGemmaConfig())


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_an_adapter_with_its_head_learns_on_a_class_of_our_own(
    load_in_4bit: bool, tmp_path: Path, tiny_model: Path
) -> None:
    base = ModelConfig(name_or_path=str(write_model("lfm2", tmp_path / "base", tiny_model)), load_in_4bit=load_in_4bit)
    tokenizer = load_tokenizer(base)
    model = load_reward_model(base, LoraConfig(r=4), tokenizer, [tokenizer.eos_token_id])
    model(input_ids=torch.tensor([ROWS[0]])).logits.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum("score.modules_to_save" in name for name in trained) == 1
    assert all(p.grad is not None and p.dtype == torch.float32 for p in trained.values())
