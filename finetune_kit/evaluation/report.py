"""The report for people on the terminal: tables of metrics, samples and adapters, and notes on what to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from finetune_kit.evaluation.compare import Report

LABELS: dict[str, str] = {
    "task_score": "task score",
    "exact_match": "exact match",
    "final_number": "final number right",
    "reward": "reward of the answers",
    "calls_right": "calls right: names, arguments, types",
    "needless_calls": "calls where none is wanted",
    "rouge": "ROUGE-L",
    "bleu": "BLEU (sentence)",
    "held_out_loss": "held-out loss, nats/token",
    "held_out_perplexity": "held-out perplexity",
    "held_out_bits_per_byte": "held-out bits/byte",
    "general_text_loss": "general-text loss, nats/token",
    "pair_loss": "loss of a pair, nats",
    "answers_ended": "answers that end by themselves",
    "answer_tokens": "length of an answer, tokens",
    "preference_accuracy": "preference accuracy",
    "reward_margin": "reward, chosen - rejected",
    "chosen_is_likelier": "chosen likelier than rejected",
    "rejected_loss": "loss of rejected answers, nats/token",
    "kl_to_reference": "KL to the reference, nats/token",
    "harmful_refused": "harmful prompts refused",
    "harmless_refused": "harmless prompts refused",
    "fairness_accuracy_ambiguous": "right in ambiguous contexts",
    "fairness_bias_ambiguous": "bias in ambiguous contexts (0: none)",
    "fairness_accuracy_disambiguated": "right in disambiguated contexts",
    "fairness_bias_disambiguated": "bias in disambiguated contexts (0: none)",
    "harmful_partly_refused": "harmful prompts partly refused",
    "harmless_partly_refused": "harmless prompts partly refused",
}
PRINTED_SAMPLES = 3
NARROW, WIDE = 76, 100  # columns of a terminal between which an interval has a line of its own, below its difference
COLOURS = {"better": "green", "worse": "red"}
LISTED = 20  # entries shown of a list in the ledger


def label_of(entry: dict[str, Any]) -> str:
    """A metric's name in words, with the direction that is good, if one is."""
    arrow = {True: " ↑", False: " ↓", None: ""}[entry["higher_is_better"]]
    return f"{LABELS.get(entry['name'], entry['name'])}{arrow}"


def numbers_of(entry: dict[str, Any]) -> list[str]:
    """before, after, difference with its interval, verdict: as text, shares with 3 decimals."""
    interval = entry["interval"]
    span = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
    return [f"{entry['before']:.3f}", f"{entry['after']:.3f}", f"{entry['difference']:+.3f}{span}", entry["verdict"]]


def print_report(report: Report, console: Console) -> None:
    """The table of metrics, the verdict, and three answers side by side."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Before and after, on the same held-out rows", title_justify="left")
    table.add_column("↑ more is better, ↓ less")
    for head in ("before", "after"):
        table.add_column(head, justify="right")
    narrow = NARROW <= console.width < WIDE
    # an interval in two lines is read as two numbers
    table.add_column("difference\n[95 % interval]" if narrow else "difference [95 % interval]", no_wrap=narrow)
    table.add_column("verdict")
    for entry in report.metrics:
        *numbers, verdict = numbers_of(entry)
        if narrow:
            numbers[-1] = numbers[-1].replace(" [", "\n[")
        table.add_row(label_of(entry), *numbers, Text(verdict, style=COLOURS.get(verdict, "")))
    console.print(table)
    console.print(Text(report.verdict, style="bold"))
    for note in notes_of(report.details):
        console.print(Text(note))
    if report.samples:
        console.print(_sample_table(report.samples[:PRINTED_SAMPLES], console.width))


def notes_of(details: dict[str, Any]) -> list[str]:
    """What has to be known to read the numbers: rows, decoding, the judge's error, the command that gives them."""
    notes = []
    for item in details.get("choices", []):
        notes.append(
            f"Multiple choice: {item['questions']} questions of {item['source']}, {item['by_chance']:.2f} right by "
            f"chance; {item['decoding']}. Again: {item['command']}"
        )
    if harness := details.get("harness"):
        notes.append(
            f"lm-evaluation-harness {harness['version']}: {harness['said']}; before: the base. "
            f"Again: {harness['command']}"
        )
    if fair := details.get("fairness"):
        notes.append(
            f"Fairness: {fair['rows']} rows of {fair['source']}; bias 0: none, 1: always the stereotype, -1: always "
            f"against it; {fair['decoding']}. Again: {fair['command']}"
        )
        notes += _moved(fair["categories"])
    return [*safety_notes(details["safety"]), *notes] if "safety" in details else notes


def safety_notes(safety: dict[str, Any]) -> list[str]:
    said = (
        f"Refusals: {safety['harmful_prompts']} harmful and {safety['harmless_prompts']} harmless prompts of "
        f"{safety['source']}, greedy answers of at most {safety['decoding']['max_new_tokens']} tokens; "
        f"{safety['judge']['in_words']}. Again: {safety['command']}"
    )
    return [said, *_moved(safety["kinds"])]


def _moved(lines: list[dict[str, Any]]) -> list[str]:
    """Of kinds of prompts or categories of questions those that moved."""
    moved = [line for line in lines if line["verdict"] in ("better", "worse")]
    return [f"{line['name']}: {' → '.join(numbers_of(line)[:2])}, {line['verdict']} (n={line['n']})" for line in moved]


def print_adapters(compared: dict[str, Any], console: Console) -> None:
    """One table of `finished.Adapters.to_json()`: a row a metric, a column an adapter, differences against the base."""
    from rich.table import Table
    from rich.text import Text

    reports = compared["adapters"]
    table = Table(title=f"Adapters on {compared['base']}, on the same held-out rows", title_justify="left")
    table.add_column("↑ more is better, ↓ less")
    table.add_column("base", justify="right")
    for name in reports:
        table.add_column(Text(name))
    first = next(iter(reports.values()))
    for row, entry in enumerate(first["metrics"]):
        cells = []
        for report in reports.values():
            _, after, difference, verdict = numbers_of(report["metrics"][row])
            cells.append(Text.assemble(after, "  ", difference, "\n", (verdict, COLOURS.get(verdict, ""))))
        table.add_row(label_of(entry), numbers_of(entry)[0], *cells)
    console.print(table)
    for name, report in reports.items():
        console.print(Text(f"{name}: {report['verdict']}", style="bold"))
    for note in compared["notes"]:
        console.print(Text(f"Note: {note}"))


def _sample_table(samples: list[dict[str, Any]], width: int) -> Any:
    """The answers side by side, or below one another where a column is narrower than one of their words."""
    from rich.table import Table
    from rich.text import Text

    heads = ("prompt", "expected", "before", "after")
    rows = []
    for sample in samples:
        prompt = _on_one_line(sample["prompt"])
        # what sets one prompt apart from the next stands at its end
        cells = ["…" + prompt[-120:] if len(prompt) > 120 else prompt]
        cells += [_on_one_line(sample[side])[:160] for side in ("reference", "before", "after")]
        rows.append(cells)
    longest = max(len(word) for cells in rows for cell in cells for word in [*cell.split(), ""])
    if longest <= (width - 3 * len(heads) - 1) // len(heads):
        table = Table(title="The first answers side by side", title_justify="left", show_lines=True)
        for head in heads:
            table.add_column(head, ratio=1, overflow="fold")
        for cells in rows:
            table.add_row(*map(Text, cells))  # Text: square brackets in an answer are not markup
        return table
    table = Table(title="The first answers", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for cells in rows:
        for head, cell in zip(heads, cells, strict=True):
            table.add_row(head, Text(cell), end_section=head == heads[-1])
    return table


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
