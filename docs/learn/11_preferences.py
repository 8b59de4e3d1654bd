# %% [markdown]
# # Lesson 11: Rewards, DPO and PPO by hand
#
# **You need** lessons 6 and 10. **You get** what turns a model that *can* answer into one that answers as people
# like it: a reward model, DPO, and PPO, each written out, each with the number that it must start at ($\ln 2$, $\ln
# 2$, ratio 1 and KL 0), and the sight of a model that is too eager to please.
#
# The policy is a transformer of two layers. It writes words of 12 letters out of eight: `a` to `h`. Untrained, it
# writes all letters alike.

# %%
import copy
import math

import torch
from lesson import cell, choose, plot, try_exercise
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

llama = cell("06_transformer", "model")
torch.manual_seed(0)
START, LENGTH = 8, 12  # letter i is token i; words begin with START
CONFIG = llama.Config(vocab_size=9, hidden_size=32, intermediate_size=64)


def letters(logits: Tensor) -> Tensor:
    """(…, 9) logits -> (…, 8) log-probabilities of the letters; START is never written."""
    return logits[..., :8].log_softmax(dim=-1)


@torch.no_grad()
def write(policy: nn.Module, count: int) -> Tensor:
    """(count, 1 + 12) words, sampled."""
    words, caches = torch.full((count, 1), START), [{} for _ in policy.model.layers]
    for _ in range(LENGTH):
        chances = letters(policy(words[:, -1:], caches)[:, -1]).exp()
        words = torch.cat([words, torch.multinomial(chances, 1)], dim=1)
    return words


def logprobs_of(policy: nn.Module, words: Tensor) -> Tensor:
    """(b, 12): log p of each letter that was written."""
    return letters(policy(words[:, :-1])).gather(2, words[:, 1:, None]).squeeze(2)


base = llama.Llama(CONFIG)

# %% [markdown]
# ## What people want
#
# Our "people" like the letter `a`: each one is worth a point, up to five. More than five are silly, and each
# further one costs two points. Nobody tells the computer this rule. It only sees which of two words somebody
# preferred, and people are not always sure: word $x$ beats $y$ with probability $\sigma(g(x) - g(y))$, where
# $\sigma(z) = 1/(1 + e^{-z})$. This is the *Bradley-Terry* model, the same that ranks chess players.


# %%
def gold(words: Tensor) -> Tensor:
    """What a word is truly worth. The computer never sees this."""
    count = (words[:, 1:] == 0).sum(dim=1).float()
    return count - 3 * (count - 5).clamp(min=0)


def compare(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), as somebody would decide."""
    first_wins = torch.rand(len(first)) < torch.sigmoid(gold(first) - gold(second))
    return torch.where(first_wins[:, None], first, second), torch.where(first_wins[:, None], second, first)


chosen, rejected = compare(write(base, 3000), write(base, 3000))
held_chosen, held_rejected = compare(write(base, 1000), write(base, 1000))
print(
    "".join("abcdefgh"[i] for i in chosen[0, 1:]), "was preferred to", "".join("abcdefgh"[i] for i in rejected[0, 1:])
)
many = ((chosen[:, 1:] == 0).sum(1) > 5).float().mean().item()
print(f"words with more than five a among the chosen: {many:.3f}")
assert many < 0.02  # remember this number

# %% [markdown]
# ## 1. A reward model
#
# A transformer whose head gives one number at the last letter. It is trained to give the chosen word the higher one:
#
# $$L = -\log \sigma\big( r(x_{\text{chosen}}) - r(x_{\text{rejected}}) \big)$$
#
# With a head of zeros both scores are equal, $\sigma(0) = \frac12$, and the loss is $\ln 2 = 0.693$. Whatever
# starts elsewhere is wired wrongly.


# %%
class Scorer(nn.Module):
    """A backbone and a head with one number a token: a reward model reads the last one, a value model all."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = llama.Backbone(CONFIG), nn.Linear(CONFIG.hidden_size, 1)
        nn.init.normal_(self.backbone.embed_tokens.weight, std=0.3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.backbone(words, None)).squeeze(-1)


def pair_loss(difference: Tensor) -> Tensor:
    return -logsigmoid(difference).mean()


def batches(steps: int, size: int = 64):
    for _ in range(steps):
        rows = torch.randint(len(chosen), (size,))
        yield chosen[rows], rejected[rows]


reward = Scorer()
with torch.no_grad():
    first = pair_loss(reward(chosen)[:, -1] - reward(rejected)[:, -1]).item()
assert abs(first - math.log(2)) < 1e-6
optimizer = torch.optim.AdamW(reward.parameters(), lr=2e-3)
for good, bad in batches(choose(150, 50)):
    loss = pair_loss(reward(good)[:, -1] - reward(bad)[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    margin = reward(held_chosen)[:, -1] - reward(held_rejected)[:, -1]
accuracy, best = (
    (margin > 0).float().mean().item(),
    ((gold(held_chosen) - gold(held_rejected)).sign() / 2 + 0.5).mean().item(),
)
print(f"loss {first:.4f} → {pair_loss(margin):.4f}; right on {accuracy:.3f} of new pairs; the rule itself: {best:.3f}")
assert accuracy > choose(0.72, 0.66)

from finetune_kit.evaluation.reward_gate import pair_losses

assert abs(sum(pair_losses(margin.tolist())) / len(margin) - pair_loss(margin).item()) < 1e-6

# %% [markdown]
# Far from 1, and it cannot be much better: people contradicted each other. Now a question to keep in mind. The
# reward model saw hardly any word with more than five `a`. What will it say about `aaaaaaaaaaaa`?

# %%
ladder = torch.randint(1, 8, (13, 1 + LENGTH))
ladder[:, 0] = START
for count in range(13):
    ladder[count, 1 : 1 + count] = 0
with torch.no_grad():
    proxy = reward(ladder)[:, -1] - reward(ladder[:1])[:, -1]
for count in (0, 2, 5, 8, 12):
    print(f"{count:2} a: the rule says {gold(ladder)[count]:6.1f}, the reward model {proxy[count]:6.2f}")
assert proxy[5] > proxy[0] + 1  # right where there were data
assert proxy[12] > proxy[5]  # and wrong where there were none
assert gold(ladder)[12] < gold(ladder)[5] - 10

# %% [markdown]
# ## 2. DPO: preferences without a reward model
#
# DPO starts from a piece of algebra. If we want much reward *and* to stay close to a reference policy, the best
# policy is $\pi(x) \propto \pi_{\text{ref}}(x)\, e^{r(x)/\beta}$. Turned round: a policy *is* a reward model, $r(x)
# = \beta \log \frac{\pi(x)}{\pi_{\text{ref}}(x)}$ up to a constant, and in a difference the constant goes away:
#
# $$L = -\log \sigma\Big( \beta \log \frac{\pi(x_c)}{\pi_{\text{ref}}(x_c)} -
# \beta \log \frac{\pi(x_r)}{\pi_{\text{ref}}(x_r)} \Big)$$
#
# At the start the policy is its own reference, both logarithms are 0, and the loss is $\ln 2$ once more.


# %%
def dpo_loss(policy: nn.Module, good: Tensor, bad: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(loss, margins of the implicit reward)."""
    with torch.no_grad():
        reference = logprobs_of(base, good).sum(1) - logprobs_of(base, bad).sum(1)
    margins = beta * (logprobs_of(policy, good).sum(1) - logprobs_of(policy, bad).sum(1) - reference)
    return pair_loss(margins), margins


dpo = copy.deepcopy(base)
first = dpo_loss(dpo, chosen, rejected, 0.5)[0].item()
assert abs(first - math.log(2)) < 1e-6
optimizer = torch.optim.AdamW(dpo.parameters(), lr=1e-3)
for good, bad in batches(choose(100, 25)):
    loss, _ = dpo_loss(dpo, good, bad, 0.5)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    last, margins = dpo_loss(dpo, held_chosen, held_rejected, 0.5)
gold_base, gold_dpo = gold(write(base, 1000)).mean().item(), gold(write(dpo, 1000)).mean().item()
print(f"DPO: loss {first:.4f} → {last:.4f}, right on {(margins > 0).float().mean():.3f}")
print(f"what people want, of 1,000 words: {gold_base:.2f} → {gold_dpo:.2f}")
assert last < math.log(2) - choose(0.1, 0.02)
assert gold_dpo > gold_base + choose(1, 0.2)

# %% [markdown]
# ## 3. PPO: write, score, push
#
# PPO lets the policy write, has the words scored, and makes what scored better than expected more likely. The pieces:
#
# **Reward per letter**: the score comes at the last letter; each letter costs $\beta (\log \pi - \log
# \pi_{\text{ref}})$. The sum of these costs estimates the *KL divergence*: how far the policy has gone from where
# it started.
#
# **Advantage**: how much better things went than the value model expected, by *generalised advantage estimation*:
# $\delta_t = r_t + \gamma V_{t+1} - V_t$, $A_t = \delta_t + \gamma \lambda A_{t+1}$, from the last letter back to
# the first.
#
# **Clipped ratio**: with $\rho_t = \pi(x_t) / \pi_{\text{old}}(x_t)$ the loss is $\max\big(-A_t \rho_t,\; -A_t
# \,\mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)\big)$. Once a letter has become 20 % more likely than when it
# was written, there is nothing more to gain from it: no update can go far on the word of one batch. At the first
# step the policy *is* the old one, so every ratio is 1.

# %%
GAMMA, LAMBDA, CLIP = 1.0, 0.95, 0.2


def rewards_by_hand(scores: Tensor, kl: Tensor, beta: float) -> Tensor:
    rewards = -beta * kl
    rewards[:, -1] += scores
    return rewards


def advantages_by_hand(rewards: Tensor, values: Tensor) -> Tensor:
    advantages, following = torch.zeros_like(rewards), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        ahead = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        following = rewards[:, t] + GAMMA * ahead - values[:, t] + GAMMA * LAMBDA * following
        advantages[:, t] = following
    return advantages


def policy_loss_by_hand(logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """(mean loss, ratios)."""
    ratio = torch.exp(logprobs - old)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean(), ratio


# %% [markdown]
# The package's own functions are these, with masks for answers of different lengths. On random numbers they agree:

# %%
from finetune_kit.rl.math import gae, kl_k1, policy_loss, token_rewards

every = torch.ones(5, LENGTH, dtype=torch.bool)
logprobs, old, ref, values = torch.randn(4, 5, LENGTH) * 0.3
scores, kl = torch.randn(5), kl_k1(old, ref)
rewards = rewards_by_hand(scores, old - ref, 0.1)
assert torch.allclose(rewards, token_rewards(scores, kl, every, 0.1), atol=1e-6)
advantages = advantages_by_hand(rewards, values)
assert torch.allclose(advantages, gae(rewards, values, every, GAMMA, LAMBDA).advantages, atol=1e-5)
theirs = policy_loss(logprobs, old, advantages, every, CLIP)
ours, ratio = policy_loss_by_hand(logprobs, old, advantages)
assert torch.allclose(ours, theirs.loss / every.sum(), atol=1e-6)
assert torch.allclose(ratio.mean(), theirs.ratio / every.sum(), atol=1e-6)
print(f"{theirs.clipped:.0f} of {every.sum()} letters would be clipped; by hand and by the package: the same loss")


# %%
def ppo(beta: float, updates: int, size: int = 64, epochs: int = 2) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a copy of the base against the reward model; the second result says what happened in each update."""
    torch.manual_seed(1)
    policy, value, history = copy.deepcopy(base), Scorer(), []
    optimizer = torch.optim.Adam(
        [{"params": policy.parameters(), "lr": 2e-3}, {"params": value.parameters(), "lr": 5e-3}]
    )
    for _ in range(updates):
        words = write(policy, size)
        with torch.no_grad():
            old, reference = logprobs_of(policy, words), logprobs_of(base, words)
            values, scores = value(words[:, :-1]), reward(words)[:, -1]
        rewards = rewards_by_hand(scores, old - reference, beta)
        advantages = advantages_by_hand(rewards, values)
        returns = advantages + values
        normed = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratios = []
        for _ in range(epochs):
            loss, ratio = policy_loss_by_hand(logprobs_of(policy, words), old, normed)
            loss = loss + 0.5 * (value(words[:, :-1]) - returns).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            ratios.append(ratio.detach())
        history.append({
            "proxy": scores.mean().item(), "gold": gold(words).mean().item(),
            "kl": (old - reference).sum(1).mean().item(), "ratio at first": (ratios[0] - 1).abs().max().item(),
            "ratio at last": (ratios[-1] - 1).abs().max().item(),
        })  # fmt: skip
    return policy, history


free, free_history = ppo(beta=0.0, updates=choose(40, 10))
begin = free_history[0]
print(f"first update: KL {begin['kl']:.1e}, largest ratio - 1 {begin['ratio at first']:.1e}, "
      f"after one step {begin['ratio at last']:.2f}")  # fmt: skip
assert abs(free_history[0]["kl"]) < 1e-4
assert all(update["ratio at first"] < 1e-3 for update in free_history)
assert free_history[0]["ratio at last"] > 1e-3

# %% [markdown]
# ## Over-optimisation
#
# This run had $\beta = 0$: nothing held the policy. The reward model's score rises and rises. What people truly
# want rises with it at first, and then falls off a cliff: the policy has found the place where the reward model is
# wrong. "When a measure becomes a target, it ceases to be a good measure."

# %%
held, held_history = ppo(beta=1.0, updates=choose(40, 10))


def draw(axes) -> None:
    for name, history in (("beta 0", free_history), ("beta 1", held_history)):
        axes.plot([u["proxy"] for u in history], "--", label=f"{name}: reward model")
        axes.plot([u["gold"] for u in history], label=f"{name}: what people want")
    axes.set(xlabel="update", ylabel="reward", title="Over-optimisation")
    axes.legend()


plot("11_overoptimisation", draw)


def last(history: list[dict[str, float]], name: str) -> float:
    """Mean over the last five updates."""
    return sum(update[name] for update in history[-5:]) / 5


for name, history in (("beta 0", free_history), ("beta 1", held_history)):
    best = max(update["gold"] for update in history)
    print(f"{name}: KL {last(history, 'kl'):.1f} nats")
    print(f"        reward model     {history[0]['proxy']:.2f} → {last(history, 'proxy'):.2f}")
    print(f"        what people want {history[0]['gold']:.2f} → highest {best:.2f} → {last(history, 'gold'):.2f}")
peak = max(update["gold"] for update in free_history)
assert last(free_history, "proxy") > free_history[0]["proxy"] + choose(1, 0.2)  # the measure went up
assert last(free_history, "kl") > last(held_history, "kl")
if choose(True, False):  # 10 updates are too few to fall
    assert peak > free_history[0]["gold"] + 1
    assert last(free_history, "gold") < peak - 2  # the thing itself went up, and down
    assert last(held_history, "gold") > last(free_history, "gold") + 2  # held to the reference, it stays

# %% [markdown]
# Held by $\beta = 1$, the policy takes what is safe to take and stays where the reward model knows what it talks
# about. This is what the KL penalty is for, and why a run should watch its own held-out measure, not only the
# reward that it chases.
#
# **For real:** `python -m finetune_kit run reward_model`, then `python -m finetune_kit run dpo` or `python -m
# finetune_kit run ppo` (`recipes/reward_model.py`, `recipes/dpo.py`, `recipes/ppo.py`). The arithmetic is in
# `finetune_kit.rl.math.policy_loss`, `finetune_kit.rl.math.gae` and `finetune_kit.rl.math.token_rewards`, the loop
# in `finetune_kit.rl.ppo.PPOTrainer`. Before a reward model may be used, it has to pass a test on held-out pairs,
# `finetune_kit.evaluation.reward_gate.gate`; DPO's margins are measured in
# `finetune_kit.evaluation.preferences.margins`.
#
# ## Exercise
#
# GRPO needs no value model: it writes several answers to each prompt and compares each with its own group. Write
# `exercise(scores)`: from (prompts, group) scores the advantages, $(r - \text{mean}) / (\text{std} + 10^{-4})$ in
# each group, where std has $n - 1$ in its denominator (torch's default). A group that agrees teaches nothing: its
# advantages are 0.


# %%
def exercise(scores: Tensor) -> Tensor:
    raise NotImplementedError("advantages within groups")


def check(exercise) -> None:
    found = exercise(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]]))
    assert torch.allclose(found.sum(dim=1), torch.zeros(3), atol=1e-5)
    assert found[1].abs().max() == 0
    assert torch.allclose(found[0], torch.tensor([1.0, -1.0, -1.0, 1.0]) * 0.5 / (3**-0.5 + 1e-4), atol=1e-5)
    assert found[2, 3] > 1.4  # the one that stands out


try_exercise(check, exercise)
