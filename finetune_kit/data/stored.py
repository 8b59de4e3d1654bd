"""Records and token columns in Arrow files, from which rows are mapped and not read: memory does not grow with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from finetune_kit.data.records import KINDS, LabelledCompletion, Preference, Prompt, PromptCompletion, Record, Text

if TYPE_CHECKING:
    import datasets

TYPES: dict[str, type[Any]] = {
    kind: cls for cls, kind in KINDS.items() if cls in (Text, PromptCompletion, Prompt, Preference, LabelledCompletion)
}
TOGETHER = 1000  # rows of one batch of a file
TAG = "\0type"  # the key of an object that stands for a value that JSON has not
COLUMN = "record"


class NotStored(Exception):
    """A record that would not come back as it is, such as one with a tuple in a column."""


def to_bytes(record: Record) -> bytes:
    """A record as JSON. Raises NotStored for one that `from_bytes` would not give back."""
    content = [getattr(record, item.name) for item in fields(record)]
    try:
        text = json.dumps([KINDS[type(record)], *content], ensure_ascii=False, default=_tagged)
    except (TypeError, ValueError) as error:
        raise NotStored(str(error)) from None
    written = text.encode("utf-8", "surrogatepass")
    # what is read from JSON comes back; tables have other things in columns
    if (getattr(record, "metadata", None) or "\\u0000type" in text) and not _comes_back(written, record):
        raise NotStored(f"{record.where}: a column's values are not those of JSON")
    return written


def _comes_back(written: bytes, record: Record) -> bool:
    try:
        return from_bytes(written) == record
    except (ValueError, TypeError, KeyError):
        return False


def from_bytes(written: bytes) -> Record:
    kind, *content = json.loads(written.decode("utf-8", "surrogatepass"), object_hook=_untagged)
    record: Record = TYPES[kind](*content)
    return record


_SCALARS: dict[str, tuple[type[Any], Any, Any]] = {
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "timedelta": (timedelta, lambda value: [value.days, value.seconds, value.microseconds], lambda at: timedelta(*at)),
    "decimal": (Decimal, str, Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}


def _tagged(value: Any) -> Any:
    for name, (cls, write, _) in _SCALARS.items():
        if type(value) is cls:
            return {TAG: [name, write(value)]}
    raise TypeError(f"a value of type {type(value).__name__}")


def _untagged(found: dict[str, Any]) -> Any:
    if TAG not in found:
        return found
    name, value = found[TAG]
    return _SCALARS[name][2](value)


class Records(Sequence[Record]):
    """The records of a file of `write_records`; each is read when it is asked for, and is a new one each time."""

    def __init__(self, path: Path) -> None:
        self._column = _mapped(path).column(COLUMN)

    def __len__(self) -> int:
        return len(self._column)

    @overload
    def __getitem__(self, place: int) -> Record: ...

    @overload
    def __getitem__(self, place: slice) -> list[Record]: ...

    def __getitem__(self, place: int | slice) -> Record | list[Record]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(place)
        return from_bytes(self._column[place].as_py())

    def __iter__(self) -> Iterator[Record]:
        for chunk in self._column.chunks:
            yield from map(from_bytes, chunk.to_pylist())


def _mapped(path: Path) -> Any:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Raises NotStored, OSError."""
    import pyarrow as pa

    schema = pa.schema({COLUMN: pa.large_binary()})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(records), TOGETHER):
            written = [to_bytes(record) for record in records[start : start + TOGETHER]]
            writer.write_batch(pa.record_batch([pa.array(written, pa.large_binary())], schema=schema))


def table_of(columns: dict[str, list[Any]], scalars: dict[str, str]) -> datasets.Dataset:
    """Columns of token ids (int32 arrays) and of `scalars` (name -> type) as a table. They are emptied on the way, so
    that a set is not in memory twice."""
    import datasets
    import numpy as np
    import pyarrow as pa

    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features({name: datasets.Value(scalars[name]) if name in scalars else ids for name in columns})

    def taken(name: str) -> Any:
        values, kind, chunks = columns[name], features.arrow_schema.field(name).type, []
        columns[name] = []
        values.reverse()
        while values:
            some = values[: -TOGETHER - 1 : -1]
            del values[-TOGETHER:]
            if name in scalars:
                chunks.append(pa.array(some, kind))
                continue
            ends = np.cumsum([0, *map(len, some)], dtype=np.int32)
            chunks.append(
                pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(some).astype(np.int32)), type=kind)
            )
        return pa.chunked_array(chunks, kind)

    table = pa.Table.from_arrays([taken(name) for name in columns], schema=features.arrow_schema)
    # a name of its own: the library's is a hash of all rows, for which it would copy them
    own = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=own)


def write_rows(path: Path, rows: datasets.Dataset) -> None:
    """Raises OSError."""
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, rows.features.arrow_schema) as writer:
        for batch in rows.with_format("arrow").iter(TOGETHER):
            writer.write_table(batch)


def read_rows(path: Path) -> datasets.Dataset:
    """The rows of a file of `write_rows`, mapped."""
    import datasets

    if not os.access(path.parent, os.W_OK):
        datasets.disable_caching()  # what the library makes of rows goes beside them, or into a temporary folder
    return datasets.Dataset.from_file(str(path))
