"""Our settings -> the trainer's own arguments. The one place that knows how transformers and TRL spell them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import shutil
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit import processes
from finetune_kit.config import RecipeConfig, TrainConfig
from finetune_kit.data.load import Data, placeholder
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import ResourceError, SettingsError
from finetune_kit.evaluation.metrics import choose_metrics
from finetune_kit.generation import evaluation_mode
from finetune_kit.hub import push_checkpoint
from finetune_kit.model import packed
from finetune_kit.model.adapters import covered, is_adapter, parameter_counts
from finetune_kit.model.load import computes_in_bfloat16, device
from finetune_kit.model.proof import PROOF_ROWS, settle_head
from finetune_kit.terminal import doing
from finetune_kit.training.batches import check_batches, check_loader, micro_batch
from finetune_kit.training.checkpoint import begin
from finetune_kit.training.compiling import COMPILED_HERE, compile_where_it_pays
from finetune_kit.training.guard import Guard, watching
from finetune_kit.training.progress import console

# transformers' names for the same AdamW; the fused one runs on every device here and is the fastest.
DEFAULT_OPTIMIZER = "adamw_torch_fused"

# Arguments of the trainers that could not act here: why, and their names (with * for all that begin so).
INERT = {
    "samples are tokens and labels before the trainer sees them: see the data section": (
        *("assistant_only_loss", "completion_only_loss", "chat_template_path", "dataset_text_field", "dataset_kwargs"),
        *("eos_token", "pad_token", "model_init_kwargs"),
    ),
    "held-out rows are measured by finetune_kit, not by the trainer: see train.eval_steps and the evaluate section": (
        *("do_*", "eval_*", "load_best_model_at_end", "greater_is_better", "per_device_eval_batch_size"),
        *("prediction_loss_only", "batch_eval_metrics", "include_for_metrics"),
    ),
    "lengths are counted in the rows": ("length_column_name",),
    "weights and arithmetic follow model.dtype": ("fp16*", "bf16_full_eval"),
    "the reference is the policy's start": ("sync_ref_model", "ref_model_*", "precompute_ref_*"),
    "run the same command again: an unfinished run goes on from its newest whole checkpoint": (
        *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
        *("save_only_model", "enable_jit_checkpoint"),
    ),
    "a run is pushed by the hub section: hub.push, hub.model_id": ("push_to_hub", "hub_*"),
}


def build(
    trainer_class: Any,
    config_class: Any,
    config: RecipeConfig,
    policy: Any,
    tokenizer: Any,
    data: Data,
    rows: Any = None,
    tokenises: bool = False,
    parts: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """A TRL trainer over samples that already are tokens. Settings that cannot act raise SettingsError.

    `rows`: the training rows (a datasets.Dataset) under the names that this trainer reads; data.train where it reads
    those. `tokenises`: it takes text alone when it is made, so it is given ours afterwards. `parts`: what else it is
    made with (ref_model, another processing_class). `arguments`: of `config_class`, from the recipe's own settings.
    """
    from transformers import PrinterCallback

    if config.model.load_in_4bit and (sharding := processes.sharding()):
        raise SettingsError(
            f"model.load_in_4bit: {sharding} was asked for, and 4-bit weights are not cut into shards.",
            "Start it data parallel, with accelerate_config.yaml, or leave model.load_in_4bit out.",
        )
    trainer_config = make_arguments(config_class, config, data, **arguments)
    check_loader(trainer_config, config.train)
    check_parts(trainer_class, trainer_config, policy)
    check_vocabulary(config.model.name_or_path, policy, tokenizer)
    trained = [(parameter, parameter.data) for parameter in policy.parameters() if parameter.requires_grad]
    rows = data.train if rows is None else rows
    folder = Path(trainer_config.output_dir).absolute()
    scratch = folder.with_name(f".{folder.name}.rows")
    text = policy.config.get_text_config()
    routers = getattr(text, "output_router_logits", None)
    try:
        with doing("making the trainer"):
            trainer = trainer_class(
                model=policy,
                args=trainer_config,
                train_dataset=placeholder(data.kind, scratch) if tokenises else rows,
                **{"processing_class": tokenizer, **(parts or {})},
            )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"{trainer_class.__name__} refuses these settings: {error}") from None
    if routers is not None:
        # TRL turns it on in the config, where generation and the saved model would have it, too; the trainers ask for
        # it in each training pass besides
        text.output_router_logits = routers
    if not processes.sharding():  # whose layers are not whole yet
        models = filter(None, (getattr(trainer, "ref_model", None), policy))
        found = [settle_head(one, getattr(trainer, "temperature", 1.0), packed.HEAD_OUTPUTS) for one in models]
        if wrong := found[-1]:
            console.print(f"note: losses are computed from all logits: {wrong}")
    if getattr(trainer, "aux_loss_enabled", False) and not _gives_router_loss(policy):
        trainer.aux_loss_enabled = False  # TRL goes by the config alone, and would multiply what is not there
        console.print("note: trained without a router's loss: TRL cannot compute it for this architecture")
    if tokenises:
        trainer.train_dataset = rows
    processes.barrier()
    if processes.is_main():
        shutil.rmtree(scratch, ignore_errors=True)
    begin(config, tokenizer, data)
    trainer.remove_callback(PrinterCallback)  # it prints the logs as a dict; progress.py says them
    if config.hub.strategy == "every_save":
        trainer.add_callback(_pushes_checkpoints(config))
    trainer.add_callback(watching(Guard(config.train.on_nonfinite, data, trainer, config.train.eval_steps)))
    for parameter, weights in trained:  # TRL rounds adapters of quantised models to bfloat16
        if parameter.dtype != weights.dtype:
            parameter.data = weights
    announce(config, policy, data)
    if config.train.padding_free and (reason := padded_because(config, policy, data)):
        console.print(f"note: padded batches: {reason}")
    if (way := packed.way_of(policy)) is not None and way.chosen:
        console.print(f"note: {way.chosen}", markup=False)
    from finetune_kit.training.collate import plan_in_collator  # which needs torch when it is imported

    planned = steps(config, data, processes.count())
    passes = planned["steps"] * planned.get("passes_in_a_step", 1)
    with doing("compiling layers where it pays"):
        said = compile_where_it_pays(policy, config.train, first_rows(config, data), passes)
    if said:
        console.print(f"note: {said}")
    plan_in_collator(trainer)
    return trainer


def _gives_router_loss(policy: Any) -> bool:
    """Whether TRL can ask a model for its router's loss, which it is asked for once: the configs of Llama 4 and others
    only look like it, TRL reads the number of experts by one name, and Flint's routers say nothing."""
    import torch

    causal, text = policy.get_base_model() if is_adapter(policy) else policy, policy.config.get_text_config()
    counted = hasattr(text, "num_experts") and hasattr(text, "num_experts_per_tok")
    if processes.sharding():  # whose layers are not whole yet
        return counted and "output_router_logits" in inspect.signature(type(causal).forward).parameters
    ids = torch.ones((1, 4), dtype=torch.long, device=causal.device)
    asked = {"labels": ids, "fused_lm_head": True, "output_router_logits": True}
    try:
        with evaluation_mode(policy):
            found = policy(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False
    return getattr(found, "aux_loss", None) is not None


def _pushes_checkpoints(config: RecipeConfig) -> Any:
    """A callback that pushes each checkpoint's weights; where that fails the run says so and goes on."""
    from transformers import TrainerCallback

    def on_save(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            failed = push_checkpoint(config, Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if failed:
                console.print(f"note: checkpoint-{state.global_step} was not pushed: {failed}", markup=False)

    return type("Pushes", (TrainerCallback,), {"on_save": staticmethod(on_save)})()


def check_vocabulary(name: str, policy: Any, tokenizer: Any) -> None:
    """Raises SettingsError where the tokenizer has tokens that the model has no embeddings for."""
    rows, needed = policy.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if rows < needed:
        raise SettingsError(
            f"{name} has embeddings for {rows:,} tokens, its tokenizer has {needed:,}.",
            "Take the tokenizer that the model was trained with.",
        )


def padded_because(config: RecipeConfig, policy: Any, data: Data) -> str:
    """Turn the packed forward on; "" or the reason why batches stay padded."""
    if data.packed:
        return ""  # TRL lays packed rows end to end itself
    if config.train.neftune_noise_alpha:
        return "NEFTune scales its noise by the padded length"
    # trainers that sample may ask their head for a temperature, or for the entropy's gradient
    with doing("proving that packed rows give what padded ones do"):
        return packed.enable(policy, first_rows(config, data), data.kind != "prompt")


def first_rows(config: RecipeConfig, data: Data) -> list[list[int]]:
    """Token ids of the first rows, as many as go through the model at once; of a pair both sides."""
    count = max(PROOF_ROWS, config.train.per_device_train_batch_size)
    first = [data.train[index] for index in range(min(len(data.train), count))]
    return [list(ids) for row in first for ids, _ in sequences(row).values()]


def announce(config: RecipeConfig, policy: Any, data: Data) -> None:
    """Say what is about to be trained, on what, and what the ledger noted."""
    trained, total = parameter_counts(policy)
    counts, planned = data.ledger.train, steps(config, data, processes.count())
    console.print(
        f"{counts.rows:,} training rows ({counts.truncated} truncated, {counts.lost} dropped), "
        f"{len(data.held_out):,} held out; {counts.supervised_tokens:,} of {counts.tokens:,} tokens are trained on"
    )
    budget = config.train.max_tokens_per_batch
    cut = f" in {planned['passes_in_a_step']} passes of at most {budget:,} tokens" if budget else ""
    console.print(
        f"{trained:,} of {total:,} parameters trained, {planned['steps']} steps of {planned['rows_in_a_step']} rows"
        f"{cut}, on {processes.where(policy)}"
    )
    if is_adapter(policy):
        for line in covered(policy).in_words():
            console.print(line, markup=False)
    for note in data.ledger.notes:
        console.print(f"note: {note}")


def steps(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, int]:
    """Rows and optimizer steps, as the trainer counts them.

    A step of PPO is an update of `batch_size` prompts. GRPO and RLOO count the completions of a prompt as rows, and
    leave out the last step of an epoch where it would not be whole.
    """
    train = config.train
    group = getattr(config, "num_generations", None)
    rows = len(data.train) * (group or 1)
    if isinstance(update := getattr(config, "batch_size", None), int):
        updates = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * rows / update)
        an_epoch = math.ceil(rows / update)
        return {"rows_in_an_epoch": rows, "rows_in_a_step": update, "steps_in_an_epoch": an_epoch, "steps": updates}
    if data.packed:  # best-fit packing comes within a few percent of full rows
        rows = math.ceil(data.ledger.train.tokens / config.data.max_length)
    together = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
    an_epoch = rows // together if group else math.ceil(rows / together)
    total = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)
    return {
        "rows_in_an_epoch": rows,
        "rows_in_a_step": together,
        "passes_in_a_step": micro_batch(train, data, processes)[1],
        "steps_in_an_epoch": an_epoch,
        "steps": total,
    }


def make_arguments(config_class: Any, config: RecipeConfig, data: Data, **own: Any) -> Any:
    """An instance of `config_class`; `own`: arguments from the recipe's own settings. What it refuses by itself is a
    SettingsError, too."""
    return instance(config_class, config, training_arguments(config_class, config, data), own)


def instance(config_class: Any, config: RecipeConfig, arguments: dict[str, Any], own: dict[str, Any]) -> Any:
    """The same from arguments that are known, such as those before any data are read."""
    for name in own:
        if name in config.train.extra:
            raise SettingsError(f"train.extra.{name}: the recipe sets it.", f"See its own settings, such as {name}=…")
    try:
        return config_class(**{**arguments, **own})
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{config_class.__name__} refuses these settings: {error}") from None
    except ImportError as error:
        raise ResourceError(f"A setting needs a package that is not installed: {error}") from None


def check_parts(trainer_class: Any, arguments: Any, policy: Any) -> None:
    """Look for optimizer, schedule and trackers now: the trainer would make them only when it starts. `policy`: None
    before it is loaded; optimizers that are made of its layers are looked at for their package alone.

    Raises SettingsError where an argument of theirs is wrong or missing, ResourceError where a package is.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    _try("optim", lambda: trainer_class.get_optimizer_cls_and_kwargs(arguments, policy), "optim_args", policy)
    check_schedule(arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs or {})
    _try("report_to", lambda: [tracker() for tracker in get_reporting_integration_callbacks(arguments.report_to)])


def check_schedule(name: str, known: dict[str, Any]) -> None:
    """Raises SettingsError where a schedule by transformers' name cannot be made with the arguments `known`."""
    import torch
    from transformers import get_scheduler

    any_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    _try(
        "lr_scheduler_type",
        lambda: get_scheduler(name, any_optimizer, 1, 2, scheduler_specific_kwargs=known),
        "lr_scheduler_kwargs",
    )


def _try(name: str, make: Callable[[], Any], own: str = "", policy: Any = True) -> None:
    """Make what train.`name` asks for; `own`: where its own arguments are given."""
    try:
        make()
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        if policy is None and "You need to pass a" in str(error):  # the model
            return
        message = f"train.{name}: {error}"
        if isinstance(error, ImportError | RuntimeError) or "install" in str(error):
            raise ResourceError(message) from None
        raise SettingsError(message, f"Its own arguments: train.extra.{own}" if own else "") from None


def training_arguments(config_class: Any, config: RecipeConfig, data: Data) -> dict[str, Any]:
    """The keyword arguments of `config_class`, with `train.extra` checked against its fields."""
    check_train(config.train)
    check_best_metric(config, data)
    check_batches(config, data)
    batch = micro_batch(config.train, data, processes.count())
    return arguments_of(config_class, config, data.kind, batch, data.packed)


def arguments_of(
    config_class: Any, config: RecipeConfig, kind: str, batch: tuple[int, int], packed_rows: bool
) -> dict[str, Any]:
    """The same from the few facts that the data add: their kind, (rows in a forward pass, passes in a step), and
    whether they are packed."""
    train, (rows, accumulation) = config.train, batch
    arguments: dict[str, Any] = {
        "output_dir": train.output_dir,
        "learning_rate": train.learning_rate,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulation,
        # KTO's rows come shuffled, each beside the one that its KL estimate is taken from
        "train_sampling_strategy": "sequential" if kind == "labelled_completion" else train.train_sampling_strategy,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps,
        "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": train.lr_scheduler_type,
        "optim": DEFAULT_OPTIMIZER if train.optim == "auto" else train.optim,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "gradient_checkpointing": train.gradient_checkpointing,
        "logging_steps": train.logging_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "save_total_limit": None,  # fit.py rotates, after a checkpoint counts
        "seed": train.seed,
        "report_to": train.report_to,
        # held-out losses are our own (fit.py): the trainer's is a mean of batch means
        "eval_strategy": "no",
        # a NaN loss is shown as it is, not as 0.0
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "disable_tqdm": True,
        "use_cpu": device().type == "cpu",
        "bf16": computes_in_bfloat16(),
        "dataloader_pin_memory": device().type == "cuda",
        # the samples have their final length; only packing still needs the row's length
        "max_length": config.data.max_length if packed_rows else None,
        "packing": packed_rows,
        "packing_strategy": "bfd",
    }
    known = {item.name for item in dataclasses.fields(config_class)}
    for name, value in train.extra.items():
        arguments[name] = _extra(name, value, arguments, config_class)
    for name in COMPILED_HERE:  # layer by layer (training/compiling.py); the trainer would compile the whole model
        arguments.pop(name, None)
    if device().type == "cuda" and kind != "prompt":  # batches are put together and planned beside the training
        arguments.setdefault("dataloader_num_workers", 1)
    arguments.setdefault("ddp_find_unused_parameters", False)  # every trained weight is used in every pass
    return {name: value for name, value in arguments.items() if name in known}


def check_train(train: TrainConfig) -> None:
    """Refuse what the trainer's own evaluation would have to steer: there is none (fit.py has ours)."""
    if train.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        raise SettingsError(
            f"train.lr_scheduler_type={train.lr_scheduler_type} needs the trainer's own evaluation, which is not used.",
            "Try train.lr_scheduler_type=cosine",
        )


def check_best_metric(config: RecipeConfig, data: Data) -> None:
    """Refuse a metric_for_best_model that will not be measured."""
    name = config.train.metric_for_best_model
    if name == "loss":
        return
    answered = data.kind != "text" and config.evaluate.size > 0
    metrics = choose_metrics(config.evaluate.metrics, data, config.evaluate.hub_metrics) if answered else []
    paired = ["preference_accuracy"] if data.kind in ("preference", "labelled_completion") else []
    known = ["loss", *paired, *(metric.name for metric in metrics)]
    if name not in known:
        raise SettingsError(f"train.metric_for_best_model={name} is not measured here.", f"Known: {', '.join(known)}")


def _extra(name: str, value: Any, ours: dict[str, Any], config_class: Any) -> Any:
    hints, trainer_config = typing.get_type_hints(config_class), config_class.__name__
    first_class = {item.name for item in dataclasses.fields(TrainConfig)}
    if name in first_class:
        raise SettingsError(f"train.extra.{name}: a setting of its own.", f"Write train.{name}={value}")
    if name in ours:
        raise SettingsError(f"train.extra.{name} is set by finetune_kit from other settings.", "Leave it out.")
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f"Did you mean train.extra.{near[0]}?" if near else "See the fields of " + trainer_config
        raise SettingsError(f"train.extra.{name}: {trainer_config} has no such argument.", hint)
    for reason, inert in INERT.items():
        if any(name == word or (word.endswith("*") and name.startswith(word[:-1])) for word in inert):
            raise SettingsError(f"train.extra.{name} has no effect: {reason}.", "Leave it out.")
    options = _options(hints[name])
    if options <= {bool, int, float, str, types.NoneType} and type(value) not in options:
        expected = " or ".join(sorted(kind.__name__.replace("NoneType", "null") for kind in options))
        raise SettingsError(f"train.extra.{name}: expected {expected}, found {value!r}.")
    return value


def _options(hint: Any) -> set[Any]:
    """The types that a value of this hint may have: {float, int, NoneType} for float | None."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = set(typing.get_args(hint)) if is_union else {hint}
    return options | {int} if float in options else options
