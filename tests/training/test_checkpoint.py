"""training/checkpoint.py: what counts, what is set aside, what is deleted, and what is never touched."""

import json
from pathlib import Path

import pytest

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.training import checkpoint
from finetune_kit.training.checkpoint import MANIFEST, checkpoints, commit, newest_whole, rotate
from tests.fixtures_cli import cli
from tests.fixtures_training import FAST, fit_only, prepare

FACTS = {"step": 0, "data": "abc"}


def write(run: Path, step: int, whole: bool = True) -> Path:
    folder = run / f"checkpoint-{step}"
    (folder / "ref").mkdir(parents=True)
    for name in ("optimizer.pt", "model.safetensors", "ref/adapter_model.safetensors", "trainer_state.json"):
        (folder / name).write_bytes(f"{name} of {step}".encode() * 100)
    if whole:
        commit(folder, {**FACTS, "step": step})
    return folder


def test_a_manifest_has_the_facts_and_every_file_with_size_and_sha_256(tmp_path: Path) -> None:
    manifest = checkpoint.read_manifest(write(tmp_path, 3))
    assert (manifest["step"], manifest["data"]) == (3, "abc")
    assert sorted(manifest["files"]) == [
        "model.safetensors",
        "optimizer.pt",
        "ref/adapter_model.safetensors",
        "trainer_state.json",
    ]
    assert manifest["files"]["optimizer.pt"]["bytes"] == 1700
    assert len(manifest["files"]["optimizer.pt"]["sha256"]) == 64


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip a bit", "empty"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "ref/adapter_model.safetensors", "trainer_state.json", MANIFEST]
)
def test_a_harmed_file_of_any_kind_sets_its_checkpoint_aside_and_the_next_older_is_taken(
    tmp_path: Path, harm: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    older, newer = write(tmp_path, 3), write(tmp_path, 12)
    file = newer / name
    content = bytearray(file.read_bytes())
    if harm == "delete":
        file.unlink()
    elif harm == "flip a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "truncate" else b"")
    half = name == MANIFEST and harm == "delete"  # then nothing says that it was ever whole
    if not half:
        with pytest.raises(ResourceError, match="checkpoint-12 is broken") as caught:
            newest_whole(tmp_path, strict=True)
        assert "--strict-resume" in caught.value.fix
        assert newer.is_dir()
    assert newest_whole(tmp_path) == older
    assert (tmp_path / "checkpoint-12.corrupt").is_dir() == (not half)
    assert ("checkpoint-12 is broken, and set aside" in capsys.readouterr().err) == (not half)
    assert checkpoints(tmp_path) == [older]


def test_half_written_and_half_deleted_ones_are_removed_and_what_is_none_of_ours_stays(tmp_path: Path) -> None:
    whole = write(tmp_path, 3)
    write(tmp_path, 7, whole=False)
    write(tmp_path, 2).rename(tmp_path / ".trash-checkpoint-2")
    for name in ("checkpoint-best", "notes"):
        (tmp_path / name).mkdir()
    assert newest_whole(tmp_path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-best", "notes"]
    assert newest_whole(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [9, 10]),
        (2, 2, [2, 10]),
        (1, None, [10]),
        (1, 2, [2, 10]),
        (3, 9, [8, 9, 10]),
        (9, None, [2, 8, 9, 10]),
    ],
)
def test_rotation_deletes_the_oldest_and_never_the_newest_or_the_best(
    tmp_path: Path, keep: int, best: int | None, left: list[int]
) -> None:
    for step in (10, 9, 8, 2):  # by number, not by age or name
        write(tmp_path, step)
    write(tmp_path, 11, whole=False)  # a half one is none to count on
    rotate(tmp_path, keep, tmp_path / f"checkpoint-{best}" if best else None)
    assert [checkpoint.step_of(path) for path in checkpoints(tmp_path)] == left
    assert not list(tmp_path.glob(".trash*"))


def test_libraries_that_are_not_those_the_run_began_with_are_said_however_often_it_goes_on(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("max_steps=4", "save_steps=1", f"output_dir={home / 'out'}")
    run = fit_only("lora_sft", home, *words)
    identity = json.loads((run.folder / "identity.json").read_text())
    now = identity["began_with"]
    identity["began_with"] = {**now, "torch": "1.2.3", "trl": "0.4.5"}
    (run.folder / "identity.json").write_text(json.dumps(identity))
    for _ in range(2):
        capsys.readouterr()
        prepare("lora_sft", home, *words)
        changed = f"torch 1.2.3 → {now['torch']}, trl 0.4.5 → {now['trl']}"
        assert f"note: not as when this run began, so that its numbers may differ: {changed}" in capsys.readouterr().err
    assert json.loads((run.folder / "identity.json").read_text())["versions"] == now


def test_a_run_goes_on_past_a_broken_checkpoint_and_refuses_to_with_strict_resume(home: Path) -> None:
    run = fit_only("lora_sft", home, "max_steps=4", "save_steps=1", f"output_dir={home / 'out'}")
    (run.folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"x")
    words = [f"model.name_or_path={home / 'tiny'}", f"data.path={home / 'rows.jsonl'}", f"output_dir={home / 'out'}"]
    given = ("run", "lora_sft", *words, *FAST[1:], "max_steps=4", "save_steps=1")
    refused = cli(*given, "--strict-resume")
    assert (refused.code, "optimizer.pt has 1 bytes" in refused.err) == (5, True)
    said = cli(*given)
    assert said.code == 0, said.err
    assert "checkpoint-4 is broken, and set aside as checkpoint-4.corrupt" in said.err
    assert "which resumes from step 3" in said.out.replace("\n", " ")
    assert [path.name for path in checkpoints(run.folder)] == ["checkpoint-3", "checkpoint-4"]
    assert cli(*given).code == 2  # it is finished, and never touched
    lines = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["scaler.pt", "optimizer.bin", "pytorch_model.bin", "pytorch_model_fsdp_0/x.pt"])
def test_a_file_that_the_manifest_does_not_name_is_never_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    assert checkpoint.broken(folder) == ""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"a pickle")
    assert checkpoint.broken(folder) == f"{name} is not a file that the run wrote"


def test_fewer_steps_than_are_done_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="beyond the 2 steps") as caught:
        checkpoint.check_steps(write(tmp_path, 3), 2)
    assert caught.value.fix == "Set max_steps to at least 3."
