"""Fetch what was pushed to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.run_folder.upload import FILES, answer_of, plain_errors
from finetune_kit.system.network import hub_reachable


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
    with plain_errors(repo_id):
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
            if answer_of(error) is not None:
                raise
            what = f"The Hub cannot be reached, and {repo_id} is neither a local folder nor in the local cache."
            raise ResourceError(what, "Try again with a network.") from None
