"""Rollouts: sample completions, and look at each of their tokens once with the policy, the reference and the value.

Rows are laid out as in training: prompt, completion, padding on the right. Attention masks come from lengths, never
from token ids: the pad token may end turns inside a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_kit.errors import NumericsError
from finetune_kit.generation import decoding
from finetune_kit.generation.cache import begin_rows, pick
from finetune_kit.generation.generate import Call
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.completion_rows import Rows, states
from finetune_kit.models.inference import evaluation_mode, in_batches
from finetune_kit.models.second_adapter import adapter
from finetune_kit.rl.math import entropy_from_logits, token_logprobs


class Sampled(NamedTuple):
    """A completion's token ids, the end token included where it `ended` by itself.

    With tools: `ids` has what they returned, too, and `own` says which tokens the policy wrote; `text` is that of the
    last turn, `calls` what was called.
    """

    ids: list[int]
    ended: bool
    own: list[bool] | None = None
    text: str | None = None
    calls: tuple[Call, ...] = ()

    @property
    def written(self) -> list[bool]:
        """Of each token whether the policy wrote it."""
        return [True] * len(self.ids) if self.own is None else self.own


def shuffled(count: int, seed: int, number: int) -> list[int]:
    """0 … count - 1 in an order that follows from seed and number alone."""
    generator = torch.Generator().manual_seed((seed * 7919 + number) % 2**62)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def passes(count: int, first: int, wanted: int, seed: int) -> list[int]:
    """Places first … first + wanted - 1 of an endless row of shuffled passes over 0 … count - 1."""
    numbers = range(first // count, (first + wanted - 1) // count + 1)
    row = [index for number in numbers for index in shuffled(count, seed, number)]
    start = first - numbers.start * count
    return row[start : start + wanted]


def sample(
    policy: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    end_token_ids: list[int],
    temperature: float,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """One completion for each prompt, drawn from softmax(logits / temperature) and nothing else, in their order.

    Longest prompts first, `batch_size` at a time, with a KV cache; what all prompts of a batch begin with goes through
    the model once, and rows that have ended leave the batch where its cache lets them. `progress` is told how many are
    done. A function of weights, prompts,
    seed and batch_size (and of the way that decoding.py takes on a GPU); torch's random state is left alone. `generate`
    would keep ended rows until the last one is done, and drop the end token, an action of the policy like any other.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    found: dict[int, Sampled] = {}

    def run(rows: list[int]) -> None:
        chosen = [prompts[row] for row in rows]
        completions = _sample_batch(policy, chosen, max_new_tokens, end_token_ids, temperature, generator)
        found.update(zip(rows, completions, strict=True))
        if progress is not None:
            progress(len(found))

    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    with evaluation_mode(policy):
        in_batches([order[at : at + batch_size] for at in range(0, len(order), batch_size)], run, "sampling")
    return [found[row] for row in range(len(prompts))]


def _sample_batch(
    policy: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    end_token_ids: list[int],
    temperature: float,
    generator: torch.Generator,
) -> list[Sampled]:
    state = decoding.fastest(begin_rows(policy, prompts), max_new_tokens)
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the prompt that each row of the batch resumes from
    going = list(alive)  # those that have not ended
    finite = torch.ones((), dtype=torch.bool, device=policy.device)
    fresh: list[Tensor] = []  # (b, 1) each, drawn since the host last looked
    every = decoding.looks_every(policy.device)
    for at in range(max_new_tokens):
        logits = state.logits.float()
        # each row's largest: nan and inf show in it, while words that a model never writes may stand at -inf
        finite = finite & torch.isfinite(logits.amax(-1)).all()
        tokens = pick((logits / temperature).softmax(-1), generator)
        fresh.append(tokens)
        if len(fresh) == every or at + 1 == max_new_tokens:
            if not bool(finite):
                raise NumericsError("The policy's logits are not finite.", "Try a tenth of train.learning_rate.")
            ongoing = set(going)
            for row, new in zip(alive, torch.cat(fresh, dim=1).tolist(), strict=True):
                if row in ongoing:
                    written[row] += _up_to_end(new, end_token_ids)
            fresh = []
            going = [row for row in going if written[row][-1] not in end_token_ids]
            if not going or at + 1 == max_new_tokens:
                break
            ongoing = set(going)
            places = [place for place, row in enumerate(alive) if row in ongoing]
            if len(places) < len(alive) and state.keep(places):
                alive, tokens = going, tokens[places]
        state.step(tokens)
    return [Sampled(tokens, tokens[-1] in end_token_ids) for tokens in written]


def _up_to_end(tokens: list[int], end_token_ids: list[int]) -> list[int]:
    """The tokens as far as the first that ends them."""
    end = next((place for place, token in enumerate(tokens) if token in end_token_ids), len(tokens))
    return tokens[: end + 1]


class TokenStats(NamedTuple):
    """Of each completion token, (b, t) and 0 where masked: log-probability, entropy of its distribution, value."""

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None


def token_stats(policy: Any, rows: Rows, temperature: float, value: Any = None, *, entropy: bool = False) -> TokenStats:
    """Log-probabilities at the temperature of sampling; entropy and values (see rl/value.py) where they are wanted."""
    logits, hidden = states(policy, rows)
    logits = logits / temperature
    return TokenStats(
        rows.spread(token_logprobs(logits, rows.tokens)),
        rows.spread(entropy_from_logits(logits)) if entropy else None,
        rows.spread(value(policy, rows, hidden)) if value is not None else None,
    )


class Reference:
    """The policy as it was when this was made: `with reference():` the policy is it.

    A fresh adapter computes nothing yet, so the reference is the policy with the adapter off and costs no memory. An
    adapter that starts from a run, or a model trained in full, is kept as a second copy of the trained weights.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.trained = [parameter for _, parameter in named]
        ups = [parameter for name, parameter in named if ".lora_B." in name]
        self.is_adapter_off = is_adapter(policy) and not any(bool(parameter.any()) for parameter in ups)
        self.kept = [] if self.is_adapter_off else [parameter.detach().clone() for parameter in self.trained]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.is_adapter_off:
            with adapter(self.policy, None):
                yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        torch.clear_autocast_cache()  # it knows its casts by the parameter, not by the numbers that it holds
        for at, parameter in enumerate(self.trained):
            parameter.data, self.kept[at] = self.kept[at], parameter.data
