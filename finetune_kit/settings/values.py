"""Typed values out of YAML text, with the line each was written on. The type decides what a text means, not YAML.

So `revision: 0123456` stays the text it is, `1e-4` is a number, and a name written twice or a tag that would build an
object is refused.
"""

from __future__ import annotations

import math
import re
import stat
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune_kit.errors import SecurityError, SettingsError
from finetune_kit.settings.aliases import near_path

Node = yaml.Node
LARGEST = 256 * 2**10  # bytes of YAML; a run.yaml has about 3,000
DEEPEST = 32  # lists and dicts inside one another
MOST_ALIASES = 64
PIPES = ("dev", "proc")  # top folders in which a shell has the pipe of `--config <(…)`
MOST_NODES = 20_000  # values, those that aliases repeat counted as often as they are repeated
NULL, BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as everybody writes it, but a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # that is how PyYAML keeps them
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Quotes a text that _Loader would take for a number."""


for _class in (_Loader, _Dumper):  # 1e-4 is a number, which YAML 1.1 wants written 1.0e-4; None is Python's null
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    _class.add_implicit_resolver(NULL, re.compile(r"None$"), ["N"])


def dump(content: dict[str, Any]) -> str:
    """YAML in the order given, which reads back as the same values."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def read_file(path: Path) -> Node | None:
    """The tree of a YAML file, None for an empty one. Raises SettingsError, SecurityError (a tag that builds)."""
    try:
        # a named pipe would be waited for
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir() and path.absolute().parts[1] not in PIPES:
            raise SettingsError(f"{path}: not a plain file.", "Put the file itself there.")
        with path.open("rb") as file:
            return _compose(file.read(LARGEST + 1).decode("utf-8"), str(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        fix = f"{near_path(str(path))}Write one, or give settings as key=value."
        raise SettingsError(f"{path}: no such file.", fix) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 (byte {error.start}).") from None
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read: {error.strerror or error}.", "Look at it, or use another."
        ) from None


def load_text(text: str, where: str) -> dict[str, Any]:
    """The values of YAML that holds a mapping, such as a card's metadata. Raises as `read_file` and `pairs` do."""
    root = _compose(text, where)
    return {} if root is None else {name: _any(value, where) for name, value, _ in pairs(root, where)}


def load_file(path: Path) -> dict[str, Any]:
    """The values of a YAML file that holds a mapping, as YAML means them. Raises as `read_file` and `pairs` do."""
    root = read_file(path)
    return {} if root is None else {name: _any(value, str(path)) for name, value, _ in pairs(root, str(path))}


def read_word(text: str, where: str) -> Node:
    """What stands behind `key=`: a list, a dict or quoted text as in YAML; all else is one plain text or number."""
    text = text.strip()
    if text.startswith(("[", "{", '"', "'")):
        try:
            return _compose(text, where) or _plain(text)
        except SettingsError:  # a text that only begins like one, such as [INST] …
            return _plain(text)
    return _plain(text)


def _plain(text: str) -> Node:
    tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]  # not in its stubs
    return yaml.ScalarNode(tag, text)


def _compose(text: str, where: str) -> Node | None:
    try:
        _check_size(text, where)
        _Loader(text).get_single_data()  # building the values is what refuses a tag that would build an object
        return _Loader(text).get_single_node()
    except yaml.constructor.ConstructorError as error:
        refused = SecurityError if "tag" in str(error.problem) else SettingsError
        raise refused(f"{where}: {error.problem}.", "Use plain values only.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SettingsError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from None


def _check_size(text: str, where: str) -> None:
    """Raises SecurityError for YAML that would take hours or all memory to build: too large, nested too deep, or with
    aliases that repeat one another (ten lines of them can stand for thousands of millions of values)."""
    if len(text) > LARGEST:
        raise SecurityError(f"{where}: more than {LARGEST >> 10} KiB of YAML.", "Settings are short: remove the rest.")
    sizes: dict[str, int] = {}  # values below each anchor
    open_: list[tuple[str | None, int]] = []  # the lists and dicts that are being read: anchor, values before them
    count = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        what = ""
        if isinstance(event, yaml.AliasEvent):
            aliases += 1
            what = "" if event.anchor in sizes else f"the alias *{event.anchor} stands for what it is part of"
            count += sizes.get(event.anchor or "", 0)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            if isinstance(event, yaml.CollectionStartEvent):
                sizes.pop(event.anchor or "", None)
                open_.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        if len(open_) > DEEPEST:
            what = f"lists and dicts nested more than {DEEPEST} deep"
        elif aliases > MOST_ALIASES or count > MOST_NODES:
            what = f"more than {MOST_ALIASES} aliases, or {MOST_NODES:,} values"
        if what:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise SecurityError(f"{where}:{line}: {what}.", "Write the values out, without & and *.")


def pairs(node: Node, where: str) -> Iterator[tuple[str, Node, int]]:
    """(name, value, 1-based line) of a mapping. Raises SettingsError for all else, and a name written twice."""
    if not isinstance(node, yaml.MappingNode):
        raise SettingsError(f"{where}:{node.start_mark.line + 1}: expected 'key: value' lines, found {shown(node)}.")
    seen: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name == "<<":
            raise SettingsError(f"{where}:{line}: merge keys (<<) are not read.", "Write the settings out.")
        if name in seen:
            raise SettingsError(f"{where}: '{name}' is written twice (lines {seen[name]} and {line}).")
        seen[name] = line
        yield name, value, line


def shown(node: Node) -> str:
    """A value as it is quoted in a message."""
    return repr(node.value) if isinstance(node, yaml.ScalarNode) and node.tag != NULL else repr(_any(node, ""))


def _any(node: Node, where: str) -> Any:
    """The value of a setting without a type, as YAML means it."""
    if isinstance(node, yaml.MappingNode):
        return {name: _any(value, where) for name, value, _ in pairs(node, where)}
    if isinstance(node, yaml.SequenceNode):
        return [_any(item, where) for item in node.value]
    return _Loader("").construct_document(node)


def coerce(node: Node, annotation: Any, where: str) -> Any:
    """The node's value as `annotation`. Raises SettingsError naming `where`, what was expected and what was found."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return _any(node, where)
    if origin in (types.UnionType, typing.Union):
        return _coerce_union(node, arguments, where)
    if origin is Literal:
        if node.value in arguments:
            return node.value
        raise SettingsError(f"{where}: expected one of {', '.join(map(str, arguments))}; found {shown(node)}.")
    if origin is list:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [coerce(item, arguments[0], where) for item in items]
    if origin is dict:
        if isinstance(node, yaml.MappingNode):
            return {name: coerce(value, arguments[1], where) for name, value, _ in pairs(node, where)}
        raise SettingsError(f"{where}: expected {{key: value}}, found {shown(node)}.")
    return _coerce_scalar(node, annotation, where)


def _coerce_union(node: Node, arguments: tuple[Any, ...], where: str) -> Any:
    if type(None) in arguments and node.tag == NULL:
        return None
    options = [option for option in arguments if option is not type(None)]
    is_list = isinstance(node, yaml.SequenceNode)
    fitting = [option for option in options if (typing.get_origin(option) is list) == is_list]
    return coerce(node, (fitting or options)[0], where)


def _coerce_scalar(node: Node, annotation: type, where: str) -> Any:
    if isinstance(node, yaml.ScalarNode) and node.tag != NULL:
        if annotation is bool and node.tag == BOOL:
            return bool(_any(node, where))
        if annotation is str and node.tag != BOOL:
            return str(node.value)
        if annotation in (int, float) and (number := _number(node.value, annotation)) is not None:
            return number
    expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[annotation]
    fix = f"As a text it is written in quotes: '{node.value}'" if annotation is str and node.tag == BOOL else ""
    raise SettingsError(f"{where}: expected {expected}, found {shown(node)}.", fix)


def _number(text: str, kind: type) -> float | None:
    """The finite number that a text is, whole where `kind` is int (1e3 too); None for any other text."""
    try:
        if kind is int and text.strip().lstrip("+-").isdigit():
            return int(text)  # all its digits: a float has 15
        number = float(text)
    except ValueError:
        return None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        return None
    return kind(number)  # type: ignore[no-any-return]  # int or float
