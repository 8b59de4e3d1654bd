# %% [markdown]
# # Lesson 2, solution: tanh
#
# The output itself is all that the way back needs.

# %%
import numpy as np


def exercise(t, Tensor):
    out = np.tanh(t.data)
    return Tensor(out, (t,), lambda grad: (grad * (1 - out**2),))
