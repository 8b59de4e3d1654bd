"""Which way a run moved refusals: harmful prompts that are refused, and harmless ones that are refused, too.

The prompts are for measuring alone: a run whose training rows hold one of them is stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.chat import render_prompt
from finetune_kit.data.records import Message, Prompt, prompt_of
from finetune_kit.data.sources import read_rows, shown
from finetune_kit.errors import DataError
from finetune_kit.evaluation.intervals import SHARE, entry
from finetune_kit.evaluation.refusals import (
    ASSETS,
    Agreement,
    Outcome,
    agreement,
    labelled_answers,
    own_agreement,
    refusal,
)
from finetune_kit.generation.generate import Completion, generate
from finetune_kit.settings.schema import EvaluateConfig, ModelConfig

XSTEST = "xstest"
TEXTS = ("prompt", "question", "text", "instruction", "goal", "behavior", "Goal", "Behavior")
FLAGS = ("harmful", "unsafe", "is_harmful", "harmless", "safe", "is_safe", "label")
KINDS = ("type", "kind", "category", "Category", "subcategory", "SemanticCategory")
HARMFUL = ("harmful", "unsafe", "true", "1", "yes", "toxic", "malicious")
HARMLESS = ("harmless", "safe", "false", "0", "no", "benign")
SHOWN = 400  # characters of a prompt and of an answer that a model judges: a refusal shows in the opening
SAMPLES = 8  # prompts with their answers that the report keeps, harmful and harmless in turn
FEWEST_OF_A_KIND = 5  # prompts from which a kind has a line of its own


@dataclass(frozen=True)
class SafetyPrompt:
    """A prompt, whether it is harmful, its kind, and its place in its file."""

    text: str
    harmful: bool
    kind: str
    where: str


@dataclass
class Safety:
    """What one model answered to the prompts of `source`: parallel lists."""

    source: str
    prompts: list[SafetyPrompt]
    answers: list[str]
    outcomes: list[Outcome]
    judge: Agreement  # of whatever said which answers refuse
    decoding: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0  # of prompts and answers


def read_prompts(source: str, size: int) -> list[SafetyPrompt]:
    """`size` prompts, half of them harmful where there are enough, spread evenly over their file.

    `source`: xstest, a file or a Hub id whose rows have a text and a column that says harmful or not. Raises DataError.
    """
    every = [_prompt(source, number, row) for number, row in _rows(source)]
    sides = [[item for item in every if item.harmful is harmful] for harmful in (True, False)]
    if not all(sides):
        found = "harmful" if sides[0] else "harmless"
        raise DataError(
            f"evaluate.safety: {source} has {found} prompts alone.", "Expected both: one shows the other's price."
        )
    harmful = min(len(sides[0]), size // 2)
    harmless = min(len(sides[1]), size - harmful)
    harmful = min(len(sides[0]), size - harmless)
    return [*_spread(sides[0], harmful), *_spread(sides[1], harmless)]


def _rows(source: str) -> list[tuple[int, dict[str, Any]]]:
    return read_rows(str(ASSETS / "xstest.jsonl") if source == XSTEST else source, "evaluate.safety")


def _prompt(source: str, number: int, row: dict[str, Any]) -> SafetyPrompt:
    where = f"{shown(source)}:{number}"
    text = next((row[name] for name in TEXTS if isinstance(row.get(name), str) and row[name].strip()), None)
    flag = next((name for name in FLAGS if row.get(name) is not None), None)
    said = None if flag is None else str(row[flag]).strip().lower()
    if text is None or said not in (*HARMFUL, *HARMLESS):
        raise DataError(
            f"evaluate.safety: {where} has {', '.join(row)}; expected a text ({', '.join(TEXTS[:5])}) and whether it "
            f"is harmful ({', '.join(FLAGS)}), as safe or unsafe, true or false.",
            "Rename its columns.",
        )
    turned = flag in ("harmless", "safe", "is_safe") and said in ("true", "false", "1", "0", "yes", "no")
    kind = next((str(row[name]) for name in KINDS if row.get(name) not in (None, "")), "")
    return SafetyPrompt(text, (said in HARMFUL) is not turned, kind, where)


def _spread(items: Sequence[SafetyPrompt], count: int) -> list[SafetyPrompt]:
    return [items[number * len(items) // count] for number in range(count)]


def measure_safety(
    model: Any, tokenizer: Any, data: Any, config: EvaluateConfig, told: Callable[[int], None] | None = None
) -> Safety:
    """Greedy answers to the prompts of config.safety, written as the run's own prompts are, and which of them refuse.

    Raises DataError where a training row holds one of the prompts.
    """
    source = config.safety or XSTEST
    prompts = read_prompts(source, config.safety_size)
    check_untrained(prompts, data)
    opening = system_turn(data)
    turns: list[list[Message]] = [[*opening, {"role": "user", "content": prompt.text}] for prompt in prompts]
    if _is_bare(data):
        turns = [[{**turn, "plain": True} for turn in some] for some in turns]
    ids = [
        render_prompt(tokenizer, some, None, data.chat_template_kwargs, data.special_tokens_in_text) for some in turns
    ]

    def answer(mine: list[int]) -> list[Completion]:
        return generate(
            model,
            tokenizer,
            [ids[index] for index in mine],
            max_new_tokens=config.safety_max_new_tokens,
            end_token_ids=data.end_token_ids,
            batch_size=config.batch_size,
            progress=told,
        )

    completions = distributed.spread(len(ids), answer, distributed.is_sharded(model))
    answers = [completion.text for completion in completions]
    outcomes, judge = distributed.from_main(lambda: _judged(prompts, answers, data, config))
    return Safety(
        source=source,
        prompts=prompts,
        answers=answers,
        outcomes=outcomes,
        judge=judge,
        decoding={"do_sample": False, "max_new_tokens": config.safety_max_new_tokens},
        tokens=sum(map(len, ids)) + sum(len(completion.ids) for completion in completions),
    )


def check_untrained(prompts: Sequence[SafetyPrompt], data: Any) -> None:
    """Raises DataError where a training row asks one of the prompts."""
    asked = {" ".join(prompt.text.split()).lower(): prompt for prompt in prompts}
    for record in data.train_records:
        for turn in prompt_of(record):
            found = asked.get(" ".join(str(turn["content"]).split()).lower()) if turn["role"] == "user" else None
            if found is not None:
                raise DataError(
                    f"{record.where}: a training row asks {found.where}, which refusals are measured on.",
                    "Remove the row, or measure on other prompts: evaluate.safety=FILE",
                )


def system_turn(data: Any) -> list[Message]:
    """The system turn that all held-out rows begin with, if there is one: the run's own."""
    first = [(prompt_of(record) or [{"role": "user", "content": ""}])[0] for record in data.held_out_records]
    texts = {str(turn["content"]) if turn["role"] == "system" else None for turn in first}
    return [{"role": "system", "content": text} for text in texts if text is not None] if len(texts) == 1 else []


def _is_bare(data: Any) -> bool:
    """Whether the run's prompts are text as it is, without turns."""
    turns = [turn for record in data.held_out_records[:1] for turn in prompt_of(record)]
    return bool(turns) and bool(turns[0].get("plain"))


def _judged(
    prompts: Sequence[SafetyPrompt], answers: Sequence[str], data: Any, config: EvaluateConfig
) -> tuple[list[Outcome], Agreement]:
    """What each answer does, and how far the judge of that is to be believed."""
    if config.safety_judge is None:
        return [refusal(answer, prompt.text) for prompt, answer in zip(prompts, answers, strict=True)], own_agreement()
    score = _scorer(config.safety_judge, data.chat_template_kwargs)
    rows = labelled_answers()
    scores = score([row["prompt"] for row in rows], [row["answer"] for row in rows])
    labels = [row["outcome"] in ("refused", "partial") for row in rows]
    threshold = best_threshold(scores[::2], labels[::2])
    found = [value > threshold for value in scores[1::2]]
    judged = score([prompt.text for prompt in prompts], answers)
    outcomes: list[Outcome] = ["refused" if value > threshold else "answered" for value in judged]
    named = Path(config.safety_judge).name if Path(config.safety_judge).is_dir() else config.safety_judge
    return outcomes, agreement(f"{named}, above {threshold:.3f},", found, labels[1::2])


def _scorer(source: str, kwargs: dict[str, Any]) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    from finetune_kit.rewards.models import model_score
    from finetune_kit.rewards.settings import RewardConfig

    score = model_score(source, RewardConfig(ignore_gate=True), ModelConfig(), kwargs)

    def scored(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        asked = [text[:SHOWN] for text in prompts]
        records = [Prompt(f"answer {at}", [{"role": "user", "content": text}]) for at, text in enumerate(asked, 1)]
        return [float(value) for value in score(asked, [text[:SHOWN] for text in answers], records)]

    return scored


def best_threshold(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The score above which most answers are what their labels say; halfway between the two scores around it."""
    ordered = sorted(set(scores))
    cuts = [ordered[0] - 1.0, *((low + high) / 2 for low, high in itertools.pairwise(ordered)), ordered[-1]]
    return max(cuts, key=lambda cut: sum((score > cut) == label for score, label in zip(scores, labels, strict=True)))


def entries(before: Safety, after: Safety, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Refused and partly refused, of the harmful prompts and of the harmless ones."""
    lines = []
    for harmful, good in ((True, True), (False, False)):
        name = "harmful" if harmful else "harmless"
        rows = [at for at, prompt in enumerate(before.prompts) if prompt.harmful is harmful]
        lines.append(_line(f"{name}_refused", before, after, rows, config, ("refused",), good))
        if any(side.outcomes[at] == "partial" for side in (before, after) for at in rows):
            lines.append(_line(f"{name}_partly_refused", before, after, rows, config, ("partial",), None))
    return lines


def _line(
    name: str,
    before: Safety,
    after: Safety,
    rows: Sequence[int],
    config: EvaluateConfig,
    outcomes: tuple[Outcome, ...],
    higher_is_better: bool | None,
) -> dict[str, Any]:
    was, now = ([float(side.outcomes[at] in outcomes) for at in rows] for side in (before, after))
    return entry(name, was, now, config, higher_is_better=higher_is_better, within=SHARE)


def details(before: Safety, after: Safety, config: EvaluateConfig) -> dict[str, Any]:
    """What the report says besides: every outcome's share, each kind's refusals, the judge's error, some answers."""
    kinds = sorted({(prompt.harmful, prompt.kind) for prompt in before.prompts if prompt.kind}, reverse=True)
    by_kind = []
    for harmful, kind in kinds:
        rows = [at for at, prompt in enumerate(before.prompts) if (prompt.harmful, prompt.kind) == (harmful, kind)]
        if len(rows) >= FEWEST_OF_A_KIND:
            line = _line("refused", before, after, rows, config, ("refused",), harmful)
            by_kind.append({**line, "name": f"refused, {'harmful' if harmful else 'harmless'}: {kind}"})
    sides = [[at for at, prompt in enumerate(before.prompts) if prompt.harmful is harmful] for harmful in (True, False)]
    first = [at for pair in zip(*sides, strict=False) for at in pair][:SAMPLES]
    source = shown(before.source)
    command = f"python -m finetune_kit evaluate DIR evaluate.safety={source}"
    command += f" evaluate.safety_size={len(before.prompts)}"
    if before.decoding["max_new_tokens"] != EvaluateConfig.safety_max_new_tokens:
        command += f" evaluate.safety_max_new_tokens={before.decoding['max_new_tokens']}"
    return {
        "source": source,
        "harmful_prompts": len(sides[0]),
        "harmless_prompts": len(sides[1]),
        "decoding": before.decoding,
        "tokens": before.tokens + after.tokens,
        "command": command,
        "judge": {**asdict(before.judge), "in_words": before.judge.in_words()},
        "outcomes": {
            name: {side: _shares(measured, rows) for side, measured in (("before", before), ("after", after))}
            for name, rows in zip(("harmful", "harmless"), sides, strict=True)
        },
        "kinds": by_kind,
        "samples": [
            {
                "prompt": before.prompts[at].text,
                "where": before.prompts[at].where,
                "harmful": before.prompts[at].harmful,
                **{
                    side: [measured.outcomes[at], measured.answers[at]]
                    for side, measured in (("before", before), ("after", after))
                },
            }
            for at in first
        ],
    }


def without_texts(told: dict[str, Any]) -> dict[str, Any]:
    """`details` as report.json keeps them: each sample's place in its file and what the answers did, and neither the
    prompt nor an answer. Those are in report.html alone, folded behind a warning."""
    kept = [
        {
            "where": sample["where"],
            "harmful": sample["harmful"],
            **{f"{side}_outcome": sample[side][0] for side in ("before", "after")},
        }
        for sample in told["samples"]
    ]
    return {**told, "samples": kept, "texts": "report.html, folded behind a warning"}


def _shares(measured: Safety, rows: Sequence[int]) -> dict[str, int]:
    """How many of the rows had each outcome."""
    names: tuple[Outcome, ...] = ("answered", "partial", "refused", "beside")
    return {name: sum(measured.outcomes[at] == name for at in rows) for name in names}
