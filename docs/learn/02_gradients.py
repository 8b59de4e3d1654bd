# %% [markdown]
# # Lesson 2: Gradients. Reverse-mode autograd in 80 lines
#
# **You need** lesson 1 and the derivative from school. **You get** the machine under every training run: a small
# `Tensor` that remembers how it was computed and can walk back, checked against finite differences and against torch.
#
# In lesson 1 counting gave the best table at once. For deeper models there is no such formula. Instead we start
# anywhere and ask of each number in the model: *if you grew a little, would the loss grow or shrink, and how fast?*
# That is the derivative of the loss with respect to the number. All of them together are the *gradient*. A small
# step against the gradient makes the loss smaller:
#
# $$\theta \leftarrow \theta - \eta \, \nabla_\theta L$$
#
# ## The derivative, the slow way
#
# Nudge one number, compute the loss again, divide: $\partial L / \partial \theta_i \approx \big(L(\theta + h e_i) -
# L(\theta - h e_i)\big) / 2h$. This is always right up to rounding, and far too slow: a model of a million numbers
# needs two million losses for one step. We keep it as the judge.

# %%
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from lesson import choose, plot, shakespeare, try_exercise


def finite_difference(f: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The gradient of f at x, one number at a time."""
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        nudge = np.zeros_like(x)
        nudge[place] = h
        found[place] = (f(x + nudge) - f(x - nudge)) / (2 * h)
    return found


assert abs(finite_difference(lambda x: (x**3).sum(), np.array([2.0]))[0] - 12) < 1e-6  # 3 x² at 2

# %% [markdown]
# ## The fast way: the chain rule, backwards
#
# A loss is a chain of simple steps, and the derivative of each simple step is known. The chain rule multiplies
# them: if $x \to y \to L$ then $\frac{\partial L}{\partial x} = \frac{\partial L}{\partial y} \frac{\partial
# y}{\partial x}$. Start at the end, where $\partial L / \partial L = 1$, and walk back. Each step is told the
# derivative at its *output* and passes on the derivative at its *inputs*. One walk gives the derivatives of all
# numbers. That is *reverse mode*, or *backpropagation*, and it costs about twice as much as computing the loss
# once.
#
# Three rules do most of the work. For the output $C$ with the derivative $\bar C = \partial L / \partial C$:
#
# | step | what goes back |
# | --- | --- |
# | $C = A + B$ | $\bar A = \bar C$, $\bar B = \bar C$ |
# | $C = A \cdot B$, place by place | $\bar A = \bar C \cdot B$, $\bar B = \bar C \cdot A$ |
# | $C = A B$, product of matrices | $\bar A = \bar C B^\top$, $\bar B = A^\top \bar C$ |
#
# A number that is used twice gets both derivatives, added up: that is why the code says `+=`.


# %% tags=["autograd"]
class Tensor:
    """An array that remembers what it was computed from, and how to send derivatives back there."""

    def __init__(self, data, parents=(), back=lambda grad: ()):
        self.data = np.asarray(data, dtype=np.float64)
        self.grad = np.zeros_like(self.data)
        self.parents = parents
        self.back = back  # the derivative at this output -> the derivatives at the parents

    def __add__(self, other):
        other = tensor(other)
        return Tensor(self.data + other.data, (self, other), lambda grad: (grad, grad))

    def __mul__(self, other):
        other = tensor(other)
        return Tensor(self.data * other.data, (self, other), lambda grad: (grad * other.data, grad * self.data))

    def __matmul__(self, other):
        return Tensor(self.data @ other.data, (self, other), lambda grad: (grad @ other.data.T, self.data.T @ grad))

    def __pow__(self, power):
        return Tensor(self.data**power, (self,), lambda grad: (grad * power * self.data ** (power - 1),))

    def exp(self):
        out = np.exp(self.data)
        return Tensor(out, (self,), lambda grad: (grad * out,))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda grad: (grad / self.data,))

    def relu(self):
        return Tensor(np.maximum(self.data, 0), (self,), lambda grad: (grad * (self.data > 0),))

    def sum(self, axis=None):
        out = self.data.sum(axis=axis, keepdims=axis is not None)
        return Tensor(out, (self,), lambda grad: (np.broadcast_to(grad, self.data.shape),))

    def __getitem__(self, places):
        def back(grad):
            spread = np.zeros_like(self.data)
            np.add.at(spread, places, grad)  # a place that was read twice gets both
            return (spread,)

        return Tensor(self.data[places], (self,), back)

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -tensor(other)

    def __truediv__(self, other):
        return self * tensor(other) ** -1.0

    def backward(self):
        """Fill `grad` of everything that this number was computed from."""
        order, seen = [], set()

        def visit(node):  # parents before children
            if id(node) not in seen:
                seen.add(id(node))
                for parent in node.parents:
                    visit(parent)
                order.append(node)

        visit(self)
        self.grad = np.ones_like(self.data)
        for node in reversed(order):
            for parent, grad in zip(node.parents, node.back(node.grad), strict=True):
                parent.grad = parent.grad + folded(grad, parent.data.shape)


def tensor(value):
    return value if isinstance(value, Tensor) else Tensor(value)


def folded(grad, shape):
    """Where numpy stretched a smaller array over a larger one, its derivative is the sum over the copies."""
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(i for i, n in enumerate(shape) if n == 1 and grad.shape[i] != 1), keepdims=True)


# %% [markdown]
# Eighty lines, and it differentiates anything made of these steps.
#
# ## Checked twice
#
# A network of two layers with softmax and cross-entropy uses every one of them. First against finite differences,
# then against torch, which does the same walk in C++.

# %%
random = np.random.default_rng(0)
x, target = random.standard_normal((5, 4)), np.array([0, 2, 1, 2, 0])
weights = {"W1": random.standard_normal((4, 6)), "b1": random.standard_normal(6), "W2": random.standard_normal((6, 3))}


def network(x, W1, b1, W2):
    """Mean cross-entropy of a network of two layers; works for our tensors."""
    logits = (tensor(x) @ W1 + b1).relu() @ W2
    logprobs = logits - logits.exp().sum(axis=1).log()
    return -logprobs[np.arange(5), target].sum() / 5.0 + ((W1**2.0).sum() + (W2 * W2).sum()) * 0.01


ours = {name: Tensor(value) for name, value in weights.items()}
loss = network(x, **ours)
loss.backward()

theirs = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
logits = torch.relu(torch.tensor(x) @ theirs["W1"] + theirs["b1"]) @ theirs["W2"]
torch_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(target))
torch_loss = torch_loss + 0.01 * ((theirs["W1"] ** 2).sum() + (theirs["W2"] ** 2).sum())
torch_loss.backward()

assert abs(loss.data - torch_loss.item()) < 1e-12
for name, value in weights.items():

    def with_other(changed, name=name):
        return float(network(x, **{n: Tensor(changed if n == name else v) for n, v in weights.items()}).data)

    slow = np.abs(ours[name].grad - finite_difference(with_other, value)).max()
    fast = np.abs(ours[name].grad - theirs[name].grad.numpy()).max()
    print(f"{name}: largest difference to finite differences {slow:.1e}, to torch {fast:.1e}")
    assert slow < 1e-7
    assert fast < 1e-12

# %% [markdown]
# ## Descent: the bigram table again, this time learned
#
# Lesson 1 found the best table by counting. If gradients work, going downhill from a table of zeros must arrive at
# the same one. The loss of a bigram model needs only the counts: $L = -\sum_{ij} \frac{N_{ij}}{N} \log p_{ij}$ with
# $p = \mathrm{softmax}(Z)$ row by row.

# %%
text = shakespeare()[0][:20_000].lower()
text = "".join(character for character in text if character in "etaoin shr")
alphabet = sorted(set(text))
numbers = np.array([alphabet.index(character) for character in text])
counts = np.zeros((len(alphabet), len(alphabet)))
np.add.at(counts, (numbers[:-1], numbers[1:]), 1)
shares = counts / counts.sum()
seen = counts > 0
rows = counts.sum(axis=1, keepdims=True)
best = -(shares[seen] * np.log((counts / rows)[seen])).sum()

Z = Tensor(np.zeros_like(counts))
curve = []
for _ in range(choose(2000, 150)):
    logprobs = Z - Z.exp().sum(axis=1).log()
    loss = -(logprobs * shares).sum()
    Z.grad[:] = 0  # gradients add up, so the old ones have to go first
    loss.backward()
    Z.data -= 20.0 * Z.grad
    curve.append(float(loss.data))
print(f"loss {curve[0]:.4f} → {curve[-1]:.4f}; by counting {best:.4f}")
assert abs(curve[0] - np.log(len(alphabet))) < 1e-9
assert all(later < earlier for earlier, later in pairwise(curve))
assert 0 <= curve[-1] - best < choose(0.001, 0.05)


def draw(axes) -> None:
    axes.plot(np.array(curve) - best)
    axes.set(xscale="log", yscale="log", xlabel="step", ylabel="loss above the best, nats", title="Going downhill")


plot("02_gradients", draw)

# %% [markdown]
# The gradient of this loss is worth knowing by heart: $\partial L / \partial z = p - y$, the probabilities minus the
# one-hot truth. The model pushes up what came and pushes down the rest, each as much as it was wrong.

# %%
z = Tensor(random.standard_normal((1, 4)))
(-(z - z.exp().sum(axis=1).log())[0, 2]).backward()
p = np.exp(z.data) / np.exp(z.data).sum()
assert np.allclose(z.grad, p - np.eye(4)[2])

# %% [markdown]
# **For real:** `loss.backward()` in torch. In this package the optimizer steps are those of transformers' Trainer,
# started in `finetune_kit.training.fit.fit`; PPO has a loop of its own in `finetune_kit.rl.ppo.PPOTrainer`, where
# you find `(loss / tokens).backward()`. A backward pass by hand, for speed, is in
# `finetune_kit.packing.segments.attend_by_segment`. Any recipe starts it: `python -m finetune_kit run lora_sft`
# (`recipes/lora_sft.py`).
#
# ## Exercise
#
# Write the step `tanh`. `exercise(t, Tensor)` gets a tensor and returns its hyperbolic tangent as a new one that
# can go back. The derivative of $\tanh x$ is $1 - \tanh^2 x$.


# %%
def exercise(t: Tensor, Tensor: type) -> Tensor:
    raise NotImplementedError("write tanh, with its way back")


def check(exercise) -> None:
    start = np.array([[-1.5, 0.0, 0.3], [2.0, -0.1, 1.0]])
    t = Tensor(start)
    out = exercise(t, Tensor)
    assert np.allclose(out.data, np.tanh(start))
    (out * out).sum().backward()
    assert np.allclose(t.grad, finite_difference(lambda x: (np.tanh(x) ** 2).sum(), start), atol=1e-8)


try_exercise(check, exercise)
