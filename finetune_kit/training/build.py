"""Make a TRL trainer from our settings, announce the run, and begin its folder."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.data.trl_columns import placeholder
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.models.adapters import covered, is_adapter, parameter_counts
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.packing import forward
from finetune_kit.packing.proof import PROOF_ROWS, settle_head
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import doing
from finetune_kit.training.arguments import check_parts, make_arguments
from finetune_kit.training.batching import check_loader, micro_batch
from finetune_kit.training.callbacks import pushes_checkpoints
from finetune_kit.training.checkpoint import begin
from finetune_kit.training.compiling import compile_where_it_pays
from finetune_kit.training.guard import Guard, guard_callback
from finetune_kit.training.progress import console


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
    compute_loss_func: Callable[..., Any] | None = None,
    **arguments: Any,
) -> Any:
    """A TRL trainer over samples that already are tokens. Settings that cannot act raise SettingsError.

    `rows`: the training rows (a datasets.Dataset) under the names that this trainer reads; data.train where it reads
    those. `tokenises`: it takes text alone when it is made, so it is given ours afterwards. `parts`: what else it is
    made with (ref_model, another processing_class). `arguments`: of `config_class`, from the recipe's own settings.
    `compute_loss_func`: a loss of one's own, for trainers that take one, such as SFTTrainer: called with the model's
    outputs (logits (b, w, vocabulary)), the labels (b, w; -100 where nothing is trained) and num_items_in_batch, the
    labels of the whole step; it returns the loss of these rows, a tensor without dimensions.
    """
    from transformers import PrinterCallback

    if config.model.load_in_4bit and (sharding := distributed.sharding()):
        raise SettingsError(
            f"model.load_in_4bit: {sharding} was asked for, and 4-bit weights are not cut into shards.",
            "Start it data parallel, with accelerate_config.yaml, or leave model.load_in_4bit out.",
        )
    steps(config, data, distributed.count())
    trainer_config = make_arguments(config_class, config, data, **arguments)
    check_loader(trainer_config, config.train)
    check_parts(trainer_class, trainer_config, policy)
    parts = dict(parts or {})
    if compute_loss_func is not None:
        if "compute_loss_func" not in inspect.signature(trainer_class.__init__).parameters:
            raise SettingsError(
                f"{trainer_class.__name__} takes no compute_loss_func.",
                "SFTTrainer does; of another trainer override compute_loss in a subclass.",
            )
        parts["compute_loss_func"] = compute_loss_func
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
                **{"processing_class": tokenizer, **parts},
            )
    except (ValueError, ImportError, NotImplementedError) as error:
        raise SettingsError(f"{trainer_class.__name__} refuses these settings: {error}") from None
    if routers is not None:
        # TRL turns it on in the config, where generation and the saved model would have it, too; the trainers ask for
        # it in each training pass besides
        text.output_router_logits = routers
    if not distributed.sharding():  # whose layers are not whole yet
        models = filter(None, (getattr(trainer, "ref_model", None), policy))
        found = [settle_head(one, getattr(trainer, "temperature", 1.0), forward.HEAD_OUTPUTS) for one in models]
        if wrong := found[-1]:
            console.print(f"note: losses are computed from all logits: {wrong}")
    if tokenises:
        trainer.train_dataset = rows
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(scratch, ignore_errors=True)
    begin(config, tokenizer, data)
    trainer.remove_callback(PrinterCallback)  # it prints the logs as a dict; progress.py says them
    if config.hub.strategy == "every_save":
        trainer.add_callback(pushes_checkpoints(config))
    trainer.add_callback(guard_callback(Guard(config.train.on_nonfinite, data, trainer, config.train.eval_steps)))
    for parameter, weights in trained:  # TRL rounds adapters of quantised models to bfloat16
        if parameter.dtype != weights.dtype:
            parameter.data = weights
    announce(config, policy, data)
    if config.train.padding_free and (reason := padded_because(config, policy, data)):
        console.print(f"note: padded batches: {reason}")
    if getattr(trainer, "aux_loss_enabled", False) and not _gives_router_loss(policy):
        trainer.aux_loss_enabled = False  # TRL goes by the config alone, and would multiply what is not there
        console.print("note: trained without a router's loss: TRL cannot compute it for this architecture")
    if (way := forward.packing_of(policy)) is not None and way.chosen:
        console.print(f"note: {way.chosen}", markup=False)
    from finetune_kit.training.collate import plan_in_collator  # which needs torch when it is imported

    planned = steps(config, data, distributed.count())
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
    if distributed.sharding():  # whose layers are not whole yet
        return counted and "output_router_logits" in inspect.signature(type(causal).forward).parameters
    ids = torch.ones((1, 4), dtype=torch.long, device=causal.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "output_router_logits": True}
    try:
        with evaluation_mode(policy):
            found = policy(**given, labels=ids, fused_lm_head=True)
            own = policy(**given)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False
    if (way := forward.packing_of(policy)) is not None and getattr(own, "aux_loss", None) is None:
        way.own_head = False  # Llama 4's own forward pass gives no router's loss, TRL's head makes one
    return getattr(found, "aux_loss", None) is not None


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
        return forward.enable(policy, first_rows(config, data), data.kind != "prompt")


def first_rows(config: RecipeConfig, data: Data) -> list[list[int]]:
    """Token ids of the first rows, as many as go through the model at once; of a pair both sides."""
    count = max(PROOF_ROWS, config.train.per_device_train_batch_size)
    first = [data.train[index] for index in range(min(len(data.train), count))]
    return [list(ids) for row in first for ids, _ in sequences(row).values()]


def announce(config: RecipeConfig, policy: Any, data: Data) -> None:
    """Say what is about to be trained, on what, and what the ledger noted."""
    trained, total = parameter_counts(policy)
    planned = steps(config, data, distributed.count())
    console.print(rows_in_words(data))
    budget = config.train.max_tokens_per_batch
    counted = "rows" if config.num_generations is None else "completions"
    cut = f" in {planned['passes_in_a_step']} passes of at most {budget:,} tokens" if budget else ""
    console.print(
        f"{trained:,} of {total:,} parameters trained, {planned['steps']} steps of {planned['rows_in_a_step']} "
        f"{counted}{cut}, on {distributed.where(policy)}"
    )
    if is_adapter(policy):
        for line in covered(policy).in_words():
            console.print(line, markup=False)
    for note in data.ledger.notes:
        console.print(f"note: {note}", markup=False)


def rows_in_words(data: Data) -> str:
    """How many rows are trained on and held out, and how many of their tokens."""
    counts = data.ledger.train
    rows = "prompts" if data.kind == "prompt" else "rows"
    tokens = f"{counts.supervised_tokens:,} of {counts.tokens:,} tokens are trained on"
    return (
        f"{counts.rows:,} training {rows} ({counts.truncated} truncated, {counts.lost} dropped), "
        f"{len(data.held_out):,} held out; {f'{counts.tokens:,} tokens' if data.kind == 'prompt' else tokens}"
    )


def steps(config: RecipeConfig, data: Data, processes: int = 1) -> dict[str, int]:
    """Rows and optimizer steps, as the trainer counts them.

    A step of PPO is an update of `batch_size` prompts. GRPO and RLOO count the completions of a prompt as rows, and
    leave out the last step of an epoch where it would not be whole. Raises DataError where none is.
    """
    train = config.train
    group = config.num_generations
    rows = len(data.train) * (group or 1)
    if isinstance(update := config.batch_size, int):
        updates = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * rows / update)
        an_epoch = math.ceil(rows / update)
        return {"rows_in_an_epoch": rows, "rows_in_a_step": update, "steps_in_an_epoch": an_epoch, "steps": updates}
    if data.packed:  # best-fit packing comes within a few percent of full rows
        rows = math.ceil(data.ledger.train.tokens / config.data.max_length)
    together = train.per_device_train_batch_size * train.gradient_accumulation_steps * processes
    an_epoch = rows // together if group else math.ceil(rows / together)
    if group and not an_epoch:
        raise _no_whole_step(config, len(data.train), group, together, processes)
    total = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * an_epoch)
    return {
        "rows_in_an_epoch": rows,
        "rows_in_a_step": together,
        "passes_in_a_step": micro_batch(train, data, processes)[1],
        "steps_in_an_epoch": an_epoch,
        "steps": total,
    }


def _no_whole_step(config: RecipeConfig, prompts: int, group: int, together: int, processes: int) -> DataError:
    """The error of a trainer of groups that would leave every step out, and train nothing."""
    train = config.train
    passes = train.gradient_accumulation_steps * processes
    whole = group // math.gcd(group, train.gradient_accumulation_steps)
    fits = prompts * group // passes // whole * whole
    fewer = f"Set train.per_device_train_batch_size={fits}, or give" if fits else "Give"
    return DataError(
        f"{prompts} training prompts have {prompts * group} completions (num_generations={group}), and a step takes "
        f"{together}: none would be whole, and nothing trained.",
        f"{fewer} {-(-together // group)} prompts or more.",
    )
