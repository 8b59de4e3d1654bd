"""A model's folder, looked at before any library reads it: where its files lie, and what its config.json asks for.

A stranger made it. Its files may lead elsewhere (transformers follows `../` in an index, CVE-2026-69112 of accelerate),
its config may name code (CVE-2026-4372), or shapes that no machine can hold.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.system.parsing import read_object

INDEX = "model.safetensors.index.json"
# what transformers and PEFT read beside config.json, and of which they make an error of their own, or nothing at all
SETTINGS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json"),
)
AGAIN = "Download the file again."
# endings of what transformers and PEFT read, and of what a run's folder has beside that, which a push sends
READ = (".json", ".safetensors", ".jinja", ".model", ".txt", ".yaml", ".md", ".jsonl", ".html")
MOST_PARAMETERS = 10**13
MOST_LAYERS = 4096
# A file in 4 bits holds two parameters a byte. Ten times that: no layout of weights is that much smaller.
PARAMETERS_A_BYTE = 20
# kind, names of how many there are, and of how many share one or are taken at a time
PARTS = (
    ("heads", ("num_attention_heads", "n_head"), ("num_key_value_heads",)),
    (
        "experts",
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"),
    ),
)
# endings of settings, and what their numbers are
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("rope_theta$", lambda value: value > 0, "a number above 0"),
    ("(dropout|_pdrop)$", lambda value: 0 <= value < 1, "a number in [0, 1)"),
    ("(_eps|_epsilon)$", lambda value: value >= 0, "0 or more"),
)


def check_model(folder: Path, whole: bool = True) -> None:
    """Raises SecurityError for files that are not what they seem or name code, SettingsError for a broken config.json
    or index, and for shapes that cannot be. `whole`: all of the model's files are here."""
    check_files(folder)
    if (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"{folder} holds a model and an adapter (adapter_config.json); transformers would load the adapter's base.",
            "Remove one of the two, or name the adapter by lora.init_from.",
        )
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX, whole)
    for path in sorted(folder.glob("*.safetensors")):
        check_weights(path)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if whole else 0
    check_config(folder / "config.json", weights)
    check_settings(folder)


def check_files(folder: Path) -> None:
    """Raises SecurityError where a file that would be read is a link out of the folder, or not a plain file.

    The Hub's cache is made of links, from a snapshot to the blobs beside it: those are its own.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(READ):
            continue
        target = path.resolve()
        if path.is_symlink() and not any(target.is_relative_to(home) for home in homes):
            raise SecurityError(
                f"{path} is a link to {target}, outside the model's folder.",
                "Put the file itself there, if it is yours.",
            )
        if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
            raise SecurityError(f"{path} is not a plain file: reading it could hang or reach a device.", "Remove it.")


def check_settings(folder: Path) -> None:
    """Raises SettingsError for a file of settings beside config.json that is not JSON object, or in which a value is of
    a kind that nothing could be made of: transformers passes over the one, and fails late or strangely at the other."""
    found = {name: read_object(folder / name, SettingsError, AGAIN) for name in SETTINGS if _is_there(folder / name)}
    generation = found.get("generation_config.json", {})
    for name, value in generation.items():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and not all(_is_id(number) for number in ids):
            path = folder / "generation_config.json"
            raise SettingsError(f"{path}: {name} is {_short(value)}; expected token numbers.", AGAIN)
    path, tokenizer = folder / "tokenizer_config.json", found.get("tokenizer_config.json", {})
    template = tokenizer.get("chat_template")
    if not (template is None or isinstance(template, str) or _are_named(template)):
        expected = "a text, or a list of {name, template}"
        raise SettingsError(f"{path}: chat_template is {_short(template)}; expected {expected}.", AGAIN)
    for name, value in [*tokenizer.items(), *found.get("special_tokens_map.json", {}).items()]:
        if re.fullmatch(r"(bos|eos|unk|sep|pad|cls|mask)_token", name) and not _is_token(value):
            file = path if name in tokenizer else folder / "special_tokens_map.json"
            expected = "a text, or an object with content"
            raise SettingsError(f"{file}: {name} is {_short(value)}; expected {expected}.", AGAIN)
    longest = tokenizer.get("model_max_length")
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int | float)):
        raise SettingsError(f"{path}: model_max_length is {_short(longest)}; expected a number.", AGAIN)
    side = tokenizer.get("padding_side")
    if side not in (None, "left", "right"):
        raise SettingsError(f"{path}: padding_side is {_short(side)}; expected left or right.", AGAIN)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_id(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _is_token(value: Any) -> bool:
    content = value.get("content") if isinstance(value, dict) else value
    return value is None or isinstance(content, str)


def _are_named(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(text, str) for text in value.values())
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_weights(path: Path) -> None:
    """Raises SettingsError where a safetensors file is broken or cut off. Its header alone is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path} is broken or cut off: {error}.", "Download the file again.") from None


def _check_index(path: Path, whole: bool) -> None:
    content = read_object(path, SettingsError, "Download the model again.")
    names = content.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise SettingsError(f"{path}: expected a weight_map of file names.", "Download the model again.")
    for name in sorted(set(names.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise SecurityError(
                f"{path} names the weights file '{name}', which is not a *.safetensors in the model's folder.",
                "Do not use this model unless you know who made it.",
            )
        if whole and not (path.parent / name).is_file():
            raise SettingsError(
                f"{path} names {name}, which is not there.", "Download the model again, all of its files."
            )


def check_config(path: Path, weights: int = 0) -> None:
    """Look through a config.json; `weights`: bytes of the weights beside it, 0 where they are not here.

    Raises SecurityError where it names code, SettingsError where it cannot be read or its shapes cannot be.
    """
    config = read_object(path, SettingsError, "Download the model again.")
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind.replace("-", "_").replace(".", "_").isidentifier():
        raise SettingsError(
            f"{path}: model_type is {kind!r}; expected the name of an architecture.", "Download the model again."
        )
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(one, str) for one in names)):
        raise SettingsError(
            f"{path}: architectures is {_short(names)}; expected a list of names.", "Download the model again."
        )
    for key, value in _settings(config):
        if "attn_implementation" in key and isinstance(value, str) and not value.isidentifier():
            raise SecurityError(
                f"{path} asks for the attention kernel {value!r}, which would be fetched and run as code ({key}).",
                f"Remove {key} from it, and do not use this model unless you know who made it.",
            )
    _check_shapes(config, path, weights)


def _check_shapes(config: dict[str, Any], path: Path, weights: int) -> None:
    part = config.get("text_config")
    shape: dict[str, Any] = part if isinstance(part, dict) else config

    def number(*names: str) -> int:
        found = next((shape[name] for name in names if name in shape), 0)
        return found if isinstance(found, int) and not isinstance(found, bool) else 0

    for name in ("text_config", "quantization_config"):
        if config.get(name) is not None and not isinstance(config[name], dict):
            raise SettingsError(
                f"{path}: {name} is {_short(config[name])}; expected an object of settings.",
                "Download the model again.",
            )
    names = ["num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size"]
    names += ["num_attention_heads", "n_head", "num_key_value_heads"]
    names += [] if "kv_lora_rank" in shape else ["head_dim"]  # there it is the rotated part, which GLM-5 next has not
    names += ["max_position_embeddings", "n_positions"]
    names += [] if any("expert" in key for key in shape) else ["intermediate_size"]  # of a model of experts alone
    for name in names:
        if name in shape and isinstance(shape[name], int) and shape[name] < 1:
            raise SettingsError(f"{path}: {name} is {shape[name]}; expected 1 or more.", "Download the model again.")
    _check_values(shape, path)
    layers, width = number("num_hidden_layers", "n_layer"), number("hidden_size", "n_embd")
    positions = number("n_positions", "max_position_embeddings")
    parameters = (number("vocab_size") + (positions if "n_positions" in shape else 0)) * width
    parameters += layers * 2 * width**2  # queries and outputs alone: less than any layer has
    limit = MOST_PARAMETERS if not weights else min(MOST_PARAMETERS, PARAMETERS_A_BYTE * max(weights, 10**6))
    if parameters > limit or layers > MOST_LAYERS:
        size = f"at least {parameters * 2 / 2**30:,.0f} GiB in 16 bits"
        beside = f"; the weights beside it have {weights / 2**30:,.3f} GiB" if weights else ""
        raise SettingsError(
            f"{path}: {layers:,} layers of width {width:,} and {number('vocab_size'):,} words are {size}{beside}.",
            "Nothing was allocated. Download the model again: this config.json is not that of its weights.",
        )


def _check_values(shape: dict[str, Any], path: Path) -> None:
    """That numbers fit each other and lie where they can: transformers takes them, and a pass fails or gives NaN."""
    again = "Download the model again."
    for kind, whole, part in PARTS:
        most, count = (
            next((shape[name] for name in names if _is_count(shape.get(name))), 0) for names in (whole, part)
        )
        uneven = count > most or (kind == "heads" and count > 0 and most % count > 0)
        if most > 1 and uneven:  # a dense model of an architecture with experts may say 1
            raise SettingsError(f"{path}: {most} {kind} and {count} of {part[0]} do not fit each other.", again)
    for key, value in _settings(shape):
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        expected = next((said for ending, fits, said in RANGES if re.search(ending, key) and not fits(value)), "")
        if value != value or expected:
            raise SettingsError(f"{path}: {key} is {value}; expected {expected or 'a number'}.", again)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def settings_with(folder: Path, value: str) -> list[str]:
    """The settings of a model's config.json that are a text, to say which of them transformers does not know."""
    try:
        config = read_object(folder / "config.json")
    except SettingsError:
        return []
    return list(dict.fromkeys(key for key, found in _settings(config) if found == value))


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting, those of its parts (text_config, …) included."""
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _settings(value)
