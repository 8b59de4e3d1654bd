"""The batch that costs most, tried before the first step: what does not fit into memory shows at once, not at the hour
at which the longest rows happen to come."""

from __future__ import annotations

import copy
from typing import Any

from finetune_kit import distributed
from finetune_kit.system.terminal import doing
from finetune_kit.training.batching import Passes, token_lengths
from finetune_kit.training.optimizer import optimizer_state
from finetune_kit.training.progress import hooks

# what the trainers count for their log, or keep from one batch to the next
COUNTED = ("_metrics", "_stored_metrics", "_total_train_tokens")


def trying_longest_batch(trainer: Any) -> Any:
    """A callback of transformers that takes the longest rows through the model, forward and backward, when training
    begins, and leaves everything as it was. Runs out of memory where the run would.

    Not for trainers that sample in groups, whose first step is as long as any, nor for a model cut into shards.
    """

    def on_train_begin(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not hasattr(args, "num_generations") and not distributed.sharding():
            with doing("trying the longest rows"):
                try_rows(trainer, longest_rows(trainer))

    return hooks(on_train_begin=on_train_begin)


def longest_rows(trainer: Any) -> list[dict[str, Any]]:
    """The rows of the largest pass: as many of the widest as go through the model at once, or, where passes are cut by
    tokens, those of the first epoch's largest one."""
    dataset = trainer.train_dataset
    if isinstance(dataset, Passes) and dataset.layout.sorts:
        places = max(dataset.layout.epoch(0), key=dataset.layout.slots)
    else:
        rows = dataset.rows if isinstance(dataset, Passes) else dataset
        longest = token_lengths(rows).longest
        count = trainer.args.per_device_train_batch_size
        places = sorted(range(len(longest)), key=lambda place: -longest[place])[:count]
    kept = dataset.rows if isinstance(dataset, Passes) else trainer._remove_unused_columns(dataset)
    return [kept[place] for place in places]


def try_rows(trainer: Any, rows: list[dict[str, Any]]) -> None:
    """One pass of the trainer over some rows, with the memory that gradients of an earlier pass and the optimizer's
    state will take beside it. No weight, random state or count is another one afterwards."""
    import torch

    model, device = trainer.model_wrapped, trainer.args.device
    counted = {name: copy.deepcopy(getattr(trainer, name)) for name in COUNTED if hasattr(trainer, name)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches, labels = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, device)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    taken = 0 if trainer.optimizer.state else optimizer_state(model, trainer.args.optim)
    states = torch.empty(taken, dtype=torch.uint8, device=device)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
            if trainer.args.gradient_accumulation_steps > 1:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            trainer.training_step(model, batches[0], labels)
    finally:
        del states
        model.zero_grad(set_to_none=True)
        for name, value in counted.items():
            setattr(trainer, name, value)
