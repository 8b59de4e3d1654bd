"""Settings: typed sections, and one strict loader that knows where each value came from.

Order of precedence: recipe default < YAML file < `key=value` on the command line. Leaf names are those of transformers,
PEFT and TRL. A key that is unknown, of the wrong type, or without effect is a `SettingsError`, never a silent no-op.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from finetune_kit import values
from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.names import SHOW, find_name, near_path, together


def setting(default: Any, help: str, unit: str = "", within: str = "") -> Any:
    """A dataclass field with its one line of help, its unit, and the interval its numbers must lie in, such as [0, 1).

    Mutable defaults are copied.
    """
    metadata = {"help": help, "unit": unit, "within": within}
    if isinstance(default, list | dict):
        return field(default_factory=partial(type(default), default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, **defaults: Any) -> Any:
    """A section of a recipe's Config, with the defaults that this recipe changes."""
    return field(default_factory=partial(cls, **defaults))


@dataclass
class ModelConfig:
    name_or_path: str = setting("smollm2-135m", "Hub id, local folder, or the embedded default smollm2-135m")
    revision: str | None = setting(None, "commit, tag or branch of the Hub model")
    trust_remote_code: bool = setting(
        False, "run Python code that comes with the Hub model; only on the command line, with its commit as revision"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights' type; auto: bfloat16 on a GPU that has it, float32 elsewhere"
    )
    attn_implementation: str | None = setting(None, "attention kernel by transformers' name; unset: its own choice")
    load_in_4bit: bool = setting(False, "keep the linear layers' weights in 4 bits (bitsandbytes); for adapters only")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "the 16 values of a 4-bit weight")
    bnb_4bit_use_double_quant: bool = setting(True, "quantise the blocks' scales, too: 0.37 bit a weight less")


@dataclass
class LoraConfig:
    r: int = setting(
        16, "rank of the adapter; 0, not for lora_sft: no adapter, all weights are trained", within="[0, inf)"
    )
    lora_alpha: int = setting(
        32, "the update is scaled by lora_alpha / r (/ sqrt(r) with use_rslora)", within="[1, inf)"
    )
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", "share", within="[0, 1)")
    target_modules: str | list[str] = setting(
        "all-linear",
        "module names to adapt, or all-linear: every linear layer of the layers, experts, no router, no head",
    )
    target_parameters: list[str] = setting([], "stacked experts to adapt by PEFT's names, such as experts.down_proj")
    modules_to_save: list[str] = setting([], "modules trained and saved in full, such as lm_head")
    use_rslora: bool = setting(False, "rank-stabilised scaling (arXiv 2312.03732)")
    use_dora: bool = setting(False, "weight-decomposed LoRA (arXiv 2402.09353)")
    init_from: str | None = setting(None, "folder of an adapter to go on from; its rank and modules are kept")


@dataclass
class DataConfig:
    path: str | list[str] = setting(
        "reasoning_gym/word_sequence_reversal", "file, folder, Hub id or reasoning_gym/<task>; a list mixes them"
    )
    weights: list[float] = setting(
        [], "with several paths: their shares of the training rows; unset: as they are", within="[0, inf)"
    )
    name: str | None = setting(None, "configuration of the Hub data set")
    split: str = setting("train", "split of the Hub data set to train on")
    revision: str | None = setting(None, "commit, tag or branch of the Hub data set")
    columns: dict[str, str] = setting({}, "what your columns are: {your_column: question, other: answer}")
    options: dict[str, Any] = setting({}, "settings of a reasoning_gym task, such as {min_words: 3}")
    size: int | None = setting(None, "rows to train on; unset: all of a file, 256 of a task", "rows", within="[1, inf)")
    held_out_path: str | None = setting(None, "rows to evaluate on; unset: split off before anything else")
    held_out_size: float | None = setting(
        None,
        "held-out rows, or a share below 1; unset: 5 %, at least 20 rows (but no more than 20 %), at most 256 rows",
        "rows or share",
        within="[0, inf)",
    )
    max_length: int = setting(
        1024, "longest sample; longer ones are cut at the end and counted", "tokens", within="[1, inf)"
    )
    packing: bool | None = setting(None, "several samples in one row, unable to see each other; unset: plain text only")
    pairs: Literal["best_worst", "all"] = setting(
        "best_worst", "of several scored answers: the best against the worst, or all pairs"
    )
    train_on: Literal["all", "last"] = setting(
        "all", "assistant turns that are trained; `train` on a message overrides"
    )
    system_prompt: str | None = setting(None, "system turn for conversations that have none")
    apply_chat_template: bool = setting(True, "put prompt and completion strings into the model's chat template")
    chat_template_kwargs: dict[str, Any] = setting({}, "passed to the chat template, such as {enable_thinking: false}")
    special_tokens_in_text: Literal["text", "refuse", "keep"] = setting(
        "text", "<|im_end|> and the like in a row's text: written as text; such rows dropped; or taken for the tokens"
    )
    merge_turns: bool = setting(False, "join user turns in a row by a blank line; else such a row is refused")
    skip_bad_rows: int = setting(
        0, "rows that cannot be read which are left out and counted, before one is refused", "rows", within="[0, inf)"
    )
    max_lost: float = setting(0.05, "largest share of rows dropped before the run refuses", "share", within="[0, 1]")


@dataclass
class TrainConfig:
    output_dir: str | None = setting(None, "the run's folder; unset: runs/<recipe>, or the next free -2, -3, …")
    learning_rate: float = setting(2e-5, "peak learning rate", within="[0, 1]")
    per_device_train_batch_size: int = setting(8, "in one forward pass on one device", "rows", within="[1, inf)")
    gradient_accumulation_steps: int = setting(1, "forward passes in one optimizer step", within="[1, inf)")
    max_tokens_per_batch: int | None = setting(
        None, "most in one forward pass, padding counted; a step keeps its rows and is cut anew", "tokens", "[1, inf)"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "random", "order of the rows; group_by_length: rows of about one length in a step"
    )
    num_train_epochs: float = setting(1.0, "passes over the training rows", "epochs", within="(0, inf)")
    max_steps: int = setting(-1, "optimizer steps; above 0 it overrides num_train_epochs", "steps", within="[-1, inf)")
    warmup_steps: float = setting(
        0.0, "linear warm-up; below 1: a share of all steps", "steps or share", within="[0, inf)"
    )
    lr_scheduler_type: str = setting("linear", "schedule by transformers' name: linear, cosine, constant, …")
    optim: str = setting("auto", "optimizer by transformers' name; auto: fused AdamW")
    weight_decay: float = setting(0.0, "decoupled weight decay of the optimizer", within="[0, inf)")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm", within="[0, inf)")
    on_nonfinite: Literal["stop", "skip", "rollback"] = setting(
        "stop", "a loss or gradient that is not finite: stop; skip that step; or also go back to the last checkpoint"
    )
    neftune_noise_alpha: float | None = setting(None, "noise on embeddings (arXiv 2310.05914)", within="[0, inf)")
    padding_free: bool = setting(
        True, "no padding through the layers, shared beginnings once, the head only at labels: the same numbers, sooner"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, about 1.3x the time")
    logging_steps: int = setting(5, "between two lines of metrics.jsonl", "steps", within="[1, inf)")
    eval_steps: int | None = setting(
        None, "between two held-out losses; unset: start and end", "steps", within="[1, inf)"
    )
    save_steps: int | None = setting(
        500, "between two checkpoints, and one at the end of training; null: none", "steps", within="[1, inf)"
    )
    save_total_limit: int = setting(
        2, "checkpoints kept; the newest and the best one are kept in any case", within="[1, inf)"
    )
    early_stopping_patience: int | None = setting(
        None, "held-out losses without improvement before the run stops", "evaluations", within="[1, inf)"
    )
    metric_for_best_model: str = setting("loss", "what best and stopping go by: loss, or a metric of the report")
    seed: int = setting(0, "of the adapter's start, the order of rows and dropout", within="[0, 4294967295]")
    report_to: list[str] = setting([], "trackers by transformers' name: tensorboard, trackio, wandb, …")
    extra: dict[str, Any] = setting({}, "any other argument of the trainer, checked against its own dataclass")


@dataclass
class EvaluateConfig:
    size: int = setting(128, "held-out prompts answered before and after; 0: none", "rows", within="[0, inf)")
    metrics: list[str] = setting(
        [], "scores of the answers: task_score, exact_match, final_number, rouge, bleu; unset: what the data allow"
    )
    reward_model: str | None = setting(None, "a reward model's run or Hub id that scores the answers before and after")
    max_new_tokens: int | None = setting(
        None, "longest answer; unset: the longest held-out answer + 8", "tokens", within="[1, inf)"
    )
    batch_size: int = setting(32, "prompts answered together, and rows scored together", "rows", within="[1, inf)")
    general_text: bool = setting(True, "also measure the loss on a fixed general text, to see forgetting")
    bootstrap_samples: int = setting(2000, "resamples behind each 95 % interval", within="[1, inf)")
    hub_metrics: list[str] = setting([], "metric scripts to fetch and RUN from the Hub; none by default")


@dataclass
class HubConfig:
    model_id: str | None = setting(None, "where the run is pushed to: user/name")
    push: bool = setting(False, "push the finished run; token and rights are checked before training")
    private: bool = setting(True, "make the repository a private one; false: for everybody to see")
    strategy: Literal["end", "every_save"] = setting(
        "end", "push at the end alone, or each checkpoint's weights, too, into checkpoint-N/"
    )


COMMAND_LINE = "command line"  # the origin of what was typed
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")

SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "hub": HubConfig,
}


@dataclass
class RecipeConfig:
    """What every recipe's Config has.

    `kind`: the kind of record that it trains on (data/records.py). `trainer_config`: the dataclass of the trainer's own
    arguments, such as trl.SFTConfig, which check and run look through before anything is read. `recipe` names it for
    people, `recipe_word` finds it again: a built-in's name, or a path. `origins` maps a dotted key to where its value
    came from; absent: the recipe. `allow_changed`: settings in which it may differ from the unfinished run that goes
    on.
    """

    kind: ClassVar[str] = "prompt_completion"
    trainer_config: ClassVar[str] = ""

    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)
    hub: HubConfig = section(HubConfig)

    @property
    def scores(self) -> bool:
        """Whether what is trained scores texts and writes none."""
        return self.trainer_config.endswith(".RewardConfig")

    @property
    def cut_matters(self) -> str:
        """Why the loss of a step depends on how its rows are cut into forward passes; "" where it does not."""
        return ""

    def check_itself(self) -> None:
        """What a recipe has against its own settings, before anything is read: it raises SettingsError."""

    def __post_init__(self) -> None:
        self.recipe: str = ""
        self.recipe_word: str = ""
        self.origins: dict[str, str] = {}
        self.entry_origins: dict[str, str] = {}  # of single entries of a dict, such as train.extra.deepspeed
        self.allow_changed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaf:
    """One setting: dotted key, type, value, help, unit, and the interval that its number must lie in."""

    key: str
    annotation: Any
    value: Any
    help: str
    unit: str
    within: str


def leaves(config: RecipeConfig) -> Iterator[Leaf]:
    """Every setting of a recipe in reading order."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            inner = typing.get_type_hints(type(value))
            for leaf in dataclasses.fields(value):
                yield _leaf(f"{item.name}.{leaf.name}", leaf, inner[leaf.name], getattr(value, leaf.name))
        else:
            yield _leaf(item.name, item, hints[item.name], value)


def _leaf(key: str, item: dataclasses.Field[Any], annotation: Any, value: Any) -> Leaf:
    return Leaf(key, annotation, value, **{name: item.metadata.get(name, "") for name in ("help", "unit", "within")})


def resolve(
    config_class: type[RecipeConfig], recipe: str, yaml_path: Path | None = None, overrides: Sequence[str] = ()
) -> RecipeConfig:
    """The Config of `recipe` (its name or path) with a YAML file and `key=value` words laid over its defaults.

    Raises SettingsError (unknown key, wrong type, out of range, without effect, unreadable file), SecurityError (a YAML
    tag that builds objects).
    """
    config = config_class()
    config.recipe, config.recipe_word = Path(recipe).stem, recipe
    known = {leaf.key: leaf for leaf in leaves(config)}
    given = list(_read_yaml(yaml_path, known)) if yaml_path else []
    problems: list[SettingsError] = []
    for written, node, origin in [*given, *(_read_word(word, recipe) for word in overrides)]:
        try:
            _lay_over(config, known, recipe, written, node, origin)
        except SettingsError as error:
            problems.append(error)
    problems += out_of_range(config)
    if problems:
        raise together(problems)
    _measure_whole_answers(config)
    check(config)
    return config


def _lay_over(
    config: RecipeConfig, known: dict[str, Leaf], recipe: str, written: str, node: values.Node, origin: str
) -> None:
    """Put one setting that was given into its place."""
    leaf, entry = _find(written, known, recipe, origin)
    section, _, name = leaf.key.rpartition(".")
    target = getattr(config, section) if section else config
    if entry:
        value = values.coerce(node, typing.get_args(leaf.annotation)[1], f"{leaf.key}.{entry} ({origin})")
        setattr(target, name, {**getattr(target, name), entry: value})
        config.entry_origins[f"{leaf.key}.{entry}"] = origin
        origin = ", ".join(dict.fromkeys([config.origins.get(leaf.key, origin), origin]))
    else:
        setattr(target, name, values.coerce(node, leaf.annotation, f"{leaf.key} ({origin})"))
    config.origins[leaf.key] = origin


def _measure_whole_answers(config: RecipeConfig) -> None:
    """Prompts have no reference that tells how long an answer may get: held-out ones get the length that is sampled."""
    for name in ("max_new_tokens", "max_completion_length"):  # of PPO; of TRL's GRPO and RLOO
        if config.kind == "prompt" and config.evaluate.max_new_tokens is None and hasattr(config, name):
            config.evaluate.max_new_tokens = getattr(config, name)
            config.origins["evaluate.max_new_tokens"] = name


def check(config: RecipeConfig) -> None:
    """Raises SettingsError for a number out of range, a name unknown to transformers, a setting that cannot act;
    SecurityError for a setting that would run a stranger's code, or holds a token."""
    if found := out_of_range(config):
        raise together(found)
    lora, train = getattr(config, "lora", None), config.train
    if lora is not None and lora.r == 0 and config.kind == "prompt_completion":
        raise SettingsError(f"{_named(config, 'lora.r')}: 0 trains all weights.", "Run full_sft")
    if lora is not None and lora.r == 0 and lora.init_from:
        raise SettingsError(
            f"{_named(config, 'lora.init_from')} has no effect with lora.r=0, which trains all weights.",
            f"Make a model of it: python -m finetune_kit merge {lora.init_from} merged   and model.name_or_path=merged",
        )
    if config.data.path == []:
        raise SettingsError(f"{_named(config, 'data.path')}: an empty list has no rows to train on.")
    if train.max_steps == 0:
        raise SettingsError(f"{_named(config, 'train.max_steps')}: 0 trains nothing.", "Use check instead of run.")
    for name, unset in (("early_stopping_patience", None), ("metric_for_best_model", "loss")):
        if getattr(train, name) != unset and train.eval_steps is None:
            raise SettingsError(
                f"{_named(config, 'train.' + name)} has no effect without held-out losses on the way.",
                "Add train.eval_steps=20, or leave it out.",
            )
    for name in ("lr_scheduler_type", "optim"):
        _check_name(name, getattr(train, name), _named(config, f"train.{name}"))
    _check_trust(config)
    _check_output_dir(config)
    _check_hub(config)


def out_of_range(config: RecipeConfig) -> list[SettingsError]:
    """An error for each number that does not lie in its interval."""
    return [
        SettingsError(f"{_named(config, leaf.key)}: expected a number in {leaf.within}, found {number:g}.")
        for leaf in leaves(config)
        for number in (leaf.value if isinstance(leaf.value, list) else [leaf.value])
        if leaf.within and number is not None and not _inside(number, leaf.within)
    ]


def _check_trust(config: RecipeConfig) -> None:
    """Raises SecurityError where settings would run a stranger's code, or hold a secret that run.yaml would show."""
    model = config.model
    if model.trust_remote_code and config.origins.get("model.trust_remote_code") != COMMAND_LINE:
        raise SecurityError(
            f"{_named(config, 'model.trust_remote_code')}: whoever runs it must say so, not a file.",
            "Give it on the command line if you have read that code: model.trust_remote_code=true",
        )
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        raise SecurityError(
            f"{_named(config, 'model.trust_remote_code')}: model.revision is {model.revision or 'unset'}; "
            "expected the 40 digits of a commit, so that the code is the code you have read.",
            "Copy it from the model's page: model.revision=<commit>",
        )
    kernel = model.attn_implementation or ""
    if "/" in kernel and config.origins.get("model.attn_implementation") != COMMAND_LINE:
        raise SecurityError(
            f"{_named(config, 'model.attn_implementation')}: {kernel} would be fetched from the Hub and run as code.",
            f"Give it on the command line if you trust it: model.attn_implementation={kernel}",
        )
    for leaf in leaves(config):
        if _TOKEN.search(str(leaf.value)):  # the message must not hold it
            raise SecurityError(
                f"{_named(config, leaf.key)} holds what looks like a token; it would stand in the run's files.",
                "Take it out. The Hub's token is read from HF_TOKEN, or put away by: hf auth login",
            )


# arguments of the trainers that lead to other files, programs or machines where they are a text
LEADS_ELSEWHERE = (
    *("deepspeed", "fsdp_config", "accelerator_config", "torch_compile_backend", "vllm_server_base_url"),
    *(
        "vllm_server_host",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "log_completions_hub_repo",
    ),
)


def check_code(config: RecipeConfig) -> None:
    """Raises SecurityError where a settings file, and not the person who starts the run, names code: a reward's
    function, a metric script, or an argument of the trainer that leads elsewhere."""
    named: dict[str, str] = {}
    for leaf in leaves(config):
        if leaf.key == "evaluate.hub_metrics" and leaf.value:
            named[leaf.key] = f"[{', '.join(leaf.value)}]"
        if leaf.key == "reward.sources" and any(".py" in source for source in leaf.value):
            named[leaf.key] = f"[{', '.join(leaf.value)}]"
    for name, value in config.train.extra.items():
        if name in LEADS_ELSEWHERE and isinstance(value, str):
            named[f"train.extra.{name}"] = value
    for key, value in named.items():
        origin = config.entry_origins.get(key) or config.origins.get(key)
        origin = origin or config.origins.get(key.rpartition(".")[0], COMMAND_LINE)
        if origin != COMMAND_LINE:
            raise SecurityError(
                f"{key} ({origin}): {value} would be run or followed, and a file names it, not you.",
                f"If you trust it, say so on the command line: '{key}={value}'",
            )


def _check_output_dir(config: RecipeConfig) -> None:
    given = config.train.output_dir
    if given is None:
        return
    found = f"{_named(config, 'train.output_dir')}: {given!r}"
    if not given.isprintable():
        raise SettingsError(
            f"{found} has characters that cannot be printed.", "Write a plain name: output_dir=runs/mine"
        )
    inside = os.path.normpath(given)
    if inside == "." or not given.strip():
        raise SettingsError(f"{found} is the folder you are in; expected one of the run's own.", "output_dir=runs/mine")
    if Path(inside).parts[0] == "..":
        raise SettingsError(
            f"{found} leads out of the folder you are in.", f"If it is meant: output_dir={Path(given).resolve()}"
        )


def _check_hub(config: RecipeConfig) -> None:
    hub, train = config.hub, config.train
    if not hub.push:
        for name in ("model_id", "private", "strategy"):
            if getattr(hub, name) != getattr(HubConfig, name):
                raise SettingsError(
                    f"{_named(config, 'hub.' + name)} has no effect without hub.push=true.",
                    "Add it, or leave this out. The model to train is model.name_or_path.",
                )
        return
    if hub.model_id is None:
        raise SettingsError(f"{_named(config, 'hub.push')} does not say where to.", "Add hub.model_id=user/name")
    if not is_hub_name(hub.model_id):
        raise SettingsError(f"{_named(config, 'hub.model_id')}: expected user/name, found '{hub.model_id}'.")
    if hub.strategy == "every_save" and train.save_steps is None and train.eval_steps is None:
        raise SettingsError(
            f"{_named(config, 'hub.strategy')}: every_save has no effect without checkpoints on the way.",
            "Leave out save_steps=null, or this.",
        )


def is_hub_name(text: str) -> bool:
    """Whether a text has the form user/name of a repository on the Hub."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text) is not None and not text.endswith((".git", "-", "."))


def _named(config: RecipeConfig, key: str) -> str:
    return f"{key} ({config.origins[key]})" if key in config.origins else key


def _inside(number: float, interval: str) -> bool:
    """Whether a number lies in an interval such as [0, 1) or (0, inf)."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return low <= number <= high and (interval[0], number) != ("(", low) and (interval[-1], number) != (")", high)


def _check_name(setting: str, value: str, where: str) -> None:
    """That transformers knows a scheduler or an optimizer; its import is spared where the value is our default."""
    if value == getattr(TrainConfig, setting):
        return
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    choices = [str(item.value) for item in (OptimizerNames if setting == "optim" else SchedulerType)]
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(choices)}"
        raise SettingsError(f"{where}: '{value}' is not known to transformers.", hint)


def recipe_of_yaml(path: Path) -> str:
    """The recipe a YAML file names in `recipe: …`."""
    root = values.read_file(path)
    named = {name: node for name, node, _ in values.pairs(root, str(path))} if root else {}
    recipe = named["recipe"].value if "recipe" in named else None
    if not isinstance(recipe, str):
        raise SettingsError(
            f"{path} does not say which recipe it is for.",
            "Begin it with 'recipe: lora_sft'. Of another toolkit's file this says all names at once: "
            f"python -m finetune_kit check lora_sft --config {path}",
        )
    return recipe


def full_key(config: RecipeConfig, written: str, origin: str) -> str:
    """The dotted key of the setting that `written` means. Raises SettingsError with the nearest right name."""
    return _find(written, {leaf.key: leaf for leaf in leaves(config)}, config.recipe, origin)[0].key


def _read_yaml(path: Path, known: dict[str, Leaf]) -> Iterator[tuple[str, values.Node, str]]:
    """(key, value, file:line) of every setting; `recipe`, `versions` and `origins` are not settings."""
    root = values.read_file(path)
    for name, node, line in values.pairs(root, str(path)) if root else ():
        if name in ("recipe", "versions", "origins"):
            continue
        if name in SECTIONS or any(key.startswith(f"{name}.") for key in known):
            for leaf, value, leaf_line in values.pairs(node, str(path)):
                yield f"{name}.{leaf}", value, f"{path}:{leaf_line}"
        else:
            yield name, node, f"{path}:{line}"


def _read_word(word: str, recipe: str) -> tuple[str, values.Node, str]:
    key, equals, text = word.partition("=")
    if not equals:
        raise SettingsError(f"'{word}' is not a setting: expected key=value.", _meant_by(word, recipe))
    return key.strip(), values.read_word(text, COMMAND_LINE), COMMAND_LINE


def _meant_by(word: str, recipe: str) -> str:
    """What a word without = may have meant: a file, a model, or key: value."""
    see = f"See: {SHOW} {recipe}"
    if word.lower().endswith((".yaml", ".yml")):
        return f"A settings file is given as: --config {word}"
    if Path(word).expanduser().is_dir() and any(Path(word).expanduser().glob("*config.json")):
        return f"A model's folder is given as: model.name_or_path={word}"
    if word.lower().endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")) or Path(word).is_dir():
        return f"{'' if Path(word).exists() else near_path(word)}Rows are given as: data.path={word}"
    if is_hub_name(word):
        return f"A model is given as model.name_or_path={word}, rows as data.path={word}"
    key, colon, text = word.partition(":")
    if colon and text and key.replace(".", "_").replace("-", "_").isidentifier():
        return f"Write it with an equals sign: {key}={text.strip()}"
    return see


def _find(written: str, known: dict[str, Leaf], recipe: str, origin: str) -> tuple[Leaf, str]:
    """The setting that `written` means, and which entry of it where it is a dict and one is named, else ""."""
    for leaf in known.values():  # an entry's name is the user's own and stays as it is written
        if typing.get_origin(leaf.annotation) is dict and written.startswith(f"{leaf.key}."):
            return leaf, written.removeprefix(f"{leaf.key}.")
    everywhere = [f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in dataclasses.fields(cls)]
    return known[find_name(written, list(known), everywhere, recipe, origin)], ""


def to_yaml(config: RecipeConfig, versions: dict[str, str]) -> str:
    """run.yaml: every setting resolved, where the changed ones came from, and the versions; can be run again."""
    content = {"recipe": config.recipe_word, **dataclasses.asdict(config)}
    return values.dump({**content, "origins": dict(config.origins), "versions": versions})
