"""The packing plan of a batch, made where its rows are put together: on the CPU, by a loader's worker if there is one.

TRL's collator makes the batch. Beside it goes a plan for each of its padded rows of token ids, into pinned memory and
to the device as the batch does; there the ids carry it to the model (see packing/forward.py): no key of the batch is a
new one and a trainer may hand its tensors on as it likes. What a trainer makes of them, such as the concatenation of
two sides, carries nothing but through `Side`; a call without a plan has one made on the spot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from finetune_kit.data.chat import IGNORED
from finetune_kit.packing.attention import tell
from finetune_kit.packing.forward import PackingState, drops, packing_of
from finetune_kit.packing.plan import CARRIED, Plan, make_plan, select

# token ids, attention mask, labels (or a mask of the labels) of TRL's batches; a model of scores has no labels
ROWS = (
    ("input_ids", "attention_mask", ("labels", "completion_mask")),
    ("KL_input_ids", "KL_attention_mask", ("KL_completion_mask",)),
)
SIDES = ("chosen", "rejected")  # of ORPO's batches, which its trainer concatenates
BOTH = "both sides"


class Batch(dict[str, Any]):
    """A batch with the plans of its token ids, by their names."""

    plans: Mapping[str, Plan]

    def __init__(self, items: Mapping[str, Any], plans: Mapping[str, Plan] | None = None) -> None:
        super().__init__(items)
        self.plans = plans or {}

    def pin_memory(self) -> Batch:
        """As torch's loader asks for it."""
        return self._with(lambda part: part.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """As accelerate asks for it. The device gets it when it gets to it; the host does not wait."""
        moved = self._with(lambda part: part.to(device, non_blocking=True))
        for name, plan in moved.plans.items():
            if name != BOTH:
                setattr(moved[name], CARRIED, plan)
                continue
            for side in SIDES:
                moved[f"{side}_input_ids"] = Side.of(moved[f"{side}_input_ids"], side, plan)
        return moved

    def _with(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        items = {name: move(part) if isinstance(part, torch.Tensor) else part for name, part in self.items()}
        return Batch(items, {name: plan.moved(move) for name, plan in self.plans.items()})


class Side(torch.Tensor):
    """The token ids of one side of a batch of pairs. Both of them, one below the other, carry the plan."""

    side: str
    plan: Plan

    @staticmethod
    def of(ids: torch.Tensor, side: str, plan: Plan) -> Side:
        found = ids.as_subclass(Side)
        found.side, found.plan = side, plan
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        parts = args[0] if func is torch.cat and args else ()
        if parts and [getattr(part, "side", "") for part in parts] == list(SIDES):
            found = found.as_subclass(torch.Tensor)
            setattr(found, CARRIED, parts[0].plan)
        return found


class Packing:
    """A collator of TRL's that gives each batch the plans of its rows.

    way: how the model is packed. shares: a plan may have beginnings once; not where dropout acts.
    """

    def __init__(self, collate: Any, way: PackingState, shares: bool) -> None:
        self.collate, self.shares = collate, shares
        self.kind, self.compiled = way.attends.kind, way.compiled  # and no function, which a worker cannot be sent

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        plans = {}
        for name, its_mask, labelled in ROWS:
            if name in batch and its_mask in batch:
                labels = next((_labels(batch, one, batch[name]) for one in labelled if one in batch), None)
                plans[name] = self.plan(batch[name], batch[its_mask], labels)
        if all(f"{side}_input_ids" in batch for side in SIDES):
            widest = max(batch[f"{side}_input_ids"].shape[1] for side in SIDES)
            fillers = {"input_ids": getattr(self.collate, "pad_token_id", 0), "attention_mask": 0, "labels": IGNORED}
            for side in SIDES:  # as wide as each other: the trainer has nothing to pad
                for name, filler in fillers.items():
                    part = batch[f"{side}_{name}"]
                    wider = part.new_full((len(part), widest - part.shape[1]), filler)
                    batch[f"{side}_{name}"] = torch.cat([part, wider], dim=1)
            ids, mask = (torch.cat([batch[f"{side}_{name}"] for side in SIDES]) for name in list(fillers)[:2])
            plans[BOTH] = self.plan(ids, mask, None)
        return Batch(batch, {name: plan for name, plan in plans.items() if plan is not None})

    def plan(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor | None) -> Plan | None:
        """None where a row is empty, or none has a label: such a batch stays padded."""
        if not bool(mask.any(dim=1).all()):
            return None
        plan: Plan | None = tell(make_plan(ids, mask, self.shares), self.kind, self.compiled)
        return plan if labels is None or plan is None else select(plan, labels)


def _labels(batch: Mapping[str, Any], name: str, ids: torch.Tensor) -> torch.Tensor:
    """A batch's labels, or those that a trainer makes of a mask."""
    labels: torch.Tensor = batch[name]
    return labels if name == "labels" else ids.masked_fill(labels == 0, IGNORED)


def plan_in_collator(trainer: Any) -> None:
    """Have a trainer's batches planned where they are put together, where its model is packed."""
    way = packing_of(trainer.model)
    if way is None or hasattr(trainer.args, "num_generations"):
        return
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    trainer.data_collator = Packing(trainer.data_collator, way, shares=not drops(model))
