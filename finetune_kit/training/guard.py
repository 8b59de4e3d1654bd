"""Keeps numbers that are not finite out of the weights: they are found before the optimizer moves anything.

train.on_nonfinite says what then: stop; skip, the step moves nothing; rollback, weights and optimizer are taken back to
the last checkpoint, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import NumericsError, SettingsError
from finetune_kit.models.adapters import restore
from finetune_kit.packing import attention
from finetune_kit.training import checkpoint
from finetune_kit.training.progress import console, hooks

CAUSES = "Likely causes: a learning_rate too high, float16 overflow, a broken row. Try a tenth of train.learning_rate."
MOST_IN_A_ROW = 3  # steps without a move after which a run that skips them stops
MOST_NAMED = 8  # rows in a message


def guard_callback(guard: Guard) -> Any:
    """The guard as a callback of transformers."""
    return hooks(
        on_train_begin=guard.on_train_begin,
        on_step_begin=guard.on_step_begin,
        on_pre_optimizer_step=guard.on_pre_optimizer_step,
        on_step_end=guard.on_step_end,
        on_epoch_end=guard.on_epoch_end,
        on_log=guard.on_log,
    )


def finite(tensors: Iterable[Any]) -> Any:
    """Whether every number in some tensors is finite: (), bool, on their device, which nobody waits for here."""
    import torch

    found = list(tensors)
    if not found:
        return torch.tensor(True)
    # a NaN or an infinity anywhere makes its own norm NaN or infinite
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(found)])
    well = torch.isfinite(norms).all()
    return well.full_tensor() if hasattr(well, "full_tensor") else well  # of shards


def everywhere(accelerator: Any, well: Any) -> bool:
    """Whether what `finite` found holds in every process; each of them has to ask. The host waits here, once."""
    if accelerator.num_processes > 1:
        well = accelerator.reduce(1 - well.float(), reduction="sum") == 0
    return bool(well)


class Guard:
    """Watches a trainer of transformers by its events; see the module.

    `skipped`: steps that moved nothing. Raises NumericsError at the first one with `stop`, after MOST_IN_A_ROW else,
    where rollback has no checkpoint to go back to, and for weights that are not finite: they are not saved.
    A device that runs ahead of the host is waited for once a step: its weights are looked at with the gradients of the
    next step, unless they are about to be saved or measured.
    """

    def __init__(self, policy: str, data: Data, trainer: Any, eval_steps: int | None = None) -> None:
        self.policy, self.data, self.trainer, self.eval_steps = policy, data, trainer, eval_steps
        self.seen: list[tuple[Any, Any, Any]] = []  # input_ids, attention_mask, position_ids since the last step
        self.skipped = self.in_a_row = self.since_log = self.steps_since_log = 0
        self.good_loss: Any = None
        self.weights: Any = None  # whether those of the last step are finite, where nobody has asked yet

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.policy == "rollback" and (sharding := distributed.sharding()):
            raise SettingsError(
                f"train.on_nonfinite=rollback puts a checkpoint's weights back, which {sharding} has in shards.",
                "Take skip, or stop.",
            )
        # ahead of the packed forward, which lays the rows end to end
        self.trainer.model.register_forward_pre_hook(self._note, prepend=True, with_kwargs=True)

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if module.training and ids is not None:
            self.seen.append((ids, kwargs.get("attention_mask"), kwargs.get("position_ids")))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Before the optimizer moves anything."""
        import torch

        self.steps_since_log += 1
        loss = getattr(self.trainer, "_tr_loss", torch.zeros(()))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        weights, self.weights = self.weights, None
        well = finite(gradients) & finite([loss])
        well = well if weights is None else well & weights
        if everywhere(self.trainer.accelerator, well):
            self.in_a_row = 0
            self.good_loss = loss.clone()
            return
        if weights is not None:
            self._refuse_weights(args, state, weights)
        step = state.global_step + 1
        found = f"A gradient is not finite at step {step}; no weight has been moved by it. {self.rows()}"
        last = _last_checkpoint(Path(args.output_dir))
        kept = f" The last good checkpoint is {last}." if last else ""
        self.in_a_row += 1
        if self.policy == "stop" or self.in_a_row > MOST_IN_A_ROW:
            often = f" It is the {self.in_a_row}th step in a row." if self.in_a_row > 1 else ""
            raise NumericsError(found + often + kept, CAUSES)
        if self.policy == "rollback":
            if last is None:
                fix = f"Set save_steps to have one. {CAUSES}"
                raise NumericsError(f"{found} There is no checkpoint to go back to.", fix)
            self._roll_back(last)
        model.zero_grad(set_to_none=True)  # the optimizer passes over what has no gradient
        self.skipped += 1
        self.since_log += 1
        loss.copy_(self.good_loss if self.good_loss is not None else torch.zeros_like(loss))
        back = f", back to {last.name}" if self.policy == "rollback" and last else ""
        console.print(f"note: step {step} is skipped{back}: a gradient is not finite. {self.rows()}", markup=False)

    def _roll_back(self, folder: Path) -> None:
        """Restores weights and optimizer from a checkpoint of this run, checked against its manifest; keeps rates."""
        if reason := checkpoint.broken(folder):
            raise NumericsError(f"{folder}, to go back to after a gradient that is not finite, is broken: {reason}.")
        trainer = self.trainer
        restore(trainer.accelerator.unwrap_model(trainer.model), folder)
        schedule = trainer.lr_scheduler.state_dict()
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        trainer._load_optimizer_and_scheduler(str(folder))
        trainer.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the move, ahead of any save."""
        trained = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        self.weights = finite(trained)
        measured = bool(self.eval_steps) and state.global_step % (self.eval_steps or 1) == 0
        last = state.global_step >= state.max_steps or control.should_training_stop
        if measured or last or control.should_save or not attention.runs_ahead(self.weights.device):
            self._ask_for_weights(args, state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ahead of a save that another one asked for."""
        self._ask_for_weights(args, state)

    def _ask_for_weights(self, args: Any, state: Any) -> None:
        weights, self.weights = self.weights, None
        if weights is not None:
            self._refuse_weights(args, state, weights)

    def _refuse_weights(self, args: Any, state: Any, weights: Any) -> None:
        """Raises NumericsError unless the weights of the last step are finite."""
        if not everywhere(self.trainer.accelerator, weights):
            last = _last_checkpoint(Path(args.output_dir))
            kept = f" The last good checkpoint is {last}." if last else ""
            found = f"A weight is not finite after step {state.global_step}; nothing is saved.{kept}"
            raise NumericsError(found, CAUSES)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **kwargs: Any) -> None:
        """At each logged step; what skipped steps left in it is taken out."""
        if self.skipped and "loss" in logs:
            moved = self.steps_since_log - self.since_log
            if moved > 0:
                logs["loss"] *= self.steps_since_log / moved  # the trainer divides by all steps
            for name in [name for name, number in logs.items() if not _finite_number(number)]:
                del logs[name]
            if moved <= 0:
                logs.pop("loss", None)
            logs["skipped_steps"] = self.skipped
        self.since_log = self.steps_since_log = 0 if "loss" in logs or self.skipped else self.steps_since_log
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(logs[name]):
                raise NumericsError(f"{name} is {logs[name]} at step {state.global_step}.", CAUSES)

    def rows(self) -> str:
        """The rows of the step's batches, with where they come from and their lengths."""
        known = {
            tuple(ids): self.data.train_records[row["row"]].where
            for row in self.data.train
            for ids, _ in sequences(row).values()
        }
        named = []
        for ids in (ids for batch in self.seen for ids in _unpadded(*batch)):
            where = known.get(tuple(ids))
            named.append(f"{where or 'a row'} ({len(ids)} tokens)")
        return said_rows(named)


def said_rows(named: Sequence[str]) -> str:
    """The rows of a step in words, the first ones by name; "" for none."""
    named = list(dict.fromkeys(named))
    more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
    return f"Its rows: {', '.join(named[:MOST_NAMED])}{more}." if named else ""


def _finite_number(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _last_checkpoint(folder: Path) -> Path | None:
    return next(iter(reversed(checkpoint.checkpoints(folder))), None)


def _unpadded(ids: Any, mask: Any, positions: Any) -> list[list[int]]:
    """The sequences of a batch, without padding; of packed ones where positions start over."""
    rows: list[list[int]] = []
    for line in range(len(ids)):
        row = ids[line].tolist()
        if mask is not None and mask.shape == ids.shape:
            row = [token for token, real in zip(row, mask[line].tolist(), strict=True) if real]
        starts = [0, len(row)]
        if positions is not None and mask is None and positions.shape == ids.shape:
            starts = [at for at, position in enumerate(positions[line].tolist()) if position == 0] + [len(row)]
        rows += [row[start:stop] for start, stop in pairwise(starts)]
    return rows
