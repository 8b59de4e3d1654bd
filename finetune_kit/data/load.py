"""Any source to tokens and labels: find the rows, split them, mask them, and account for each one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.data import prepared, tasks
from finetune_kit.data.chat import end_token_ids
from finetune_kit.data.columns import UNUSED
from finetune_kit.data.files import (
    Bad,
    refuse,
)
from finetune_kit.data.ledger import REPEATED, Ledger, fingerprint_of
from finetune_kit.data.records import KINDS, Prompt, PromptCompletion, Record, Text
from finetune_kit.data.sources import BUILDERS, MOST_UNKNOWN, SHAKESPEARE, of_one_kind, passed_over, read_source
from finetune_kit.data.split import (
    FEWEST,
    MOST_SHARED,
    drop_overlap,
    drop_repeated,
    held_out_count,
    labels,
    mix,
    sample,
    split_off,
    texts_within,
)
from finetune_kit.data.stored import NotStored, Records, read_rows, table_of, write_records, write_rows
from finetune_kit.data.template import prepare_tokenizer
from finetune_kit.data.tokenise import Tokens, mark_contradictions
from finetune_kit.data.tool_rows import offer_tools
from finetune_kit.errors import DataError, SettingsError
from finetune_kit.settings.schema import DataConfig
from finetune_kit.system.terminal import doing

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

SCALARS = {"row": "int32", "margin": "float32", "label": "bool"}  # columns without ids
MOST_NAMED = 12  # unused columns on the console; the ledger has all


@dataclass
class Data:
    """What a trainer and an evaluation need.

    `kind`: prompt_completion, text, prompt, preference or labelled_completion. `train`, `held_out`: for the first two,
    columns input_ids, labels (-100 where unsupervised) and row (index into the records, those of which something is
    kept); for the others row and prompt_ids, with chosen_ids, rejected_ids and margin (NaN where not known) for pairs,
    completion_ids and label for labelled answers. `score`: the task's own scorer of (completion, row's metadata), for
    reasoning_gym. `end_token_ids`: what stops an answer. `packed`: several samples may share a row of the batch.
    `chat_template_kwargs`, `special_tokens_in_text`: what the prompts of an evaluation have to be rendered with.
    """

    kind: str
    train: datasets.Dataset
    held_out: datasets.Dataset
    held_out_records: Sequence[Record]
    train_records: Sequence[Record]
    ledger: Ledger
    score: Callable[[str, dict[str, Any]], float] | None
    end_token_ids: list[int]
    packed: bool
    chat_template_kwargs: dict[str, Any]
    special_tokens_in_text: str = "text"


def load_data(config: DataConfig, kind: str, tokenizer: Any, seed: int = 0) -> Data:
    """Rows of `config.path` as `kind`, split, tokenised and accounted for.

    "prompt_completion" takes plain text too (`Data.kind` is then "text"), "text" nothing else. A tokenizer without a
    chat template gets the fallback one where the data are conversations. With no path at all there are held-out rows
    alone, to measure on. Raises DataError (rows), SettingsError, ResourceError (Hub, package).
    """
    with doing(f"reading {_shown(config)}"):
        _check_acts(config)
        name = prepared.key_of(config, kind, seed, tokenizer)
        if name is None:
            return _load_data(config, kind, tokenizer, seed)
        if (kept := _read(name, config, tokenizer)) is not None:
            return kept
        try:
            with prepared.alone(name):
                kept = _read(name, config, tokenizer)
                return kept or _keep(_load_data(config, kind, tokenizer, seed), name, config, tokenizer)
        except OSError as error:
            log.warning("note: prepared rows are not kept: %s", error)
            return _load_data(config, kind, tokenizer, seed)


def _read(name: str, config: DataConfig, tokenizer: Any) -> Data | None:
    """The data as another command, or another process, has prepared them."""
    found = prepared.found(name)
    if found is None:
        return None
    folder, facts = found
    prepare_tokenizer(tokenizer, conversations=facts["templated"])
    return Data(
        kind=facts["kind"],
        train=read_rows(folder / "train.arrow"),
        held_out=read_rows(folder / "held_out.arrow"),
        held_out_records=Records(folder / "held_out_records.arrow"),
        train_records=Records(folder / "train_records.arrow"),
        ledger=Ledger.from_json(facts["ledger"]),
        score=None,
        end_token_ids=facts["end_token_ids"],
        packed=facts["packed"],
        chat_template_kwargs=config.chat_template_kwargs,
        special_tokens_in_text=config.special_tokens_in_text,
    )


def _keep(data: Data, name: str, config: DataConfig, tokenizer: Any) -> Data:
    """The data, on disk from here on where they can be kept there."""
    counts = data.ledger.splits.values()
    facts = {
        "what": f"{_shown(config)}: {sum(split.rows for split in counts):,} {data.kind.replace('_', '-')} rows",
        "kind": data.kind,
        "templated": bool(tokenizer.chat_template) and data.kind != "text",
        "ledger": data.ledger.to_json(),
        "end_token_ids": data.end_token_ids,
        "packed": data.packed,
    }
    try:
        with prepared.writing(name, facts) as folder:
            write_rows(folder / "train.arrow", data.train)
            write_rows(folder / "held_out.arrow", data.held_out)
            write_records(folder / "train_records.arrow", data.train_records)
            write_records(folder / "held_out_records.arrow", data.held_out_records)
    except NotStored as error:
        log.debug("prepared rows are not kept: %s", error)
    except OSError as error:
        log.warning("note: prepared rows are not kept: %s", error)
    return _read(name, config, tokenizer) or data


def _load_data(config: DataConfig, kind: str, tokenizer: Any, seed: int) -> Data:
    ledger = Ledger()
    train, held_out = _split(config, kind, seed, ledger)
    if not train and (config.path or not held_out):
        raise DataError(f"data.path={_shown(config)}: no training rows.", "Give a file with rows in it.")
    asked, kind = kind, of_one_kind([*train, *held_out])
    if asked == "text" and kind != "text":
        raise _no_text([*train, *held_out], kind)
    if config.tools:
        for note in offer_tools([*train, *held_out], config.tools):
            ledger.note(note)
    if config.packing and kind not in ("prompt_completion", "text"):
        raise SettingsError(f"data.packing has no effect on {kind.replace('_', '-')} rows.", "Leave it out.")
    mark_contradictions([*train, *held_out])
    ledger.fingerprint = fingerprint_of([*train, *held_out])
    _prepare(config, tokenizer, [*train, *held_out], ledger)
    ledger.train.rows += len(train)  # beside those that could not be read
    ledger.held_out.rows += len(held_out)
    held_out = drop_repeated(held_out, ledger)
    train = drop_overlap(train, held_out, ledger)
    _check_apart(train, held_out, ledger, refuses=asked == "text")
    build = BUILDERS[kind]
    trained = build(train, "train", config, tokenizer, ledger)
    measured = build(held_out, "held_out", config, tokenizer, ledger)
    ledger.check(config.max_lost)
    if not trained.records and config.path:
        raise DataError(
            f"data.path={_shown(config)}: no training row is left.", "See data.max_lost and the rows themselves."
        )
    _check_known(tokenizer, trained, config)
    _warn(config, kind, trained, measured, ledger)
    ends = end_token_ids(tokenizer, config.chat_template_kwargs)
    return Data(
        kind=kind,
        train=table_of(trained.columns, SCALARS),
        held_out=table_of(measured.columns, SCALARS),
        held_out_records=measured.records,
        train_records=trained.records,
        ledger=ledger,
        score=_scorer(measured.records, config),
        end_token_ids=list(dict.fromkeys([*ends, *sorted(trained.ends | measured.ends)])),
        packed=kind == "text" if config.packing is None else config.packing,
        chat_template_kwargs=config.chat_template_kwargs,
        special_tokens_in_text=config.special_tokens_in_text,
    )


def training_texts(config: DataConfig, seed: int = 0) -> Iterator[str]:
    """The plain texts that `load_data` with these settings trains on, none of which is held out: what a tokenizer may
    learn from. Read when they are asked for. Raises as `load_data` does."""
    ledger = Ledger()  # load_data keeps the account
    train, held_out = _split(config, "text", seed, ledger)
    ledger.train.rows = len(train)
    for record in drop_overlap(train, held_out, ledger):
        if not isinstance(record, Text):
            raise _no_text([record], KINDS[type(record)])
        yield record.text


def _check_apart(train: list[Record], held_out: list[Record], ledger: Ledger, refuses: bool) -> None:
    """Note held-out texts that are part of training texts. Raises DataError where these are most of them and it
    `refuses`: what would be measured there is memory."""
    within = texts_within(held_out, train)
    if not within:
        return
    said = f"{len(within)} of {len(held_out)} held-out texts stand in the training text, too ({within[0].where})"
    if refuses and len(within) > MOST_SHARED * len(held_out):
        raise DataError(
            f"{said}: what is measured there would be memory.",
            "Remove them from the one or the other; without data.held_out_path some are split off.",
        )
    ledger.note(f"{said}: there memory counts as skill")


def _no_text(records: list[Record], kind: str) -> DataError:
    first = next(record.where for record in records if not isinstance(record, Text))
    return DataError(
        f"{first}: a {kind.replace('_', '-')} row; this recipe needs plain text.",
        "Give .txt files or rows with a text column; fine-tune on such rows afterwards: run full_sft",
    )


def _check_acts(config: DataConfig) -> None:
    """Raises SettingsError for a setting of a Hub data set or of a task where there is none."""
    paths = [*_listed(config.path), *([config.held_out_path] if config.held_out_path else [])]
    others = [path for path in paths if not path.startswith(tasks.PREFIX)]
    if config.options and len(others) == len(paths):
        raise SettingsError(
            f"data.options has no effect: {_shown(config)} is not a {tasks.PREFIX} task.", "Leave it out."
        )
    if any(path != SHAKESPEARE and not Path(path).expanduser().exists() for path in others):
        return
    for name, given in (("name", config.name), ("split", config.split), ("revision", config.revision)):
        if given != getattr(DataConfig, name):
            raise SettingsError(f"data.{name}={given} has no effect: no path is a Hub data set.", "Leave it out.")


def _check_known(tokenizer: Any, tokens: Tokens, config: DataConfig) -> None:
    """Raises DataError where more than MOST_UNKNOWN of the tokens are the tokenizer's word for what it cannot write."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    columns = [column for name, column in tokens.columns.items() if name.endswith("_ids")]
    counts = [
        (sum(int((ids == unknown).sum()) for ids in row), sum(map(len, row))) for row in zip(*columns, strict=True)
    ]
    found, total = (sum(numbers) for numbers in zip(*counts, strict=True)) if counts else (0, 0)
    if found > MOST_UNKNOWN * total:
        first = next(row for row, (count, _) in zip(tokens.columns["row"], counts, strict=True) if count)
        raise DataError(
            f"data.path={_shown(config)}: {found / total:.0%} of the tokens are {tokenizer.unk_token}: the model's "
            f"tokenizer cannot write this text. First: {tokens.records[first].where}.",
            "Use a model whose tokenizer knows the language or the characters: model.name_or_path=…",
        )


def _warn(config: DataConfig, kind: str, trained: Tokens, held_out: Tokens, ledger: Ledger) -> None:
    """Note what is not a mistake and yet will disappoint. Raises DataError for disliked answers alone."""
    counts, measured = ledger.train, ledger.held_out.rows - ledger.held_out.dropped[REPEATED]
    if kind == "prompt_completion" and counts.truncated > 0.05 * counts.rows:
        ledger.note(
            f"{counts.truncated} of {counts.rows} training rows are longer than data.max_length={config.max_length} "
            "and lose their end, the end token included: the model may not learn to stop"
        )
    known = {name for name, ours in config.columns.items() if ours == UNUSED}
    counted = sorted(ledger.unused_columns.items(), key=lambda item: (-item[1], item[0]))
    unused = [f"{name} ({count} rows)" for name, count in counted if name not in known]
    if unused:
        more = f" and {len(unused) - MOST_NAMED} more" if len(unused) > MOST_NAMED else ""
        lead = "given to rewards at most" if kind == "prompt" else "not used"
        ledger.note(f"{lead}: {', '.join(unused[:MOST_NAMED])}{more}; data.columns says what a column means")
    if ledger.special_rows:
        tokens = ", ".join(list(ledger.special_tokens_in_text)[:4])
        done = {
            "text": "they are written as text, and start or end no turn",
            "refuse": "they are left out",
            "keep": "THEY ARE TAKEN FOR THE TOKENS, AND MAKE TURNS",
        }
        ledger.note(
            f"{ledger.special_rows} rows hold special tokens in their text ({tokens}): "
            f"{done[config.special_tokens_in_text]} (data.special_tokens_in_text={config.special_tokens_in_text})"
        )
    if ledger.mimicking_rows:
        ledger.note(
            f"{ledger.mimicking_rows} rows hold the very text that the chat template parts turns with, which is no "
            "token: the model sees more turns there than there are"
        )
    if kind == "labelled_completion" and trained.records and not any(trained.columns["label"]):
        raise DataError(
            f"data.path={_shown(config)}: all {len(trained.records)} training rows are disliked (label false): no "
            "answer would become likelier.",
            "Add liked answers, with label true.",
        )
    if kind == "labelled_completion" and trained.records and all(trained.columns["label"]):
        ledger.note(
            f"all {len(trained.records)} training rows are liked: KTO learns from both. Add disliked answers, or take "
            "run lora_sft, which learns from good answers alone"
        )
    if kind == "labelled_completion" and labels(held_out.records) == {False}:
        raise DataError(
            f"All {len(held_out.records)} held-out rows are disliked (label false): that liked answers become likelier "
            "could not be measured.",
            "Hold out liked ones, too: data.held_out_path=FILE, or more rows: data.held_out_size=…",
        )
    if kind == "labelled_completion" and (has := labels(held_out.records)) and labels(trained.records) - has:
        lacks = "disliked" if has == {True} else "liked"
        ledger.note(
            f"no {lacks} row is held out: what training does to such answers is not measured; "
            "see data.held_out_size and data.held_out_path"
        )
    if 0 < measured < FEWEST:
        ledger.note(
            f"only {measured} held-out rows: too few to judge, a verdict needs {FEWEST}; "
            "see data.held_out_size and data.held_out_path"
        )


def load_records(
    paths: str | list[str],
    config: DataConfig,
    kind: str = "prompt_completion",
    seed: int = 0,
    bad: Bad = refuse,
    unused: Counter[str] | None = None,
) -> list[Record]:
    """All rows of one or several paths in order, neither split nor mixed; a task gives its held-out problems.

    `unused`: gets a count for each column that says something which is in no record.
    """
    records: list[Record] = []
    unused = Counter() if unused is None else unused
    for path in _listed(paths):
        source = read_source(path, config, kind, seed, bad, unused, held_out_only=True)
        records += source.train + (source.held_out or [])
    return records


def _shown(config: DataConfig) -> str:
    return ", ".join(_listed(config.path))


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _split(config: DataConfig, kind: str, seed: int, ledger: Ledger) -> tuple[list[Record], list[Record]]:
    """(training, held-out) rows of all paths: split first, then mixed by weight, then sampled to `size`."""
    bad = passed_over(config, ledger, "train")
    sources = [read_source(path, config, kind, seed, bad, ledger.unused_columns) for path in _listed(config.path)]
    held_out: list[Record] = []
    if config.held_out_path:
        bad = passed_over(config, ledger, "held_out")
        held_out = load_records(config.held_out_path, config, kind, seed, bad, ledger.unused_columns)
        if not held_out:
            raise DataError(f"data.held_out_path={config.held_out_path}: no rows.")
    else:
        open_rows = [record for source in sources if source.held_out is None for record in source.train]
        given = [record for source in sources for record in source.held_out or []]
        off = split_off(open_rows, config.held_out_size, seed)[1] if open_rows else []
        chosen = {id(record) for record in off}
        for source in sources:
            source.train = [record for record in source.train if id(record) not in chosen]
        held_out = given + off
    if config.held_out_path and config.held_out_size is not None:
        held_out = sample(held_out, held_out_count(config.held_out_size, len(held_out)), seed)
    train = mix([source.train for source in sources], config.weights, seed, ledger, [source.name for source in sources])
    if config.size is not None and config.size < len(train):
        ledger.note(f"data.size: {config.size} of {len(train)} training rows drawn by the seed.")
        train = sample(train, config.size, seed)
    return train, held_out


def _prepare(config: DataConfig, tokenizer: Any, records: list[Record], ledger: Ledger) -> None:
    """System turns added, bare strings marked, and a template set where the tokenizer needs one."""
    conversations = [record for record in records if not isinstance(record, Text)]
    if config.system_prompt:
        for record in conversations:
            turns = record.messages if isinstance(record, PromptCompletion | Prompt) else record.prompt
            if turns and turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": config.system_prompt})
    bare = [record for record in conversations if isinstance(record, PromptCompletion) and record.as_strings]
    all_bare = bool(bare) and len(bare) == len(conversations)
    if not config.apply_chat_template and conversations and not all_bare:
        raise SettingsError(
            "data.apply_chat_template=false needs prompt and completion strings; the data are conversations.",
            "Leave the setting out.",
        )
    if all_bare and (not config.apply_chat_template or not tokenizer.chat_template):
        if config.system_prompt:
            raise SettingsError(
                "data.system_prompt has no effect: prompts are trained as bare text, without a chat template."
            )
        for record in bare:
            for message in record.messages:
                message["plain"] = True
        ledger.note("Prompts and completions are trained as bare text, without a chat template.")
        return
    for note in prepare_tokenizer(tokenizer, bool(conversations)):
        ledger.note(note)


def _scorer(held_out: list[Record], config: DataConfig) -> Callable[[str, dict[str, Any]], float] | None:
    if not held_out or not all(record.where.startswith(tasks.PREFIX) for record in held_out):
        return None
    names = {record.metadata["task"] for record in held_out if not isinstance(record, Text)}
    scorers = {str(name): tasks.scorer(str(name), config.options) for name in names}
    return lambda completion, metadata: scorers[metadata["task"]](completion, metadata)
