"""rl/ppo.py: it learns, it is exact where it has to be, it can be resumed, and it stops when it goes wrong."""

import itertools
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.data.chat import end_token_ids
from finetune_kit.errors import DataError, FinetuneKitError, NumericsError, ResourceError, SettingsError, Stopped
from finetune_kit.models.completion_rows import make_rows
from finetune_kit.models.reward import load_reward_model
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.sources import Part, Rewards
from finetune_kit.rl import loop, ppo
from finetune_kit.rl.checkpoint import read_checkpoint
from finetune_kit.rl.ppo import PPOTrainer
from finetune_kit.rl.rollout import token_stats
from finetune_kit.rl.watch import collapse
from finetune_kit.settings.schema import LoraConfig, ModelConfig
from finetune_kit.training.begin import begin
from finetune_kit.training.checkpoint import MANIFEST, checkpoints, read_manifest
from finetune_kit.training.stopping import stop_on_signals
from tests.fixtures_cli import ROOT
from tests.fixtures_training import largest_file, limit_files
from tests.models.small import write_model
from tests.rl.fixtures import ROWS, lower, parts, settings, trainer, weights, write_home

TIMES = {
    "seconds",
    "peak_memory_gib",
    "tokens_per_second",
    "time/update",
    "time/generation",
    "time/scoring",
    "time/training",
}
LEARN = ("max_steps=12", "batch_size=64", "per_device_train_batch_size=64", "kl_coef=0.01")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("ppo"))


@pytest.fixture
def home(start: Path, tmp_path: Path) -> Path:
    for name in ("tiny", "rows.jsonl"):
        (tmp_path / name).symlink_to(start / name)
    return tmp_path


def without_times(line: dict[str, float]) -> dict[str, float]:
    return {name: number for name, number in line.items() if name not in TIMES}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ("lora.r=0", "learning_rate=3e-3", "num_mini_batches=1", "num_ppo_epochs=4"),
            marks=pytest.mark.long,
            id="full",
        ),
        pytest.param(
            ("value_model=adapter", "learning_rate=5e-2", "max_new_tokens=4"), id="lora_and_value_on_an_adapter"
        ),
    ],
)
def test_twice_as_many_small_letters_after_12_updates_by_each_seed(home: Path, words: Any, seed: int) -> None:
    scores = [line["objective/scores"] for line in trainer(home, *LEARN, *words, f"seed={seed}").train()]
    assert sum(scores[-3:]) / 3 > 2 * scores[0] > 0


@pytest.mark.parametrize("words", [(), ("lora.r=0",), ("value_model=adapter", "lora.lora_dropout=0.5")])
def test_one_step_on_all_completions_has_ratio_1_and_the_first_kl_is_0_to_the_bit(home: Path, words: Any) -> None:
    # prompts of different lengths, packed and padded; dropout would show in the ratio at once
    for padding_free in ("true", "false"):
        made = trainer(
            home, "num_ppo_epochs=1", "num_mini_batches=1", f"train.padding_free={padding_free}", "kl_coef=0.1", *words
        )
        assert (made.padded_because == "") == (padding_free == "true")
        first, second = made.update(), made.update()
        assert first["objective/kl"] == 0
        for line in (first, second):
            assert line["val/ratio"] == 1
            assert line["policy/approxkl_avg"] == 0
            assert line["policy/clipfrac_avg"] == 0
        assert second["objective/kl"] != 0


def test_it_is_the_same_whether_the_pad_token_ends_turns_or_not(home: Path) -> None:
    one, other = trainer(home), trainer(home)
    other.tokenizer.pad_token = other.tokenizer.eos_token
    assert [without_times(one.update()) for _ in range(2)] == [without_times(other.update()) for _ in range(2)]


@pytest.mark.parametrize(
    "words",
    [("lr_scheduler_type=linear", "warmup_steps=1"), ("value_model=adapter",), ("lora.r=0",)],
    ids=["shared", "adapter", "full"],
)
def test_resumed_after_2_of_4_updates_it_is_the_uninterrupted_run_to_the_bit(home: Path, words: Any) -> None:
    words = (*words, "max_steps=4", "save_steps=2", "adaptive_kl_target=0.5", "adaptive_kl_horizon=100")
    whole = trainer(home, *words, f"output_dir={home / 'whole'}")
    expected = whole.train()
    assert [path.name for path in checkpoints(home / "whole")] == ["checkpoint-2", "checkpoint-4"]
    torch.manual_seed(12345)  # what the process drew before does not matter
    resumed = trainer(home, *words, f"output_dir={home / 'rest'}")
    resumed.resume(home / "whole" / "checkpoint-2")
    found = resumed.train()
    assert [without_times(line) for line in found] == [without_times(line) for line in expected[2:]]
    for name, weight in weights(whole).items():
        assert torch.equal(weight, resumed.trained[name]), name
    assert resumed.kl_coef == whole.kl_coef != 0.05


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(home: Path) -> None:
    made = trainer(home)
    snapshot = made.snapshot()
    with pytest.raises(SettingsError, match="batch_size 16, this run has 32"):
        trainer(home, "batch_size=32").restore(snapshot)
    with pytest.raises(SettingsError, match="another policy or value"):
        trainer(home, "lora.r=4").restore(snapshot)
    with pytest.raises(SettingsError, match="no checkpoint of PPO"):
        made.resume(home)


def test_a_checkpoint_holds_no_pickle(home: Path) -> None:
    trainer(home, "save_steps=1", "max_steps=3", "save_total_limit=2").train()
    found = checkpoints(home / "run")
    assert [path.name for path in found] == ["checkpoint-2", "checkpoint-3"]
    assert {path.name for path in found[0].iterdir()} == {"state.safetensors", "state.json", MANIFEST}


def test_every_curve_has_the_name_that_the_field_knows_and_times_add_up(home: Path) -> None:
    history = trainer(home, "max_steps=3").train()
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line.keys() >= {
            *("objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward", "objective/kl_coef"),
            *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg"),
            *("val/ratio", "val/explained_variance", "val/clipfrac_avg", "completions/mean_length"),
            *("completions/ended", "reward/lower", "grad_norm", "learning_rate", "loss"),
        }
        assert line["time/generation"] + line["time/scoring"] + line["time/training"] == pytest.approx(1)
        assert all(math.isfinite(number) for number in line.values())


def test_docs_ppo_explains_every_curve_and_no_other(home: Path) -> None:
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    table = page.split("## Reading the curves")[1].split("\n## ")[0]
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)
    }
    logged = {name.replace("reward/lower", "reward/<name>") for name in trainer(home).update()}
    assert explained == logged - {"step", "epoch", "loss", "time/update"}


def test_the_value_is_saved_and_its_adapter_leaves_the_policy(home: Path) -> None:
    made = trainer(home, "value_model=adapter", "max_steps=1")
    made.train()
    assert list(made.model.peft_config) == ["default"]
    from safetensors.torch import load_file

    saved = load_file(home / "run" / "value.safetensors")
    assert saved["value.head.weight"].any()
    assert any(".lora_B." in name and tensor.any() for name, tensor in saved.items())


def test_gradients_are_those_of_one_large_pass_however_small_the_micro_batches_are(home: Path) -> None:
    moved = []
    for rows in (16, 3):
        made = trainer(home, "num_mini_batches=1", "num_ppo_epochs=1", f"per_device_train_batch_size={rows}")
        made.update()
        moved.append(weights(made))
    assert max(float((moved[0][name] - moved[1][name]).abs().max()) for name in moved[0]) < 1e-4


def test_completions_that_do_not_end_lose_2_points(home: Path) -> None:
    plain, punished = (trainer(home, f"missing_eos_penalty={points}", "kl_coef=0").update() for points in (0, 2))
    assert plain["completions/ended"] == punished["completions/ended"] < 1
    lost = 2 * (1 - plain["completions/ended"])
    assert plain["objective/rlhf_reward"] - punished["objective/rlhf_reward"] == pytest.approx(lost, abs=1e-5)
    assert plain["objective/scores"] == punished["objective/scores"]


def test_epochs_stop_once_the_policy_is_target_kl_away(home: Path) -> None:
    free, held = trainer(home, "num_ppo_epochs=8"), trainer(home, "num_ppo_epochs=8", "target_kl=1e-6")
    assert free.update()["policy/steps"] == 16
    line = held.update()
    assert 1 <= line["policy/steps"] < 16
    assert line["policy/stopped_early"] == 1


def test_the_entropy_bonus_keeps_entropy(home: Path) -> None:
    words = ("max_steps=4", "lora.r=0", "learning_rate=3e-3", "kl_coef=0")
    without, bonus = (trainer(home, *words, f"entropy_coef={x}", f"output_dir={home / x}") for x in ("0", "1"))
    assert bonus.train()[-1]["policy/entropy_avg"] > without.train()[-1]["policy/entropy_avg"] + 0.05


def test_recomputed_activations_give_the_same_weights(home: Path) -> None:
    plain, recomputed = trainer(home), trainer(home, "gradient_checkpointing=true")
    assert without_times(plain.update()) == without_times(recomputed.update())


def test_a_pass_that_fails_leaves_the_layers_in_evaluation_mode(home: Path) -> None:
    made = trainer(home, "gradient_checkpointing=true")
    seen = []

    def fail() -> None:
        with made._recomputing():
            seen.append(any(module.training for module in made.model.modules()))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert seen == [True]
    assert not any(module.training for module in made.model.modules())


def test_3_prompts_are_enough_for_batches_of_16(home: Path) -> None:
    (home / "few.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:6]))
    made = trainer(home, f"data.path={home / 'few.jsonl'}", "held_out_size=3", "max_steps=2")
    assert len(made.prompts) == 3
    assert len(made.train()) == 2


def test_each_pass_over_the_prompts_takes_every_one_once(home: Path) -> None:
    made = trainer(home, "data.size=24", "batch_size=16")
    chosen = []
    for step in range(3):
        made.step = step
        chosen += made._next_prompts()
    assert sorted(chosen[:24]) == sorted(chosen[24:]) == list(range(24))
    assert chosen[:24] != chosen[24:]


@pytest.mark.parametrize(
    ("name", "backbone"),
    [("adapter", "tiny"), ("separate", "tiny"), ("adapter", "lfm2"), ("separate", "mamba2"), ("separate", "bamba")],
)
def test_a_value_that_starts_from_a_reward_model_says_what_that_one_says(home: Path, name: str, backbone: str) -> None:
    if backbone != "tiny":  # transformers has no classifier of it
        write_model(backbone, home / backbone, home / "tiny")
    model = ModelConfig(name_or_path=str(home / backbone))
    tokenizer = load_tokenizer(model)
    ends = end_token_ids(tokenizer)
    judge = load_reward_model(model, LoraConfig(r=4) if name == "adapter" else None, tokenizer, ends, seed=1)
    with torch.no_grad():
        for parameter in judge.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 20)
    judge.save_pretrained(home / "judge")
    tokenizer.save_pretrained(home / "judge")
    places = (f"model.name_or_path={home / backbone}", f"value_init_from={home / 'judge'}")
    made = trainer(home, f"value_model={name}", *places)
    rows = make_rows([[5, 6, 7]], [[8]], 1, "cpu")
    with torch.no_grad():
        seen = token_stats(made.model, rows, 1.0, made.value)
        expected = judge.eval()(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert seen.values is not None
    assert float(seen.values[0, 0]) == pytest.approx(float(expected), abs=1e-5)
    other = "separate" if name == "adapter" else "adapter"
    for wrong in (other, "shared"):
        with pytest.raises(SettingsError, match="value_init_from"):
            trainer(home, f"value_model={wrong}", f"value_init_from={home / 'judge'}")


@pytest.mark.long
@pytest.mark.parametrize("value", ["shared", "adapter", "separate"])
@pytest.mark.parametrize("backbone", ["lfm2", "bamba", "mamba2", "gemma4_text"])
def test_two_updates_on_backbones_with_states_have_ratio_1_at_first_and_move_policy_and_value(
    home: Path, backbone: str, value: str
) -> None:
    base = write_model(backbone, home / backbone, home / "tiny")
    made = trainer(home, f"model.name_or_path={base}", f"value_model={value}", "num_ppo_epochs=1", "num_mini_batches=1")
    before = weights(made)
    first, second = made.train()
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert second["objective/kl"] != 0
    after = weights(made)
    assert all(not torch.equal(after[name], tensor) for name, tensor in before.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("batch_size=18", "num_mini_batches=4"), "18 / 4 is not whole"),
        (("max_new_tokens=5000",), r"rows.jsonl:\d+: a prompt of \d+ tokens and max_new_tokens=5000"),
        (("train.eval_steps=3",), "train.eval_steps has no effect"),
        (("gradient_accumulation_steps=2",), "gradient_accumulation_steps has no effect"),
        (("max_tokens_per_batch=64",), "max_tokens_per_batch has no effect"),
        (("train_sampling_strategy=group_by_length",), "train_sampling_strategy has no effect"),
        (("train.optim=sgd",), "optimizer is AdamW"),
        (("kl_coef=0", "adaptive_kl_target=6"), "adaptive_kl_target has no effect"),
        (("value_model=adapter", "lora.r=0"), "trained in full"),
        (("temperature=0",), "temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(home: Path, words: Any, message: str) -> None:
    with pytest.raises(FinetuneKitError, match=message) as caught:
        trainer(home, *words)
    assert isinstance(caught.value, SettingsError | DataError)


LINE = {
    "objective/kl": 5.0,
    "objective/scores": 0.5,
    "policy/entropy_avg": 1.0,
    "completions/mean_length": 20.0,
}


@pytest.mark.parametrize(
    ("changed", "constant", "message"),
    [
        ({"objective/kl": 101.0}, 0, "objective/kl is 101.0"),
        ({"policy/entropy_avg": 1e-4}, 0, "entropy is 0.0001"),
        ({"completions/mean_length": 1.1}, 0, "1.10 tokens"),
        ({"loss": math.nan}, 0, "loss is nan"),
        ({}, 5, "Every completion of 5 updates scored 0.5"),
    ],
)
def test_each_watchdog_stops_with_its_cause(home: Path, changed: Any, constant: int, message: str) -> None:
    config = settings(home)
    assert collapse(LINE, config, 4) is None
    reason = collapse({**LINE, **changed}, config, constant)
    assert reason is not None
    assert message in reason


def test_a_reward_that_is_always_1_stops_the_run_after_5_updates(home: Path) -> None:
    made = trainer(home, "max_steps=9", score=lambda p, c, r: [1.0] * len(c))
    with pytest.raises(NumericsError, match=r"Every completion of 5 updates scored 1.*at update 5") as caught:
        made.train()
    assert "docs/ppo.md" in caught.value.fix


def test_scores_that_have_become_alike_end_the_run_in_peace(home: Path) -> None:
    calls = iter(range(99))

    def solved(prompts: Any, completions: Any, records: Any) -> list[float]:
        return lower(prompts, completions, records) if next(calls) < 2 else [1.0] * len(completions)

    assert len(trainer(home, "max_steps=20", score=solved).train()) == 7


def test_past_max_kl_the_run_stops_and_the_state_before_is_kept(home: Path) -> None:
    words = ("max_steps=30", "lora.r=0", "learning_rate=3e-3", "kl_coef=0")
    made = trainer(home, *words, "max_kl=1")
    with pytest.raises(
        NumericsError, match=r"objective/kl is .* \(max_kl=1\), at update \d+. The last good checkpoint is"
    ) as caught:
        made.train()
    path = Path(re.findall(r"checkpoint is (\S+)\.", caught.value.message)[0])
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["objective/kl"] > 1
    assert all(line["objective/kl"] <= 1 for line in lines[:-1])
    # update n samples from what update n - 1 made: that is what left, and what update n - 2 made is still good
    assert path.name == f"checkpoint-{max(0, len(lines) - 2)}"
    fresh = trainer(home, *words, "max_kl=1000", f"output_dir={home / 'again'}")
    fresh.resume(path)
    assert fresh.update()["objective/kl"] <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_of_nan_at_update_3_names_the_row_and_keeps_update_1(home: Path, bad: float) -> None:
    calls = iter(range(99))

    def broken(prompts: Any, completions: Any, records: Any) -> list[float]:
        scores = lower(prompts, completions, records)
        return [*scores[:-1], bad] if next(calls) == 2 else scores

    made = trainer(home, "max_steps=9", score=broken)
    with pytest.raises(NumericsError, match=rf"is {bad} at rows.jsonl:\d+") as caught:
        made.train()
    assert "checkpoint-1" in caught.value.message


def test_a_reward_that_raises_at_update_2_is_the_datas_fault_and_the_state_is_kept(home: Path) -> None:
    calls = iter(range(99))

    def broken(prompts: Any, completions: Any, records: Any) -> list[float]:
        if next(calls) > 0:
            raise KeyError("answer")
        return lower(prompts, completions, records)

    with pytest.raises(DataError, match=r"KeyError at rows.jsonl:\d+ .*checkpoint-0") as caught:
        trainer(home, score=broken).train()
    assert caught.value.exit_code == 3


def test_a_nan_in_the_gradient_moves_no_weight(home: Path) -> None:
    made = trainer(home)
    made.update()
    start = weights(made)
    plain = made._loss

    def poisoned(rollout: Any, rows: Any) -> Any:
        loss, figures = plain(rollout, rows)
        return loss * math.nan, figures

    made._loss = poisoned  # type: ignore[method-assign]
    with pytest.raises(NumericsError, match="gradient is not finite at update 2") as caught:
        made.update()
    named = re.findall(r"(rows\.jsonl:\d+) \((\d+) \+ (\d+) tokens\)", caught.value.message)
    assert len(named) == 8  # of the mini-batch's 8 rows
    lengths = {made.data.train_records[row["row"]].where: len(row["prompt_ids"]) for row in made.data.train}
    assert all(lengths[where] == int(prompt) and 1 <= int(answer) <= 8 for where, prompt, answer in named)
    assert all(torch.equal(weight, made.trained[name]) for name, weight in start.items())


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_an_update_of_nan_gradients_moves_nothing_and_the_run_ends_with_finite_numbers(home: Path, policy: str) -> None:
    made = trainer(home, "max_steps=3", f"train.on_nonfinite={policy}", "num_ppo_epochs=1", "num_mini_batches=2")
    plain = made._loss
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def poisoned(rollout: Any, rows: Any) -> Any:
        loss, figures = plain(rollout, rows)
        kept.setdefault(made.step, weights(made))
        return loss * (math.nan if made.step == 2 else 1.0), figures

    made._loss = poisoned  # type: ignore[method-assign]
    lines = made.train()
    assert all(torch.equal(kept[2][name], kept[3][name]) for name in kept[2])
    assert any(not torch.equal(kept[1][name], kept[2][name]) for name in kept[1])
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 2, 2]
    assert [line["policy/steps"] for line in lines] == [2, 0, 2]
    assert all(math.isfinite(number) for line in lines for number in line.values())


def test_4_rows_that_do_not_fit_become_passes_of_2_and_the_run_stays_the_same_within_1e_5(home: Path) -> None:
    words = ("max_steps=3", "per_device_train_batch_size=4", "num_mini_batches=1")
    whole, made = (trainer(home, *words, f"output_dir={home / name}") for name in ("whole", "cut"))
    plain = made._loss

    def short(rollout: Any, rows: Any) -> Any:
        if made.step >= 2 and len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(rollout, rows)

    made._loss = short  # type: ignore[method-assign]
    expected, lines = whole.train(), made.train()
    assert [line["per_device_train_batch_size"] for line in lines if "per_device_train_batch_size" in line] == [2]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 3]
    for line, other in zip(logged, expected, strict=True):
        assert line["objective/scores"] == other["objective/scores"]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    largest = max(float((whole.trained[name] - made.trained[name]).abs().max()) for name in whole.trained)
    assert largest < 1e-5


def test_an_update_copies_weights_and_optimizer_once_and_a_restore_never(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []

    def counted(tensor: torch.Tensor, beside: bool) -> torch.Tensor:
        copies.append(beside)
        return tensor.clone()

    monkeypatch.setattr(ppo, "copied", counted)
    made = trainer(home, "max_steps=3")
    made.train()
    trained = len(made.trained)
    assert len(copies) == trained + 3 * 4 * trained  # weight, two moments and a step each; at first weights alone
    assert not any(copies)
    assert len(made.states) == 2
    made.restore(made.states[0])
    assert made.step == 2
    assert len(copies) == 13 * trained


@pytest.mark.parametrize("beside", [False, True])
def test_a_failure_leaves_the_state_ahead_of_the_one_that_it_began_with_wherever_states_are_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    monkeypatch.setattr(loop, "fits_beside", lambda state, device: beside)
    updates = itertools.count(1)

    def failing(*given: Any) -> list[float]:
        return [math.nan] * 16 if next(updates) == 3 else lower(*given)

    made = trainer(home, "max_steps=4", score=failing)
    kept = []
    plain = made.snapshot
    made.snapshot = lambda: kept.append(plain()) or kept[-1]  # type: ignore[method-assign,func-returns-value]
    with pytest.raises(FinetuneKitError, match=r"last good checkpoint is .*checkpoint-1"):
        made.train()
    assert made.beside is beside
    left = read_checkpoint(home / "run" / "checkpoint-1")
    assert left.tensors.keys() == kept[1].tensors.keys()
    assert all(torch.equal(left.tensors[name], tensor) for name, tensor in kept[1].tensors.items())


def test_what_does_not_fit_beside_the_states_on_the_device_moves_those_first_and_keeps_its_rows(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "fits_beside", lambda state, device: True)
    plain, made = (trainer(home, "max_steps=3", f"output_dir={home / name}") for name in ("plain", "tight"))
    loss, tried = made._loss, []

    def tight(rollout: Any, rows: Any) -> Any:
        if made.step == 2:
            tried.append(len(rows))
            if len(tried) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(rollout, rows)

    made._loss = tight  # type: ignore[method-assign]
    expected, lines = plain.train(), made.train()
    assert set(tried) == {4}
    assert made.beside is False
    assert [without_times(line) for line in lines] == [without_times(line) for line in expected]
    assert all(torch.equal(weight, plain.trained[name]) for name, weight in made.trained.items())


def test_the_longest_rows_are_tried_first_and_what_does_not_fit_shows_before_the_first_update(home: Path) -> None:
    plain, made = (trainer(home, "max_steps=2", f"output_dir={home / name}") for name in ("plain", "tried"))
    plain.try_longest = lambda: None  # type: ignore[method-assign]
    loss, tried = made._loss, []

    def short(rollout: Any, rows: Any) -> Any:
        if made.step == 0 or rollout.chosen is None:
            tried.append((len(rows), [len(rollout.prompts[row]) for row in rows], tuple(rollout.mask.shape)))
            if len(rows) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(rollout, rows)

    made._loss = short  # type: ignore[method-assign]
    expected, lines = plain.train(), made.train()
    longest = sorted((len(row["prompt_ids"]) for row in made.data.train), reverse=True)
    assert tried == [(4, longest[:4], (4, 8)), (2, longest[:2], (2, 8))]
    assert lines[0] == {"step": 0, "per_device_train_batch_size": 2}
    for line, other in zip(lines[1:], expected, strict=True):
        assert line["objective/scores"] == other["objective/scores"]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_the_trial_of_the_longest_rows_changes_no_bit(home: Path) -> None:
    plain, made = (trainer(home, "max_steps=2", f"output_dir={home / name}") for name in ("plain", "tried"))
    plain.try_longest = lambda: None  # type: ignore[method-assign]
    plain.train()
    made.train()
    assert all(torch.equal(weight, plain.trained[name]) for name, weight in made.trained.items())


def test_a_disk_that_fills_up_in_the_middle_costs_checkpoints_and_three_in_a_row_end_the_run(home: Path) -> None:
    updates = itertools.count(1)

    def filling(full: set[int]) -> Any:
        def score(prompts: Any, completions: Any, records: Any) -> list[float]:
            limit_files(60_000 if next(updates) in full else None)
            return lower(prompts, completions, records)

        return score

    words = ("max_steps=6", "save_steps=1", "save_total_limit=9", "num_ppo_epochs=1")
    made = trainer(home, *words, score=filling({2, 3}))
    made.train()
    assert sorted(path.name for path in checkpoints(home / "run")) == [f"checkpoint-{n}" for n in (1, 4, 5, 6)]
    updates = itertools.count(1)
    made = trainer(home, *words, f"output_dir={home / 'ended'}", score=filling({2, 3, 4}))
    with (
        largest_file(2**40),
        pytest.raises(ResourceError, match="3 checkpoints in a row could not be written") as caught,
    ):
        made.train()
    assert f"The last good checkpoint is {home / 'ended' / 'checkpoint-1'}." in caught.value.message
    assert [path.name for path in (home / "ended").glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_recipe_reads_as_the_others_do() -> None:
    from finetune_kit import recipe

    config = settings(Path("x"))
    found = recipe.load(str(recipe.folder() / "ppo.py"))
    assert found.config_class.kind == "prompt"
    assert replace(config.reward, sources=["task"]) == type(config)().reward


class TestARunThatGoesOn:
    WORDS = ("max_steps=4", "save_steps=1", "save_total_limit=9", "adaptive_kl_target=0.5", "adaptive_kl_horizon=100")

    @staticmethod
    def begun(home: Path, *words: str, score: Any = lower) -> Any:
        made = trainer(home, *words, score=score)
        begin(made.config, made.tokenizer, made.data, made.model)
        return made

    @pytest.mark.parametrize("value", [pytest.param("shared", marks=pytest.mark.long), "adapter"])
    @pytest.mark.parametrize("step", [1, 3, 4], ids=["mid-epoch", "past an epoch's border", "last step"])
    def test_cut_after_an_update_it_is_the_uninterrupted_run_to_the_bit(
        self, home: Path, step: int, value: str
    ) -> None:
        words = (*self.WORDS, f"value_model={value}")
        whole = self.begun(home, *words, f"output_dir={home / 'whole'}")
        expected = whole.train()
        assert len(whole.prompts) / 16 < 3  # updates in an epoch
        shutil.copytree(home / "whole", home / "rest")
        for later in range(step + 1, 5):
            shutil.rmtree(home / "rest" / f"checkpoint-{later}")
        (home / "rest" / f"checkpoint-{step + 1}").mkdir()  # half written
        torch.manual_seed(12345)
        rest = self.begun(home, *words, f"output_dir={home / 'rest'}")
        found = rest.train()
        assert [without_times(line) for line in found] == [without_times(line) for line in expected]
        assert [json.loads(line) for line in (home / "rest" / "metrics.jsonl").read_text().splitlines()] == found
        for name, weight in weights(whole).items():
            assert torch.equal(weight, rest.trained[name]), name
        ends = [read_manifest(home / run / "checkpoint-4")["files"]["state.safetensors"] for run in ("whole", "rest")]
        assert ends[0] == ends[1]

    def test_a_signal_in_update_2_ends_it_commits_it_and_the_rest_is_the_same(self, home: Path) -> None:
        calls = iter(range(99))

        def interrupting(prompts: Any, completions: Any, records: Any) -> list[float]:
            if next(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return lower(prompts, completions, records)

        words = ("max_steps=4", "save_steps=null")
        expected = trainer(home, *words, f"output_dir={home / 'whole'}")
        expected.train()
        cut = self.begun(home, *words, score=interrupting)
        with pytest.raises(Stopped, match="checkpoint-2 is what it resumes from"), stop_on_signals(home / "run"):
            cut.train()
        rest = self.begun(home, *words)
        assert [line["step"] for line in rest.train()] == [1, 2, 3, 4]
        for name, weight in weights(expected).items():
            assert torch.equal(weight, rest.trained[name]), name

    def test_a_run_that_went_wrong_leaves_no_checkpoint_after_its_last_good_one(self, home: Path) -> None:
        calls = iter(range(99))

        def broken(prompts: Any, completions: Any, records: Any) -> list[float]:
            return lower(prompts, completions, records) if next(calls) < 3 else [math.nan] * len(prompts)

        with pytest.raises(NumericsError, match=r"The last good checkpoint is .*checkpoint-2"):
            self.begun(home, *self.WORDS, score=broken).train()
        assert [path.name for path in checkpoints(home / "run")] == ["checkpoint-1", "checkpoint-2"]

    def test_another_rate_is_refused_and_opened_it_acts(self, home: Path) -> None:
        self.begun(home, *self.WORDS, "max_steps=2").train()
        with pytest.raises(SettingsError, match=r"train.learning_rate 0.01 → 0.001"):
            self.begun(home, *self.WORDS, "max_steps=2", "learning_rate=1e-3")
        config = settings(home, *self.WORDS, "learning_rate=1e-3")
        config.allow_changed = ("train.learning_rate", "train.max_steps")
        policy, tokenizer, data = parts(config)
        made = PPOTrainer(policy, tokenizer, data, Rewards((Part("lower", 1.0, lower),)), config)
        begin(config, tokenizer, data, policy)
        assert [line["learning_rate"] for line in made.train()] == [1e-2, 1e-2, 1e-3, 1e-3]
