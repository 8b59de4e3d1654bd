"""The table of docs/scale.md on many rows: CPU time and memory to prepare rows, and to find them again.

    python benchmarks/data.py [--rows 10000 100000] [--seed 0]

Chat rows of about 115 words, as long as GSM8K's, are generated; the tokenizer is the embedded model's. Each line is a
process of its own, and says what it needs beyond its start, with everything imported: `map` is `datasets.map` with the
chat template, which checks nothing; `first` is `load_data` on a file that it has not seen, `again` on one that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "he",
    "has",
    "buys",
    "12",
    "37",
    "405",
    "apples",
    "tickets",
    "hours",
    "each",
    "more",
]
HEAD = """| rows | who | CPU ms a row | CPU s in all | wall s | MB beyond the start | tokens |
| --- | --- | --- | --- | --- | --- | --- |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["map", "first", "again"])
    parser.add_argument("--child", nargs=2, metavar=("WHO", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for count in arguments.rows:
            path = write_rows(Path(scratch) / f"{count}.jsonl", count, arguments.seed)
            for who in arguments.only:
                print(line(count, who, child(who, path, Path(scratch))), flush=True)
            path.unlink()


def write_rows(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            said = [" ".join(draw.choices(WORDS, k=words)) for words in (draw.randint(20, 70), draw.randint(30, 110))]
            file.write(
                json.dumps({"question": f"Case {number}: {said[0]}?", "answer": f"{said[1]}\n#### {number}"}) + "\n"
            )
    return path


def child(who: str, path: Path, scratch: Path) -> dict[str, float]:
    from finetune_kit.models.embedded import cache_folder, embedded_folder

    model = embedded_folder()  # once, outside of what is measured
    own = scratch / "cache"
    own.mkdir(exist_ok=True)
    if not (own / model.name).exists():
        (own / model.name).symlink_to(model)
    assert own != cache_folder()
    places = {"FINETUNE_KIT_CACHE": str(own), "HF_HOME": str(scratch / "hub"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", who, str(path)]
    done = subprocess.run(command, env={**os.environ, **places}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(who: str, path: str) -> dict[str, float]:
    import datasets

    from finetune_kit.data.load import load_data
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.schema import DataConfig, ModelConfig

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(ModelConfig())
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    memory, cpu, wall = peak(), time.process_time(), time.perf_counter()
    if who == "map":
        rows = datasets.Dataset.from_json(path).map(lambda row: {"input_ids": rendered(tokenizer, row)})
        tokens = int(sum(chunk.value_lengths().sum().as_py() for chunk in rows.data.column("input_ids").chunks))
    else:
        ledger = load_data(DataConfig(path=path), "prompt_completion", tokenizer).ledger
        tokens = ledger.train.tokens + ledger.held_out.tokens
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "memory": peak() - memory,
        "tokens": tokens,
    }


def rendered(tokenizer: object, row: dict[str, str]) -> list[int]:
    turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)  # type: ignore[attr-defined,no-any-return]


def peak() -> float:
    """MB, the most that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def line(count: int, who: str, found: dict[str, float]) -> str:
    each = f"{found['cpu'] / count * 1000:.3f}"
    seconds = [f"{found[name]:.1f}" for name in ("cpu", "wall")]
    cells = (f"{count:,}", who, each, *seconds, f"{found['memory']:.0f}", f"{found['tokens']:,.0f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
