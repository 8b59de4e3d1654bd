"""The arithmetic of PPO for language models: pure functions on tensors, with masks.

Shapes: b completions, padded on the right to t tokens. `mask` (b, t) is true where a completion has a token; what lies
outside it is never read. Means are over the tokens of a mask. Where completions are spread over several processes,
`total` sums a tensor over all of them, so that every mean and variance is the one of the whole batch.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); GAE, Schulman et al. 2016 (arXiv 1506.02438); for language,
Ziegler et al. 2019 (arXiv 1909.08593) and "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031); the
estimators of KL, Schulman 2020 (joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]


def alone(tensor: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` (b, t) where `mask` is true; a scalar. What is masked may be NaN and gets no gradient."""
    return values.masked_fill(~mask, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Mean of `values` (b, t) where `mask` is true; a scalar. No token at all: 0."""
    return total(masked_sum(values, mask)) / total(mask.sum()).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, total: Total = alone) -> Tensor:
    """Variance (n - 1 in the denominator) of `values` (b, t) where `mask` is true; a scalar. One token or none: 0."""
    squares = (values - masked_mean(values, mask, total)) ** 2
    return total(masked_sum(squares, mask)) / (total(mask.sum()) - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, total: Total = alone) -> Tensor:
    """`values` (b, t) scaled to variance 1, and to mean 0 with `shift_mean` (else the mean stays); 0 where masked.

    Rewards keep their mean, since its sign is what they say; advantages lose it. Source: N+ details, 2.5 and 2.12.
    """
    mean = masked_mean(values, mask, total)
    scaled = (values - mean) * torch.rsqrt(masked_variance(values, mask, total) + 1e-8)
    return (scaled if shift_mean else scaled + mean).masked_fill(~mask, 0.0)


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log p - log q of the sampled tokens (any shape): unbiased for KL(p || q), may be negative."""
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q / p - 1 - log(q / p) of the sampled tokens (any shape): unbiased, never negative, less variance near 0."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """(b, t): -kl_coef * kl at every token, and the completion's score (b,) on top at its last true token.

    A completion without a token gets nothing. Source: Ziegler et al. 2019, equation 2.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    lengths = mask.sum(dim=1)
    last = (lengths - 1).clamp(min=0).unsqueeze(1)
    return rewards.scatter_add(1, last, torch.where(lengths > 0, scores, 0.0).unsqueeze(1).to(rewards.dtype))


class Gae(NamedTuple):
    advantages: Tensor
    returns: Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Gae:
    """Generalised advantage estimates and returns, each (b, t), from rewards and values (b, t); 0 where masked.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  returns = A + V. `values[:, t]` is V of
    the state before token t; after a completion's last token V is 0, whether it ended by itself or was cut off.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        ahead = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * ahead - values[:, t]
        following = (delta + gamma * lam * following).masked_fill(~mask[:, t], 0.0)
        advantages[:, t] = following
    return Gae(advantages, advantages + values)


class PolicyLoss(NamedTuple):
    """Sums over the mask's tokens; divide by their number. All but `loss` are without gradient."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approxkl: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> PolicyLoss:
    """sum over tokens of max(-A ratio, -A clip(ratio, 1 - cliprange, 1 + cliprange)), ratio = p / p_old.

    `clipped` counts the tokens at which the clipped side is the larger one; `approxkl` sums k3 of p_old against p.
    Source: Schulman et al. 2017, equation 7.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio, advantages = torch.exp(log_ratio), advantages.masked_fill(~mask, 0.0)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        figures = (
            masked_sum(ratio, mask),
            masked_sum((bounded > plain).float(), mask),
            masked_sum(ratio - 1 - log_ratio, mask),
        )
    return PolicyLoss(masked_sum(torch.maximum(plain, bounded), mask), *figures)


class ValueLoss(NamedTuple):
    """Sums over the mask's tokens; `clipped` is without gradient."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> ValueLoss:
    """sum over tokens of max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, with c = cliprange_value.

    `clipped` counts the tokens at which the clipped side is the larger one. Source: N+ details, 2.11.
    """
    values, old_values, returns = (part.masked_fill(~mask, 0.0) for part in (values, old_values, returns))
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, bounded = (values - returns) ** 2, (near - returns) ** 2
    clipped = masked_sum((bounded > plain).float(), mask).detach()
    return ValueLoss(0.5 * masked_sum(torch.maximum(plain, bounded), mask), clipped)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """(…, v) logits -> (…) entropy in nats of the distribution that they give; a logit may be -inf."""
    logprobs = logits.log_softmax(-1)
    # what is never written adds 0, not 0 * -inf
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """(…, v) logits and (…) token ids -> (…) log-probabilities, without a second tensor of the logits' size."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total = alone) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect value, 0 no better than a constant, below 0 worse.

    Returns that are all alike explain nothing: 0.
    """
    spread = masked_variance(returns, mask, total)
    return float(1 - masked_variance(returns - values, mask, total) / spread) if spread > 1e-12 else 0.0


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The next coefficient: up where the KL a completion (nats) is above `target`, down where it is below.

    At most 20 % of completions / horizon a time. Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * completions / horizon)
