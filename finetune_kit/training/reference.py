"""The reference of preference training: the policy as it starts. Its log-probabilities are computed once and kept."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import NumericsError, SettingsError
from finetune_kit.evaluation.loss import row_losses
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.device import computes_in_bfloat16
from finetune_kit.models.embedded import cache_folder
from finetune_kit.models.inference import evaluation_mode
from finetune_kit.models.load import load_base
from finetune_kit.models.provenance import base_record, weights_stamp
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.progress_bar import progress_bar
from finetune_kit.system.terminal import doing
from finetune_kit.training.progress import console

COLUMNS = {"chosen": "ref_chosen_logps", "rejected": "ref_rejected_logps"}
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # losses in which TRL uses label_smoothing
ALIKE = 1e-4  # relative difference of two float32 log-probabilities of a whole answer, computed in different batches


def frozen_copy(policy: Any, config: Any) -> dict[str, Any]:
    """What a trainer of TRL is made with as its reference: nothing where an adapter is trained, whose reference is the
    model without it, or where the numbers are computed beforehand; else the start once more, frozen."""
    if is_adapter(policy) or config.precompute_ref_log_probs:
        return {}
    return {"ref_model": load_base(config.model, trained_in_full=True).requires_grad_(False)}


def release_copy(trainer: Any, config: Any) -> None:
    """Let go of the frozen copy of an adapter that TRL adds, where it is not needed: a fresh adapter's start is the
    model without it, and numbers computed beforehand need no model at all. A copy that stays loses its dropout."""
    import torch

    policy = trainer.model
    if not is_adapter(policy) or "ref" not in policy.peft_config:
        return
    if not config.lora.init_from or config.precompute_ref_log_probs:
        policy.delete_adapter("ref")
        return
    for module in policy.modules():  # a reference is the same each time it is asked
        dropout = getattr(module, "lora_dropout", {})
        if "ref" in dropout:
            dropout["ref"] = torch.nn.Identity()


def check_smoothing(config: Any) -> None:
    """Raises SettingsError for no loss at all, and for label smoothing of losses that have none."""
    if not config.loss_type:
        raise SettingsError("loss_type is empty: nothing would be learned.", "Such as loss_type=[sigmoid]")
    if config.label_smoothing and not SMOOTHED & set(config.loss_type):
        raise SettingsError(
            f"label_smoothing has no effect on loss_type={config.loss_type}.",
            "Use loss_type=[robust] (arXiv 2403.00409), or leave it out.",
        )


def set_reference(trainer: Any, config: Any, data: Data) -> None:
    """Give a trainer that has not begun its reference, and prove that this is the policy's start.

    With config.precompute_ref_log_probs the training pairs get TRL's columns ref_chosen_logps and ref_rejected_logps
    (nats, summed over an answer). They are kept in the user's cache under a key of model, adapter to start from,
    arithmetic and tokens, so that another run on the same pairs reads them.

    Raises NumericsError unless every implicit reward is 0 before the first step, and the sigmoid loss ln 2: a policy
    trained against another reference is pulled towards that one without a word. Raises SettingsError for a loss that
    TRL does not know, and as check_smoothing.
    """
    check_smoothing(config)
    release_copy(trainer, config)
    if config.precompute_ref_log_probs:
        with trainer.accelerator.autocast():  # the arithmetic of training
            found = _log_probs(trainer.model, config, data)
        for side, column in COLUMNS.items():
            trainer.train_dataset = trainer.train_dataset.add_column(column, found[side].tolist())
    with doing("proving that the reference is the policy's start"):
        _prove(trainer, config)


def _prove(trainer: Any, config: Any) -> None:
    import torch

    policy, count = trainer.model, min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    # rows from all over the data: numbers of a stale cache may be right at first
    every = len(trainer.train_dataset) // count
    rows = [trainer.train_dataset[index * every] for index in range(count)]
    sides = [sequences(row) for row in rows]
    answers = [side[name] for name in COLUMNS for side in sides]
    names = [f"pair {row % count + 1}" for row in range(2 * count)]
    with trainer.accelerator.autocast():
        started, _ = row_losses(policy, answers, names, count)
    batch = {name: tensor.to(policy.device) for name, tensor in trainer.data_collator(rows).items()}
    with evaluation_mode(policy):
        try:
            with trainer.accelerator.autocast(), without_router_loss(trainer):
                loss = float(trainer.compute_loss(policy, batch))
        except ValueError as error:
            raise SettingsError(f"loss_type={config.loss_type}: {error}") from None
        if config.precompute_ref_log_probs:
            reference = [row[column] for column in COLUMNS.values() for row in rows]
        else:
            reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or policy, batch)).tolist()
    whole = policy.dtype == torch.float32 and not computes_in_bfloat16()
    alike = ALIKE if whole else 100 * ALIKE
    for row, (nll, log_prob) in enumerate(zip(started, reference, strict=True)):
        if abs(nll + log_prob) > alike * max(1.0, nll):
            raise NumericsError(
                f"The reference is not the policy's start: an answer of pair {row % count + 1} has log-probability "
                f"{-nll:.4f} under the policy and {log_prob:.4f} under the reference.",
                f"Where the reference was read from the cache, delete {cache_folder() / 'reference'}.",
            )
    plain = config.loss_type == ["sigmoid"] and not config.loss_weights and not config.train.extra
    if plain and abs(loss - math.log(2)) > 10 * alike:
        raise NumericsError(f"The first loss is {loss:.5f}; with the policy as its own reference it is ln 2 = 0.69315.")


@contextmanager
def without_router_loss(trainer: Any) -> Iterator[None]:
    """The trainer's loss alone: TRL adds a share of what a mixture's router loses, which is not 0 at the start."""
    share = getattr(trainer, "router_aux_loss_coef", None)
    if share is None:
        yield
        return
    trainer.router_aux_loss_coef = 0.0
    try:
        yield
    finally:
        trainer.router_aux_loss_coef = share


def _log_probs(policy: Any, config: RecipeConfig, data: Data) -> dict[str, Any]:
    """{"chosen": (n,), "rejected": (n,)}: read from the cache where another run has left them, else computed."""
    path = _path(policy, config, data)
    found = distributed.from_main(lambda: _read(path) if path else None)
    if found is not None:
        console.print(f"reference: log-probabilities of {len(data.train)} pairs, as computed by an earlier run")
        return found
    found = _compute(policy, config, data)
    if path and distributed.is_main():
        _write(path, found)
    return found


def _compute(policy: Any, config: RecipeConfig, data: Data) -> dict[str, Any]:
    import torch

    samples = [sequences(row) for row in data.train]
    where = [data.train_records[index].where for index in data.train["row"]]
    rows = [sample[side] for sample in samples for side in COLUMNS]
    told = progress_bar("reference")
    with doing("computing the reference"):
        nll, _ = row_losses(
            policy,
            rows,
            [name for name in where for _ in COLUMNS],
            config.evaluate.batch_size,
            lambda done: told("log-probabilities", done, len(rows)),
        )
    return {side: -torch.tensor(nll[start :: len(COLUMNS)]) for start, side in enumerate(COLUMNS)}


def _path(policy: Any, config: RecipeConfig, data: Data) -> Path | None:
    """Where the numbers are kept, by the SHA-256 of all that they depend on; None where the weights have no file."""
    base, files = base_record(config.model), weights_stamp(config.model)
    if not files:
        return None
    lora = config.lora
    folder = Path(lora.init_from).expanduser() if lora and lora.init_from else None
    adapter = [folder / name for name in ("adapter_config.json", "adapter_model.safetensors")] if folder else []
    quantised = (config.model.load_in_4bit, config.model.bnb_4bit_quant_type, config.model.bnb_4bit_use_double_quant)
    facts = {
        "base": [base["weights"], base["config"], files],
        "adapter": [hashlib.sha256(path.read_bytes()).hexdigest() for path in adapter],
        "arithmetic": [
            str(policy.dtype),
            policy.device.type,
            computes_in_bfloat16(),
            *(quantised if quantised[0] else ()),
        ],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for row in data.train:
        digest.update(json.dumps([row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]).encode())
    return cache_folder() / "reference" / f"{digest.hexdigest()}.safetensors"


def _read(path: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(path)
        return found
    except (OSError, SafetensorError):
        return None


def _write(path: Path, found: dict[str, Any]) -> None:
    """Beside and renamed: another run never reads half a file. A cache that cannot be written is done without."""
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{id(found)}.new")
        save_file(found, beside)
        beside.replace(path)
    except OSError as error:
        console.print(f"note: the reference's log-probabilities are not kept: {error}")
