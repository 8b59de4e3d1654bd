"""Settings: typed sections, and one strict loader that knows where each value came from.

Order of precedence: recipe default < YAML file < `key=value` on the command line. Leaf names are those of transformers,
PEFT and TRL. A key that is unknown, of the wrong type, or without effect is a `SettingsError`, never a silent no-op.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal


def setting(default: Any, help: str, unit: str = "", within: str = "") -> Any:
    """A dataclass field with its one line of help, its unit, and the interval for its numbers, such as [0, 1).

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
    bnb_4bit_use_double_quant: bool = setting(True, "quantise the blocks' scales too: saves 0.37 bit per weight")


@dataclass
class LoraConfig:
    r: int = setting(
        16, "rank of the adapter; 0 (not in lora_sft): no adapter, all weights are trained", within="[0, inf)"
    )
    lora_alpha: int = setting(
        32, "the update is scaled by lora_alpha / r (/ sqrt(r) with use_rslora)", within="[1, inf)"
    )
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", "share", within="[0, 1)")
    target_modules: str | list[str] = setting(
        "all-linear",
        "module names to adapt, or all-linear: every linear layer and expert of the decoder, no router, no head",
    )
    target_parameters: list[str] = setting([], "stacked experts to adapt by PEFT's names, such as experts.down_proj")
    modules_to_save: list[str] = setting([], "modules trained and saved in full, such as lm_head")
    use_rslora: bool = setting(False, "rank-stabilised scaling (arXiv 2312.03732)")
    use_dora: bool = setting(False, "weight-decomposed LoRA (arXiv 2402.09353)")
    init_from: str | None = setting(None, "folder of an adapter to continue from; keeps its rank and modules")


@dataclass
class DataConfig:
    path: str | list[str] = setting(
        "reasoning_gym/word_sequence_reversal", "file, folder, Hub id or reasoning_gym/<task>; a list mixes them"
    )
    weights: list[float] = setting(
        [], "with several paths: their shares of the training rows; unset: all rows", within="[0, inf)"
    )
    name: str | None = setting(None, "configuration of the Hub data set")
    split: str = setting("train", "split of the Hub data set to train on")
    revision: str | None = setting(None, "commit, tag or branch of the Hub data set")
    columns: dict[str, str] = setting({}, "your columns and what they are: {your_column: question, other: answer}")
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
    packing: bool | None = setting(
        None, "several samples in one row, which can't see each other; unset: plain text only"
    )
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
        "text",
        "special tokens such as <|im_end|> in a row's text; text: plain text, refuse: drop the row, keep: tokens",
    )
    tools: list[str] = setting(
        [], "tools that rows without any are offered (calculator: what they calculate becomes calls); unset: as `tools`"
    )
    merge_turns: bool = setting(False, "join consecutive user turns with a blank line; false: refuse such rows")
    skip_bad_rows: int = setting(
        0, "unreadable rows to skip and count before one stops the run", "rows", within="[0, inf)"
    )
    max_lost: float = setting(0.05, "largest share of rows dropped before the run refuses", "share", within="[0, 1]")


@dataclass
class TrainConfig:
    output_dir: str | None = setting(None, "the run's folder; unset: runs/<recipe>, or the next free -2, -3, …")
    learning_rate: float = setting(2e-5, "peak learning rate", within="[0, 1]")
    per_device_train_batch_size: int = setting(8, "rows per forward pass and device", "rows", within="[1, inf)")
    gradient_accumulation_steps: int = setting(1, "forward passes per optimizer step", within="[1, inf)")
    max_tokens_per_batch: int | None = setting(
        None, "limit per forward pass, padding included; a step keeps its rows, cut differently", "tokens", "[1, inf)"
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = setting(
        "random", "order of the rows; group_by_length: rows of similar length share a step"
    )
    num_train_epochs: float = setting(1.0, "passes over the training rows", "epochs", within="(0, inf)")
    max_steps: int = setting(-1, "optimizer steps; above 0 it overrides num_train_epochs", "steps", within="[-1, inf)")
    warmup_steps: float = setting(
        0.0, "linear warm-up; below 1: a share of all steps", "steps or share", within="[0, inf)"
    )
    lr_scheduler_type: str = setting("linear", "schedule by transformers' name: linear, cosine, constant, …")
    decay_steps: float = setting(
        0.2, "of warmup_stable_decay: its last steps, in which the rate falls", "steps or share", within="(0, inf)"
    )
    optim: str = setting("auto", "optimizer by transformers' name, or muon; auto: fused AdamW")
    weight_decay: float = setting(0.0, "decoupled weight decay of the optimizer", within="[0, inf)")
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this global norm", within="[0, inf)")
    on_nonfinite: Literal["stop", "skip", "rollback"] = setting(
        "stop", "a loss or gradient that is not finite: stop; skip that step; or also go back to the last checkpoint"
    )
    neftune_noise_alpha: float | None = setting(None, "noise on embeddings (arXiv 2310.05914)", within="[0, inf)")
    padding_free: bool = setting(
        True, "skip padding, compute shared beginnings once and the head only at labels: the same numbers, faster"
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
        2, "checkpoints to keep; the newest and the best are always kept", within="[1, inf)"
    )
    early_stopping_patience: int | None = setting(
        None, "held-out losses without improvement before the run stops", "evaluations", within="[1, inf)"
    )
    metric_for_best_model: str = setting(
        "loss", "what decides the best checkpoint and when to stop: loss, or a metric of the report"
    )
    seed: int = setting(0, "seed of the adapter's start, the order of rows and dropout", within="[0, 4294967295]")
    report_to: list[str] = setting([], "trackers by transformers' name: tensorboard, trackio, wandb, …")
    extra: dict[str, Any] = setting({}, "any other argument of the trainer, checked against its own dataclass")


@dataclass
class EvaluateConfig:
    size: int = setting(128, "held-out prompts answered before and after; 0: none", "rows", within="[0, inf)")
    metrics: list[str] = setting(
        [], "scores of the answers: task_score, exact_match, final_number, rouge, bleu; unset: what the data allows"
    )
    reward_model: str | None = setting(None, "a reward model's run or Hub id that scores the answers before and after")
    max_new_tokens: int | None = setting(
        None, "longest answer; unset: the longest held-out answer + 8", "tokens", within="[1, inf)"
    )
    batch_size: int = setting(32, "prompts answered together, and rows scored together", "rows", within="[1, inf)")
    general_text: bool = setting(True, "also measure the loss on a fixed general text, to see forgetting")
    bootstrap_samples: int = setting(2000, "resamples behind each 95 % interval", within="[1, inf)")
    hub_metrics: list[str] = setting([], "metric scripts to fetch and RUN from the Hub; none by default")
    safety: str | None = setting(
        None, "prompts to measure refusals on: xstest, or a file or Hub id that says which are harmful; null: none"
    )
    safety_size: int = setting(48, "prompts of evaluate.safety, half of them harmful", "rows", within="[2, inf)")
    safety_max_new_tokens: int = setting(32, "longest answer to one of them", "tokens", within="[1, inf)")
    safety_judge: str | None = setting(
        None, "a reward model's run or Hub id that says which answers refuse; unset: phrases"
    )
    choices: list[str] = setting([], "multiple choice by log-likelihood: files or Hub ids of questions with choices")
    fairness: str | None = setting(None, "rows of BBQ for accuracy and bias score: a file or Hub id")
    choices_size: int = setting(256, "questions of each of choices and fairness, spread evenly", "rows", "[1, inf)")
    guards: list[str] = setting(
        [], "what must not get worse: metrics of the report, safety, fairness, choices, or a file of questions"
    )


@dataclass
class HubConfig:
    model_id: str | None = setting(None, "where the run is pushed to: user/name")
    push: bool = setting(False, "push the finished run; token and rights are checked before training")
    private: bool = setting(True, "make the repository private; false: public")
    strategy: Literal["end", "every_save"] = setting(
        "end", "push only at the end, or also each checkpoint's weights into checkpoint-N/"
    )


COMMAND_LINE = "command line"  # the origin of what was typed
KEYWORD = "keyword"  # of what a program gave
BY_THE_USER = (COMMAND_LINE, KEYWORD)  # and not by a file, which a stranger may have written
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
    came from; absent: the recipe. `allow_changed`: settings that may change on resume.
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

    # what a recipe may have besides: it declares them as fields, and nothing below asks whether one is there
    if TYPE_CHECKING:
        lora: LoraConfig | None = None
        reward: Any = None  # a RewardConfig (rewards/settings.py)
        tokenizer: Any = None  # a TokenizerConfig (models/new_tokenizer.py)
        beta: float = 1.0
        num_generations: int | None = None  # completions of a prompt that are judged against each other
        batch_size: int | None = None  # prompts of an update of PPO
        precompute_ref_log_probs: bool = False
        tools: list[str] = field(default_factory=list)  # of ToolsRecipeConfig
        max_tool_calls: int = 8
        tool_timeout: float = 10.0
        loss_type: list[str] | None = None
        loss_weights: list[float] = field(default_factory=list)
    else:
        lora = reward = tokenizer = num_generations = batch_size = loss_type = None
        beta, precompute_ref_log_probs, loss_weights = 1.0, False, ()
        tools, max_tool_calls, tool_timeout = (), 8, 10.0

    @property
    def micro_batch_dependence(self) -> str:
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


@dataclass
class ToolsRecipeConfig(RecipeConfig):
    """A recipe whose answers, before and after, may call tools."""

    tools: list[str] = setting(
        [],
        "tools that answers may call: calculator, python, search:<folder or file>, my_tools.py:function; "
        "unset: as data.tools",
    )
    max_tool_calls: int = setting(8, "calls in one answer, beyond which a call gets an error", within="[1, inf)")
    tool_timeout: float = setting(10.0, "longest call of a tool", "seconds", within="(0, inf)")


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
