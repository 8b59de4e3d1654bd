"""orpo: chosen answers are learned and preferred at once, without a reference."""

from pathlib import Path

import pytest
import torch

from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.loss import row_losses
from tests.fixtures_training import fit_only, furnish_pairs, prepare, train

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}", "rejected": f"no {n}"} for n in range(40)]


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    return furnish_pairs(tmp_path, tiny_model, PAIRS)


def test_a_whole_run_makes_chosen_answers_likelier_and_prefers_them(home: Path) -> None:
    artifact = train("orpo", home, "max_steps=10", "learning_rate=5e-3", "held_out_size=6", "eval_steps=5")
    found = {entry["name"]: entry for entry in artifact.report.metrics}
    assert found["preference_accuracy"]["after"] > 0.5
    assert found["held_out_loss"]["after"] < found["held_out_loss"]["before"]
    assert found["held_out_loss"]["verdict"] == "too few to judge (6 rows)"


@pytest.mark.parametrize("words", [(), ("padding_free=false",), ("lora.r=0",)])
def test_the_loss_of_a_batch_is_the_formula_of_the_docstring(home: Path, words: tuple[str, ...]) -> None:
    run = fit_only("orpo", home, "max_steps=2", "learning_rate=1e-3", "beta=0.7", *words)
    samples = [sequences(run.data.train[index]) for index in range(4)]
    means = []
    for side in ("chosen", "rejected"):
        nll, tokens = row_losses(run.model, [sample[side] for sample in samples], [""] * 4, 4)
        means.append(-torch.tensor(nll) / torch.tensor(tokens))
    odds = [log - torch.log1p(-log.exp()) for log in means]  # log(p / (1 - p))
    whole = [(sample["chosen"][0], sample["chosen"][0]) for sample in samples]
    nll, tokens = row_losses(run.model, whole, [""] * 4, 4)
    expected = sum(nll) / sum(tokens) - 0.7 * torch.nn.functional.logsigmoid(odds[0] - odds[1]).mean()
    rows = [run.trainer.train_dataset[index] for index in range(4)]
    with torch.no_grad():
        loss = run.trainer.compute_loss(run.model.eval(), run.trainer.data_collator(rows))
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)


def test_beta_must_be_above_0(home: Path) -> None:
    with pytest.raises(SettingsError, match=r"expected a number in \(0, 10\]"):
        prepare("orpo", home, "beta=0")
