"""The comparisons with TRL are programs that work: here on a CPU, at a toy shape."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_kit.model.tiny import write_tiny_model
from tests.fixtures_cli import ROOT, python

WORDS = ["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--steps", "1", "--rows", "2", "--max-length", "1024"]


def test_as_a_program_it_measures_a_side_in_a_process_of_its_own(tmp_path: Path) -> None:
    said = python(str(ROOT / "benchmarks" / "gpu.py"), *WORDS, "--jobs", "sft_lora", "--who", "ours", cwd=tmp_path)
    assert said.code == 0, said.err
    assert re.search(r"^this CPU: torch\.mm at its best [\d.]+ TFLOP/s$", said.out, re.MULTILINE)
    assert re.search(r"^\| ours \| [\d,]+ \([\d,]+ to [\d,]+\) \| [\d,]+ \| [\d.]+% \|", said.out, re.MULTILINE)


def in_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path, words: list[str], options: Any, sides: Any) -> None:
    """benchmarks/methods.py, whose sides are not processes of their own, and gpu.py's."""
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(cache))  # which the program sets
    methods = importlib.import_module("methods")

    def here(job: str, who: str, more: Any = (), **given: Any) -> dict[str, Any]:
        return methods.measure(job, who, options().parse_args([*words, *more]), sides)  # type: ignore[no-any-return]

    monkeypatch.setattr(methods, "child", here)
    monkeypatch.setattr(sys, "argv", ["a benchmark", *words])


def test_the_comparison_of_a_cpu_says_speed_losses_and_where_the_time_went_of_each_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    write_tiny_model(tmp_path / "model")
    words = ["--rounds", "1", "--steps", "1", "--rows", "2", "--model", str(tmp_path / "model"), "--profile"]
    in_this_process(monkeypatch, tmp_path, [*words, "--max-length", "2048"], methods.options, methods.MAKERS)
    methods.main()
    said = capsys.readouterr().out
    row = re.compile(r"^\| (\w+) \| [\d,]+ \(.*\) \| [\d,]+ \| [\d.]+ \| \d+% \| ([\d.]+) ([\d.]+) \|$", re.MULTILINE)
    found = row.findall(said)
    assert [who for who, *_ in found] == 4 * ["ours", "trl", "bare"]
    for at in range(0, 12, 3):
        losses = [[float(loss) for loss in own] for _, *own in found[at : at + 3]]
        assert losses[1] == pytest.approx(losses[0], abs=2e-4)
        assert losses[2] == pytest.approx(losses[0], abs=2e-4)
    spent = r"^(\w+), the last step: \w+ [\d.]+%, .*; matrix products at [\d,]+ GFLOP/s$"
    assert re.findall(spent, said, re.MULTILINE) == 4 * ["ours", "trl", "bare"]


def test_the_shapes_have_the_parameters_of_llama_3_1_8b_and_qwen3_0_6b(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = importlib.import_module("gpu").SHAPES
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes[name])) for name in ("8B", "0.6B")]
    assert [model.num_parameters() for model in models] == [8_030_261_248, 596_049_920]


def test_all_sides_and_jobs_run_and_our_losses_are_trls_to_1e_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu")
    in_this_process(monkeypatch, tmp_path, WORDS, gpu.options, gpu.SIDES)
    gpu.main()
    said = capsys.readouterr().out
    assert re.findall(r"^(?:\| (\w+) \| [\d,]+ |(\w+)$)", said, re.MULTILINE) == [
        *(("", "sft_lora"), ("ours", ""), ("trl", ""), ("trl_packed", "")),
        *(("", "dpo"), ("ours", ""), ("trl", "")),
    ]
    apart = [float(number) for number in re.findall(r"losses of ours and trl differ by up to (\S+)", said)]
    assert len(apart) == 2
    assert max(apart) < 1e-4


def test_generation_is_compared_with_transformers_own_at_a_toy_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = ["--shape", "tiny", "--prompts", "3", "--width", "9", "--new", "20"]
    monkeypatch.setattr(sys, "argv", ["generation.py", *words])
    importlib.import_module("generation").main()
    said = capsys.readouterr().out
    rates = r"^(.+?) *: +[\d,]+ tokens/s, +[\d.]+ ms a token of all, +[\d.]+ times$"
    assert re.findall(rates, said, re.MULTILINE) == [
        "transformers, greedy",
        "ours, greedy",
        "transformers, sampled",
        "ours, sampled",
        "ours, PPO's rollout",
    ]
    assert said.endswith("equal greedy tokens: 60 of 60\n")
