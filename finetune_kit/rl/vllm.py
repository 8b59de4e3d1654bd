"""Sampling by vLLM instead of `rollout.sample`: the same arguments in, the same completions out.

vLLM keeps the base; the policy's adapter is saved before each update's sampling and given to it under a new number,
which is how vLLM itself wants changed adapters. Log-probabilities are still the policy's own: what vLLM computes in
other kernels is used for drawing only.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.device import device
from finetune_kit.models.source import resolve_name
from finetune_kit.rl.rollout import Sampled
from finetune_kit.settings.schema import ModelConfig

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes as max_lora_rank


def sampler(
    policy: Any, model: ModelConfig, *, longest: int, gpu_memory_utilization: float, processes: int
) -> Callable[..., list[Sampled]]:
    """A function like `rollout.sample`. `longest`: tokens of a prompt with its completion.

    Raises SettingsError for a policy that vLLM cannot be given after each update, ResourceError without vLLM.
    """
    if device().type != "cuda":
        raise SettingsError(f"use_vllm=true needs a GPU; this run is on {device().type}.", "Leave it out.")
    if not is_adapter(policy) or policy.active_peft_config.peft_type.value != "LORA" or model.load_in_4bit:
        raise SettingsError(
            "use_vllm=true needs a LoRA policy on a base that is not quantised: its adapter is what vLLM is given.",
            "Leave it out: the policy then samples by itself.",
        )
    if processes > 1:
        raise SettingsError("use_vllm=true works with one process.", "Leave it out, or start one process.")
    if importlib.util.find_spec("vllm") is None:
        raise ResourceError("use_vllm=true needs vLLM, which is not installed.", "pip install 'finetune-kit[vllm]'")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=resolve_name(model.name_or_path),
        revision=model.revision,
        dtype=str(policy.dtype).removeprefix("torch."),
        enable_lora=True,
        max_lora_rank=next(rank for rank in RANKS if rank >= policy.active_peft_config.r),
        max_model_len=longest,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    numbers = itertools.count(1)

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
        """See rollout.sample; vLLM batches by itself, so batch_size and progress have no part in it."""
        settings = [
            SamplingParams(
                temperature=temperature,
                max_tokens=max_new_tokens,
                stop_token_ids=end_token_ids,
                ignore_eos=True,  # the ends are ours alone
                seed=own,
                detokenize=False,
            )
            for own in row_seeds(seed, len(prompts))
        ]
        number = next(numbers)
        with tempfile.TemporaryDirectory() as folder:
            active = policy.active_adapter
            policy.save_pretrained(folder, selected_adapters=[active], save_embedding_layers=False)
            where = Path(folder) if active == "default" else Path(folder) / active
            request = LoRARequest(f"policy_{number}", number, str(where))
            given = [{"prompt_token_ids": prompt} for prompt in prompts]
            answers = engine.generate(given, settings, lora_request=request, use_tqdm=False)
        return [_sampled(answer.outputs[0], end_token_ids) for answer in answers]

    return sample


def row_seeds(seed: int, count: int) -> list[int]:
    """A seed for each row, drawn from `seed`. `seed + row` would give rows of two updates the same one."""
    import torch

    generator = torch.Generator().manual_seed(seed % 2**63)
    seeds: list[int] = torch.randint(2**63 - 1, (count,), generator=generator).tolist()
    return seeds


def _sampled(output: Any, end_token_ids: list[int]) -> Sampled:
    """vLLM's completion with its end token, which is an action of the policy like any other."""
    ids = list(output.token_ids)
    ended = output.finish_reason == "stop"
    if ended and (not ids or ids[-1] not in end_token_ids):
        ids.append(output.stop_reason if output.stop_reason in end_token_ids else end_token_ids[0])
    return Sampled(ids, ended)
