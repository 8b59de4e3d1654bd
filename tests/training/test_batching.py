"""Batches by length: the same rows in a step, the same loss and gradient however it is cut, no row lost or twice."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from finetune_kit import recipe as recipes
from finetune_kit.data.load import load_data
from finetune_kit.errors import SettingsError
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.planning import budget
from finetune_kit.planning.plan import plan
from finetune_kit.settings.schema import TrainConfig
from finetune_kit.training.batching import (
    BatchPlan,
    Lengths,
    micro_batch,
    padded_share,
    plan_batches,
    run_sizes,
    token_lengths,
)
from finetune_kit.training.fit import fit
from finetune_kit.training.progress import hooks
from tests.fixtures_training import Trained, fit_only, largest_difference, prepare, settings, write_rows
from tests.training.test_resources import short_of_memory

GROUPED = "train_sampling_strategy=group_by_length"
STRATEGIES = st.sampled_from(["random", "sequential", "group_by_length"])
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=70)
FEW = st.integers(1, 4)


def rows_of(lengths: list[int], kind: str = "prompt_completion") -> Any:
    """Data with rows of these lengths, as far as laying them out looks at them."""
    ids = [[7] * length for length in lengths]
    columns: dict[str, Any] = {"row": list(range(len(ids)))}
    columns |= {"input_ids": ids, "labels": ids} if kind == "prompt_completion" else {}
    columns |= {"prompt_ids": [[7]] * len(ids), "chosen_ids": ids, "rejected_ids": ids} if kind == "preference" else {}
    records = [SimpleNamespace(where=f"rows.jsonl:{row + 1}") for row in range(len(ids))]
    return SimpleNamespace(
        kind=kind, packed=False, train=datasets.Dataset.from_dict(columns), train_records=records, ledger=None
    )


def asked(rows: int, passes: int, strategy: str, tokens: int | None = None, **more: Any) -> TrainConfig:
    sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes}
    return TrainConfig(**sizes, train_sampling_strategy=strategy, max_tokens_per_batch=tokens, **more)  # type: ignore[arg-type]


@hypothesis_settings(deadline=None)
@given(LENGTHS, FEW, FEW, FEW, STRATEGIES, st.integers(1, 8))
def test_any_budget_lays_out_each_row_of_an_epoch_once_and_keeps_every_pass_within_it(
    lengths: list[int], rows: int, passes: int, count: int, strategy: str, longest_rows: int
) -> None:
    most = longest_rows * max(lengths)
    train, data = asked(rows, passes, strategy, most, num_train_epochs=2), rows_of(lengths)
    layout = plan_batches(train, data, count)
    together = rows * passes * count
    for epoch in range(2):
        cut = list(layout.epoch(epoch))
        assert len(cut) == layout.in_epoch()
        assert sorted(row for batch in cut for row in batch) == list(range(len(lengths)))
        assert max(layout.slots(batch) for batch in cut) <= most
        order = layout.order(epoch)
        for step in range(len(lengths) // together):  # the rows of a step are those that it has without a budget
            taken = cut[step * layout.passes * count : (step + 1) * layout.passes * count]
            assert {row for batch in taken for row in batch} == set(order[step * together : (step + 1) * together])
            assert all(taken)


@hypothesis_settings(deadline=None)
@given(LENGTHS, FEW, FEW, FEW, STRATEGIES, st.integers(1, 8))
def test_pairs_under_a_budget_have_equal_passes_and_count_alike_and_fewer_than_the_processes_are_left_out(
    lengths: list[int], rows: int, passes: int, count: int, strategy: str, longest_rows: int
) -> None:
    most = longest_rows * 2 * (max(lengths) + 1)
    layout = plan_batches(asked(rows, passes, strategy, most), rows_of(lengths, "preference"), count)
    cut = list(layout.epoch(0))
    assert len(cut) == layout.in_epoch()
    assert max(layout.slots(batch) for batch in cut) <= most
    whole = len(lengths) // layout.rows * layout.passes * count
    assert {len(batch) for batch in cut[:whole]} <= {layout.each}
    last = [[len(batch) for batch in cut[turn : turn + count]] for turn in range(whole, len(cut), count)]
    assert all(len(set(sizes)) == 1 for sizes in last)  # alike in all processes
    assert max(last, default=[0])[0] - min(last, default=[0])[0] <= 1
    times = Counter(row for batch in cut[whole:] for row in batch)
    assert len(set(times.values())) <= 1
    left_out = len(lengths) - len({row for batch in cut for row in batch})
    assert left_out < count
    assert Counter(row for batch in cut[:whole] for row in batch).keys().isdisjoint(times)


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_runs_of_sorted_rows_are_cut_where_the_largest_is_smallest(lengths: list[int], number: int) -> None:
    lengths = sorted(lengths, reverse=True)
    found = run_sizes(lengths, number)
    assert (len(found), sum(found)) == (number, len(lengths))

    def best(start: int, left: int) -> int:
        if start == len(lengths):
            return 0
        if left == 0:
            return 10**9
        ends = range(start + 1, len(lengths) + 1)
        return min(max((end - start) * lengths[start], best(end, left - 1)) for end in ends)

    starts = [sum(found[:place]) for place in range(number)]
    assert max(size * lengths[start] for size, start in zip(found, starts, strict=True) if size) == best(0, number)


def gradients(run: Trained) -> dict[str, torch.Tensor]:
    """Of the first step, which is all that is trained."""
    found: dict[str, torch.Tensor] = {}

    def keep(args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    run.trainer.add_callback(hooks(on_pre_optimizer_step=keep))
    run.history = fit(run.trainer, run.config.train, run.score)
    return found


PAIRS = [{"prompt": f"{n} + {n} =", "chosen": str(2 * n), "rejected": "no" * (n % 5 + 1)} for n in range(43)]


@pytest.mark.parametrize(
    ("recipe", "budgets"),
    [("full_sft", (59, 130, 1000)), ("dpo", (80, 330)), ("reward_model", (80, 330))],
)
def test_whatever_the_budget_loss_and_gradient_of_a_step_are_those_of_one_large_batch_within_1e_5(
    home: Path, recipe: str, budgets: tuple[int, ...]
) -> None:
    if recipe in ("dpo", "reward_model"):
        write_rows(home / "rows.jsonl", PAIRS)
    words = ("max_steps=1", "per_device_train_batch_size=8", "max_grad_norm=0")
    whole = prepare(recipe, home, *words)
    expected = gradients(whole)
    cuts = set()
    for most in budgets:
        run = prepare(recipe, home, *words, f"max_tokens_per_batch={most}")
        found = gradients(run)
        cuts.add(run.trainer.args.gradient_accumulation_steps)
        assert run.losses == pytest.approx(whole.losses, abs=1e-5)
        assert largest_difference(found, expected) <= 1e-5 * max(float(g.abs().max()) for g in expected.values())
    assert len(cuts) == len(budgets)
    assert max(cuts) == 8


def test_two_epochs_under_a_budget_in_windows_of_length_see_every_token_twice_and_end_as_with_large_batches(
    home: Path,
) -> None:
    words = ("max_steps=-1", "num_train_epochs=2", "per_device_train_batch_size=8", "learning_rate=1e-3", GROUPED)
    once = fit_only("lora_sft", home, *words)
    cut = fit_only("lora_sft", home, *words, "max_tokens_per_batch=120")
    assert cut.losses == pytest.approx(once.losses, abs=1e-5)
    assert largest_difference(once.weights, cut.weights) <= 1e-5
    assert cut.history[-1]["tokens"] == once.history[-1]["tokens"] == 2 * sum(map(len, cut.data.train["input_ids"]))
    assert cut.history[-1]["step"] == cut.trainer.state.max_steps == 2 * 5
    said = plan(cut.config, cut.data)
    assert said["steps"] == 10
    assert said["passes_in_a_step"] == cut.trainer.args.gradient_accumulation_steps == 4


def test_too_little_memory_cuts_a_budget_s_passes_further_and_the_losses_stay_within_1e_6(home: Path) -> None:
    """From 3 passes to 9 for 8 rows: in the last one a row without a label stands in."""
    words = ("max_steps=5", "learning_rate=1e-2", "per_device_train_batch_size=8", "lora.lora_dropout=0")
    whole = fit_only("lora_sft", home, *words)
    run = prepare("lora_sft", home, *words, "max_tokens_per_batch=190")
    assert run.trainer.args.gradient_accumulation_steps == 3
    tried = short_of_memory(run, most=1)
    run.history = fit(run.trainer, run.config.train, lambda model, metric: {"loss": 1.0})
    assert run.trainer.args.gradient_accumulation_steps == 9
    assert tried.count(1) >= 4 * 9
    assert run.losses == pytest.approx(whole.losses, abs=1e-6)
    assert largest_difference(run.weights, whole.weights) < 1e-4


def planned(recipe: str, home: Path, *words: str) -> dict[str, Any]:
    config = settings(recipe, home, *words)
    return plan(config, load_data(config.data, config.kind, load_tokenizer(config.model)))


class TestOrder:
    lengths = Lengths([(31 * n) % 97 + 1 for n in range(1000)], 1, sum((31 * n) % 97 + 1 for n in range(1000)))

    def laid_out(self, strategy: str, seed: int = 0, count: int = 1) -> BatchPlan:
        return BatchPlan(self.lengths, strategy, seed, 8 * count, 1, count, by_token=True, sorts=False)

    def test_rows_of_a_step_are_about_as_long_as_each_other_and_padding_falls_from_44_to_3_percent(self) -> None:
        assert padded_share(self.laid_out("random")) == pytest.approx(0.44, abs=0.02)
        assert padded_share(self.laid_out("group_by_length")) == pytest.approx(0.03, abs=0.01)

    def test_each_epoch_and_seed_has_its_own_order_and_the_same_one_again(self) -> None:
        layout = self.laid_out("group_by_length")
        orders = [layout.order(0), layout.order(1), self.laid_out("group_by_length", seed=5).order(0)]
        assert len({tuple(order) for order in orders}) == 3
        torch.manual_seed(99)
        assert layout.order(0) == orders[0]
        steps = [{frozenset(order[start : start + 8]) for start in range(0, 1000, 8)} for order in orders]
        assert len(steps[0] & steps[1]) < 3  # other rows together, not the same steps in another order

    def test_long_and_short_steps_are_mixed_and_the_longest_row_comes_first(self) -> None:
        order = self.laid_out("group_by_length").order(0)
        means = torch.tensor([self.lengths.longest[row] for row in order]).float().reshape(-1, 8).mean(dim=1)
        assert max(self.lengths.longest) in [self.lengths.longest[row] for row in order[:8]]
        ranks = torch.arange(len(means)).float()
        assert abs(float(torch.corrcoef(torch.stack([ranks, means]))[0, 1])) < 0.2
        followed = torch.corrcoef(torch.stack([means[1:-1], means[2:]]))[0, 1]
        assert abs(float(followed)) < 0.3

    def test_random_order_is_that_of_the_trainer_s_own_loader(self, home: Path) -> None:
        run = prepare("lora_sft", home, "train.seed=3")
        loader = run.trainer.get_train_dataloader()
        for epoch in range(2):
            loader.set_epoch(epoch)
            drawn = [row for batch in loader.batch_sampler for row in batch]
            assert plan_batches(run.config.train, run.data, 1).order(epoch) == drawn


class TestRefused:
    def test_a_budget_below_the_longest_row_names_the_row_and_the_least_budget(self) -> None:
        with pytest.raises(SettingsError) as caught:
            micro_batch(asked(4, 1, "random", 80), rows_of([5, 90, 7]))
        assert caught.value.message == "train.max_tokens_per_batch=80: rows.jsonl:2 alone has 90 tokens."
        assert caught.value.fix == "Set it to at least 90, or a smaller data.max_length."
        with pytest.raises(SettingsError, match="at least 182"):
            micro_batch(asked(4, 1, "random", 100), rows_of([5, 90, 7], "preference"))

    @pytest.mark.parametrize(
        ("recipe", "word", "said"),
        [
            ("kto", "max_tokens_per_batch=400", "z is a mean over the rows of one forward pass"),
            ("kto", GROUPED, "its neighbours in one fixed order"),
            ("orpo", "max_tokens_per_batch=400", "a mean over the labels of one forward pass"),
            ("dpo", "max_tokens_per_batch=400 loss_type=[sigmoid,sft]", "loss_type=sft is a mean over the labels"),
            ("dpo", "max_tokens_per_batch=400 loss_type=[aot]", "loss_type=aot sorts the rows"),
            ("grpo", GROUPED, "completions are sampled on the way"),
            ("ppo", "max_tokens_per_batch=400", "completions are sampled on the way"),
            ("lora_sft", f"{GROUPED} data.packing=true", "packed rows all are about data.max_length tokens long"),
            ("lora_sft", f"{GROUPED} train.extra.dataloader_persistent_workers=true", "order of their first epoch"),
            ("lora_sft", f"{GROUPED} train.extra.auto_find_batch_size=true", "would change the rows of a step"),
            ("lora_sft", f"{GROUPED} train.extra.accelerator_config={{dispatch_batches: true}}", "counts once"),
        ],
    )
    def test_what_cannot_act_is_refused_with_the_reason(self, home: Path, recipe: str, word: str, said: str) -> None:
        kind = recipes.load(recipe).config_class.kind
        if kind == "preference":
            write_rows(home / "rows.jsonl", PAIRS)
        if kind == "labelled_completion":
            write_rows(home / "rows.jsonl", [{"prompt": str(n), "completion": "a", "label": n > 9} for n in range(20)])
        words = re.split(r" (?=\w+[.=])", word)
        if "extra" in word:
            words.append("train.extra.dataloader_num_workers=1")
        with pytest.raises(SettingsError, match=re.escape(said)):
            planned(recipe, home, *words) if kind == "prompt" else prepare(recipe, home, *words)


def test_packed_rows_go_one_by_one_through_a_cpu_and_a_step_stays_as_large() -> None:
    train = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    packed: Any = SimpleNamespace(packed=True)
    assert micro_batch(train, packed) == (1, 8)
    assert micro_batch(train, rows_of([3])) == (4, 2)


def test_the_plan_says_passes_and_padding_and_memory_follows_the_budget(home: Path) -> None:
    words = ("per_device_train_batch_size=8", "max_tokens_per_batch=120")
    usual, small = planned("lora_sft", home, words[0]), planned("lora_sft", home, *words)
    assert (usual["passes_in_a_step"], small["passes_in_a_step"]) == (1, 4)
    assert small["padded_share"] < usual["padded_share"] / 2
    assert small["memory_bytes"]["activations"] < usual["memory_bytes"]["activations"] / 2
    assert planned("lora_sft", home, "data.packing=true")["padded_share"] is None


def test_a_budget_that_needs_too_much_memory_is_halved_down_to_the_longest_row(home: Path) -> None:
    config = settings("lora_sft", home, "per_device_train_batch_size=8", "max_tokens_per_batch=400")
    data = load_data(config.data, "prompt_completion", load_tokenizer(config.model))
    given = (None, ["model.name_or_path=" + config.model.name_or_path, "max_tokens_per_batch=400"])
    found = budget.ways(recipes.load("lora_sft"), config, given, data, needed=2, room=1)
    longest = max(token_lengths(data.train).longest)
    assert found[1].words == [f"max_tokens_per_batch={longest}"]
