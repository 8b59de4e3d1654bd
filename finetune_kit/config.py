"""Settings: typed sections, and one strict loader that knows where each value came from.

Order of precedence: recipe default < YAML file < `key=value` on the command line. Leaf names are those of transformers,
PEFT and TRL. A key that is unknown, of the wrong type, or without effect is a `SettingsError`, never a silent no-op.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune_kit.errors import SecurityError, SettingsError


def setting(default: Any, help: str, unit: str = "") -> Any:
    """A dataclass field with its one line of help and its unit; mutable defaults are copied."""
    metadata = {"help": help, "unit": unit}
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "weights' type; auto: bfloat16 on a GPU that has it, float32 elsewhere"
    )
    attn_implementation: str | None = setting(None, "attention kernel by transformers' name; unset: its own choice")


@dataclass
class LoraConfig:
    r: int = setting(16, "rank of the adapter")
    lora_alpha: int = setting(32, "the update is scaled by lora_alpha / r (or / sqrt(r) with use_rslora)")
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", "share")
    target_modules: str | list[str] = setting(
        "all-linear", "module names to adapt, or all-linear (every linear layer but the head)"
    )
    modules_to_save: list[str] = setting([], "modules trained and saved in full, such as lm_head")
    use_rslora: bool = setting(False, "rank-stabilised scaling (arXiv 2312.03732)")
    use_dora: bool = setting(False, "weight-decomposed LoRA (arXiv 2402.09353)")


@dataclass
class DataConfig:
    path: str | list[str] = setting(
        "reasoning_gym/word_sequence_reversal", "file, folder, Hub id or reasoning_gym/<task>; a list mixes them"
    )
    weights: list[float] = setting([], "with several paths: their shares of the training rows; unset: as they are")
    name: str | None = setting(None, "configuration of the Hub data set")
    split: str = setting("train", "split of the Hub data set to train on")
    revision: str | None = setting(None, "commit, tag or branch of the Hub data set")
    columns: dict[str, str] = setting({}, "what your columns are: {your_column: question, other: answer}")
    options: dict[str, Any] = setting({}, "settings of a reasoning_gym task, such as {min_words: 3}")
    size: int | None = setting(None, "rows to train on; unset: all of a file, 1000 of a reasoning_gym task", "rows")
    held_out_path: str | None = setting(None, "rows to evaluate on; unset: split off before anything else")
    held_out_size: float | None = setting(
        None, "held-out rows, or a share below 1; unset: 5 %, at most 256 rows", "rows or share"
    )
    max_length: int = setting(1024, "longest sample; longer conversations are cut at the end and counted", "tokens")
    packing: bool | None = setting(None, "several samples in one row, unable to see each other; unset: plain text only")
    train_on: Literal["all", "last"] = setting(
        "all", "which assistant turns are trained; `train` on a message overrides"
    )
    system_prompt: str | None = setting(None, "system turn for conversations that have none")
    apply_chat_template: bool = setting(True, "put prompt and completion strings into the model's chat template")
    chat_template_kwargs: dict[str, Any] = setting({}, "passed to the chat template, such as {enable_thinking: false}")
    max_lost: float = setting(0.05, "largest share of rows that may be dropped before the run refuses", "share")


@dataclass
class TrainConfig:
    output_dir: str | None = setting(None, "the run's folder; unset: runs/<recipe>, or the next free -2, -3, …")
    learning_rate: float = setting(2e-5, "peak learning rate")
    per_device_train_batch_size: int = setting(8, "samples in one forward pass on one device", "rows")
    gradient_accumulation_steps: int = setting(1, "forward passes in one optimizer step")
    num_train_epochs: float = setting(1.0, "passes over the training rows", "epochs")
    max_steps: int = setting(-1, "optimizer steps; above 0 it overrides num_train_epochs", "steps")
    warmup_steps: float = setting(0.0, "steps of linear warm-up; below 1: a share of all steps", "steps or share")
    lr_scheduler_type: str = setting("linear", "schedule by transformers' name: linear, cosine, constant, …")
    optim: str = setting("auto", "optimizer by transformers' name; auto: fused AdamW")
    weight_decay: float = setting(0.0, "decoupled weight decay of the optimizer")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm")
    neftune_noise_alpha: float | None = setting(None, "noise on the embeddings while training (arXiv 2310.05914)")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, about 1.3x the time")
    logging_steps: int = setting(5, "optimizer steps between two lines of metrics.jsonl", "steps")
    eval_steps: int | None = setting(None, "optimizer steps between two held-out losses; unset: start and end", "steps")
    save_steps: int | None = setting(None, "optimizer steps between two checkpoints; unset: only the end", "steps")
    save_total_limit: int = setting(2, "checkpoints kept, the best one included")
    early_stopping_patience: int | None = setting(
        None, "held-out losses without improvement before the run stops; needs eval_steps", "evaluations"
    )
    metric_for_best_model: str = setting(
        "loss", "held-out loss, or a metric of the report; what best and stopping mean"
    )
    seed: int = setting(0, "of the adapter's start, the order of rows and dropout")
    report_to: list[str] = setting([], "trackers by transformers' name: tensorboard, trackio, wandb, …")
    extra: dict[str, Any] = setting({}, "any other argument of the trainer, checked against its own dataclass")


@dataclass
class EvaluateConfig:
    size: int = setting(128, "held-out prompts answered before and after; 0: none", "rows")
    metrics: list[str] = setting(
        [], "scores of the answers: task_score, exact_match, final_number, rouge, bleu; unset: what the data allow"
    )
    max_new_tokens: int | None = setting(None, "longest answer; unset: the longest held-out answer + 8", "tokens")
    batch_size: int = setting(32, "prompts answered together, and rows scored together", "rows")
    general_text: bool = setting(True, "also measure the loss on a fixed general text, to see forgetting")
    bootstrap_samples: int = setting(2000, "resamples behind each 95 % interval")
    hub_metrics: list[str] = setting([], "metric scripts to fetch and RUN from the Hub; none by default")


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}

# Names that people know from other toolkits, older releases or other sections -> ours.
KNOWN_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(["lora_r", "lora_rank", "rank", "adapter_rank"], "lora.r"),
    **dict.fromkeys(["alpha"], "lora.lora_alpha"),
    **dict.fromkeys(["dropout"], "lora.lora_dropout"),
    **dict.fromkeys(["lora_target", "lora_target_modules", "lora_modules"], "lora.target_modules"),
    **dict.fromkeys(["lora_modules_to_save", "additional_target"], "lora.modules_to_save"),
    **dict.fromkeys(
        ["model_name_or_path", "base_model", "model_name", "model_id", "checkpoint_dir"], "model.name_or_path"
    ),
    **dict.fromkeys(["model_revision"], "model.revision"),
    **dict.fromkeys(["torch_dtype", "bf16", "fp16", "precision"], "model.dtype"),
    **dict.fromkeys(["flash_attention", "flash_attn"], "model.attn_implementation"),
    **dict.fromkeys(["dataset", "datasets", "dataset_name", "dataset_path", "data_files", "train_file"], "data.path"),
    **dict.fromkeys(["dataset_config", "dataset_config_name"], "data.name"),
    **dict.fromkeys(["dataset_train_split"], "data.split"),
    **dict.fromkeys(["max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "block_size"], "data.max_length"),
    **dict.fromkeys(["sample_packing", "packed"], "data.packing"),
    **dict.fromkeys(["val_set_size", "test_size", "test_split_size", "val_size"], "data.held_out_size"),
    **dict.fromkeys(["eval_dataset", "validation_file", "test_file", "eval_file"], "data.held_out_path"),
    **dict.fromkeys(["max_samples", "max_train_samples", "num_samples", "limit"], "data.size"),
    **dict.fromkeys(["mask_history", "roles_to_train", "train_on_inputs", "assistant_only_loss"], "data.train_on"),
    **dict.fromkeys(["system", "default_system"], "data.system_prompt"),
    **dict.fromkeys(["lr"], "train.learning_rate"),
    **dict.fromkeys(["micro_batch_size", "batch_size", "train_batch_size"], "train.per_device_train_batch_size"),
    **dict.fromkeys(["grad_accum", "gradient_accumulation"], "train.gradient_accumulation_steps"),
    **dict.fromkeys(["num_epochs", "epochs", "max_epochs", "n_epochs"], "train.num_train_epochs"),
    **dict.fromkeys(["steps", "total_steps", "num_steps"], "train.max_steps"),
    **dict.fromkeys(["warmup_ratio", "warmup", "num_warmup_steps"], "train.warmup_steps"),
    **dict.fromkeys(["lr_scheduler", "scheduler"], "train.lr_scheduler_type"),
    **dict.fromkeys(["optimizer"], "train.optim"),
    **dict.fromkeys(["max_norm", "clip_grad_norm", "gradient_clipping"], "train.max_grad_norm"),
    **dict.fromkeys(["neftune", "noise_alpha"], "train.neftune_noise_alpha"),
    **dict.fromkeys(["activation_checkpointing", "enable_activation_checkpointing"], "train.gradient_checkpointing"),
    **dict.fromkeys(["out", "out_dir", "output", "save_dir"], "train.output_dir"),
    **dict.fromkeys(["log_every_n_steps", "log_every"], "train.logging_steps"),
    **dict.fromkeys(["eval_interval", "evals_per_epoch", "eval_every"], "train.eval_steps"),
    **dict.fromkeys(["save_interval", "saves_per_epoch", "save_every"], "train.save_steps"),
    **dict.fromkeys(["early_stopping_steps", "patience"], "train.early_stopping_patience"),
    **dict.fromkeys(["group_by_length"], "train.extra.train_sampling_strategy"),
    **dict.fromkeys(["val_max_samples", "max_eval_samples"], "evaluate.size"),
    **dict.fromkeys(["per_device_eval_batch_size", "eval_batch_size"], "evaluate.batch_size"),
}


@dataclass
class RecipeConfig:
    """What every recipe's Config has. `origins` maps a dotted key to where its value came from; absent: the recipe."""

    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    train: TrainConfig = section(TrainConfig)
    evaluate: EvaluateConfig = section(EvaluateConfig)

    def __post_init__(self) -> None:
        self.recipe: str = ""
        self.origins: dict[str, str] = {}


@dataclass(frozen=True)
class Leaf:
    """One setting: dotted key, type, value, help, unit."""

    key: str
    annotation: Any
    value: Any
    help: str
    unit: str


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
    return Leaf(key, annotation, value, item.metadata.get("help", ""), item.metadata.get("unit", ""))


def resolve(
    config_class: type[RecipeConfig], recipe: str, yaml_path: Path | None = None, overrides: Sequence[str] = ()
) -> RecipeConfig:
    """The recipe's Config with a YAML file and `key=value` words laid over its defaults.

    Raises SettingsError (unknown key, wrong type, unreadable file), SecurityError (a YAML tag that builds objects).
    """
    config = config_class()
    config.recipe = recipe
    known = {leaf.key: leaf for leaf in leaves(config)}
    given: list[tuple[str, Any, str]] = []
    if yaml_path is not None:
        given += [(key, value, f"{yaml_path}:{line}") for key, value, line in read_yaml(yaml_path, known)]
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise SettingsError(f"'{word}' is not a setting: expected key=value.", f"See: finetune_kit show {recipe}")
        given.append((key.strip().lstrip("-"), _parse_word(text), "command line"))
    for written, value, origin in given:
        key = _full_key(written, known, recipe, origin)
        if "." in key and key.split(".")[0] in known:  # one entry of a dict setting, such as a recipe's own {…}
            raise SettingsError(f"{written}: no such setting ({origin}).")
        head, _, entry = _split_dict_entry(key, known)
        leaf = known[head]
        if entry:
            value = {**_get(config, head), entry: value}
        _set(config, head, coerce(value, leaf.annotation, f"{head} ({origin})"))
        config.origins[key] = origin
    return config


def _parse_word(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        return text


def read_yaml(path: Path, known: dict[str, Leaf]) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, line) of every setting in a file; `recipe`, `versions` and `origins` are not settings."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        # compose keeps tags as they are; constructing is what refuses a tag that would build an object
        yaml.safe_load(text)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file.", "Write one, or give settings as key=value.") from None
    except yaml.constructor.ConstructorError as error:
        raise SecurityError(f"{path}: {error.problem}.", "Use plain values only.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return
    yield from _walk(root, "", path, known)


def _walk(node: yaml.Node, prefix: str, path: Path, known: dict[str, Leaf]) -> Iterator[tuple[str, Any, int]]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise SettingsError(f"{path}:{line}: expected 'key: value' lines, found {node.tag.rsplit(':', 1)[-1]}.")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        name = str(key_node.value)
        if name in seen:
            raise SettingsError(f"{path}:{line}: '{prefix}{name}' is written twice (first on line {seen[name]}).")
        seen[name] = line
        key = prefix + name
        if not prefix and name in ("recipe", "versions", "origins"):
            continue
        is_section = key in SECTIONS and key not in known
        if is_section and isinstance(value_node, yaml.MappingNode):
            yield from _walk(value_node, key + ".", path, known)
        else:
            yield key, yaml.safe_load(yaml.serialize(value_node)), line


def recipe_of_yaml(path: Path) -> str:
    """The recipe a YAML file names in `recipe: …`."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file.", "See the recipes: finetune_kit list") from None
    except yaml.constructor.ConstructorError as error:
        raise SecurityError(f"{path}: {error.problem}.", "Use plain values only.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    name = content.get("recipe") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise SettingsError(
            f"{path} does not say which recipe it is for.",
            f"Begin it with 'recipe: lora_sft', or: run RECIPE --config {path}",
        )
    return name


def _full_key(written: str, known: dict[str, Leaf], recipe: str, origin: str) -> str:
    """The dotted key that `written` means, or a SettingsError that names the nearest right one."""
    key = written.replace("-", "_")
    if key in known or _split_dict_entry(key, known)[0]:
        return key
    bare = [name for name in known if name.rsplit(".", 1)[-1] == key]
    if len(bare) == 1:
        return bare[0]
    where = f" ({origin})"
    if len(bare) > 1:
        raise SettingsError(f"{written}: say which one{where}: {' or '.join(bare)}.")
    leaf = key.rsplit(".", 1)[-1]
    elsewhere = KNOWN_ELSEWHERE.get(key) or KNOWN_ELSEWHERE.get(leaf)
    everywhere = [f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in dataclasses.fields(cls)]
    home = elsewhere or next((name for name in everywhere if key in (name, name.split(".")[1])), None)
    if home is not None and home not in known and not _split_dict_entry(home, known)[0]:
        raise SettingsError(
            f"{written} has no effect in {recipe}: the recipe has no section '{home.split('.')[0]}'{where}.",
            f"Leave it out, or take another recipe: finetune_kit list. ({home} is the setting's name.)",
        )
    if elsewhere is None:
        names = list(known) + [name.rsplit(".", 1)[-1] for name in known]
        near = difflib.get_close_matches(key, names, n=1) or difflib.get_close_matches(leaf, names, n=1)
        elsewhere = next((name for name in known if near and near[0] in (name, name.rsplit(".", 1)[-1])), None)
    fix = f"Did you mean {elsewhere}? " if elsewhere else ""
    raise SettingsError(f"{written}: unknown setting{where}.", f"{fix}See all: finetune_kit show {recipe}")


def _split_dict_entry(key: str, known: dict[str, Leaf]) -> tuple[str, str, str]:
    """('train.extra', '.', 'adam_beta2') for train.extra.adam_beta2; (key, '', '') for a plain setting."""
    if key in known:
        return key, "", ""
    for head in known:
        if key.startswith(head + ".") and typing.get_origin(known[head].annotation) is dict:
            return head, ".", key[len(head) + 1 :]
    return "", "", ""


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """`value` as `annotation`, or a SettingsError. YAML 1.1 reads 1e-4 as text; here it is the number it looks like."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(value, arguments, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise SettingsError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}.")
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [coerce(item, arguments[0], where) for item in items]
    if origin is dict:
        if isinstance(value, dict):
            return {str(name): coerce(item, arguments[1], where) for name, item in value.items()}
        raise SettingsError(f"{where}: expected {{key: value}}, found {value!r}.")
    return _coerce_scalar(value, annotation, where)


def _coerce_union(value: Any, arguments: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    options = [option for option in arguments if option is not type(None)]
    fitting = [option for option in options if isinstance(value, typing.get_origin(option) or option)]
    return coerce(value, (fitting or options)[0], where)


def _coerce_scalar(value: Any, annotation: type, where: str) -> Any:
    if annotation is bool and isinstance(value, bool):
        return value
    if annotation in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if annotation is float:
                return number
            if number == int(number):
                return int(number)
        except (ValueError, OverflowError):
            pass
    if annotation is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[annotation]
    raise SettingsError(f"{where}: expected {expected}, found {value!r}.")


def _get(config: RecipeConfig, key: str) -> Any:
    target: Any = config
    for part in key.split("."):
        target = getattr(target, part)
    return target


def _set(config: RecipeConfig, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    setattr(_get(config, parents[0]) if parents else config, name, value)


def to_yaml(config: RecipeConfig, versions: dict[str, str]) -> str:
    """run.yaml: every setting resolved, where the changed ones came from, and the versions; can be run again."""
    content: dict[str, Any] = {"recipe": config.recipe, **dataclasses.asdict(config)}
    content["origins"] = dict(config.origins)
    content["versions"] = versions
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
