"""What a chat template can do, found by looking at what it renders, and conversations written so that it loses nothing.

A probe conversation is rendered once per template. From it follows how an answer ends, and whether system turns, tools,
tool calls and tool results come out at all; what would vanish is written as text instead, and said in the ledger.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finetune_kit.data.records import THOUGHTS, Message
from finetune_kit.errors import DataError, SecurityError
from finetune_kit.system.files import resource

Note = Callable[[str], None]

# What one conversation may take: a template is a program that came with the model.
MOST_SECONDS = 1.0  # of computing, and as much again for each million characters of the conversation
MOST_CHARACTERS = 10**6  # more than 8 times the conversation's own
MOST_BYTES = 2**30
STATM = Path("/proc/self/statm")

# Set on a tokenizer that has none. The end token after each answer is what generation stops at.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User:\\n' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one template writes a conversation.

    `template`: its text. `parts`: contents must be `[{"type": "text", "text": …}]`. `system`, `tools`: rendered at all;
    `several`, `late`: system turns behind the first one, and behind other turns. `calls`: arguments of
    a tool call as "object" or as JSON "string"; "text" where calls or results are not rendered.
    `reasoning`: the key of a message whose thought is rendered, "" if there is none. `tail`: what follows an
    answer that is the last turn; `end`: its beginning up to and with the end token, "" where there is none.
    """

    template: str
    parts: bool
    system: bool
    several: bool
    late: bool
    tools: bool
    calls: str
    reasoning: str
    tail: str
    end: str


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


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Text -> id of the tokens that are matched whole in any text (special and other added ones)."""
    return {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}


def template_of(tokenizer: Any, tools: bool = False) -> str:
    """The chat template of conversations with or without tools, chosen of several as transformers does."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template(tools=[_PROBE_TOOL] if tools else None))
    except ValueError as error:
        raise DataError(
            f"The tokenizer has several chat templates and none for these conversations: {error}",
            "Name one of them `default`, or use another model: model.name_or_path=…",
        ) from None


def dialect_of(tokenizer: Any, kwargs: dict[str, Any] | None = None, tools: bool = False) -> Dialect:
    """The tokenizer's dialect, of conversations with tools where it has another template for those.

    Raises DataError where the template cannot render a question and an answer.
    """
    template = template_of(tokenizer, tools)
    return _probe(tokenizer, template, str(tokenizer.eos_token), json.dumps(kwargs or {}, sort_keys=True))


@lru_cache(maxsize=16)
def _probe(tokenizer: Any, template: str, eos: str, kwargs_json: str) -> Dialect:
    kwargs = json.loads(kwargs_json)

    def shown(messages: list[Message], words: list[str], tools: list[dict[str, Any]] | None = None) -> str:
        """The rendering if all `words` come out in it, else ""."""
        try:
            text = render(tokenizer, messages, tools, kwargs, template=template)
        except SecurityError:
            raise
        except Exception:  # a template is somebody else's program and may raise anything; it means "cannot"
            return ""
        return text if all(word in text for word in words) else ""

    question: Message = {"role": "user", "content": "ProbeQuestion"}
    answer: Message = {"role": "assistant", "content": "ProbeAnswer"}
    words, parts = ["ProbeQuestion", "ProbeAnswer"], False
    text = shown([question, answer], words)
    if not text:
        parts = True
        text = shown(as_parts([question, answer]), words)
    if not text:
        raise DataError(
            "The model's chat template does not render a user turn and an answer: "
            + _complaint(tokenizer, kwargs, template),
            "Give the tokenizer a working chat_template, or use another model: model.name_or_path=…",
        )
    write = as_parts if parts else list
    system: Message = {"role": "system", "content": "ProbeSystem"}
    late: Message = {"role": "system", "content": "ProbeLate"}
    thinking = [key for key in THOUGHTS if _shows_thought(shown, write, question, {**answer, key: "ProbeThought"})]
    has_system = bool(shown(write([system, question, answer]), [*words, "ProbeSystem"]))
    tail = text[text.rindex("ProbeAnswer") + len("ProbeAnswer") :]
    return Dialect(
        template=template,
        parts=parts,
        system=has_system,
        several=bool(shown(write([system, late, question, answer]), [*words, "ProbeSystem", "ProbeLate"])),
        late=all(
            shown(write([*first, *turns]), [*words, "ProbeLate", *(turn["content"] for turn in first)])
            for first in (([], [system]) if has_system else ([],))
            for turns in ([question, answer, late, question, answer], [question, late, answer])
        ),
        tools=bool(shown(write([question, answer]), [*words, "probe_tool"], [_PROBE_TOOL])),
        calls=_probe_calls(shown, write, question, answer),
        reasoning=thinking[0] if thinking else "",
        tail=tail,
        end=_leading_end(tail, list(added_tokens(tokenizer))),
    )


def _shows_thought(shown: Callable[..., str], write: Callable[..., Any], question: Message, answer: Message) -> bool:
    return bool(shown(write([question, answer]), ["ProbeQuestion", "ProbeAnswer", "ProbeThought"]))


_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "ProbeDescription",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "ProbeKey"}}},
    },
}


def _probe_calls(shown: Callable[..., str], write: Callable[..., Any], question: Message, answer: Message) -> str:
    call = {"type": "function", "function": {"name": "probe_call", "arguments": {"probe_key": "ProbeValue"}}}
    messages = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ProbeResult"},
        answer,
    ]
    wanted = ["probe_call", "probe_key", "ProbeValue", "ProbeResult", "ProbeAnswer"]
    for form in ("object", "string"):
        if shown(write(_with_ids(messages, as_string=form == "string")), wanted):
            return form
    return "text"


def _complaint(tokenizer: Any, kwargs: dict[str, Any], template: str) -> str:
    probe = [{"role": "user", "content": "ProbeQuestion"}, {"role": "assistant", "content": "ProbeAnswer"}]
    try:
        render(tokenizer, probe, None, kwargs, template=template)
    except SecurityError:
        raise
    except Exception as error:  # as above: the template's own words, whatever they are
        return str(error)
    return "the words do not come out."


def _leading_end(tail: str, tokens: list[str]) -> str:
    """`tail` up to and with the first run of adjacent added tokens, `<|end|>` of `<|end|>\\n<eos>`; "" if none."""
    starts = [(tail.index(token), -len(token), token) for token in tokens if token and token in tail]
    if not starts:
        return ""
    position, _, token = min(starts)
    stop = position + len(token)
    while following := [token for token in tokens if token and tail.startswith(token, stop)]:
        stop += len(max(following, key=len))
    return tail[:stop]


def adapt(
    messages: list[Message], tools: list[dict[str, Any]] | None, dialect: Dialect, note: Note = silent
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The conversation as this dialect can write it: what it has no words for becomes text, and `note` is told.

    A prefix of the conversation that stops before an assistant turn is adapted to a prefix of the result, so that
    serving sees what training saw.
    """
    calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if dialect.reasoning:
        messages = [_thought_apart(message) for message in messages]
    if tools and not dialect.tools:
        messages, tools = _tools_in_system(messages, tools), None
        note("The chat template ignores tools: they are listed in the system turn.")
    if calls and dialect.calls == "text":
        messages = _calls_as_text(messages)
        note("The chat template ignores tool calls or results: they are written as <tool_call> and <tool_response>.")
    elif calls:
        messages = _with_ids(messages, as_string=dialect.calls == "string")
    first = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if not dialect.late and any(message["role"] == "system" for message in messages[first:]):
        messages = [*messages[:first], *_late_in_user(messages[first:])]
        note("The chat template has no place for a late system turn: its text is put into the user turn beside it.")
    if first > 1 and not (dialect.system and dialect.several):
        joined = "\n\n".join(message["content"] for message in messages[:first])
        messages = [{**messages[0], "content": joined}, *messages[first:]]
        note("The chat template has one system turn: several in a row are joined by a blank line.")
    if not dialect.system and messages and messages[0]["role"] == "system":
        messages = _system_in_user(messages)
        note("The chat template has no system turn: its text is put at the head of the first user turn.")
    if dialect.reasoning and dialect.reasoning != THOUGHTS[0]:
        messages = [_renamed(message, THOUGHTS[0], dialect.reasoning) for message in messages]
    return (as_parts(messages) if dialect.parts else messages), tools


def _renamed(message: Message, old: str, new: str) -> Message:
    return {new if name == old else name: value for name, value in message.items()}


def _late_in_user(messages: list[Message]) -> list[Message]:
    """System turns as part of the user's turn that follows, or else of the one before, or else as one of the user's.

    Of a prefix that stops before an assistant turn it makes the same.
    """
    written: list[Message] = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "system":
            waiting.append(message["content"])
            if index + 1 < len(messages) and messages[index + 1]["role"] in ("system", "user"):
                continue
            if written and written[-1]["role"] == "user":
                written[-1] = {**written[-1], "content": "\n\n".join([written[-1]["content"], *waiting])}
            else:
                written.append({"role": "user", "content": "\n\n".join(waiting)})
            waiting = []
        elif waiting:
            written.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            written.append(message)
    return written


def _thought_apart(message: Message) -> Message:
    """A thought written into the answer as `<think>…</think>`, moved to where the template reads thoughts."""
    before, closed, after = message["content"].partition("</think>")
    if message["role"] != "assistant" or not closed or message.get("reasoning_content"):
        return message
    return {**message, "content": after.lstrip(), "reasoning_content": before.strip().removeprefix("<think>").strip()}


def as_parts(messages: list[Message]) -> list[Message]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_ids(messages: list[Message], as_string: bool) -> list[Message]:
    """Calls numbered in order where the data have no ids (some templates demand nine characters), results to match."""
    written: list[Message] = []
    count, waiting = 0, []
    for message in messages:
        if message.get("tool_calls"):
            numbered = []
            for call in message["tool_calls"]:
                count += 1
                function = dict(call["function"])
                if as_string:
                    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
                numbered.append({"id": f"call{count:05d}", **call, "function": function})
            waiting = [call["id"] for call in numbered]
            message = {**message, "tool_calls": numbered}
        elif message["role"] == "tool" and "tool_call_id" not in message and waiting:
            message = {**message, "tool_call_id": waiting.pop(0)}
        written.append(message)
    return written


def _calls_as_text(messages: list[Message]) -> list[Message]:
    """Calls as text of the assistant's turn, results as a user turn; results in a row share one turn."""
    written: list[Message] = []
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if index and messages[index - 1]["role"] == "tool":
                written[-1]["content"] += "\n" + result
            else:
                written.append({"role": "user", "content": result})
            continue
        if message.get("tool_calls"):
            blocks = [message["content"]] if message["content"] else []
            for call in message["tool_calls"]:
                function = {name: call["function"][name] for name in ("name", "arguments")}
                blocks.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
            message = {name: value for name, value in message.items() if name != "tool_calls"}
            message["content"] = "\n".join(blocks)
        written.append(message)
    return written


def _tools_in_system(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        f"You may call these tools:\n<tools>\n{listed}\n</tools>\n"
        'To call one, answer with\n<tool_call>\n{"name": its name, "arguments": {…}}\n</tool_call>'
    )
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": messages[0]["content"] + "\n\n" + text}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _system_in_user(messages: list[Message]) -> list[Message]:
    system, rest = messages[0]["content"], messages[1:]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": system}, *rest]


def prepare_tokenizer(tokenizer: Any, conversations: bool) -> list[str]:
    """Give a tokenizer without a chat template the fallback one, where the data are conversations; says so in words.

    It is set on the tokenizer, so it is saved and served with the model. Raises DataError without an end token.
    """
    if tokenizer.chat_template or not conversations:
        return []
    if not tokenizer.eos_token:
        raise DataError(
            "The tokenizer has neither a chat template nor an end token: no answer would ever end.",
            "Set tokenizer.eos_token in the model's folder, or use another model: model.name_or_path=…",
        )
    bos = "{{ bos_token }}" if bos_prefix(tokenizer) else ""
    tokenizer.chat_template = bos + FALLBACK_TEMPLATE
    return [
        "The tokenizer has no chat template. It was given a plain one (User: / Assistant: turns between blank lines, "
        f"{tokenizer.eos_token} after each answer), which is saved with the model."
    ]


def bos_prefix(tokenizer: Any) -> list[int]:
    """[bos id] where the tokenizer itself begins a plain text with it, else []."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if tokenizer.bos_token_id is not None and ids and ids[0] == tokenizer.bos_token_id else []
