"""Implicit rewards of a policy against the policy before: margins, accuracy, and what counts as no change."""

import math
from dataclasses import replace

import pytest
import torch

from finetune_kit.evaluation import preferences
from finetune_kit.evaluation.compare import compare
from finetune_kit.evaluation.measure import Measurement
from finetune_kit.settings.schema import EvaluateConfig

CONFIG = EvaluateConfig(bootstrap_samples=200)


def pairs(chosen: list[float], rejected: list[float]) -> Measurement:
    """A measurement of pairs by the log-probabilities of their answers, 10 tokens each."""
    count = len(chosen)
    return Measurement(
        nll=[-value for value in chosen],
        tokens=[10] * count,
        rejected_nll=[-value for value in rejected],
        rejected_tokens=[10] * count,
        paired=True,
    )


BEFORE = pairs([-20.0, -21, -22, -23], [-18.0, -19, -20, -30])


def five_times(measured: Measurement) -> Measurement:
    """As many rows as a verdict needs."""
    lists = ("nll", "tokens", "rejected_nll", "rejected_tokens")
    return replace(measured, **{name: getattr(measured, name) * 5 for name in lists})


def found(before: Measurement, after: Measurement, beta: float = 0.1) -> dict[str, dict[str, float]]:
    return {entry["name"]: entry for entry in compare(before, after, CONFIG, beta).metrics}


def test_rewards_are_beta_times_what_the_log_probability_gained() -> None:
    after = pairs([-15.0, -21, -24, -23], [-28.0, -19, -18, -31])
    chosen, rejected = preferences.implicit_rewards(BEFORE, after, beta=0.5)
    assert chosen == [2.5, 0, -1, 0]
    assert rejected == [-5, 0, 1, -0.5]
    assert preferences.margins(BEFORE, after, 0.5) == [7.5, 0, -2, 0.5]


def test_nothing_learned_is_half_right_with_no_margin_and_no_difference() -> None:
    noise = pairs([-20.0005, -21, -22, -23.0005], [-18.0, -19.0005, -20, -30])
    for after in (BEFORE, noise):  # 5e-5 nats a token are rounding
        entries = found(five_times(BEFORE), five_times(after))
        assert (entries["preference_accuracy"]["before"], entries["preference_accuracy"]["after"]) == (0.5, 0.5)
        assert entries["reward_margin"]["after"] == 0
        assert entries["preference_accuracy"]["verdict"] == entries["held_out_loss"]["verdict"] == "no difference"


def test_accuracy_counts_pairs_won_and_half_of_those_that_did_not_move() -> None:
    after = pairs([-15.0, -21, -24, -23], [-28.0, -19, -18, -31])  # margins above 0, 0, below 0, above 0
    entries = found(BEFORE, after)
    assert entries["preference_accuracy"]["after"] == (1 + 0.5 + 0 + 1) / 4
    assert entries["reward_margin"]["after"] == pytest.approx(0.1 * (15 + 0 - 4 + 1) / 4)
    assert (entries["chosen_is_likelier"]["before"], entries["chosen_is_likelier"]["after"]) == (0.25, 0.5)


def test_a_falling_likelihood_of_the_chosen_answers_is_said_in_words() -> None:
    after = pairs([-30.0, -31, -32, -33], [-58.0, -59, -60, -70])
    report = compare(five_times(BEFORE), five_times(after), CONFIG, 0.1)
    assert report.main == "preference_accuracy"
    assert "The chosen answers became less likely, nats a token: 2.150 → 3.150." in report.verdict
    assert (report.wins, report.ties, report.losses) == (20, 0, 0)
    accuracy = report.metrics[0]  # 20 of 20: Clopper and Pearson's lower end is 0.832
    assert [round(end + 0.5, 3) for end in accuracy["interval"]] == [0.832, 1.0]
    few = compare(BEFORE, after, CONFIG, 0.1)
    assert {line["verdict"] for line in few.metrics} == {"too few to judge (4 rows)"}
    assert "less likely" not in few.verdict
    from_few = compare(replace(five_times(BEFORE), sources=10), five_times(after), CONFIG, 0.1)
    assert {line["verdict"] for line in from_few.metrics} == {"too few to judge (10 rows)"}
    assert not from_few.improved


def test_on_the_way_the_loss_is_the_sigmoid_loss_at_beta() -> None:
    after = pairs([-15.0, -21, -24, -23], [-28.0, -19, -18, -31])
    margins = torch.tensor(preferences.margins(BEFORE, after, 0.1))
    scores = preferences.scores(BEFORE, after, 0.1)
    assert scores["loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()))
    assert scores["preference_accuracy"] == (1 + 0.5 + 0 + 1) / 4
    assert preferences.scores(BEFORE, BEFORE, 0.1)["loss"] == pytest.approx(math.log(2))


def test_labelled_answers_are_right_where_liked_ones_gained_and_the_others_lost() -> None:
    before = replace(BEFORE, paired=False)
    after = replace(pairs([-15.0, -25, -22, -23], [-28.0, -19, -18, -31]), paired=False)
    entries = found(before, after)
    assert entries["preference_accuracy"]["after"] == (1 + 0 + 0.5 + 0.5 + 1 + 0.5 + 0 + 1) / 8
    assert "reward_margin" not in entries


def test_the_kl_divergence_is_of_the_policy_from_the_one_before() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.25, 0.25]])
    before, after = (replace(BEFORE, positions=[([1], [0])], log_probs=table.log()) for table in (q, p))
    expected = float((p * (p / q).log()).sum())
    assert found(before, after)["kl_to_reference"]["after"] == pytest.approx(expected, abs=1e-6)
    assert found(before, before)["kl_to_reference"]["after"] == pytest.approx(0, abs=1e-6)
