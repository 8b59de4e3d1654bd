"""The architectures of docs/models.md: each layer kind trains and merges through the commands."""

from __future__ import annotations

import gc
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.models.language import sees_ahead, settle_text
from finetune_kit.runs import verify
from tests.fixtures_cli import ROOT, python
from tests.models.architectures import EIGHT, MOST_PARAMETERS, auto_class, empty_model, tiny_config

# dense layers apart: Conv1D, fused products, experts of four makes, and among them such as PEFT renames; linear
# attention and state spaces between layers of attention, and alone; sliding windows; a router that is a linear layer;
# logits of distances, in a model whose config says nothing of tied embeddings
KINDS = ("gpt2", "phi3", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4_text", "granitemoehybrid")
KINDS += ("qwen3_5_text", "nemotron_h", "mamba2", "gemma3_text", "lfm2", "inkling_text")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        found = importlib.import_module("architectures")
        # as the benchmark itself does it
        patch.setattr(verify, "in_a_fresh_process", found.in_a_fork)
        found.import_heavy()
        gc.freeze()
        yield found
        gc.unfreeze()


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_kind_trains_is_proven_and_merges_to_the_adapter_s_logits(
    benchmark: Any, tmp_path: Path, kind: str
) -> None:
    benchmark.furnish(tmp_path)
    log = tmp_path / "log.txt"
    log.touch()
    cells = ("make", "coverage", "qlora" if kind == "mixtral" else "lora")
    found = {cell: benchmark.one(cell, tmp_path, kind, log) for cell in cells}
    assert {cell: result.get("why", "") for cell, result in found.items()} == dict.fromkeys(cells, "")
    assert found["coverage"]["share"] > 0.5
    if kind == "mixtral":
        (tmp_path / "runs" / kind / "qlora").rename(tmp_path / "runs" / kind / "lora")
    assert benchmark.one("merge", tmp_path, kind, log).get("why", "") == ""
    folder = tmp_path / "runs" / kind / "merged"
    assert json.loads((folder / "merge.json").read_text())["reload_max_logit_difference"] < 1e-4


@pytest.mark.parametrize("kind", ["falcon_h1", "jamba", "emu3", "llama4", "deepseek_v2", "recurrent_gemma"])
def test_an_architecture_whose_sizes_must_fit_each_other_is_small_and_reads(kind: str) -> None:
    model = auto_class(kind).from_config(tiny_config(kind)).float().eval()
    settle_text(model)
    assert sum(weight.numel() for weight in model.parameters()) < 5_000_000
    assert model(input_ids=EIGHT).logits.shape[:2] == EIGHT.shape


def test_the_page_has_a_row_for_each_with_what_came_of_it_and_why_not(benchmark: Any) -> None:
    yes = {"is": "yes", "seconds": 1.0}
    cells = {**dict.fromkeys(benchmark.CELLS, yes), "coverage": {**yes, "share": 0.5, "left_out": {"gate": "a router"}}}
    cells["lora"] = {**yes, "rows": "packed"}
    refused = {**cells, "reward": {"is": "no", "why": "/home/me/models/b is none.", "seconds": 0.5}}
    unmade = {"make": {"is": "no", "why": "ValueError: too large", "seconds": 0.1}}
    results = {
        name: {"example": "org/" + name, "cells": found, "day": f"2026-11-0{len(name)}"}
        for name, found in (("a", cells), ("b", refused), ("c", unmade))
    }
    said = benchmark.page(results, ["a", "b", "c"])
    assert "| a | org/a | yes | yes | yes | yes | yes | yes | yes | packed | 50% | 9 |" in said
    assert "| b | org/b | yes | yes | yes | yes | no | yes | yes | packed | 50% | 8 |" in said
    assert "- `b`, reward: …/b is none." in said
    assert "- a router: `gate` (2)" in said
    assert "- `c`: ValueError: too large" in said
    assert (
        f"from 2026-11-01 to 2026-11-01: 3 of {len(benchmark.every())} architectures. Of those, 2 could be made small"
        in said
    )


def test_kept_results_hold_no_path_of_the_machine_that_they_were_made_on(benchmark: Any, tmp_path: Path) -> None:
    why = f"{tmp_path}/a/model is none; see '/opt/b.py' and https://host.org/page/of/it for a/b/c, 3/4 or /."
    benchmark.write({"a": {"cells": {"lora": {"why": why}}}}, tmp_path / "kept.jsonl")
    kept = benchmark.read(tmp_path / "kept.jsonl")["a"]["cells"]["lora"]["why"]
    assert kept == "…/model is none; see '…/b.py' and https://host.org/page/of/it for a/b/c, 3/4 or /."


def test_every_causal_architecture_of_transformers_is_on_the_list_and_those_that_read_images(benchmark: Any) -> None:
    names = benchmark.every()
    assert {"llama", "gpt2", "qwen3_moe", "mistral3", "llava"} <= set(names)
    assert len(names) == len(set(names)) > 200
    assert benchmark.example("gpt2") == "openai-community/gpt2"


@pytest.mark.long
def test_every_architecture_writes_from_left_to_right_or_is_seen_not_to(benchmark: Any) -> None:
    """Minutes on one core. An independent look: the logits before the last of nine tokens, with another last one."""
    wrong = {}
    for name in benchmark.every():
        try:
            empty = empty_model(name)
            assert sum(weight.numel() for weight in empty.parameters()) < MOST_PARAMETERS
            torch.manual_seed(0)
            model = auto_class(name).from_config(tiny_config(name)).float().eval()
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight.normal_(std=0.2)
                ids = torch.arange(5, 14).repeat(2, 1)
                ids[1, -1] = 99
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except Exception:  # what cannot be made small, or takes no text alone, is on the page with its reason
            continue
        ahead = bool((logits[0, :-1] - logits[1, :-1]).abs().max() > 1e-4)
        if sees_ahead(model) != ahead or (sees_ahead(empty) and not ahead):
            wrong[name] = (ahead, sees_ahead(model), sees_ahead(empty))
    assert not wrong


@pytest.mark.long
def test_what_any_architecture_cannot_do_is_refused_with_a_reason(benchmark: Any, tmp_path: Path) -> None:
    """Hours on one core."""
    page, kept = tmp_path / "models.md", tmp_path / "results.jsonl"
    words = ("--to", str(tmp_path), "--page", str(page), "--results", str(kept), "--limit", "300")
    done = python(str(ROOT / "benchmarks" / "architectures.py"), *words, cwd=tmp_path)
    assert done.code == 0, done.err
    failed = {
        f"{name} {cell}": found["why"]
        for name, result in benchmark.read(kept).items()
        for cell, found in result["cells"].items()
        if found["is"] == "fails"
    }
    assert not failed
