"""Attach a LoRA adapter, with every target module checked by name first."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.errors import SettingsError
from finetune_kit.models.adapter_config import read_adapter_config
from finetune_kit.models.coverage import (
    OUTSIDE,
    ROUTER,
    Coverage,
    Matrix,
    coverage,
    is_linear,
    matrices,
    short_names,
    without_wrappers,
)
from finetune_kit.models.folder import check_files, check_weights
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.schema import LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

REWARD_HEADS = ("classifier", "score")  # what PEFT trains and saves of a sequence-classification model
# layers that hold several of the usual ones: people who know Llama's names look for the parts
FUSED = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "Wqkv": ("q_proj", "k_proj", "v_proj"),
    "att_proj": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "out_proj"),
    "dense": ("o_proj",),
    "out_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "c_fc": ("up_proj", "gate_proj", "fc1"),
    "fc1": ("up_proj",),
    "fc2": ("down_proj",),
    "dense_h_to_4h": ("up_proj", "gate_proj"),
    "dense_4h_to_h": ("down_proj",),
}
NONE = "Name the folder of a finished lora_sft or qlora_sft run."
OTHER_BASE = "Name the base that it was trained on: model.name_or_path."


def linear_layers(model: Any) -> list[str]:
    """Full names of the linear layers, the head left out: the language model's, or the one that gives a reward."""
    head = model.get_output_embeddings() or getattr(model, "score", None)
    return [name for name, module in model.named_modules() if is_linear(module) and module is not head]


@dataclass(frozen=True)
class Targets:
    """Where an adapter goes, by PEFT's names: target_modules and target_parameters of its config, and the full names of
    the weight matrices that they match (coverage.Matrix.name)."""

    modules: str | list[str]
    parameters: list[str]
    matched: list[str]


def find_targets(model: Any, lora: LoraConfig) -> Targets:
    """What `lora.target_modules` and `lora.target_parameters` mean on this model.

    Raises SettingsError for a name that matches nothing, naming near ones, and for one that PEFT cannot adapt.
    """
    _check_saved({name for name, _ in model.named_modules() if name}, lora.modules_to_save)
    every = list(matrices(model))
    wanted = [*_wanted_modules(model, lora, every), *_wanted_parameters(lora, every)]
    modules = [matrix.name for matrix in wanted if not matrix.parameter]
    parameters = [matrix.name for matrix in wanted if matrix.parameter]
    for name, value in (("lora_dropout", lora.lora_dropout), ("use_dora", lora.use_dora)):
        if parameters and value:
            stacked = ", ".join(sorted({matrix.kind for matrix in wanted if matrix.parameter}))
            others = ",".join(sorted({matrix.kind for matrix in every if not matrix.parameter and not matrix.reason}))
            raise SettingsError(
                f"lora.{name}={value}: PEFT has none on parameters, such as this model's {stacked}.",
                f"Leave lora.{name} out, or name modules alone: lora.target_modules=[{others}]",
            )
    linear = linear_layers(model)
    whole = lora.target_modules == "all-linear" and not parameters and set(modules) == set(linear)
    return Targets(
        modules="all-linear" if whole else short_names(modules, [name for name, _ in model.named_modules()]),
        parameters=short_names(parameters, [name for name, _ in model.named_parameters()]),
        matched=[*modules, *parameters],
    )


def _wanted_modules(model: Any, lora: LoraConfig, every: list[Matrix]) -> list[Matrix]:
    """The matrices that `lora.target_modules` names."""
    if lora.target_modules == "all-linear":
        covered = [matrix for matrix in every if not matrix.reason]
        if not covered:
            reasons = Counter(matrix.reason for matrix in every if matrix.reason != OUTSIDE)
            raise SettingsError(
                "lora.target_modules=all-linear: no layer of this model can be adapted: "
                f"{reasons.most_common(1)[0][0] if reasons else 'it has no linear layer'}.",
                "Train all weights: full_sft, or lora.r=0 in the other recipes.",
            )
        return covered
    names = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    layers = {matrix.name.removesuffix(".weight") if matrix.parameter else matrix.name: matrix for matrix in every}
    linear = {name: matrix for name, matrix in layers.items() if is_linear(_submodule(model, name))}
    wanted = {}
    for name in names:
        if name == "lm_head":
            raise SettingsError(
                "lora.target_modules: TRL does not train an adapter on lm_head, and it merges wrong if tied.",
                "Train the whole head instead: lora.modules_to_save=[lm_head]",
            )
        found = {full: matrix for full, matrix in linear.items() if full == name or full.endswith("." + name)}
        if not found:
            raise SettingsError(
                f"lora.target_modules: '{name}' is not a linear layer of this model.", _meant(name, every)
            )
        if any(not matrix.reason for matrix in found.values()):  # a tower's layers have the same names, and no gradient
            found = {full: matrix for full, matrix in found.items() if matrix.reason != OUTSIDE}
        barred = [matrix for matrix in found.values() if matrix.reason not in ("", OUTSIDE, ROUTER)]
        if barred:
            raise SettingsError(
                f"lora.target_modules: '{name}' cannot be adapted: {barred[0].reason}.", "Leave it out of the list."
            )
        wanted.update(found)
    return list(wanted.values())


def _wanted_parameters(lora: LoraConfig, every: list[Matrix]) -> list[Matrix]:
    """The stacked parameters that `lora.target_parameters` names, besides those of all-linear."""
    wanted = {}
    stacked = [matrix for matrix in every if matrix.parameter]
    for name in lora.target_parameters:
        found = {m.name: m for m in stacked if m.name == name or m.name.endswith("." + name)}
        if not found:
            has = ", ".join(sorted({matrix.kind for matrix in stacked})) or "none that an adapter can cover"
            raise SettingsError(
                f"lora.target_parameters: '{name}' is not a parameter of stacked experts in this model.",
                f"It has: {has}",
            )
        if lora.target_modules == "all-linear":
            raise SettingsError(
                f"lora.target_parameters: {name} has no effect beside lora.target_modules=all-linear, which covers it.",
                "Leave it out, or name the modules: lora.target_modules=[q_proj, v_proj]",
            )
        wanted.update(found)
    return list(wanted.values())


def _submodule(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:  # a parameter's name
        return None


def _meant(name: str, every: list[Matrix]) -> str:
    """What the model has in place of a module that it has not: a name alike, a fused layer, stacked experts."""
    linear = dict(Counter(matrix.kind for matrix in every if "." not in matrix.kind and matrix.reason in ("", OUTSIDE)))
    stacked = sorted({matrix.kind for matrix in every if matrix.parameter and "." in matrix.kind})
    near = difflib.get_close_matches(name, linear, n=3, cutoff=0.5)
    fused = [kind for kind, parts in FUSED.items() if name in parts and kind in linear]
    inside = [kind for kind in stacked if name.removesuffix("_proj") in kind.rsplit(".", 1)[-1]]
    if fused:
        hint = f"Here {name} is a part of {fused[0]}: lora.target_modules=[{fused[0]}]. "
    elif inside and name not in near:
        hint = f"Here {name} is a part of the experts: lora.target_parameters=[{', '.join(inside)}]. "
    else:
        hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"{hint}It has: {', '.join(f'{leaf} ({times})' for leaf, times in linear.items())}"


def _check_saved(everything: set[str], wanted: list[str]) -> None:
    leaves = {full.rsplit(".", 1)[-1] for full in everything}
    for name in wanted:
        if not any(full == name or full.endswith("." + name) for full in everything):
            near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.4)
            hint = f"Did you mean {', '.join(near)}?" if near else f"It has: {', '.join(sorted(leaves))}"
            raise SettingsError(f"lora.modules_to_save: '{name}' is not a module of this model.", hint)


def covered(model: PeftModel) -> Coverage:
    """What the adapter of a model covers, and what it leaves out for which reason."""
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or "lora_magnitude" in name:
            wrapper = model.get_submodule(name.split(".lora_")[0])
            own = f".{wrapper.parameter_name}" if hasattr(wrapper, "parameter_name") else ""
            home = without_wrappers(name.removeprefix("base_model.model.").split(".lora_")[0]) + own
            trained[home] = trained.get(home, 0) + parameter.numel()
    targeted = {*model.targeted_module_names, *model.targeted_parameter_names}
    return coverage(list(matrices(model.get_base_model())), targeted, trained)


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trained parameters, all parameters); a weight in 4 bits counts as one, though two share a byte."""
    if is_adapter(model):
        trained, total = model.get_nb_trainable_parameters()
        return int(trained), int(total)
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def attach(model: Any, lora: LoraConfig, task_type: str = "CAUSAL_LM") -> PeftModel:
    """The model with a fresh float32 adapter: B is zero, so it still computes what it did.

    `task_type` SEQ_CLS trains and saves a classification head beside it; without it PEFT would save no head.
    """
    import peft

    from finetune_kit.models.lora_product import add_in_one_pass

    targets = find_targets(model, lora)
    empty = model.get_input_embeddings().weight.device.type == "meta"
    adapted = peft.get_peft_model(model, peft_config(lora, targets, task_type), low_cpu_mem_usage=empty)
    add_in_one_pass(adapted)
    return adapted


def peft_config(lora: LoraConfig, targets: Targets, task_type: str = "CAUSAL_LM") -> Any:
    import peft

    return peft.LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        modules_to_save=list(lora.modules_to_save) or None,  # PEFT appends the head's names to the list it is given
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )


def take_adapter_settings(lora: LoraConfig) -> Path:
    """The folder of `lora.init_from`, with the shape of its adapter put into `lora`.

    Raises SettingsError where no adapter is there, or where a setting asks for another shape than it has.
    """
    folder = Path(lora.init_from or "").expanduser()
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise SettingsError(
            f"lora.init_from={lora.init_from}: no adapter there (adapter_config.json, adapter_model.safetensors).",
            near_path(lora.init_from or "") + NONE,
        )
    check_files(folder)
    check_weights(folder / "adapter_model.safetensors")
    saved = read_adapter_config(folder)
    if saved["peft_type"] != "LORA":
        raise SettingsError(f"lora.init_from={lora.init_from}: its adapter is {saved['peft_type']}, no LORA.", NONE)
    shape = ("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "modules_to_save")
    for name in (*shape, "use_rslora", "use_dora"):
        asked, default, has = getattr(lora, name), getattr(LoraConfig(), name), saved[name]
        if name == "target_parameters":
            has = has or []
        if name == "modules_to_save":  # PEFT adds the names of heads by itself
            has = [module for module in has or [] if saved["task_type"] != "SEQ_CLS" or module not in REWARD_HEADS]
        same = sorted(asked) == sorted(has) if isinstance(asked, list) and isinstance(has, list) else asked == has
        # dropout is a matter of training, not of the adapter's shape
        if name == "lora_dropout" or same:
            continue
        if asked != default:
            raise SettingsError(
                f"lora.{name}={asked}: the adapter in {folder} has {has}.", f"Leave lora.{name} out, or lora.init_from."
            )
        setattr(lora, name, has)
    return folder


def continue_adapter(model: Any, lora: LoraConfig, folder: Path) -> PeftModel:
    """The model with the adapter of `folder`, float32 and trainable."""
    import peft

    from finetune_kit.models.lora_product import add_in_one_pass

    config = peft.PeftConfig.from_pretrained(folder)
    config.lora_dropout, config.inference_mode = lora.lora_dropout, False
    adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    add_in_one_pass(adapted)
    return adapted


def set_adapter_weights(model: Any, lora: LoraConfig, folder: Path) -> PeftModel:
    """A reward model that starts as the backbone of the causal language model with the adapter of `folder`.

    A reward model's adapter keeps its head; other adapters lose their LM head.
    Raises SettingsError where a weight of the adapter has no place in the model.
    """
    import peft
    from safetensors.torch import load_file

    if read_adapter_config(folder)["task_type"] == "SEQ_CLS":
        return continue_adapter(model, lora, folder)
    lora.modules_to_save = [name for name in lora.modules_to_save if name.rsplit(".", 1)[-1] != "lm_head"]
    adapted = attach(model, lora, "SEQ_CLS")
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "lm_head" not in name.split(".")}
    start = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    without = {name for name in start if ".lora_" in name} - kept.keys()
    # PEFT asks for the head, too, which starts as it is
    unknown = peft.set_peft_model_state_dict(adapted, {**start, **kept}).unexpected_keys
    if unknown or without:
        raise SettingsError(
            f"lora.init_from={folder}: {len(unknown)} of its weights have no place in this model, and {len(without)} "
            f"places no weight: {sorted([*unknown, *without])[0]}.",
            OTHER_BASE,
        )
    return adapted


def load_adapter(model: Any, folder: str) -> PeftModel:
    """The model with a saved adapter, frozen, for evaluation and generation.

    Raises SettingsError where the adapter's shapes or layers are not those of the model.
    """
    import peft
    from safetensors import safe_open

    check_files(Path(folder))
    check_weights(Path(folder) / "adapter_model.safetensors")
    read_adapter_config(Path(folder))
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
    except KeyError as error:  # of a head, where the file has none
        raise SettingsError(f"{folder} is an adapter without the weight {error}.", OTHER_BASE) from None
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        sign = next((line for line in lines if "size mismatch" in line or "not found in the base model" in line), None)
        if sign is None:
            raise
        raise SettingsError(f"{folder} is an adapter of another model: {sign}", OTHER_BASE) from None
    # PEFT only warns of layers that the file lacks, and says nothing of those that the model lacks
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        saved = {name for name in file.keys() if ".lora_" in name}  # noqa: SIM118  # no dict
    here = {name for name in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False) if ".lora_" in name}
    if saved != here:
        found = (
            f"{len(saved - here)} of its {len(saved)} weights have no place in it, {len(here - saved)} places no weight"
        )
        raise SettingsError(f"{folder} is an adapter of another model: {found}.", OTHER_BASE)
    return adapted


@contextmanager
def as_started(model: PeftModel, init_from: str | None) -> Iterator[None]:
    """A run's model as its training began: without an adapter, or with the one it continued from.

    Where the folder of that one is gone a warning says so, and the base alone stands in for it.
    """
    folder = Path(init_from or "").expanduser()
    if not init_from or not (folder / "adapter_model.safetensors").is_file():
        if init_from:
            log.warning("%s, which this run continued from, is gone: it is compared with the base alone", init_from)
        with model.disable_adapter():
            yield
        return
    check_files(folder)
    read_adapter_config(folder)
    model.load_adapter(str(folder), "start")
    model.set_adapter("start")
    try:
        yield
    finally:
        model.set_adapter("default")
        model.delete_adapter("start")


def detach(model: PeftModel) -> Any:
    """The base model as it was before `load_adapter`; the adapter is gone."""
    prompt_learning = model.active_peft_config.is_prompt_learning  # such an adapter lies beside the base, not in it
    return model.get_base_model() if prompt_learning else model.unload()


def is_adapter(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def restore(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint folder of this very model back into it (adapter or full, safetensors only)."""
    import peft
    from safetensors.torch import load_file

    if is_adapter(model):
        peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    state = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        state.update(load_file(shard))
    # tied weights are saved under one name; the other one shares the tensor and is filled with it
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(model._tied_weights_keys or ()), missing
