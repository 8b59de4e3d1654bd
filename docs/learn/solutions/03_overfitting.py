# %% [markdown]
# # Lesson 3, solution: early stopping

# %%
from collections.abc import Iterable


def exercise(losses: Iterable[float], patience: int) -> tuple[int, int]:
    best, lowest, read = 0, float("inf"), 0
    for index, loss in enumerate(losses):
        read = index + 1
        if loss < lowest:
            best, lowest = index, loss
        elif index - best >= patience:
            break
    return best, read
