"""Which settings fit into a given memory, with the rows of an optimizer step kept."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_kit import recipe as recipes
from finetune_kit.data.load import Data
from finetune_kit.errors import FinetuneKitError, SettingsError
from finetune_kit.models.device import device
from finetune_kit.models.quantization import check_device
from finetune_kit.models.shapes import empty_policy
from finetune_kit.planning.devices import shares
from finetune_kit.planning.memory import memory
from finetune_kit.settings.load import resolve
from finetune_kit.settings.schema import RecipeConfig, TrainConfig
from finetune_kit.training.batching import micro_batch, token_lengths

UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
# each needs less than the one before, and gives something up for it
SMALLER = ("full_sft", "lora_sft", "qlora_sft")


@dataclass(frozen=True)
class ShardingPlan:
    """A recipe with `words` added, spread over devices by `file`: bytes on each, bytes that each sends in an optimizer
    step, and whether there is room for it; None where the room is not known."""

    recipe: str
    words: list[str]
    sharding: str
    file: str
    bytes: int
    sent: int
    fits: bool | None


@dataclass(frozen=True)
class Option:
    """A recipe with `words` added to the settings given, the memory it needs (bytes), and whether that is there."""

    recipe: str
    words: list[str]
    bytes: int
    fits: bool


def read_size(text: str) -> int:
    """Bytes of 24GiB, 24G (the same), 24GB (24 * 10^9) or 16000MiB. Raises SettingsError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?B)?", text, flags=re.IGNORECASE)
    if found is None:
        raise SettingsError(f"--memory {text}: expected a size such as 24GiB, 24GB or 16000MiB.")
    number, unit, kind = found.groups()
    base = 1000 if (kind or "").upper() == "B" else 1024
    return int(float(number) * base ** UNITS[unit.upper()])


def ways(
    recipe: recipes.Recipe,
    config: RecipeConfig,
    given: tuple[Path | None, Sequence[str]],
    data: Data,
    needed: int,
    room: int,
) -> list[Option]:
    """What was asked for, which needs `needed` bytes, and where it does not fit, what does: the least given up first.

    `given`: the YAML file and the words that `config` was made of. Tried are fewer rows in a forward pass and more
    passes; gradient checkpointing; then the recipes that train less of the model or keep it smaller, each in the same
    order. Of each kind there is the one with most rows that fits, or that with one row where none does.
    """
    asked = Option(recipe.name, [], needed, needed <= room)
    if asked.fits:
        return [asked]
    found = [asked, *_of_recipe(recipe.name, config, data, room, asked)]
    for name, smaller in _smaller(recipe, given):
        found += _of_recipe(name, smaller, data, room)
    return found


def sharding_plans(
    recipe: recipes.Recipe,
    config: RecipeConfig,
    given: tuple[Path | None, Sequence[str]],
    data: Data,
    devices: int,
    room: int | None,
) -> list[ShardingPlan]:
    """The ways to run on `devices` devices with `room` bytes each, the least given up first.

    Every sharding of what was asked for, and then with gradient checkpointing, and then of the recipes below it, with
    the rows of one device as they are.
    """
    found = []
    for name, each in [(recipe.name, config), *_smaller(recipe, given)]:
        lora = getattr(each, "lora", None)
        policy = empty_policy(each.model, lora, trained_in_full=lora is None, scores=each.scores)
        for checkpointing in (False, True)[each.train.gradient_checkpointing :]:
            changed = copy.deepcopy(each)
            changed.train.gradient_checkpointing = checkpointing
            added = checkpointing != config.train.gradient_checkpointing
            words = [f"gradient_checkpointing={str(checkpointing).lower()}"] if added else []
            for share in shares(changed, data, policy, devices):
                fits = None if room is None else share.bytes <= room
                found.append(ShardingPlan(name, words, share.sharding, share.file, share.bytes, share.sent, fits))
    return found


def _smaller(recipe: recipes.Recipe, given: tuple[Path | None, Sequence[str]]) -> Iterator[tuple[str, RecipeConfig]]:
    """The built-ins below a built-in, with the same settings given; not those that the device or a setting forbids."""
    later = SMALLER[SMALLER.index(recipe.word) + 1 :] if recipe.word in SMALLER else ()
    for name in later:
        try:
            if name == "qlora_sft":
                check_device(device())
            yield name, resolve(recipes.load(name).config_class, name, *given)
        except FinetuneKitError:
            continue


def _of_recipe(
    name_of_recipe: str, config: RecipeConfig, data: Data, room: int, asked: Option | None = None
) -> Iterator[Option]:
    """Without and with gradient checkpointing: the way with most rows that fits, or the smallest."""
    lora = config.lora
    policy = empty_policy(config.model, lora, trained_in_full=lora is None, scores=config.scores)

    def way(cut: dict[str, int], checkpointing: bool) -> Option:
        changed = copy.deepcopy(config)
        for name, value in {**cut, "gradient_checkpointing": checkpointing}.items():
            setattr(changed.train, name, value)
        differing = [name for name in (*cut, "gradient_checkpointing") if _differ(name, changed, config)]
        words = [f"{name}={str(getattr(changed.train, name)).lower()}" for name in differing]
        size = sum(memory(changed, data, policy).values())
        return Option(name_of_recipe, words, size, size <= room)

    for checkpointing in (False, True)[config.train.gradient_checkpointing :]:
        known = asked is not None and checkpointing == config.train.gradient_checkpointing
        cuts = _cuts(config.train, data)[1 if known else 0 :]
        smallest = way(cuts[-1], checkpointing) if cuts else None
        if smallest is not None:
            larger = (way(cut, checkpointing) for cut in cuts[:-1]) if smallest.fits else iter(())
            yield next((one for one in larger if one.fits), smallest)


def _differ(name: str, one: RecipeConfig, other: RecipeConfig) -> bool:
    return bool(getattr(one.train, name) != getattr(other.train, name))


def _cuts(train: TrainConfig, data: Data) -> list[dict[str, int]]:
    """Settings that take less and less at once with the rows of a step kept: rows and passes, the rows given, then at
    most half of those before, down to one; or the tokens given, then half of those before, down to the longest row."""
    if train.max_tokens_per_batch is not None:
        lengths = token_lengths(data.train)
        least = max(lengths.longest) * lengths.sequences
        tokens = [train.max_tokens_per_batch]
        while tokens[-1] > least:
            tokens.append(max(least, tokens[-1] // 2))
        return [{"max_tokens_per_batch": most} for most in tokens]
    together = train.per_device_train_batch_size * train.gradient_accumulation_steps
    rows, _ = micro_batch(train, data)
    cuts = [train.per_device_train_batch_size]
    while rows > 1:
        rows = max(fewer for fewer in range(1, rows // 2 + 1) if together % fewer == 0)
        cuts.append(rows)
    return [{"per_device_train_batch_size": rows, "gradient_accumulation_steps": together // rows} for rows in cuts]
