"""The report for people: a table on the terminal, and one HTML file that needs no network and no script."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from finetune_kit.evaluation.compare import Report

LABELS: dict[str, str] = {
    "task_score": "task score",
    "exact_match": "exact match",
    "final_number": "final number right",
    "reward": "reward of the answers",
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
WIDTH, HEIGHT = 480, 230  # of the loss curves, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30  # room for their labels


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
    return [*_safety_notes(details["safety"]), *notes] if "safety" in details else notes


def _safety_notes(safety: dict[str, Any]) -> list[str]:
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


def write_html(report: Report, history: list[dict[str, Any]], run: dict[str, Any], path: Path) -> None:
    """report.html: verdict, table, loss curves, samples, then everything in `run`.

    `history`: the lines of metrics.jsonl (step, loss, eval_loss, …). `run`: `recipe` (its name), and whatever else is
    to be told: a dict (ledger, versions) becomes a folding table of dotted names and values, a text (settings as YAML)
    a folding block. All text is escaped.
    """
    title = f"{run['recipe']}: before and after"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict {escape(report.metrics[0]["verdict"].split()[0])}">{escape(report.verdict)}</p>',
        _metric_table(report),
        "<h2>Loss while training</h2>",
        loss_curves(history),
        _shortness(history),
        reward_frontier(history),
        _samples_html(report),
        _safety_html(report.details),
        _questions_html(report.details),
        _rewards_html(report.details),
        *(_facts(name, value) for name, value in run.items() if name != "recipe"),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n"
    )
    Path(path).write_text(page, encoding="utf-8")


def _metric_table(report: Report) -> str:
    note = f"↑ more is better, ↓ less. Main metric: {escape(report.main)}. "
    note += f"Row by row: {report.wins} won, {report.ties} tied, {report.losses} lost."
    return f'<h2>Before and after, on the same held-out rows</h2>{_table(report.metrics)}<p class="note">{note}</p>'


def _table(entries: list[dict[str, Any]]) -> str:
    lines = []
    for entry in entries:
        before, after, difference, verdict = map(escape, numbers_of(entry))
        lines.append(
            f'<tr><th scope="row">{escape(label_of(entry))}</th><td data-label="before">{before}</td>'
            f'<td data-label="after">{after}</td><td data-label="difference">{difference}</td>'
            f'<td data-label="verdict" class="{verdict.split()[0]}">{verdict}</td>'
            f'<td data-label="rows">{entry["n"]}</td></tr>'
        )
    heads = "".join(f"<th>{head}</th>" for head in ("", "before", "after", "difference [95 %]", "verdict", "rows"))
    return f'<table class="metrics"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _safety_html(details: dict[str, Any]) -> str:
    """Refusals by kind, and some prompts with their answers, folded behind a warning: some are meant to harm."""
    if "safety" not in details:
        return ""
    safety = details["safety"]
    samples = "".join(
        f'<section class="sample"><h3>{escape(sample["where"])}, {"harmful" if sample["harmful"] else "harmless"}</h3>'
        f'<pre>{escape(sample["prompt"])}</pre><div class="sides">'
        + "".join(
            f"<div><h4>{side} <small>{escape(sample[side][0])}</small></h4><pre>{escape(sample[side][1])}</pre></div>"
            for side in ("before", "after")
        )
        + "</div></section>"
        for sample in safety["samples"]
    )
    counts = {
        f"{name} prompts, {side}": shares
        for name, sides in safety["outcomes"].items()
        for side, shares in sides.items()
    }
    return (
        f'<h2>Refusals</h2><p class="note">{escape(_safety_notes(safety)[0])}</p>'
        + (_table(safety["kinds"]) if safety["kinds"] else "")
        + _facts("what the answers did", counts)
        + "<details><summary>Warning: harmful requests, and what the model answered, follow</summary>"
        + f"{samples}</details>"
    )


def _questions_html(details: dict[str, Any]) -> str:
    """Multiple choice and fairness: rows, way and command, and the categories' own numbers."""
    notes = notes_of({name: details[name] for name in ("choices", "fairness") if name in details})
    if not notes:
        return ""
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    categories = details.get("fairness", {}).get("categories", [])
    return "<h2>Questions with choices</h2>" + told + (_table(categories) if categories else "")


def _samples_html(report: Report) -> str:
    if not report.samples:
        return ""
    blocks = []
    for sample in report.samples:
        sides = []
        for position, side in enumerate(("before", "after")):
            scores = [f"{name} {values[position]:.2f}" for name, values in sample["scores"].items()]
            scores += [] if sample["ended"][position] else ["cut off"]
            facts = escape(" · ".join(scores))
            sides.append(f"<div><h4>{side} <small>{facts}</small></h4><pre>{escape(sample[side])}</pre></div>")
        blocks.append(
            f'<section class="sample"><h3>{escape(sample["where"])}</h3><pre>{escape(sample["prompt"])}</pre>'
            f"<h4>expected</h4><pre>{escape(sample['reference'])}</pre>"
            f'<div class="sides">{"".join(sides)}</div></section>'
        )
    return f"<h2>The first {len(blocks)} answers side by side</h2>" + "".join(blocks)


def _rewards_html(details: dict[str, Any]) -> str:
    """What a reward model's report has besides: its gate, the reliability plot, other rules, the worst mistakes."""
    if "calibration" not in details:
        return ""
    shown = {key: details[key] for key in ("gate", "length_rule", "length_correlation", "scores", "turned_round")}
    shown |= {"end_token": details["end_token"], "accuracy_by_margin": details["accuracy_by_margin"]}
    mistakes = "".join(
        f'<section class="sample"><h3>{escape(pair["where"])}</h3><pre>{escape(pair["prompt"])}</pre>'
        '<div class="sides">'
        + "".join(
            f"<div><h4>{side} <small>score {score:.3f}</small></h4><pre>{escape(pair[side])}</pre></div>"
            for side, score in zip(("chosen", "rejected"), pair["scores"], strict=True)
        )
        + "</div></section>"
        for pair in details["mistakes"]
    )
    return (
        "<h2>How sure, and how often right</h2>"
        + reliability_plot(details["calibration"])
        + _facts("what else could explain the scores", shown)
        + (f"<h2>Held-out pairs on which it is most surely wrong</h2>{mistakes}" if mistakes else "")
    )


def reliability_plot(calibration: dict[str, Any]) -> str:
    """Share of pairs that are right by win probability, with 95 % intervals; the line is perfect calibration."""
    scale = _Scale(0.5, 1.0, 0.0, 1.0)
    marks = []
    for item in calibration["bins"]:
        x, low, high = scale.x(item["confidence"]), *(scale.y(end) for end in item["interval"])
        marks.append(f'<line class="held-out" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        marks.append(f'<circle class="held-out" cx="{x:.1f}" cy="{scale.y(item["accuracy"]):.1f}" r="3.5"/>')
    perfect = " ".join(f"{scale.x(share):.1f},{scale.y(share):.1f}" for share in (0.5, 1.0))
    description = f"Share of pairs that are right by win probability; calibration error {calibration['error']:.3f}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">{_axes(scale)}'
        f'<polyline class="training" points="{perfect}"/>{"".join(marks)}</svg>'
        f"<figcaption>right, by the win probability of the preferred answer (0.5 to 1); line: perfectly calibrated; "
        f"expected calibration error {calibration['error']:.3f}</figcaption></figure>"
    )


def _facts(name: str, value: Any) -> str:
    if isinstance(value, dict):
        pairs = [(escape(key), escape(item)) for key, item in _flat(value, "")]
        rows = "".join(f'<tr><th scope="row">{key}</th><td>{item}</td></tr>' for key, item in pairs)
        inside = f'<table class="facts">{rows}</table>'
    else:
        inside = f"<pre>{escape(str(value))}</pre>"
    return f"<details{' open' if name == 'ledger' else ''}><summary>{escape(name)}</summary>{inside}</details>"


def _flat(values: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    """Nested dicts as (dotted name, text); of a long list the first entries and the count of the rest."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            rest = [f"… and {len(value) - LISTED} more"] if len(value) > LISTED else []
            pairs.append((f"{prefix}{key}", "\n".join([*map(_one_line, value[:LISTED]), *rest]) or "none"))
        else:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs


def _one_line(item: Any) -> str:
    return " · ".join(map(str, item.values())) if isinstance(item, dict) else str(item)


def loss_curves(history: list[dict[str, Any]]) -> str:
    """Training and held-out loss over the optimizer steps as inline SVG; lines without a finite loss are left out."""
    curves = {name: _points(history, key) for name, key in (("training", "loss"), ("held-out", "eval_loss"))}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return '<p class="note">No loss was logged.</p>'
    steps, losses = zip(*points, strict=True)
    scale = _Scale(min(steps), max(steps), min(losses), max(losses))
    drawn = "".join(_curve(name, curve, scale) for name, curve in curves.items() if curve)
    legend = " ".join(f'<span class="key {name}">{name}</span>' for name, curve in curves.items() if curve)
    description = f"Loss over {max(steps):g} optimizer steps"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{description}">{_axes(scale)}{drawn}</svg>'
        f"<figcaption>{legend} loss in nats, by optimizer step</figcaption></figure>"
    )


def _shortness(history: list[dict[str, Any]]) -> str:
    """Where memory was too small for a batch, and what was done: smaller ones that make the same step."""
    said = []
    for line in history:
        if "per_device_train_batch_size" in line:
            passes = line.get("gradient_accumulation_steps")
            into = f" in {passes} passes" if passes else ""
            said.append(f"after step {line['step']}: {line['per_device_train_batch_size']} rows at once{into}")
    if not said:
        return ""
    note = "Memory was too small for the batch that was asked for, and smaller ones made the same steps"
    return f'<p class="note">{note}: {escape("; ".join(said))}.</p>'


def reward_frontier(history: list[dict[str, Any]]) -> str:
    """What PPO's score cost: mean score of each update's completions by their KL from the reference, in order; with
    several rewards, each one's own, too. One that falls while another rises shows that the other is being fooled.
    """
    names = sorted({name for line in history for name in line if name.startswith("reward/")})
    drawn = [_frontier(history, name) for name in ("objective/scores", *(names if len(names) > 1 else ()))]
    return "<h2>Score by KL</h2>" + "".join(drawn) if any(drawn) else ""


def _frontier(history: list[dict[str, Any]], name: str) -> str:
    logged = [(line.get("objective/kl"), line.get(name)) for line in history]
    points = [(kl, score) for kl, score in logged if kl is not None and score is not None]
    if not points:
        return ""
    what = escape("score" if name == "objective/scores" else name)
    costs, scores = zip(*points, strict=True)
    scale = _Scale(min(costs), max(costs), min(scores), max(scores))
    marks = "".join(
        f'<circle class="held-out" cx="{scale.x(kl):.1f}" cy="{scale.y(score):.1f}" r="3.5"><title>update {number}: '
        f"KL {kl:.2f}, {what} {score:.3f}</title></circle>"
        for number, (kl, score) in enumerate(points, start=1)
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Mean {what} by KL from the reference over {len(points)} updates">{_axes(scale)}'
        f"{_curve('training', list(points), scale)}{marks}</svg><figcaption>mean {what} of an update's completions, by "
        f"their KL from the reference (nats a completion)</figcaption></figure>"
    )


class _Scale:
    """Steps and losses to SVG units; a flat curve gets some height of its own."""

    def __init__(self, first: float, last: float, low: float, high: float) -> None:
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        self.first, self.last, self.low, self.high = first, last, low - pad, high + pad

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / ((self.last - self.first) or 1)

    def y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.high - loss) / (self.high - self.low)


def _points(history: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have a finite number under `key`."""
    pairs = [(line.get("step"), line.get(key)) for line in history]
    return [(s, v) for s, v in pairs if isinstance(s, int | float) and isinstance(v, int | float) and math.isfinite(v)]


def _curve(name: str, curve: list[tuple[float, float]], scale: _Scale) -> str:
    corners = [(scale.x(step), scale.y(loss)) for step, loss in curve]
    line = f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in corners)}"/>'
    few = corners if name == "held-out" or len(corners) == 1 else []
    return line + "".join(f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in few)


def _axes(scale: _Scale) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        loss = scale.low + share * (scale.high - scale.low)
        y = scale.y(loss)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>')
    ends = ((scale.first, "start"), (scale.last, "end"))
    for step, anchor in ends if scale.last > scale.first else ends[:1]:
        parts.append(f'<text x="{scale.x(step):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{step:g}</text>')
    return "".join(parts)


STYLE = """
:root { color-scheme: light dark; --fg: #1b1b1f; --bg: #fff; --soft: #f3f3f6; --line: #d4d4dc; --dim: #5d5d68;
  --good: #17703a; --bad: #b3261e; --train: #2f6fd6; --held: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --fg: #e8e8ec; --bg: #16161a; --soft: #212127; --line: #3a3a44;
  --dim: #a3a3b0; --good: #63cf8b; --bad: #ff8a80; --train: #7db0ff; --held: #ffab70; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2rem; }
h3, h4 { font-size: 1rem; margin: .5rem 0 .25rem; } h4 { color: var(--dim); font-weight: 600; }
small, .note, figcaption { color: var(--dim); font-size: .875rem; font-weight: 400; }
.verdict { background: var(--soft); border-left: .3rem solid var(--dim); padding: .75rem 1rem; }
.verdict.better { border-color: var(--good); } .verdict.worse { border-color: var(--bad); }
td.better { color: var(--good); font-weight: 600; } td.worse { color: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
.metrics td { font-variant-numeric: tabular-nums; }
.facts th { font-weight: 400; width: 40%; } .facts td { white-space: pre-line; }
.facts th, .facts td { overflow-wrap: anywhere; font-size: .875rem; }
pre { background: var(--soft); padding: .6rem; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .875rem; border-radius: .3rem; min-height: 2.4rem; }
.sample { border-top: 1px solid var(--line); padding: .5rem 0 1rem; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
details { margin-top: 1.5rem; } summary { cursor: pointer; font-weight: 600; }
figure { margin: 0; } svg { width: 100%; max-width: 40rem; height: auto; display: block; }
svg text { fill: var(--dim); font-size: 11px; } .grid { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; } polyline.training { stroke: var(--train); }
polyline.held-out { stroke: var(--held); }
line.held-out { stroke: var(--held); }
circle.held-out { fill: var(--held); } circle.training { fill: var(--train); }
.key { margin-right: .75rem; } .key::before { content: ""; display: inline-block; width: 1rem; height: .2rem;
  margin-right: .35rem; vertical-align: middle; }
.key.training::before { background: var(--train); } .key.held-out::before { background: var(--held); }
@media (max-width: 40rem) {
  .sides { grid-template-columns: 1fr; } svg text { font-size: 15px; }
  .metrics thead { display: none; } .metrics, .metrics tbody, .metrics tr, .metrics th, .metrics td { display: block; }
  .metrics tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .metrics th, .metrics td { border: 0; padding: .1rem 0; }
  .metrics td { display: flex; justify-content: space-between; gap: 1rem; }
  .metrics td::before { content: attr(data-label); color: var(--dim); font-weight: 400; }
}
"""
