"""Files to rows, with the standard library alone: every refusal names file, line and, where there is one, column."""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from finetune_kit.errors import DataError, SecurityError
from finetune_kit.system.parsing import NotJSON, parse

log = logging.getLogger(__name__)

Row = dict[str, Any]
Numbered = list[tuple[int, Row]]  # (1-based number people find the row by, row)
Bad = Callable[[str, DataError], None]  # what comes of a row that cannot be read: its place, and what is wrong with it

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # behind one of the others but .parquet: Arrow's name of it
LONGEST_TEXT_RUN = 4096  # characters
LARGEST_LINE = 64 * 2**20  # bytes of one row
LARGEST_FILE = 4 * 2**30  # bytes of a file that has to be read as a whole
_HELD_OUT_NAME = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|val|eval|evaluation|dev|held_?out)(?:[^a-z]|$)")
_BESIDES = re.compile(r"^(?:readme|licen[cs]e|requirements|notice)", re.IGNORECASE)


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(training, held-out) data files of a folder, told apart by their names; other files are left alone.

    A name with `train` in it is for training; test, valid, val, eval, dev or held_out as a word of it is held out.
    """
    home = folder.resolve()
    files = sorted(
        path
        for path in folder.rglob("*")
        if suffix_of(path) in DATA_SUFFIXES
        and path.is_file()
        and _inside(path, home)
        and not _BESIDES.match(path.name)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    held = [path for path in files if "train" not in path.stem.lower() and _HELD_OUT_NAME.search(path.stem.lower())]
    train = [path for path in files if path not in held]
    if not train:
        found = f"only held-out files ({', '.join(path.name for path in held)})" if held else "no data file"
        raise DataError(f"{folder}: found {found}.", f"Expected files ending in {', '.join(DATA_SUFFIXES)}.")
    return train, held


def suffix_of(path: Path) -> str:
    """What a file's name says is in it: .jsonl of rows.jsonl and of rows.jsonl.gz, .gz of rows.gz."""
    suffix = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if suffix in COMPRESSED else ""
    return inner if inner in DATA_SUFFIXES and inner != ".parquet" else suffix


def _inside(path: Path, home: Path) -> bool:
    """True; SecurityError for a link that leads out of the folder: whoever made the folder chose what is read."""
    target = path.resolve()
    # a snapshot of the Hub's cache is made of links to the blobs beside it
    homes = [home, *(above.parent / "blobs" for above in home.parents if above.name == "snapshots")]
    if any(target.is_relative_to(own) for own in homes):
        return True
    raise SecurityError(
        f"{path} is a link to {target}, outside the data's folder.",
        f"Put the file itself there, or name it: data.path={target}",
    )


def refuse(where: str, error: DataError) -> None:
    """A row that cannot be read ends the reading."""
    raise error


@contextmanager
def row_at(where: str, bad: Bad) -> Iterator[None]:
    """What is done with one row: a DataError in it is `bad`'s, which may raise it, or continue with the next row.

    So is a value that no arithmetic of ours can hold: an integer of 400 digits as a score.
    """
    try:
        yield
    except DataError as error:
        bad(where, error)
    except OverflowError as error:
        bad(where, DataError(f"{where}: a number that is too large: {error}.", "Write a smaller one."))
    except (RecursionError, MemoryError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else "too large for the memory"
        bad(where, DataError(f"{where}: a value that is {said}.", "Fix the row, or remove it."))


def read_jsonl(path: Path, bad: Bad = refuse) -> Numbered:
    """One object a line; blank lines are passed over. A DataError has line and column."""
    rows = []
    for number, raw in _lines(path):
        with row_at(f"{path.name}:{number}", bad):
            text = _decode(raw, path, number)
            if number == 1 and text.lstrip().startswith("["):
                _refuse_list(path, text)
            if text.strip():
                rows.append((number, _object(_parse(text.rstrip("\r\n"), path, number), f"{path}:{number}")))
    return rows


def _refuse_list(path: Path, first: str) -> None:
    """Raises DataError where a file named .jsonl begins like a list of rows: a row is an object, never a list."""
    try:
        begun = json.loads(first)
        if not any(isinstance(row, dict) for row in begun):
            return  # a whole line that is a list of other things: a broken row
    except RecursionError:
        return  # told by whoever reads the row
    except ValueError:
        pass  # the list continues in the next line
    name = re.sub(r"\.(jsonl|ndjson)", ".json", path.name, flags=re.IGNORECASE)
    raise DataError(f"{path}:1: one JSON list, not an object a line.", f"Name it {name}: mv {path.name} {name}")


def read_json(path: Path, bad: Bad = refuse) -> Numbered:
    """A list of objects, or {"data": [...]}; rows are numbered from 1. A file of one object a line is read as JSONL."""
    raw = _whole(path, "One object a line can be larger:  jq -c '.[]' {0} > {1}.jsonl")
    text = _decode(raw, path, 1)
    if not text.strip():
        return []
    try:
        content = parse(text)
    except NotJSON as error:
        if "Extra data" in error.what:
            return read_jsonl(path, bad)
        place = "".join(f":{number}" for number in (error.line, error.column) if number)
        raise DataError(f"{path}{place}: {error.what}.", error.fix) from None
    if isinstance(content, dict):
        content = content.get("data", [content])
    if not isinstance(content, list):
        raise DataError(
            f"{path}: expected a list of rows, found {type(content).__name__}.", '[{…}, …] or {"data": [{…}, …]}'
        )
    rows = []
    for number, row in enumerate(content, start=1):
        with row_at(f"{path.name}:{number}", bad):
            rows.append((number, _object(row, f"{path}:{number}")))
    return rows


def read_csv(path: Path, bad: Bad = refuse) -> Numbered:
    """Rows under a header line, numbered by the line they begin on; all values are text."""
    number = 0
    decoded = (_decode(raw, path, line) for line, raw in _lines(path))
    csv.field_size_limit(2**31 - 1)
    first = next(decoded, "")
    delimiter = delimiter_of(first)
    if delimiter != ",":
        log.warning("%s: its columns are separated by %r, and read so", path, delimiter)
    reader = csv.reader(itertools.chain([first], decoded), strict=True, delimiter=delimiter)
    rows: Numbered = []
    try:
        header = next(reader, None)
        if header is None:
            return []
        if len(set(header)) != len(header):
            raise DataError(f"{path}:1: a column name is written twice: {', '.join(header)}.")
        number = reader.line_num + 1
        for values in reader:
            with row_at(f"{path.name}:{number}", bad):
                if values and len(values) != len(header):
                    raise DataError(
                        f"{path}:{number}: {len(values)} fields; the header has {len(header)} ({', '.join(header)}).",
                        'Put a field with a comma or a line break into "…".',
                    )
                if values:
                    rows.append((number, dict(zip(header, values, strict=True))))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{max(1, number)}: broken CSV: {error}.", 'Check the quotes: "" inside "…".') from None
    return rows


def delimiter_of(header: str) -> str:
    """What separates the columns of a table: a comma, or else a semicolon (as spreadsheets write where the comma is in
    numbers), a tab or a bar, whichever its header line has where it has no comma."""
    found = "," if "," in header else max(";\t|", key=header.count)
    return found if found in header else ","


def read_txt(path: Path) -> list[tuple[int, str, bool]]:
    """(line, text, ends) of runs of whole lines, at most 4,096 characters each; the last one ends the document.

    A short file gives shorter runs, so that about twenty come out and some can be held out. Raises DataError for JSON
    rows under this name, and for a character that is none.
    """
    whole = _whole(path, "split -C 1G {0} {1}-")
    if b"\0" in whole[:BINARY] and not whole.startswith(UTF_16):
        raise DataError(
            f"{path}: a binary file, not text: byte {whole.index(0) + 1} is 0.", "Give a file of UTF-8 text."
        )
    text = "".join(_decode(raw, path, number) for number, raw in enumerate(whole.splitlines(True), start=1))
    if _is_json_rows(text):
        raise DataError(
            f"{path} holds rows of JSON, and would be trained as plain text, braces and all.",
            f"Give it its name: mv {path.name} {path.stem}.json{'l' if text.lstrip()[0] == '{' else ''}",
        )
    return runs_of(text, str(path))


def runs_of(text: str, where: str) -> list[tuple[int, str, bool]]:
    """The runs of whole lines of one text, as of `read_txt`; `where` names it."""
    longest = min(LONGEST_TEXT_RUN, max(256, len(text) // 20))
    runs: list[tuple[int, str, bool]] = []
    begin, gathered = 1, ""
    for number, line in enumerate(text.replace("\r\n", "\n").splitlines(keepends=True), start=1):
        if gathered and len(gathered) + len(line) > longest:
            runs.append((begin, gathered, False))
            begin, gathered = number, ""
        check_text({"text": line}, f"{where}:{number}")
        gathered += line
    return [*runs, (begin, gathered, True)] if gathered else runs


def _is_json_rows(text: str) -> bool:
    """Whether a text is a list of objects, or its first two lines are an object each."""
    begin = text.lstrip()[:1]
    if begin not in ("{", "["):
        return False
    lines = [line for line in text.splitlines() if line.strip()][:2] if begin == "{" else [text]
    try:
        values = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return False
    if begin == "[":
        values = values[0]
    return bool(values) and all(isinstance(value, dict) for value in values)


def check_text(row: Row, where: str) -> None:
    """Raises DataError for a character that is none in any text of a row: NUL, or half of a surrogate pair."""
    for path, text in _texts(row):
        bad = "\0" if "\0" in text else _surrogate(text)
        if bad:
            raise DataError(
                f"{where}: {path}: character {text.index(bad) + 1} is U+{ord(bad):04X}, which is not text.",
                "Remove it: it comes from broken bytes or from an emoji that was cut in half.",
            )


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value, start=1):
            yield from _texts(item, f"{path}[{number}]")


def _surrogate(text: str) -> str:
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


READERS: dict[str, Callable[[Path, Bad], Numbered]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}


def _whole(path: Path, fix: str) -> bytes:
    """A file that has to be in memory as a whole. `fix`: {0} is its name, {1} without the ending."""
    with _opened(path) as file:
        content = file.read(LARGEST_FILE + 1) if path.stat().st_size <= LARGEST_FILE else b""
    size = max(path.stat().st_size, len(content))
    if size > LARGEST_FILE:
        name, bare = shlex.quote(path.name), shlex.quote(path.stem)
        raise DataError(f"{path} has {size / 2**30:,.1f} GiB, more than {LARGEST_FILE >> 30}.", fix.format(name, bare))
    return content


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of each line. Raises DataError for one that no row is as long as."""
    with _opened(path) as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(LARGEST_LINE + 1), b""), start=1):
            if len(raw) > LARGEST_LINE:
                raise DataError(
                    f"{path}:{number}: a line of more than {LARGEST_LINE >> 20} MiB.", "Each row is a line of its own."
                )
            yield number, raw


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, as they were before it was compressed. Raises DataError where that cannot be told."""
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        with path.open("rb") as file:
            yield file
        return
    import pyarrow as pa

    if not path.stat().st_size:
        raise DataError(f"{path}: an empty file, where {codec} was expected.", "Write it again.")
    with pa.OSFile(str(path)) as packed, pa.CompressedInputStream(packed, codec) as stream:
        try:
            yield cast(IO[bytes], io.BufferedReader(stream))
        except OSError as error:
            raise DataError(
                f"{path}: broken {codec}: {error}", f"Write it again, or give it its name: {path.stem}"
            ) from None


GZIP = b"\x1f\x8b"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")
BINARY = 8192  # bytes at the beginning of a file in which a zero says that it is not text


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if raw.startswith(GZIP) and line == 1:
            raise DataError(
                f"{path} is compressed by gzip.", f"mv {path.name} rows.gz; gunzip -c rows.gz > {path.name}"
            ) from None
        line += raw[: error.start].count(b"\n")
        hint = "UTF-16" if raw[:2] in UTF_16 else f"byte 0x{raw[error.start]:02x}"
        raise DataError(
            f"{path}:{line}: not UTF-8 ({hint}).", f"iconv -f LATIN1 -t UTF-8 {path.name}  (or -f UTF-16)"
        ) from None
    return text.removeprefix("\ufeff") if line == 1 else text


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return parse(text)
    except NotJSON as error:
        column = f":{error.column}" if error.column else ""
        raise DataError(f"{path}:{line}{column}: {error.what}.", error.fix) from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a row is {type(row).__name__}; expected an object.", 'Such as {"prompt": "…", "completion": "…"}'
        )
    return row
