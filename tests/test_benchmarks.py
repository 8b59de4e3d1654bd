"""The comparisons with TRL are programs that work: here on a CPU, at a toy shape."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_kit import recipe as recipes
from finetune_kit.cli import main as cli
from finetune_kit.models.embedded import embedded_folder
from finetune_kit.models.load import load_policy
from finetune_kit.models.tiny import write_tiny_model
from finetune_kit.runs import save, saved
from finetune_kit.runs.verify import Proof
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from tests.fixtures_cli import ROOT, python

NAMES = ("8B", "1.7B", "0.6B", "135M")
WORDS = ["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--steps", "1", "--rows", "2", "--max-length", "1024"]


@pytest.mark.long
def test_as_a_program_it_measures_a_side_in_a_process_of_its_own(tmp_path: Path) -> None:
    said = python(str(ROOT / "benchmarks" / "gpu_trl.py"), *WORDS, "--jobs", "sft_lora", "--who", "ours", cwd=tmp_path)
    assert said.code == 0, said.err
    assert re.search(r"^this CPU: torch\.mm at its best [\d.]+ TFLOP/s$", said.out, re.MULTILINE)
    assert re.search(r"^\| ours \| [\d,]+ \([\d,]+ to [\d,]+\) \| [\d,]+ \| [\d.]+% \|", said.out, re.MULTILINE)


def in_this_process(monkeypatch: pytest.MonkeyPatch, cache: Path, words: list[str], options: Any, sides: Any) -> None:
    """benchmarks/methods.py, whose sides are not processes of their own, and gpu_trl.py's."""
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(cache))  # which the program sets
    methods = importlib.import_module("methods")

    def here(job: str, who: str, more: Any = (), **given: Any) -> dict[str, Any]:
        by_formula = sides is not methods.MAKERS
        return methods.measure(job, who, options().parse_args([*words, *more]), sides, by_formula)  # type: ignore[no-any-return]

    monkeypatch.setattr(methods, "child", here)
    monkeypatch.setattr(sys, "argv", ["a benchmark", *words])


@pytest.mark.long
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


def test_the_benchmark_of_data_finds_rows_again_with_the_tokens_that_it_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("FINETUNE_KIT_CACHE_GIB", "1")
    data = importlib.import_module("data")
    embedded = embedded_folder()
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(tmp_path))
    (tmp_path / embedded.name).symlink_to(embedded)
    path = str(data.write_rows(tmp_path / "rows.jsonl", 50, seed=0))
    found = {who: data.measure(who, path) for who in ("map", "first", "again")}
    # what follows the end token, a line feed, is not trained
    assert found["map"]["tokens"] - 50 == found["first"]["tokens"] == found["again"]["tokens"] > 50 * 100
    assert data.line(50, "again", found["again"]).count("|") == data.HEAD.splitlines()[0].count("|")


def test_the_shapes_have_the_parameters_of_llama_3_1_8b_qwen3_and_smollm2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    shapes = importlib.import_module("gpu_trl").SHAPES
    with torch.device("meta"):
        models = [AutoModelForCausalLM.from_config(AutoConfig.for_model(**shapes[name])) for name in NAMES]
    assert [model.num_parameters() for model in models] == [8_030_261_248, 1_720_574_976, 596_049_920, 134_515_008]


def test_all_sides_and_jobs_run_and_our_losses_are_trls_to_1e_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu = importlib.import_module("gpu_trl")
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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_formula_of_a_step_s_products_is_what_torch_counts_on_a_cpu_to_the_operation(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, lora: bool
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    flop = importlib.import_module("flop")
    adapter = LoraConfig() if lora else None
    policy = load_policy(ModelConfig(name_or_path=str(tiny_model)), adapter, trained_in_full=not lora)
    policy.enable_input_require_grads()  # or the first layer's frozen products have no gradient to pass on
    ids = torch.arange(3 * 40).reshape(3, 40)
    with FlopCounterMode(display=False) as counter:
        policy(input_ids=ids, use_cache=False).logits.sum().backward()
    assert flop.products(policy, tokens=120, labels=120) == counter.get_total_flops()


def test_the_formula_of_attention_is_three_times_that_of_the_forward_pass_of_each_row_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    attention = importlib.import_module("flop").attention
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert attention(policy, [1]) == 3 * 2 * (2 * 64) * 2  # two layers; one key of 4 heads of 16, twice
    assert attention(policy, [5, 7]) == attention(policy, [1]) * (15 + 28)


def test_rows_that_lie_end_to_end_are_told_apart_by_their_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    methods = importlib.import_module("methods")
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "labels": torch.tensor([[-100, 5, 6, -100, 7]])}
    padded = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": torch.tensor([[-100, 5, 6]] * 2)}
    assert [methods.row_lengths(batch) for batch in (packed, padded)] == [[3, 2], [3, 2]]
    assert [methods.count_labels(batch) for batch in (packed, padded)] == [3, 4]


# the check of a GPU


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_a_job_that_fails_hangs_or_cannot_start_is_told_and_the_others_run(gpu: Any, tmp_path: Path) -> None:
    def job(name: str, code: str, limit: float = 60, after: str = "") -> Any:
        return gpu.Job("stage", name, [sys.executable, "-c", code], limit, gpu.last_json, after)

    hangs = "print('{\"half\": 1}', flush=True); import time; time.sleep(60)"
    jobs = [
        job("bad", "print('error: no such thing'); print('Try another.'); raise SystemExit(3)"),
        job("slow", hangs, limit=3),
        job("after bad", "print('{}')", after="bad"),
        job("good", "print('{\"tokens\": 5}')"),
        job("after good", "print('{}')", after="good"),
    ]
    results = gpu.Results(tmp_path)
    gpu.run_jobs(jobs, results, time.monotonic() + 60, {}, together=2)
    found = {line["name"]: line for line in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert {name: line["status"] for name, line in found.items()} == {
        **{"bad": "failed with 3", "slow": "too long", "good": "passed"},
        **{"after bad": "not run", "after good": "passed"},
    }
    assert found["good"]["tokens"] == 5
    assert found["slow"]["half"] == 1
    assert gpu.reason(found["bad"]["said"]) == "error: no such thing"
    assert (tmp_path / "results.md").read_text().count("\n") == 2 + len(jobs)
    gpu.run_jobs([job("late", "")], results, time.monotonic(), {})
    assert results.lines[-1]["status"] == "not run"


def test_every_recipe_runs_in_full_with_an_adapter_and_in_4_bits(gpu: Any, tmp_path: Path) -> None:
    variants = {(name, word.split("=")[0]) for name, *words in gpu.VARIANTS for word in words or ("as it is",)}
    assert {name for name, _ in variants} == set(recipes.BUILTIN)
    online = ("dpo", "kto", "orpo", "ppo", "grpo", "rloo")
    assert variants >= {(name, word) for name in online for word in ("lora.r", "model.load_in_4bit")}
    for variant in gpu.VARIANTS:
        found = recipes.load(variant[0])
        config = resolve(found.config_class, found.name, None, [*gpu.settings(tmp_path, variant), *variant[1:]])
        assert config.train.max_steps == 6
    names = [job.name for stage in gpu.STAGES.values() for job in stage(tmp_path, False, gpu.Results(tmp_path), None)]
    assert len(names) == len(set(names))
    assert {"merge qlora_sft", "generate", "full_sft by FSDP2, one process", "an update of PPO"} <= set(names)
    assert sum(gpu.LIMITS.values()) == 480


def test_the_figures_of_a_comparison_are_rates_shares_and_the_gain_over_the_best_of_trl(gpu: Any) -> None:
    sides = [("ours", 2.0, 300), ("trl", 4.0, 500), ("trl_packed", 3.0, 400)]
    lines = [
        {"job": "dpo", "who": who, "real": 600, "seconds": seconds, "flop": 1000, "first_real": 100, "peak": peak}
        for who, seconds, peak in sides
    ]
    output = "\n".join(["a warning", *(json.dumps({**line, "losses": [0.5]}) for line in lines), "Traceback"])
    found = gpu.speeds(output, best=6000.0)
    assert [found[f"{who}_tokens_s"] for who, *_ in sides] == [300, 150, 200]
    assert found["ours_of_mm"] == 0.5
    assert found["ours_by_best_trl"] == 1.5
    assert found["trl_packed_peak_mib"] == 400


@pytest.mark.long
def test_as_a_program_the_check_says_what_passed_and_writes_it_down(tmp_path: Path) -> None:
    words = ["--toy", "--only", "card", "of full_sft", "--out", tmp_path / "out", "--keep", tmp_path / "kept"]
    said = python(str(ROOT / "benchmarks" / "gpu.py"), *words, cwd=tmp_path)
    assert said.code == 0, said.out + said.err
    assert "3 of 3 passed" in said.out
    card, rows, memory = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert card["card"] == "this CPU"
    assert card["best_mm_tflops"] > 0
    assert rows["tokens_a_word"] > 0
    assert memory["measured_mib"] > memory["weights_mib"] >= 0


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


# helpful against harmless


@pytest.mark.long
def test_the_chain_of_helpful_and_harmless_runs_is_measured_shown_and_not_made_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    safety = importlib.import_module("safety")
    for module in (save, saved):  # runs/test_save.py has the fresh process
        monkeypatch.setattr(module, "prove", lambda *_: Proof(0.0, 1e-4, "float32", "cpu"))
    commands: list[list[str]] = []

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command[4:])
        monkeypatch.setattr("sys.argv", ["finetune_kit", *command[3:]])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return subprocess.CompletedProcess(command, int(stop.value.code or 0))

    write_tiny_model(tmp_path / "model")
    for part in ("train", "test"):
        asked = [f"{part} question {n}?" for n in range(40)]
        hh = [f"\n\nHuman: {text}\n\nAssistant: " for text in asked]
        for name, rows in (
            (
                "dolly_hhrlhf",
                [{"prompt": f"### Instruction:\n{text}\n### Response:", "response": "Yes."} for text in asked],
            ),
            ("hh_harmless", [{"chosen": f"{text}I can't help.", "rejected": f"{text}Sure."} for text in hh]),
            ("ultrafeedback", [{"prompt": text, "chosen": "Yes, so.", "rejected": "No."} for text in asked]),
        ):
            (tmp_path / f"{name}_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["safety.py", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    words += ["--length", "192", "--prompts", "40", "--pairs", "24", "--answers", "24"]
    words += ["--page", str(tmp_path / "frontier.svg"), "--only", "refusing", "dpo_0.50", "reward", "ppo_0.50"]
    monkeypatch.setattr(subprocess, "run", here)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", words)
        safety.main()
        assert [command[0] for command in commands] == ["lora_sft", "dpo", "reward_model", "reward_model", "ppo"]
    said = capsys.readouterr().out
    number = r"[-+]?\d\.\d\d"
    full = (
        rf"{number} \({number}, (?:{number} to {number}|none: every row moved alike)\) (?:better|worse|no difference)"
    )
    rows = {"dpo_0.50": [full] * 6, "ppo_0.50": [full, full, "", "", full, full]}
    for name, cells in rows.items():
        assert len(re.findall(rf"^\| {name} \| refusing \| {' [|] '.join(cells)} \|$", said, re.MULTILINE)) == 2
    page = ElementTree.fromstring((tmp_path / "frontier.svg").read_text())
    labels = [element.text for element in page.iter("{http://www.w3.org/2000/svg}text")]
    assert labels.count("0.50") == 2  # the one weight, in both panels
