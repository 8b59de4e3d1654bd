"""Generated tokens a second on the embedded model: batched against one by one, PPO's sampling with and without a cache.

    python benchmarks/generation.py [--prompts 32] [--new 48]
    python benchmarks/generation.py --shape 0.6B    # on a GPU: ours against plain transformers.generate
    python benchmarks/generation.py --shape tiny    # that the comparison runs; its figures say nothing

All take turns twice on the same prompts; the first turn warms up and is not counted. Without a cache every new token
sends the whole row through the model again; without shared beginnings each prompt goes through whole.

With a shape: random weights, 64 prompts of 128 random tokens, 128 new ones each, greedy and sampled, in bfloat16 on a
GPU. Ours is `generate`, which evaluation uses, and PPO's sampling; on a GPU the first turn has the proof and the
recording in it, and each batch of the second is recorded again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--new", type=int)
    parser.add_argument("--width", type=int, default=128, help="tokens of a prompt, with a shape")
    parser.add_argument("--shape", choices=("8B", "0.6B", "tiny"), help="random weights of this shape")
    arguments = parser.parse_args()
    if arguments.shape:
        beside_transformers(arguments.shape, arguments.prompts or 64, arguments.width, arguments.new or 128)
        return
    arguments.prompts, arguments.new = arguments.prompts or 32, arguments.new or 48

    from finetune_kit.data.chat import end_token_ids, render_prompt
    from finetune_kit.data.tasks import task_rows
    from finetune_kit.generation.generate import generate
    from finetune_kit.models.load import load_base
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.schema import ModelConfig

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


def beside_transformers(shape: str, count: int, width: int, new: int) -> None:
    """Tokens a second of ours and of transformers' own generate, in turns on the same prompts."""
    import torch
    from gpu_trl import SHAPES, card
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from finetune_kit.generation.generate import generate
    from finetune_kit.models.device import device
    from finetune_kit.models.tiny import write_tiny_model
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.rl.rollout import sample
    from finetune_kit.settings.schema import ModelConfig

    where = device()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        tokenizer = load_tokenizer(ModelConfig(name_or_path=folder))
        tiny = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[shape]) if SHAPES[shape] else tiny
    with torch.device(where):
        dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # so that it is not unsure of everything
    prompts = torch.randint(10, 250, (count, width), generator=torch.Generator().manual_seed(0)).tolist()

    def plain(**more: Any) -> list[list[int]]:
        wanted = GenerationConfig(max_new_tokens=new, pad_token_id=0, eos_token_id=None, **more)
        ids = torch.tensor(prompts, device=where)
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)[:, width:].tolist()

    def ours(**more: Any) -> list[list[int]]:
        given = {"max_new_tokens": new, "end_token_ids": [], "batch_size": count}
        return [completion.ids for completion in generate(model, tokenizer, prompts, **given, **more)]

    def rollout() -> list[list[int]]:
        given = {"max_new_tokens": new, "end_token_ids": [], "batch_size": count}
        return [row.ids for row in sample(model, prompts, **given, temperature=1.0, seed=0)]

    ways = {
        "transformers, greedy": lambda: plain(do_sample=False),
        "ours, greedy": ours,
        "transformers, sampled": lambda: plain(do_sample=True, top_k=0),
        "ours, sampled": lambda: ours(do_sample=True, seed=0),
        "ours, PPO's rollout": rollout,
    }
    rates: dict[str, float] = {}
    drawn: dict[str, list[list[int]]] = {}
    print(f"{card(where.type)}, {shape}: {count} prompts of {width} tokens, {new} new")
    for turn in range(2):
        for name, draw in ways.items():
            started = time.perf_counter()
            drawn[name] = draw()
            seconds = time.perf_counter() - started
            rates[name] = count * new / seconds
            if turn:
                beside = rates[name] / rates[f"transformers, {'greedy' if 'greedy' in name else 'sampled'}"]
                each = 1000 * seconds / new
                print(f"{name:22s}: {rates[name]:9,.0f} tokens/s, {each:6.2f} ms a token of all, {beside:5.2f} times")
    one, other = drawn["transformers, greedy"], drawn["ours, greedy"]
    same = sum(a == b for row, beside in zip(one, other, strict=True) for a, b in zip(row, beside, strict=True))
    print(f"equal greedy tokens: {same} of {count * new}")


def rollouts(model: Any, prompts: list[list[int]], ends: list[int], new: int) -> None:
    """PPO's sampling, nearly greedy so that all ways draw the same tokens, and what goes through the layers."""
    from finetune_kit.generation import cache
    from finetune_kit.rl import rollout

    through: list[int] = []
    layers = model.base_model  # both ways of sampling come by here
    layers.register_forward_pre_hook(lambda m, a, kwargs: through.append(kwargs["input_ids"].numel()), with_kwargs=True)
    share = cache.common_beginning
    given: dict[str, Any] = {"max_new_tokens": new, "end_token_ids": ends, "temperature": 1e-5, "seed": 0}

    def cached(beginnings: Any) -> list[list[int]]:
        cache.common_beginning = beginnings
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
