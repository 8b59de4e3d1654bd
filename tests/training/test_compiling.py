"""Compiled decoder layers: one graph for any number of tokens, the numbers of plain ones, and nothing else changed."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from finetune_kit.models import adapters
from finetune_kit.packing import attention, forward
from finetune_kit.settings.schema import LoraConfig, TrainConfig
from finetune_kit.training import compiling
from tests.packing import test_forward as fixtures
from tests.packing import varlen

LENGTHS = [(30, 25, 18), (40, 22), (17, 33, 12, 50), (60, 14, 8, 9, 31), (21, 22, 23), (12, 13, 64)]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    # pytest listens to every logger: torch would write down each graph for it, which takes longer than to compile
    trace = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "handlers", [])


def batch_of(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Rows of these lengths, all tokens labelled; the first two begin alike."""
    generator = torch.Generator().manual_seed(sum(lengths))
    texts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    texts[1][:10] = texts[0][:10]
    inputs = fixtures.padded(texts)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def make_policy(checkpointing: bool = False) -> Any:
    model = adapters.attach(fixtures.make(fixtures.FAMILIES["llama"]), LoraConfig(r=4)).train()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()  # all layers' inputs are alike, so that one graph does; else it takes two
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert forward.enable(model) == ""
    return model


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_six_batches_of_other_sizes_take_one_graph_without_a_break_and_have_the_numbers_of_plain_layers(
    checkpointing: bool, tmp_path: Path
) -> None:
    model = make_policy(checkpointing)
    batches = [batch_of(lengths) for lengths in (LENGTHS[:2] if checkpointing else LENGTHS)]
    expected = [fixtures.loss_and_gradient(model, inputs) for inputs in batches]
    names = list(model.state_dict())
    assert compiling.compile_layers(model, backend="eager" if checkpointing else "aot_eager") == 2
    for inputs, (loss, gradient) in zip(batches, expected, strict=True):
        found, compiled = fixtures.loss_and_gradient(model, inputs)
        assert abs(found - loss) < 1e-5
        assert float((compiled - gradient).norm() / gradient.norm()) < 1e-5
    assert counters["graph_break"] == {}
    assert counters["stats"]["unique_graphs"] == 1
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_generation_and_evaluation_run_plain_layers() -> None:
    model, inputs = make_policy(), fixtures.batch(side="left")
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    expected = model.eval().generate(**prompts, max_new_tokens=4, do_sample=False)
    compiling.compile_layers(model, backend="eager")
    assert torch.equal(model.generate(**prompts, max_new_tokens=4, do_sample=False), expected)
    fixtures.log_probs(model, inputs)
    assert counters["stats"]["unique_graphs"] == 0


def test_torchs_varlen_kernel_stays_inside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    fixtures.attend_by(monkeypatch, varlen.reference)
    model, graphs = make_policy(), []
    monkeypatch.setattr(attention, "varlen_kernel", lambda device: varlen_attn)

    def noting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    for layer in compiling.layers_of(model):
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend=noting, dynamic=True, fullgraph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):  # there is no such kernel on a CPU, but a graph of it
        model(**batch_of(LENGTHS[0]), use_cache=False)
    assert len(graphs) == 1
    assert graphs[0].count("torch_attn._varlen_attn") == 1
    assert counters["graph_break"] == {}


@pytest.mark.parametrize(("factor", "kept"), [(0.5, True), (1.0, False), (2.0, False)])
def test_layers_stay_compiled_only_where_a_step_is_faster_by_it(
    factor: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make_policy(), [list(range(3, 40)), list(range(5, 30))]
    monkeypatch.setattr(torch, "compile", lambda called, **kwargs: called)

    def clock(step: Any) -> float:
        step()
        return factor if forward.packing_of(model).compiled else 1.0  # type: ignore[union-attr]  # it is packed

    said = compiling.try_compiled(model, rows, clock)
    assert said.startswith("2 layers are compiled" if kept else "layers are not compiled: a step takes")
    assert [layer._compiled_call_impl is not None for layer in compiling.layers_of(model)] == [kept, kept]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layers_that_cannot_be_compiled_or_give_other_numbers_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = make_policy(), [list(range(3, 40)), list(range(5, 30))]

    def broken(called: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler is here")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiling.try_compiled(model, rows) == "layers are not compiled: RuntimeError"

    def wrong(model: Any) -> int:
        for layer in compiling.layers_of(model):
            layer._compiled_call_impl = lambda *args, **kwargs: torch.zeros_like(args[0]).requires_grad_()
        forward.packing_of(model).compiled = True  # type: ignore[union-attr]
        return 2

    monkeypatch.setattr(compiling, "compile_layers", wrong)
    fast = lambda step: step() or float(not forward.packing_of(model).compiled)  # noqa: E731
    assert "; gradient norms" in compiling.try_compiled(model, rows, fast)
    assert forward.packing_of(model).compiled is False  # type: ignore[union-attr]


def test_on_a_cpu_layers_are_compiled_where_it_is_asked_for_alone() -> None:
    model = make_policy()
    said = partial(
        compiling.compile_where_it_pays, model, rows=[[5, 6, 7]], passes=10_000
    )  # compiles at the first call
    assert said(TrainConfig()) == ""
    assert said(TrainConfig(extra={"torch_compile": False})) == ""
    assert said(TrainConfig(extra={"torch_compile_backend": "eager"})) == "2 layers are compiled, one for all"
