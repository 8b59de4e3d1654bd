"""Generated tokens a second, batched against one by one, on the embedded model: the same prompts, the same answers.

    python benchmarks/generation.py [--prompts 32] [--new 48]

The two take turns twice; the first turn warms up and is not counted.
"""

from __future__ import annotations

import argparse
import time


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


if __name__ == "__main__":
    main()
