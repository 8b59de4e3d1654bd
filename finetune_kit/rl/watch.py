"""Watchdogs: what stops a run that has gone wrong, from the numbers of its log alone."""

from __future__ import annotations

import math

from finetune_kit.rl.settings import PPOSettings

CAUSES = "Likely causes: learning_rate too high, kl_coef too low, a reward that is too easy to get. See docs/ppo.md."


def collapse(line: dict[str, float], config: PPOSettings, constant: int) -> str | None:
    """Why a run has to stop after an update with this log line, in words; None where it may continue.

    `constant`: updates in a row in which all completions had the same score.
    """
    for name, number in line.items():
        if not math.isfinite(number):
            return f"{name} is {number}"
    kl, entropy = line["objective/kl"], line["policy/entropy_avg"]
    length, scores = line["completions/mean_length"], line["objective/scores"]
    if kl > config.max_kl:
        return (
            f"The policy has left the reference: objective/kl is {kl:.1f} nats a completion (max_kl={config.max_kl:g})"
        )
    if entropy < config.min_entropy:
        return (
            f"The policy has collapsed: its entropy is {entropy:.2g} nats a token (min_entropy={config.min_entropy:g})"
        )
    if length < config.min_length:
        return f"Completions collapsed to {length:.2f} tokens, end token counted (min_length={config.min_length:g})"
    if constant >= config.max_constant_updates:
        return f"Every completion of {constant} updates scored {scores:g}: nothing can be learned from that"
    return None
