"""Two real processes are one run: the same losses, each row counted once, one voice, one end."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from hypothesis import given
from hypothesis import strategies as st

from finetune_kit import distributed
from finetune_kit import recipe as recipes
from finetune_kit.errors import SettingsError
from finetune_kit.models.load import load_adapted, load_base
from finetune_kit.runs.verify import probe_logits
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.training.sharding import check_wrapper, last_round
from tests import two_shards
from tests.fixtures_cli import ROOT, Said
from tests.fixtures_training import SMALLEST
from tests.two_processes import ALIKE, figures, kept, train, write_home

SHIPPED = ("--config_file", str(ROOT / "accelerate_config.yaml"), "--num_processes", "2")
QUICK = ("model.name_or_path=tiny", "max_steps=2", "per_device_train_batch_size=4", "logging_steps=1")
QUIET = ("evaluate.size=2", "evaluate.general_text=false", "evaluate.safety=null", "evaluate.bootstrap_samples=50")


def launch(*words: str, cwd: Path, **more: str) -> Said:
    """`accelerate launch WORDS`, as a user types it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)
    return Said(done.returncode, done.stdout, done.stderr)


def _torchrun(*words: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_home(folder, tiny_model)
    return folder


@pytest.fixture(scope="module")
def two(home: Path) -> list[dict[str, Any]]:
    """What each of two processes found, by recipe."""
    _torchrun("tests.two_processes", str(home), "two")
    return [json.loads((home / f"two-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("recipe", ALIKE)
def test_two_processes_with_4_rows_each_have_the_losses_of_one_with_8_to_1e_4(
    recipe: str, home: Path, two: list[dict[str, Any]]
) -> None:
    """22 rows of unlike lengths, so that each of the two epochs ends with a step of 6."""
    one = figures(train(recipe, home, "one"))
    first, second = (found[recipe] for found in two)
    # ORPO's likelihood term is a mean over the labels of one forward pass, in TRL: it depends on how rows are split
    alike = 1e-3 if recipe == "orpo" else 1e-4
    assert len(one["losses"]) == 6
    assert first["losses"] == pytest.approx(one["losses"], abs=alike)
    assert first["weights"] == second["weights"]
    assert first["where"] == second["where"] == one["where"]
    for name in ("nll", "chosen"):
        assert first.get(name) == second.get(name)
        assert first.get(name) == pytest.approx(one.get(name), abs=0.05)
    assert first.get("tokens") == one.get("tokens")
    assert first.get("answers") == second.get("answers") == one.get("answers")


def test_on_two_processes_a_run_cut_after_4_of_6_steps_goes_on_to_the_bit_and_one_process_refuses_it(
    home: Path, two: list[dict[str, Any]]
) -> None:
    for found in two:
        assert len(found["resumed"]["losses"]) == 6
        assert found["resumed"]["losses"] == found["resumed"]["whole"]
        assert found["resumed"]["weights"]
    shutil.rmtree(home / "cut" / "checkpoint-6")
    with pytest.raises(SettingsError, match="processes"):
        kept(home, "cut")


@pytest.mark.long
def test_a_model_in_two_shards_trains_evaluates_and_is_saved_as_one_process_does(home: Path) -> None:
    """torch's fully_shard on every block, with the packed forward, full and LoRA; saved, it loads as it was."""
    _torchrun("tests.two_shards", str(home))
    shards = [json.loads((home / f"shards-{rank}.json").read_text()) for rank in range(2)]
    assert shards[0] == shards[1]
    for lora in (False, True):
        model, found = two_shards.policy(home, lora), shards[0][str(lora)]
        one = two_shards.figures(model)
        assert found["sharded"]
        assert found["losses"] == pytest.approx(one["losses"], abs=1e-5)
        assert found["nll"] == pytest.approx(one["nll"], abs=1e-3)
        saved = home / f"sharded-{lora}"
        base = ModelConfig(str(home / "tiny" if lora else saved))
        loaded = load_adapted(base, saved) if lora else load_base(base)
        assert float((probe_logits(loaded, [1, 40, 41]) - probe_logits(model, [1, 40, 41])).abs().max()) < 1e-4


@given(st.integers(1, 6), st.integers(1, 9), st.data(), st.booleans())
def test_of_the_last_rows_of_an_epoch_each_counts_alike_and_every_process_has_some(
    count: int, most: int, data: st.DataObject, by_token: bool
) -> None:
    rows = list(range(data.draw(st.integers(1, count * most))))
    batches = last_round(rows, count, most, by_token)
    assert len(batches) == count
    assert all(1 <= len(batch) <= most for batch in batches)
    times = Counter(row for batch in batches for row in batch)
    assert len(set(times.values())) == 1
    assert len(rows) - len(times) < count
    if by_token and len(rows) >= count:
        assert len(times) == len(rows)
    else:
        assert len({len(batch) for batch in batches}) == 1


@pytest.mark.long
def test_the_shipped_file_starts_two_processes_that_speak_once_and_leave_one_folder(home: Path) -> None:
    data = ("data.path=prompt_completion.jsonl", "held_out_size=3")
    said = launch(*SHIPPED, "-m", "finetune_kit", "run", "lora_sft", *data, *QUICK, *QUIET, cwd=home)
    assert said.code == 0, said.err[-3000:]
    assert "2 steps of 8 rows, on 2 processes, each on cpu" in said.err
    assert said.err.count("step 2/2") == said.out.count("The run is in") == 1
    assert "FutureWarning" not in said.err
    assert [path.name for path in (home / "runs").iterdir()] == ["lora_sft"]
    report = json.loads((home / "runs" / "lora_sft" / "report.json").read_text())
    assert report["rows"] == {"held_out": 3, "answered": 2}
    assert len((home / "runs" / "lora_sft" / "metrics.jsonl").read_text().splitlines()) == 2
    assert report["reload_max_logit_difference"] < 1e-4


@pytest.mark.long
def test_an_error_of_one_process_ends_both_with_its_message_once_within_30_seconds(home: Path) -> None:
    text = (ROOT / "recipes" / "lora_sft.py").read_text()
    broken = (
        "    from pathlib import Path\n"
        "    from finetune_kit import distributed\n    from finetune_kit.errors import DataError\n"
        "    if distributed.rank() == 1:\n        Path('raised').touch()\n"
        "        raise DataError('row 7 is broken.', 'Remove it.')\n"
    )
    (home / "broken.py").write_text(text.replace("    history = fit(", f"{broken}    history = fit("))
    command = ("run", "./broken.py", "data.path=prompt_completion.jsonl", *QUICK, *QUIET, "output_dir=broken")
    said = launch(*SHIPPED, "-m", "finetune_kit", *command, cwd=home)
    assert time.time() - (home / "raised").stat().st_mtime < 30
    assert said.code != 0
    assert said.err.count("error: row 7 is broken.") == 1
    assert "exitcode  : 3" in said.err  # of the process itself; the launcher's own is 1
    assert "RuntimeError" not in said.err


def test_a_process_that_ends_while_it_looks_out_for_the_others_keeps_its_exit_code() -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ends = (
        "import sys, time\nimport torch.distributed\nfrom finetune_kit import distributed\n"
        "distributed.POLL = 0  # it is always looking\ndistributed._watch()\ntime.sleep(0.5)\nsys.exit(3)"
    )
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, "-c", ends], cwd=ROOT, env={**os.environ, **where}, check=False)
    assert done.returncode == 3


def test_a_launch_that_starts_one_process_where_two_were_asked_for_is_refused(home: Path) -> None:
    run = ("-m", "finetune_kit", "run", "lora_sft", "data.path=prompt_completion.jsonl", *QUICK, "output_dir=never")
    said = launch("--cpu", "--num_processes", "2", *run, cwd=home)
    assert "error: accelerate launch was asked for 2 processes, and started 1." in said.err
    assert "--config_file accelerate_config.yaml" in said.err
    assert not (home / "never").exists()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but not which"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for, and accelerate does not shard on a CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed was asked for"),
    ],
)
def test_what_cannot_become_what_was_asked_for_is_refused_at_the_start(
    environment: dict[str, str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=found):
        distributed.start(on_cpu=True)


def test_a_model_that_is_not_wrapped_as_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = torch.nn.Linear(1, 1)
    check_wrapper(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SettingsError, match="FSDP was asked for, and the model is wrapped as Linear"):
        check_wrapper(model)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="DistributedDataParallel was asked for, and the model is wrapped as"):
        check_wrapper(model)


def test_one_process_works_alone_and_without_a_group() -> None:
    assert distributed.spread(3, lambda mine: [place * 2 for place in mine]) == [0, 2, 4]
    assert distributed.from_main(lambda: 7) == 7
    distributed.barrier()
    assert distributed.fails_first(2)


@pytest.mark.long
@pytest.mark.parametrize("recipe", recipes.BUILTIN)
def test_every_recipe_runs_through_accelerate_launch_on_two_processes(recipe: str, home: Path) -> None:
    kinds = {"reward_model": "preference", "dpo": "preference", "orpo": "preference", "kto": "labelled_completion"}
    own = {
        "ppo": ("batch_size=8", "num_mini_batches=2", "num_ppo_epochs=1", "max_new_tokens=8"),
        "grpo": ("num_generations=2", "max_completion_length=8"),
        "rloo": ("num_generations=2", "max_completion_length=8"),
    }
    rows = f"data.path={kinds.get(recipe, 'prompt_completion')}.jsonl"
    quick = QUICK
    if recipe == "pretrain":
        (home / "text.txt").write_text("".join(f"Day {n} was calm, and so was day {n * n}.\n" for n in range(300)))
        rows, quick = "data.path=text.txt", (*QUICK[1:], *SMALLEST)
    words = [
        *quick,
        f"output_dir=every/{recipe}",
        "evaluate.general_text=false",
        "evaluate.safety=null",
        "evaluate.bootstrap_samples=50",
    ]
    if recipe in own:
        (home / "short.py").write_text(
            "def short(prompts, completions, records):\n    return [-len(c) for c in completions]\n"
        )
        words += ["reward.sources=[short.py:short]", *own[recipe]]
    said = launch(*SHIPPED, "-m", "finetune_kit", "run", recipe, rows, "held_out_size=3", *words, cwd=home)
    assert said.code == 0, said.err[-3000:]
    assert said.out.count("The run is in") == 1
    report = json.loads((home / "every" / recipe / "report.json").read_text())
    assert 0 < report["rows"]["held_out"] <= (100 if recipe == "pretrain" else 3)  # of text, blocks
    assert len((home / "every" / recipe / "metrics.jsonl").read_text().splitlines()) == 2
