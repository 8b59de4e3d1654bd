"""What a run leaves behind: weights that load anywhere, the report, and a card made only from facts.

The weights are proven (verify.py): bit for bit, and by a fresh process that must give the same outputs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.evaluation.compare import Report
from finetune_kit.evaluation.report_html import write_html
from finetune_kit.models.adapters import covered, is_adapter
from finetune_kit.models.language import settle_saved
from finetune_kit.models.precision import plain_forward
from finetune_kit.models.provenance import BASE_RECORD, base_record
from finetune_kit.models.source import hub_name
from finetune_kit.models.tokenizer import copy_processor
from finetune_kit.run_folder.identity import versions
from finetune_kit.run_folder.lineage import ANCESTRY, ancestors
from finetune_kit.runs.card import card, card_entry
from finetune_kit.runs.redact import without_paths
from finetune_kit.runs.saved_tensors import check_saved_tensors
from finetune_kit.runs.verify import (
    REWARDS,
    Outputs,
    auto_class,
    computed_in,
    outputs,
    probe_of,
    prove,
    release,
)
from finetune_kit.settings.load import to_yaml
from finetune_kit.settings.schema import RecipeConfig
from finetune_kit.system.terminal import doing
from finetune_kit.training.progress import console
from finetune_kit.training.resources import disk_errors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Artifact:
    """A finished run: its folder and its report."""

    folder: Path
    report: Report


def save(
    model: Any, tokenizer: Any, config: RecipeConfig, data: Data, report: Report, history: list[dict[str, float]]
) -> Artifact:
    """Write the run's folder and prove that it can be read back. Raises NumericsError where it cannot, ResourceError
    where the disk is full.

    The main process does it, the others wait; of a model that is cut into shards all of them compute and gather the
    weights first. Where two models do not fit beside each other, this one is on the CPU afterwards.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    plain_forward(model)
    release()
    sharded = distributed.is_sharded(model)
    expected = outputs(model, probe_of(model, data), computed_in(model, config.model)) if sharded else None
    weights = gathered(model)

    def write() -> Artifact:
        with disk_errors(Path(config.train.output_dir or ""), "The result"):
            return _save(model, weights, expected, tokenizer, config, data, report, history)

    return distributed.from_main(write)


def gathered(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole weights of a model cut into shards, on the main process's CPU; None where each process has them all.

    To be called by all processes.
    """
    if not distributed.is_sharded(model):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]  # its values are tensors


@doing("saving, and proving what was saved")
def _save(
    model: Any,
    weights: dict[str, torch.Tensor] | None,
    expected: Outputs | None,
    tokenizer: Any,
    config: RecipeConfig,
    data: Data,
    report: Report,
    history: list[dict[str, float]],
) -> Artifact:
    folder = Path(config.train.output_dir or "")
    save_weights(model, tokenizer, config, data.end_token_ids, folder, weights)
    check_saved_tensors(model, folder, weights)
    proof = prove(model, config.model, folder, probe_of(model, data), expected)
    if proof.reason:
        console.print(
            "note: what was saved is, bit for bit, what was trained; that a fresh process gives the same outputs was "
            f"not proven: {proof.reason}. To do so later: python -m finetune_kit verify {folder}",
            markup=False,
        )
    short = [line for line in history if "per_device_train_batch_size" in line]
    results = {**report.to_json(), **proof.to_json(), "out_of_memory": short}
    if is_adapter(model):
        results["adapter"] = asdict(covered(model))
    run = {
        "recipe": config.recipe,
        "settings": to_yaml(without_paths(config), versions()),
        "ledger": data.ledger.to_json(),
    }
    write_html(report, history, run, folder / "report.html")
    line = [*ancestors(config), card_entry(config, data, results)]
    (folder / ANCESTRY).write_text(json.dumps(line, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / "README.md").write_text(card(config, data, results, line), encoding="utf-8")
    # last: it is what makes a run a finished one
    beside = folder / ".report.json.new"
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(folder / "report.json")
    return Artifact(folder, report)


def save_weights(
    model: Any,
    tokenizer: Any,
    config: RecipeConfig,
    end_token_ids: list[int],
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Adapter or model as safetensors, tokenizer with its template, generation config that knows where to stop.

    `weights`: those of a model that is cut into shards, gathered.
    """
    given = {} if weights is None else {"state_dict": weights}
    (folder / "README.md").unlink(missing_ok=True)  # the half of one, which PEFT would read
    generation = None if auto_class(model) == REWARDS else model.generation_config
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = end_token_ids, tokenizer.pad_token_id
    if is_adapter(model):
        adapter = model.peft_config[model.active_adapter]
        adapter.base_model_name_or_path = hub_name(config.model.name_or_path)
        adapter.revision = config.model.revision
        # embeddings are saved where modules_to_save names them; to find out more, PEFT would ask the Hub
        model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=[model.active_adapter], **given)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, of placeholders and a local path
        if generation is not None:
            generation.save_pretrained(folder)
        record = json.dumps(base_record(config.model), indent=1, ensure_ascii=False)
        (folder / BASE_RECORD).write_text(record, encoding="utf-8")
    else:
        if generation is not None:
            settle_saved(model)
        model.save_pretrained(folder, max_shard_size="5GB", **given)
        copy_processor(config.model, folder)
    tokenizer.save_pretrained(folder)
