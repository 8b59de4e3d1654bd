"""A run that resumes from a checkpoint is the run that never stopped, bit for bit, wherever it was cut."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_kit.errors import Stopped
from finetune_kit.models.tiny import write_tiny_model
from finetune_kit.training import stopping
from finetune_kit.training.checkpoint import checkpoints, newest_whole, read_manifest
from finetune_kit.training.fit import fit, hooks
from tests.fixtures_training import ROWS, Trained, prepare, write_rows

PAIRS = [{"prompt": f"{n} + {n} =", "chosen": f"it is {2 * n}", "rejected": f"no {n}"} for n in range(40)]
LABELLED = [{"prompt": f"{n} =", "completion": f"it is {n}" * (1 + n % 3), "label": bool(n % 2)} for n in range(40)]
REWARD = """
def score(prompts, completions, records):
    return [sum(letter.isascii() and letter.islower() for letter in text) / 12 for text in completions]
"""
# 37 rows in 10 batches of 4, 2 a step: an epoch has 5 steps, and a line of the log 3
STEPS = ("max_steps=12", "gradient_accumulation_steps=2", "logging_steps=3", "learning_rate=1e-2", "warmup_steps=3")
SAMPLED = (
    "per_device_train_batch_size=8",
    "max_completion_length=6",
    "num_generations=4",
    "reward.sources=[{reward}:score]",
)
DROPOUT = "lora.lora_dropout=0.3"
# recipe: the rows it trains on, and its words; each draws at random in every step
RECIPES = {
    "full_sft": ("rows", ("neftune_noise_alpha=5",)),
    "lora_sft": ("rows", (DROPOUT, "eval_steps=4")),
    "qlora_sft": ("rows", (DROPOUT,)),
    "reward_model": ("pairs", (DROPOUT,)),
    "dpo": ("pairs", (DROPOUT, "eval_steps=5")),
    "kto": ("labelled", (DROPOUT,)),
    "orpo": ("pairs", (DROPOUT,)),
    "grpo": ("prompts", (*SAMPLED, "num_iterations=2")),
    "rloo": ("prompts", SAMPLED),
}
BESIDE = ("full_sft", "qlora_sft", "reward_model", "kto", "orpo", "grpo", "rloo")  # make test-long tests all their cuts
ALIKE = ("rloo", "orpo", "kto")  # to grpo and dpo in all that a checkpoint keeps
CUTS = {"inside a line of the log": 4, "epoch border": 5, "mid-epoch": 8, "last step": 12}
# at the end of an epoch TRL's ORPO averages some lines of its log over other rows where the epoch was resumed
ORPO_LOG = {
    f"{what}/{side}" for what in ("rewards", "logps") for side in ("chosen", "rejected", "margins", "accuracies")
}
TIMES = {"seconds", "peak_memory_gib", "tokens_per_second", "step_time"}
EVERY = [
    pytest.param(
        recipe,
        place,
        marks=[pytest.mark.long] if recipe in BESIDE and (recipe in ALIKE or place != "mid-epoch") else [],
    )
    for recipe in RECIPES
    for place in CUTS
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_tiny_model(folder / "tiny")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    (folder / "tiny" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    prompts = [{"prompt": row["prompt"]} for row in ROWS]
    for name, rows in {"rows": ROWS, "pairs": PAIRS, "labelled": LABELLED, "prompts": prompts}.items():
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_KIT_CACHE", str(home / "cache"))


def ready(home: Path, recipe: str, folder: str, *more: str) -> Trained:
    """A run up to its first step, that of a new process; what that drew before does not matter."""
    rows, words = RECIPES[recipe]
    words = tuple(word.format(reward=home / "reward.py") for word in words)
    given = [f"data.path={home / rows}.jsonl", f"output_dir={home / folder}", *STEPS, *words, *more]
    last = {word.split("=")[0]: word for word in given}
    run = prepare(recipe, home, "save_steps=1", "save_total_limit=99", *last.values())
    torch.manual_seed(12345)
    return run


def finish(run: Trained) -> Trained:
    run.history = fit(run.trainer, run.config.train, run.score)
    return run


_whole: dict[str, Trained] = {}


def whole(home: Path, recipe: str) -> Trained:
    """The uninterrupted run with a checkpoint after each step."""
    if recipe not in _whole:
        _whole[recipe] = finish(ready(home, recipe, f"whole-{recipe}"))
    return _whole[recipe]


def cut(run: Trained, step: int, folder: Path) -> Path:
    """What a run killed right after a step leaves; with a half written checkpoint, too."""
    shutil.copytree(run.folder, folder)
    for checkpoint in checkpoints(folder):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    (folder / f"checkpoint-{step + 1}").mkdir()
    (folder / f"checkpoint-{step + 1}" / "optimizer.pt").write_bytes(b"half")
    return folder


def without_times(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: number for name, number in line.items() if name not in TIMES} for line in lines]


def state_hashes(folder: Path) -> dict[str, str]:
    """Weights, optimizer, scheduler and random states of a run's last checkpoint, as the hashes of their files."""
    kept = ("safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    files = read_manifest(checkpoints(folder)[-1])["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(kept)}


def assert_equal(one: Trained, other: Trained) -> None:
    uneven = ORPO_LOG if one.config.recipe == "orpo" else set()
    for line, expected in zip(without_times(one.history), without_times(other.history), strict=True):
        assert {key: line[key] for key in line.keys() - uneven} == {
            key: expected[key] for key in expected.keys() - uneven
        }
    written = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
    assert written == one.history
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name
    assert state_hashes(one.folder) == state_hashes(other.folder)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= state_hashes(one.folder).keys()


@pytest.mark.parametrize(("recipe", "place"), EVERY)
def test_cut_and_gone_on_it_is_the_uninterrupted_run_to_the_bit(home: Path, recipe: str, place: str) -> None:
    expected = whole(home, recipe)
    assert len({line["loss"] for line in expected.history if "loss" in line}) > 3
    name = f"{recipe}-{CUTS[place]}"
    cut(expected, CUTS[place], home / name)
    resumed = finish(ready(home, recipe, name))
    assert_equal(resumed, expected)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lora_sft", ("train_sampling_strategy=group_by_length", "train.extra.dataloader_num_workers=1")),
        pytest.param("dpo", (), marks=pytest.mark.long),
    ],
)
def test_batches_by_length_go_on_to_the_bit_too(home: Path, recipe: str, words: tuple[str, ...]) -> None:
    """In the second epoch, whose order comes from the seed and the epoch alone."""
    words = (*words, "max_tokens_per_batch=240", "eval_steps=null")
    expected = finish(ready(home, recipe, f"whole-{recipe}-lengths", *words))
    cut(expected, 8, home / f"{recipe}-lengths")
    assert_equal(finish(ready(home, recipe, f"{recipe}-lengths", *words)), expected)


@pytest.mark.parametrize("recipe", ["lora_sft", "dpo"])
def test_a_signal_inside_an_accumulation_ends_the_step_commits_it_and_the_rest_is_the_same(
    home: Path, recipe: str
) -> None:
    expected = whole(home, recipe)
    name = f"{recipe}-signal"
    run = ready(home, recipe, name, "save_steps=500")

    def raise_it(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            signal.raise_signal(signal.SIGTERM)

    run.trainer.add_callback(hooks(on_substep_end=raise_it))  # after the first of two passes of step 7
    goes_on = r"by SIGTERM; .*checkpoint-7 is what it resumes from"
    with pytest.raises(Stopped, match=goes_on) as caught, stopping.stop_on_signals(run.folder):
        finish(run)
    assert caught.value.exit_code == 75
    assert newest_whole(run.folder) == run.folder / "checkpoint-7"
    assert_equal(finish(ready(home, recipe, name)), expected)


def test_stopped_early_it_stays_stopped_and_ends_with_the_best_weights(home: Path) -> None:
    class Scores:
        def __init__(self, *numbers: float) -> None:
            self.numbers = iter(numbers)

        def __call__(self, model: Any, metric: str) -> dict[str, float]:
            return {"loss": next(self.numbers)}

    words = ("eval_steps=2", "early_stopping_patience=2", "save_total_limit=1", "save_steps=1")
    expected = ready(home, "lora_sft", "early", *words)
    expected.score = Scores(3, 2, 4, 5)
    finish(expected)
    assert expected.history[-1]["step"] == 8
    assert [path.name for path in checkpoints(expected.folder)] == [
        "checkpoint-4",
        "checkpoint-8",
    ]  # the best, the last
    for step, left in ((4, Scores(4, 5)), (8, Scores())):
        cut(expected, step, home / f"early-{step}")
        again = ready(home, "lora_sft", f"early-{step}", *words)
        again.score = left
        finish(again)
        assert without_times(again.history) == without_times(expected.history)
        for name, weight in again.weights.items():
            assert torch.equal(weight, expected.weights[name]), name


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning_rate=1e-3", "train.learning_rate"),
        ("max_steps=20", "train.max_steps"),
        ("weight_decay=100", "train.weight_decay"),
        ("max_grad_norm=1e-4", "train.max_grad_norm"),
        ("lr_scheduler_type=cosine", "train.lr_scheduler_type"),
    ],
)
def test_a_setting_that_is_opened_acts_from_the_checkpoint_on(home: Path, word: str, key: str) -> None:
    expected = whole(home, "lora_sft")
    cut(expected, 5, home / f"opened-{key}")
    run = ready(home, "lora_sft", f"closed-{key}", word)  # the words alone: prepare takes no flag
    run.config.allow_changed = (key,)
    shutil.rmtree(run.folder)
    (home / f"opened-{key}").rename(run.folder)
    from finetune_kit.training.begin import begin

    begin(run.config, run.tokenizer, run.data, run.model)
    finish(run)
    before, after = (
        [line for line in run.history if (line["step"] <= 5) is early and "loss" in line] for early in (True, False)
    )
    was = [line for line in expected.history if line["step"] > 5 and "loss" in line]
    assert without_times(before) == without_times(
        [line for line in expected.history if line["step"] <= 5 and "loss" in line]
    )
    assert len(after) == (6 if key == "train.max_steps" else 3)  # the last step has its line besides
    rates = [line["learning_rate"] for line in after]
    if key == "train.learning_rate":  # a tenth of the old one, on the same schedule
        assert rates == pytest.approx([line["learning_rate"] / 10 for line in was])
    elif key == "train.max_steps":  # linear to 0 at step 20, from step 3 on
        assert rates == pytest.approx([1e-2 * (20 - (line["step"] - 1)) / 17 for line in after])
    elif key == "train.lr_scheduler_type":
        assert rates != pytest.approx([line["learning_rate"] for line in was])
    else:
        assert any(not torch.equal(weight, expected.weights[name]) for name, weight in run.weights.items())
