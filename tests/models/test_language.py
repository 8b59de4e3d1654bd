"""Checkpoints that read pictures or sound, too: what loads them, what is trained of them, and what is left alone."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from finetune_kit.data.template import dialect_of
from finetune_kit.errors import FinetuneKitError, SettingsError
from finetune_kit.models import language
from finetune_kit.models.adapters import attach, covered
from finetune_kit.models.completion_rows import make_rows, states
from finetune_kit.models.load import load_base, load_policy
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning.preflight import check_start
from finetune_kit.runs.merge import merge
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_training import settings, train
from tests.models.architectures import auto_class, tiny_config, write_small
from tests.models.multimodal import tiny_multimodal, write_multimodal

IMAGE_TEXT, MULTIMODAL = language.MULTIMODAL
# kind: the auto class, the parts beside the language model
KINDS = {
    "mistral3": (IMAGE_TEXT, {"model.vision_tower", "model.multi_modal_projector"}),
    "qwen2_5_vl": (IMAGE_TEXT, {"model.visual"}),
    "qwen3_5": (IMAGE_TEXT, {"model.visual"}),
    "gemma3": (language.CAUSAL, {"model.vision_tower", "model.multi_modal_projector"}),
    "idefics3": (IMAGE_TEXT, {"model.vision_model", "model.connector"}),
    "llama4": (IMAGE_TEXT, {"vision_model", "multi_modal_projector"}),
    "voxtral": (MULTIMODAL, {"model.audio_tower", "model.multi_modal_projector"}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A folder with `tiny`, a Mistral 3 with a vision tower, and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("multimodal")
    write_multimodal("mistral3", folder / "tiny", shared_home / "tiny")
    shutil.copy(shared_home / "rows.jsonl", folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_text_gives_a_gradient_to_all_that_is_trained_and_an_adapter_covers_nothing_else(kind: str) -> None:
    model = tiny_multimodal(kind)
    language.freeze_beside(model)
    language.settle_text(model)
    assert language.class_of(model) == KINDS[kind][0]
    beside = language.left_alone(model)
    assert set(beside) == KINDS[kind][1]
    assert all(count > 0 for count in beside.values())
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved - trained == set()
    assert all("router" in name for name in trained - moved)  # of experts that no token chose
    assert sum(p.numel() for n, p in model.named_parameters() if n not in trained) == sum(beside.values())
    adapted = attach(model, LoraConfig(r=2))
    assert language.left_alone(adapted) == beside
    inside = [name for name in adapted.targeted_module_names if name.startswith(tuple(beside))]
    assert inside == []
    assert any("outside the language model's layers" in line for line in covered(adapted).in_words())


def test_a_short_name_means_the_language_models_layers_and_a_whole_one_what_it_names() -> None:
    adapted = attach(tiny_multimodal("mistral3"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert len(adapted.targeted_module_names) == 4
    assert all(".language_model." in name for name in adapted.targeted_module_names)
    whole = "model.vision_tower.transformer.layers.0.attention.q_proj"
    assert attach(tiny_multimodal("mistral3"), LoraConfig(r=2, target_modules=[whole])).targeted_module_names == [whole]


@pytest.mark.parametrize(
    ("kind", "own", "said"),
    [
        ("t5", "T5ForConditionalGeneration", "is an encoder-decoder"),
        ("whisper", "WhisperForConditionalGeneration", "is an encoder-decoder"),
        ("vit", "ViTForImageClassification", "is a ViTForImageClassification, which labels what it reads"),
        ("shieldgemma2", "ShieldGemma2ForImageClassification", "is a ShieldGemma2ForImageClassification, which labels"),
        ("blt", "BltForCausalLM", "is a BltForCausalLM, whose config has no num_hidden_layers"),
        ("reformer", "ReformerModelWithLMHead", "which trains on rows of exactly 64 x 64 tokens alone"),
        ("llama", "LlamaForTokenClassification", "is a LlamaForTokenClassification, which labels what it reads"),
        ("clip", None, "is a clip, which writes no text"),
        ("bert", "BertForMaskedLM", "fills in hidden words"),
        ("blip-2", "Blip2ForConditionalGeneration", "needs pixel_values in each call"),
        ("bert", "BertLMHeadModel", "reads from both sides: in a BertLMHeadModel each token sees those behind it"),
        ("xlm-roberta", "XLMRobertaForCausalLM", "(is_decoder=false)"),
        ("roformer", "RoFormerForCausalLM", "(is_decoder=false)"),
        ("xlm", "XLMWithLMHeadModel", "(causal=false)"),
        ("xlnet", "XLNetLMHeadModel", "reads from both sides"),
        ("cpmant", "CpmAntForCausalLM", "reads from both sides: in a CpmAntForCausalLM"),
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "is a diffusion model (DiffusionGemmaForBlock"),
        ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3", "which holds a whole language model with its head"),
        ("kosmos-2", "Kosmos2ForConditionalGeneration", "specify either `pixel_values` or `image_embeds`"),
        (
            "qwen3_omni_moe_thinker",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            "cannot be run on text alone: 'Qwen3",
        ),
    ],
)
def test_what_is_no_language_model_is_refused_before_any_data_is_read(
    tmp_path: Path, tiny_model: Path, kind: str, own: str | None, said: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    config = CONFIG_MAPPING[kind]()
    config.architectures = own and [own]
    config.save_pretrained(tmp_path / "tiny")
    with pytest.raises(FinetuneKitError) as error:  # there are no rows
        check_start(settings("lora_sft", tmp_path))
    assert said in error.value.message
    assert "Get all of its files" not in str(error.value)


def test_what_takes_no_text_alone_is_refused_as_a_reward_model_too(tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    tiny_config("molmo2").save_pretrained(tmp_path / "tiny")
    with pytest.raises(SettingsError, match="takes no text alone: Molmo2ForSequenceClassification says"):
        check_start(settings("reward_model", tmp_path))


@pytest.mark.parametrize(
    ("kind", "own"), [("llada", "LLaDAModelLM"), ("Dream", "DreamModel"), ("sdar_moe", "SDARMoeForCausalLM")]
)
def test_a_diffusion_model_with_code_of_its_own_is_refused_by_its_name(kind: str, own: str) -> None:
    config = PretrainedConfig(architectures=[own], auto_map={"AutoModelForCausalLM": f"modeling.{own}"})
    config.model_type = kind
    with pytest.raises(SettingsError, match=rf"is a diffusion model \({own}\)"):
        language.auto_class(config, "it")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("blenderbot", "is an encoder-decoder: no score can be put on it"),
        ("bert", "has a head of another kind than one layer `score`"),
        ("llama4", "has no backbone of its own in transformers"),
        ("diffusion_gemma", "is a diffusion model: no score can be put on it"),
    ],
)
def test_what_no_score_can_be_put_on_is_refused_before_any_data_is_read(
    tmp_path: Path, tiny_model: Path, kind: str, said: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path / "tiny")
    with pytest.raises(SettingsError, match=said):  # there are no rows
        check_start(settings("reward_model", tmp_path))


def test_a_loaded_model_is_seen_to_read_ahead_whatever_makes_its_mask(tmp_path: Path) -> None:
    write_small("cpmant", tmp_path)  # it makes its own, of which no setting speaks
    with pytest.raises(SettingsError, match="in a CpmAntForCausalLM each token sees those behind it"):
        load_policy(ModelConfig(name_or_path=str(tmp_path)), LoraConfig(r=2))


@pytest.mark.parametrize(("kind", "switch", "ahead"), [("bert", "is_decoder", False), ("gemma", "is_causal", False)])
def test_one_that_can_read_either_way_is_taken_where_its_settings_say_left_to_right(
    kind: str, switch: str, ahead: bool
) -> None:
    config = tiny_config(kind)
    for value in (False, True):
        setattr(config, switch, value)
        loaded = auto_class(kind).from_config(copy.deepcopy(config))
        with torch.device("meta"):
            empty = auto_class(kind).from_config(copy.deepcopy(config))
        assert language.sees_ahead(loaded) == language.sees_ahead(empty) == (value == ahead)


def test_a_text_model_of_a_multimodal_architecture_stays_one() -> None:
    text = CONFIG_MAPPING["qwen3_5"]().get_text_config()
    assert language.auto_class(text, "it") == language.CAUSAL
    both = CONFIG_MAPPING["qwen3_5"]()
    assert language.auto_class(both, "it") == IMAGE_TEXT  # a config that names no class
    both.architectures = ["Qwen3_5ForCausalLM"]
    assert language.auto_class(both, "it") == language.CAUSAL


@pytest.fixture(scope="module")
def full(home: Path) -> Path:
    return train("full_sft", home, "evaluate.size=2", "evaluate.max_new_tokens=4").folder


@pytest.fixture(scope="module")
def adapter(home: Path) -> Path:
    return train("lora_sft", home, "learning_rate=1e-2").folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_model_trained_in_full_is_of_its_own_class_and_its_tower_is_bit_for_bit_what_it_was(
    home: Path, full: Path
) -> None:
    before, after = weights(home / "tiny"), weights(full)
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith(("vision_tower.", "multi_modal_projector."))}
    assert AutoConfig.from_pretrained(full).architectures == ["Mistral3ForConditionalGeneration"]
    assert (full / "preprocessor_config.json").read_bytes() == (home / "tiny/preprocessor_config.json").read_bytes()
    card = (full / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained(folder)" in card
    assert json.loads((full / "report.json").read_text())["reload_max_logit_difference"] < 1e-4


def test_an_adapter_is_merged_into_a_model_of_the_bases_own_class(home: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge(adapter, tmp_path / "merged").folder
    model = AutoModelForImageTextToText.from_pretrained(merged)
    assert type(model).__name__ == "Mistral3ForConditionalGeneration"
    assert (merged / "preprocessor_config.json").is_file()
    assert json.loads((adapter / "report.json").read_text())["reload_max_logit_difference"] < 1e-4
    before, after = weights(home / "tiny"), weights(merged)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("vision_tower.", "multi_modal_projector."))} <= same
    assert any("language_model" in name for name in before.keys() - same)


def test_the_log_says_which_parts_are_left_alone_and_how_many_parameters_they_have(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune_kit.models.load import load_policy
    from finetune_kit.models.source import log_once

    log_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        policy = load_policy(ModelConfig(name_or_path=str(home / "tiny")), trained_in_full=True)
    counted = sum(p.numel() for n, p in policy.named_parameters() if n.startswith("model.vision_tower."))
    assert f"left alone: model.vision_tower ({counted:,} parameters)" in caplog.text


def test_a_chat_template_that_lies_with_the_processor_is_the_tokenizers(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "tiny", tmp_path / "tiny")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(ModelConfig(name_or_path=str(folder))).chat_template is None
    template = "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{{ part['text'] }}{% endfor %}\n"
    template += "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
    assert tokenizer.chat_template == template
    assert dialect_of(tokenizer).parts


def test_a_package_that_an_architecture_needs_is_named(tmp_path: Path, tiny_model: Path, monkeypatch: Any) -> None:
    from transformers import LlamaForCausalLM

    def lacks(*given: Any, **named: Any) -> Any:
        raise ImportError("it requires the timm library but it was not found")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lacks)
    with pytest.raises(FinetuneKitError, match="needs a package that is not here: it requires the timm library"):
        load_base(ModelConfig(name_or_path=str(tiny_model)))


def test_the_row_of_the_pad_token_is_loaded_as_it_was_saved_also_where_transformers_fills_it_with_zeros(
    tmp_path: Path,
) -> None:
    model = auto_class("youtu").from_config(tiny_config("youtu"))
    model.config.pad_token_id = 0  # as TRL writes it there
    assert model.get_input_embeddings().weight[0].abs().max() > 0
    language.settle_saved(model)
    model.save_pretrained(tmp_path)
    loaded = auto_class("youtu").from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_the_backbone_that_trl_asks_gives_the_states_that_the_head_reads() -> None:
    torch.manual_seed(0)
    model = auto_class("kosmos-2.5").from_config(tiny_config("kosmos-2.5")).eval()
    language.settle_text(model)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        state = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(state), model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["llama", "prophetnet"])  # whose head reads a state for each of the next two tokens
def test_logits_in_front_of_each_completion_token_are_those_of_the_whole_row(kind: str) -> None:
    torch.manual_seed(0)
    model = auto_class(kind).from_config(tiny_config(kind)).eval()
    rows = make_rows([[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14]], 3, "cpu")
    with torch.no_grad():
        found, hidden = states(model, rows)
        whole = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False).logits
    assert (found.shape, hidden.shape) == ((5, 261), (5, 64))
    assert torch.allclose(found, whole.flatten(0, 1)[rows.before], atol=1e-5)
