"""How a recipe is found, loaded and copied; built-ins and a person's own go the same way."""

import ast
from pathlib import Path

import pytest

from finetune_kit import recipe as recipes
from finetune_kit.errors import ResourceError, SecurityError, SettingsError
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig
from tests.fixtures_cli import ROOT

OWN = '''"""Mine."""
from dataclasses import dataclass
from finetune_kit.settings.schema import RecipeConfig, setting


@dataclass
class Config(RecipeConfig):
    beta: float = setting(0.5, "mine")


def run(config):
    return config.beta
'''


def refusal(word: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        recipes.load(word)
    return caught.value


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_a_bare_word_is_a_built_in(name: str) -> None:
    recipe = recipes.load(name)
    assert (recipe.name, recipe.word, recipe.path) == (name, name, ROOT / "recipes" / f"{name}.py")
    assert (recipe.module.__doc__ or "").startswith(recipes.summary(name))


def test_every_file_in_recipes_is_a_built_in_and_the_other_way_round() -> None:
    files = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {"__init__"}
    assert files == set(recipes.BUILTIN)


def test_a_summary_is_read_without_running_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text('"""One line.\n\nMore."""\nraise SystemExit\n')
    monkeypatch.setattr(recipes, "folder", lambda: tmp_path)
    assert recipes.summary("bomb") == "One line."


def test_a_path_is_a_recipe_of_one_s_own_and_is_found_again_from_anywhere(folder: Path) -> None:
    (folder / "mine.py").write_text(OWN)
    for word in ("mine.py", "./mine.py", str(folder / "mine.py")):
        recipe = recipes.load(word)
        assert (recipe.name, recipe.word) == ("mine", str(folder / "mine.py"))
        assert recipe.run(resolve(recipe.config_class, recipe.word, None, ["beta=2"])) == 2


def test_a_yaml_file_names_a_built_in_recipe_and_no_file_whatever_the_path(folder: Path) -> None:
    below = folder / "below"
    below.mkdir()
    (below / "mine.py").write_text(OWN)
    (below / "a.yaml").write_text("recipe: ./mine.py\nbeta: 3\n")
    (below / "b.yml").write_text("recipe: lora_sft\n")
    assert recipes.load("below/b.yml").name == "lora_sft"
    (below / "link").symlink_to(below / "mine.py")
    for path in (
        "./mine.py",
        "mine.py",
        "../below/mine.py",
        below / "mine.py",
        "~/mine.py",
        "/proc/self/cwd/x",
        "./link",
    ):
        (below / "a.yaml").write_text(f"recipe: {path}\nbeta: 3\n")
        with pytest.raises(SecurityError, match=r"a settings file names built-ins alone") as error:
            recipes.load("below/a.yaml")
        assert error.value.fix.endswith("run FILE.py --config below/a.yaml")
    recipe = recipes.load("below/mine.py")  # named by the user
    assert recipe.run(resolve(recipe.config_class, recipe.word, below / "a.yaml")) == 3


def test_run_refuses_settings_that_cannot_be_before_the_recipe_s_own_code(folder: Path) -> None:
    (folder / "mine.py").write_text(OWN.replace("return config.beta", "raise AssertionError('ran')"))
    recipe = recipes.load("./mine.py")
    config = recipe.config_class()
    config.train.learning_rate = 2.0
    with pytest.raises(SettingsError, match=r"train\.learning_rate: expected a number in \[0, 1\], found 2"):
        recipe.run(config)


@pytest.mark.parametrize(
    ("word", "message", "fix"),
    [
        ("lora", "'lora' is not a recipe: ", "Did you mean lora_sft? See: python -m finetune_kit list."),
        ("zzz", "'zzz' is not a recipe: ", "See: python -m finetune_kit list."),
        ("no/such.py", "no/such.py: no such recipe file.", "python -m finetune_kit copy lora_sft no/such.py"),
        ("no/such", "no/such: no such recipe file.", "python -m finetune_kit copy lora_sft mine.py"),
        ("no.yaml", "no.yaml: no such file.", ""),
        ("self.yaml", "self.yaml: 'recipe: self.yaml' is a settings file; expected a recipe.", ""),
        ("mine", "'mine' is not a recipe: ", "A file of your own is written with its folder: ./mine.py"),
    ],
)
def test_a_word_that_means_no_recipe_is_answered_with_what_does(
    word: str, message: str, fix: str, folder: Path
) -> None:
    (folder / "mine.py").write_text(OWN)
    (folder / "self.yaml").write_text("recipe: self.yaml\n")
    error = refusal(word)
    assert error.message.startswith(message)
    assert fix in error.fix


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        (
            "x = 1\n",
            "a docstring and a Config derived from finetune_kit.settings.schema.RecipeConfig "
            "and a function run(config)",
        ),
        (OWN.replace('"""Mine."""', ""), "a docstring"),
        (OWN.replace("def run", "def start"), "a function run(config)"),
        (
            OWN.replace("Config(RecipeConfig)", "Config"),
            "a Config derived from finetune_kit.settings.schema.RecipeConfig",
        ),
        (
            '"""Doc."""\nConfig = 5\ndef run(config): ...\n',
            "a Config derived from finetune_kit.settings.schema.RecipeConfig",
        ),
    ],
)
def test_a_file_that_is_no_recipe_says_what_it_lacks(source: str, missing: str, folder: Path) -> None:
    (folder / "mine.py").write_text(source)
    assert refusal("./mine.py").message == f"mine.py: a recipe needs {missing}."


def test_a_recipe_that_is_not_python_names_the_line(folder: Path) -> None:
    (folder / "mine.py").write_text(OWN + "\ndef (:\n")
    error = refusal("./mine.py")
    assert error.message.startswith(f"{folder / 'mine.py'}:{OWN.count(chr(10)) + 2}: ")


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_a_copy_is_the_same_file_and_loads(name: str, folder: Path) -> None:
    target = recipes.copy(name, Path("below/my_own.py"))
    assert target.read_text() == (ROOT / "recipes" / f"{name}.py").read_text()
    recipe = recipes.load("below/my_own.py")
    assert recipe.name == "my_own"
    original = recipes.load(name)
    assert resolve(recipe.config_class, recipe.word).train == resolve(original.config_class, name).train


def test_a_copy_goes_into_a_folder_under_its_own_name_and_never_over_a_file(folder: Path) -> None:
    assert recipes.copy("lora_sft", folder) == folder / "lora_sft.py"
    (folder / "lora_sft.py").write_text("mine")
    for target in (folder, folder / "lora_sft.py"):
        with pytest.raises(SettingsError, match="exists already"):
            recipes.copy("lora_sft", target)
    assert (folder / "lora_sft.py").read_text() == "mine"


def test_a_copy_must_be_a_python_file_that_can_be_written(folder: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        recipes.copy("lora_sft", Path("mine"))
    assert caught.value.fix == "python -m finetune_kit copy lora_sft mine.py"
    (folder / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        recipes.copy("lora_sft", Path("file/mine.py"))


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_a_built_in_is_at_most_120_lines_and_its_docstring_has_the_six_headings_in_order(name: str) -> None:
    source = (ROOT / "recipes" / f"{name}.py").read_text()
    assert len(source.splitlines()) <= 120
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    headings = [line for line in lines[1:] if line and not line.startswith(" ")]
    assert headings == ["What it does", "Objective", "Data in", "Artifact out", "What to watch", "Paper"]


EXITING = """'''Nothing.'''
import sys
from finetune_kit.settings.schema import RecipeConfig as Config
{0}
def run(config):
    {1}
"""


def test_a_recipe_that_exits_with_0_is_an_error_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(EXITING.format("sys.exit(0)", "pass"))
    with pytest.raises(SettingsError, match=r"mine.py:4: the recipe called sys.exit\(0\)"):
        recipes.load(str(path))
    path.write_text(EXITING.format("", "sys.exit(0)"))
    with pytest.raises(SettingsError, match=r"mine.py:6: the recipe called sys.exit\(0\)"):
        recipes.load(str(path)).run(resolve(RecipeConfig, "mine", None, []))


def test_a_recipe_that_is_run_without_a_claim_gets_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(EXITING.format("", "return config.train.output_dir"))
    config = resolve(RecipeConfig, "mine", None, [])
    assert recipes.load("./mine.py").run(config) == "runs/mine"
