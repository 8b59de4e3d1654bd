"""Begin a run: its folder, with a record of all that its result depends on, and the lines that say what is trained."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.split import FEWEST
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.adapters import covered, is_adapter, parameter_counts
from finetune_kit.run_folder import claim, identity
from finetune_kit.settings.schema import RecipeConfig, leaves
from finetune_kit.system.files import sha256
from finetune_kit.training.progress import console
from finetune_kit.training.steps import steps


def begin(config: RecipeConfig, tokenizer: Any, data: Data, policy: Any) -> Path:
    """Make the run's folder, or continue the unfinished run in it; say what is trained. Returns the folder.

    Call it once the trainer is built, so that settings it refuses leave no folder behind. Raises SettingsError where
    the unfinished run had other settings, data, weights, tokenizer or number of processes, and DataError where nothing
    could be measured.
    """
    check_measurable(config, data)

    def make() -> Path:
        stamps = {**stamps_of(config, tokenizer, data), "processes": distributed.count()}
        differing = identity.new_versions(Path(config.train.output_dir or ""))
        folder = claim.begin(config, data.ledger, stamps)
        if differing:
            console.print(f"note: not as when this run began, so that its numbers may differ: {', '.join(differing)}")
        return folder

    folder = distributed.from_main(make)
    announce(config, policy, data)
    return folder


def check_measurable(config: RecipeConfig, data: Data) -> None:
    """Raises DataError for a run that could not say whether it changed anything: it ends with what it measured."""
    if not len(data.held_out):
        raise DataError(
            "No row is held out, so whether training changes anything could not be measured.",
            f"Hold some out: data.held_out_size={FEWEST}, or give others: data.held_out_path=FILE",
        )
    check_measures(config)


def check_measures(config: RecipeConfig) -> None:
    """Raises SettingsError where no row could tell what training changed: nothing but answers to prompts could."""
    if config.kind == "prompt" and not config.evaluate.size and not config.evaluate.general_text:
        raise SettingsError(
            "With evaluate.size=0 and evaluate.general_text=false nothing is measured: prompts have no held-out loss.",
            f"Set evaluate.size={FEWEST} or more.",
        )


def stamps_of(config: RecipeConfig, tokenizer: Any, data: Data) -> dict[str, Any]:
    """What a run's result depends on beside its settings, as hashes: rows, base model, tokenizer, files it names."""
    from finetune_kit.models.provenance import base_record

    model = base_record(config.model)
    named = {leaf.key: leaf.value for leaf in leaves(config) if not leaf.key.startswith(("data.", "train.", "hub."))}
    named["recipe"] = config.recipe_word
    del named["model.name_or_path"]  # known by its weights
    texts = {key: text for name, value in named.items() for key, text in _texts(name, value)}
    files = {key: _content(path) for key, text in texts.items() if (path := file_of(text)) is not None}
    return {
        "data": data.ledger.fingerprint,
        "model": {"weights": model["weights"], "config": model["config"], "revision": model["revision"]},
        "tokenizer": _tokenizer_hash(tokenizer),
        "files": files,
    }


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every text in a setting's value, lists and mappings at any depth, with its place: reward.sources[0]."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(f"{name}.{key}", key) if isinstance(key, str) else ()
            yield from _texts(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for at, item in enumerate(value):
            yield from _texts(f"{name}[{at}]", item)


def file_of(text: str) -> Path | None:
    """The file or folder that a setting's text names, file.py:function too; None where there is none."""
    path, colon, _ = text.rpartition(":")
    for named in (text, path if colon and path.endswith(".py") else ""):
        try:
            if named and ((found := Path(named).expanduser()).is_file() or found.is_dir()):
                return found
        except (OSError, ValueError, RuntimeError):  # a text that can be no path: too long, with a NUL, ~nobody
            continue
    return None


def _content(path: Path) -> str:
    """SHA-256 of a file, of a Python file with the modules beside it that it imports, or of the weights and settings
    in a folder."""
    if path.is_dir():
        names = sorted(file for end in ("*.safetensors", "*config.json") for file in path.glob(end) if file.is_file())
    else:
        names = sorted(_with_imports(path)) if path.suffix == ".py" else [path]
    return hashlib.sha256("".join(f"{file.name} {sha256(file)} " for file in names).encode()).hexdigest()


def _with_imports(path: Path) -> set[Path]:
    """A Python file, and the files beside it that it imports, and what those import; read, not run."""
    found, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # whoever runs it says so
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{name}" if node.module else name for name in names)]
            places = [(folder, name.split(".")) for name in names if name for folder in {path.parent, file.parent}]
            for folder, words in places:
                inner, first = folder.joinpath(*words), folder / words[0]
                candidates = (Path(f"{inner}.py"), inner / "__init__.py", Path(f"{first}.py"), first / "__init__.py")
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    return found


def _tokenizer_hash(tokenizer: Any) -> str:
    """Of vocabulary, rules, special tokens and chat template; not of how it happens to pad."""
    rules = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if getattr(tokenizer, "is_fast", False):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("padding", None)
        rules.pop("truncation", None)
    known = [
        rules,
        str(tokenizer.chat_template),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def announce(config: RecipeConfig, policy: Any, data: Data) -> None:
    """Say what is about to be trained, on what, and what the ledger noted."""
    trained, total = parameter_counts(policy)
    planned = steps(config, data, distributed.count())
    console.print(rows_in_words(data))
    budget = config.train.max_tokens_per_batch
    samples = config.num_generations is not None or config.batch_size is not None
    counted = f"{planned['rows_in_a_step']} {'completions' if samples else 'rows'}"
    step = "updates" if config.batch_size is not None else "steps"
    cut = f" in {planned['passes_in_a_step']} passes of at most {budget:,} tokens" if budget else ""
    console.print(
        f"{trained:,} of {total:,} parameters trained, {planned['steps']} {step} of {counted}{cut}, "
        f"on {distributed.where(policy)}"
    )
    if is_adapter(policy):
        for line in covered(policy).in_words():
            console.print(line, markup=False)
    for note in data.ledger.notes:
        console.print(f"note: {note}", markup=False)


def rows_in_words(data: Data) -> str:
    """How many rows are trained on and held out, and how many of their tokens."""
    counts = data.ledger.train
    rows = "prompts" if data.kind == "prompt" else "rows"
    tokens = f"{counts.supervised_tokens:,} of {counts.tokens:,} tokens are trained on"
    return (
        f"{counts.rows:,} training {rows} ({counts.truncated} truncated, {counts.lost} dropped), "
        f"{len(data.held_out):,} held out; {f'{counts.tokens:,} tokens' if data.kind == 'prompt' else tokens}"
    )
