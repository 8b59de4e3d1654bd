"""Send files to the Hugging Face Hub: only what is listed, without secrets, patiently, with errors in plain words."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_kit.errors import FinetuneKitError, ResourceError, SecurityError, SettingsError
from finetune_kit.settings.schema import RecipeConfig, leaves
from finetune_kit.system.network import hub_reachable
from finetune_kit.system.parsing import read_object

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
    with plain_errors(repo_id):
        who = HfApi().whoami()
        _check_rights(who, repo_id)
        try:
            public = HfApi().repo_info(repo_id).private is False
        except RepositoryNotFoundError:
            return
    if public and private:
        raise SettingsError(
            f"{repo_id} is there already, and public; a private push was asked for.",
            "Use another name, or say that it is meant: --public (hub.private=false)",
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
    Raises ResourceError with the command to continue: what has arrived by then is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, repo_id, branch = HfApi(), push.repo_id, push.revision
    with plain_errors(repo_id, push):
        address = _patiently(lambda: api.create_repo(repo_id, private=push.private, exist_ok=True))
        if branch and branch != "main":
            _patiently(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        there = _patiently(lambda: api.list_repo_files(repo_id, revision=branch))
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in push.files.items()
        ]
        gone = [name for name in there if is_listed(name, FILES) and name not in push.files]
        operations += [CommitOperationDelete(name) for name in gone]
        said = message or f"Push {push.folder.resolve().name}"
        _patiently(lambda: api.create_commit(repo_id, operations, commit_message=said, revision=branch))
    return str(address)


def push_checkpoint(config: RecipeConfig, checkpoint: Path, base: str) -> str:
    """Push a checkpoint's weights into the folder of its name; returns "" or why it could not be done. A run does not
    end because of it. `base`: the name that others load the base by."""
    from huggingface_hub import CommitOperationAdd, HfApi

    repo_id, api = config.hub.model_id or "", HfApi()
    files: dict[str, Path | bytes] = {
        f"{checkpoint.name}/{path.name}": path for path in sorted(checkpoint.iterdir()) if is_listed(path.name, WEIGHTS)
    }
    adapter = f"{checkpoint.name}/adapter_config.json"
    if adapter in files:
        content = read_object(checkpoint / "adapter_config.json")
        content["base_model_name_or_path"] = base  # PEFT writes the whole path
        files[adapter] = json.dumps(content, indent=2).encode()
    try:
        refuse_leaks(Push(checkpoint, repo_id, files), config)
        with plain_errors(repo_id):
            _patiently(lambda: api.create_repo(repo_id, private=config.hub.private, exist_ok=True))
            operations = [
                CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in files.items()
            ]
            _patiently(lambda: api.create_commit(repo_id, operations, commit_message=f"Push {checkpoint.name}"))
    except FinetuneKitError as error:
        return error.message
    return ""


def is_listed(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count:,} bytes"


def refuse_leaks(push: Push, config: RecipeConfig | None) -> None:
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
                    "Remove it from the file, and push again.",
                )


def _patiently(call: Any) -> Any:
    """The result of `call`, tried again where the Hub was busy or the line was cut."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            answer = answer_of(error)
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


def answer_of(error: BaseException) -> Any:
    """The Hub's answer behind an error; None where none came."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((link.response for link in _links(error) if isinstance(link, HfHubHTTPError)), None)


def _is_cut(error: BaseException) -> bool:
    """Whether the connection broke: any error of the client's HTTP library but an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library, whichever the client uses
    return any(isinstance(link, http_error | ConnectionError) for link in _links(error))


@contextmanager
def plain_errors(repo_id: str, push: Push | None = None) -> Iterator[None]:
    """Turns what the Hub's client raises into what it means and the next step; with `push`, the command to continue."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    http_error: Any = HfHubHTTPError.__mro__[1]  # of the HTTP library, whichever the client uses
    go_on = f"{push.folder} is whole. What has arrived is not sent again. Continue: {push.command()}" if push else ""
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
        answer = answer_of(error)
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
