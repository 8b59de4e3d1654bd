"""JSON text to values. The one place where what Python's parser raises becomes a message for people."""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from finetune_kit.errors import FinetuneKitError, SettingsError

DEEPEST = 200  # levels of lists and objects; what walks through values goes as deep
LONGEST_NUMBER = 4300  # digits of an integer, Python's own limit
LARGEST_FILE = 256 * 2**20  # bytes of a JSON file of settings; a tokenizer.json of 256,000 words has 35 MB
MEND = "Fix the line; each row is one JSON object with double quotes."
NUMBER = "Write null, or take the value out: JSON has no NaN and no Infinity."
TWICE = "Keep one of them: which one counts differs from reader to reader."


class NotJSON(Exception):
    """Text that is not JSON: `line` and `column` are 1-based, 0 where they are not known; `what` is wrong, and its
    `fix`. `found`: the text to look for where the line is not known yet."""

    def __init__(self, what: str, fix: str = MEND, line: int = 0, column: int = 0, found: str = "") -> None:
        super().__init__(what)
        self.what, self.fix, self.line, self.column, self.found = what, fix, line, column, found


def parse(text: str, strict: bool = True) -> Any:
    """The value of a JSON text.

    Raises NotJSON for all that is none, and for integers of thousands of digits and hundreds of levels; with `strict`
    also for what no row can mean: a name twice in one object, NaN, numbers beyond a float's range.
    """
    hooks: dict[str, Any] = {"parse_constant": _constant, "parse_float": _number, "object_pairs_hook": _once}
    try:
        value = json.loads(text, **hooks if strict else {})
        _check_depth(value)
    except NotJSON as error:
        if error.found:  # the parser does not say where
            error.line = text.count("\n", 0, max(0, text.find(error.found))) + 1
        raise
    except json.JSONDecodeError as error:
        raise NotJSON(f"broken JSON: {error.msg}", MEND, error.lineno, error.colno) from None
    except RecursionError:
        raise _too_deep() from None
    except MemoryError:
        raise NotJSON("it does not fit into memory", "Cut it into smaller files.") from None
    except (ValueError, OverflowError):  # int() refuses it
        digits = re.search(rf"\d{{{LONGEST_NUMBER + 1}}}", text)
        line = text.count("\n", 0, digits.start()) + 1 if digits else 0
        what = f"a number of more than {LONGEST_NUMBER:,} digits"
        raise NotJSON(what, "Write it as a text, in quotes.", line) from None
    return value


def read_object(path: Path, error_class: type[FinetuneKitError] = SettingsError, fix: str = "") -> dict[str, Any]:
    """The object in a small JSON file. Raises `error_class`, naming the file, where it cannot be read or is none."""
    content = read(path, error_class, fix)
    if not isinstance(content, dict):
        raise error_class(f"{path}: expected a JSON object, found {type(content).__name__}.", fix)
    return content


def read(path: Path, error_class: type[FinetuneKitError] = SettingsError, fix: str = "") -> Any:
    """The same, whatever the file holds."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device never ends
            raise error_class(f"{path} is not a plain file.", fix or "Put the file itself there.")
        if found.st_size > LARGEST_FILE:
            raise error_class(f"{path} has {found.st_size:,} bytes: no such file is that large.", fix)
        content = parse(path.read_text(encoding="utf-8"), strict=False)  # a model's config.json may hold Infinity
    except NotJSON as error:
        where = f"{path}:{error.line}" if error.line else f"{path}"
        raise error_class(f"{where} cannot be read as JSON: {error.what}.", fix) from None
    except UnicodeDecodeError:
        raise error_class(f"{path} cannot be read as JSON: it is not UTF-8.", fix) from None
    except (OSError, MemoryError) as error:
        why = (error.strerror if isinstance(error, OSError) else "") or "it does not fit into memory"
        raise error_class(f"{path} cannot be read: {why}.", fix) from None
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotJSON(f"'{twice}' is written twice in one object", TWICE)
    return row


def _constant(name: str) -> Any:
    raise NotJSON(f"{name} is not JSON", NUMBER, found=name)


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        what = f"{text if len(text) < 30 else text[:27] + '…'} is beyond what a number can hold"
        raise NotJSON(what, "Write a smaller number, or a text in quotes.", found=text)
    return number


def _too_deep() -> NotJSON:
    return NotJSON("JSON nested too deeply", f"At most {DEEPEST} levels of lists and objects can be read.")


def _check_depth(value: Any) -> None:
    """Without recursion: what comes after may use it."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()
