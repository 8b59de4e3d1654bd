"""The report's charts as inline SVG: losses over steps, reward against KL, a reward model's reliability."""

from __future__ import annotations

import math
from html import escape
from typing import Any

WIDTH, HEIGHT = 480, 230  # of the loss curves, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 30  # room for their labels


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


def shortness(history: list[dict[str, Any]]) -> str:
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
