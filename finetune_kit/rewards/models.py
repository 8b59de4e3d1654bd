"""A reward model as a reward: found, checked, loaded, or put beside the policy's adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune_kit.data.chat import end_token_ids, render_prompt
from finetune_kit.data.records import prompt_of
from finetune_kit.data.token_ids import text_ids
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.models.adapter_config import NAME, read_adapter_config
from finetune_kit.models.adapters import REWARD_HEADS, is_adapter
from finetune_kit.models.folder import check_files, check_weights
from finetune_kit.models.provenance import BASE_RECORD, check_base
from finetune_kit.models.reward import is_classifier, load_saved, load_scorer, score_rows
from finetune_kit.models.source import OFFLINE_DEFAULT, file_of, hub_name, load_model_config, public_name
from finetune_kit.models.tokenizer import load_tokenizer
from finetune_kit.rewards.settings import KNOWN, RewardConfig
from finetune_kit.run_folder.fetch import fetch
from finetune_kit.run_folder.lineage import model_of
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.checks import is_hub_name
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.system import parsing

ModelScore = Callable[[list[str], list[str], list[Any]], list[float]]
QUANTISED = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
A_MODEL = "Name the folder or Hub id of a reward model, such as that of a reward_model run."


def place_of(source: str) -> Path:
    """The folder of a reward model: a local one as it is, that of an adapter on the Hub once its files are here; for a
    whole model on the Hub, its id."""
    folder = Path(source).expanduser()
    if folder.is_dir() or _is_local(source) or not is_hub_name(source):
        return folder
    return folder if file_of(ModelConfig(name_or_path=source), NAME) is None else fetch(source)


def _is_local(source: str) -> bool:
    """Whether a name can be that of a folder alone; runs/reward beside other runs is not a Hub id."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return "/" in source and Path(source).expanduser().parent.is_dir()


def check_judge(setting: str, source: str, policy: ModelConfig) -> None:
    """Raises SettingsError where `source`, which `setting` names, is not a reward model. It reads the config alone.

    `policy`: the base of an adapter may be the policy's own.
    """
    folder = place_of(source)
    adapted = (folder / NAME).is_file()
    if not adapted and not (folder / "config.json").is_file() and (_is_local(source) or folder.is_dir()):
        raise SettingsError(
            f"{setting}: {source}: no reward model there (adapter_config.json or config.json).",
            f"{near_path(source)}{KNOWN}" if setting == "reward.sources" else f"{near_path(source)}{A_MODEL}",
        )
    try:
        if not adapted:
            _check_classifier(source, load_model_config(ModelConfig(name_or_path=source)), setting)
            return
        check_files(folder)
        if not is_classifier(read_adapter_config(folder)):
            raise SettingsError(f"{setting}: {source} is an adapter that writes text: no reward model.", A_MODEL)
        check_weights(folder / "adapter_model.safetensors")
        load_model_config(_base_of(folder, policy))
    except (SettingsError, ResourceError) as error:
        if error.message.startswith(setting):
            raise
        raise type(error)(
            f"{setting}: {source}: {error.message}", error.fix.replace(OFFLINE_DEFAULT, A_MODEL)
        ) from None


def check_gate(folder: Path, ignore: bool) -> None:
    """Raises SettingsError where a reward_model run says that it is no better than a simple rule, unless `ignore`."""
    report = folder / "report.json"
    if ignore or not report.is_file():
        return
    gate = parsing.read_object(report).get("gate")
    if gate and not (isinstance(gate, dict) and gate.get("passed")):
        gate = gate if isinstance(gate, dict) else {}
        raise SettingsError(
            f"{folder} did not pass its own test as a reward: {gate.get('reason') or 'no reason given'}",
            "Train a better reward model, or set reward.ignore_gate=true.",
        )


def model_score(
    source: str, config: RewardConfig, model: ModelConfig, kwargs: dict[str, Any], policy: Any = None
) -> ModelScore:
    """A sequence-classification model with one label, read at the end token behind prompt and completion.

    The texts are rendered and tokenised by the reward model's own template and tokenizer, whatever the policy has.
    `policy`, of settings `model`: an adapter on the same base goes into it (see load_rewards). Raises SettingsError
    where it is no such model, or did not pass its gate.
    """
    folder = place_of(source)
    check_gate(folder, config.ignore_gate)
    score_together = None
    if policy is not None and shares_base(folder, model, policy):
        judge, tokenizer = policy, load_tokenizer(_base_of(folder, model), saved=folder)
        score_together = score_beside(policy, folder)
    else:
        judge, tokenizer = load_judge(source, model, kwargs)
    longest = getattr(judge.config.get_text_config(), "max_position_embeddings", None) or math.inf
    end = end_token_ids(tokenizer, kwargs)[0]

    def score(prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
        rows = [
            [*render_prompt(tokenizer, prompt_of(record), record.tools, kwargs), *text_ids(tokenizer, completion), end]
            for completion, record in zip(completions, records, strict=True)
        ]
        for row, record in zip(rows, records, strict=True):
            if len(row) > longest:
                raise DataError(
                    f"{record.where}: {len(row)} tokens with its completion, but {source} takes {longest}.",
                    "Set a smaller max_new_tokens, or remove the row.",
                )
        return score_rows(judge, rows, config.batch_size, score_together=score_together)

    return score


def shares_base(folder: Path, model: ModelConfig, policy: Any) -> bool:
    """Whether the reward model in `folder` is a LoRA adapter on the very base that the policy's adapter lies on."""
    if not is_adapter(policy) or not (folder / "adapter_config.json").is_file():
        return False
    saved = read_adapter_config(folder)
    lora = saved["peft_type"] == policy.active_peft_config.peft_type.value == "LORA"
    if not lora or not set(saved["modules_to_save"] or ()) <= set(REWARD_HEADS):
        return False
    its = _base_of(folder, model)
    if any(getattr(its, name) != getattr(model, name) for name in QUANTISED):
        return False
    try:
        check_base(model, folder)
    except SettingsError:
        return False
    return (folder / BASE_RECORD).is_file()


def score_beside(policy: Any, folder: Path) -> Callable[[Any, Sequence[Sequence[int]]], list[float]]:
    """The scores of rows by a reward model that shares_base: its adapter is in the policy, beside the policy's own."""
    from finetune_kit.models.completion_rows import make_rows, states
    from finetune_kit.models.second_adapter import adapter, add_second_adapter, head_of

    name = f"reward_{sum(name.startswith('reward_') for name in policy.peft_config)}"
    tensors = add_second_adapter(policy, name, folder, trained=False)
    width = policy.config.get_text_config().hidden_size
    head = head_of(tensors, folder, width).to(policy.device).float()

    def score_together(policy: Any, rows: Sequence[Sequence[int]]) -> list[float]:
        # a row's last token is in front of a token that nothing reads
        laid = make_rows([list(row) for row in rows], [[0]] * len(rows), 1, policy.device)
        with adapter(policy, name):
            hidden = states(policy, laid, head=False)[1]
        found: list[float] = (hidden @ head[0]).tolist()
        return found

    return score_together


def load_judge(source: str, policy: ModelConfig, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(reward model in evaluation mode, its tokenizer) from a run's folder, a model's folder or the Hub."""
    folder = place_of(source)
    adapted = (folder / NAME).is_file()
    base = _base_of(folder, policy) if adapted else ModelConfig(name_or_path=source)
    if not adapted:
        _check_classifier(source, load_model_config(base))
    # a run's folder has the tokenizer that it was trained with
    tokenizer = load_tokenizer(base, saved=folder if (folder / "tokenizer_config.json").is_file() else None)
    ends = end_token_ids(tokenizer, kwargs)
    model = load_saved(base, folder, tokenizer, ends) if adapted else load_scorer(base, tokenizer, ends)
    return model, tokenizer


def _check_classifier(source: str, config: Any, setting: str = "reward.sources") -> None:
    if not is_classifier(config.to_dict()):
        what = ", ".join(config.architectures or ["of no architecture"])
        raise SettingsError(f"{setting}: {source} is {what}: no reward model.", A_MODEL)
    if config.num_labels != 1:
        raise SettingsError(
            f"{setting}: {source} is a classifier with {config.num_labels} labels; a reward model has one.", A_MODEL
        )


def _base_of(folder: Path, policy: ModelConfig) -> ModelConfig:
    """The base of an adapter: from its run.yaml, else by its name, which the policy's base may have."""
    own = (public_name(policy.name_or_path), hub_name(policy.name_or_path))
    if (folder / "run.yaml").is_file():
        named = model_of(folder / "run.yaml")
        base = ModelConfig(**{name: named[name] for name in ("name_or_path", "revision", *QUANTISED)})
        if not Path(base.name_or_path).is_dir() and base.name_or_path.removeprefix("./") in own:  # as it was pushed
            return replace(base, name_or_path=policy.name_or_path, revision=policy.revision)
        return base
    saved = read_adapter_config(folder)
    name = saved["base_model_name_or_path"]
    if name in own:
        return ModelConfig(name_or_path=policy.name_or_path, revision=policy.revision)
    return ModelConfig(name_or_path=name, revision=saved.get("revision"))
