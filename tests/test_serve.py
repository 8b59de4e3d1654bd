"""docs/serve.md: the merged folder in an environment that has nothing of this package."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from finetune_kit.runs.save import Artifact
from tests.fixtures_cli import ROOT

# what an environment with torch and transformers alone does not have
ABSENT = ("finetune_kit", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "evaluate", "gguf")
BLOCK = "import sys; sys.modules.update(dict.fromkeys({absent}))\n"


def snippet(folder: Path) -> str:
    """The page's transformers example, on `folder`."""
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    found = re.search(r"## transformers \(run\)\n\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    return found.group(1).replace('"merged"', repr(str(folder)))


@pytest.fixture(scope="module")
def merged(lora_run: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "merged"
    command = [sys.executable, "-m", "finetune_kit", "merge", str(lora_run.folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.long
def test_the_example_of_the_page_runs_with_torch_and_transformers_alone(merged: Path) -> None:
    code = BLOCK.format(absent=ABSENT) + snippet(merged)
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_the_example_of_the_page_runs_in_a_clean_venv(merged: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "torch", "transformers"]
    subprocess.run([*install, "jinja2"], check=True)
    done = subprocess.run([python, "-I", "-c", snippet(merged)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
