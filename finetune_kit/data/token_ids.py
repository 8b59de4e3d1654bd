"""Token ids of texts, those of many rows in one call, and what becomes of special tokens that somebody writes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any, TypeVar

from finetune_kit.data.special import found_in, ids_of_text, why_not
from finetune_kit.errors import DataError

SPECIAL_FIX = "Remove them; data.special_tokens_in_text=keep makes turns of them."
Result = TypeVar("Result")
# work on a row, which asks for the token ids of some texts, once: so those of many rows are made in one call
Asking = Generator[list[str], list[list[int]], Result]


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Token ids of rendered text; nothing is added, since the template writes its own BOS."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def ids_of_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """`ids_of` each text, in one call."""
    if not texts:
        return []
    lean = {"return_attention_mask": False, "return_token_type_ids": False} if getattr(tokenizer, "is_fast", 0) else {}
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, **lean)["input_ids"]
    return found


def together(rows: Iterable[Asking[Result]], tokenizer: Any) -> Iterator[Result]:
    """What comes of each row, in order. An error of a row is raised when its turn comes."""
    begun: list[tuple[Asking[Result], list[str]]] = []
    failed: Exception | None = None
    for row in rows:
        try:
            begun.append((row, next(row)))
        except Exception as error:
            failed = error
            break
    made = iter(ids_of_all(tokenizer, [text for _, texts in begun for text in texts]))
    for row, texts in begun:
        try:
            row.send([next(made) for _ in texts])
        except StopIteration as done:
            yield done.value
        else:
            raise AssertionError("a row asks for token ids once")
    if failed is not None:
        raise failed


def text_ids(tokenizer: Any, text: str, in_text: str = "text") -> list[int]:
    """Token ids of somebody's text, no special token among them unless `in_text` (data.special_tokens_in_text) is
    "keep". Raises DataError where it is "refuse", or the tokenizer cannot, and the text has one."""
    return ids_of_text(tokenizer, text) if hides(tokenizer, text, in_text, "prompt") else ids_of(tokenizer, text)


def special_tokens(tokenizer: Any, value: Any, in_text: str) -> tuple[list[str], str]:
    """(the special tokens in a row's texts, why it cannot be taken for them or "")."""
    found = found_in(tokenizer, value)
    if not found or in_text == "keep":
        return found, ""
    if in_text == "refuse":
        return found, "special tokens in its text"
    reason = why_not(tokenizer, value)
    return found, f"special tokens in its text, which cannot be written as text: {reason}" if reason else ""


def hides(tokenizer: Any, value: Any, in_text: str, where: str) -> bool:
    """Whether special tokens in a row's texts are to be written as text. Raises DataError where they cannot be, or
    `in_text` refuses them; `where`: the row, for people."""
    if in_text == "keep":
        return False
    found, reason = special_tokens(tokenizer, value, in_text)
    if reason:
        raise DataError(f"{where}: {reason} ({', '.join(found)}).", SPECIAL_FIX)
    return bool(found) and in_text == "text"
