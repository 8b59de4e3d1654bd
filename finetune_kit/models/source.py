"""Where a model's files come from, and what went wrong there in plain words."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import FinetuneKitError, ResourceError, SecurityError, SettingsError
from finetune_kit.models import language
from finetune_kit.models.embedded import HUB_ID, embedded_folder
from finetune_kit.models.embedded import NAME as EMBEDDED
from finetune_kit.models.folder import check_model, settings_with
from finetune_kit.models.new import NewModelConfig, is_new, llama_of, with_words
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.system.network import hub_reachable
from finetune_kit.system.parsing import read_object

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)


ITS_OWN = {"local_files_only": True, "trust_remote_code": False}  # a run's folder is never asked for code
TRUST = "model.trust_remote_code=true model.revision=<its commit, 40 digits>, both on the command line"
OFFLINE_DEFAULT = f"Without a network, the embedded default works: model.name_or_path={EMBEDDED}"


def resolve_name(name_or_path: str, weights: bool = False) -> str:
    """What transformers is to load: the embedded model's folder, a local folder, or a Hub id.

    Raises SettingsError for a path that is not there, SecurityError for a folder whose weights are pickles; with
    `weights`, SettingsError for a folder without any: from its shapes a run can be planned, not made.
    """
    if name_or_path == EMBEDDED:
        return str(embedded_folder())
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "an adapter" if (folder / "adapter_config.json").is_file() else "not a model: it has no config.json"
            raise SettingsError(f"model.name_or_path={name_or_path} is {what}.", "Name the folder of a base model.")
        if not any(folder.glob("*.safetensors")):
            pickles = [path.name for path in folder.glob("*.bin")] + [path.name for path in folder.glob("*.pt")]
            if pickles:
                raise SecurityError(
                    f"{name_or_path} has weights only as pickle ({pickles[0]}), which can run code when it is read.",
                    "Get the model as safetensors.",
                )
            if weights:
                raise SettingsError(
                    f"{name_or_path} holds no *.safetensors file.", "Get the model's weights as safetensors."
                )
        return str(folder)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise SettingsError(
            f"model.name_or_path={name_or_path}: no such folder.",
            f"{near_path(name_or_path)}Name it: model.name_or_path=FOLDER, for generate and merge --base FOLDER. "
            + OFFLINE_DEFAULT,
        )
    return name_or_path


def file_of(model: ModelConfig, file: str) -> Path | None:
    """A file beside the model's weights, in its folder or on the Hub; None where it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    name = resolve_name(model.name_or_path)
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=model.revision, local_files_only=not hub_reachable()))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The shapes of the model, without its weights."""
    from transformers import AutoConfig

    if isinstance(model, NewModelConfig) and is_new(model):
        return llama_of(model) if model.config is None else with_words(_like(model, model.config), model)
    with plain_errors(model):
        return AutoConfig.from_pretrained(**source_of(model))


def _like(model: NewModelConfig, name: str) -> PretrainedConfig:
    """The shapes that a new model takes from another one. Errors name the setting that leads there."""
    other = ModelConfig(name_or_path=name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    try:
        return load_model_config(other)
    except FinetuneKitError as error:
        said = (text.replace("model.name_or_path", "model.config") for text in (error.message, error.fix))
        raise type(error)(*said) from None


@functools.cache
def log_once(note: str) -> None:
    """A command may load a model more than once; what its device lacks is news the first time."""
    log.warning(note)


def public_name(name_or_path: str) -> str:
    """The model's name for others: a Hub id or the embedded default as it is, a local folder without its path."""
    folder = Path(name_or_path).expanduser()
    return folder.resolve().name if folder.is_dir() else name_or_path


def hub_name(name_or_path: str) -> str:
    """The name that other tools load the base by: the Hub id of the embedded default, else as `public_name`."""
    return HUB_ID if name_or_path == EMBEDDED else public_name(name_or_path)


def source_of(model: ModelConfig, weights: bool = False) -> dict[str, Any]:
    """Arguments of every from_pretrained: without a network only the local cache is asked, and answers at once."""
    name = resolve_name(model.name_or_path, weights)
    local = Path(name).is_dir() or not hub_reachable()
    if model.revision and Path(name).is_dir():
        message = f"model.revision={model.revision} has no effect: {model.name_or_path} is not from the Hub."
        raise SettingsError(message, "Leave it out.")
    if Path(name).is_dir():
        check_model(Path(name))
    elif cached := cached_folder(name, model.revision):
        check_model(cached, whole=False)
    if model.trust_remote_code:
        log_once(_own_code(name, model.revision, local))
    return {
        "pretrained_model_name_or_path": name,
        "revision": model.revision,
        "local_files_only": local,
        "trust_remote_code": model.trust_remote_code,  # left out, transformers would ask on a terminal
    }


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot of a Hub model in the local cache; None where nothing of it is there yet."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _own_code(name: str, revision: str | None, local: bool) -> str:
    """What model.trust_remote_code lets run, in words. Raises SecurityError where the revision does not pin it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(name).is_dir():
        raise SecurityError(
            f"model.trust_remote_code: {name} is a local folder, whose code no revision pins.",
            "Name the model's Hub id with its revision, or leave it out: transformers knows most architectures.",
        )
    modules: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        try:
            path = hf_hub_download(name, file, revision=revision, local_files_only=local)
        except EntryNotFoundError:
            continue
        named = read_object(Path(path), SettingsError, "Download the model again.").get("auto_map") or {}
        if not isinstance(named, dict):
            raise SecurityError(f"{path}: auto_map is not an object, so the code that would be run is not known.")
        for value in named.values():
            modules.update(str(part) for part in (value if isinstance(value, list) else [value]) if part)
    if elsewhere := sorted(module for module in modules if "--" in module):
        raise SecurityError(
            f"{name} runs code of another repository, which model.revision does not pin: {elsewhere[0]}.",
            "Leave model.trust_remote_code out, or use another model.",
        )
    files = ", ".join(sorted({f"{module.split('.')[0]}.py" for module in modules})) or "none"
    return f"model.trust_remote_code: code of {name} at {revision} is run, starting in: {files}"


@contextmanager
def plain_errors(model: ModelConfig, saved: Path | None = None) -> Iterator[None]:
    """Turns transformers' long answers about a model that it cannot get into one line and the way out."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = model.name_or_path
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if any(isinstance(link, GatedRepoError) for link in chain):
            fix = f"Accept its terms on https://huggingface.co/{name}, then: hf auth login"
            raise ResourceError(f"{name} is gated.", fix) from None
        if any(isinstance(link, RepositoryNotFoundError) for link in chain):
            raise SettingsError(
                f"model.name_or_path={name}: no local folder, and no Hub model that may be read from here.",
                f"Where it is private: hf auth login, or set HF_TOKEN. {OFFLINE_DEFAULT}",
            ) from None
        if any(isinstance(link, LocalEntryNotFoundError) for link in chain) or not hub_reachable():
            message = f"The Hub cannot be reached, and {name} is neither a local folder nor in the local cache."
            raise ResourceError(message, OFFLINE_DEFAULT) from None
        raise SettingsError(f"model.name_or_path={name}: {str(error).splitlines()[0]}", OFFLINE_DEFAULT) from None
    except FinetuneKitError:
        raise
    except (
        Exception
    ) as error:  # what a broken file makes transformers, tokenizers and safetensors raise has no one class
        import torch

        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
            raise
        if "trust_remote_code" in str(error):
            raise SecurityError(
                f"{name} can only be loaded by running code of its own; transformers does not know its architecture.",
                f"Read that code. If you trust it: {TRUST}",
            ) from None
        if "ignore_mismatched_sizes" in str(error):
            raise SettingsError(
                f"model.name_or_path={name}: the shapes in config.json are not those of its weights.", "Get it again."
            ) from None
        said = " ".join(str(error).split())[:200]
        value = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(value, str) and (keys := settings_with(Path(name).expanduser(), value)):
            raise SettingsError(
                f"{Path(name) / 'config.json'}: {' and '.join(keys)} is {value!r}, which transformers does not know.",
                "Download the file again, or use another model.",
            ) from error
        if isinstance(error, ImportError):
            named = re.search(r"pip install ([\w.-]+)", said)
            command = f"pip install {named[1]}" if named else "Install it"
            raise ResourceError(
                f"model.name_or_path={name} needs a package that is not here: {said}", f"{command}, and run this again."
            ) from None
        if (file := (saved or Path(name).expanduser()) / "tokenizer.json").is_file():
            read_object(file, SettingsError, "Download the file again.")
        encoder = isinstance(error, AssertionError) and "is_decoder" in said  # Reformer's
        raise SettingsError(
            f"{saved or f'model.name_or_path={name}'} cannot be loaded: {type(error).__name__}: {said}",
            language.TAKE_ANOTHER if encoder else "Download all of its files again, or use another model.",
        ) from error
