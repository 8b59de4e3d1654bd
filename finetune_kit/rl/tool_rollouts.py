"""Rollouts that call tools: the loop of evaluation (generation/tool_loop.py) with tokens drawn as the policy has them.

What a tool returned is in a rollout's text and no action of the policy: it has no log-probability, no KL, no entropy,
no advantage and no gradient, and what the policy wrote after it is looked at with it in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from finetune_kit.data.calls import syntax_of
from finetune_kit.data.chat import after_calls
from finetune_kit.data.load import Data
from finetune_kit.data.records import Message, prompt_of
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.generation.generate import Call
from finetune_kit.generation.tool_loop import Answer, Draw, answer_with_tools, sampling, turns_of
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.rl.rollout import Sampled

REWRITES = SettingsError(
    "tools: the model's chat template writes earlier turns otherwise once a tool has answered, so a rollout with calls "
    "is not one text that a policy could be trained on.",
    "Use another model or template (data.chat_template_kwargs may turn thoughts off), or leave tools out.",
)


def check_template(tokenizer: Any, toolbox: Toolbox) -> None:
    """Raises SettingsError for a template that rewrites turns behind a call, DataError where calls cannot be read."""
    syntax_of(tokenizer, toolbox.kwargs)
    before: list[Message] = [{"role": "user", "content": "1 + 1?"}]
    for _ in range(2):
        answer, results = turns_of("", [Call(next(iter(toolbox.tools)), {}, "2", True, True, 0.0)])
        if not after_calls(tokenizer, before, answer, results, toolbox.schemas, toolbox.kwargs, toolbox.in_text)[1]:
            raise REWRITES
        before = [*before, answer, *results]


def sample_with_tools(
    policy: Any,
    tokenizer: Any,
    data: Data,
    rows: Sequence[int],
    toolbox: Toolbox,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Sampled]:
    """A completion for each of some rows of `data.train`, in their order, drawn from softmax(logits / temperature).

    `max_new_tokens`: of the policy's own, in all turns of a completion together. Rows of a batch wait for each other's
    tools, so that what is drawn follows from weights, prompts, seed and what the tools return. Raises NumericsError
    for logits that are not finite, SettingsError where the template rewrites a turn.
    """
    records = [data.train_records[data.train[row]["row"]] for row in rows]
    answers = answer_with_tools(
        policy,
        tokenizer,
        [(prompt_of(record), record.tools) for record in records],
        toolbox,
        max_new_tokens=max_new_tokens,
        end_token_ids=data.end_token_ids,
        batch_size=batch_size,
        draw=_finite(sampling(seed=seed, temperature=temperature)),
        positions=getattr(policy.config.get_text_config(), "max_position_embeddings", None),
        progress=progress,
        in_step=True,
    )
    return [_sampled(answer, record.where) for answer, record in zip(answers, records, strict=True)]


def _finite(draw: Draw) -> Draw:
    def checked(logits: torch.Tensor, rows: list[list[int]]) -> list[int]:
        if not bool(torch.isfinite(logits.sum())):
            raise NumericsError("The policy's logits are not finite.", "Try a tenth of train.learning_rate.")
        return draw(logits, rows)

    return checked


def _sampled(answer: Answer, where: str) -> Sampled:
    """An answer as far as the policy's last token: what a tool returned behind it is read by nothing."""
    if not any(answer.own):
        raise DataError(f"{where}: {REWRITES.message.removeprefix('tools: ')}", REWRITES.fix)
    end = max(at for at, is_own in enumerate(answer.own) if is_own) + 1
    return Sampled(answer.after[:end], answer.ended, answer.own[:end], answer.text, tuple(answer.calls))


def call_figures(calls: Sequence[Sequence[Call]]) -> dict[str, float]:
    """For the log, by TRL's names: calls a completion, and the share of calls that failed (0 where there is none)."""
    made = [call for row in calls for call in row]
    failed = sum(not call.ok for call in made) / len(made) if made else 0.0
    return {"tools/call_frequency": len(made) / max(1, len(calls)), "tools/failure_frequency": failed}
