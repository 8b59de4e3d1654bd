"""What a run leaves behind: weights that load anywhere, the report, and a card made only from facts.

The weights are proven: a fresh process loads them with plain transformers and PEFT and must reproduce the logits.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import processes
from finetune_kit.ancestry import ANCESTRY, ancestors, as_text
from finetune_kit.config import ModelConfig, RecipeConfig, leaves, to_yaml
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import NumericsError
from finetune_kit.evaluation.compare import Report
from finetune_kit.evaluation.intervals import spread_of
from finetune_kit.evaluation.report import write_html
from finetune_kit.model.adapters import is_adapter
from finetune_kit.model.load import BASE_RECORD, base_license, base_record, public_name, resolve_name
from finetune_kit.run_folder import versions
from finetune_kit.training.room import heeding_disk

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # largest difference of a float32 logit or score after saving and loading
REWARDS = "AutoModelForSequenceClassification"
REWARD_USE = (
    "It gives one number to a prompt with its answer, both in the chat template; only differences between answers to "
    f"one prompt mean something. Load it with {REWARDS}, num_labels=1, and the tokenizer's pad_token_id in its config.",
)

# Run as `python -c` in a fresh process, so that nothing of this package can help the weights along.
RELOAD = """
import json
import sys
import torch
import transformers
from safetensors.torch import load_file, save_file
folder, base, revision, trusted, attention, quantised, dtype, device, auto_class, probe = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
rewards = auto_class == "AutoModelForSequenceClassification"
quantise = transformers.BitsAndBytesConfig
model = getattr(transformers, auto_class).from_pretrained(
    base,
    **({"num_labels": 1} if rewards else {}),
    revision=revision or None,
    trust_remote_code=trusted == "True",
    attn_implementation=attention or None,
    quantization_config=quantise.from_dict(json.loads(quantised)) if quantised else None,
    dtype=getattr(torch, dtype),
    device_map={"": device},
    use_safetensors=True,
)
for module in model.modules():  # bitsandbytes would round to bfloat16 on some CPUs
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
if rewards:  # its head is trained in float32, whatever the other weights are in
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.score.float().register_forward_pre_hook(lambda head, given: (given[0].float(),))
if quantised:  # as in training: what is not quantised computes in float32
    from peft import prepare_model_for_kbit_training
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
if base != folder:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
model = model.eval()
ids = load_file(probe)["ids"].to(device)
with torch.inference_mode():
    logits = model(input_ids=ids).logits.float().cpu()
save_file({"logits": logits.contiguous()}, probe + ".out")
"""


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

    The main process does it, the others wait; of a model that is cut into shards all of them gather the weights first.
    """
    expected = probe_logits(model, probe_of(model, data))
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


def _save(
    model: Any,
    weights: dict[str, torch.Tensor] | None,
    expected: torch.Tensor,
    tokenizer: Any,
    config: RecipeConfig,
    data: Data,
    report: Report,
    history: list[dict[str, float]],
) -> Artifact:
    folder = Path(config.train.output_dir or "")
    save_weights(model, tokenizer, config, data.end_token_ids, folder, weights)
    difference = reload_difference(model, config, folder, probe_of(model, data), expected)
    if not difference <= TOLERANCE:
        raise NumericsError(
            f"What was saved in {folder} is not what was trained: loaded, its outputs differ by {difference:.3g}.",
            "The folder is kept for inspection. Please report this with its run.yaml.",
        )
    short = [line for line in history if "per_device_train_batch_size" in line]
    results = {**report.to_json(), "reload_max_logit_difference": difference, "out_of_memory": short}
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
        adapter.base_model_name_or_path = public_name(config.model.name_or_path)
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
    tokenizer.save_pretrained(folder)


def auto_class(model: Any) -> str:
    """The auto class of transformers that loads a model like this one."""
    names = type(model.get_base_model() if is_adapter(model) else model).__name__
    return REWARDS if names.endswith("ForSequenceClassification") else "AutoModelForCausalLM"


def probe_of(model: Any, data: Data) -> list[int]:
    """Tokens of a training row that prove the saved model: the first ones, or all where the last one's score counts."""
    ids = next(iter(sequences(data.train[0]).values()))[0]
    return list(ids if auto_class(model) == REWARDS else ids[:64])


def reload_difference(
    model: Any, config: RecipeConfig, folder: Path, probe: list[int], expected: torch.Tensor | None = None
) -> float:
    """Largest difference of a logit of `probe` between the model in memory and the saved one in a new process.

    `expected`: the logits of the model in memory, where they are known already.
    """
    if expected is None:
        expected = probe_logits(model, probe)
    base = resolve_name(config.model.name_or_path) if is_adapter(model) else ""
    quantised = model.config.quantization_config.to_json_string(use_diff=False) if config.model.load_in_4bit else ""
    kind = auto_class(model)
    got = reload_logits(
        config.model, folder, probe, model.dtype, model.device, base=base, quantised=quantised, kind=kind
    )
    return float((got - expected).abs().max())


def probe_logits(model: Any, probe: list[int]) -> torch.Tensor:
    """Logits (1, tokens, vocabulary) of token ids, or their score (1, 1), float32 on the CPU. The model is left in
    evaluation mode."""
    import torch

    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=torch.tensor([probe], device=model.device)).logits.float().cpu()
    return logits


def reload_logits(
    model: ModelConfig,
    folder: Path,
    probe: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    base: str = "",
    quantised: str = "",
    kind: str = "AutoModelForCausalLM",
) -> torch.Tensor:
    """The same of what `folder` holds, in a fresh process: an adapter on `base`, or a whole model where it is "".

    `kind`: the auto class of transformers that loads it.

    Raises NumericsError where transformers or PEFT cannot load it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = str(dtype).removeprefix("torch.")
    same = (
        model.revision or "",
        str(model.trust_remote_code),
        model.attn_implementation or "",
        quantised,
        weights,
        str(device),
        kind,
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "probe.safetensors"
        save_file({"ids": torch.tensor([probe])}, path)
        command = [sys.executable, "-I", "-c", RELOAD, str(folder), base or str(folder), *same, str(path)]
        # the base was loaded a moment ago, so that the cache has it
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
        if done.returncode:
            raise NumericsError(
                f"What was saved in {folder} cannot be loaded by transformers and PEFT:",
                (done.stderr.strip().splitlines() or ["no message"])[-1],
            )
        logits: torch.Tensor = load_file(f"{path}.out")["logits"]
    return logits


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
    ledger = data.ledger.to_json()
    task, use = ("text-classification", [*REWARD_USE, ""]) if "gate" in results else ("text-generation", [])
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
            "the same decoding; intervals are paired bootstraps over rows, "
            "and exact ones where all rows move alike. After saving, a fresh process loaded this "
            f"folder and reproduced its outputs to {results['reload_max_logit_difference']:.1e}.",
            "",
            *use,
            *(["## Where it comes from", "", *as_text(line), ""] if len(line) > 1 else []),
            "## Settings",
            "",
            "```yaml",
            settings.strip(),
            "```",
            "",
        ]
    )


def card_metadata(config: RecipeConfig, library: str, tags: list[str], task: str = "text-generation") -> str:
    """The YAML at the top of a card, as the Hub reads it: licence of the base, library, tags, base model."""
    import yaml

    metadata: dict[str, Any] = {
        "license": base_license(config.model) or "other",
        "library_name": library,
        "pipeline_tag": task,
        "tags": ["finetune_kit", *tags],
    }
    base = public_name(config.model.name_or_path)
    if "/" in base:
        metadata["base_model"] = base
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n---"
