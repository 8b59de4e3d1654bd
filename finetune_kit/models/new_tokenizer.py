"""A tokenizer for a new model: byte-level BPE trained on its own texts, or another model's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.new import NewModelConfig, settle
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import ModelConfig, setting
from finetune_kit.system.terminal import console, doing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTES = 256
PAD, TEXT, TURN, END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (PAD, TEXT, TURN, END)  # never in a text; no decoding shows them
# words for what comes later: an answer's thought and its calls are text, which decoding shows
RESERVED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
FEWEST = BYTES + len(SPECIAL) + len(RESERVED)

# ChatML, with tool calls as Hermes and Qwen write them.
TEMPLATE = """\
{{- bos_token }}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none %}
{%- if tools %}
{{- '<|im_start|>system\\n' + (first.content + '\\n\\n' if first else '') }}
{{- 'You may call these tools:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\nTo call one, answer with\\n<tool_call>\\n{"name": its name, "arguments": {…}}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif message.role == 'assistant' and message.tool_calls %}
{{- '<|im_start|>assistant\\n' + (message.content or '') }}
{%- for call in message.tool_calls %}
{%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif not (tools and first and loop.first) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass
class TokenizerConfig:
    name_or_path: str | None = setting(
        None, "Hub id or folder of a tokenizer to take; unset: one is trained on the data"
    )
    vocab_size: int = setting(
        1024, "words of a trained tokenizer, bytes and special tokens included", within="[1, inf)"
    )


def check_tokenizer(config: TokenizerConfig) -> None:
    """Raises SettingsError for a vocabulary without room for every byte, and for settings that have no effect."""
    if config.name_or_path is not None and config.vocab_size != TokenizerConfig.vocab_size:
        raise SettingsError(
            f"tokenizer.vocab_size={config.vocab_size} has no effect: tokenizer.name_or_path has its own words.",
            "Leave one of them out.",
        )
    if config.vocab_size < FEWEST:
        raise SettingsError(
            f"tokenizer.vocab_size={config.vocab_size}: {BYTES} bytes and {FEWEST - BYTES} special tokens are "
            f"{FEWEST} words already, and any text has to be written.",
            f"Set tokenizer.vocab_size={FEWEST} or more; 1024 to 8192 suit a small model, 32768 a large one.",
        )


def make_tokenizer(
    config: TokenizerConfig, model: NewModelConfig, texts: Iterable[str], seed: int
) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: trained on `texts`, which are not read where another one is taken. The model gets
    its number of words. Raises SettingsError, DataError (no text)."""
    if config.name_or_path is not None:
        try:
            taken = load_tokenizer(ModelConfig(name_or_path=config.name_or_path), weights=False)
        except SettingsError as error:
            said = (text.replace("model.name_", "tokenizer.name_") for text in (error.message, error.fix))
            raise SettingsError(*said) from None
        settle(model, taken, seed)
        return taken
    with doing("training the tokenizer"):
        tokenizer = train_tokenizer(texts, config.vocab_size)
    if len(tokenizer) < config.vocab_size:
        console.print(
            f"note: the tokenizer has {len(tokenizer):,} words, not {config.vocab_size:,}: no two of them stand side "
            "by side twice in these texts",
            markup=False,
        )
    settle(model, tokenizer, seed)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of at most `vocab_size` words: special tokens first, then the 256 bytes, then what is merged.

    Every text comes back from its tokens as it was, whatever its characters. Numbers are split into digits. A text
    begins with <|endoftext|>, which also ends it; turns end with <|im_end|>. Raises DataError where there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *RESERVED],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("There is no text to train the tokenizer on.", "Give a file with text in it: data.path=FILE")
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:  # the trainer takes all for special
        token["special"] = token["content"] in SPECIAL
    backend = Tokenizer.from_str(json.dumps(content))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{TEXT} $A", pair=f"{TEXT} $A {TEXT} $B", special_tokens=[(TEXT, backend.token_to_id(TEXT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=TEXT,
        eos_token=TEXT,
        pad_token=PAD,
        additional_special_tokens=[TURN, END],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        chat_template=TEMPLATE,
    )
