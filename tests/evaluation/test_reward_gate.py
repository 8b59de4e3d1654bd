"""evaluation/reward_gate.py: how good scores are on held-out pairs, what else explains them, and the gate for PPO."""

import json
import math
import random
from pathlib import Path

import pytest

from finetune_kit.data.load import Data, load_data
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.evaluation.charts import reliability_plot
from finetune_kit.evaluation.report_html import write_html
from finetune_kit.evaluation.reward_gate import (
    Rewards,
    accuracy_by_margin,
    calibration,
    compare_rewards,
    correlation,
    gate,
    held_out_rewards,
    length_rule,
    measure_rewards,
    pair_losses,
    rights,
    share_interval,
)
from finetune_kit.models.reward import load_reward_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.settings.schema import DataConfig, EvaluateConfig, LoraConfig, ModelConfig
from tests.fixtures_data import bpe_tokenizer, write_jsonl

CONFIG = EvaluateConfig(bootstrap_samples=200)
N = 40


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """40 training and 40 held-out pairs; the chosen answer is longer in 3 of 4, margins are 0 to 3."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        {"prompt": f"q{n}", "chosen": f"a{n}" + " more" * (n % 4), "rejected": f"b{n} <b>x", "margin": float(n % 4)}
        for n in range(2 * N)
    ]
    held = write_jsonl(folder / "held.jsonl", rows[N:])
    path = write_jsonl(folder / "train.jsonl", rows[:N])
    return load_data(DataConfig(path=str(path), held_out_path=str(held)), "preference", bpe_tokenizer())


def scored(differences: list[float], data: Data, endless: float = 0.5, beside: float = 0.0) -> Rewards:
    """Scores with these differences; `endless` and `beside`: what the end token and the partner add to a score."""
    chosen, rejected = [0.5 * number for number in differences], [-0.5 * number for number in differences]
    sides = list(zip(chosen, rejected, strict=True))
    return Rewards(
        chosen=chosen,
        rejected=rejected,
        lengths=[(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in data.held_out],
        where=[record.where for record in data.held_out_records],
        turned=[(good, bad, good, bad + beside) for good, bad in sides],
        endless=[(good - endless, bad - endless) for good, bad in sides],
    )


def report(differences: list[float], data: Data, **kwargs: float):
    return compare_rewards(scored([0.0] * N, data), scored(differences, data, **kwargs), data, CONFIG)


def test_a_perfect_scorer_has_accuracy_1_a_constant_one_a_half_and_a_reversed_one_0() -> None:
    assert mean(rights([1.0] * 7)) == 1
    assert mean(rights([0.0] * 7)) == 0.5
    assert mean(rights([-1.0] * 7)) == 0
    assert mean(rights([2.0, -2.0, 0.0, 0.0])) == 0.5


def test_the_loss_of_a_pair_is_minus_log_sigmoid_and_overflows_nowhere() -> None:
    assert pair_losses([0.0]) == [pytest.approx(math.log(2))]
    assert pair_losses([1.5, -1.5]) == pytest.approx([-math.log(1 / (1 + math.exp(-x))) for x in (1.5, -1.5)])
    assert pair_losses([1e4, -1e4]) == pytest.approx([0.0, 1e4])


def test_the_interval_of_a_share_holds_it_in_about_95_of_100_draws_and_stays_within_0_and_1() -> None:
    draw = random.Random(0)
    for truth in (0.6, 0.95):
        held = 0
        for _ in range(400):
            low, high = share_interval([float(draw.random() < truth) for _ in range(50)])
            held += low <= truth <= high
        assert 0.92 <= held / 400 <= 0.99
    low, high = share_interval([1.0] * 20)
    assert (round(low, 3), high) == (0.832, 1.0)  # Clopper and Pearson's
    assert share_interval([0.5] * 20) == pytest.approx([0.5 - 0.168 / 2, 0.5 + 0.168 / 2], abs=1e-3)


def test_the_length_rule_is_chosen_on_the_training_pairs_and_measured_on_the_held_out_ones() -> None:
    longer, shorter = (9, 3), (3, 9)
    found = length_rule([longer, longer, longer, shorter], [longer, shorter, shorter, (5, 5)])
    assert (found["rule"], found["train_accuracy"], found["accuracy"]) == ("the longer answer wins", 0.75, 0.375)
    found = length_rule([shorter, shorter, longer], [longer, shorter, shorter, (5, 5)])
    assert (found["rule"], found["accuracy"]) == ("the shorter answer wins", 0.625)


def test_scores_whose_win_probability_is_true_are_calibrated_and_five_times_as_large_ones_are_not() -> None:
    draw = random.Random(1)
    differences = []
    for _ in range(20_000):
        size = draw.uniform(0, 3)
        differences.append(size if draw.random() < 1 / (1 + math.exp(-size)) else -size)
    true = calibration(differences)
    assert true["error"] < 0.015
    assert sum(item["pairs"] for item in true["bins"]) == 20_000
    # an interval of 95 % each: of 10 bins one may miss
    assert sum(low <= b["confidence"] <= high for b in true["bins"] for low, high in [b["interval"]]) >= 9
    sure = calibration([5 * number for number in differences])
    assert sure["error"] > 0.1
    assert sure["mean_confidence"] > true["mean_confidence"] + 0.1


def test_ties_are_calibrated_at_a_half() -> None:
    assert calibration([0.0] * 10) == {
        "error": 0.0,
        "mean_confidence": 0.5,
        "bins": [{"confidence": 0.5, "accuracy": 0.5, "interval": share_interval([0.5] * 10), "pairs": 10}],
    }


def test_accuracy_is_told_for_small_middle_and_large_margins_and_unknown_ones_are_left_out() -> None:
    margins = [1.0] * 10 + [2.0] * 10 + [3.0] * 10 + [math.nan] * 5
    differences = [-1.0] * 10 + [1.0, -1.0] * 5 + [1.0] * 10 + [-1.0] * 5
    found = accuracy_by_margin(differences, margins)
    assert [(part["from"], part["to"], part["pairs"], part["accuracy"]) for part in found] == [
        (1, 1, 10, 0.0),
        (2, 2, 10, 0.5),
        (3, 3, 10, 1.0),
    ]
    assert accuracy_by_margin([1.0], [math.nan]) == []
    (one,) = accuracy_by_margin([1.0, -1.0], [2.0, 2.0])
    assert (one["pairs"], one["accuracy"]) == (2, 0.5)


def test_correlation_is_pearson_s_and_none_without_variance() -> None:
    assert correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert correlation([1, 2, 3], [5, 1, -3]) == pytest.approx(-1)
    assert correlation([1, 2, 3, 4], [1, -1, -1, 1]) == pytest.approx(0)
    assert correlation([1, 2], [3, 3]) is None


def test_the_gate_opens_where_the_interval_is_above_chance_and_above_the_length_rule() -> None:
    good = [1.0] * 80 + [-1.0] * 20  # interval 0.711 to 0.867
    assert gate(good, 0.7)["passed"]
    against_length = gate(good, 0.72)
    assert not against_length["passed"]
    assert against_length["reason"].endswith("is not above 0.720, which a length-only rule gets")
    chance = gate([1.0] * 55 + [-1.0] * 45, 0.4)
    assert not chance["passed"]
    assert chance["reason"].endswith("its lower end is not above 0.5, which is chance")
    assert chance["accuracy"] == 0.55


def test_the_report_carries_the_gate_at_the_top_and_is_json(data: Data) -> None:
    found = report([3.0] * N, data).to_json()
    assert json.loads(json.dumps(found, allow_nan=False))["gate"] == {
        "passed": True,
        "accuracy": 1.0,
        "interval": share_interval([1.0] * N),
        "length_rule_accuracy": found["length_rule"]["accuracy"],
        "reason": found["gate"]["reason"],
    }
    assert found["verdict"].startswith("Good enough for PPO: accuracy 1.000 on 40 held-out pairs")
    assert (found["wins"], found["ties"], found["losses"], found["main"]) == (N, 0, 0, "preference_accuracy")
    assert [part["from"] for part in found["accuracy_by_margin"]] == [0, 1, 2]
    assert found["mistakes"] == []


def test_a_scorer_that_goes_by_length_alone_does_not_pass_and_is_said_to(data: Data) -> None:
    found = report([float(len(row["chosen_ids"]) - len(row["rejected_ids"])) for row in data.held_out], data)
    assert found.details["length_correlation"]["differences_within_pairs"] == pytest.approx(1)
    assert found.details["gate"]["accuracy"] == found.details["length_rule"]["accuracy"]
    assert not found.details["gate"]["passed"]
    assert found.verdict.startswith("Not good enough for PPO")
    assert "It goes by length: rewards and lengths within pairs correlate by +1.00." in found.verdict


def test_a_score_blind_to_the_end_token_too_sure_or_moved_by_its_partner_is_said_to_be(data: Data) -> None:
    calm = report([1.0] * 30 + [-1.0] * 10, data).verdict
    for sentence in ("cannot reward ending", "too sure of itself", "Turned round"):
        assert sentence not in calm
    assert "It cannot reward ending" in report([1.0] * N, data, endless=0.0).verdict
    assert (
        "too sure of itself: mean win probability 1.00, right in 0.75" in report([9.0] * 30 + [-9.0] * 10, data).verdict
    )
    beside = report([1.0] * N, data, beside=5.0)
    assert "Turned round, only 0.00 of the pairs keep their preference." in beside.verdict
    assert beside.details["turned_round"] == {"pairs": N, "agreement": 0.0, "largest_difference": 5.0}


def test_the_surest_mistakes_are_shown_worst_first(data: Data) -> None:
    found = report([1.0] * 30 + [-float(n) for n in range(1, 11)], data).details["mistakes"]
    assert [pair["scores"] for pair in found] == [[-n / 2, n / 2] for n in (10, 9, 8, 7, 6)]
    assert found[0]["where"] == "held.jsonl:40"
    assert (found[0]["prompt"], found[0]["rejected"]) == ("q79", "b79 <b>x")


def test_report_html_has_the_reliability_plot_and_escapes_the_mistakes(data: Data, tmp_path: Path) -> None:
    found = report([1.0] * 30 + [-1.0] * 10, data)
    write_html(found, [], {"recipe": "reward_model"}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert reliability_plot(found.details["calibration"]) in page
    assert page.count("score -0.500") == 5
    assert "b70 &lt;b&gt;x" in page
    assert "b70 <b>x" not in page
    assert "length_rule.accuracy" in page


def test_other_pairs_before_than_after_are_no_comparison(data: Data) -> None:
    other = scored([0.0] * N, data)
    other.where = other.where[::-1]
    with pytest.raises(ValueError, match="same pairs"):
        compare_rewards(other, scored([1.0] * N, data), data, CONFIG)


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A tiny reward model with its tokenizer and 12 held-out pairs."""
    config = ModelConfig(name_or_path=str(tiny_model))
    tokenizer = load_tokenizer(config)
    rows = [{"prompt": f"q{n}", "chosen": "yes " * (1 + n % 3), "rejected": f"no {n}"} for n in range(20)]
    path = write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    data = load_data(DataConfig(path=str(path), held_out_size=12), "preference", tokenizer)
    return load_reward_model(config, LoraConfig(r=4), tokenizer, data.end_token_ids), tokenizer, data


def test_measuring_scores_whole_sequences_twice_alike_and_leaves_the_mode_alone(measured) -> None:
    import torch

    model, tokenizer, data = measured
    model.train()
    found = measure_rewards(model, tokenizer, data, CONFIG)
    assert model.training
    model.eval()
    row = data.held_out[0]
    with torch.no_grad():
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
        alone, endless = model(ids).logits.item(), model(ids[:, :-1]).logits.item()
    assert found.chosen[0] == pytest.approx(alone, abs=1e-6)
    assert found.endless[0][0] == pytest.approx(endless, abs=1e-6)
    assert len(found.chosen) == len(found.rejected) == len(found.turned) == len(found.endless) == 12
    for good, bad, good_again, bad_again in found.turned:
        assert (good, bad) == pytest.approx((good_again, bad_again), abs=1e-6)
    watched = held_out_rewards(model, tokenizer, data, CONFIG)
    assert watched["loss"] == pytest.approx(mean(pair_losses(found.differences)))
    assert watched["preference_accuracy"] == mean(rights(found.differences))


def test_metrics_of_answers_no_pairs_and_a_broken_head_are_refused(measured, tmp_path: Path) -> None:
    model, tokenizer, data = measured
    with pytest.raises(SettingsError, match=r"rouge. has no effect: a reward model writes no answers"):
        measure_rewards(model, tokenizer, data, EvaluateConfig(metrics=["rouge"]))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    without = load_data(DataConfig(path=str(path), held_out_size=0), "preference", tokenizer)
    with pytest.raises(DataError, match="no held-out pair"):
        measure_rewards(model, tokenizer, without, CONFIG)
    head = model.get_base_model().score.modules_to_save["default"].weight
    kept = head.data.clone()
    head.data.fill_(math.nan)
    with pytest.raises(NumericsError, match=r"rows.jsonl:\d+: the model's score is nan"):
        measure_rewards(model, tokenizer, data, CONFIG)
    head.data.copy_(kept)


def test_a_gate_does_not_pass_on_fewer_than_20_pairs() -> None:
    few, enough = gate([1.0] * 19, 0.5), gate([1.0] * 20, 0.5)
    assert (few["passed"], enough["passed"]) == (False, True)
    assert "on 19 held-out pairs" in few["reason"]
    assert few["reason"].endswith("too few to judge, 20 pairs are needed")
    of_4 = gate([1.0] * 24, 0.5, sources=4)  # every pair of 4 rows with 4 ranked answers each
    assert not of_4["passed"]
    assert of_4["reason"].endswith("of 4 rows: too few to judge, 20 rows are needed")
