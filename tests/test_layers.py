"""The house's walls: who may import whom, who owns which library, and what no line of ours may do."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_kit import recipe as recipes
from tests.fixtures_cli import ROOT, python

# lower may not import higher; modules of one level may import each other, but not in a circle
LEVELS = (
    {"errors"},
    {"distributed", "system"},
    {"settings"},
    {"run_folder"},
    {"recipe"},
    {"tools"},
    {"data", "models"},
    {"packing"},
    {"generation"},
    {"rewards"},
    {"evaluation"},
    {"training"},
    {"rl"},
    {"planning"},
    {"runs"},
    {"recipes", "api"},
    {"cli", "__main__"},
)
# the library: where it may be imported
OWNERS = {
    "datasets": ("finetune_kit/data/",),
    "peft": ("finetune_kit/models/", "finetune_kit/runs/reload.py"),  # which runs without this package
    "bitsandbytes": ("finetune_kit/models/",),
    "evaluate": ("finetune_kit/evaluation/metrics.py",),
    "lm_eval": ("finetune_kit/evaluation/harness.py",),
    "trl": ("recipes/", "finetune_kit/planning/fake_step.py", "finetune_kit/packing/head.py"),  # its head
    "accelerate": ("finetune_kit/training/", "finetune_kit/rl/ppo.py", "finetune_kit/distributed.py"),
    "bm25s": ("finetune_kit/tools/search.py",),
    "huggingface_hub": ("finetune_kit/models/", "finetune_kit/run_folder/", "finetune_kit/runs/hub.py"),
}
HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "trl",
    "peft",
    "accelerate",
    "evaluate",
    "bitsandbytes",
    "numpy",
    "pandas",
)
HEAVY_AT_START = (*HEAVY, "huggingface_hub", "rich.markdown", "rich.progress", "jinja2", "tokenizers", "requests")
# the setting, which only the user may give (settings/checks.py), and its text in the process that loads a run again
SAID_BY_THE_USER = ("False", "model.trust_remote_code", "given['trusted']")
# runs a model's program where the system lets it do nothing, in a process that loads no other module of ours
SHUT_IN = "finetune_kit/tools/sandbox_child.py"
RUNS_STRANGERS_CODE = ("pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal")
FILES = sorted([*(ROOT / "finetune_kit").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(node: ast.AST, package: tuple[str, ...] = ()) -> list[str]:
    """Full names of what an import statement asks for; `package` is where a relative one starts."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join((*package[: len(package) + 1 - node.level], node.module or "")) if node.level else node.module
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those only read by a type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imports(path: Path) -> set[str]:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    return {name for node in nodes(ast.parse(path.read_text())) for name in imported(node, package)}


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("finetune_kit") else f"finetune_kit.{name}"


def own_imports(path: Path) -> set[str]:
    """The modules of this project that a file imports, `from package import module` included."""
    modules = {module_of(file) for file in FILES}
    found = set()
    for name in imports(path):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        if name and name != "finetune_kit":
            found.add(name)
    return found


def level(module: str) -> int:
    parts = module.split(".")[1:]
    names = {parts[0], ".".join(parts[:2])}  # a module may have a level of its own, below its package's
    found = [number for number, heads in enumerate(LEVELS) if names & heads]
    assert found, f"{module} has no level: put it into LEVELS of this test"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_module_imports_a_higher_one(path: Path) -> None:
    module = module_of(path)
    if module == "finetune_kit":
        assert own_imports(path) == set()
        return
    higher = sorted(name for name in own_imports(path) if level(name) > level(module))
    assert higher == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_of(path): own_imports(path) for path in FILES}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert graph == {}


def test_the_circle_test_sees_what_it_should() -> None:
    graph = {module_of(path): own_imports(path) for path in FILES}
    assert {"finetune_kit.cli.options", "finetune_kit.cli.results"} <= graph["finetune_kit.cli.main"]
    assert {"finetune_kit.settings.values", "finetune_kit.errors"} <= graph["finetune_kit.settings.load"]
    assert "finetune_kit.runs.save" in graph["finetune_kit.recipes.lora_sft"]


@pytest.mark.parametrize("library", OWNERS)
def test_a_heavy_library_is_imported_by_its_owner_alone(library: str) -> None:
    users = [name_of(path) for path in FILES if any(name.split(".")[0] == library for name in imports(path))]
    assert [user for user in users if not user.startswith(OWNERS[library])] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_a_recipe(path: Path) -> None:
    assert not {name for name in imports(path) if name.split(".")[0] == "recipes" or "kit.recipes" in name}


@pytest.mark.parametrize("name", recipes.BUILTIN)
def test_a_recipe_imports_no_torch_and_trl_only_inside_run(name: str) -> None:
    tree = ast.parse((ROOT / "recipes" / f"{name}.py").read_text())
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
    everywhere = [name for node in nodes(tree) for name in imported(node)]
    inside = [name for node in nodes(run) for name in imported(node)]
    assert not [name for name in everywhere if name.split(".")[0] in ("torch", "numpy")]
    outside = [name for name in everywhere if name not in inside]
    assert not [name for name in outside if name.split(".")[0] in (*HEAVY, "huggingface_hub")]


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What runs a stranger's code, or could."""
    for node in ast.walk(tree):
        for name in imported(node):
            if name.split(".")[0] in RUNS_STRANGERS_CODE:
                yield f"import of {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "torch.load", "os.system", "os.popen", "np.load", "numpy.load"):
                yield f"{called}()"
            if called.split(".")[0] == "yaml" and called.split(".")[-1] in (
                "load",
                "load_all",
                "unsafe_load",
                "full_load",
            ):
                yield f"{called}()"
            for keyword in node.keywords:
                if (
                    keyword.arg in ("shell", "trust_remote_code", "allow_pickle")
                    and ast.unparse(keyword.value) not in SAID_BY_THE_USER
                ):
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "trust_remote_code"
                    and ast.unparse(value) not in SAID_BY_THE_USER
                ):
                    yield "trust_remote_code in a dict"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\nimport " in node.value:
            yield from forbidden(ast.parse(node.value))  # a script for another process


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_line_reads_a_pickle_or_runs_text_as_code(path: Path) -> None:
    found = sorted(forbidden(ast.parse(path.read_text())))
    assert found == (["compile()", "compile()", "eval()", "exec()"] if name_of(path) == SHUT_IN else [])


def test_nothing_of_ours_imports_what_runs_a_model_s_program() -> None:
    assert not [path for path in FILES if "finetune_kit.tools.sandbox_child" in own_imports(path)]
    assert own_imports(ROOT / SHUT_IN) == set()


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "torch.load('f')",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "exec('1')",
        "run('ls', shell=True)",
        "f(trust_remote_code=x)",
        "f(**{'trust_remote_code': True})",
        "S = '''\nimport pickle\n'''",
    ],
)
def test_the_watch_over_strangers_code_is_awake(line: str) -> None:
    assert len(list(forbidden(ast.parse(line)))) == 1
    assert list(forbidden(ast.parse("model.eval()\nf(trust_remote_code=False)\nyaml.safe_load('a')"))) == []


def test_help_and_list_load_no_heavy_library_and_show_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom finetune_kit.cli.main import main\n"
        "sys.argv = ['finetune_kit', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print('LOADED', *sorted(sys.modules))"
    )
    for words, heavy in ((["--help"], HEAVY_AT_START), (["list"], HEAVY_AT_START), (["show", "lora_sft"], HEAVY)):
        said = python("-c", script, *words, cwd=tmp_path)
        assert said.code == 0, said.err
        loaded = said.out.split("LOADED", 1)[1].split()
        assert "finetune_kit.cli.main" in loaded
        assert sorted(set(heavy) & set(loaded)) == [], words


def test_python_s_own_names_are_not_taken() -> None:
    assert not {path.stem for path in (ROOT / "finetune_kit").glob("*.py")} & set(sys.stdlib_module_names)
