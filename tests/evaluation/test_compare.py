"""evaluation/compare.py: measured on the same rows, judged by a paired bootstrap, and honest about no difference."""

import json
import math

import numpy as np
import pytest
import torch

from finetune_kit.data.records import Text
from finetune_kit.errors import DataError, NumericsError, SettingsError
from finetune_kit.evaluation.compare import compare, held_out_scores
from finetune_kit.evaluation.intervals import SHARE, agreeing_interval, bootstrap_interval, entry, spread_of
from finetune_kit.evaluation.measure import Measurement, measure
from finetune_kit.generation.generate import Completion
from finetune_kit.settings.schema import EvaluateConfig
from tests.fixtures_evaluation import byte_tokenizer, held_out, tiny_llama

TOKENIZER = byte_tokenizer()
PAIRS = [(f"what is {n}?", f"it is {n * n}") for n in range(9)]
CONFIG = EvaluateConfig(size=6, batch_size=4, bootstrap_samples=400)


def table(before, after, weights=None):
    return np.array([before, after, weights or [1] * len(before)], dtype=float)


def scored(values, nll=None, tokens=None, ended=True):
    """A measurement with one score a row."""
    n = len(values)
    return Measurement(
        metrics={"exact_match": list(values)},
        nll=nll or [10.0] * n,
        tokens=tokens or [5] * n,
        where=[f"x:{row}" for row in range(n)],
        prompts=["p"] * n,
        conversations=["p"] * n,
        references=["r"] * n,
        completions=[Completion([1], "answer", ended)] * n,
    )


def only(report, name):
    return next(entry for entry in report.metrics if entry["name"] == name)


def test_the_interval_covers_a_known_difference_in_about_95_of_100_repetitions():
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(300):
        before = generator.normal(0.4, 0.3, 60)
        after = before + generator.normal(0.1, 0.2, 60)
        low, high = bootstrap_interval(table(before, after), 300)
        covered += low <= 0.1 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_the_interval_is_paired_a_constant_gain_on_noisy_rows_has_no_width():
    before = np.random.default_rng(0).normal(0, 10, 50)
    low, high = bootstrap_interval(table(before, before + 0.25), 500)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_the_loss_interval_is_weighted_by_tokens():
    # 1 row of 1,000 tokens lost 1 nat a token, 1 row of 10 tokens gained 1: the resamples are -1, -0.98 and +1 nats
    low, high = bootstrap_interval(table([2000, 30], [3000, 20], [1000, 10]), 500)
    assert low == pytest.approx(-1.0)
    assert high == pytest.approx(1.0)
    report = compare(scored([0, 0], [2000.0, 30.0], [1000, 10]), scored([0, 0], [3000.0, 20.0], [1000, 10]), CONFIG)
    assert only(report, "held_out_loss")["difference"] == pytest.approx(990 / 1010)


def test_the_same_seed_gives_the_same_interval():
    rows = table(np.arange(30), np.arange(30)[::-1])
    assert bootstrap_interval(rows, 200) == bootstrap_interval(rows, 200)
    assert bootstrap_interval(rows, 200) != bootstrap_interval(rows, 200, seed=1)


def test_a_clear_gain_is_better_its_reverse_is_worse_and_wins_ties_losses_add_up():
    low, high = scored([0.0] * 40 + [1.0] * 10), scored([1.0] * 30 + [0.0] * 10 + [1.0] * 8 + [0.0] * 2)
    up, down = compare(low, high, CONFIG), compare(high, low, CONFIG)
    assert up.improved
    assert not down.improved
    assert (up.wins, up.ties, up.losses) == (30, 18, 2)
    assert (down.wins, down.ties, down.losses) == (2, 18, 30)
    entry = only(up, "exact_match")
    assert entry["before"] == pytest.approx(0.2)
    assert entry["after"] == pytest.approx(0.76)
    assert entry["interval"][0] > 0
    assert entry["n"] == 50
    assert entry["verdict"] == "better"
    assert only(down, "exact_match")["verdict"] == "worse"
    assert up.verdict.startswith("Better: exact_match 0.200 → 0.760")
    assert "30 won, 18 tied, 2 lost" in up.verdict


def test_one_more_right_answer_in_50_is_no_difference_and_no_improvement():
    report = compare(scored([0.0] * 50), scored([1.0] + [0.0] * 49), CONFIG)
    entry = only(report, "exact_match")
    assert entry["interval"][0] <= 0 < entry["difference"]
    assert entry["verdict"] == "no difference"
    assert not report.improved


def test_an_identical_measurement_is_no_difference_with_a_difference_of_exactly_0():
    values = list(np.random.default_rng(0).random(40))
    report = compare(scored(values, values), scored(values, values), CONFIG)
    assert [entry["difference"] for entry in report.metrics] == [0.0] * len(report.metrics)
    unseen = 1 - 0.025 ** (1 / 40)
    assert only(report, "exact_match")["interval"] == pytest.approx([-unseen, unseen])
    assert {only(report, name)["interval"] for name in ("held_out_loss", "answer_tokens")} == {None}
    assert spread_of(only(report, "held_out_loss")) == "none: every row moved alike"
    assert {entry["verdict"] for entry in report.metrics} == {"no difference"}
    assert report.verdict.startswith("No difference")
    assert (report.improved, report.wins, report.ties, report.losses) == (False, 0, 40, 0)


def test_rounding_of_a_millionth_of_a_nat_on_every_row_is_no_difference():
    nll = list(np.random.default_rng(0).uniform(5, 50, 40))
    moved = scored([0.0] * 40, [value - 1e-6 for value in nll])
    report = compare(scored([0.0] * 40, nll), moved, CONFIG)
    assert only(report, "held_out_loss")["interval"][1] < 0
    assert only(report, "held_out_loss")["verdict"] == "no difference"
    assert only(report, "held_out_perplexity")["verdict"] == "no difference"


def test_without_scores_the_held_out_loss_decides_and_less_is_better():
    before, after = scored([0.0] * 20, [10.0] * 20), scored([0.0] * 20, [8.0] * 19 + [11.0])
    before.metrics, after.metrics = {}, {}
    report = compare(before, after, CONFIG)
    assert report.main == "held_out_loss"
    assert report.improved
    assert (report.wins, report.ties, report.losses) == (19, 0, 1)
    perplexity = only(report, "held_out_perplexity")
    assert perplexity["before"] == pytest.approx(math.exp(2.0))
    assert perplexity["verdict"] == "better"


@pytest.mark.parametrize(("rows", "said"), [(1, "1 row"), (3, "3 rows"), (19, "19 rows")])
def test_below_20_rows_every_verdict_is_too_few_to_judge_with_their_number(rows, said):
    before, after = scored([0.0] * rows, [9.0 + row for row in range(rows)]), scored([1.0] * rows, ended=False)
    before.general_nll, after.general_nll = [30.0] * rows, [40.0] * rows
    before.general_tokens = after.general_tokens = [10] * rows
    report = compare(before, after, CONFIG)
    assert {entry["verdict"] for entry in report.metrics} == {f"too few to judge ({said})"}
    assert len(report.metrics) == 6
    assert report.verdict.startswith(f"Too few to judge ({said}): exact_match 0.000 → 1.000")
    assert not report.improved
    enough = compare(scored([0.0] * 20), scored([1.0] * 20), CONFIG)
    assert enough.improved
    assert enough.verdict.startswith("Better: exact_match 0.000 → 1.000 (difference +1.000, 95 % interval +0.663 to ")


def test_where_all_rows_agree_a_share_s_interval_is_clopper_and_pearson_s():
    # scipy.stats.binomtest(20, 20).proportion_ci(method="exact") is (0.83157, 1.0)
    assert agreeing_interval(1.0, 20, 0.0, 1.0) == pytest.approx([0.8315665, 1.0])
    assert agreeing_interval(0.0, 20, 0.0, 1.0) == pytest.approx([0.0, 0.1684335])
    config = EvaluateConfig(bootstrap_samples=50)
    gained = entry("x", [0.0] * 30, [1.0] * 30, config, higher_is_better=True, within=SHARE)
    assert gained["interval"] == pytest.approx([2 * 0.025 ** (1 / 30) - 1, 1.0])
    assert gained["verdict"] == "better"
    same = entry("x", [1.0] * 30, [1.0] * 30, config, higher_is_better=True, within=SHARE)
    assert same["interval"] == pytest.approx([0.025 ** (1 / 30) - 1, 1 - 0.025 ** (1 / 30)])
    assert same["verdict"] == "no difference"
    longer = entry("x", [4.0] * 30, [7.0] * 30, config, higher_is_better=None)  # of any number there is no bound
    assert (longer["interval"], longer["verdict"]) == (None, "higher")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99])
def test_the_exact_interval_misses_a_true_share_in_at_most_5_of_100_samples_that_agree(share):
    # of the samples of 20 rows those that agree: all right, or all wrong
    missed = 0.0
    for value, chance in ((1.0, share**20), (0.0, (1 - share) ** 20)):
        low, high = agreeing_interval(value, 20, 0.0, 1.0)
        missed += chance * (not low <= share <= high)
    assert missed <= 0.05


def test_a_loss_of_900_nats_a_token_has_no_perplexity_instead_of_an_infinite_one():
    report = compare(scored([0.0] * 3, [10.0] * 3), scored([0.0] * 3, [4500.0] * 3), CONFIG)
    assert [entry["name"] for entry in report.metrics] == [
        "exact_match",
        "held_out_loss",
        "answers_ended",
        "answer_tokens",
    ]


def test_forgetting_and_answers_that_no_longer_end_are_said_in_the_verdict():
    before, after = scored([0.0] * 20), scored([1.0] * 20, ended=False)
    before.general_nll, after.general_nll = [30.0] * 35, [40.0] * 35
    before.general_tokens = after.general_tokens = [10] * 35
    report = compare(before, after, CONFIG)
    assert report.improved
    assert "General text got worse: 3.000 → 4.000." in report.verdict
    assert "Fewer answers end by themselves: 1.000 → 0.000." in report.verdict


def test_measurements_of_other_rows_are_not_compared():
    with pytest.raises(ValueError, match="same rows"):
        compare(scored([0.0] * 3), scored([0.0] * 4), CONFIG)


def test_measuring_twice_gives_no_difference_and_report_json_that_is_plain_json():
    model, data = tiny_llama(), held_out(TOKENIZER, PAIRS)
    report = compare(*(measure(model, TOKENIZER, data, CONFIG) for _ in range(2)), CONFIG)
    assert [entry["name"] for entry in report.metrics] == [
        "exact_match",
        "held_out_loss",
        "held_out_perplexity",
        "general_text_loss",
        "answers_ended",
        "answer_tokens",
    ]
    assert {entry["difference"] for entry in report.metrics} == {0.0}
    assert [entry["n"] for entry in report.metrics] == [6, 9, 9, 35, 6, 6]
    assert only(report, "general_text_loss")["verdict"] == "no difference"
    assert only(report, "held_out_loss")["verdict"] == "too few to judge (9 rows)"
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["rows"] == {"held_out": 9, "answered": 6}
    assert content["decoding"] == {"do_sample": False, "max_new_tokens": 8 + 8, "end_tokens": ["<|im_end|>"]}
    assert len(content["samples"]) == 6
    assert content["samples"][2]["prompt"] == "what is 2?"
    assert content["samples"][2]["reference"] == "it is 4"
    assert content["samples"][2]["scores"] == {"exact_match": [0.0, 0.0]}


def test_a_model_trained_on_the_rows_is_better_and_the_same_with_another_batch_size():
    data, model = held_out(TOKENIZER, (PAIRS * 3)[:20]), tiny_llama()
    config = EvaluateConfig(size=20, batch_size=7, bootstrap_samples=400, general_text=False)
    before = measure(model, TOKENIZER, data, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(150):
        row = data.held_out[step % len(data.held_out)]
        loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = measure(model, TOKENIZER, data, config)
    report = compare(before, after, config)
    assert only(report, "held_out_loss")["verdict"] == "better"
    assert after.loss == pytest.approx(only(report, "held_out_loss")["after"])
    assert sum(completion.ended for completion in after.completions) > sum(c.ended for c in before.completions)
    assert model.training
    one = measure(model, TOKENIZER, data, EvaluateConfig(size=20, batch_size=1, general_text=False))
    assert one.nll == pytest.approx(after.nll, rel=1e-4, abs=1e-4)
    assert [completion.text for completion in one.completions] == [c.text for c in after.completions]


def test_plain_text_gets_losses_only_and_a_metric_for_it_is_refused():
    rows = [{"input_ids": list(range(n, n + 20)), "labels": list(range(n, n + 20)), "row": n} for n in range(4)]
    texts = [Text(f"book.txt:{n}", "A calm day at sea.") for n in range(4)]
    data = held_out(TOKENIZER, [], kind="text", held_out=rows, held_out_records=texts)
    measured = measure(tiny_llama(), TOKENIZER, data, CONFIG)
    assert measured.completions == []
    assert measured.tokens == [19] * 4
    assert measured.perplexity == pytest.approx(math.exp(sum(measured.nll) / 76))
    with pytest.raises(SettingsError, match="plain text has no answers"):
        measure(tiny_llama(), TOKENIZER, data, EvaluateConfig(metrics=["rouge"]))


def test_size_0_answers_nothing():
    measured = measure(tiny_llama(), TOKENIZER, held_out(TOKENIZER, PAIRS), EvaluateConfig(size=0, general_text=False))
    assert (measured.completions, measured.metrics, measured.general_nll) == ([], {}, [])
    assert len(measured.nll) == 9


def test_no_supervised_held_out_token_is_an_error_and_not_a_loss_of_0():
    data = held_out(TOKENIZER, PAIRS)
    for row in data.held_out:
        row["labels"] = [-100] * len(row["labels"])
    with pytest.raises(DataError, match="No held-out row has a supervised token"):
        measure(tiny_llama(), TOKENIZER, data, EvaluateConfig(size=0))


def test_a_nan_loss_names_the_held_out_row():
    model, data = tiny_llama(), held_out(TOKENIZER, [*PAIRS, ("Z?", "it is Z")])
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZER("Z")["input_ids"][0]] = math.nan
    with pytest.raises(NumericsError, match=r"held\.jsonl:10"):
        measure(model, TOKENIZER, data, CONFIG)


def test_progress_names_what_is_done_and_how_much_is_left():
    told = []
    measure(tiny_llama(), TOKENIZER, held_out(TOKENIZER, PAIRS), CONFIG, lambda *said: told.append(said))
    assert told[:2] == [("answers", 0, 6), ("answers", 4, 6)]
    assert ("answers", 6, 6) in told
    assert told[-1] == ("held-out loss", 9, 9)


def test_scores_on_the_way_are_the_loss_and_the_named_metric_and_an_unknown_one_names_the_known():
    model, data = tiny_llama(), held_out(TOKENIZER, PAIRS)
    measured = measure(model, TOKENIZER, data, CONFIG)
    assert held_out_scores(model, TOKENIZER, data, CONFIG) == {"loss": pytest.approx(measured.loss)}
    assert held_out_scores(model, TOKENIZER, data, CONFIG, "exact_match") == {
        "loss": pytest.approx(measured.loss),
        "exact_match": 0.0,
    }
    with pytest.raises(SettingsError, match=r"metric_for_best_model=rouge is not measured here.*\n.*loss, exact_match"):
        held_out_scores(model, TOKENIZER, data, CONFIG, "rouge")
