"""What doctor finds, and the code it ends with."""

import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from finetune_kit.cli import doctor
from finetune_kit.errors import NumericsError
from finetune_kit.system.versions import FLOORS
from tests.fixtures_cli import cli


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "tiny_run", lambda: 0.0)


def test_a_sound_installation_ends_with_0_after_a_real_tiny_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "none")
    said = cli("doctor")
    assert said.code == 0, said.out + said.err
    assert torch.__version__.split("+")[0] in said.out
    assert ">=2.10" in said.out
    assert f"CPU: {os.cpu_count()} cores" in said.out
    assert "trained, saved, and loaded in a fresh process: logits within" in said.out
    assert said.out.rstrip().endswith("All well.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        ("torch>=99", "is not >=99 (below 2.10 reading a checkpoint corrupts memory, CVE-2026-24747)."),
        ("typer<0.1", "is not <0.1. Run: pip install 'typer<0.1'"),
        ("no-such-package>=1", "no-such-package is not installed. Run: pip install 'no-such-package>=1'"),
        ('rich<1; extra == "qlora"', "is not <1. Run: pip install 'rich<1'"),
    ],
)
def test_a_version_that_does_not_fit_ends_with_5_and_the_command_that_mends_it(
    requirement: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(requirement)])
    said = cli("doctor")
    assert said.code == 5
    assert problem in said.out
    assert "All well" not in said.out


@pytest.mark.usefixtures("no_run")
def test_what_an_extra_would_bring_may_be_missing_and_what_a_developer_needs_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["rich>=1", 'no-such-package>=1; extra == "qlora"', 'no-such-tool>=1; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    said = cli("doctor")
    assert said.code == 0, said.out
    assert re.search(r"no-such-package +not installed +>=1 +extra qlora\n", said.out)
    assert "no-such-tool" not in said.out


@pytest.mark.usefixtures("no_run")
def test_a_gpu_that_this_torch_cannot_use_ends_with_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("NVRM")
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    said = cli("doctor")
    assert said.code == 5
    assert "an NVIDIA GPU is here, but torch" in said.out


def test_a_tiny_run_that_fails_ends_with_5_and_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> float:
        raise NumericsError("the logits differ by [0.1]", "Please report this.")

    monkeypatch.setattr(doctor, "tiny_run", failing)
    said = cli("doctor")
    assert said.code == 5
    assert "problem: the tiny run failed: the logits differ by [0.1]\nPlease report this." in said.out


def test_every_reason_belongs_to_a_requirement_that_has_a_lowest_version() -> None:
    lowest = {name.name: str(name.specifier) for name in doctor._requirements()}
    assert {*doctor.REASONS, *FLOORS} <= set(lowest)
    for library, (floor, _) in FLOORS.items():
        demanded = lowest[library].split(">=")[1].split(",")[0]
        assert tuple(map(int, demanded.split("."))) >= floor
    assert all(">=" in bounds and "<" in bounds.replace(">=", "") for bounds in lowest.values()), lowest
    assert not {"pytest", "ruff"} & set(lowest)
    assert metadata.requires("finetune-kit")
