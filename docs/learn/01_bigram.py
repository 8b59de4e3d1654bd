# %% [markdown]
# # Lesson 1: Vectors, matrices, probability. A language model by counting
#
# **You need** Python and school mathematics. **You get** a first language model, made without any training: it counts
# which character follows which. On the way you meet what all twelve lessons stand on: vectors, a matrix product,
# probability, and a number that says how good a language model is.
#
# A *language model* answers one question: given the text so far, how likely is each possible next piece? Here the
# pieces are single characters, and "the text so far" is one character. That is a *bigram* model.

# %%
import math
from itertools import pairwise

import numpy as np
from lesson import plot, shakespeare, try_exercise

train, held_out = shakespeare()
alphabet = sorted(set(train + held_out))
number_of = {character: number for number, character in enumerate(alphabet)}
V = len(alphabet)
print(f"{len(train):,} characters to count, {len(held_out):,} held out, {V} different ones: {''.join(alphabet)!r}")

# %% [markdown]
# ## Characters as vectors
#
# A vector is a list of numbers. The simplest vector for a character has a 1 at the character's own place and 0
# elsewhere. It is called *one-hot*. A product of vectors, $x \cdot y = \sum_i x_i y_i$, multiplies place by place
# and adds up. For one-hot vectors it says whether two characters are the same: 1 if they are, else 0.


# %%
def ids(text: str) -> np.ndarray:
    return np.array([number_of[character] for character in text])


def one_hot(numbers: np.ndarray) -> np.ndarray:
    """(n,) numbers -> (n, V) rows with a single 1."""
    return np.eye(V)[numbers]


a, b = one_hot(ids("ab"))
print("a·a =", a @ a, "  a·b =", a @ b)
assert (a @ a, a @ b) == (1, 0)

# %% [markdown]
# ## Counting is a matrix product
#
# Stack the vectors of a text under each other and you have a matrix $X$, one row a character. Let $Y$ be the same for
# the text moved on by one: row $t$ of $Y$ is the character *after* row $t$ of $X$. Then
#
# $$N = X^\top Y, \qquad N_{ij} = \sum_t X_{ti} Y_{tj}$$
#
# has at $(i, j)$ how often character $j$ came right after character $i$. Take a moment with that sum: a term is 1
# only when both vectors have their 1 in the right place. So a product of matrices counts. (Most of what a language
# model does, at any size, is products of matrices.)

# %%
start = train[:2000]
X, Y = one_hot(ids(start[:-1])), one_hot(ids(start[1:]))
by_product = X.T @ Y
by_hand = np.zeros((V, V))
for first, second in pairwise(start):
    by_hand[number_of[first], number_of[second]] += 1
assert (by_product == by_hand).all()
print("'t' is followed by 'h'", int(by_product[number_of["t"], number_of["h"]]), "times in the first 2,000 characters")


# %% [markdown]
# A million rows of 65 numbers, nearly all of them 0, would be a waste of memory. `np.add.at` adds the ones directly.


# %%
def count(text: str) -> np.ndarray:
    """(V, V): how often the second character follows the first."""
    numbers, counts = ids(text), np.zeros((V, V))
    np.add.at(counts, (numbers[:-1], numbers[1:]), 1)
    return counts


N = count(train)
assert N.sum() == len(train) - 1

# %% [markdown]
# ## From counts to probabilities
#
# The probability of $j$ after $i$ is its share of all that came after $i$: each row is divided by its sum.
#
# $$P(j \mid i) = \frac{N_{ij} + \alpha}{\sum_k (N_{ik} + \alpha)}$$
#
# With $\alpha = 0$ these are the plain shares. But then a pair that never occurred has probability 0, and one such
# pair in a new text makes the whole text impossible. A small $\alpha$, here 0.1, keeps every door open
# (*smoothing*). A row of probabilities has no negative entry and adds up to 1.


# %%
def probabilities(counts: np.ndarray, alpha: float = 0.1) -> np.ndarray:
    """(V, V): each row the distribution of the next character."""
    smoothed = counts + alpha
    return smoothed / smoothed.sum(axis=1, keepdims=True)


P = probabilities(N)
assert np.allclose(P.sum(axis=1), 1)
after_q = P[number_of["q"]]
print(f"after 'q': 'u' with probability {after_q[number_of['u']]:.3f}")
assert after_q.argmax() == number_of["u"]

# %% [markdown]
# Multiplying a one-hot row vector with $P$ picks a row of it: $x P$ is the distribution after $x$. That sentence is
# the whole model. A network does the same with better vectors and more matrices.

# %%
assert np.array_equal(one_hot(ids("q"))[0] @ P, after_q)


def draw(axes) -> None:
    axes.imshow(np.sqrt(P), cmap="magma", aspect="auto")
    axes.set_xticks(range(V), [repr(c)[1:-1] for c in alphabet], fontsize=5)
    axes.set_yticks(range(0, V, 2), [repr(c)[1:-1] for c in alphabet[::2]], fontsize=5)
    axes.set(xlabel="next character", ylabel="character", title="P(next | character), square root")


plot("01_bigram", draw)

# %% [markdown]
# ## Writing
#
# Probabilities can be sampled from: draw a character, go to its row, draw again.

# %%
random = np.random.default_rng(0)
written = ["\n"]
for _ in range(200):
    written.append(random.choice(alphabet, p=P[number_of[written[-1]]]))
print("".join(written))

# %% [markdown]
# Not English, but the letters come in pairs that English has. How good is it, as a number?
#
# ## The loss
#
# The probability of a whole text is the product of the probabilities of its steps (the *chain rule*): $P(x_1 \dots
# x_n) = P(x_1)\,P(x_2 \mid x_1) \cdots P(x_n \mid x_{n-1})$ for this model. Products of a hundred thousand numbers
# below 1 are too small for a computer, so we take logarithms, which turn products into sums, and the mean, so that
# long and short texts compare:
#
# $$L = -\frac{1}{n} \sum_t \log P(x_t \mid x_{t-1})$$
#
# This is *cross-entropy*, in nats with the natural logarithm, in bits with base 2 (divide by $\ln 2$). Every lesson
# from here on, and every fine-tuning run you will ever do, makes this number smaller. $e^L$ is called *perplexity*:
# the model is as unsure as if it chose among that many equally likely characters.
#
# It is measured on text that was **not** counted. On the text that it was made from, a model can be good by heart.


# %%
def loss(model: np.ndarray, text: str) -> float:
    """Mean of -log P(next | character) over a text, nats a character."""
    numbers = ids(text)
    return float(-np.log(model[numbers[:-1], numbers[1:]]).mean())


uniform = np.full((V, V), 1 / V)
share = probabilities(np.tile(N.sum(axis=0), (V, 1)))  # the same row everywhere: no look at the character before
for name, model in (("every character alike", uniform), ("shares of characters", share), ("bigram", P)):
    nats = loss(model, held_out)
    print(f"{name:22} {nats:.3f} nats = {nats / math.log(2):.3f} bits a character, perplexity {math.exp(nats):.1f}")
assert abs(loss(uniform, held_out) - math.log(V)) < 1e-9
assert loss(P, held_out) < loss(share, held_out) < loss(uniform, held_out)
assert abs(loss(P, held_out) / math.log(2) - 3.583) < 0.001

# %% [markdown]
# 6.02 bits without knowing anything, 4.83 with the shares of the characters, and 3.58 by looking one character
# back. In lesson 7 a small transformer, which looks back further, gets well below that.
#
# ## The best possible bigram
#
# Could other numbers in the table give a lower loss *on the training text*? No: the shares are the optimum. Whatever
# other table we try, it is worse, and by an amount that has a name, the Kullback-Leibler divergence. We will meet it
# again when models are kept close to each other (lesson 11).

# %%
exact = probabilities(N, alpha=1e-12)
lowest = loss(exact, train)
for _ in range(3):
    other = exact * np.exp(0.1 * random.standard_normal(exact.shape))
    other /= other.sum(axis=1, keepdims=True)
    rows = N.sum(axis=1) / N.sum()
    divergence = (rows[:, None] * exact * np.log(exact / other)).sum()
    above = loss(other, train) - lowest
    assert above > 0
    assert abs(above - divergence) < 1e-6
print(f"a table that is a little different: {above:.4f} nats worse, and its divergence is {divergence:.4f}")

# %% [markdown]
# ## The same line in this package
#
# A network gives *logits*, any numbers, which `softmax` makes into probabilities: $p_i = e^{z_i} / \sum_k e^{z_k}$.
# With $z = \log P$ softmax gives $P$ back. So the table of logarithms is already a network of one layer, and the
# package's own line for the log-probability of a token gives our loss.

# %%
import torch

from finetune_kit.rl.math import entropy_from_logits, token_logprobs

numbers = torch.tensor(ids(held_out))
logits = torch.tensor(np.log(P))[numbers[:-1]]
assert abs(-token_logprobs(logits, numbers[1:]).mean().item() - loss(P, held_out)) < 1e-9
print(f"mean entropy of the predictions: {entropy_from_logits(logits).mean():.3f} nats")

# %% [markdown]
# **For real:** every recipe prints this number, before and after, as `held-out loss, nats/token`, with an interval:
# `python -m finetune_kit run full_sft data.path=my_book.txt`. The recipe is `recipes/full_sft.py`, the loss of a
# row is computed in `finetune_kit.evaluation.loss.row_losses`, and a token's log-probability in
# `finetune_kit.rl.math.token_logprobs`.
#
# ## Exercise
#
# Look two characters back. Write `exercise(train, held_out, alphabet, alpha)`: count trigrams in `train`, smooth
# them with `alpha`, and return the mean loss of `held_out` in nats, over its third and later characters.


# %%
def exercise(train: str, held_out: str, alphabet: list[str], alpha: float) -> float:
    raise NotImplementedError("write the trigram model")


def check(exercise) -> None:
    # after "ab" comes "c" once of once: (1 + 1) / (1 + 3)
    assert abs(exercise("abc", "abc", ["a", "b", "c"], 1.0) - math.log(2)) < 1e-9
    assert abs(exercise("abc", "bac", ["a", "b", "c"], 1.0) - math.log(3)) < 1e-9
    assert exercise(train, held_out, alphabet, 0.1) < loss(P, held_out) - 0.2


try_exercise(check, exercise)
