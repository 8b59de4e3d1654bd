"""A reward model: the backbone of a causal language model under a head that gives one number for a whole sequence.

The number is read at the last token that is not the pad token (transformers' pooling), so the pad token must be one
that ends no answer: otherwise the end token itself is skipped, and ending can never be rewarded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.models import adapters, quantization
from finetune_kit.models.classifier import ANOTHER, AUTO_CLASS, make_known
from finetune_kit.models.inference import evaluation_mode, in_batches
from finetune_kit.models.load import load_base
from finetune_kit.models.provenance import check_base
from finetune_kit.models.source import load_model_config
from finetune_kit.settings.schema import LoraConfig, ModelConfig

TASK_TYPE = "SEQ_CLS"  # PEFT's; with any other one the head would not be saved


def load_reward_model(
    model: ModelConfig, lora: LoraConfig | None, tokenizer: Any, end_token_ids: Sequence[int], seed: int = 0
) -> Any:
    """The model to train: one score a sequence, with an adapter where `lora` is given and its rank is not 0.

    The head is float32, trained in any case, and random by `seed` unless the checkpoint is a reward model already.
    `lora.init_from` may name an adapter of the causal language model: training starts from its weights. The tokenizer
    gets a pad token that is none of `end_token_ids`. Raises SettingsError for a checkpoint whose head has several
    labels, a vocabulary larger than the embedding, or an architecture that no score can be put on.
    """
    from transformers import set_seed

    lora = None if lora is not None and lora.r == 0 else lora
    folder = adapters.take_adapter_settings(lora) if lora is not None and lora.init_from else None
    if folder is not None:
        check_base(model, folder)
    base = load_scorer(model, tokenizer, end_token_ids, seed, trained_in_full=lora is None)
    if lora is None:
        return base
    if model.load_in_4bit:
        base = quantization.prepare(base)
    set_seed(seed)  # the adapter's A starts at random
    return (
        adapters.attach(base, lora, TASK_TYPE) if folder is None else adapters.set_adapter_weights(base, lora, folder)
    )


def load_saved(model: ModelConfig, folder: Path, tokenizer: Any, end_token_ids: Sequence[int], seed: int = 0) -> Any:
    """The reward model that a run left in `folder`, frozen; `model`: the base that an adapter lies on.

    With the adapter switched off it scores as the base did under the random head of `seed`.
    """
    if not (folder / "adapter_config.json").is_file():
        whole = replace(model, name_or_path=str(folder), revision=None)
        return load_scorer(whole, tokenizer, end_token_ids, seed)
    base = load_scorer(model, tokenizer, end_token_ids, seed)
    base = quantization.prepare(base) if model.load_in_4bit else base  # as in training
    check_base(model, folder)
    return adapters.load_adapter(base, str(folder)).eval()


def load_scorer(
    model: ModelConfig, tokenizer: Any, end_token_ids: Sequence[int], seed: int = 0, trained_in_full: bool = False
) -> Any:
    """The model under its head, without an adapter, in evaluation mode; see load_reward_model."""
    import torch

    config = load_model_config(model)
    known = is_classifier(config.to_dict())
    if known and config.num_labels != 1:
        raise SettingsError(
            f"{model.name_or_path} is a classifier with {config.num_labels} labels; a reward model has one.",
            "Name a language model, or a reward model with num_labels=1, as model.name_or_path.",
        )
    make_known(config)
    _check_vocabulary(model, config, tokenizer)
    choose_pad_token(tokenizer, end_token_ids)
    with _unsaid(
        "transformers.modeling_utils", "transformers.distributed.tensor_parallel"
    ):  # a new head is what is wanted
        base = load_base(model, trained_in_full, AUTO_CLASS, num_labels=1)
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    found: Any = getattr(base, "score", None)
    if not hasattr(found, "weight") or found.weight.shape[0] != 1:
        raise SettingsError(
            f"{model.name_or_path}: {type(base).__name__} has no single linear layer `score` as its head.",
            ANOTHER,
        )
    width = found.weight.shape[1]  # of OPT's smaller models another than hidden_size
    start = torch.empty(1, width).normal_(std=1 / (width + 1), generator=torch.Generator().manual_seed(seed))
    base.score = _head_class()(width, 1, bias=getattr(found, "bias", None) is not None, device=base.device)
    with torch.no_grad():
        # scores near 0 at the start, whatever the width: the first loss is about ln 2
        base.score.weight.copy_(found.weight if known else start)
        if base.score.bias is not None:
            base.score.bias.copy_(found.bias) if known else base.score.bias.zero_()
    return base.eval()


@cache
def _head_class() -> Any:
    import torch

    class RewardHead(torch.nn.Linear):
        """A linear layer in float32 under any autocast: with 8 bits of mantissa close rewards would be equal."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with torch.autocast(input.device.type, enabled=False):
                return super().forward(input.to(self.weight.dtype))

    return RewardHead


def is_classifier(saved: dict[str, Any]) -> bool:
    """Whether a saved config.json or adapter_config.json is that of a sequence-classification model."""
    names = saved.get("architectures") or ()
    return saved.get("task_type") == TASK_TYPE or any(name.endswith("ForSequenceClassification") for name in names)


def _check_vocabulary(model: ModelConfig, config: Any, tokenizer: Any) -> None:
    rows, needed = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    if rows < needed:
        raise SettingsError(
            f"{model.name_or_path} has embeddings for {rows:,} tokens, its tokenizer has {needed:,}.",
            "Use the tokenizer that the model was trained with.",
        )


def choose_pad_token(tokenizer: Any, end_token_ids: Sequence[int]) -> None:
    """Give the tokenizer a pad token that ends no answer: its own, a special token, or the first of its vocabulary.

    Inside a row it may occur: padding is told by the attention mask, and the score is read behind it.
    """
    ends = {*end_token_ids, tokenizer.eos_token_id}
    special = [token for token in tokenizer.all_special_ids if token != tokenizer.bos_token_id]
    every = sorted(tokenizer.get_vocab().values())
    candidates = [tokenizer.pad_token_id, *special, *every]
    chosen = next(token for token in candidates if token is not None and token not in ends)
    if chosen != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)


def score_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    batch_size: int = 32,
    progress: Callable[[int], None] | None = None,
    score_together: Callable[[Any, Sequence[Sequence[int]]], list[float]] | None = None,
) -> list[float]:
    """The model's score of each row of token ids, in the order of the rows; longest rows are scored first.

    `score_together`: what scores the rows of a batch where the model is not a classifier of its own; else score_batch.

    Raises ResourceError where one row alone does not fit into memory.
    """
    found: dict[int, float] = {}

    def score(batch: list[int]) -> None:
        scores = (score_together or score_batch)(model, [rows[index] for index in batch])
        found.update(zip(batch, scores, strict=True))
        if progress is not None:
            progress(len(found))

    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if progress is not None:
        progress(0)
    with evaluation_mode(model):
        in_batches(batches, score, "scoring")
    return [found[index] for index in range(len(rows))]


def score_batch(model: Any, rows: Sequence[Sequence[int]]) -> list[float]:
    """The scores of rows that go through the model together, padded on the right, in this order."""
    import torch

    pad = model.config.get_text_config().pad_token_id
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for line, row in enumerate(rows):
        input_ids[line, : len(row)] = torch.as_tensor(row)
        attention_mask[line, : len(row)] = 1
    logits = model(
        input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), use_cache=False
    ).logits
    found: list[float] = logits[:, 0].float().tolist()
    return found


@contextmanager
def _unsaid(*names: str) -> Iterator[None]:
    """These loggers say nothing below an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
