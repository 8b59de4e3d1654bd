"""The packed forward beside the padded one: the same batches and weights, forward and backward in turns.

    python benchmarks/packed.py [--rounds 2] [--rows 8] [--compile]

SmolLM2-135M with an adapter of rank 16 on all linear layers, TRL's own loss, other rows of the task in each turn.
`--compile`: packed once more, with each layer compiled by torch for any length.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    from finetune_kit.data.load import load_data
    from finetune_kit.models.load import load_policy
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.packing import forward
    from finetune_kit.settings.schema import DataConfig, LoraConfig, ModelConfig

    tokenizer = load_tokenizer(ModelConfig())
    data = load_data(DataConfig(), "prompt_completion", tokenizer)
    collate, turns = DataCollatorForLanguageModeling(tokenizer.pad_token_id), range(arguments.rounds + 1)
    batches = [
        collate(list(data.train.select(range(turn * arguments.rows, (turn + 1) * arguments.rows)))) for turn in turns
    ]
    ways = ["padded", "packed", *(["compiled"] if arguments.compile else [])]
    policies = {way: load_policy(ModelConfig(), LoraConfig()) for way in ways}
    for name, policy in policies.items():
        add_fused_lm_head(policy.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
        torch.manual_seed(0)
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        if name != "padded" and (reason := forward.enable(policy, own_head=True)):
            raise SystemExit(reason)
        if name == "compiled":
            for layer in policy.get_base_model().model.layers:
                layer.compile(dynamic=True)
    where = policies["padded"].device
    masks = [batch["attention_mask"] for batch in batches]
    plans = [forward.make_plan(batch["input_ids"], batch["attention_mask"], share=True) for batch in batches]
    slots, real, unique = (
        sum(mask.numel() for mask in masks),
        int(sum(map(torch.sum, masks))),
        sum(len(plan.tokens) for plan in plans),
    )
    print(f"{slots} slots, {real} tokens, {unique} of them through the layers when packed")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, tuple[float, Any]] = {}
    for batch in batches:
        for name, policy in policies.items():
            policy.train().zero_grad()
            given = {name: part.to(where) for name, part in batch.items()}
            wait(where)
            started = time.perf_counter()
            outputs = policy(**given, fused_lm_head=True, use_cache=False)
            loss = -outputs.log_probs.sum() / (given["labels"] != -100).sum()
            loss.backward()
            wait(where)
            seconds[name].append(time.perf_counter() - started)
            gradients = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]
            found[name] = loss.item(), torch.cat(gradients)
    for name, (first, *others) in seconds.items():  # the first warms up
        print(f"{name}: {statistics.median(others):.2f} s a step, the first {first:.2f} s")
    (one, padded), (other, gradient) = found["padded"], found["packed"]
    relative = float((padded - gradient).norm() / padded.norm())
    print(f"loss {one:.6f} and {other:.6f}, gradients differ by {relative:.1e} of their norm")


def wait(device: Any) -> None:
    """Until a GPU has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
