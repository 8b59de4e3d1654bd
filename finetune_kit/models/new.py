"""A model from random weights: its shapes by one number, or those of another model, and how its weights begin.

Depth is the one knob. A model of d layers is 32 d wide, in heads of 64, with an MLP of 8/3 of its width, rounded up to
a multiple of 64. Small models are better deep and thin (Liu et al. 2024, arXiv 2402.14905): 32 layers by this rule are
1,024 wide, and those of SmolLM2-360M 960. The architecture is Llama's, which everything reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import SettingsError
from finetune_kit.settings.schema import ModelConfig, setting

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NEW = "a new model"  # as model.name_or_path: random weights
WIDTH, HEAD, MULTIPLE = 32, 64, 64  # width a layer; numbers of a head; the MLP's width is a multiple of this
ROWS = 1024  # words of a model whose tokenizer is not made yet
# layers of a block that write into the residual stream, by the names of transformers' architectures
RESIDUAL = ("o_proj", "down_proj", "c_proj", "out_proj", "dense_4h_to_h", "fc2", "w2", "wo")
OWN_SHAPES = (
    *("depth", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("tie_word_embeddings", "max_position_embeddings"),
)


@dataclass
class NewModelConfig(ModelConfig):
    """The model section of a recipe that begins from random weights.

    `rows`, `ids`, `seed` are not settings: `settle` puts them there once the tokenizer is known.
    """

    name_or_path: str = setting(NEW, "a new model: random weights; another name has no effect here")
    config: str | None = setting(
        None, "Hub id or folder whose architecture is taken; unset: a Llama of the shapes below"
    )
    depth: int = setting(4, "the one knob of size: layers, each for 32 of the width", within="[1, 256]")
    hidden_size: int | None = setting(None, "width; unset: 32 * depth", within="[8, inf)")
    intermediate_size: int | None = setting(None, "width of the MLP; unset: 8/3 of hidden_size", within="[8, inf)")
    num_hidden_layers: int | None = setting(None, "layers; unset: depth", within="[1, 4096]")
    num_attention_heads: int | None = setting(None, "heads; unset: hidden_size / 64", within="[1, inf)")
    num_key_value_heads: int | None = setting(None, "key and value heads; unset: one a head", within="[1, inf)")
    tie_word_embeddings: bool = setting(True, "the head is the embeddings")
    max_position_embeddings: int = setting(2048, "longest text that the model may be given", "tokens", "[8, inf)")

    def __post_init__(self) -> None:
        self.rows: int = ROWS
        self.ids: dict[str, int | None] = {}
        self.seed: int = 0


def is_new(model: ModelConfig) -> bool:
    """Whether the weights are to be random."""
    return isinstance(model, NewModelConfig) and model.name_or_path == NEW


def settle(model: ModelConfig, tokenizer: Any, seed: int) -> None:
    """Tell a new model how many words its tokenizer has and which of them are special, and the seed of its weights.

    Nothing happens to a model that has weights already.
    """
    if isinstance(model, NewModelConfig):
        model.rows, model.seed = max(tokenizer.get_vocab().values()) + 1, seed
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.ids = {name: getattr(tokenizer, name) for name in names}


def check_shapes(model: NewModelConfig, max_length: int) -> None:
    """Raises SettingsError for settings of a new model that have no effect, or that do not go together."""
    if model.name_or_path != NEW:
        raise SettingsError(
            f"model.name_or_path={model.name_or_path}: pretrain starts from random weights.",
            f"Take its architecture: model.config={model.name_or_path}   or continue with its weights: run full_sft",
        )
    for name in ("load_in_4bit", *(() if model.config else ("revision", "trust_remote_code"))):
        if getattr(model, name) != getattr(ModelConfig, name):
            raise SettingsError(f"model.{name} has no effect on random weights.", "Leave it out.")
    if model.config is not None:
        default = NewModelConfig()
        given = [name for name in OWN_SHAPES if getattr(model, name) != getattr(default, name)]
        if given:
            raise SettingsError(
                f"model.{given[0]} has no effect: model.config={model.config} has all shapes.",
                "Leave one of them out; your own config.json in a folder can have any shapes.",
            )
        return
    if max_length > model.max_position_embeddings:
        raise SettingsError(
            f"data.max_length={max_length:,}: the model has {model.max_position_embeddings:,} positions.",
            f"Give it more: model.max_position_embeddings={max_length}",
        )
    _, width, _, heads, key_heads = shape_of(model)
    if width % heads or (width // heads) % 2:
        fitting = [count for count in range(1, max(1, width // HEAD) + 1) if width % (2 * count) == 0]
        near = f"Such as model.num_attention_heads={fitting[-1]}" if fitting else "Set an even model.hidden_size."
        raise SettingsError(
            f"model.hidden_size={width} over {heads} heads is {width / heads:g} numbers each; expected an even number.",
            near,
        )
    if heads % key_heads:
        raise SettingsError(
            f"model.num_key_value_heads={key_heads} does not divide the {heads} heads.", "Leave it out: one a head."
        )


def shape_of(model: NewModelConfig) -> tuple[int, int, int, int, int]:
    """(layers, width, MLP's width, heads, key and value heads) by the rule at the top, or by their own names."""
    layers = model.num_hidden_layers or model.depth
    width = model.hidden_size or WIDTH * model.depth
    inner = model.intermediate_size or MULTIPLE * math.ceil(8 * width / 3 / MULTIPLE)
    heads = model.num_attention_heads or max(1, width // HEAD)
    return layers, width, inner, heads, model.num_key_value_heads or heads


def llama_of(model: NewModelConfig) -> PretrainedConfig:
    """The shapes of a new Llama."""
    from transformers import LlamaConfig

    layers, width, inner, heads, key_heads = shape_of(model)
    return LlamaConfig(
        vocab_size=model.rows,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=model.max_position_embeddings,
        tie_word_embeddings=model.tie_word_embeddings,
        architectures=["LlamaForCausalLM"],
        **{"bos_token_id": None, "eos_token_id": None, **model.ids},
    )


def with_words(config: PretrainedConfig, model: NewModelConfig) -> PretrainedConfig:
    """Another model's shapes with the words of this one's tokenizer. Raises SettingsError where it has too many."""
    text = config.get_text_config()
    if model.ids and model.rows > text.vocab_size:
        raise SettingsError(
            f"model.config={model.config} has {text.vocab_size:,} words, the tokenizer has {model.rows:,}.",
            f"Set tokenizer.vocab_size={text.vocab_size}, or take its own: tokenizer.name_or_path={model.config}",
        )
    text.vocab_size = min(model.rows, text.vocab_size)
    for part in {id(part): part for part in (config, text)}.values():
        for name, number in model.ids.items():
            setattr(part, name, number)
    return config


def scale_residual(base: PreTrainedModel) -> None:
    """Make the layers that write into the residual stream smaller by sqrt(2 * layers), so that the sum of all their
    outputs has the same size at any depth (GPT-2, section 2.3)."""
    import torch

    scale = (2 * base.config.get_text_config().num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if weight.dim() > 1 and name.removesuffix(".weight").rpartition(".")[2] in RESIDUAL:
                weight.mul_(scale)
