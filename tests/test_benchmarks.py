"""The comparison on a GPU is a program that works: here on a CPU, at a toy shape."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fixtures_cli import ROOT, python

WORDS = ["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--steps", "1", "--rows", "2", "--max-length", "1024"]


def test_as_a_program_it_measures_a_side_in_a_process_of_its_own(tmp_path: Path) -> None:
    said = python(str(ROOT / "benchmarks" / "gpu.py"), *WORDS, "--jobs", "sft_lora", "--who", "ours", cwd=tmp_path)
    assert said.code == 0, said.err
    assert re.search(r"^this CPU: torch\.mm at its best [\d.]+ TFLOP/s$", said.out, re.MULTILINE)
    assert re.search(r"^\| ours \| [\d,]+ \([\d,]+ to [\d,]+\) \| [\d,]+ \| [\d.]+% \|", said.out, re.MULTILINE)


def test_the_shapes_have_the_parameters_of_llama_3_1_8b_and_qwen3_0_6b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = importlib.import_module("gpu").SHAPES
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes[name])) for name in ("8B", "0.6B")]
    assert [model.num_parameters() for model in models] == [8_030_261_248, 596_049_920]


def test_all_sides_and_jobs_run_and_our_losses_are_trls_to_1e_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path))  # which the program sets
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu, methods = importlib.import_module("gpu"), importlib.import_module("methods")

    def here(job: str, who: str, more: Any, **given: Any) -> dict[str, Any]:
        return methods.measure(job, who, gpu.options().parse_args([*WORDS, *more]), gpu.SIDES)  # type: ignore[no-any-return]

    monkeypatch.setattr(methods, "child", here)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *WORDS])
    gpu.main()
    said = capsys.readouterr().out
    assert re.findall(r"^(?:\| (\w+) \| [\d,]+ |(\w+)$)", said, re.MULTILINE) == [
        *(("", "sft_lora"), ("ours", ""), ("trl", ""), ("trl_packed", "")),
        *(("", "dpo"), ("ours", ""), ("trl", "")),
    ]
    apart = [float(number) for number in re.findall(r"losses of ours and trl differ by up to (\S+)", said)]
    assert len(apart) == 2
    assert max(apart) < 1e-4
