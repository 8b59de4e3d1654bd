"""Push a run or a model to the Hugging Face Hub, and fetch one that was pushed.

The one place from which anything leaves the machine. What may leave is named by FILES; whatever else a folder holds
(checkpoints, the state of the trainer, pickles, logs) stays. The token is the client's own (HF_TOKEN or `hf auth
login`): no setting takes it and no file gets it.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_kit import values
from finetune_kit.artifact import is_here, without_paths
from finetune_kit.config import HubConfig, RecipeConfig, is_hub_name, leaves, to_yaml
from finetune_kit.errors import FinetuneKitError, ResourceError, SecurityError, SettingsError
from finetune_kit.evaluation.intervals import spread_of
from finetune_kit.model.folder import check_files
from finetune_kit.model.load import hub_name
from finetune_kit.network import hub_reachable
from finetune_kit.parsing import read_object
from finetune_kit.run_folder import versions

WEIGHTS = (
    *("adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "config.json", "generation_config.json"),
)
FILES = (
    *WEIGHTS,
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
    *("base.json", "ancestry.json", "merge.json", "run.yaml", "report.json", "report.html", "README.md"),
)
TEXTS = (".json", ".yaml", ".html", ".md", ".jinja", ".txt")
TRIES = 3  # of the calls that the Hub's client does not repeat by itself
PASSING = (409, 429, 500, 502, 503, 504)  # answers that another try may change
TOKENS = "https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Push:
    """What is to be sent where. `files`: {path in the repository: a file, or the bytes to send in its place}."""

    folder: Path
    repo_id: str
    files: dict[str, Path | bytes]
    private: bool = True
    revision: str | None = None
    left: list[str] = field(default_factory=list)  # names in the folder that stay
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What is sent and what stays, for people."""
        seen = "private" if self.private else "PUBLIC"
        sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in self.files.items()}
        width = max(map(len, sizes))
        return [
            f"To {self.repo_id} ({seen}{f', branch {self.revision}' if self.revision else ''}):",
            *(f"  {name:<{width}}  {_size(size)}" for name, size in sizes.items()),
            *([f"Stays here: {', '.join(self.left)}"] if self.left else []),
            *self.notes,
        ]

    def command(self) -> str:
        """The command that sends the same."""
        public = [] if self.private else ["--public"]
        branch = ["--revision", self.revision] if self.revision else []
        words = ["push", str(self.folder), self.repo_id, *public, *branch, "--yes"]
        return f"python -m finetune_kit {shlex.join(words)}"


def prepare(
    folder: Path, repo_id: str, config: RecipeConfig | None, *, private: bool = True, revision: str | None = None
) -> Push:
    """What a push of `folder` would send; nothing is sent and nothing in the folder changes.

    `config`: the run's settings; None for a merged model, which has no run.yaml. Raises SettingsError (no weights, no
    repository's name, a card whose metadata are not the Hub's), SecurityError (a token or a local path in a file).
    """
    if not is_hub_name(repo_id):
        raise SettingsError(f"{repo_id} is no repository of the Hub: expected user/name.")
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder.", "A run is made by: python -m finetune_kit run RECIPE")
    check_files(folder)  # a link in a folder that others made would send a file of this machine
    names = sorted(path.name for path in folder.iterdir())
    sent = [name for name in names if _is_listed(name, FILES) and (folder / name).is_file()]
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
    _refuse_leaks(push, config)
    return push


def check_access(repo_id: str, private: bool = True) -> None:
    """That the Hub is there, knows the token, and lets it write to `repo_id`; made before anything takes long.

    Raises ResourceError with the next step, SettingsError where the repository is public and `private` was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if not hub_reachable():
        raise ResourceError(
            f"The Hub cannot be reached, so {repo_id} cannot be pushed to.", "Leave out hub.push, and push later."
        )
    with _said_plainly(repo_id):
        who = HfApi().whoami()
        _check_rights(who, repo_id)
        try:
            public = HfApi().repo_info(repo_id).private is False
        except RepositoryNotFoundError:
            return
    if public and private:
        raise SettingsError(
            f"{repo_id} is there already, and public; a private push was asked for.",
            "Take another name, or say that it is meant: --public (hub.private=false)",
        )


def _check_rights(who: dict[str, Any], repo_id: str) -> None:
    """From the Hub's answer to whoami; what it does not tell is left to the Hub to refuse."""
    owner, write = repo_id.split("/")[0], f"Make one that may write to it: {TOKENS}   then: hf auth login"
    token = who.get("auth", {}).get("accessToken", {})
    role = token.get("role")
    scopes = token.get("fineGrained", {}).get("scoped", [])
    scoped = {
        right for scope in scopes if scope["entity"].get("name") in (owner, repo_id) for right in scope["permissions"]
    }
    if role == "read" or (role == "fineGrained" and "repo.write" not in scoped):
        raise ResourceError(f"The token of {who.get('name')} may not write to {repo_id}.", write)
    groups = {group["name"]: group.get("roleInOrg") for group in who.get("orgs", [])}
    if owner != who.get("name") and (owner not in groups or groups[owner] == "read"):
        own = f"Push to {who.get('name')}/{repo_id.split('/')[1]}, or log in as another user: hf auth login"
        raise ResourceError(f"{who.get('name')} may not write to {owner} on the Hub.", own)


def send(push: Push, message: str | None = None) -> str:
    """Send what `prepare` gave, as one commit; returns the address of the repository.

    The repository is made where it is not there. What of FILES an earlier push left and this one has not is deleted.
    Raises ResourceError with the command to go on: what has arrived by then is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id, branch = HfApi(), push.repo_id, push.revision
    with _said_plainly(repo_id, push):
        address = _patiently(lambda: api.create_repo(repo_id, private=push.private, exist_ok=True))
        if branch and branch != "main":
            _patiently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        there = _patiently(lambda: api.list_repo_files(repo_id, revision=branch))
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in push.files.items()
        ]
        gone = [name for name in there if _is_listed(name, FILES) and name not in push.files]
        operations += [CommitOperationDelete(name) for name in gone]
        said = message or f"Push {push.folder.resolve().name}"
        _patiently(lambda: api.create_commit(repo_id, operations, commit_message=said, revision=branch))
    return str(address)


def push_run(folder: Path, config: RecipeConfig, message: str | None = None) -> str:
    """Push a finished run as its hub section says; returns the address."""
    hub = config.hub
    return send(prepare(folder, hub.model_id or "", config, private=hub.private), message)


def push_checkpoint(config: RecipeConfig, checkpoint: Path) -> str:
    """Push a checkpoint's weights into the folder of its name; returns "" or why it could not be done. A run does not
    end because of it."""
    from huggingface_hub import CommitOperationAdd, HfApi

    repo_id, api = config.hub.model_id or "", HfApi()
    files: dict[str, Path | bytes] = {
        f"{checkpoint.name}/{path.name}": path
        for path in sorted(checkpoint.iterdir())
        if _is_listed(path.name, WEIGHTS)
    }
    adapter = f"{checkpoint.name}/adapter_config.json"
    if adapter in files:
        content = read_object(checkpoint / "adapter_config.json")
        content["base_model_name_or_path"] = hub_name(config.model.name_or_path)  # PEFT writes the whole path
        files[adapter] = json.dumps(content, indent=2).encode()
    try:
        _refuse_leaks(Push(checkpoint, repo_id, files), config)
        with _said_plainly(repo_id):
            _patiently(lambda: api.create_repo(repo_id, private=config.hub.private, exist_ok=True))
            operations = [
                CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in files.items()
            ]
            _patiently(lambda: api.create_commit(repo_id, operations, commit_message=f"Push {checkpoint.name}"))
    except FinetuneKitError as error:
        return error.message
    return ""


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


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The folder with the FILES of a pushed run, in the Hub's cache. Raises ResourceError, SettingsError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted: dict[str, Any] = {"allow_patterns": list(FILES), "local_files_only": not hub_reachable()}
    with _said_plainly(repo_id):
        try:
            return Path(snapshot_download(repo_id, revision=revision, **wanted))
        except GatedRepoError:
            fix = f"Accept its terms on https://huggingface.co/{repo_id}, then: hf auth login"
            raise ResourceError(f"{repo_id} is gated.", fix) from None
        except RevisionNotFoundError:
            raise SettingsError(f"{repo_id} has no revision {revision}.", "Give a branch, tag or commit.") from None
        except RepositoryNotFoundError:
            raise ResourceError(
                f"{repo_id}: no such folder here, and no repository on the Hub that this token may read.",
                "Where it is private: hf auth login, or set HF_TOKEN.",
            ) from None
        except LocalEntryNotFoundError as error:
            if _answer(error) is not None:
                raise
            what = f"The Hub cannot be reached, and {repo_id} is neither a local folder nor in the local cache."
            raise ResourceError(what, "Try again with a network.") from None


def _is_listed(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count:,} bytes"


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
            raise SettingsError(f"{path} is no run's report: its metrics are not whole.") from None
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


def _refuse_leaks(push: Push, config: RecipeConfig | None) -> None:
    """Raises SecurityError for a text that holds the token, or a place on this machine that the run knows of."""
    from huggingface_hub import get_token

    places = {str(path) for path in (Path.home(), Path.cwd(), push.folder.resolve()) if len(path.parts) > 2}
    for leaf in leaves(config) if config is not None else ():
        for value in leaf.value if isinstance(leaf.value, list) else [leaf.value]:
            if isinstance(value, str) and re.match(r"~?/.*/", value):
                places |= {value, str(Path(value).expanduser().resolve())}
    secrets = {token: "your token" for token in [get_token()] if token}
    for name, content in push.files.items():
        if not name.endswith(TEXTS):
            continue
        text = content.decode() if isinstance(content, bytes) else content.read_text(encoding="utf-8", errors="replace")
        for secret, what in {**{place: place for place in places}, **secrets}.items():
            if secret in text:
                raise SecurityError(
                    f"{push.folder / name} holds {what}, which would be sent to {push.repo_id}. Nothing was sent.",
                    "Take it out of the file, and push again.",
                )


def _patiently(call: Any) -> Any:
    """The result of `call`, tried again where the Hub was busy or the line was cut."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            answer = _answer(error)
            passing = answer.status_code in PASSING if answer is not None else _is_cut(error)
            if attempt == TRIES or not passing:
                raise
            time.sleep(2 ** (attempt - 1))


def _links(error: BaseException) -> list[BaseException]:
    """An error and all that caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _answer(error: BaseException) -> Any:
    """The Hub's answer behind an error; None where none came."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((link.response for link in _links(error) if isinstance(link, HfHubHTTPError)), None)


def _is_cut(error: BaseException) -> bool:
    """Whether the connection broke: any error of the client's HTTP library but an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library, whichever the client uses
    return any(isinstance(link, http_error | ConnectionError) for link in _links(error))


@contextmanager
def _said_plainly(repo_id: str, push: Push | None = None) -> Iterator[None]:
    """Turns what the Hub's client raises into what it means and the next step; with `push`, the command to go on."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library, whichever the client uses
    go_on = f"{push.folder} is whole. What has arrived is not sent again. Go on: {push.command()}" if push else ""
    try:
        yield
    except FinetuneKitError:
        raise
    except LocalTokenNotFoundError:
        raise ResourceError(
            f"There is no token of the Hub here, and {repo_id} needs one that may write.",
            f"Make one: {TOKENS}   then: hf auth login, or set HF_TOKEN",
        ) from None
    except (http_error, OSError, RuntimeError, ValueError) as error:
        answer = _answer(error)
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        said = said.replace(get_token() or "\0", "…")
        if answer is None:
            raise ResourceError(f"{repo_id}: the Hub stopped answering: {said}", go_on or "Try again later.") from None
        code = answer.status_code
        if code == 401:
            what = "The Hub does not know this token."
            fix = f"Make a new one: {TOKENS}   then: hf auth login --force, or set HF_TOKEN"
        elif code == 403:
            what, fix = f"The Hub does not let this token write to {repo_id}.", f"Look at its rights: {TOKENS}"
        else:
            what, fix = f"{repo_id}: the Hub answers {code}: {said}", "" if go_on else "Try again later."
        raise ResourceError(what, "\n".join(filter(None, [fix, go_on]))) from None
