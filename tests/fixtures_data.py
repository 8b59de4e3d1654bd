"""A byte-level BPE tokenizer trained in memory, and the small helpers that the tests of the data path share."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune_kit.data.chat import Sample, samples_of
from finetune_kit.data.ledger import Ledger
from finetune_kit.data.records import Message, PromptCompletion
from finetune_kit.settings.schema import DataConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "user assistant system model the answer is forty two, and the question was what it is.",
    "Hello there! How many apples are left?\n\nThink about it: 7 - 3 = 4 apples are left.",
    "The weather in Paris is sunny, with a temperature of 21 degrees.",
]


@functools.cache
def _core() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return str(core.to_str())


def bpe_tokenizer(
    template: str | None = CHATML,
    specials: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str | None = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 400 tokens; `specials`, bos and eos are whole tokens, pad equals eos."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core()), bos_token=bos, eos_token=eos, pad_token=eos
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = template
    return tokenizer


def user(content: str, **more: Any) -> Message:
    return {"role": "user", "content": content, **more}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def conversation(*messages: Message, tools: list[dict[str, Any]] | None = None) -> PromptCompletion:
    return PromptCompletion("rows.jsonl:1", list(messages), tools)


def made(record: PromptCompletion, tokenizer: Any, notes: list[str] | None = None, **settings: Any) -> list[Sample]:
    """The record's samples under these data settings; each thing said is added to `notes` once."""
    ledger = Ledger(notes=notes if notes is not None else [])
    return samples_of(record, tokenizer, DataConfig(**settings), ledger.note)


def spelled(sample: Sample, tokenizer: Any) -> str:
    """The sample's text with each supervised run between ⟦ and ⟧."""
    text, open_ = "", False
    pending: list[int] = []
    for index, label in zip(sample.input_ids, sample.labels, strict=True):
        if (label >= 0) != open_:
            text += tokenizer.decode(pending) + ("⟧" if open_ else "⟦")
            pending, open_ = [], not open_
        pending.append(index)
    return text + tokenizer.decode(pending) + ("⟧" if open_ else "")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def shared(name: str) -> str:
    """Path of a real data set, or a loud skip where this checkout has none beside it."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"REAL DATA MISSING: {path} is not there, so this data set was NOT tested")
    return str(path)
