"""full_sft from the first row to the proven artifact."""

import json
from pathlib import Path

import torch

from finetune_kit.runs.save import Artifact
from tests.fixtures_training import fit_only


def test_60_steps_on_one_answer_teach_it_and_the_report_says_better(full_run: Artifact) -> None:
    exact = full_run.report.metrics[0]
    assert (exact["name"], exact["before"], exact["after"]) == ("exact_match", 0.0, 1.0)
    assert full_run.report.improved
    assert full_run.report.verdict.startswith("Better")
    assert (full_run.report.wins, full_run.report.ties, full_run.report.losses) == (20, 0, 0)


def test_the_answers_end_by_themselves_afterwards(full_run: Artifact) -> None:
    ended = next(metric for metric in full_run.report.metrics if metric["name"] == "answers_ended")
    assert (ended["before"], ended["after"]) == (0.0, 1.0)


def test_the_folder_holds_a_whole_model(full_run: Artifact) -> None:
    files = {path.name for path in full_run.folder.iterdir()}
    assert files == {
        "run.yaml",
        "identity.json",
        "checkpoint-60",
        "ledger.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "README.md",
        "ancestry.json",
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }


def test_plain_transformers_answers_from_the_folder_and_stops_at_the_templates_end_token(full_run: Artifact) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(full_run.folder)
    model = AutoModelForCausalLM.from_pretrained(full_run.folder)
    asked = [{"role": "user", "content": "is 1234 a number?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) == "yes<|im_end|>"


def test_every_tensor_of_the_model_moves(home: Path) -> None:
    run = fit_only("full_sft", home, "max_steps=3", "learning_rate=1e-3")
    assert {name for name, _ in run.model.named_parameters()} == set(run.start)
    unmoved = [name for name, weight in run.weights.items() if torch.equal(run.start[name], weight)]
    assert unmoved == []


def test_the_weights_are_saved_in_float32(full_run: Artifact) -> None:
    from safetensors.torch import load_file

    assert {tensor.dtype for tensor in load_file(full_run.folder / "model.safetensors").values()} == {torch.float32}
    assert json.loads((full_run.folder / "config.json").read_text())["dtype"] == "float32"
