# %% [markdown]
# # Lesson 4, solution: bits per byte

# %%
import math


def exercise(nats: list[float], text: str) -> float:
    return sum(nats) / math.log(2) / len(text.encode("utf-8"))
