"""Prompts and rewards in the form that TRL's GRPO and RLOO trainers take."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

from finetune_kit.data.load import Data
from finetune_kit.data.records import prompt_of
from finetune_kit.errors import NumericsError, SettingsError
from finetune_kit.generation.toolbox import Toolbox
from finetune_kit.rewards.sources import Part, Rewards, checked
from finetune_kit.rl.tool_rollouts import call_figures, check_template, sample_with_tools
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import doing
from finetune_kit.training.progress import console, hooks

TRAINED_ROW = "trained_row"  # a key of a prompt's turns
MOST_CONSTANT = 5  # logged steps
ALIKE = (
    "Take a reward in smaller steps, an easier task, a higher temperature, or train with lora_sft first: "
    "lora.init_from=… resumes from there. See docs/ppo.md."
)


def prompt_rows(data: Data) -> Any:
    """Columns prompt (a list of turns) and row (index into data.train_records), a datasets.Dataset.

    Each turn says which row of data.train it is of, by which `rendering_rows` finds its tokens.
    """
    prompts = []
    for at, row in enumerate(data.train["row"]):
        turns = prompt_of(data.train_records[row])
        prompts.append([{"role": turn["role"], "content": turn["content"], TRAINED_ROW: at} for turn in turns])
    return type(data.train).from_dict({"prompt": prompts, "row": data.train["row"]})


def rendering_rows(tokenizer: Any, data: Data) -> Any:
    """A copy of the tokenizer for TRL's trainers that renders the prompts of `prompt_rows` to the tokens of data.train.

    TRL's trainers render the turns themselves, in a batch, by the tokenizer that they are given: without the row's
    tools, and with tokens for what is text (see data.special). All else the copy does as the tokenizer does.
    """
    served = copy.copy(tokenizer)
    plain = tokenizer.apply_chat_template

    def apply_chat_template(conversation: Any, *given: Any, **more: Any) -> Any:
        rows = [turns[0].get(TRAINED_ROW) for turns in conversation if isinstance(turns, list) and turns]
        if not rows or None in rows:
            return plain(conversation, *given, **more)
        found = data.train.select(rows)["prompt_ids"]
        return {"input_ids": [list(ids) for ids in found], "attention_mask": [[1] * len(ids) for ids in found]}

    served.apply_chat_template = apply_chat_template
    return served


def reward_functions(rewards: Rewards, data: Data) -> list[Callable[..., list[float | None]]]:
    """One function for each reward, as TRL calls it, named as in the log; their weights are `rewards`' own."""
    return [_function(part, data, part is rewards.parts[0]) for part in rewards.parts]


def _function(part: Part, data: Data, first: bool) -> Callable[..., list[float | None]]:
    def score(prompts: list[Any], completions: list[Any], row: list[int], **other: Any) -> list[float | None]:
        texts = other.pop("answers", None) or [str(turns[0]["content"]) for turns in completions]
        if first and "calls" in other:
            for name, number in call_figures(other["calls"]).items():
                other["log_metric"](name, number)
        records = [data.train_records[index] for index in row]
        last = [str(turns[-1]["content"]) for turns in prompts]
        return [None if math.isnan(found) else found for found in checked(part, last, texts, records, **other)]

    score.__name__ = part.name
    return score


def tool_rollouts(tokenizer: Any, data: Data, toolbox: Toolbox | None, config: RecipeConfig) -> Any:
    """GRPO's `rollout_func`: completions that call tools; None without tools. `config`: of the recipe.

    Beside what TRL asks for it gives `env_mask` (1: the policy's own token), and `answers` and `calls` for rewards. The
    seed is drawn from torch's state, which a checkpoint keeps. TRL's own `tools` would run in this process, without a
    limit. Raises SettingsError for a template that cannot be trained with calls.
    """
    if toolbox is None:
        return None
    check_template(tokenizer, toolbox)

    def roll_out(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        import torch

        rows = [turns[0][TRAINED_ROW] for turns in prompts]
        sampled = sample_with_tools(
            trainer.model,
            tokenizer,
            data,
            rows,
            toolbox,
            max_new_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            seed=int(torch.randint(2**62, (1,))),
            batch_size=config.evaluate.batch_size,
        )
        return {
            "prompt_ids": [list(ids) for ids in data.train.select(rows)["prompt_ids"]],
            "completion_ids": [completion.ids for completion in sampled],
            "logprobs": None,  # the trainer computes them, of the same tokens
            "env_mask": [[int(is_own) for is_own in completion.written] for completion in sampled],
            "answers": [completion.text for completion in sampled],
            "calls": [list(completion.calls) for completion in sampled],
        }

    return roll_out


def reward_watchdog() -> Any:
    """A callback of transformers that stops a run whose rewards tell no completions of a prompt apart, and says it
    where they once did: without a difference in a group there is no advantage, and no gradient but that of the KL.

    Raises NumericsError after MOST_CONSTANT logged steps from the start.
    """
    seen = {"constant": 0, "varied": 0}

    def on_log(args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        share = (logs or {}).get("frac_reward_zero_std")
        if share is None:
            return
        seen["constant"] = seen["constant"] + 1 if share >= 1 else 0
        seen["varied"] += share < 1
        if seen["constant"] != MOST_CONSTANT:
            return
        said = (
            f"All completions of each prompt scored alike in {MOST_CONSTANT} logged steps in a row, up to step "
            f"{state.global_step}: nothing can be learned from that"
        )
        if not seen["varied"]:
            raise NumericsError(f"{said}.", ALIKE)
        console.print(f"note: {said} any more", markup=False)

    return hooks(on_log=on_log)


def sample_here(policy: Any) -> None:
    """Let `policy.generate`, by which TRL's trainers sample, decode as evaluation does (decoding.py).

    TRL's own settings do not lead there: continuous batching rounds the trained weights to bfloat16 for good, and with
    cache_implementation=static TRL switches compiling off, so that nothing is recorded. Where train.extra sets one of
    them, that one acts. On a CPU nothing changes.
    """
    from finetune_kit.generation import decoding

    plain = policy.generate

    def generate(*given: Any, **more: Any) -> Any:
        wanted = more.get("generation_config")
        streams = "streamer" in more or "custom_generate" in more
        ours = {} if wanted is None or streams else decoding.through_graphs(policy, wanted)
        # not in evaluation, which says itself how far it is
        with doing("sampling completions") if policy.training else contextlib.nullcontext():
            return plain(*given, **more, **ours)

    policy.generate = generate


def check_groups(config: RecipeConfig, num_generations: int) -> None:
    """Raises SettingsError where a step's completions are not whole groups of `num_generations`, or eval_steps is set:
    prompts have no held-out loss."""
    train = config.train
    if train.eval_steps is not None:
        raise SettingsError("train.eval_steps has no effect: prompts have no held-out loss.", "Leave it out.")
    rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    if rows % num_generations:
        near = max(1, round(rows / num_generations)) * num_generations
        raise SettingsError(
            f"A step has {rows} completions, which are not whole groups of num_generations={num_generations}.",
            f"Set train.per_device_train_batch_size={near}, or another num_generations.",
        )
