"""The wheel, as a stranger gets it: built, installed without its dependencies, and used from another folder."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fixtures_cli import ROOT, Said, python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that no build folder of the checkout can help."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("finetune_kit", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    said = python("-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=copy)
    assert said.code == 0, said.out + said.err
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    words = ("install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    said = python("-m", "pip", *words, cwd=target)
    assert said.code == 0, said.err
    return target


def use(installed: Path, folder: Path, *words: str) -> Said:
    return python("-m", "finetune_kit", *words, cwd=folder, PYTHONPATH=str(installed))


def test_the_wheel_holds_one_package_with_recipes_and_data_inside(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"finetune_kit"}
    sources = {
        f"finetune_kit/{path.relative_to(ROOT / 'finetune_kit')}" for path in (ROOT / "finetune_kit").rglob("*.py")
    }
    sources |= {f"finetune_kit/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    assert sources <= names
    assert "finetune_kit/evaluation/general_text.txt" in names
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert "finetune-kit = finetune_kit.__main__:main" in zipfile.ZipFile(wheel).read(scripts).decode()


def test_every_package_of_the_sources_is_named_in_pyproject(wheel: Path) -> None:
    packages = {path.parent for path in (ROOT / "finetune_kit").rglob("*.py")}
    for package in packages:
        assert (package / "__init__.py").is_file(), package


def test_the_installed_package_lists_shows_and_copies_from_another_folder(installed: Path, tmp_path: Path) -> None:
    script = "import finetune_kit, finetune_kit.recipe as r; print(finetune_kit.__file__); print(r.folder())"
    said = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.out.split() == [str(installed / "finetune_kit/__init__.py"), str(installed / "finetune_kit/recipes")]
    said = use(installed, tmp_path, "list")
    assert said.code == 0, said.err
    assert "lora_sft" in said.out
    said = use(installed, tmp_path, "show", "lora_sft", "r=8")
    assert said.code == 0, said.err
    assert str(installed / "finetune_kit/recipes/lora_sft.py") in said.out.replace("\n", "")
    said = use(installed, tmp_path, "copy", "lora_sft", "mine.py")
    assert said.code == 0, said.err
    assert (tmp_path / "mine.py").read_text() == (ROOT / "recipes/lora_sft.py").read_text()
    said = use(installed, tmp_path, "show", "./mine.py")
    assert said.code == 0, said.err


def test_the_general_text_is_found_in_the_installed_package(installed: Path, tmp_path: Path) -> None:
    script = "from finetune_kit.evaluation import loss; print(loss.__file__); print(len(loss.GENERAL_TEXT.read_text()))"
    said = python("-c", script, cwd=tmp_path, PYTHONPATH=str(installed))
    assert said.code == 0, said.err
    assert said.out.startswith(str(installed))


def test_the_console_script_is_installed_in_this_environment() -> None:
    assert (Path(sys.executable).parent / "finetune-kit").exists()
