# %% [markdown]
# # Lesson 1, solution: a trigram model
#
# One more axis: the table is (V, V, V). A pair of characters picks a row.

# %%
import numpy as np


def exercise(train: str, held_out: str, alphabet: list[str], alpha: float) -> float:
    number_of = {character: number for number, character in enumerate(alphabet)}
    counts = np.full((len(alphabet),) * 3, alpha)
    t = np.array([number_of[character] for character in train])
    np.add.at(counts, (t[:-2], t[1:-1], t[2:]), 1)
    probabilities = counts / counts.sum(axis=2, keepdims=True)
    h = np.array([number_of[character] for character in held_out])
    return float(-np.log(probabilities[h[:-2], h[1:-1], h[2:]]).mean())
