"""Which base an adapter belongs to: name, revision, architecture, weights; and the base's licence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import FinetuneKitError, SettingsError
from finetune_kit.models.embedded import LICENSE as EMBEDDED_LICENSE
from finetune_kit.models.embedded import NAME as EMBEDDED
from finetune_kit.models.new import is_new
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.settings.values import LARGEST, load_text
from finetune_kit.system.network import hub_reachable
from finetune_kit.system.parsing import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig
from finetune_kit.models.source import cached_folder, load_model_config, public_name, resolve_name

BASE_RECORD = "base.json"  # beside an adapter: which base it belongs to


def base_record(model: ModelConfig) -> dict[str, Any]:
    """What an adapter remembers of its base: name, revision, the settings of its architecture, and its weights' hash.

    To be taken while the base is at hand: the weights are those of the local folder or cache.
    """
    config = load_model_config(model)
    return {
        "name": public_name(model.name_or_path),
        "revision": _commit(model) or model.revision,
        "config": _architecture(config),
        "weights": _weights_hash(model),
    }


def _commit(model: ModelConfig) -> str | None:
    """The commit that a model of the Hub was loaded from, which is its folder's name in the cache."""
    if is_new(model):
        return None
    name = resolve_name(model.name_or_path)
    found = None if Path(name).is_dir() else cached_folder(name, model.revision)
    return found.name if found else None


def check_base(model: ModelConfig, folder: Path) -> None:
    """Raises SettingsError where `folder` holds an adapter of another base; one without base.json is trusted."""
    from transformers import AutoConfig

    if not (folder / BASE_RECORD).is_file():
        return
    path = folder / BASE_RECORD
    then = read_object(path)
    try:
        # through this transformers' own class, so that a default which a release adds is on both sides
        known = _architecture(AutoConfig.for_model(**_with_infinities(then["config"])))
        if not {"name", "revision", "weights"} <= then.keys():
            raise KeyError("name, revision or weights")
    except Exception as error:  # what such a class makes of settings that are none has no one class
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise SettingsError(
            f"{path} does not say which base the adapter belongs to: {what}.",
            "Download the folder again; without base.json the adapter is tried on the base that you name.",
        ) from None
    now = base_record(model)
    keys = [key for key in sorted(known.keys() | now["config"]) if known.get(key) != now["config"].get(key)]
    differing = [f"{key} {known.get(key)} → {now['config'].get(key)}" for key in keys[:3]]
    if not keys and None not in (then["weights"], now["weights"]) and then["weights"] != now["weights"]:
        differing = ["the same shapes, other weights"]
    if differing:
        was, found = (f"{side['name']} (revision {side['revision'] or 'not known'})" for side in (then, now))
        raise SettingsError(
            f"{folder} is an adapter of {was}; {found} is another model: {', '.join(differing)}.",
            "Name the base that it was trained on, in its run.yaml: model.name_or_path and model.revision.",
        )


def _with_infinities(values: Any) -> Any:
    """Numbers that JSON lacks, which transformers writes as {"__float__": "Infinity"}, as such again."""
    if isinstance(values, dict):
        if values.keys() == {"__float__"}:
            return float(values["__float__"])
        return {key: _with_infinities(value) for key, value in values.items()}
    return [_with_infinities(value) for value in values] if isinstance(values, list) else values


def _architecture(config: PretrainedConfig) -> dict[str, Any]:
    """The model's settings without those that leave its outputs as they are."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    idle = {"transformers_version", "_name_or_path", "dtype", "use_cache", "architectures", "quantization_config"}
    return {key: value for key, value in settings.items() if key not in idle and not key.endswith("_token_id")}


def weights_stamp(model: ModelConfig) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of every weights file at hand: equal for files that nobody touched."""
    files = [path for path in _weight_files(model) if path.is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _weight_files(model: ModelConfig) -> list[Path]:
    """The model's weights in its folder or in the cache, where they are."""
    if is_new(model):
        return []
    name = resolve_name(model.name_or_path)
    folder = Path(name) if Path(name).is_dir() else cached_folder(name, model.revision) or Path(name)
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file():
        listed = (
            read_object(index, SettingsError, "Download the model again.").get("weight_map") if index.is_file() else {}
        )
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise SettingsError(f"{index}: expected a weight_map of file names.", "Download the model again.")
        files = [folder / file for file in sorted(set(listed.values()))]
    return files


def _weights_hash(model: ModelConfig) -> str | None:
    """SHA-256 of every tensor's name, shape and first row: files of many gigabytes in a moment. None without files."""
    from safetensors import safe_open

    rows = {}
    for path in _weight_files(model):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is not a dict
                part = file.get_slice(key)
                shape = part.get_shape()
                first = part[:1] if shape else file.get_tensor(key)
                rows[key] = (str(shape), first.float().numpy().tobytes())
    if not rows:
        return None
    digest = hashlib.sha256()
    for key, (shape, content) in sorted(rows.items()):
        digest.update(f"{key} {shape}".encode() + content)
    return digest.hexdigest()


def base_license(model: ModelConfig) -> str | None:
    """The licence that the base model's own card states; None where there is no card to read."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if model.name_or_path == EMBEDDED:
        return EMBEDDED_LICENSE
    if is_new(model):
        return None
    card = Path(model.name_or_path).expanduser() / "README.md"
    if not card.parent.is_dir():
        where: dict[str, Any] = {"revision": model.revision, "local_files_only": not hub_reachable()}
        try:
            card = Path(hf_hub_download(model.name_or_path, "README.md", **where))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return None
    if not card.is_file():
        return None
    with card.open("rb") as file:
        parts = file.read(2 * LARGEST).decode("utf-8", errors="replace").split("---\n", 2)
    try:
        metadata = load_text(parts[1], str(card)) if len(parts) == 3 and not parts[0].strip() else {}
    except FinetuneKitError:  # a card is not part of the model: one that cannot be read states nothing
        return None
    stated = metadata.get("license")
    return stated if isinstance(stated, str) else None
