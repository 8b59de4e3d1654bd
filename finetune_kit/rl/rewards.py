"""Rewards: what a completion is worth. Each is a function score(prompts, completions, records) -> one number a row.

`prompts` are the last turns before the answers, `completions` the answers without their end token, `records` the rows
themselves (data/records.py: messages, tools, metadata, completion). None: the reward does not apply to that row. What
a reward gives back is checked before it moves a weight. Functions of the user's: rl/reward_function.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_kit import parsing
from finetune_kit.ancestry import model_of
from finetune_kit.config import ModelConfig, setting
from finetune_kit.data.chat import end_token_ids, ids_of, render_prompt, text_ids
from finetune_kit.data.load import Data
from finetune_kit.data.records import prompt_of
from finetune_kit.data.tasks import PREFIX
from finetune_kit.errors import DataError, FinetuneKitError, NumericsError, ResourceError, SettingsError
from finetune_kit.model.adapter_config import NAME, read_adapter_config
from finetune_kit.model.adapters import REWARD_HEADS, is_adapter
from finetune_kit.model.folder import check_files, check_weights
from finetune_kit.model.load import (
    BASE_RECORD,
    OFFLINE_DEFAULT,
    check_base,
    hub_name,
    load_model_config,
    load_tokenizer,
    public_name,
)
from finetune_kit.model.reward import is_classifier, load_saved, load_scorer, score_rows
from finetune_kit.names import near_path
from finetune_kit.rl.reward_function import Ended, bind, import_function, numbers_of, raised, read_from_turns

Score = Callable[..., Any]  # what it returns is looked at by `checked`
ModelScore = Callable[[list[str], list[str], list[Any]], list[float]]
QUANTISED = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
A_MODEL = "Name the folder or Hub id of a reward model, such as that of a reward_model run."
KNOWN = "Known: task (the data's own scorer), path/to/file.py:function, or a reward model's folder or Hub id."


@dataclass
class RewardConfig:
    sources: list[str] = setting(
        ["task"], "task (the data's own scorer), path/to/file.py:function, or a reward model's folder or Hub id"
    )
    weights: list[float] = setting([], "with several sources: what each is multiplied with; unset: 1 each")
    batch_size: int = setting(16, "completions in one forward pass of a reward model", "rows", within="[1, inf)")
    timeout: float = setting(1800.0, "longest call of a reward function", "seconds", within="(0, inf)")
    ignore_gate: bool = setting(False, "use a reward model although it did not pass its own test")


@dataclass(frozen=True)
class Part:
    """One reward: its name in the log, its weight, and its function. `in_full`: that takes completion_ids,
    trainer_state, log_extra and log_metric, too, by name."""

    name: str
    weight: float
    score: Score
    in_full: bool = False


@dataclass(frozen=True)
class Rewards:
    """Several rewards, added up with their weights."""

    parts: tuple[Part, ...]

    def __call__(
        self, prompts: list[str], completions: list[str], records: list[Any], **more: Any
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(the weighted sum of each row, each part's own scores by name), NaN where a part does not apply.

        Parts that do not apply to a row are left out of its sum, as TRL does; it is NaN where none applies. `more`:
        completion_ids, trainer_state, log_extra, log_metric, for functions that take them.
        Raises DataError where a part raises or gives another number of scores than rows, NumericsError for a score
        that is not finite; both name the row.
        """
        found = {part.name: checked(part, prompts, completions, records, **more) for part in self.parts}
        weights = [part.weight for part in self.parts]
        return [_sum(weights, row) for row in zip(*found.values(), strict=True)], found

    def judge(self, prompts: list[str], completions: list[str], records: list[Any]) -> list[float]:
        """The weighted sum of each row, for the report; 0 where no reward applies, before as after."""
        return [0.0 if math.isnan(score) else score for score in self(prompts, completions, records)[0]]


def _sum(weights: list[float], scores: Sequence[float]) -> float:
    applied = [(weight, score) for weight, score in zip(weights, scores, strict=True) if not math.isnan(score)]
    return sum(weight * score for weight, score in applied) if applied else math.nan


def checked(part: Part, prompts: list[str], completions: list[str], records: list[Any], **more: Any) -> list[float]:
    """The part's scores as floats, one a row; NaN where it does not apply."""
    try:
        given = part.score(list(prompts), list(completions), list(records), **(more if part.in_full else {}))
        found = numbers_of(given, part.name, records)
    except FinetuneKitError:
        raise
    except Exception as error:  # it is the user's function, and may raise anything
        slow = isinstance(error, Ended) and "reward.timeout" in str(error)
        at = None if slow else _first_refused(part, prompts, completions, records, **more)
        where = f"at {records[at].where} (completion {completions[at][:80]!r})" if at is not None else "on the batch"
        detail = "" if isinstance(error, Ended) else f": {error}"
        raise DataError(
            f"reward {part.name} {raised(error)} {where}{detail}",
            "Mend what it waits for, or allow it more: reward.timeout=…"
            if slow
            else "It must return one number for any completion, an empty one included.",
        ) from error
    if len(found) != len(completions):
        raise DataError(
            f"reward {part.name} returned {len(found)} scores for {len(completions)} completions.",
            "Return one number a completion, in their order.",
        )
    for score, completion, record in zip(found, completions, records, strict=True):
        if score is not None and not math.isfinite(score):
            raise NumericsError(
                f"reward {part.name} is {score} at {record.where} (completion {completion[:80]!r}).",
                "Let it return a finite number for any completion, or None where it does not apply.",
            )
    return [math.nan if score is None else score for score in found]


def _first_refused(
    part: Part, prompts: list[str], completions: list[str], records: list[Any], **more: Any
) -> int | None:
    """The first row that makes the part raise alone, too."""
    ids = more.get("completion_ids")
    for row, (prompt, completion, record) in enumerate(zip(prompts, completions, records, strict=True)):
        alone = {**more, "completion_ids": ids and [ids[row]], "log_extra": None, "log_metric": None}
        try:
            part.score([prompt], [completion], [record], **(alone if part.in_full else {}))
        except Exception:
            return row
    return None


def load_rewards(config: RewardConfig, data: Data, model: ModelConfig, policy: Any = None) -> Rewards:
    """The rewards that the settings name. `model`: the policy's settings; `policy`: given, a reward model with an
    adapter on the same base is put beside the policy's adapter and needs no second base.

    Raises SettingsError for a source that cannot be, a wrong number of weights, or a reward model that did not pass.
    """
    _check_lists(config)
    weights = config.weights or [1.0] * len(config.sources)
    parts = [
        _part(source, weight, config, data, model, policy)
        for source, weight in zip(config.sources, weights, strict=True)
    ]
    names = [part.name for part in parts]
    parts = [
        part if names.count(part.name) == 1 else replace(part, name=f"{part.name}_{at}")
        for at, part in enumerate(parts, start=1)
    ]
    return Rewards(tuple(parts))


def _check_lists(config: RewardConfig) -> None:
    if not config.sources:
        raise SettingsError("reward.sources is empty: nothing would be learned.", KNOWN)
    if config.weights and len(config.weights) != len(config.sources):
        raise SettingsError(
            f"reward.weights has {len(config.weights)} numbers for {len(config.sources)} sources.", "Give one each."
        )
    if len(set(config.sources)) != len(config.sources):
        raise SettingsError("reward.sources names one source twice.", "Give it once, with reward.weights.")


def check_sources(config: RewardConfig, rows: Sequence[str], policy: ModelConfig) -> None:
    """What load_rewards would say of these sources without loading data, weights or a function.

    `rows`: the data's paths. Raises SettingsError.
    """
    _check_lists(config)
    for source in config.sources:
        path, colon, _ = source.rpartition(":")
        if source == "task":
            if not all(name.startswith(PREFIX) for name in rows):
                raise no_scorer()
        elif source.endswith(".py"):
            raise SettingsError(f"reward.sources: {source} names no function.", f"Write {source}:score")
        elif colon and path.endswith(".py"):
            _function_file(path)
        else:
            check_judge("reward.sources", source, policy)
            check_gate(Path(source).expanduser(), config.ignore_gate)


def check_judge(setting: str, source: str, policy: ModelConfig) -> None:
    """Raises SettingsError where `source`, which `setting` names, is no reward model: its config is read, no weights.

    `policy`: the base of an adapter may be the policy's own.
    """
    folder = Path(source).expanduser()
    adapted = (folder / NAME).is_file()
    # runs/reward beside other runs is no Hub id
    local = source.startswith((".", "/", "~")) or source.count("/") > 1 or ("/" in source and folder.parent.is_dir())
    if not adapted and not (folder / "config.json").is_file() and (local or folder.is_dir()):
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


def _part(source: str, weight: float, config: RewardConfig, data: Data, model: ModelConfig, policy: Any) -> Part:
    if source == "task":
        return Part("task", weight, task_score(data))
    path, colon, function = source.rpartition(":")
    if colon and path.endswith(".py"):
        return Part(function, weight, python_score(path, function, config, data, model), in_full=True)
    if source.endswith(".py"):
        raise SettingsError(f"reward.sources: {source} names no function.", f"Write {source}:score")
    return Part(Path(source).name, weight, model_score(source, config, model, data.chat_template_kwargs, policy))


def task_score(data: Data) -> Score:
    """The data's own scorer in [0, 1], as the report uses it. Raises SettingsError where the data have none."""
    scorer = data.score
    if scorer is None:
        raise no_scorer()
    return lambda prompts, completions, records: [
        scorer(completion, record.metadata) for completion, record in zip(completions, records, strict=True)
    ]


def no_scorer() -> SettingsError:
    return SettingsError(
        "reward.sources=[task]: these data have no scorer of their own (reasoning_gym/<task> has, and needs "
        "held-out rows).",
        "Set reward.sources to path/to/file.py:function or to a reward model.",
    )


def _function_file(path: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise SettingsError(f"reward.sources: {path}: no such file.", near_path(path) + KNOWN)
    return file


def python_score(path: str, function: str, config: RewardConfig, data: Data, model: ModelConfig) -> Score:
    """`function` of the Python file `path`, called by the names of its parameters.

    Raises SettingsError where there is no such file or function, or it has another signature than the two.
    """
    file = _function_file(path)
    found, own = import_function(path, function, config.timeout)
    rows = [record for record in (*data.train_records, *data.held_out_records) if hasattr(record, "metadata")]
    tokenizers: list[Any] = []

    def tokenize(text: str) -> list[int]:
        if not tokenizers:
            tokenizers.append(load_tokenizer(model))
        return list(ids_of(tokenizers[0], text))

    return bind(
        found,
        function,
        columns=list(dict.fromkeys(column for record in rows for column in record.metadata)),
        conversational=any(read_from_turns(record) for record in rows),
        tokenize=tokenize,
        limit=config.timeout,
        own=own,
        folder=file.parent,
    )


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
    folder = Path(source).expanduser()
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
                    "Set a smaller max_new_tokens, or take the row out.",
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
    from finetune_kit.rl.rollout import adapter, lay_out, states
    from finetune_kit.rl.value import head_of, put_beside

    name = f"reward_{sum(name.startswith('reward_') for name in policy.peft_config)}"
    tensors = put_beside(policy, name, folder, trained=False)
    width = policy.config.get_text_config().hidden_size
    head = head_of(tensors, folder, width).to(policy.device).float()

    def score_together(policy: Any, rows: Sequence[Sequence[int]]) -> list[float]:
        # a row's last token is in front of a token that nothing reads
        laid = lay_out([list(row) for row in rows], [[0]] * len(rows), 1, policy.device)
        with adapter(policy, name):
            hidden = states(policy, laid, head=False)[1]
        found: list[float] = (hidden @ head[0]).tolist()
        return found

    return score_together


def load_judge(source: str, policy: ModelConfig, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(reward model in evaluation mode, its tokenizer) from a run's folder, a model's folder or the Hub."""
    folder = Path(source).expanduser()
    adapted = (folder / "adapter_config.json").is_file()
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
    if (folder / "run.yaml").is_file():
        named = model_of(folder / "run.yaml")
        return ModelConfig(**{name: named[name] for name in ("name_or_path", "revision", *QUANTISED)})
    saved = read_adapter_config(folder)
    name = saved["base_model_name_or_path"]
    if name in (public_name(policy.name_or_path), hub_name(policy.name_or_path)):
        return ModelConfig(name_or_path=policy.name_or_path, revision=policy.revision)
    return ModelConfig(name_or_path=name, revision=saved.get("revision"))
