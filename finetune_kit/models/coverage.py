"""Which weight matrices of a model's layers an adapter covers, and why it leaves the others out.

`all-linear` means every linear layer of the language model's layers: attention, MLP, shared experts and, as stacked 3-D
parameters, experts. It never means a router, a vision tower or projector, or a head.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

HEADS = ("lm_head", "score")
ROUTER = "a router, which decides and does not compute"
OUTSIDE = "outside the language model's layers"
READ_PAST = "the code around it reads its weight past an adapter, for a kernel or a product of its own"
# a layer's weight as an operand in the code of the module around it, not its type, its shape or a slice of it
READS = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight\b(?! =|\.(?:dtype|device|shape|ndim|data)\b|\[)")
# a parameter of a module within, as the code of the module around it reads it
PARAMETERS = re.compile(r"self\.(\w+)\.(\w+)\b(?!\()")
# a layer's weight that the code of the module around it changes in place, as Gemma 3n's
CHANGES = re.compile(r"self\.(\w+)\.weight\.data\.\w+_\(")
# layers whose weights the model around them divides outside training, and multiplies again in it, as RWKV's
RESCALES = re.compile(r"\bblock\.(\w+(?:\.\w+)+)\.weight\.\w+_\(")
RESCALED = "the model divides its weights outside training, which an adapter would not follow"
EXPERTS_IN_4_BIT = "4-bit experts take no adapter"
LOST = "PEFT reads an adapter on it from its file under another name, and would leave it out"


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or one stack of them.

    name: the module's full name, or the parameter's where it is not a module's `weight`. kind: the last part of it,
    with the parameter's name where it is one. weights: how many numbers. parameter: PEFT adapts it as a parameter,
    not as a module. reason: why no adapter can cover it; "" where one can.
    """

    name: str
    kind: str
    weights: int
    parameter: bool
    reason: str


def matrices(model: Any) -> Iterator[Matrix]:
    """Every weight matrix of a model, but embeddings and heads; those of an adapter on it are not part of it."""
    import torch

    modules, config = plain_modules(model), model.config
    decoder = decoder_of(model)
    prefix = next(name for name, module in modules.items() if module is decoder)
    stacks = {
        f"{prefix}.{name}" if prefix else name
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.count(".") <= 1 and not any(c.isdigit() for c in name)
    }
    heads = {id(head) for head in (model.get_output_embeddings(), getattr(model, "score", None)) if head is not None}
    adaptable = [name for name, module in modules.items() if is_linear(module) or _holds_experts(name, module)]
    renamed, lost, rescaled = renamed_by_peft(model), _lost_by_peft(model, adaptable), _rescaled(modules)
    for name, module in modules.items():
        if id(module) in heads or name in HEADS or isinstance(module, torch.nn.Embedding):
            continue
        inside = any(name.startswith(stack + ".") for stack in stacks)
        if is_linear(module):
            leaf = name.rsplit(".", 1)[-1]
            if leaf.isdigit():  # a layer of a Sequential has no name of its own
                leaf = ".".join(name.rsplit(".", 2)[-2:])
            reason = _unreachable(modules, config, name, module) if inside else OUTSIDE
            reason = reason or (RESCALED if name in rescaled else LOST if name in lost else "")
            as_parameter = not reason and (leaf in renamed or not _gives_its_product(module))
            full = f"{name}.weight" if as_parameter else name
            yield Matrix(full, leaf, _size(module), as_parameter, reason)
            continue
        for own, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or own.endswith("bias"):  # one of each expert stacked is not a matrix
                continue
            kind = f"{type(module).__name__}.{own}"
            if not inside:
                reason = OUTSIDE
            elif _is_router(modules, config, name, module):
                reason = ROUTER
            elif not _holds_experts(name, module):
                reason = f"no linear layer: {type(module).__name__}"
            elif not weight.is_floating_point():
                reason = EXPERTS_IN_4_BIT
            elif _is_read_around(modules, name, own):
                kind, reason = f"experts.{own}", READ_PAST
            elif name in lost:
                kind, reason = f"experts.{own}", LOST
            else:
                kind, reason = f"experts.{own}", ""
            yield Matrix(f"{name}.{own}", kind, weight.numel(), not reason, reason)


def plain_modules(model: Any) -> dict[str, Any]:
    """{full name: module} as they are without an adapter, which puts each module into a wrapper."""
    found = {}
    for name, module in model.named_modules():
        parts = set(name.split("."))
        if (
            "modules_to_save" in parts
            or any(part.startswith("lora_") for part in parts)
            or hasattr(module, "base_layer")
        ):
            continue
        found[without_wrappers(name)] = module
    return found


def without_wrappers(name: str) -> str:
    """A module's name as it is without an adapter."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def size_of(parameter: Any) -> int:
    """Numbers in a parameter; of 4 bits, two share a byte and the shape is that of bytes."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else math.prod(state.shape))


def decoder_of(model: Any) -> Any:
    """The language model's stack of layers, without head, vision tower and projector."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return model.base_model if found is None or is_linear(found) else found  # ModernBERT's head is called decoder


def layers_of(model: Any) -> Any:
    """The language model's layers, with an adapter or without, as a ModuleList; an empty one where the model keeps them
    in some other way. Those of a tower beside it may be as many."""
    import torch

    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in decoder_of(model).modules() if isinstance(module, torch.nn.ModuleList))
    return next((modules for modules in lists if len(modules) == count), torch.nn.ModuleList())


def is_linear(module: Any) -> bool:
    """Whether a module multiplies by one matrix; GPT-2 keeps its linear layers as Conv1D."""
    import torch

    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _gives_its_product(module: Any) -> bool:
    """Whether a linear layer's output is its input by its matrix, to which an adapter can add; one of a class of its
    own, such as DeepSeek-V4's, whose groups of inputs have a block each, can be adapted as a parameter alone."""
    import torch

    own = type(module)
    if not own.__module__.startswith("transformers.models.") or own.forward is torch.nn.Linear.forward:
        return True
    try:
        with torch.no_grad():
            output = module(module.weight.new_zeros(1, 3, module.in_features))
    except (RuntimeError, ValueError, IndexError):
        return False
    return bool(output.shape == (1, 3, module.out_features))


def _size(module: Any) -> int:
    """Weights of a linear layer; two of 4 bits share a byte, so they are not counted in the tensor."""
    return int(module.in_features * module.out_features) if hasattr(module, "in_features") else module.weight.numel()


def _unreachable(modules: dict[str, Any], config: Any, name: str, module: Any) -> str:
    if _is_router(modules, config, name, module):
        return ROUTER
    home, _, leaf = name.rpartition(".")
    around: Any = type(modules.get(home))
    return READ_PAST if leaf in _read_past(around) else ""


def _is_read_around(modules: dict[str, Any], name: str, own: str) -> bool:
    """Whether the code of the module around one reads a parameter of it, as DBRX's experts do: PEFT's wrapper, which
    stands in the place of the module, has none of that name."""
    home, _, leaf = name.rpartition(".")
    around: Any = type(modules.get(home))
    return (leaf, own) in _named_in(around, PARAMETERS)


def read_past(model: Any) -> list[str]:
    """Full names of the linear layers, routers too, whose weights the code around them reads: what stands in the place
    of one must have a weight of its shape and type. Those beside the language model and heads are left out."""
    modules = plain_modules(model)
    found = []
    for matrix in matrices(model):
        home, _, leaf = matrix.name.rpartition(".")
        around: Any = type(modules.get(home))
        if matrix.reason != OUTSIDE and is_linear(modules.get(matrix.name)) and leaf in _read_past(around):
            found.append(matrix.name)
    return found


def changed_in_place(model: Any) -> list[str]:
    """Full names of the layers whose weights the code around them changes in place, which 4 bits cannot be."""
    modules = plain_modules(model)
    found = []
    for name, module in modules.items():
        home, _, leaf = name.rpartition(".")
        around: Any = type(modules.get(home))
        if is_linear(module) and leaf in _named_in(around, CHANGES):
            found.append(name)
    return found


def _rescaled(modules: dict[str, Any]) -> list[str]:
    """Full names of the layers that some module of the model rescales, by its code."""
    kinds: set[Any] = {type(module) for module in modules.values()}
    ends = {f".{end}" for kind in kinds for end in _named_in(kind, RESCALES)}
    return [name for name, module in modules.items() if is_linear(module) and name.endswith(tuple(ends))]


def _read_past(kind: type) -> frozenset[str]:
    """Names of the layers whose weights the code of a module's class reads itself."""
    return _named_in(kind, READS)


@cache
def _named_in(kind: type, pattern: re.Pattern[str]) -> frozenset[Any]:
    """What a pattern finds in the code of a class, as re.findall gives it."""
    try:
        return frozenset(pattern.findall(inspect.getsource(kind)))
    except (OSError, TypeError):  # a class without source, such as one made in a running program
        return frozenset()


def _is_router(modules: dict[str, Any], config: Any, name: str, module: Any) -> bool:
    """Whether a module decides which experts a token goes to, or with what share the shared one counts.

    It is called a router by its class or that of a module around it, or it lies beside experts and has one output for
    each of them, or one alone.
    """
    parents = name.split(".")
    around = [modules[home] for depth in range(1, len(parents)) if (home := ".".join(parents[:depth])) in modules]
    if any("Router" in type(part).__name__ for part in [*around, module]):
        return True
    chain = [*around, module]
    gate = next((at for at, part in enumerate(chain) if at and type(part).__name__.endswith("Gate")), len(chain) - 1)
    beside_experts = gate > 0 and any("expert" in child for child, _ in chain[gate - 1].named_children())
    if gate < len(chain) - 1 or type(module).__name__.endswith("Gate"):
        return beside_experts
    outputs = getattr(module, "out_features", None)
    return beside_experts and outputs is not None and outputs in {1, *_experts(config.get_text_config())}


def _experts(config: Any) -> set[int]:
    """How many experts a layer has, under each name that configs use."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
    return {int(count) for name in names if isinstance(count := getattr(config, name, None), int)}


def _holds_experts(name: str, module: Any) -> bool:
    return "Expert" in type(module).__name__ or "experts" in name.split(".")


def renamed_by_peft(model: Any) -> set[str]:
    """Names that PEFT, when it attaches an adapter, takes for those of experts before transformers 5, and turns into
    the stacked parameters: on these architectures a layer of that name can only be reached by its parameter."""
    from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN as PATTERNS
    from peft.utils.transformers_weight_conversion import _MOE_FUSED_TARGETS, _MOE_TARGET_MODULE_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = model.config.model_type
    pattern = PATTERNS.get(model_type)
    if get_checkpoint_conversion_mapping(model_type) is None or not _MOE_FUSED_TARGETS.get(pattern):
        return set()
    return set(_MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def _lost_by_peft(model: Any, names: Collection[str]) -> set[str]:
    """Of the modules of these names those whose adapter PEFT would not find again: it reads a file of its own as one of
    before transformers 5, and Laguna's pattern for `shared_expert.` fits `shared_experts.`, too, and that of Mistral
    Large 4 for `.experts.` the experts themselves."""
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as as_read

    saved = {f"base_model.model.{name}.lora_A.weight": name for name in names}
    found = as_read(model, LoraConfig(), dict.fromkeys(saved, torch.zeros(0)))
    return {name for key, name in saved.items() if key not in found}


def short_names(wanted: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest endings of `wanted` that match, by PEFT's rule, none of `every` that is not wanted; sorted."""
    endings: set[str] = set()
    unwanted = set(every) - set(wanted)
    for name in wanted:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(other == ending or other.endswith("." + ending) for other in unwanted):
                endings.add(ending)
                break
    return sorted(endings)


@dataclass(frozen=True)
class Coverage:
    """What an adapter covers. covered, left_out: {kind: how many}; share: of the layers' weights; trained: {kind:
    parameters}; reasons: {kind that is left out: why}."""

    covered: dict[str, int]
    left_out: dict[str, int]
    reasons: dict[str, str]
    trained: dict[str, int]
    share: float

    def in_words(self) -> list[str]:
        """Lines for people: what is adapted, what it trains, and what is left alone."""
        named = ", ".join(f"{kind} ({count})" for kind, count in self.covered.items())
        lines = [f"adapted: {named}; {self.share:.0%} of the layers' weights"]
        lines.append(f"parameters: {', '.join(f'{kind} {count:,}' for kind, count in self.trained.items())}")
        by_reason: dict[str, list[str]] = {}
        for kind, reason in self.reasons.items():
            by_reason.setdefault(reason, []).append(f"{kind} ({self.left_out[kind]})")
        lines += [f"not adapted: {', '.join(kinds)}: {reason}" for reason, kinds in by_reason.items()]
        return lines


def coverage(every: Collection[Matrix], targeted: Collection[str], trained: dict[str, int]) -> Coverage:
    """Of all matrices, which of them are `targeted` (full names of modules and parameters), and the rest with reasons.

    `trained`: parameters by the targeted name. Matrices outside the layers count neither for nor against the share.
    """
    names = set(targeted)
    inside = [matrix for matrix in every if matrix.reason != OUTSIDE]
    covered = [matrix for matrix in every if matrix.name in names]
    rest = [matrix for matrix in every if matrix.name not in names]
    by_kind: Counter[str] = Counter()
    for matrix in covered:
        by_kind[matrix.kind] += trained.get(matrix.name, 0)
    whole = sum(matrix.weights for matrix in inside)
    return Coverage(
        covered=dict(Counter(matrix.kind for matrix in covered)),
        left_out=dict(Counter(matrix.kind for matrix in rest)),
        reasons={matrix.kind: matrix.reason or "not named in lora.target_modules" for matrix in rest},
        trained=dict(by_kind),
        share=sum(matrix.weights for matrix in covered) / whole if whole else 0.0,
    )
