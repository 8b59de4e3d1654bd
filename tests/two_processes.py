"""One of two processes, or one alone: trains recipes on the same rows in the same steps and writes what came out.

`two_processes.py HOME NAME`; each process writes HOME/NAME-<its number>.json, with the figures of each recipe.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from finetune_kit import distributed
from finetune_kit.evaluation.measure import measure
from finetune_kit.evaluation.reward_gate import measure_rewards
from finetune_kit.training.fit import fit
from tests.fixtures_training import Trained, fit_only, prepare, write_rows

TOGETHER = 8  # rows in a step, of all processes
ALIKE = {
    "lora_sft": (),
    # the last step of an epoch has 5 rows for 3 passes of 2 processes
    "lora_sft by tokens": ("max_tokens_per_batch=70", "train_sampling_strategy=group_by_length", "data.size=21"),
    "full_sft": (),
    "qlora_sft": (),
    "reward_model": (),
    "dpo": ("precompute_ref_log_probs=true",),
    "dpo by tokens": ("precompute_ref_log_probs=true", "max_tokens_per_batch=200"),
    "kto": (),
    "orpo": (),
}
STEPS = ("max_steps=-1", "num_train_epochs=2", "gradient_accumulation_steps=1", "learning_rate=1e-3")


def write_home(home: Path, tiny_model: Path) -> None:
    """`tiny` and, for each kind of rows, a file: sums with answers of 1 to 28 bytes, 22 to train on."""
    (home / "tiny").symlink_to(tiny_model, target_is_directory=True)
    answers = [(f"{n} + {n * n} =", str(n + n * n), " exactly" * (n % 4)) for n in range(25)]
    said = [{"prompt": prompt, "completion": number + tail} for prompt, number, tail in answers]
    pairs = [
        {"prompt": prompt, "chosen": number, "rejected": number[::-1] + tail + "!"} for prompt, number, tail in answers
    ]
    write_rows(home / "prompt_completion.jsonl", said)
    write_rows(home / "preference.jsonl", pairs)
    write_rows(home / "labelled_completion.jsonl", [{**row, "label": n % 3 > 0} for n, row in enumerate(said)])


def train(job: str, home: Path, name: str) -> Trained:
    """A job is a recipe's name, and maybe words that tell it from others."""
    recipe = job.partition(" ")[0]
    kinds = {"reward_model": "preference", "dpo": "preference", "orpo": "preference", "kto": "labelled_completion"}
    rows = home / f"{kinds.get(recipe, 'prompt_completion')}.jsonl"
    words = [f"data.path={rows}", f"per_device_train_batch_size={TOGETHER // distributed.count()}"]
    return fit_only(recipe, home, *words, *STEPS, *ALIKE[job], f"output_dir={home / name / job}")


def figures(run: Trained) -> dict[str, Any]:
    """The losses of all steps, and what an evaluation counts."""
    if run.config.recipe == "reward_model":
        measured: Any = measure_rewards(run.model, run.tokenizer, run.data, run.config.evaluate)
        scores = {"chosen": measured.chosen, "where": measured.where}
    else:
        run.config.evaluate.size = 3
        measured = measure(run.model, run.tokenizer, run.data, run.config.evaluate)
        answers = [completion.text for completion in measured.completions]
        scores = {"nll": measured.nll, "tokens": measured.tokens, "where": measured.where, "answers": answers}
    weights = sum(float(weight.double().abs().sum()) for weight in run.weights.values())
    return {"losses": run.losses, "weights": weights, **scores}


def kept(home: Path, folder: str) -> Trained:
    """A run with dropout and a checkpoint after each of its 6 steps, up to the first step that is still to be taken."""
    saved = ("lora.lora_dropout=0.3", "save_steps=1", "save_total_limit=99")
    words = (*saved, "per_device_train_batch_size=4", "max_tokens_per_batch=200", *STEPS)
    places = (f"data.path={home / 'prompt_completion.jsonl'}", f"output_dir={home / folder}")
    run = prepare("lora_sft", home, *places, *words)
    torch.manual_seed(12345 + distributed.rank())
    return run


def resumed(home: Path) -> dict[str, Any]:
    """Whether a run cut after step 4, in the second epoch, is the uninterrupted one to the bit when it continues."""
    whole = kept(home, "whole")
    lines = fit(whole.trainer, whole.config.train, whole.score)
    if distributed.is_main():
        shutil.copytree(whole.folder, home / "cut")
        for step in (5, 6):
            shutil.rmtree(home / "cut" / f"checkpoint-{step}")
    distributed.barrier()
    again = kept(home, "cut")
    losses = [line["loss"] for line in fit(again.trainer, again.config.train, again.score) if "loss" in line]
    same = all(torch.equal(weight, whole.weights[name]) for name, weight in again.weights.items())
    return {"losses": losses, "whole": [line["loss"] for line in lines if "loss" in line], "weights": same}


if __name__ == "__main__":
    home, name = Path(sys.argv[1]), sys.argv[2]
    if distributed.count() > 1:
        distributed.start(on_cpu=True)
    found = {recipe: figures(train(recipe, home, name)) for recipe in ALIKE}
    found["resumed"] = resumed(home)
    (home / f"{name}-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.finish()
