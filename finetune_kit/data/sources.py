"""A source's rows: a file, a folder, a Hub data set or a task, read and turned into records."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.data import tasks
from finetune_kit.data.bfcl import TRUTH, has_rows, is_bfcl, with_answers
from finetune_kit.data.columns import Row, unused_in
from finetune_kit.data.files import (
    COMPRESSED,
    DATA_SUFFIXES,
    READERS,
    Bad,
    Numbered,
    check_text,
    data_files,
    read_txt,
    refuse,
    row_at,
    runs_of,
    suffix_of,
)
from finetune_kit.data.formats import (
    UNDERSTOOD,
    as_lists,
    check_columns,
    check_layout,
    displaced,
    layouts_of,
    rename,
)
from finetune_kit.data.ledger import Ledger
from finetune_kit.data.messages import check_media, in_turn, turns_in
from finetune_kit.data.records import KINDS, Prompt, PromptCompletion, Record, Text
from finetune_kit.data.spelling import opened, spelling
from finetune_kit.data.split import held_out_count
from finetune_kit.data.to_records import answers_as_text, as_kind
from finetune_kit.data.tokenise import labelled, pairs, prompts, supervised
from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.settings.aliases import near_path
from finetune_kit.settings.schema import DataConfig
from finetune_kit.system.network import hub_reachable

if TYPE_CHECKING:
    pass


SHAKESPEARE = "tiny_shakespeare"  # the text that the package carries
HELD_OUT_SHARE = 0.1  # of it, at its end, as nanoGPT has it
HELD_OUT_TASK_ROWS = 128
MOST_UNKNOWN = 0.05  # share of the tokens
TASK_ROWS = 256
BUILDERS = {
    "prompt_completion": supervised,
    "text": supervised,
    "prompt": prompts,
    "preference": pairs,
    "labelled_completion": labelled,
}
UNREADABLE = "cannot be read"
OFFLINE_DEFAULT = "data.path=reasoning_gym/word_sequence_reversal"


@dataclass
class Source:
    """One path's rows; `held_out` is None where they are to be split off."""

    name: str
    train: list[Record]
    held_out: list[Record] | None = None


def passed_over(config: DataConfig, ledger: Ledger, split: str) -> Bad:
    """Rows that cannot be read are booked, up to data.skip_bad_rows of them; the next one is refused."""

    def bad(where: str, error: DataError) -> None:
        if sum(counts.dropped[UNREADABLE] for counts in ledger.splits.values()) >= config.skip_bad_rows:
            raise error
        ledger.splits[split].rows += 1
        ledger.drop(split, where, UNREADABLE, f": {error.message}")

    return bad


def read_source(
    path: str,
    config: DataConfig,
    kind: str,
    seed: int,
    bad: Bad,
    unused: Counter[str],
    held_out_only: bool = False,
) -> Source:
    if path.startswith(tasks.PREFIX):
        return _read_task(path.removeprefix(tasks.PREFIX), config, kind, seed, held_out_only)
    local = Path(path).expanduser()
    if path == SHAKESPEARE and not local.exists():
        return _shakespeare(kind)
    if local.is_dir():
        train, held = data_files(local)
        rows = [record for file in filter(has_rows, train) for record in _read_file(file, config, kind, bad, unused)]
        apart = [record for file in filter(has_rows, held) for record in _read_file(file, config, kind, bad, unused)]
        return Source(path, rows, apart if held else None)
    if local.is_file():
        return Source(path, _read_file(local, config, kind, bad, unused))
    if suffix_of(local) in (*DATA_SUFFIXES, *COMPRESSED) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise DataError(
            f"data.path={path}: no such file or folder.",
            f"{near_path(path)}Expected a file ({', '.join(DATA_SUFFIXES)}), a folder or a Hub id.",
        )
    return Source(path, _records(_read_hub(path, config), path, config, kind, bad, unused))


def _shakespeare(kind: str) -> Source:
    """The plays of tiny Shakespeare, the last tenth of their characters held out."""
    _check_takes_text(SHAKESPEARE, kind)
    text = (files("finetune_kit.data") / "assets/shakespeare.txt").read_text(encoding="utf-8")
    edge = int(len(text) * (1 - HELD_OUT_SHARE))
    train, held_out = (
        [Text(f"{name}:{line}", run, ends) for line, run, ends in runs_of(part, name)]
        for name, part in ((SHAKESPEARE, text[:edge]), (f"{SHAKESPEARE}, held out", text[edge:]))
    )
    return Source(SHAKESPEARE, list(train), list(held_out))


def _check_takes_text(path: object, kind: str) -> None:
    if kind not in ("prompt_completion", "text"):
        raise DataError(f"{path}: plain text; this recipe needs {kind.replace('_', '-')} rows.")


def _read_task(task: str, config: DataConfig, kind: str, seed: int, held_out_only: bool) -> Source:
    """Held-out problems from their fixed seed; training problems that repeat none of them, until there are enough."""
    wanted = config.size or TASK_ROWS
    size = config.held_out_size
    count = HELD_OUT_TASK_ROWS if size is None else held_out_count(size, wanted)
    held_out = tasks.task_rows(task, count, tasks.HELD_OUT_SEED, config.options)
    train: list[PromptCompletion] = []
    known = {record.messages[0]["content"] for record in held_out}
    first = tasks.train_seed(seed)
    while not held_out_only and len(train) < wanted and first < tasks.train_seed(seed) + 10 * wanted:
        missing = wanted - len(train)
        drawn = tasks.task_rows(task, missing, first, config.options)
        train += [record for record in drawn if record.messages[0]["content"] not in known]
        first += missing
    return Source(
        tasks.PREFIX + task,
        _as_kind(train, kind, tasks.train_seed(seed), config.options),
        _as_kind(held_out, kind, tasks.HELD_OUT_SEED, config.options),
    )


def _as_kind(rows: list[PromptCompletion], kind: str, seed: int, options: dict[str, Any]) -> list[Record]:
    """A task's problems as the kind of record that a recipe trains on."""
    paired = rows and kind in ("preference", "labelled_completion")
    records: list[Any] = tasks.task_pairs(rows, seed, options) if paired else rows
    return [same for record in records for same in as_kind(record, kind)]


def _read_file(path: Path, config: DataConfig, kind: str, bad: Bad, unused: Counter[str]) -> list[Record]:
    suffix = suffix_of(path)
    if suffix == ".txt":
        _check_takes_text(path, kind)
        return [Text(f"{path.name}:{line}", text, ends) for line, text, ends in read_txt(path)]
    if suffix == ".parquet":
        return _records(_read_parquet(path), path.name, config, kind, bad, unused)
    if suffix in (*COMPRESSED, ".xz", ".zip"):
        named = "" if suffix not in COMPRESSED else f", or let its name say what is in it: {path.stem}.jsonl{suffix}"
        unpack = {".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"}[suffix]
        raise DataError(f"{path}: compressed.", f"{unpack} {path.name}{named}")
    if suffix not in READERS:
        raise DataError(f"{path}: cannot read this kind of file.", f"Expected {', '.join(DATA_SUFFIXES)}.")
    return _records(with_answers(READERS[suffix](path, bad), path), path.name, config, kind, bad, unused)


def _records(
    numbered: Numbered, name: str, config: DataConfig, kind: str, bad: Bad, unused: Counter[str]
) -> list[Record]:
    """The rows of one source as records; `unused` counts what of them is in none."""
    rows: Numbered = []
    for number, row in numbered:
        with row_at(f"{name}:{number}", bad):
            check_text(row, f"{name}:{number}")
            rows.append((number, {column: _without_nulls(value) for column, value in row.items()}))
    if not rows:
        raise DataError(f"{name}: no rows.", "Give a file with rows in it.")
    check_columns(config.columns, {column for _, row in rows for column in row}, name)
    named = [(number, rename(row, config.columns)) for number, row in rows]
    columns = {column for _, row in named for column, value in row.items() if value is not None}
    if not columns:
        empty = ", ".join(sorted({column for _, row in named for column in row})) or "none"
        raise DataError(f"{name}: all columns are empty in every row: {empty}.", "Give a file with rows in it.")
    unused.update(
        column for _, row in rows for column in displaced(row, config.columns) if row[column] not in (None, "", [], {})
    )
    spelled = opened(named, name)
    ours = spelling(spelled, UNDERSTOOD)
    theirs = {name: column for column, name in ours.items()}
    columns = {ours.get(column, column) for _, row in spelled for column, value in row.items() if value is not None}
    complete = [
        (number, Row({column: turns_in(row.get(theirs.get(column, column)), column) for column in columns}))
        for number, row in spelled
    ]
    if kind == "prompt":
        complete = [(number, Row(answers_as_text(row), waits=True)) for number, row in complete]
    complete = as_lists(complete, kind)
    found, layouts = layouts_of([row for _, row in complete], kind, name, theirs)
    like_it = next((place for place, layout in zip(complete, layouts, strict=True) if layout is found), complete[0])
    if config.pairs == "all" and not found.ranked:
        raise SettingsError(f"data.pairs=all has no effect: {name} has one pair a row ({found.name}).", "Leave it out.")
    records: list[Record] = []
    as_read = dict(rows)
    for (number, row), layout in zip(complete, layouts, strict=True):
        with row_at(f"{name}:{number}", bad):
            check_media(row, f"{name}:{number}")
            check_layout(row, layout, found, f"{name}:{number}", (f"{name}:{like_it[0]}", like_it[1]))
            converted = found.convert(row, f"{name}:{number}")
            unused.update(theirs.get(column, column) for column in unused_in(row))
            for record in converted:
                _settle_turns(record, config.merge_turns)
                if isinstance(record, Text):
                    continue
                if kind == "prompt":  # what rewards judge by
                    record.metadata = as_read[number]
                elif is_bfcl(as_read[number]) and TRUTH in as_read[number]:  # what calls are judged by
                    record.metadata = {TRUTH: as_read[number][TRUTH]}
            records += converted[:1] if found.ranked and config.pairs == "best_worst" else converted
    return [same for record in records for same in as_kind(record, kind, bool(config.tools))]


def _settle_turns(record: Record, merge: bool) -> None:
    """Let a record's conversation go by turns."""
    if isinstance(record, PromptCompletion | Prompt):
        record.messages = in_turn(record.messages, record.where, merge)
    elif not isinstance(record, Text):
        record.prompt = in_turn(record.prompt, record.where, merge)


def shown(source: str) -> str:
    """A file's name without its folders, which are nobody's business in a report; a Hub id as it is."""
    path = Path(source).expanduser()
    return path.name if path.is_file() else source


def read_rows(source: str, setting: str) -> Numbered:
    """The rows of a file or a Hub data set as they are; `source` may name the split: user/name:test (else train).

    `setting` is what named it. Raises DataError, ResourceError.
    """
    path, config = Path(source).expanduser(), DataConfig()
    if path.is_file():
        suffix = suffix_of(path)
        if suffix != ".parquet" and suffix not in READERS:
            raise DataError(
                f"{setting}: {source}: cannot read this kind of file.", "Expected JSONL, JSON, CSV, Parquet."
            )
        rows = _read_parquet(path) if suffix == ".parquet" else READERS[suffix](path, refuse)
        for number, row in rows:
            check_text(row, f"{path.name}:{number}")
    elif found := re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(\w+))?", source):
        if suffix_of(path) in DATA_SUFFIXES:
            raise DataError(f"{setting}: {source}: no such file.", near_path(source) or "Look at its name.")
        config.split = found[2] or config.split
        rows = _read_hub(found[1], config)
    else:
        raise DataError(f"{setting}: {source}: no such file.", f"{near_path(source)}Expected a file, or a Hub id.")
    if not rows:
        raise DataError(f"{setting}: {source}: no rows.", "Give a file with rows in it.")
    return rows


def _read_parquet(path: Path) -> Numbered:
    import datasets

    # The library caches what it reads; a folder of our own keeps a stale copy from ever being read instead.
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
            listed = _as_stored(rows).to_list()
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            raise DataError(f"{path}: not readable as Parquet: {error.__cause__ or error}") from None
    return list(enumerate(listed, start=1))


def _read_hub(name: str, config: DataConfig) -> Numbered:
    fix = f"Download it elsewhere and give the file, or use the offline default: {OFFLINE_DEFAULT}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not offline and not hub_reachable():
        raise ResourceError(
            f"data.path={name}: no such file here, and the Hugging Face Hub cannot be reached.",
            f"{fix}\nWhat is downloaded already is found with HF_HUB_OFFLINE=1.",
        )
    import datasets

    try:
        rows = datasets.load_dataset(name, config.name, split=config.split, revision=config.revision)
    except ConnectionError:
        raise ResourceError(
            f"data.path={name}: no such file here, and the Hub is offline (HF_HUB_OFFLINE).", fix
        ) from None
    except datasets.exceptions.DatasetNotFoundError as error:
        login = "" if "Revision" in str(error) else "Where it is gated or private: hf auth login, or set HF_TOKEN. "
        raise ResourceError(f"data.path={name}: no such file here, and on the Hub: {error}", login + fix) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data.path={name}: {error}", "See data.name, data.split and data.revision.") from None
    return list(enumerate(_as_stored(rows).to_list(), start=1))


def _as_stored(rows: Any) -> Any:
    """The data set with its pictures and sound as bytes: nothing decodes what is going to be refused."""
    for name, feature in rows.features.items():
        if getattr(feature, "decode", None) is True:
            rows = rows.cast_column(name, type(feature)(decode=False))
    return rows


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that a column store fills every absent key with, here and where it is exported."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def of_one_kind(records: list[Record]) -> str:
    by_kind: dict[str, str] = {}
    for record in records:
        by_kind.setdefault(KINDS[type(record)], record.where)
    if len(by_kind) > 1:
        found = " and ".join(f"{kind} ({where})" for kind, where in by_kind.items())
        raise DataError(f"The sources hold different kinds of rows: {found}.", "Train them one after the other.")
    return next(iter(by_kind))
