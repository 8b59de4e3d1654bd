"""Make a TRL trainer from our settings."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.data.trl_columns import placeholder
from finetune_kit.errors import SettingsError
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.packing import forward
from finetune_kit.packing.proof import PROOF_ROWS, settle_head
from finetune_kit.settings.checks import MUON
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import doing
from finetune_kit.training.arguments import check_parts, make_arguments, schedule_arguments
from finetune_kit.training.batching import check_loader
from finetune_kit.training.callbacks import pushes_checkpoints
from finetune_kit.training.compiling import compile_where_it_pays
from finetune_kit.training.guard import Guard, guard_callback
from finetune_kit.training.progress import console
from finetune_kit.training.steps import steps


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
    """A TRL trainer over samples that already are tokens. Settings that have no effect raise SettingsError.

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
    planned = steps(config, data, distributed.count())
    schedule = schedule_arguments(config.train, planned["steps"])
    trainer_config = make_arguments(config_class, config, data, **schedule, **arguments)
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
    if config.train.optim == MUON:
        from finetune_kit.training.muon import matrices_of, muon_of  # which needs torch when it is imported

        matrices_of(policy)  # it may refuse
        trainer.optimizer_cls_and_kwargs = muon_of(config.train)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(scratch, ignore_errors=True)
    trainer.remove_callback(PrinterCallback)  # it prints the logs as a dict; progress.py says them
    if config.hub.strategy == "every_save":
        trainer.add_callback(pushes_checkpoints(config))
    trainer.add_callback(guard_callback(Guard(config.train.on_nonfinite, data, trainer, config.train.eval_steps)))
    for parameter, weights in trained:  # TRL rounds adapters of quantised models to bfloat16
        if parameter.dtype != weights.dtype:
            parameter.data = weights
    if config.train.padding_free and (reason := padded_because(config, policy, data)):
        console.print(f"note: padded batches: {reason}")
    if getattr(trainer, "aux_loss_enabled", False) and not _gives_router_loss(policy):
        trainer.aux_loss_enabled = False  # TRL goes by the config alone, and would multiply what is not there
        console.print("note: trained without a router's loss: TRL cannot compute it for this architecture")
    if (way := forward.packing_of(policy)) is not None and way.chosen:
        console.print(f"note: {way.chosen}", markup=False)
    from finetune_kit.training.collate import plan_in_collator  # which needs torch when it is imported

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
            "Use the tokenizer that the model was trained with.",
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
