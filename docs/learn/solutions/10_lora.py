# %% [markdown]
# # Lesson 10, solution: double quantisation
#
# 0.5 bits a weight become 0.127: 8 bits for each 64 weights, and one float32 mean and one scale for each 256 of them.

# %%
from torch import Tensor


def exercise(scales: Tensor) -> Tensor:
    mean = scales.mean()
    centred = scales - mean
    step = 2 * centred.abs().max() / 255
    levels = ((centred / step + 127.5).round()).clamp(0, 255)  # what would be stored: one byte each
    return (levels - 127.5) * step + mean
