"""Windows: no fcntl, no resource, no user ids, no timers. Not run there; here it is all taken away."""

from pathlib import Path

import pytest

from tests.fixtures_cli import ROOT, python

# The libraries come first: what they need of the system is theirs to have. Then what Windows lacks goes.
WITHOUT = """
import os, pkgutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
import bitsandbytes.functional, jinja2.sandbox, peft.tuners.lora.layer, psutil, torch, typer
import transformers.modeling_layers, transformers.modeling_outputs, transformers.quantizers.quantizer_bnb_4bit
import rich.progress, rich.table, yaml
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios", "tty")))
for name in ("fork", "getuid", "geteuid", "getgid", "getegid", "killpg", "nice", "setsid", "O_NOFOLLOW"):
    delattr(os, name)
timers = [name for name in dir(signal) if "itimer" in name.lower()]
for name in (*timers, "SIGALRM", "SIGVTALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGRTMAX"):
    delattr(signal, name)
for name in [name for name in dir(signal) if name.startswith("pthread_") or name in ("SIG_BLOCK", "SIG_SETMASK")]:
    delattr(signal, name)
sys.platform = "win32"
import finetune_kit
from finetune_kit import recipe
for module in pkgutil.walk_packages(finetune_kit.__path__, "finetune_kit."):
    if module.name != "finetune_kit.__main__":
        __import__(module.name)
for word in recipe.BUILTIN:
    recipe.load(word)
"""


@pytest.mark.long
def test_all_modules_and_recipes_load_and_a_run_claims_its_folder_without_what_windows_lacks(tmp_path: Path) -> None:
    script = f"""{WITHOUT}
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.data.rendering import _within
from finetune_kit.models.embedded import cache_folder
from finetune_kit.rewards.limits import Own, contained
from finetune_kit.run_folder.claim import begin, claim
from finetune_kit.run_folder.lock import is_being_trained
settings = resolve(RecipeConfig, "lora_sft")
folder = claim(settings)
folder.mkdir(parents=True)  # by hand, and empty
begin(settings, SimpleNamespace(to_json=dict), {{}})
print(sorted(path.name for path in folder.iterdir()), is_being_trained(folder))
with _within(1.0):
    print(contained(lambda: "scored", 1.0, Own(), Path()))
os.environ.pop("HOME")
print(cache_folder().name)
"""
    environment = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": "", "FINETUNE_KIT_CACHE": ""}
    said = python("-c", script, cwd=tmp_path, **environment)
    assert said.code == 0, said.err
    assert said.out.splitlines() == ["['identity.json', 'ledger.json', 'run.yaml'] False", "scored", "finetune_kit"]


@pytest.mark.long
@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_mypy_finds_nothing_that_another_system_lacks(platform: str, tmp_path: Path) -> None:
    """Its stubs know of each function and constant of the standard library which systems have it."""
    words = ("--platform", platform, "--no-warn-unused-ignores", "--cache-dir", tmp_path, "finetune_kit", "recipes")
    said = python("-m", "mypy", *words, cwd=ROOT)
    assert said.code == 0, said.out
