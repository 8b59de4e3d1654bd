"""Rows of preferences in the columns of TRL's reward, ORPO and KTO trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.stored import table_of
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import SettingsError
from finetune_kit.settings.schema import TrainConfig

if TYPE_CHECKING:
    import datasets


def whole_pairs(data: Data, margins: bool) -> Any:
    """The training pairs as chosen_ids and rejected_ids, each with its prompt; with `margins` also margin.

    Raises SettingsError where a margin is asked for and a row has none.
    """
    import numpy as np

    columns: dict[str, Any] = {"chosen_ids": [], "rejected_ids": []}
    for row in data.train.with_format("numpy"):
        for name in columns:
            columns[name].append(np.concatenate([row["prompt_ids"], row[name]]))
    if margins:
        columns["margin"] = [float(margin) for margin in data.train["margin"]]
        unknown = [index for index, margin in enumerate(columns["margin"]) if math.isnan(margin)]
        if unknown:
            first = data.train_records[data.train[unknown[0]]["row"]].where
            raise SettingsError(
                f"margins=true: {len(unknown)} of {len(data.train)} training pairs have no margin, such as {first}.",
                "Leave margins out, or give data with a margin, or with scores of both answers.",
            )
    return table_of(columns, {"margin": "float64"})


def masked_pairs(data: Data) -> Any:
    """The training pairs in the columns of TRL's ORPO trainer: for each side input_ids, attention_mask and labels."""
    columns: dict[str, list[list[int]]] = {}
    for row in data.train:
        for side, (ids, labels) in sequences(row).items():
            named = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            for name, values in named.items():
                columns.setdefault(f"{side}_{name}", []).append(values)
    return type(data.train).from_dict(columns)


def rotated(data: Data, train: TrainConfig) -> Any:
    """The training rows in the columns of TRL's KTO trainer, in the order of training.

    KL_completion_ids is the completion of the row before in the same batch, that of all processes: KTO estimates the KL
    divergence from answers to other prompts. The rows are shuffled here, by the seed, because the trainer keeps their
    order.
    """
    size = train.per_device_train_batch_size * distributed.count()
    rows = data.train.shuffle(seed=train.seed)
    answers = rows["completion_ids"]
    batches = [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]
    before = [batch[place - 1] for batch in batches for place in range(len(batch))]
    return rows.add_column("KL_completion_ids", [answers[index] for index in before])


def placeholder(kind: str, folder: Path) -> datasets.Dataset:
    """Rows of text for a trainer of TRL that takes no tokens: it tokenises these, and is given ours afterwards.

    Several processes share what it makes of them, which lies in `folder` then.
    """
    import datasets

    datasets.disable_progress_bars()  # of the trainer's work on these
    rows: dict[str, list[dict[str, Any]]] = {
        "preference": [{"prompt": "a", "chosen": " b", "rejected": " c"}],
        "labelled_completion": [{"prompt": "a", "completion": " b", "label": label} for label in (True, False)],
    }
    made = datasets.Dataset.from_list(rows[kind])
    if distributed.count() == 1:
        return made
    if distributed.is_main():
        made.save_to_disk(folder)
    distributed.barrier()
    return datasets.load_from_disk(folder)
