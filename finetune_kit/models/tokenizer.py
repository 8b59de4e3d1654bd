"""The model's tokenizer, with its pad token and chat template."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_kit.errors import SettingsError
from finetune_kit.models import language
from finetune_kit.models.folder import check_files, check_settings
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.system.parsing import read_object
from finetune_kit.system.terminal import doing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from finetune_kit.models.source import ITS_OWN, file_of, load_model_config, plain_errors, public_name, source_of


def load_tokenizer(model: ModelConfig, saved: Path | None = None, weights: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padded on the right, with a pad token that ends nothing where the vocabulary has one.

    `saved`: a finished run's folder to take it from, which need not hold a model. `weights`: the model's are going to
    be needed, so a folder without any is refused now.
    """
    from transformers import AutoTokenizer

    if saved:
        check_files(saved)
        check_settings(saved)
    whose = saved or public_name(model.name_or_path)
    with plain_errors(model, saved), doing(f"loading the tokenizer of {whose}"):
        source = {"pretrained_model_name_or_path": saved, **ITS_OWN} if saved else source_of(model, weights)
        if lacks_tokenizer(folder := Path(str(source["pretrained_model_name_or_path"]))):
            raise SettingsError(
                f"{folder} has no tokenizer: there is neither a tokenizer.json nor another vocabulary file.",
                "Put the model's tokenizer.json and tokenizer_config.json there.",
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token is None:
        raise SettingsError(f"The tokenizer of {model.name_or_path} has no end token.", "Set eos_token in its config.")
    if tokenizer.chat_template is None and saved is None:
        tokenizer.chat_template = _processors_template(model)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        spare = [token for token in tokenizer.all_special_tokens if token not in taken]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _processors_template(model: ModelConfig) -> str | None:
    """The chat template that a model which reads more than text keeps with its processor; None where it has none."""
    if not language.has_parts(load_model_config(model)):
        return None
    for file in ("chat_template.json", "processor_config.json"):
        path = file_of(model, file)
        found = read_object(path, SettingsError, "Download the model again.").get("chat_template") if path else None
        if isinstance(found, str):
            return found
    return None


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a folder of a model is here, and no vocabulary in it."""
    patterns = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
    return folder.is_dir() and not any(path for pattern in patterns for path in folder.glob(pattern))


def copy_processor(model: ModelConfig, folder: Path) -> None:
    """Put what the base's processor is made of, beside its tokenizer, into the folder of a whole model: without it the
    pictures or the sound that the model still reads could not be given to it."""
    if not language.has_parts(load_model_config(model)):
        return
    for file in language.PROCESSOR:
        if (path := file_of(model, file)) is not None and not (folder / file).exists():
            shutil.copyfile(path, folder / file)
