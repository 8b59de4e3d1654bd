"""Plans come with the batches: the host asks the device for nothing in forward and backward, and numbers stay."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_kit.packing import attention, forward
from finetune_kit.packing.plan import CARRIED
from finetune_kit.training import guard
from finetune_kit.training.collate import Batch
from tests.fixtures_training import Trained, fit_only, prepare, write_rows
from tests.training.test_longest_batch import LABELLED, PAIRS, ROWS

RECIPES = {"lora_sft": ROWS, "dpo": PAIRS, "reward_model": PAIRS, "kto": LABELLED, "orpo": PAIRS}
ATEN = torch.ops.aten
WAITS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.is_nonzero, ATEN.equal, ATEN.item}


class Waits(TorchDispatchMode):
    """The operations that would have the host wait for a GPU: for a number, or for how many numbers there are."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_) else ()
        by_mask = any(part is not None and part.dtype == torch.bool for part in indices)
        if func.overloadpacket in WAITS or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Fetches(TorchFunctionMode):
    """The methods that fetch numbers from a GPU, which on a CPU are no operation."""

    def __init__(self, found: list[str]) -> None:
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def device_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is treated as a device that runs ahead of the host."""
    monkeypatch.setattr(attention, "runs_ahead", lambda device: True)


@contextlib.contextmanager
def watching_forward(model: Any) -> Iterator[tuple[Waits, list[bool]]]:
    """The waits of each call of a model, and whether each came with a plan."""
    waits, planned = Waits(), []
    fetches = Fetches(waits.found)

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        planned.append(hasattr(ids, CARRIED))
        waits.__enter__()
        fetches.__enter__()

    def behind(module: Any, args: Any, output: Any) -> None:
        fetches.__exit__(None, None, None)
        waits.__exit__(None, None, None)

    handles = [
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_hook(behind),
    ]
    try:
        yield waits, planned
    finally:
        for handle in handles:
            handle.remove()


def first_batch(run: Trained, count: int = 4) -> Any:
    trainer = run.trainer
    rows = trainer._remove_unused_columns(trainer.train_dataset)
    return trainer.data_collator([rows[place] for place in range(count)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_with_a_plan_from_the_collator_asks_for_no_number_and_has_the_numbers_of_one_without(
    recipe: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(home / "rows.jsonl", RECIPES[recipe])
    run = prepare(recipe, home)
    trainer, model = run.trainer, run.trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = first_batch(run)
    assert isinstance(batch, Batch)

    def loss_and_gradient(inputs: Any) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = trainer.compute_loss(model, trainer._prepare_inputs(inputs), num_items_in_batch=None)
        waits = Waits()
        with waits:
            loss.backward()
        assert waits.found == []
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return float(loss.detach()), torch.cat(gradients)

    expected, gradient = loss_and_gradient(dict(batch))
    device_like(monkeypatch)
    spots: list[int] = []
    on_the_spot = forward.plan_on_the_spot
    monkeypatch.setattr(forward, "plan_on_the_spot", lambda *given: spots.append(1) or on_the_spot(*given))
    with watching_forward(model) as (waits, planned):
        loss, found = loss_and_gradient(batch.to("cpu"))
    assert planned
    assert set(planned) == {True}
    assert spots == []
    assert waits.found == []
    assert abs(loss - expected) < 1e-6
    assert torch.allclose(found, gradient, atol=1e-6)


def test_the_watch_over_waits_is_awake(home: Path) -> None:
    run = prepare("lora_sft", home)
    batch = dict(first_batch(run))
    with watching_forward(run.model.train()) as (waits, planned):
        run.model(**batch, use_cache=False)
    assert planned == [False]
    assert {"cpu", "tolist"} <= set(waits.found)
    assert any("nonzero" in name for name in waits.found)


def test_a_batch_whose_labels_were_changed_is_planned_anew_on_a_cpu_and_ends_the_run_on_a_device(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare("lora_sft", home)
    batch = first_batch(run).to("cpu")
    labels = batch["labels"].clone()
    labels[:, -3:] = -100
    model = run.model.eval()
    changed = {**batch, "labels": labels}
    plain = {name: part.clone() for name, part in changed.items()}
    given = {"use_cache": False, "fused_lm_head": True}
    with torch.no_grad():
        assert torch.equal(model(**changed, **given).log_probs, model(**plain, **given).log_probs)
        device_like(monkeypatch)
        with pytest.raises(RuntimeError, match="not the one that its packing plan was made of"):
            model(**changed, **given)


def test_plans_come_from_a_loaders_worker_and_losses_stay_the_same_to_the_bit(home: Path) -> None:
    words = ("max_steps=3", "learning_rate=1e-2")
    alone = fit_only("lora_sft", home, *words)
    worker = fit_only("lora_sft", home, *words, "train.extra.dataloader_num_workers=1")
    assert worker.losses == alone.losses
    assert len(worker.losses) == 3


def test_the_guard_waits_once_a_step_and_for_the_weights_where_they_are_about_to_be_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device_like(monkeypatch)
    model = torch.nn.Linear(3, 3)
    trainer = SimpleNamespace(
        model=model, accelerator=SimpleNamespace(num_processes=1), _tr_loss=torch.zeros(()), args=None
    )
    watch = guard.Guard("stop", None, trainer)  # type: ignore[arg-type]  # no row is named
    args = SimpleNamespace(output_dir="nowhere")
    control = SimpleNamespace(should_save=False, should_training_stop=False)

    def step(number: int) -> int:
        state = SimpleNamespace(global_step=number, max_steps=9)
        model(torch.ones(3)).sum().backward()
        with Waits() as waits:
            watch.on_pre_optimizer_step(args, state, control, model=model)
            state.global_step += 1
            watch.on_step_end(args, state, control)
        return len([name for name in waits.found if "local_scalar" in name])

    assert [step(0), step(1)] == [1, 1]
    control.should_save = True
    assert step(2) == 2
    control.should_save = False
    model.weight.data[0, 0] = torch.nan  # a step that broke them is noticed with the gradients of the next one
    assert watch.on_step_end(args, SimpleNamespace(global_step=4, max_steps=9), control) is None
    with pytest.raises(guard.NumericsError, match="A weight is not finite after step 4"):
        step(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: pytest -m gpu")
def test_on_a_gpu_nothing_waits_in_forward_and_backward(home: Path) -> None:
    run = prepare("lora_sft", home)
    model = run.trainer.model.train()
    inputs = run.trainer.data_collator([run.trainer.train_dataset[place] for place in range(4)]).pin_memory()
    for turn in range(3):
        batch = inputs.to(model.device)
        torch.cuda.set_sync_debug_mode("error" if turn else "default")  # the first one compiles kernels
        try:
            with run.trainer.accelerator.autocast():
                outputs = model(**batch, fused_lm_head=True, use_cache=False)
            (-outputs.log_probs.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
