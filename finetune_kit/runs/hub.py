"""Push a run or a model to the Hugging Face Hub, and fetch one that was pushed.

The one place from which anything leaves the machine. What may leave is named by FILES; whatever else a folder holds
(checkpoints, the state of the trainer, pickles, logs) stays. The token is the client's own (HF_TOKEN or `hf auth
login`): no setting takes it and no file gets it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from finetune_kit.errors import SettingsError
from finetune_kit.evaluation.intervals import spread_of
from finetune_kit.models.folder import check_files
from finetune_kit.run_folder.fetch import fetch
from finetune_kit.run_folder.identity import versions
from finetune_kit.run_folder.upload import FILES, Push, is_listed, refuse_leaks, send
from finetune_kit.runs.redact import is_here, without_paths
from finetune_kit.settings import values
from finetune_kit.settings.checks import is_hub_name
from finetune_kit.settings.load import to_yaml
from finetune_kit.settings.schema import HubConfig, RecipeConfig
from finetune_kit.system.parsing import read_object


def prepare(
    folder: Path, repo_id: str, config: RecipeConfig | None, *, private: bool = True, revision: str | None = None
) -> Push:
    """What a push of `folder` would send; nothing is sent and nothing in the folder changes.

    `config`: the run's settings; None for a merged model, which has no run.yaml. Raises SettingsError (no weights, no
    repository's name, a card whose metadata are not the Hub's), SecurityError (a token or a local path in a file).
    """
    if not is_hub_name(repo_id):
        raise SettingsError(f"{repo_id} is not a repository of the Hub: expected user/name.")
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder.", "A run is made by: python -m finetune_kit run RECIPE")
    check_files(folder)  # a link in a folder that others made would send a file of this machine
    names = sorted(path.name for path in folder.iterdir())
    sent = [name for name in names if is_listed(name, FILES) and (folder / name).is_file()]
    if not any(name.endswith(".safetensors") for name in sent):
        raise SettingsError(f"{folder} holds no weights to push (*.safetensors).", "Was its run finished?")
    files: dict[str, Path | bytes] = {name: folder / name for name in sent}
    notes: list[str] = []
    if config is not None and "run.yaml" in files:
        files["run.yaml"] = to_yaml(_shareable(config), versions()).encode()
    if "README.md" in files:
        files["README.md"] = _card(folder, repo_id, config, notes).encode()
    left = [name + "/" * (folder / name).is_dir() for name in names if name not in files]
    push = Push(folder, repo_id, files, private, revision, left, notes)
    refuse_leaks(push, config)
    return push


def push_run(folder: Path, config: RecipeConfig, message: str | None = None) -> str:
    """Push a finished run as its hub section says; returns the address."""
    hub = config.hub
    return send(prepare(folder, hub.model_id or "", config, private=hub.private), message)


def folder_of(word: str, revision: str | None = None) -> Path:
    """A local folder as it is; a user/name that is none is fetched from the Hub, or found in its cache.

    Raises SettingsError for a revision of a local folder.
    """
    local = Path(word).expanduser()
    if local.exists() or not is_hub_name(word) or (local.parent.is_dir() and revision is None):
        if revision is not None:
            raise SettingsError(f"--revision has no effect: {word} is not from the Hub.", "Leave it out.")
        return local
    return fetch(word, revision)


def _shareable(config: RecipeConfig) -> RecipeConfig:
    """The settings of run.yaml for others: local folders and files as ./name, so that nobody takes them for a Hub id;
    and a run of it must not push."""
    shown = without_paths(config)
    shown.hub = HubConfig()
    shown.origins = {key: origin for key, origin in shown.origins.items() if not key.startswith("hub.")}
    shown.model.name_or_path = _as_local(config.model.name_or_path)
    sources = config.data.path
    shown.data.path = _as_local(sources) if isinstance(sources, str) else [_as_local(path) for path in sources]
    shown.data.held_out_path = config.data.held_out_path and _as_local(config.data.held_out_path)
    shown.evaluate.reward_model = config.evaluate.reward_model and _as_local(config.evaluate.reward_model)
    return shown


def _as_local(path: str) -> str:
    return f"./{Path(path).expanduser().resolve().name}" if _is_local(path) else path


def _is_local(path: str) -> bool:
    """Whether a setting means a place on this machine, whether or not it is still there."""
    return is_here(path) or path.startswith(("/", "./", "../", "~"))


def _card(folder: Path, repo_id: str, config: RecipeConfig | None, notes: list[str]) -> str:
    """The folder's README.md with its metadata completed, and read back by the Hub's own classes."""
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    text = (folder / "README.md").read_text(encoding="utf-8")
    if len(parts := text.split("---\n", 2)) == 3 and not parts[0].strip():
        values.load_text(parts[1], str(folder / "README.md"))  # small enough to be read by the Hub's client
    try:
        card = ModelCard(text)
        metadata: dict[str, Any] = card.data.to_dict()  # type: ignore[no-untyped-call]
        if "base_model" in metadata:
            adapter = (folder / "adapter_config.json").is_file()
            metadata.setdefault("base_model_relation", "adapter" if adapter else "finetune")
        else:
            base = without_paths(config).model.name_or_path if config else "its base"
            notes.append(f"The card names no base_model: {base} is not a model of the Hub.")
        if config is not None:
            listed = [config.data.path] if isinstance(config.data.path, str) else config.data.path
            datasets = [path for path in listed if _is_data_set(path)]
            if datasets:
                metadata["datasets"] = datasets
            results = _results(folder, config, metadata.get("pipeline_tag", "text-generation"))
            if results:
                metadata.pop("model-index", None)
                metadata |= {"eval_results": results, "model_name": repo_id.split("/")[1]}
        completed = f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{card.text.lstrip(chr(10))}"
        ModelCard(completed)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise SettingsError(f"{folder / 'README.md'}: the Hub will not take its metadata: {error}") from None
    return completed


def _is_data_set(path: str) -> bool:
    """Whether data came from the Hub, not from a file, a folder or a generator."""
    return is_hub_name(path) and not path.startswith("reasoning_gym/") and not _is_local(path)


def _results(folder: Path, config: RecipeConfig, task: str) -> list[Any]:
    """The report's metrics as the Hub's model-index: the value after training; before and the interval in its name."""
    from huggingface_hub import EvalResult

    if not (folder / "report.json").is_file():
        return []
    shown = without_paths(config).data
    sources = shown.held_out_path or shown.path
    data = sources if isinstance(sources, str) else ", ".join(sources)
    results = []
    path = folder / "report.json"
    for metric in read_object(path).get("metrics", []):
        try:
            if not math.isfinite(metric["after"]):
                continue
            spread = f"95 % interval {spread_of(metric, decimals=4)}"
            change = f"before {metric['before']:.4f}, change {metric['difference']:+.4f}, {spread}, n = {metric['n']}"
        except (TypeError, KeyError, ValueError, AttributeError, IndexError):
            raise SettingsError(f"{path} is not a run's report: its metrics are not whole.") from None
        results.append(
            EvalResult(
                task_type=task,
                dataset_type=data,
                dataset_name=f"{data}, held-out rows",
                dataset_revision=shown.revision,
                metric_type=metric["name"],
                metric_name=f"{metric['name']} ({change})",
                metric_value=round(metric["after"], 6),
            )
        )
    return results
