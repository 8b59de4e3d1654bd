"""Settings from where they are written: recipe default < YAML file < `key=value`, each with its origin."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_kit.errors import SettingsError
from finetune_kit.settings import values
from finetune_kit.settings.aliases import SHOW, find_name, near_path, together
from finetune_kit.settings.checks import check, is_hub_name, out_of_range
from finetune_kit.settings.schema import (
    BY_THE_USER,
    COMMAND_LINE,
    SECTIONS,
    DataConfig,
    Leaf,
    RecipeConfig,
    ToolsRecipeConfig,
    leaves,
)


def resolve(
    config_class: type[RecipeConfig],
    recipe: str,
    yaml_path: Path | None = None,
    overrides: Sequence[str] = (),
    origin: str = COMMAND_LINE,
) -> RecipeConfig:
    """The Config of `recipe` (its name or path) with a YAML file and `key=value` words laid over its defaults.

    `origin`: where the words came from.

    Raises SettingsError (unknown key, wrong type, out of range, without effect, unreadable file), SecurityError (a YAML
    tag that builds objects).
    """
    config = config_class()
    config.recipe, config.recipe_word = Path(recipe).stem, recipe
    known = {leaf.key: leaf for leaf in leaves(config)}
    given = list(_read_yaml(yaml_path, known)) if yaml_path else []
    problems: list[SettingsError] = []
    for written, node, where in [*given, *(_read_word(word, recipe, origin) for word in overrides)]:
        try:
            _lay_over(config, known, recipe, written, node, where)
        except SettingsError as error:
            problems.append(error)
    problems += out_of_range(config)
    if problems:
        raise together(problems)
    _measure_whole_answers(config)
    _same_tools(config)
    check(config)
    return config


def _lay_over(
    config: RecipeConfig, known: dict[str, Leaf], recipe: str, written: str, node: values.Node, origin: str
) -> None:
    """Put one setting that was given into its place."""
    leaf, entry = _find(written, known, recipe, origin)
    section, _, name = leaf.key.rpartition(".")
    target = getattr(config, section) if section else config
    if entry:
        value = values.coerce(node, typing.get_args(leaf.annotation)[1], f"{leaf.key}.{entry} ({origin})")
        setattr(target, name, {**getattr(target, name), entry: value})
        config.entry_origins[f"{leaf.key}.{entry}"] = origin
        origin = ", ".join(dict.fromkeys([config.origins.get(leaf.key, origin), origin]))
    else:
        setattr(target, name, values.coerce(node, leaf.annotation, f"{leaf.key} ({origin})"))
    config.origins[leaf.key] = origin


def _measure_whole_answers(config: RecipeConfig) -> None:
    """Prompts have no reference that tells how long an answer may get: held-out ones get the length that is sampled."""
    for name in ("max_new_tokens", "max_completion_length"):  # of PPO; of TRL's GRPO and RLOO
        if config.kind == "prompt" and config.evaluate.max_new_tokens is None and hasattr(config, name):
            config.evaluate.max_new_tokens = getattr(config, name)
            config.origins["evaluate.max_new_tokens"] = name


def _same_tools(config: RecipeConfig) -> None:
    """The tools that rows are offered are those that answers may call, where one of the two is not given."""
    if not isinstance(config, ToolsRecipeConfig):
        return
    sides: list[tuple[str, ToolsRecipeConfig | DataConfig]] = [("tools", config), ("data.tools", config.data)]
    for (key, one), (name, other) in (sides, sides[::-1]):
        given, own = config.origins.get(key, ""), config.origins.get(name, "")
        # of a run's own file both are there, and whoever measures it again gives one
        if given and (not own or (given in BY_THE_USER and own not in BY_THE_USER)):
            other.tools = list(one.tools)
            config.origins[name] = given


def recipe_of_yaml(path: Path) -> str:
    """The recipe a YAML file names in `recipe: …`."""
    root = values.read_file(path)
    named = {name: node for name, node, _ in values.pairs(root, str(path))} if root else {}
    recipe = named["recipe"].value if "recipe" in named else None
    if not isinstance(recipe, str):
        raise SettingsError(
            f"{path} does not say which recipe it is for.",
            "Begin it with 'recipe: lora_sft'. Of another toolkit's file this says all names at once: "
            f"python -m finetune_kit check lora_sft --config {path}",
        )
    return recipe


def full_key(config: RecipeConfig, written: str, origin: str) -> str:
    """The dotted key of the setting that `written` means. Raises SettingsError with the nearest right name."""
    return _find(written, {leaf.key: leaf for leaf in leaves(config)}, config.recipe, origin)[0].key


def _read_yaml(path: Path, known: dict[str, Leaf]) -> Iterator[tuple[str, values.Node, str]]:
    """(key, value, file:line) of every setting; `recipe`, `versions` and `origins` are not settings."""
    root = values.read_file(path)
    for name, node, line in values.pairs(root, str(path)) if root else ():
        if name in ("recipe", "versions", "origins"):
            continue
        if name in SECTIONS or any(key.startswith(f"{name}.") for key in known):
            for leaf, value, leaf_line in values.pairs(node, str(path)):
                yield f"{name}.{leaf}", value, f"{path}:{leaf_line}"
        else:
            yield name, node, f"{path}:{line}"


def _read_word(word: str, recipe: str, origin: str) -> tuple[str, values.Node, str]:
    key, equals, text = word.partition("=")
    if not equals:
        raise SettingsError(f"'{word}' is not a setting: expected key=value.", _meant_by(word, recipe))
    return key.strip(), values.read_word(text, origin), origin


def _meant_by(word: str, recipe: str) -> str:
    """What a word without = may have meant: a file, a model, or key: value."""
    see = f"See: {SHOW} {recipe}"
    if word.lower().endswith((".yaml", ".yml")):
        return f"A settings file is given as: --config {word}"
    if Path(word).expanduser().is_dir() and any(Path(word).expanduser().glob("*config.json")):
        return f"A model's folder is given as: model.name_or_path={word}"
    if word.lower().endswith((".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")) or Path(word).is_dir():
        return f"{'' if Path(word).exists() else near_path(word)}Rows are given as: data.path={word}"
    if is_hub_name(word):
        return f"A model is given as model.name_or_path={word}, rows as data.path={word}"
    key, colon, text = word.partition(":")
    if colon and text and key.replace(".", "_").replace("-", "_").isidentifier():
        return f"Write it with an equals sign: {key}={text.strip()}"
    return see


def _find(written: str, known: dict[str, Leaf], recipe: str, origin: str) -> tuple[Leaf, str]:
    """The setting that `written` means, and which entry of it where it is a dict and one is named, else ""."""
    for leaf in known.values():  # an entry's name is the user's own and stays as it is written
        if typing.get_origin(leaf.annotation) is dict and written.startswith(f"{leaf.key}."):
            return leaf, written.removeprefix(f"{leaf.key}.")
    everywhere = [f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in dataclasses.fields(cls)]
    return known[find_name(written, list(known), everywhere, recipe, origin)], ""


def to_yaml(config: RecipeConfig, versions: dict[str, str]) -> str:
    """run.yaml: every setting resolved, where the changed ones came from, and the versions; can be run again."""
    content = {"recipe": config.recipe_word, **dataclasses.asdict(config)}
    return values.dump({**content, "origins": dict(config.origins), "versions": versions})
