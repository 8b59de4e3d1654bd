"""A reward model's adapter and head as one plain model, and what that changes in its scores.

On a base that is not quantised scores stay what they were. Of an adapter that was trained on 4-bit weights two plain
models can be made, as of one that writes (merge.py); the one whose scores are nearer to the trained model's is taken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_kit.data.chat import end_token_ids
from finetune_kit.data.load import load_data
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import DataError, NumericsError
from finetune_kit.evaluation.loss import general_rows
from finetune_kit.models import adapters
from finetune_kit.models.load import dequantised
from finetune_kit.models.provenance import base_record, check_base
from finetune_kit.models.reward import load_saved, load_scorer, score_rows
from finetune_kit.runs.saved import FinishedRun
from finetune_kit.runs.verify import TOLERANCE, release
from finetune_kit.system.terminal import doing

RULE = "smallest mean difference of a score from the trained model's"
INTO = {"base": "base", "dequantised": "dequantised base"}  # for people


def merged(run: FinishedRun, tokenizer: Any, names: tuple[str, ...], size: int | None) -> tuple[Any, dict[str, Any]]:
    """The best of the candidates `names`, and what was found: the content of merge.json.

    A 4-bit base's candidates are measured on `size` held-out pairs (None: all), another base's on the general text.
    Raises NumericsError where merging into a float32 base changes a score, DataError where there is no pair.
    """
    config = run.config
    quantised = config.model.load_in_4bit
    pairs = _pairs(run, tokenizer, size) if quantised else []
    rows = [row for pair in pairs for row in pair] or [list(ids) for ids, _ in general_rows(tokenizer)]
    ends = end_token_ids(tokenizer, config.data.chat_template_kwargs)
    with doing("scoring as trained"):
        trained = score_rows(load_saved(config.model, run.folder, tokenizer, ends, config.train.seed), rows)
    found: dict[str, dict[str, float]] = {}
    model = best = None
    for name in names:
        model = None  # one candidate at a time
        release()
        with doing(f"merging into {INTO[name]}"):
            model = _candidate(run, tokenizer, ends, name)
        found[name] = _apart(score_rows(model, rows), trained, bool(pairs))
        best = min(found, key=lambda each: found[each]["score_difference"])
    if best != name:
        model = None
        release()
        model = _candidate(run, tokenizer, ends, str(best))
    assert model is not None
    largest, exact = found[str(best)]["largest"], str(model.dtype) == "torch.float32" and not quantised
    if exact and not largest <= TOLERANCE * max(1.0, *map(abs, trained)):
        raise NumericsError(
            f"A score of the merged model differs by {largest:.3g} from that of {run.folder}.",
            "Its adapter cannot be merged by PEFT; use it as an adapter.",
        )
    base = base_record(config.model)
    results: dict[str, Any] = {
        "run": run.folder.resolve().name,
        "base": {"name": base["name"], "revision": base["revision"], "load_in_4bit": quantised},
        "candidate": best,
        "rule": RULE,
        "scores_measured_on": {"source": "held-out answers" if pairs else "general text", "rows": len(rows)},
        "candidates": found,
        "notes": [],
    }
    return model, results


def _pairs(run: FinishedRun, tokenizer: Any, size: int | None) -> list[list[list[int]]]:
    """Chosen and rejected of the held-out pairs, whole sequences."""
    config = run.config
    data = load_data(config.data, config.kind, tokenizer, seed=config.train.seed)
    held_out = data.held_out.select(range(min(len(data.held_out), size or len(data.held_out))))
    found = [[list(sequences(row)[side][0]) for side in ("chosen", "rejected")] for row in held_out]
    if not found:
        raise DataError("There is no held-out pair to measure the candidates on.", "Set data.held_out_size.")
    return found


def _candidate(run: FinishedRun, tokenizer: Any, ends: list[int], name: str) -> Any:
    """The base, or what its 4 bits stand for, with the adapter added to its weights, and the head."""
    model, seed = run.config.model, run.config.train.seed
    if name == "base":
        adapted = load_saved(replace(model, load_in_4bit=False), run.folder, tokenizer, ends, seed)
    else:
        base = dequantised(load_scorer(model, tokenizer, ends, seed))
        check_base(model, run.folder)
        adapted = adapters.load_adapter(base, str(run.folder))
    return adapted.merge_and_unload().eval()


def _apart(scores: list[float], trained: list[float], paired: bool) -> dict[str, float]:
    """Mean and largest difference of a score; of pairs, the share whose preference is the same."""
    moved = [abs(one - other) for one, other in zip(scores, trained, strict=True)]
    found = {"score_difference": sum(moved) / len(moved), "largest": max(moved)}
    if paired:
        ways = [[good > bad for good, bad in zip(each[0::2], each[1::2], strict=True)] for each in (scores, trained)]
        found["same_preference"] = sum(a == b for a, b in zip(*ways, strict=True)) / len(ways[0])
    return found


def table_of(results: dict[str, Any]) -> list[list[str]]:
    """The measurements for people, the heads first, a line for each candidate."""
    lines = [["merged into", "score difference", "largest", "same preference"]]
    for name, found in results["candidates"].items():
        same = f"{found['same_preference']:.1%}" if "same_preference" in found else "–"
        lines.append([INTO[name], f"{found['score_difference']:.2e}", f"{found['largest']:.2e}", same])
    return lines


def verdict_of(results: dict[str, Any]) -> str:
    """In a sentence: what was merged into what, and how far that moved the scores."""
    found, place = results["candidates"][results["candidate"]], results["scores_measured_on"]
    return (
        f"Merged into the {INTO[results['candidate']]}: a score differs from the trained model's by "
        f"{found['score_difference']:.2e}, at most {found['largest']:.2e}, over {place['rows']} rows "
        f"({place['source']})."
    )
