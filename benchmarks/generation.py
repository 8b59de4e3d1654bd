"""Generated tokens a second on the embedded model: batched against one by one, PPO's sampling with and without a cache.

    python benchmarks/generation.py [--prompts 32] [--new 48]

All take turns twice on the same prompts; the first turn warms up and is not counted. Without a cache every new token
sends the whole row through the model again; without shared beginnings each prompt goes through whole.
"""

from __future__ import annotations

import argparse
import time
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=48)
    arguments = parser.parse_args()

    from finetune_kit.config import ModelConfig
    from finetune_kit.data.chat import end_token_ids, render_prompt
    from finetune_kit.data.tasks import task_rows
    from finetune_kit.generation import generate
    from finetune_kit.model.load import load_base, load_tokenizer

    tokenizer, model = load_tokenizer(ModelConfig()), load_base(ModelConfig())
    rows = task_rows("word_sequence_reversal", arguments.prompts, 7)
    prompts = [render_prompt(tokenizer, row.messages[:-1]) for row in rows]
    ends = end_token_ids(tokenizer)
    answers: dict[int, list[list[int]]] = {}
    for turn in range(2):
        for batch in (1, arguments.prompts):
            started = time.perf_counter()
            done = generate(
                model, tokenizer, prompts, max_new_tokens=arguments.new, end_token_ids=ends, batch_size=batch
            )
            seconds = time.perf_counter() - started
            answers[batch] = [completion.ids for completion in done]
            tokens = sum(map(len, answers[batch]))
            if turn:
                print(f"batch {batch:3d}: {tokens} tokens in {seconds:5.1f} s, {tokens / seconds:6.1f} tokens/s")
    same = sum(map(list.__eq__, answers[1], answers[arguments.prompts]))
    print(f"equal answers: {same} of {arguments.prompts}")
    rollouts(model, prompts, ends, arguments.new)


def rollouts(model: Any, prompts: list[list[int]], ends: list[int], new: int) -> None:
    """PPO's sampling, nearly greedy so that all ways draw the same tokens, and what goes through the layers."""
    from finetune_kit.rl import rollout

    through: list[int] = []
    layers = model.base_model  # both ways of sampling come by here
    layers.register_forward_pre_hook(lambda m, a, kwargs: through.append(kwargs["input_ids"].numel()), with_kwargs=True)
    share = rollout.common_beginning
    given: dict[str, Any] = {"max_new_tokens": new, "end_token_ids": ends, "temperature": 1e-5, "seed": 0}

    def cached(beginnings: Any) -> list[list[int]]:
        rollout.common_beginning = beginnings
        return [row.ids for row in rollout.sample(model, prompts, batch_size=len(prompts), **given)]

    ways = {
        "cache, shared beginnings": lambda: cached(share),
        "cache": lambda: cached(lambda policy, prompts: 0),
        "no cache": lambda: uncached(model, prompts, ends, new),
    }
    drawn = {}
    for turn in range(2):
        for name, draw in ways.items():
            through.clear()
            started = time.perf_counter()
            drawn[name] = draw()
            seconds, tokens = time.perf_counter() - started, sum(map(len, drawn[name]))
            if turn:
                rate, count = tokens / seconds, sum(through)
                print(
                    f"{name:25s}: {tokens} tokens in {seconds:5.1f} s, {rate:6.1f} tokens/s, {count} through the layers"
                )
    same = sum(map(list.__eq__, drawn["no cache"], drawn["cache, shared beginnings"]))
    print(f"equal samples: {same} of {len(prompts)}")


def uncached(model: Any, prompts: list[list[int]], ends: list[int], new: int) -> list[list[int]]:
    """Greedy completions with their end tokens; rows that have ended are left out."""
    import torch

    rows, going = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    for _ in range(new):
        width = max(len(rows[row]) for row in going)
        ids, mask = torch.zeros(len(going), width, dtype=torch.long), torch.zeros(len(going), width, dtype=torch.long)
        for place, row in enumerate(going):
            ids[place, : len(rows[row])], mask[place, : len(rows[row])] = torch.tensor(rows[row]), 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = model.get_output_embeddings()(hidden[torch.arange(len(going)), mask.sum(1) - 1])
        for row, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            rows[row].append(token)
        going = [row for row in going if rows[row][-1] not in ends]
        if not going:
            break
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


if __name__ == "__main__":
    main()
