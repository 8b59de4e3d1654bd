"""One of two processes: a PPO run of 2 updates, then one in which the second process's reward raises."""

import sys
from pathlib import Path
from typing import Any

from finetune_kit.errors import FinetuneKitError
from tests.rl.fixtures import lower, trainer

home = Path(sys.argv[1])
made = trainer(home, "value_model=adapter")
rank = made.accelerator.process_index
prompts = made._next_prompts()
made.train()
moved = sum(float(parameter.double().abs().sum()) for parameter in made.trained.values())
print(f"RANK {rank} PROMPTS {prompts} WEIGHTS {moved:.17g}", flush=True)


def broken(prompts: Any, completions: Any, records: Any) -> list[float]:
    if rank == 1:
        raise KeyError("answer")
    return lower(prompts, completions, records)


try:
    trainer(home, f"output_dir={home / 'broken'}", score=broken).train()
except FinetuneKitError as error:
    print(f"RANK {rank} STOPPED {error.message}", flush=True)
made.accelerator.end_training()
