"""Render a conversation by a chat template, which is a stranger's program: within limits of time, length and memory."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_kit.data.records import Message
from finetune_kit.errors import SecurityError
from finetune_kit.system.files import resource

# What one conversation may take: a template is a program that came with the model.
MOST_SECONDS = 1.0  # of computing, and as much again for each million characters of the conversation
MOST_CHARACTERS = 10**6  # more than 8 times the conversation's own
MOST_BYTES = 2**30
STATM = Path("/proc/self/statm")


def silent(text: str) -> None:
    """A `Note` that nobody wants to hear."""


def render(
    tokenizer: Any,
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    kwargs: dict[str, Any] | None = None,
    generation: bool = False,
    template: str | None = None,
) -> str:
    """The template's text of a conversation as it stands; raises whatever the template raises, and SecurityError where
    it takes longer or writes more than any template has to. `template`: which one, of a tokenizer that has several."""
    plain = [{name: value for name, value in message.items() if name not in ("train", "plain")} for message in messages]
    given = len(str(plain)) + len(str(tools or ""))
    with _within(MOST_SECONDS * (1 + given / MOST_CHARACTERS)):
        text = str(
            tokenizer.apply_chat_template(
                plain,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=generation,
                **({"chat_template": template} if template else {}),
                **(kwargs or {}),
            )
        )
    if len(text) > MOST_CHARACTERS + 8 * given:
        raise _refused(f"writes {len(text):,} characters for a conversation of {given:,}")
    return text


def _refused(what: str) -> SecurityError:
    return SecurityError(
        f"The model's chat template {what}.",
        "Use another model: model.name_or_path=…, or give its tokenizer another chat_template.",
    )


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Ends what runs inside with SecurityError after so many seconds of computing, or 1 GiB of memory.

    Time is kept in the main thread alone, where signals arrive. The limit of memory is one of the whole process, on
    Linux. It is not kept once a GPU is in use, which reserves addresses by the hundred GiB; rows are read before that,
    and what a template makes of those rows it makes again later.
    """

    import jinja2.sandbox  # noqa: F401  # that it is loaded on the way to the first rendering is not the template's fault

    def late(*_: Any) -> None:
        raise _refused(f"takes more than {seconds:.1f} s for one conversation")

    timed = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
    before: Any = None
    if sys.platform != "win32" and timed:
        before = signal.signal(signal.SIGVTALRM, late)
    room = _more_memory(MOST_BYTES) if timed and not _on_gpu() else None
    try:
        if sys.platform != "win32" and timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    except (MemoryError, OverflowError):
        raise _refused(f"takes more than {MOST_BYTES >> 30} GiB for one conversation") from None
    finally:
        if sys.platform != "win32" and timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        if room is not None and resource is not None:
            resource.setrlimit(resource.RLIMIT_AS, room)


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _more_memory(size: int) -> tuple[int, int] | None:
    """Let this process grow by `size` bytes and no more; returns the limits from before, None where that cannot be."""
    if resource is None:
        return None
    try:
        pages = int(STATM.read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + size
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        return soft, hard
    except (OSError, ValueError):
        return None
