"""What settings may not be, told before anything is read."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.settings.aliases import together
from finetune_kit.settings.schema import (
    BY_THE_USER,
    COMMAND_LINE,
    HubConfig,
    RecipeConfig,
    ToolsRecipeConfig,
    TrainConfig,
    leaves,
)

MUON = "muon"  # beside transformers' names of optimizers: torch's own
STABLE = "warmup_stable_decay"
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")


def check(config: RecipeConfig) -> None:
    """Raises SettingsError for a number out of range, a name unknown to transformers, a setting that has no effect;
    SecurityError for a setting that would run a stranger's code, or holds a token."""
    if found := out_of_range(config):
        raise together(found)
    lora, train = config.lora, config.train
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
    if lora is not None and lora.r and train.optim == MUON:
        raise SettingsError(
            f"{_named(config, 'train.optim')}: muon is for whole matrices, and {config.recipe} trains an adapter.",
            "Leave it out.",
        )
    if train.decay_steps != TrainConfig.decay_steps and train.lr_scheduler_type != STABLE:
        raise SettingsError(
            f"{_named(config, 'train.decay_steps')} has no effect with lr_scheduler_type={train.lr_scheduler_type}.",
            f"Add lr_scheduler_type={STABLE}, or leave it out.",
        )
    for name in ("lr_scheduler_type", "optim"):
        _check_name(name, getattr(train, name), _named(config, f"train.{name}"))
    _check_trust(config)
    _check_tools(config)
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
    if model.trust_remote_code and config.origins.get("model.trust_remote_code") not in BY_THE_USER:
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
    if "/" in kernel and config.origins.get("model.attn_implementation") not in BY_THE_USER:
        raise SecurityError(
            f"{_named(config, 'model.attn_implementation')}: {kernel} would be fetched from the Hub and run as code.",
            f"Give it on the command line if you trust it: model.attn_implementation={kernel}",
        )
    for leaf in leaves(config):
        if _TOKEN.search(str(leaf.value)):  # the message must not hold it
            raise SecurityError(
                f"{_named(config, leaf.key)} holds what looks like a token; it would stand in the run's files.",
                "Remove it. The Hub's token is read from HF_TOKEN, or put away by: hf auth login",
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
        if leaf.key in ("tools", "data.tools") and any(".py" in tool for tool in leaf.value):
            named[leaf.key] = f"[{','.join(leaf.value)}]"
        if leaf.key == "reward.sources" and any(".py" in source for source in leaf.value):
            named[leaf.key] = f"[{', '.join(leaf.value)}]"
    for name, value in config.train.extra.items():
        if name in LEADS_ELSEWHERE and isinstance(value, str):
            named[f"train.extra.{name}"] = value
    for key, value in named.items():
        origin = config.entry_origins.get(key) or config.origins.get(key)
        origin = origin or config.origins.get(key.rpartition(".")[0], COMMAND_LINE)
        if origin not in BY_THE_USER:
            raise SecurityError(
                f"{key} ({origin}): {value} would be run or followed, and a file names it, not you.",
                f"If you trust it, say so on the command line: '{key}={value}'",
            )


def _check_tools(config: RecipeConfig) -> None:
    """Raises SettingsError for tools in a recipe that cannot use them, or for limits of none."""
    if not isinstance(config, ToolsRecipeConfig):
        if config.data.tools:
            why = "its rollouts call no tools" if config.kind == "prompt" else "its answers call no tools"
            raise SettingsError(
                f"{_named(config, 'data.tools')} has no effect in {config.recipe}: {why}.",
                "Recipes with tools: lora_sft, full_sft, qlora_sft, dpo, ppo, grpo.",
            )
        return
    if not config.data.apply_chat_template and config.tools:
        raise SettingsError(
            f"{_named(config, 'tools')}: bare prompts have no turns in which a tool could be called.",
            "Leave out data.apply_chat_template=false.",
        )
    for name in ("max_tool_calls", "tool_timeout"):
        if not config.tools and getattr(config, name) != getattr(ToolsRecipeConfig, name):
            raise SettingsError(f"{_named(config, name)} has no effect without tools.", "Add tools=calculator")


def own_tools(config: RecipeConfig) -> list[str]:
    """Tools that are code which a file names, and not the person who starts the command, as key=value words."""
    named = {"tools": config.tools, "data.tools": config.data.tools}
    return [
        f"{key}=[{','.join(tools)}]"
        for key, tools in named.items()
        if any(".py" in tool for tool in tools) and config.origins.get(key, COMMAND_LINE) not in BY_THE_USER
    ]


def check_own_tools(config: RecipeConfig) -> None:
    """Raises SecurityError where a run's folder alone names a user's own tools, which would be run."""
    if named := own_tools(config):
        raise SecurityError(
            f"run.yaml names tools that would be run as code: {', '.join(named)}.",
            f"If you trust them, say so on the command line: '{named[0]}', or measure without: tools=[] data.tools=[]",
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
    choices += [MUON] if setting == "optim" else []
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(choices)}"
        raise SettingsError(f"{where}: '{value}' is not known to transformers.", hint)
