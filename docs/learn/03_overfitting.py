# %% [markdown]
# # Lesson 3: A network that learns by heart, and four cures
#
# **You need** lesson 2. **You get** a multi-layer perceptron (MLP) that reads digits, the sight of it
# *overfitting*, and the four usual cures, each with its curve: dropout, L2, early stopping, augmentation.
#
# A network with more numbers than examples can learn the examples by heart. It then knows them, and nothing else.
# The only way to see this is to keep some examples away from training and look at the loss there: the *held-out*
# loss. When the training loss falls and the held-out loss rises, the network is learning by heart.
#
# ## Data: digits drawn by hand
#
# Ten digits of 5 × 3 dots, put at one of four places on a field of 8 × 8, under noise. There are 200 to learn from
# and 500 held out.

# %%
import numpy as np
import torch
from lesson import choose, plot, try_exercise
from torch import nn
from torch.nn.functional import cross_entropy

FONT = [
    "### .#. ### ### #.# ### ### ### ### ###",
    "#.# ##. ..# ..# #.# #.. #.. ..# #.# #.#",
    "#.# .#. ### .## ### ### ### .#. ### ###",
    "#.# .#. #.. ..# ..# ..# #.# .#. #.# ..#",
    "### ### ### ### ..# ### ### .#. ### ###",
]
DIGITS = np.array([[[dot == "#" for dot in row.split()[digit]] for row in FONT] for digit in range(10)])


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, 8, 8) pictures and their digits, put at one of four places, under noise of 0.25."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(count) % 10)
    fields = 0.25 * random.standard_normal((count, 8, 8))
    for field, label in zip(fields, labels, strict=True):
        top, left = random.integers(1, 3), random.integers(2, 4)
        field[top : top + 5, left : left + 3] += DIGITS[label]
    return torch.tensor(fields, dtype=torch.float32), torch.tensor(labels)


x_train, y_train = pictures(200, seed=1)
x_held_out, y_held_out = pictures(500, seed=2)

# %% [markdown]
# ## The network
#
# $$h = \mathrm{relu}(W_1 x + b_1), \qquad z = W_2 h + b_2, \qquad p = \mathrm{softmax}(z)$$
#
# The first layer looks for patterns, the second one weighs them. Without `relu` between them two layers would be one:
# $W_2 (W_1 x) = (W_2 W_1) x$. With 128 patterns the network has 9,610 numbers for 200 pictures: room enough to
# learn them by heart.
#
# `fit` has the four cures as arguments:
#
# - **dropout** switches each pattern off with probability $p$ in training, a new draw each step, and scales the
#   others by $1/(1-p)$. No pattern can rely on one other pattern only.
# - **L2** adds $\frac{\lambda}{2} \lVert W \rVert^2$ to the loss: large weights must be worth their price. With
#   AdamW it is taken from the weights directly and called *weight decay*.
# - **augmentation** changes the pictures in ways that do not change their meaning: here they are moved by up to one
#   place and get new noise. It is data that you did not have to collect.
# - **early stopping** keeps the network of the step with the lowest held-out loss. It costs nothing but looking.


# %%
def augment(x: torch.Tensor, noise: float = 0.2) -> torch.Tensor:
    """The same pictures, moved by at most one place, under new noise. What leaves one edge comes in at the other."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return x.roll((down, right), dims=(1, 2)) + noise * torch.randn_like(x)


def fit(steps: int, dropout: float = 0.0, weight_decay: float = 0.0, augmented: bool = False):
    """Train on the 200 pictures. Returns the curves: step, training loss, held-out loss, held-out accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=weight_decay)
    curves = []
    for step in range(steps + 1):
        if step % 10 == 0:
            model.eval()  # dropout is for training only
            with torch.no_grad():
                seen, unseen = model(x_train), model(x_held_out)
            accuracy = (unseen.argmax(1) == y_held_out).float().mean().item()
            losses = [cross_entropy(seen, y_train).item(), cross_entropy(unseen, y_held_out).item()]
            curves.append((step, *losses, accuracy))
        model.train()
        loss = cross_entropy(model(augment(x_train) if augmented else x_train), y_train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.array(curves)


# %% [markdown]
# ## By heart

# %%
STEPS = choose(600, 300)
plain = fit(STEPS)
best = plain[:, 2].argmin()
print(f"after {STEPS} steps: training loss {plain[-1, 1]:.3f}, held-out loss {plain[-1, 2]:.3f}")
print(f"lowest held-out loss: {plain[best, 2]:.3f}, at step {plain[best, 0]:.0f}")
assert plain[-1, 1] < 0.02  # it knows every training picture
assert plain[-1, 2] > plain[best, 2] + 0.2  # and has become worse at all others
assert 0 < plain[best, 0] < STEPS / 2

# %% [markdown]
# The training loss says "nearly perfect". The held-out loss stopped falling early and then *rose*. The accuracy
# hardly moves: the network makes the same mistakes, and is surer and surer of them. That is why we watch the loss
# too.
#
# ## Four cures

# %%
runs = {
    "nothing": plain,
    "dropout 0.6": fit(STEPS, dropout=0.6),
    "L2 1.0": fit(STEPS, weight_decay=1.0),
    "augmentation": fit(STEPS, augmented=True),
}
rows = {name: (run[-1, 2], run[-1, 3]) for name, run in runs.items()}
rows["early stopping"] = (plain[best, 2], plain[best, 3])
for name, (nats, accuracy) in rows.items():
    print(f"{name:15} held-out loss {nats:.3f}, accuracy {accuracy:.3f}")
for name, (nats, _) in rows.items():
    assert name == "nothing" or nats < rows["nothing"][0] - 0.05, name
assert rows["augmentation"][1] > rows["nothing"][1] + choose(0.05, 0.03)


def draw(axes) -> None:
    for name, run in runs.items():
        axes.plot(run[:, 0], run[:, 2], label=name)
    axes.plot(plain[:, 0], plain[:, 1], "k:", label="nothing: training loss")
    axes.plot(*plain[best, [0, 2]], "o", label="early stopping")
    axes.set(xlabel="step", ylabel="loss, nats", title="Held-out loss")
    axes.legend()


plot("03_overfitting", draw)

# %% [markdown]
# All four help, each in its own way. Dropout and L2 keep the network from being so sure. Early stopping takes it
# before it is. Augmentation is the strongest here because it adds what was missing: it tells the network that a
# digit is the same digit elsewhere. Data beats tricks. That stays true for language models.
#
# A warning: we chose the step of early stopping on the held-out pictures, and chose the strength of the others by
# looking at them, too. A number that was used to choose is a little too good. For a fair last number keep a third
# set that is looked at once.
#
# **For real:** weight decay is `train.weight_decay`, dropout of an adapter `lora.lora_dropout`. Keeping the best
# step and stopping early are in `finetune_kit.training.fit.fit`; rows are held out in
# `finetune_kit.data.split.split_off`, and one that occurs in both parts is taken out of the training part in
# `finetune_kit.data.split.drop_overlap`. See the curve in the report of any run: `python -m finetune_kit run
# full_sft train.weight_decay=0.1` (`recipes/full_sft.py`).
#
# ## Exercise
#
# Write early stopping as it is used, while training continues. `exercise(losses, patience)` reads held-out losses one
# after the other and stops as soon as `patience` measurements in a row have not been lower than the lowest before
# them. Return (index of the best measurement, number of measurements that were read). Read no further than you
# must.


# %%
def exercise(losses, patience: int) -> tuple[int, int]:
    raise NotImplementedError("stop early")


def check(exercise) -> None:
    assert exercise(iter([3.0, 2.0, 2.5, 2.4, 1.0]), 2) == (1, 4)
    assert exercise(iter([3.0, 2.0, 2.5, 1.0, 2.0]), 2) == (3, 5)
    assert exercise(iter([1.0, 1.0, 1.0]), 2) == (0, 3)
    endless = iter(lambda: 5.0, None)
    assert exercise(endless, 10) == (0, 11)


try_exercise(check, exercise)
