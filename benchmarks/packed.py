"""The packed forward beside the padded one: one batch, the same weights, forward and backward in turns.

    python benchmarks/packed.py [--rounds 2] [--rows 8]

SmolLM2-135M with an adapter of rank 16 on all linear layers, TRL's own loss, rows of the default task.
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
    arguments = parser.parse_args()

    import torch
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    from finetune_kit.config import DataConfig, LoraConfig, ModelConfig
    from finetune_kit.data.load import load_data
    from finetune_kit.model import packed
    from finetune_kit.model.load import load_policy, load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    data = load_data(DataConfig(), "prompt_completion", tokenizer)
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(list(data.train.select(range(arguments.rows))))
    policies = {name: load_policy(ModelConfig(), LoraConfig()) for name in ("padded", "packed")}
    for name, policy in policies.items():
        add_fused_lm_head(policy.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
        torch.manual_seed(0)
        for key, parameter in policy.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.02)
        if name == "packed" and (reason := packed.enable(policy)):
            raise SystemExit(reason)
    plan = packed.make_plan(batch["input_ids"], batch["attention_mask"], share=True)
    slots, real = batch["input_ids"].numel(), int(batch["attention_mask"].sum())
    print(f"{slots} slots, {real} tokens, {len(plan.tokens)} of them through the layers when packed")
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    found: dict[str, tuple[float, Any]] = {}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for name, policy in policies.items():
            policy.train().zero_grad()
            started = time.perf_counter()
            outputs = policy(**batch, fused_lm_head=True, use_cache=False)
            loss = -outputs.log_probs.sum() / (batch["labels"] != -100).sum()
            loss.backward()
            if turn:
                seconds[name].append(time.perf_counter() - started)
            gradients = [parameter.grad.flatten() for parameter in policy.parameters() if parameter.grad is not None]
            found[name] = loss.item(), torch.cat(gradients)
    for name, taken in seconds.items():
        print(f"{name}: {statistics.median(taken):.2f} s a step, {real / statistics.median(taken):.0f} tokens/s")
    (one, padded), (other, gradient) = found["padded"], found["packed"]
    relative = float((padded - gradient).norm() / padded.norm())
    print(f"loss {one:.6f} and {other:.6f}, gradients differ by {relative:.1e} of their norm")


if __name__ == "__main__":
    main()
