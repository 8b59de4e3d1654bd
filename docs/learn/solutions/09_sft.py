# %% [markdown]
# # Lesson 9, solution: labels of a padded batch
#
# Pad the labels with -100 by *place*. Never mask by the id of the pad token: it may be the end token.

# %%
import torch
from torch import Tensor


def exercise(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in rows)
    padded_ids = [ids + [pad] * (width - len(ids)) for ids, _ in rows]
    padded_labels = [labels + [-100] * (width - len(labels)) for _, labels in rows]
    return torch.tensor(padded_ids), torch.tensor(padded_labels)
