"""What the data became, for people (`check`, the run's header) and as data (`check --json`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

ANSWERS = ("input_ids", "chosen_ids", "rejected_ids", "completion_ids")  # of the samples of a row, in order
BAR = 40  # characters of the longest histogram bar
OPEN, CLOSE = "⟦", "⟧"  # around trained text, where there is no colour


def preview_json(data: Data, tokenizer: Any, n: int = 3) -> dict[str, Any]:
    """rows (trained on), supervised_tokens, ledger, lengths of all samples (tokens), and the samples of `n` rows."""
    return {
        "kind": data.kind,
        "rows": len(data.train_records),
        "samples_trained": len(data.train),
        "supervised_tokens": data.ledger.train.supervised_tokens,
        "end_tokens": [tokenizer.decode([index]) for index in data.end_token_ids],
        "packed": data.packed,
        "ledger": data.ledger.to_json(),
        "lengths": lengths(data),
        "samples": [
            {
                "where": where,
                **({"side": side} if side else {}),
                "tokens": len(ids),
                "text": tokenizer.decode(ids),
                "supervised_text": [text for text, trained in pieces(ids, labels, tokenizer) if trained],
            }
            for where, side, ids, labels in _first(data, n)
        ],
    }


def print_preview(data: Data, tokenizer: Any, console: Console, n: int = 3) -> None:
    """Counts, lengths and the first `n` samples, what is trained in colour, or between ⟦ and ⟧ without colour."""
    console.print(counts_table(data))
    for note in data.ledger.notes:
        console.print(f"[yellow]note[/yellow] {_escaped(note)}")
    console.print(_histogram(lengths(data)))
    for where, side, ids, labels in _first(data, n):
        console.print(f"\n[bold]{_escaped(' '.join([where, side]).strip())}[/bold]  {len(ids)} tokens")
        console.print(marked(ids, labels, tokenizer, colour=bool(console.color_system)), soft_wrap=True)


def lengths(data: Data) -> list[int]:
    """Tokens of each training sample, in order."""
    import numpy as np

    if not len(data.train):
        return []
    names = [name for name in ANSWERS if name in data.train.column_names]
    before = ["prompt_ids"] if "prompt_ids" in data.train.column_names else []
    table = data.train.select_columns([*before, *names]).with_format("arrow")[:]
    counted = {
        name: np.concatenate([chunk.value_lengths().to_numpy() for chunk in table[name].chunks])
        for name in table.column_names
    }
    sides = [sum(counted[part] for part in (*before, name)) for name in names] or [counted["prompt_ids"]]
    return [int(length) for length in np.stack(sides, axis=1).ravel()]


def pieces(ids: list[int], labels: list[int], tokenizer: Any) -> list[tuple[str, bool]]:
    """(text, trained) of runs of tokens that are all trained or all not."""
    runs: list[tuple[list[int], bool]] = []
    for index, label in zip(ids, labels, strict=True):
        if not runs or runs[-1][1] != (label >= 0):
            runs.append(([], label >= 0))
        runs[-1][0].append(index)
    return [(tokenizer.decode(run, skip_special_tokens=False), trained) for run, trained in runs]


def marked(ids: list[int], labels: list[int], tokenizer: Any, colour: bool) -> Text:
    """A sample's text with the trained part marked."""
    from rich.text import Text

    text = Text()
    for piece, trained in pieces(ids, labels, tokenizer):
        if colour:
            text.append(piece, style="bold green" if trained else "dim")
        else:
            text.append(f"{OPEN}{piece}{CLOSE}" if trained else piece)
    return text


def counts_table(data: Data) -> Table:
    """Rows and tokens of both splits, as booked in the ledger."""
    from rich.table import Table

    table = Table("", "train", "held out", title=f"data: {data.kind.replace('_', '-')}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    train, held_out = data.ledger.train, data.ledger.held_out
    for name, label in (
        ("rows", "rows"),
        ("trained", "kept whole"),
        ("truncated", "truncated"),
        ("lost", "dropped"),
        ("duplicates", "duplicates (kept)"),
        ("samples", "samples"),
        ("tokens", "tokens"),
        ("supervised_tokens", "supervised tokens"),
        ("truncated_tokens", "tokens cut off"),
    ):
        table.add_row(label, f"{getattr(train, name):,}", f"{getattr(held_out, name):,}")
    for reason in {**train.dropped, **held_out.dropped}:
        table.add_row(f"  dropped: {reason}", f"{train.dropped[reason]:,}", f"{held_out.dropped[reason]:,}")
    share = train.truncated / train.rows if train.rows else 0.0
    table.caption = f"{share:.1%} of the training rows are truncated"
    return table


def _first(data: Data, n: int) -> list[tuple[str, str, list[int], list[int]]]:
    """(row's name, side of a pair, input_ids, labels) of all samples of the first `n` rows."""
    rows = [data.train[number] for number in range(min(n, len(data.train)))]
    return [
        (data.train_records[row["row"]].where, side, *sample) for row in rows for side, sample in sequences(row).items()
    ]


def _histogram(values: list[int], bins: int = 8) -> str:
    """Lengths as bars of text, the widest bin 40 characters."""
    if not values:
        return ""
    width = max(1, -(-(max(values) + 1) // bins))
    counts = [0] * bins
    for value in values:
        counts[value // width] += 1
    lines = ["sample length in tokens"]
    for i, count in enumerate(counts):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        lines.append(f"{i * width:>6}–{(i + 1) * width - 1:<6} {bar} {count}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
