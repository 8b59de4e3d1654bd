"""An adapter's settings, adapter_config.json, looked at value by value before PEFT reads them.

PEFT builds what they say: it imports the module that `auto_mapping` or `megatron_core` name, matches `target_modules`
as a pattern against each layer, fetches the adapters that an X-LoRA names, and allocates what the ranks ask for.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.system.parsing import read_object

NAME = "adapter_config.json"
LARGEST = 2**20  # bytes; target_modules may list every layer
LARGEST_RANK = 2**16
MOST_LAYERS = 4096
AGAIN = "Get the adapter again, or train it again."
CODE = "Do not use this adapter unless you know who made it."
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
NO_CODE: dict[str, Any] = {"megatron_core": "megatron.core"}  # what PEFT itself writes into every file


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder, with PEFT's own values for those that the file lacks.

    Raises SecurityError where one names code or would hang, SettingsError for one that PEFT does not know, of another
    type, or out of range.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    path = folder / NAME
    given = _json(path)
    known = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = given.get("peft_type")
    if not isinstance(kind, str) or kind not in known:
        raise SettingsError(f"{path}: peft_type is {_shown(kind)}; expected one of PEFT's, such as LORA.", AGAIN)
    if kind == "XLORA":
        raise SecurityError(f"{path}: an X-LoRA names other adapters, which would be fetched and loaded.", CODE)
    hints = typing.get_type_hints(known[kind])
    _refuse_code(given, path)
    for name, value in given.items():
        if name not in hints:
            if value not in (None, False, [], {}):
                raise SettingsError(
                    f"{path}: {name} is unknown to the PEFT installed here, and set: {_shown(value)}.",
                    "The adapter was made by another release; without that setting it would compute something else.",
                )
            continue
        if not _fits(value, hints[name]) and not _named_start(name, value):
            raise SettingsError(f"{path}: {name} is {_shown(value)}, of a type that PEFT does not take.", AGAIN)
    _check_ranges(given, path)
    defaults = {item.name: _default(item) for item in dataclasses.fields(known[kind])}
    return {**defaults, **given}


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST:
            raise SettingsError(f"{path} has {path.stat().st_size:,} bytes: no {NAME} is that large.", AGAIN)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.", AGAIN) from None
    return read_object(path, SettingsError, AGAIN)


def _refuse_code(given: dict[str, Any], path: Path) -> None:
    for name in ("megatron_config", "megatron_core", "tokenizer_kwargs"):
        value = given.get(name)
        if value and value != NO_CODE.get(name):
            raise SecurityError(f"{path}: {name} is {_shown(value)}, which can name code to import.", CODE)
    mapping = given.get("auto_mapping")
    if mapping is None:
        return
    names = mapping if isinstance(mapping, dict) else {}
    library, cls = names.get("parent_library"), names.get("base_model_class")
    if (
        set(names) != {"parent_library", "base_model_class"}
        or not isinstance(library, str)
        or not re.fullmatch(r"transformers(\.\w+)*", library)
        or not isinstance(cls, str)
        or not cls.isidentifier()
    ):
        raise SecurityError(f"{path}: auto_mapping is {_shown(mapping)}: it names code outside of transformers.", CODE)


def _check_ranges(given: dict[str, Any], path: Path) -> None:
    ranks = {"r": given.get("r"), "num_virtual_tokens": given.get("num_virtual_tokens")}
    ranks |= {f"rank_pattern of {name}": rank for name, rank in (given.get("rank_pattern") or {}).items()}
    for name, rank in ranks.items():
        if rank is not None and not (_is(rank, int) and 1 <= rank <= LARGEST_RANK):
            raise SettingsError(f"{path}: {name} is {_shown(rank)}; expected 1 to {LARGEST_RANK:,}.", AGAIN)
    scales = {"lora_alpha": given.get("lora_alpha")}
    scales |= {f"alpha_pattern of {name}": scale for name, scale in (given.get("alpha_pattern") or {}).items()}
    for name, scale in scales.items():
        if scale is not None and not (_is(scale, float) and 0 < abs(scale) < 1e9):
            raise SettingsError(f"{path}: {name} is {_shown(scale)}; expected a number above 0.", AGAIN)
    dropout = given.get("lora_dropout")
    if dropout is not None and not (_is(dropout, float) and 0 <= dropout < 1):
        raise SettingsError(f"{path}: lora_dropout is {_shown(dropout)}; expected a number in [0, 1).", AGAIN)
    layers = given.get("layer_replication") or []
    if sum(max(0, end - start) for start, end in layers) > MOST_LAYERS:
        raise SettingsError(f"{path}: layer_replication asks for more than {MOST_LAYERS:,} layers.", AGAIN)
    patterns = [given[name] for name in PATTERNS if isinstance(given.get(name), str)]
    patterns += [*(given.get("rank_pattern") or {}), *(given.get("alpha_pattern") or {})]
    for pattern in patterns:
        _check_pattern(pattern, path)


def _check_pattern(pattern: str, path: Path) -> None:
    """A repetition within a repetition takes time that doubles with each character: PEFT would match it for hours."""
    from re import _parser  # type: ignore[attr-defined]  # the only way to see what a pattern is made of

    def nested(part: Any, inside: bool) -> bool:
        for operation, argument in part:
            repeats = str(operation) in ("MAX_REPEAT", "MIN_REPEAT") and argument[1] > 16
            if repeats and inside:
                return True
            below = argument if isinstance(argument, list | tuple) else [argument]
            parts = [one for item in below for one in (item if isinstance(item, list) else [item])]
            for one in parts:
                if isinstance(one, _parser.SubPattern) and nested(one, inside or repeats):
                    return True
        return False

    try:
        unsafe = nested(_parser.parse(pattern), False)
    except (re.error, RecursionError, OverflowError) as error:
        raise SettingsError(f"{path}: {_shown(pattern)} is not a pattern for layers: {error}.", AGAIN) from None
    if unsafe or len(pattern) > 10_000:
        raise SecurityError(f"{path}: the pattern {_shown(pattern)} could take hours to match.", CODE)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value out of JSON is of a type, as PEFT's dataclasses state them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin in (list, set, tuple) or hint in (list, set, tuple):
        inner = [one for one in arguments if one is not ...]
        fixed = origin is tuple and ... not in arguments
        if not isinstance(value, list) or (fixed and len(value) != len(inner)):
            return False
        each = inner if fixed else (inner[:1] or [Any]) * len(value)
        return all(_fits(item, one) for item, one in zip(value, each, strict=True))
    if origin is dict or hint is dict or dataclasses.is_dataclass(hint):
        return isinstance(value, dict)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [item.value for item in hint]
    if hint is types.NoneType:
        return value is None
    return _is(value, hint) if hint in (bool, int, float, str) else True


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def _named_start(name: str, value: Any) -> bool:
    """The one text that the type does not list: pissa_niter_<iterations>. And whole alphas as others write them."""
    if name == "init_lora_weights":
        return isinstance(value, str) and re.fullmatch(r"pissa_niter_\d{1,4}", value) is not None
    return name == "lora_alpha" and _is(value, float)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
