"""Chat templates that write each turn whatever follows it: one rendering of a conversation has all its prefixes.

Such a template is one loop over the messages, in which nothing looks ahead, and an end that is the same for every
conversation. That is read off its program, of which only an allowed few parts may occur, and not learned from examples.
A mark is set behind each turn of the loop, so the text of every prefix stands in the one text. Any other template is
rendered as it comes, once for each prefix.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from finetune_kit.data.records import Message
from finetune_kit.data.rendering import MOST_CHARACTERS, render
from finetune_kit.errors import SecurityError

MARK = "\U0010fffd\U0010ffff"  # two characters that are none, set behind each turn; no text with the second is taken
_KNOWN = {"role", "content", "train"}  # keys of the turns that are rendered this way
_METHODS = {"strip", "lstrip", "rstrip", "startswith", "endswith"}
_FILTERS = {"trim", "string", "lower", "upper"}
_TESTS = {"defined", "undefined", "none", "string", "equalto", "eq", "==", "ne", "!=", "in", "true", "false"}
_EXPRESSIONS = {
    *("Output", "TemplateData", "If", "Const", "TemplateData", "Getattr", "Getitem", "Concat", "Add", "Compare"),
    *("Operand", "And", "Or", "Not", "CondExpr", "Test", "Filter", "Call", "Name", "List", "Tuple"),
}


class Prefixes:
    """The texts of a conversation's prefixes, for one tokenizer's template.

    `opening`: what the template writes behind a prefix to ask for an answer; `closing`: what it writes where it asks
    for none.
    """

    def __init__(self, template: Any, context: dict[str, Any], opening: str, closing: str) -> None:
        self._template, self._context = template, context
        self.opening, self.closing = opening, closing

    def of(self, messages: list[Message]) -> list[str] | None:
        """The text of messages[:n] for n from 0, without opening and closing; None where they have to be rendered.

        That of no message is "" where a template reads its first one before the loop.
        """
        given = 0
        for message in messages:
            content = message["content"]
            if not message.keys() <= _KNOWN or type(content) is not str or MARK[1] in content:
                return None
            given += len(content)
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        try:
            parts = self._template.render(messages=plain, **self._context).split(MARK)
        except Exception:  # the template's refusal is told by whoever renders it as it comes
            return None
        ahead = len(messages) + 2 - len(parts)  # messages that the loop leaves out, at the beginning
        if ahead not in (0, 1) or sum(map(len, parts)) > MOST_CHARACTERS + 8 * given:
            return None
        texts, text = [""] * ahead, ""
        for part in parts[:-1]:
            text += part
            texts.append(text)
        return texts


def prefixes_of(tokenizer: Any, template: str, kwargs: dict[str, Any] | None = None) -> Prefixes | None:
    """The prefixes that a template writes without tools; None where it is not proven to write each turn alone."""
    ends = str(tokenizer.bos_token), str(tokenizer.eos_token)
    return _learned(tokenizer, template, ends, json.dumps(kwargs, sort_keys=True) if kwargs else "{}")


@lru_cache(maxsize=16)
def _learned(tokenizer: Any, template: str, ends: tuple[str, str], kwargs_json: str) -> Prefixes | None:
    from transformers import PreTrainedTokenizerBase
    from transformers.utils.chat_template_utils import _compile_jinja_template

    kwargs = json.loads(kwargs_json)
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return None  # a class of its own writes conversations in its own way
    if any(not isinstance(value, str | int | float | bool | None) for value in kwargs.values()):
        return None
    try:
        environment = _compile_jinja_template(template).environment
        tree = environment.parse(template)
    except Exception:  # a template that is no program says so where it is rendered
        return None
    if not _is_causal(tree, set(kwargs)):
        return None
    from jinja2 import nodes

    at = next(place for place, node in enumerate(tree.body) if isinstance(node, nodes.For))
    loop = tree.body[at]
    before, behind = (nodes.Output([nodes.TemplateData(MARK)]) for _ in range(2))
    for node in (before, behind):
        node.set_lineno(loop.lineno)
    loop.body.append(behind)
    tree.body.insert(at, before)
    tree.set_environment(environment)
    context = {**tokenizer.special_tokens_map, "tools": None, "documents": None, **kwargs}
    if "messages" in context:
        return None
    read = {name.name for name in tree.find_all(nodes.Name)}
    if read & tokenizer.special_tokens_map.keys() - {"bos_token", "eos_token", *kwargs}:
        return None  # `ends` are what is known to be as they were
    context["add_generation_prompt"] = False
    marked = environment.from_string(tree)
    found = []
    try:
        for asks in (True, False):
            text = marked.render(messages=_PROBE, **{**context, "add_generation_prompt": asks})
            found.append(text.rpartition(MARK)[2])
    except Exception:  # a template may refuse the probe; it is rendered as it comes, then
        return None
    prefixes = Prefixes(marked, context, *found)
    return prefixes if _holds(prefixes, tokenizer, template, kwargs) else None


_PROBE: list[Message] = [
    {"role": "system", "content": "Probe system"},
    {"role": "user", "content": " Probe question\n"},
    {"role": "assistant", "content": "\nProbe answer "},
    {"role": "user", "content": "Probe question"},
    {"role": "assistant", "content": "Probe answer"},
]


def _holds(prefixes: Prefixes, tokenizer: Any, template: str, kwargs: dict[str, Any]) -> bool:
    """Whether the probe's prefixes are what the tokenizer renders: a proof of this module more than of the template."""
    for turns in (_PROBE, _PROBE[1:], _PROBE[:3], _PROBE[1:3]):
        texts = prefixes.of(turns)
        if texts is None:
            return False
        for stop in range(1, len(turns) + 1):
            for asks, end in ((True, prefixes.opening), (False, prefixes.closing)):
                try:
                    text = render(tokenizer, turns[:stop], None, kwargs, asks, template)
                except SecurityError:
                    raise
                except Exception:  # it refuses a part of what it takes as a whole
                    return False
                if text != texts[stop] + end:
                    return False
    return True


def _is_causal(tree: Any, given: set[str]) -> bool:
    """Whether a template is one loop over the messages that never looks ahead, with an end that depends on none."""
    from jinja2 import nodes

    loops = list(tree.find_all(nodes.For))
    if len(loops) != 1 or loops[0] not in tree.body:
        return False
    loop = loops[0]
    at = tree.body.index(loop)
    assigned = _stored([tree])
    if loop.else_ or loop.test is not None or loop.recursive or not isinstance(loop.target, nodes.Name):
        return False
    if assigned & {"messages", "loop", "add_generation_prompt", *given} or _stored(tree.body[:at] + loop.body) & {
        loop.target.name
    }:
        return False
    lists = {"messages"}  # names that are the messages from the first or the second on
    for node in tree.body[:at]:
        for assign in [node] if isinstance(node, nodes.Assign) else list(node.find_all(nodes.Assign)):
            if isinstance(assign.target, nodes.Name) and _is_messages(assign.node):
                lists.add(assign.target.name)
    if not isinstance(loop.iter, nodes.Name) and not _is_messages(loop.iter):
        return False
    if isinstance(loop.iter, nodes.Name) and loop.iter.name not in lists:
        return False
    fixed = lists - {"messages"}
    joined = {name for node in tree.find_all(nodes.Assign) if _joins(node.node) for name in _stored([node])}
    single = {loop.target.name, "messages", "bos_token", "eos_token"} | assigned - joined
    ahead = _Reader(lists, single, inside=False)
    within = _Reader(lists, single, inside=True)
    behind = _Reader(lists, single, inside=False, refuses=assigned | lists | {loop.target.name, "loop"})
    return (
        all(ahead.allows(node) for node in tree.body[:at])
        and all(within.allows(node) for node in loop.body)
        and all(behind.allows(node, asks=True) for node in tree.body[at + 1 :])
        and not fixed & _stored(loop.body)
    )


def _stored(body: list[Any]) -> set[str]:
    from jinja2 import nodes

    return {name.name for node in body for name in node.find_all(nodes.Name) if name.ctx == "store"}


def _joins(node: Any) -> bool:
    from jinja2 import nodes

    joins = nodes.Add | nodes.Concat
    return isinstance(node, joins) or any(True for kind in (nodes.Add, nodes.Concat) for _ in node.find_all(kind))


def _is_messages(node: Any) -> bool:
    """`messages`, or `messages[1:]`."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        start, stop, step = node.arg.start, node.arg.stop, node.arg.step
        if stop is not None or step is not None or not isinstance(start, nodes.Const) or start.value != 1:
            return False
        node = node.node
    return isinstance(node, nodes.Name) and node.name == "messages"


class _Reader:
    """Whether a part of a template does nothing but what is known to be harmless and to look at nothing ahead.

    `lists`: names of the messages; `single`: names that are a part of one, not joined; `inside`: the part is of the
    loop; `refuses`: names that may not be read.
    """

    def __init__(self, lists: set[str], single: set[str], inside: bool, refuses: set[str] | None = None) -> None:
        self.lists, self.single, self.inside, self.refuses = lists, single, inside, refuses or set()

    def allows(self, node: Any, asks: bool = False) -> bool:
        from jinja2 import nodes

        def all_of(*parts: Any) -> bool:
            return all(self.allows(part, asks) for part in parts if part is not None)

        if isinstance(node, nodes.Assign):
            names = {name.name for name in [node.node, *node.node.find_all(nodes.Name)] if isinstance(name, nodes.Name)}
            if not isinstance(node.target, nodes.Name) or (_joins(node.node) and not names <= self.single):
                return False  # what is joined of what was joined could double with each line
            return _is_messages(node.node) if self._names_messages(node.node) else all_of(node.node)
        if isinstance(node, nodes.Name):
            if node.name in self.refuses or node.name in self.lists or node.name == "loop":
                return False
            return node.name != "add_generation_prompt" or asks
        if isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Name) and node.node.name in self.lists:
            return isinstance(node.arg, nodes.Const) and node.arg.value == 0 and not self.refuses
        if self._counts(node):
            return self.inside and node.attr in ("first", "index", "index0")
        if isinstance(node, nodes.Mod):  # whose turn it is
            return isinstance(node.right, nodes.Const) and self._counts(node.left) and all_of(node.left)
        if isinstance(node, nodes.Call):
            if node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
                return False
            called = node.node
            if isinstance(called, nodes.Name):
                return called.name == "raise_exception" and all_of(*node.args)
            return isinstance(called, nodes.Getattr) and called.attr in _METHODS and all_of(called.node, *node.args)
        if isinstance(node, nodes.Filter):
            return node.name in _FILTERS and not node.kwargs and all_of(node.node, *node.args)
        if isinstance(node, nodes.Test):
            return node.name in _TESTS and not node.kwargs and all_of(node.node, *node.args)
        if isinstance(node, nodes.Getitem | nodes.Getattr):
            holder = isinstance(node.node, nodes.Name | nodes.Getitem)
            return holder and all_of(*node.iter_child_nodes())
        if type(node).__name__ not in _EXPRESSIONS:
            return False
        return all_of(*node.iter_child_nodes())

    @staticmethod
    def _counts(node: Any) -> bool:
        from jinja2 import nodes

        return isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop"

    def _names_messages(self, node: Any) -> bool:
        from jinja2 import nodes

        return _is_messages(node) or (isinstance(node, nodes.Name) and node.name in self.lists)


class Cuts:
    """Token ids of the prefixes of a text whose ids are known, for prefixes that end in a token of the template's.

    A tokenizer cuts a text at such tokens before it does anything else, so what stands before one has the same ids
    whatever stands behind it. `tokens`: text -> id of those of which that holds. `token`, `behind`: the last one in the
    template's opening of an answer, and the ids of what follows it there.
    """

    def __init__(self, tokens: dict[str, int], token: str, behind: list[int]) -> None:
        self.tokens, self.token, self.behind = tokens, token, behind

    def before_answer(self, prompt: str, ids: list[int]) -> list[int] | None:
        """The ids of a prompt, which ends with the opening; `ids`: those of a text that begins with it."""
        end = self._end(self.token, prompt.count(self.token), ids)
        return None if end is None else ids[:end] + self.behind

    def with_answer(self, text: str, ids: list[int]) -> list[int] | None:
        """The ids of a text that ends with an end token; `ids`: those of a text that begins with it."""
        token = next((token for token in self.tokens if text.endswith(token)), None)
        end = self._end(token, text.count(token), ids) if token else None
        return None if end is None else ids[:end]

    def _end(self, token: str, times: int, ids: list[int]) -> int | None:
        """The place behind the token where it stands for the n-th time."""
        place = -1
        try:
            for _ in range(times):
                place = ids.index(self.tokens[token], place + 1)
        except ValueError:
            return None
        return place + 1


def cuts_of(tokenizer: Any, opening: str) -> Cuts | None:
    """None where the opening has no token at which all texts are cut, whose text no other one shares a part with."""
    return _cuts(tokenizer, opening, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _cuts(tokenizer: Any, opening: str, templates: str) -> Cuts | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "model", None)).__name__ != "BPE" or getattr(tokenizer, "split_special_tokens", False):
        return None  # merges never make a token that has none of its own
    added = tokenizer.added_tokens_decoder
    names = [str(token.content) for token in added.values()]
    tokens = {
        str(token.content): index
        for index, token in added.items()
        if token.special
        and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        and not any(_touch(str(token.content), name) for name in names if name)
    }
    last = max(names, key=lambda name: opening.rfind(name) if name in opening else -1, default="")
    if last not in tokens or last not in opening:
        return None
    behind = opening[opening.rindex(last) :]
    ids = list(tokenizer(behind, add_special_tokens=False)["input_ids"])
    return Cuts(tokens, last, ids[1:]) if ids[:1] == [tokens[last]] else None


def _touch(one: str, other: str) -> bool:
    """Whether two tokens can share characters of a text: one in the other, or an end that the other begins with."""
    ends = any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in range(1, min(len(one), len(other))))
    return ends or (one != other and (one in other or other in one))
