"""How many rows and optimizer steps a run has, as its trainer counts them."""

from __future__ import annotations

import math

from finetune_kit.data.load import Data
from finetune_kit.errors import DataError
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.training.batching import micro_batch


def steps(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, int]:
    """Rows and optimizer steps, as the trainer counts them.

    A step of PPO is an update of `batch_size` prompts. GRPO and RLOO count the completions of a prompt as rows, and
    leave out the last step of an epoch where it would not be whole. Raises DataError where none is.
    """
    train = config.train
    group = config.num_generations
    rows = len(data.train) * (group or 1)
    if isinstance(update := config.batch_size, int):
        updates = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * rows / update)
        an_epoch = math.ceil(rows / update)
        return {"rows_in_an_epoch": rows, "rows_in_a_step": update, "steps_in_an_epoch": an_epoch, "steps": updates}
    if data.packed:  # best-fit packing comes within a few percent of full rows
        rows = math.ceil(data.ledger.train.tokens / config.data.max_length)
    together = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
    an_epoch = rows // together if group else math.ceil(rows / together)
    if group and not an_epoch:
        raise _no_whole_step(config, len(data.train), group, together, processes)
    total = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)
    return {
        "rows_in_an_epoch": rows,
        "rows_in_a_step": together,
        "passes_in_a_step": micro_batch(train, data, processes)[1],
        "steps_in_an_epoch": an_epoch,
        "steps": total,
    }


def _no_whole_step(config: RecipeConfig, prompts: int, group: int, together: int, processes: int) -> DataError:
    """The error of a trainer of groups that would leave every step out, and train nothing."""
    train = config.train
    passes = train.gradient_accumulation_steps * processes
    whole = group // math.gcd(group, train.gradient_accumulation_steps)
    fits = prompts * group // passes // whole * whole
    fewer = f"Set train.per_device_train_batch_size={fits}, or give" if fits else "Give"
    return DataError(
        f"{prompts} training prompts have {prompts * group} completions (num_generations={group}), and a step takes "
        f"{together}: none would be whole, and nothing trained.",
        f"{fewer} {-(-together // group)} prompts or more.",
    )
