"""Special tokens in a row's text, encoded as the text that they are: what somebody wrote never becomes a turn.

A text with `<|im_end|>` in it is hidden before the template sees it: each character of that string is moved into a
private plane of Unicode. Whatever special token is then found in the rendering, the template wrote. The rendering is
encoded by a twin of the tokenizer that knows these tokens by other names, with the hidden text put back: the same
merges over the same borders, and no string in a text that could be a token of the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune_kit.data.records import ROLES, Message
from finetune_kit.data.rendering import render
from finetune_kit.data.template import as_parts, template_of

THOUGHT = ("<think>", "</think>")  # written into answers by those who make data, and taken out by templates
_PLANE = 0x100000  # the last private plane; characters of the first plane are hidden in it
_PRIVATE = re.compile("[\U00100000-\U0010ffff]")
_HIDDEN = re.compile("[\U00100000-\U0010fffd]")
_MARK = "\U0010fffe"  # before the name of a token of the twin
_PROBE = [{"role": role, "content": f"Probe {role}"} for role in ("system", "user", "assistant", "user", "assistant")]


@dataclass(frozen=True)
class Special:
    """The tokens that a text may not become: special ones, and any other that the template parts turns by.

    `first`: the character that all of them begin with, if any. `pattern` finds them, `in_answers` all but the marks of
    a thought; None where there are none. `normalise`: what the tokenizer does to a text before it looks for tokens,
    where that could make one.
    """

    tokens: frozenset[str]
    first: str | None
    pattern: re.Pattern[str] | None
    in_answers: re.Pattern[str] | None
    normalise: Callable[[str], str] | None


def special_of(tokenizer: Any) -> Special:
    """The tokenizer's special tokens, as its template uses them."""
    return _special(tokenizer, str(tokenizer.chat_template))


def found_in(tokenizer: Any, value: Any) -> list[str]:
    """The special tokens in a text, in messages or in tools, each once."""
    special, found = special_of(tokenizer), {}
    if special.pattern is None:
        return []

    def look(text: str, pattern: re.Pattern[str] | None) -> str:
        if pattern is not None:
            if special.first is None or special.first in text:
                found.update(dict.fromkeys(pattern.findall(text)))
            if special.normalise is not None:
                found.update(dict.fromkeys(pattern.findall(special.normalise(text))))
        return text

    _walk(value, look, special)
    return list(found)


def why_not(tokenizer: Any, value: Any) -> str:
    """Why the special tokens in `value` cannot be encoded as text, in words; "" where they can."""
    private = False

    def look(text: str, _: Any) -> str:
        nonlocal private
        private = private or _PRIVATE.search(text) is not None
        return text

    _walk(value, look, special_of(tokenizer))
    if private:
        return "characters of Unicode's last private plane stand beside them"
    twin = _twin(tokenizer, special_of(tokenizer).tokens)
    return twin if isinstance(twin, str) else ""


def plain_marks(tokenizer: Any) -> tuple[str, ...]:
    """What parts an answer from its question in the template, where no token does: text that a row may hold, too."""
    return _plain_marks(tokenizer, str(tokenizer.chat_template)) if tokenizer.chat_template else ()


@lru_cache(maxsize=16)
def _plain_marks(tokenizer: Any, templates: str) -> tuple[str, ...]:
    marks: dict[str, None] = {}
    names = [str(token.content) for token in tokenizer.added_tokens_decoder.values()]
    for turns in (_PROBE[1:], as_parts(_PROBE[1:])):
        try:
            text = render(tokenizer, turns, None, None, True, template_of(tokenizer))
        except Exception:  # as above
            continue
        for between in re.findall(r"Probe (?:user|assistant)(.*?)(?=Probe |\Z)", text, re.DOTALL):
            if between.strip() and not any(name and name in between for name in names):
                marks[between.strip()] = None
    return tuple(mark for mark in marks if len(mark) > 2)


def hide(tokenizer: Any, value: Any) -> Any:
    """Messages or tools with each special token in their text hidden from the template."""

    def cover(text: str, pattern: re.Pattern[str] | None) -> str:
        return pattern.sub(_cover, text) if pattern is not None else text

    return _walk(value, cover, special_of(tokenizer))


def show(text: str) -> str:
    """Hidden text as it was."""
    return _HIDDEN.sub(lambda found: chr(ord(found[0]) - _PLANE), text)


def ids_of_hidden(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a rendering with hidden text in it: its own special tokens as tokens, the hidden ones as text."""
    special = special_of(tokenizer)
    marked = special.pattern.sub(_mark, text) if special.pattern is not None else text
    return _encode(tokenizer, special, show(marked))


def ids_of_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with no token of the template's in it, whatever strings are in it."""
    return _encode(tokenizer, special_of(tokenizer), text)


def _encode(tokenizer: Any, special: Special, text: str) -> list[int]:
    twin = _twin(tokenizer, special.tokens)
    if isinstance(twin, str):
        raise AssertionError(f"encoded without asking why_not: {twin}")
    return list(twin.encode(text, add_special_tokens=False).ids)


def _cover(found: re.Match[str]) -> str:
    return "".join(chr(ord(character) + _PLANE) if ord(character) < 0xFFFE else character for character in found[0])


def _mark(found: re.Match[str]) -> str:
    return _MARK + found[0]


def _walk(value: Any, change: Callable[[str, re.Pattern[str] | None], str], special: Special) -> Any:
    """`value` with each text in it changed; in an answer the marks of a thought are its own.

    Messages are in lists alone: an argument or a parameter of a tool that has a role and a content is none.
    """

    def walk(item: Any, pattern: re.Pattern[str] | None, inside: bool = False) -> Any:
        if isinstance(item, str):
            return change(item, pattern)
        if isinstance(item, list):
            return [walk(one, pattern, inside) for one in item]
        if isinstance(item, dict):
            if not inside and "content" in item and item.get("role") in ROLES:
                return turn(item)
            return {change(str(name), pattern): walk(one, pattern, True) for name, one in item.items()}
        return item

    def turn(message: Message) -> Message:
        answer = message["role"] == "assistant"
        return {
            name: one
            if name == "role"
            else walk(
                one,
                special.in_answers if answer and name in ("content", "reasoning_content") else special.pattern,
                name != "content",
            )
            for name, one in message.items()
        }

    return walk(value, special.pattern)


@lru_cache(maxsize=16)
def _special(tokenizer: Any, templates: str) -> Special:
    """`templates`: what changes the answer."""
    added = tokenizer.added_tokens_decoder.values()
    written = _parting(tokenizer)
    tokens = {str(token.content) for token in added if token.special or token.content in written}
    tokens |= {token for token in tokenizer.all_special_tokens if isinstance(token, str)}
    tokens.discard("")
    answers = tokens.difference(THOUGHT)
    heads = {token[0] for token in tokens}
    first = heads.pop() if len(heads) == 1 else None
    return Special(frozenset(tokens), first, _pattern(tokens), _pattern(answers), _normaliser(tokenizer, tokens))


def _parting(tokenizer: Any) -> set[str]:
    """Added tokens that the template writes around the turns of a plain conversation, the marks of a thought aside."""
    names = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}.difference(THOUGHT)
    written: set[str] = set()
    for tools in (False, True) if tokenizer.chat_template else ():
        for turns in (_PROBE, _PROBE[1:], as_parts(_PROBE), as_parts(_PROBE[1:])):
            try:
                text = render(tokenizer, turns, None, None, True, template_of(tokenizer, tools))
            except Exception:  # a template that refuses one of these may write another
                continue
            written |= {name for name in names if name and name in text}
    return written


def _pattern(tokens: set[str]) -> re.Pattern[str] | None:
    """Finds the longest of `tokens` at the first place where one begins; shared beginnings are read once."""

    def tree(words: list[str]) -> str:
        heads: dict[str, list[str]] = {}
        for word in words:
            if word:
                heads.setdefault(word[0], []).append(word[1:])
        branches = [re.escape(head) + tree(rests) for head, rests in heads.items()]
        inner = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return "" if not branches else f"(?:{inner})?" if "" in words else inner

    return re.compile(tree(sorted(tokens))) if tokens else None


def _normaliser(tokenizer: Any, tokens: set[str]) -> Callable[[str], str] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normaliser = getattr(backend, "normalizer", None)
    if backend is None or normaliser is None:
        return None
    after = any(token.normalized for token in tokenizer.added_tokens_decoder.values() if token.content in tokens)
    if type(backend.model).__name__ == "BPE" and not after:  # merges never make a token that has none of its own
        return None
    return lambda text: str(normaliser.normalize_str(text))


@lru_cache(maxsize=4)
def _twin(tokenizer: Any, tokens: frozenset[str]) -> Any:
    """The tokenizer with each of `tokens` under another name and the same id, or why there can be none."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return f"{type(tokenizer).__name__} matches them in any text"
    written = json.loads(backend.to_str())
    model = written["model"]
    for token in written["added_tokens"]:
        token["content"] = _other(token["content"], tokens)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {_other(name, tokens): index for name, index in model["vocab"].items()}
    else:
        model["vocab"] = [[_other(name, tokens), score] for name, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = _other(model["unk_token"], tokens)
    written |= {"post_processor": None, "truncation": None, "padding": None}
    try:
        twin = Tokenizer.from_str(json.dumps(written))
    except Exception as error:  # the library's own exception type is Exception
        return f"its tokenizer cannot be built without them ({error})"
    probe = "Probe one" + "".join(f"{token}\nProbe two" for token in sorted(tokens))
    marked = "Probe one" + "".join(f"{_MARK}{token}\nProbe two" for token in sorted(tokens))
    if twin.encode(marked, add_special_tokens=False).ids != tokenizer(probe, add_special_tokens=False)["input_ids"]:
        return "its tokenizer does not write them the same under other names"
    ids = set(tokenizer.convert_tokens_to_ids(sorted(tokens)))
    if ids.intersection(twin.encode(probe, add_special_tokens=False).ids) - {tokenizer.unk_token_id}:
        return "its tokenizer makes tokens of them in any text"
    return twin


def _other(name: str, tokens: frozenset[str]) -> str:
    return _MARK + name if name in tokens else name
