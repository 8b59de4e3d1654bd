"""`search:<folder or file>`: the passages of the user's own texts that fit a query best, by BM25."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_kit.errors import DataError, ResourceError, SettingsError
from finetune_kit.tools.tool import Tool, ToolError

KINDS = (".txt", ".md", ".rst", ".jsonl")
LARGEST = 64 * 2**20  # bytes of text in all
PASSAGE = 800  # characters of one passage, cut at paragraphs where they are shorter
BEST = 3  # passages in an answer


def search_tool(place: str) -> Tool:
    """A tool that finds passages in the texts of a file or folder (.txt, .md, .rst, .jsonl with a `text` each line).

    Raises SettingsError where there is no such place, DataError where it holds no text, ResourceError without bm25s.
    """
    try:
        import bm25s
    except ImportError:
        raise ResourceError(
            "The tool search needs the package bm25s, which is not installed.", "Run: pip install 'finetune-kit[tools]'"
        ) from None
    passages = _passages(Path(place).expanduser())
    index = bm25s.BM25()
    index.index(bm25s.tokenize([text for _, text in passages], show_progress=False), show_progress=False)

    def call(arguments: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        asked = bm25s.tokenize([arguments["query"]], show_progress=False, return_ids=False)
        known = [[word for word in asked[0] if word in index.vocab_dict]]
        if not known[0]:
            raise ToolError("nothing found: no word of the query is in the texts")
        found, scores = index.retrieve(known, k=min(BEST, len(passages)), show_progress=False)
        best = [passages[int(at)] for at, score in zip(found[0], scores[0], strict=True) if score > 0]
        return [{"source": source, "text": text} for source, text in best]

    return Tool(_SCHEMA, call)


def _passages(place: Path) -> list[tuple[str, str]]:
    """(name of the file, text) of every passage, files in the order of their names."""
    if not place.exists():
        raise SettingsError(f"tools: search:{place}: no such file or folder.", "Such as: tools=search:docs")
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.suffix in KINDS)
    root = place.parent if place.is_file() else place
    inside = [path for path in files if path.resolve().is_relative_to(root.resolve()) and path.is_file()]
    if (size := sum(path.stat().st_size for path in inside)) > LARGEST:
        raise DataError(f"tools: search:{place}: {size:,} bytes of text; at most {LARGEST:,}.", "Use a smaller folder.")
    passages = [(str(path.relative_to(root)), text) for path in inside for text in _pieces(path)]
    if not any(any(map(str.isalnum, text)) for _, text in passages):
        raise DataError(f"tools: search:{place}: no text found.", f"Expected files that end in {', '.join(KINDS)}.")
    return passages


def _pieces(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    texts = [_text_of(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [text]
    pieces: list[str] = []
    for one in texts:
        held = ""
        for paragraph in one.split("\n\n"):
            for start in range(0, len(paragraph), PASSAGE):
                part = paragraph[start : start + PASSAGE].strip()
                if held and len(held) + len(part) > PASSAGE:
                    pieces.append(held)
                    held = ""
                held = f"{held}\n\n{part}".strip()
        pieces.append(held)
    return [piece for piece in pieces if piece]


def _text_of(line: str) -> str:
    """The `text` of a line of JSON, or all strings in it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(row, dict):
        return line
    return str(row["text"]) if "text" in row else "\n".join(str(value) for value in row.values())


_SCHEMA = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Find passages in the texts at hand.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "The words to look for"}},
            "required": ["query"],
        },
    },
}
