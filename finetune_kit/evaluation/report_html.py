"""The report as one HTML file that needs no network and no script."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.evaluation.charts import loss_curves, reliability_plot, reward_frontier, shortness
from finetune_kit.evaluation.report import LABELS, LISTED, label_of, notes_of, numbers_of, safety_notes

if TYPE_CHECKING:
    from finetune_kit.evaluation.compare import Report


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
        shortness(history),
        reward_frontier(history),
        _tools_html(report.details),
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


HEADS = ("", "before", "after", "difference [95 %]", "verdict", "rows")


def _table(entries: list[dict[str, Any]], heads: tuple[str, ...] = HEADS) -> str:
    lines = []
    for entry in entries:
        before, after, difference, verdict = map(escape, numbers_of(entry))
        lines.append(
            f'<tr><th scope="row">{escape(label_of(entry))}</th><td data-label="{heads[1]}">{before}</td>'
            f'<td data-label="{heads[2]}">{after}</td><td data-label="difference">{difference}</td>'
            f'<td data-label="verdict" class="{verdict.split()[0]}">{verdict}</td>'
            f'<td data-label="rows">{entry["n"]}</td></tr>'
        )
    titles = "".join(f"<th>{head}</th>" for head in heads)
    return f'<table class="metrics"><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


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
        f'<h2>Refusals</h2><p class="note">{escape(safety_notes(safety)[0])}</p>'
        + (_table(safety["kinds"]) if safety["kinds"] else "")
        + _facts("what the answers did", counts)
        + "<details><summary>Warning: harmful requests, and what the model answered, follow</summary>"
        + f"{samples}</details>"
    )


def _tools_html(details: dict[str, Any]) -> str:
    """What tools were worth and how they were called; calls that none was run for, by structure."""
    parts = []
    if "tools" in details:
        for side in ("before", "after"):
            lines = [
                {
                    **line,
                    "before": line["without"],
                    "after": line["with"],
                    "name": f"{label}, {'all rows' if line['rows'] == 'all' else 'rows ' + line['rows']}",
                }
                for line in details["tools"][side]["scores"]
                for label in [LABELS.get(line["name"], line["name"])]
            ]
            heads = ("", "without tools", "with tools", "difference [95 %]", "verdict", "rows")
            parts += [f"<h3>{side}</h3>", _table(lines, heads) if lines else ""]
            parts.append(_facts(f"calls, {side}", details["tools"][side]["calls"]))
    if "function_calls" in details:
        found = details["function_calls"]
        parts += [_facts(f"calls by structure, {side}", found[side]) for side in ("before", "after")]
        parts += [
            f'<section class="sample"><h3>{escape(sample["where"])}</h3><h4>wanted</h4>'
            f'<pre>{escape(_shown_calls(sample["wanted"]))}</pre><div class="sides">'
            + "".join(
                f"<div><h4>{side} <small>{'right' if right else 'not right'}</small></h4>"
                f"<pre>{escape(_shown_calls(sample[side]))}</pre></div>"
                for side, right in zip(("before", "after"), sample["right"], strict=True)
            )
            + "</div></section>"
            for sample in found["samples"]
        ]
    return "<h2>Tools</h2>" + "".join(parts) if parts else ""


def _shown_calls(calls: list[dict[str, Any]]) -> str:
    """Calls for people, with what came of them where they were run."""
    return "\n".join(
        f"{call['name']}({json.dumps(call['arguments'], ensure_ascii=False)})"
        + (f" → {call['result']}" if "result" in call else "")
        for call in calls
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
            calls = _shown_calls(sample["calls"][position]) if "calls" in sample else ""
            called = f'<pre class="calls">{escape(calls)}</pre>' if calls else ""
            sides.append(f"<div><h4>{side} <small>{facts}</small></h4>{called}<pre>{escape(sample[side])}</pre></div>")
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
pre.calls { border-left: .2rem solid var(--train); min-height: 0; margin-bottom: .3rem; }
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
