"""How a model continues the beginnings of held-out texts: for people, no number comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.data.template import bos_prefix
from finetune_kit.data.token_ids import text_ids
from finetune_kit.generation.generate import Completion, generate
from finetune_kit.system.terminal import console, escaped, moved

if TYPE_CHECKING:
    from finetune_kit.evaluation.measure import Measurement

TEXTS = 4  # held-out texts in the report
BEGINNING = 16  # tokens of a text that the model is given
TEMPERATURE = 0.8  # a base model that takes the likeliest token repeats itself
SEED = 0


def continue_texts(measurement: Measurement, model: Any, tokenizer: Any, data: Any, tokens: int) -> None:
    """Put the continuations of the first TEXTS held-out texts into a measurement, where answers would be."""
    if distributed.is_sharded(model):
        return  # whose layers are not whole: each step of generation would gather them
    moved("continuing held-out texts")
    records = data.held_out_records[:TEXTS]
    begun = [_ids(tokenizer, data, record.text)[:BEGINNING] for record in records]
    rest = [_ids(tokenizer, data, record.text)[BEGINNING : BEGINNING + tokens] for record in records]
    measurement.where = [record.where for record in records]
    measurement.conversations = measurement.prompts = [_text(tokenizer, ids) for ids in begun]
    measurement.references = [_text(tokenizer, ids) for ids in rest]
    measurement.completions = _continue(model, tokenizer, data, begun, tokens)
    measurement.decoding = {"do_sample": True, "temperature": TEMPERATURE, "seed": SEED, "max_new_tokens": tokens}


def say_continuation(model: Any, tokenizer: Any, data: Any, tokens: int) -> None:
    """Print how the model continues the first held-out text."""
    if distributed.is_sharded(model) or not distributed.is_main():
        return
    begun = _ids(tokenizer, data, data.held_out_records[0].text)[:BEGINNING]
    found = _continue(model, tokenizer, data, [begun], tokens)[0]
    console.print(escaped(f"{_text(tokenizer, begun)}⟦{found.text}⟧"), markup=False, style="dim")


def _continue(model: Any, tokenizer: Any, data: Any, prompts: list[list[int]], tokens: int) -> list[Completion]:
    return generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=tokens,
        end_token_ids=data.end_token_ids,
        do_sample=True,
        temperature=TEMPERATURE,
        seed=SEED,
    )


def _ids(tokenizer: Any, data: Any, text: str) -> list[int]:
    return bos_prefix(tokenizer) + text_ids(tokenizer, text, data.special_tokens_in_text)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
