"""lora_sft from the first row to the proven artifact."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finetune_kit.evaluation.compare import compare
from finetune_kit.evaluation.measure import measure
from finetune_kit.runs.save import Artifact
from tests.fixtures_training import fit_only, settings, train


def metrics(run: Artifact) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_the_folder_holds_the_adapter_the_tokenizer_the_record_the_report_and_the_card(lora_run: Artifact) -> None:
    files = {path.name for path in lora_run.folder.iterdir()}
    assert files == {
        "run.yaml",
        "identity.json",
        "ledger.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "README.md",
        "adapter_model.safetensors",
        "adapter_config.json",
        "base.json",
        "ancestry.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        *(path.name for path in lora_run.folder.glob("checkpoint-*")),
    }


def test_the_report_holds_before_and_after_of_the_same_3_answers_and_rows(lora_run: Artifact) -> None:
    report = json.loads((lora_run.folder / "report.json").read_text())
    assert report["rows"] == {"held_out": 3, "answered": 3}
    assert {metric["name"] for metric in report["metrics"]} >= {"exact_match", "held_out_loss", "answers_ended"}
    assert all(set(sample) >= {"before", "after", "reference"} for sample in report["samples"])


def test_the_held_out_loss_on_the_way_is_that_of_the_report_at_the_end(lora_run: Artifact) -> None:
    after = next(metric["after"] for metric in lora_run.report.metrics if metric["name"] == "held_out_loss")
    assert after == pytest.approx(min(line["eval_loss"] for line in metrics(lora_run) if "eval_loss" in line), abs=1e-6)


def test_the_base_stays_as_it_was_and_every_adapter_matrix_moves(home: Path) -> None:
    from safetensors.torch import load_file

    run = fit_only("lora_sft", home, "max_steps=3", "learning_rate=1e-3")
    base = load_file(home / "tiny" / "model.safetensors")
    frozen = {name: p for name, p in run.model.get_base_model().named_parameters() if not p.requires_grad}
    for name, weight in base.items():
        found = frozen.get(name, frozen.get(name.replace(".weight", ".base_layer.weight")))
        assert found is not None, name
        assert torch.equal(found, weight), name
    assert len(run.start) == 2 * 2 * 7  # A and B of 7 layers in 2 blocks
    assert all(not torch.equal(run.start[name], weight) for name, weight in run.weights.items())


@pytest.mark.parametrize(
    ("words", "ratio"), [(("r=4", "lora_alpha=8"), 2.0), (("r=4", "lora_alpha=8", "use_rslora=true"), 4.0)]
)
def test_the_update_is_scaled_by_alpha_over_r_or_over_its_root(
    home: Path, words: tuple[str, ...], ratio: float
) -> None:
    run = fit_only("lora_sft", home, *words, "target_modules=[q_proj]")
    layer = run.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == ratio
    assert layer.lora_A["default"].weight.shape[0] == 4


@pytest.fixture(scope="module")
def everything_at_once(shared_home: Path) -> Artifact:
    """DoRA, rank-stabilised, with the whole head trained beside it, on a model whose head is tied to its embedding."""
    words = ("use_dora=true", "use_rslora=true", "modules_to_save=[lm_head]", "learning_rate=1e-2", "save_steps=2")
    return train("lora_sft", shared_home, *words)


def test_dora_rslora_and_a_trained_head_reload_within_1e_4(everything_at_once: Artifact) -> None:
    report = json.loads((everything_at_once.folder / "report.json").read_text())
    assert report["reload_max_logit_difference"] <= 1e-4


def test_the_trained_head_of_a_tied_model_is_saved_and_the_embedding_is_not(everything_at_once: Artifact) -> None:
    from safetensors.torch import load_file

    saved = load_file(everything_at_once.folder / "adapter_model.safetensors")
    assert [name for name in saved if "lm_head" in name]
    assert not [name for name in saved if "embed_tokens" in name]
    assert [name for name in saved if "magnitude" in name]


def test_plain_text_is_trained_packed_and_its_perplexity_falls(home: Path) -> None:
    book = home / "book.txt"
    book.write_text("\n\n".join(f"The {n}th line says that {n} times {n} is {n * n}." for n in range(300)))
    words = (f"data.path={book}", "max_length=64", "learning_rate=1e-2", "max_steps=4", "held_out_size=12")
    run = fit_only("lora_sft", home, *words)
    assert run.trainer.args.packing
    after = measure(run.model, run.tokenizer, run.data, run.config.evaluate)
    with run.model.disable_adapter():
        before = measure(run.model, run.tokenizer, run.data, run.config.evaluate)
    report = compare(before, after, run.config.evaluate)
    assert [metric["name"] for metric in report.metrics] == [
        "held_out_loss",
        "held_out_perplexity",
        "held_out_bits_per_byte",
    ]
    assert report.metrics[1]["after"] < report.metrics[1]["before"]
    assert report.rows["answered"] == 0
    assert report.main == "held_out_loss"


@pytest.mark.long
def test_a_run_that_learns_nothing_on_4_rows_is_not_judged_and_does_not_pass_require_improved(home: Path) -> None:
    config = settings("lora_sft", home)
    words = [
        f"model.name_or_path={config.model.name_or_path}",
        f"data.path={config.data.path}",
        f"output_dir={home / 'nothing'}",
        *("learning_rate=0", "max_steps=1", "held_out_size=4", "evaluate.size=4", "evaluate.general_text=false"),
    ]
    command = [sys.executable, "-m", "finetune_kit", "run", "lora_sft", *words, "--require", "improved"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 4, done.stderr
    assert "--require improved: Too few to judge (4 rows)" in done.stderr
    report = json.loads((home / "nothing" / "report.json").read_text())
    assert [metric["difference"] for metric in report["metrics"]] == [0.0] * len(report["metrics"])
    assert {metric["verdict"] for metric in report["metrics"]} == {"too few to judge (4 rows)"}
    assert (report["wins"], report["ties"], report["losses"]) == (0, 4, 0)
