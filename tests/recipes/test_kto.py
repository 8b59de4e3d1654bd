"""kto: single answers with a label each, on TRL's trainer with our tokens."""

import json
from pathlib import Path

import pytest
import torch

from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.evaluation.loss import row_losses
from tests.fixtures_training import fit_only, furnish_pairs, prepare, train

ROWS = [
    {"prompt": f"{n} + {n} =", "completion": f"it is {2 * n}" if n % 2 else f"no {n}", "label": bool(n % 2)}
    for n in range(40)
]


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    return furnish_pairs(tmp_path, tiny_model, ROWS)


def test_a_whole_run_makes_liked_answers_likelier_than_they_were_and_the_others_less(home: Path) -> None:
    artifact = train("kto", home, "max_steps=10", "learning_rate=5e-3", "held_out_size=8", "eval_steps=5")
    found = {entry["name"]: entry for entry in artifact.report.metrics}
    assert found["preference_accuracy"]["after"] > found["preference_accuracy"]["before"] == 0.5
    assert found["held_out_loss"]["after"] < found["held_out_loss"]["before"]
    lines = [json.loads(line) for line in (artifact.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # every reward is 0, so is the KL divergence
    assert (artifact.folder / "adapter_model.safetensors").is_file()


def test_the_loss_of_a_batch_is_the_formula_of_the_docstring(home: Path) -> None:
    words = ("per_device_train_batch_size=6", "learning_rate=1e-2", "beta=0.3", "undesirable_weight=2")
    start = prepare("kto", home, *words)
    rows = [start.trainer.train_dataset[index] for index in range(6)]
    swapped = [{**row, "completion_ids": row["KL_completion_ids"]} for row in rows]
    batches = (rows, swapped)
    old = [
        row_losses(start.model, [sequences(row)["completion"] for row in batch], [""] * 6, 6)[0] for batch in batches
    ]
    run = fit_only("kto", home, "max_steps=4", *words)
    new = [row_losses(run.model, [sequences(row)["completion"] for row in batch], [""] * 6, 6)[0] for batch in batches]
    reward, other = (0.3 * (torch.tensor(was) - torch.tensor(now)) for was, now in zip(old, new, strict=True))
    z = other.mean().clamp_min(0)
    liked = torch.tensor([row["label"] for row in rows])
    losses = torch.where(liked, 1 - torch.sigmoid(reward - z), 2 * (1 - torch.sigmoid(z - reward)))
    with torch.no_grad():
        loss = run.trainer.compute_loss(run.model.eval(), run.trainer.data_collator(rows))
    assert float(loss) == pytest.approx(float(losses.mean()), abs=1e-5)


def test_each_batch_of_4_has_its_own_answers_moved_by_one_for_the_kl_divergence(home: Path) -> None:
    rows = prepare("kto", home).trainer.train_dataset
    assert len(rows) == 37
    for start in range(0, 37, 4):
        batch = rows[start : start + 4]
        answers = batch["completion_ids"]
        assert batch["KL_completion_ids"] == [answers[-1], *answers[:-1]]


def test_pairs_are_taken_as_a_liked_and_a_disliked_answer(home: Path) -> None:
    pairs = [{"prompt": f"{n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    (home / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    run = fit_only("kto", home, "learning_rate=5e-3", "max_steps=6")
    assert sum(run.data.train["label"]) * 2 == len(run.data.train) > 30
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("word", ["beta=0", "desirable_weight=0", "undesirable_weight=-1"])
def test_numbers_out_of_range_are_refused(home: Path, word: str) -> None:
    with pytest.raises(SettingsError, match=r"expected a number in \(0, 10\]"):
        prepare("kto", home, word)


def test_rows_of_one_label_alone_are_told_at_start(home: Path) -> None:
    def write(label: bool) -> None:
        (home / "rows.jsonl").write_text("\n".join(json.dumps({**row, "label": label}) for row in ROWS))

    write(True)
    notes = prepare("kto", home).data.ledger.notes
    assert [note for note in notes if "all 37 training rows are liked: KTO learns from both" in note]
    write(False)
    with pytest.raises(DataError, match=r"all 37 training rows are disliked \(label false\)"):
        prepare("kto", home)
