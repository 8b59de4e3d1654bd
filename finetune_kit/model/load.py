"""Tokenizer and policy, from the embedded default, a local folder or the Hub. Safetensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.config import LoraConfig, ModelConfig
from finetune_kit.errors import ResourceError, SecurityError, SettingsError
from finetune_kit.model import adapters
from finetune_kit.model.embedded import LICENSE as EMBEDDED_LICENSE
from finetune_kit.model.embedded import NAME as EMBEDDED
from finetune_kit.model.embedded import embedded_folder
from finetune_kit.network import hub_reachable

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OFFLINE_DEFAULT = f"Without a network, the embedded default works: model.name_or_path={EMBEDDED}"


def resolve_name(name_or_path: str) -> str:
    """What transformers is to load: the embedded model's folder, a local folder, or a Hub id.

    Raises SettingsError for a path that is not there, SecurityError for a folder whose weights are pickles.
    """
    if name_or_path == EMBEDDED:
        return str(embedded_folder())
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "an adapter" if (folder / "adapter_config.json").is_file() else "no model: it has no config.json"
            raise SettingsError(f"model.name_or_path={name_or_path} is {what}.", "Name the folder of a base model.")
        if not any(folder.glob("*.safetensors")):
            pickles = [path.name for path in folder.glob("*.bin")] + [path.name for path in folder.glob("*.pt")]
            if pickles:
                raise SecurityError(
                    f"{name_or_path} has weights only as pickle ({pickles[0]}), which can run code when it is read.",
                    "Get the model as safetensors.",
                )
            raise SettingsError(
                f"{name_or_path} holds no *.safetensors file.", "Get the model's weights as safetensors."
            )
        return str(folder)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise SettingsError(f"model.name_or_path={name_or_path}: no such folder.", OFFLINE_DEFAULT)
    return name_or_path


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padded on the right, with a pad token that ends nothing where the vocabulary has one."""
    from transformers import AutoTokenizer

    with _said_plainly(model):
        tokenizer = AutoTokenizer.from_pretrained(**_from(model))
    if tokenizer.eos_token is None:
        raise SettingsError(f"The tokenizer of {model.name_or_path} has no end token.", "Set eos_token in its config.")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        spare = [token for token in tokenizer.all_special_tokens if token not in taken]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The shapes of the model, without its weights."""
    from transformers import AutoConfig

    with _said_plainly(model):
        return AutoConfig.from_pretrained(**_from(model))


def weight_dtype(model: ModelConfig, trained_in_full: bool) -> torch.dtype:
    """float32 for weights that are trained; bfloat16 for frozen ones where the device computes in it."""
    import torch

    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        if trained_in_full and dtype != torch.float32:
            raise SettingsError(
                f"model.dtype={model.dtype}: weights that are trained need float32, or small updates round to nothing.",
                "Leave it out: on a GPU the arithmetic is done in bfloat16 all the same. Or train an adapter: lora_sft",
            )
        return dtype
    return torch.bfloat16 if computes_in_bfloat16() and not trained_in_full else torch.float32


def computes_in_bfloat16() -> bool:
    """True on a GPU with bfloat16 units. On a CPU without them bfloat16 is eight times slower than float32."""
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device() -> torch.device:
    """CUDA, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_base(model: ModelConfig, trained_in_full: bool = False) -> PreTrainedModel:
    """The causal language model on its device, in evaluation mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _said_plainly(model):
        base = AutoModelForCausalLM.from_pretrained(
            **_from(model),
            dtype=weight_dtype(model, trained_in_full),
            attn_implementation=model.attn_implementation,
            use_safetensors=True,
        )
    return base.to(device()).eval()


def load_policy(
    model: ModelConfig, lora: LoraConfig | None = None, *, trained_in_full: bool = False, seed: int = 0
) -> Any:
    """The model to train: with an adapter where `lora` is given, else in full."""
    from transformers import set_seed

    base = load_base(model, trained_in_full)
    if lora is None:
        return base
    set_seed(seed)  # the adapter's A starts at random
    return adapters.attach(base, lora)


def empty_policy(model: ModelConfig, lora: LoraConfig | None, trained_in_full: bool) -> Any:
    """The policy's shapes and types without weights (torch's meta device), to count before anything is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(load_model_config(model), dtype=weight_dtype(model, trained_in_full))
        return base if lora is None else adapters.attach(base, lora)


def public_name(name_or_path: str) -> str:
    """The model's name for others: a Hub id or the embedded default as it is, a local folder without its path."""
    folder = Path(name_or_path).expanduser()
    return folder.resolve().name if folder.is_dir() else name_or_path


def base_license(model: ModelConfig) -> str | None:
    """The licence that the base model's own card states; None where there is no card to read."""
    import yaml
    from huggingface_hub import try_to_load_from_cache

    if model.name_or_path == EMBEDDED:
        return EMBEDDED_LICENSE
    folder = Path(model.name_or_path).expanduser()
    cached = folder / "README.md" if folder.is_dir() else try_to_load_from_cache(model.name_or_path, "README.md")
    if not isinstance(cached, str | Path) or not Path(cached).is_file():
        return None
    parts = Path(cached).read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return metadata.get("license") if isinstance(metadata, dict) else None


def _from(model: ModelConfig) -> dict[str, Any]:
    """Arguments of every from_pretrained: without a network only the local cache is asked, and answers at once."""
    name = resolve_name(model.name_or_path)
    local = Path(name).is_dir() or not hub_reachable()
    return {"pretrained_model_name_or_path": name, "revision": model.revision, "local_files_only": local}


@contextmanager
def _said_plainly(model: ModelConfig) -> Iterator[None]:
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
            raise SettingsError(f"model.name_or_path={name}: no local folder, no Hub model.", OFFLINE_DEFAULT) from None
        if any(isinstance(link, LocalEntryNotFoundError) for link in chain) or not hub_reachable():
            message = f"The Hub cannot be reached, and {name} is neither a local folder nor in the local cache."
            raise ResourceError(message, OFFLINE_DEFAULT) from None
        raise SettingsError(f"model.name_or_path={name}: {str(error).splitlines()[0]}", OFFLINE_DEFAULT) from None
