"""Make a plain model of a run's adapter, and measure what that changes.

On a base that is not quantised the adapter is added to the weights in place, and the logits stay what they were.

An adapter that was trained on 4-bit weights has learned to live with their error, and two plain models can be made of
it: "base" adds it to the weights as they were before quantisation, "dequantised" to what the 4 bits stand for. Each is
measured on held-out rows against the model that was trained, the adapter on the 4-bit base; the one whose distributions
are nearer to that model's, by KL(trained || candidate) per supervised token, is taken. Adding the adapter to the 4-bit
weights themselves is not a candidate: the sum must be rounded to 4 bits again, which costs more (measured on six
layers of SmolLM2-135M: 0.0175 nats a token) than the whole fine-tune had moved the model (0.0143).

There is one model in memory at a time: of the trained one only its log-probabilities at some positions are kept.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.data.load import Data, load_data
from finetune_kit.errors import DataError, NumericsError, ResourceError, SettingsError
from finetune_kit.evaluation.divergence import Positions, choose_positions, divergence, log_probs
from finetune_kit.evaluation.loss import IGNORED, Row, general_rows
from finetune_kit.evaluation.measure import Measurement, held_out_only, measure
from finetune_kit.evaluation.preferences import sides
from finetune_kit.models.classifier import definition
from finetune_kit.models.load import load_adapted, load_dequantised
from finetune_kit.models.provenance import base_record
from finetune_kit.models.tokenizer import copy_processor
from finetune_kit.run_folder.identity import versions
from finetune_kit.run_folder.lineage import ANCESTRY
from finetune_kit.runs import merge_rewards
from finetune_kit.runs.card import card_metadata, how_to_use
from finetune_kit.runs.redact import without_paths
from finetune_kit.runs.saved import FinishedRun, moved_base, open_run, tokenizer_of
from finetune_kit.runs.saved_tensors import check_saved_tensors
from finetune_kit.runs.verify import (
    PROBE,
    TOLERANCE,
    NotMade,
    Proof,
    auto_class,
    judged,
    outputs,
    probe_logits,
    release,
    reload_logits,
    sentence,
)
from finetune_kit.settings.checks import check_own_tools
from finetune_kit.settings.load import to_yaml
from finetune_kit.settings.schema import EvaluateConfig
from finetune_kit.system.parsing import read_object
from finetune_kit.system.progress_bar import progress_bar
from finetune_kit.system.terminal import doing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AUTO = "auto"
CANDIDATES = ("base", "dequantised")  # in the order they are measured; the second one usually wins, and is then at hand
INTO = {"base": "base", "dequantised": "dequantised base"}  # for people
RULE = "lowest KL(trained || candidate) per supervised token"


@dataclass(frozen=True)
class Merged:
    """A plain model's folder, and what was found on the way to it: the content of merge.json."""

    folder: Path
    results: dict[str, Any]


def merge(
    folder: Path,
    out: Path,
    candidate: str = AUTO,
    max_shard_size: str = "5GB",
    size: int | None = None,
    recipe: str | None = None,
    base: str | None = None,
) -> Merged:
    """Write the run in `folder` to `out` as a plain model, proven by a fresh process; `out` appears when it is whole.

    With a 4-bit base, `candidate` is base, dequantised or auto (see above), and `size` the number of held-out rows to
    measure on (None: all of them, with the run's own evaluate.size answers). `recipe`: as `open_run` takes it.
    `base`: its base, where that is elsewhere now.

    Raises SettingsError (nothing to merge, `out` not empty, an argument without effect, an adapter of another base),
    NumericsError (what was merged or saved is not what was trained), ResourceError (disk).
    """
    run = _open(folder, out, candidate, max_shard_size, size, recipe, base)
    tokenizer = tokenizer_of(run)
    probe = list(general_rows(tokenizer)[0][0][:PROBE])
    if run.is_reward_model:
        names = CANDIDATES if candidate == AUTO else (candidate,)
        model, results = merge_rewards.merged(
            run, tokenizer, names if run.config.model.load_in_4bit else names[:1], size
        )
    elif run.config.model.load_in_4bit:
        model, results = _best(run, tokenizer, candidate, size)
    else:
        with doing("merging"):
            model, results = _exact(run, tokenizer, probe)
    # written beside its final name and renamed, so that a folder of that name is always whole
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch) / "model"
        expected, dtype, device = outputs(model, probe), model.dtype, model.device
        words, head = model.get_input_embeddings(), model.get_output_embeddings()
        results["tied_embeddings"] = head is not None and head.weight is words.weight  # not every config says it
        kind, code = auto_class(model), definition(model.config) if run.is_reward_model else ""
        with doing("saving the merged model"):
            _save(model, tokenizer, run, whole, max_shard_size)
            check_saved_tensors(model, whole)
        del model
        release()
        named = str(dtype).removeprefix("torch.")
        try:
            with doing("a fresh process loads it, and must give the same outputs"):
                got = reload_logits(
                    replace(run.config.model, revision=None), whole, probe, dtype, device, kind=kind, class_code=code
                )
            proof = Proof(judged(expected, got, whole), expected.tolerance, named, str(device))
        except NotMade as error:
            proof = Proof(None, expected.tolerance, named, str(device), error.message)
            results["notes"].append(f"That a fresh process gives the same logits was not proven: {error.message}.")
        results |= {**proof.to_json(), "dtype": named}
        results["versions"] = versions()
        (whole / "merge.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        (whole / "README.md").write_text(_card(run, results), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        whole.rename(out)
    return Merged(out, results)


def _open(
    folder: Path, out: Path, candidate: str, max_shard_size: str, size: int | None, recipe: str | None, base: str | None
) -> FinishedRun:
    """The run, with all that can be refused before anything is loaded."""
    if (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise SettingsError(
            f"{folder} holds a whole model, no adapter: nothing to merge.",
            f"Use it as it is: model.name_or_path={folder}",
        )
    run = open_run(folder, moved_base(base), recipe)
    if not run.is_adapter:
        raise SettingsError(f"{folder} holds no adapter: nothing to merge.")
    if candidate not in (AUTO, *CANDIDATES):
        raise SettingsError(f"--candidate {candidate}: expected {', '.join(CANDIDATES)} or {AUTO}.")
    if not run.config.model.load_in_4bit and (candidate != AUTO or size is not None):
        given = "--candidate" if candidate != AUTO else "--size"
        raise SettingsError(
            f"{given} has no effect: the base of {folder} is not quantised, so that merging changes nothing.",
            "Leave it out.",
        )
    if size is not None and size < 1:
        raise SettingsError(f"--size {size}: expected 1 row or more.")
    if not re.fullmatch(r"0*[1-9]\d* ?[KMGT]B", max_shard_size, re.IGNORECASE):
        raise SettingsError(f"--max-shard-size {max_shard_size}: expected a size such as 5GB or 500MB.")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SettingsError(f"{out} is not empty; nothing in it was touched.", "Choose a folder that does not exist.")
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SettingsError(f"{out} cannot be made: {above} is not a folder that can be written to.")
    _reported(folder / "report.json")  # the card quotes it: one that is broken is told before the work
    return run


def _exact(run: FinishedRun, tokenizer: Any, probe: list[int]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The adapter added to its own base, and proof on the general text that this changed nothing."""
    model = load_adapted(run.config.model, run.folder)
    expected = probe_logits(model, probe)
    rows = choose_positions(general_rows(tokenizer), expected.shape[-1])
    trained, moved = _trained(model, rows)
    merged = merged_in_place(model)
    difference = float((probe_logits(merged, probe) - expected).abs().max())
    # rounding grows with the logits; weights of 16 bits are rounded once more, which the KL shows
    if str(merged.dtype) == "torch.float32" and not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise NumericsError(
            f"The merged model's logits differ by {difference:.3g} from those of {run.folder}.",
            "Its adapter cannot be merged by PEFT (an adapter on tied embeddings cannot); use it as an adapter.",
        )
    results = {
        **_head(run, "base", rows, "general text"),
        "trained": {},
        "finetune_kl_per_token": moved,
        "candidates": {"base": divergence(merged, rows, trained)},
        "max_logit_difference": difference,
    }
    return merged, {**results, "notes": notes_of(results)}


def _best(run: FinishedRun, tokenizer: Any, candidate: str, size: int | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The candidate that is nearest to the adapter on its 4-bit base, with the measurements of all."""
    check_own_tools(run.config)
    data = load_data(run.config.data, run.config.kind, tokenizer, seed=run.config.train.seed)
    evaluate = held_out_only(run.config.evaluate)
    if size is not None:
        data = replace(data, held_out=data.held_out.select(range(min(size, len(data.held_out)))))
        evaluate.size = min(size, evaluate.size)
    rows, source, trained, results = _reference(run, tokenizer, data, evaluate)
    found: dict[str, dict[str, float]] = {}
    model = None
    for name in CANDIDATES if candidate == AUTO else (candidate,):
        model = None  # one candidate at a time
        release()
        model = candidate_of(run, name)
        with doing(f"comparing {name} with what was trained"):
            apart = divergence(model, rows, trained)
        found[name] = {**apart, **_scores(model, tokenizer, data, evaluate, name)}
    best = min(found, key=lambda name: found[name]["kl_per_token"])
    if model is None or name != best:
        model = None
        release()
        model = candidate_of(run, best)
    results = {**_head(run, best, rows, source), **results, "candidates": found}
    return model, {**results, "notes": notes_of(results)}


def _reference(
    run: FinishedRun, tokenizer: Any, data: Data, evaluate: EvaluateConfig
) -> tuple[Positions, str, torch.Tensor, dict[str, Any]]:
    """Positions to compare at and what they are of, the trained model's log-probabilities there, and its scores; the
    model is let go."""
    model = load_adapted(run.config.model, run.folder)
    measured = measure(model, tokenizer, data, evaluate, progress_bar("trained"), distributions=False)
    supervised, source = _supervised(data, measured, tokenizer)
    rows = choose_positions(supervised, model.config.get_text_config().vocab_size)
    if not rows:
        raise DataError("No held-out row has a supervised token, so there is nothing to measure the candidates on.")
    with doing("measuring distributions of the next token"):
        trained, moved = _trained(model, rows)
    return rows, source, trained, {"trained": _means(measured), "finetune_kl_per_token": moved}


def _supervised(data: Data, trained: Measurement, tokenizer: Any) -> tuple[list[Row], str]:
    """Rows to measure candidates on, and their name: held-out ones, of pairs the chosen and of labelled answers the
    liked ones; of prompts the trained model's own answers, or, where it was not asked for any, the general text."""
    rows: list[Row]
    if data.kind != "prompt":
        name = {"preference": "chosen held-out answers", "labelled_completion": "liked held-out answers"}
        rows = [row for row, _ in sides(data)[0]]
        return rows, name.get(data.kind, "held-out rows")
    prompts = {row["row"]: list(row["prompt_ids"]) for row in data.held_out}
    answered = [(prompts[at], answer) for at, answer in enumerate(trained.completions) if at in prompts]
    rows = [([*prompt, *answer.ids], [IGNORED] * len(prompt) + answer.ids) for prompt, answer in answered if answer.ids]
    return (rows or general_rows(tokenizer)), "its answers to held-out prompts" if rows else "general text"


def _trained(model: Any, rows: Positions) -> tuple[torch.Tensor, float]:
    """The trained model's log-probabilities, and KL(trained || base without adapter) a token: what the run changed."""
    import torch

    trained = torch.cat(list(log_probs(model, rows)))
    with model.disable_adapter():
        return trained, divergence(model, rows, trained)["kl_per_token"]


def candidate_of(run: FinishedRun, name: str) -> PreTrainedModel:
    """One of CANDIDATES, as a plain model."""
    model = run.config.model
    with doing(f"merging into {INTO[name]}"):
        if name == "base":
            return merged_in_place(load_adapted(replace(model, load_in_4bit=False), run.folder))
        return merged_in_place(load_adapted(model, run.folder, load_dequantised(model)))


def merged_in_place(adapted: Any) -> PreTrainedModel:
    """The adapter added to the weights it lies beside, in their type; embeddings that it unties are marked so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        model: PreTrainedModel = adapted.merge_and_unload()
    return model.eval()


def _scores(model: Any, tokenizer: Any, data: Data, evaluate: EvaluateConfig, name: str) -> dict[str, float]:
    """Held-out loss (nats a token) and the mean of each score that the data have, as `evaluate` measures them."""
    return _means(measure(model, tokenizer, data, evaluate, progress_bar(name), distributions=False))


def _means(measured: Measurement) -> dict[str, float]:
    loss = {"held_out_loss": measured.loss} if measured.tokens else {}  # prompts alone have none
    return {**loss, **{metric: sum(scores) / len(scores) for metric, scores in measured.metrics.items()}}


def _head(run: FinishedRun, candidate: str, rows: Positions, source: str) -> dict[str, Any]:
    """What was merged into what, and where it was measured."""
    base = base_record(run.config.model)
    return {
        "run": run.folder.resolve().name,
        "base": {"name": base["name"], "revision": base["revision"], "load_in_4bit": run.config.model.load_in_4bit},
        "candidate": candidate,
        "rule": RULE,
        "kl_measured_on": {"source": source, "rows": len(rows), "positions": sum(len(places) for _, places in rows)},
    }


def notes_of(results: dict[str, Any]) -> list[str]:
    """Where the numbers do not all speak for the candidate that was taken."""
    best, found = results["candidate"], results["candidates"]
    notes = []
    for measured in next(iter(results["candidates"].values())):
        sign = -1 if measured == "held_out_loss" else 1
        if measured in results["trained"]:
            rival = max(found, key=lambda name: sign * found[name][measured])
            if found[rival][measured] != found[best][measured]:
                values = f"{found[rival][measured]:.4f} against {found[best][measured]:.4f}"
                notes.append(f"{measured} speaks for {rival}: {values}.")
    kl, moved = found[best]["kl_per_token"], results["finetune_kl_per_token"]
    if kl > moved:
        notes.append(f"Merging moved the model further ({kl:.4f} nats a token) than the fine-tune had ({moved:.4f}).")
    return notes


def _save(model: Any, tokenizer: Any, run: FinishedRun, folder: Path, max_shard_size: str) -> None:
    """Weights, config, tokenizer with its template, and the run's generation config, which knows where to stop."""
    from transformers import GenerationConfig

    needed, free = model.get_memory_footprint(), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ResourceError(
            f"The merged model takes {needed / 2**30:.1f} GiB; {folder.parent.parent} has {free / 2**30:.1f} GiB left.",
            "Make room, or merge to another disk.",
        )
    if not run.is_reward_model:
        model.generation_config = GenerationConfig.from_pretrained(run.folder)
    model.save_pretrained(folder, max_shard_size=max_shard_size.replace(" ", "").upper())
    tokenizer.save_pretrained(folder)
    copy_processor(run.config.model, folder)
    if (run.folder / ANCESTRY).is_file():
        shutil.copy(run.folder / ANCESTRY, folder)
    for path in folder.glob("*.safetensors"):  # written for their owner alone; what serves them may be another user
        path.chmod((folder / "config.json").stat().st_mode)


def table_of(results: dict[str, Any]) -> list[list[str]]:
    """The measurements for people, the heads first: a line for the trained model and one for each candidate."""
    if "scores_measured_on" in results:
        return merge_rewards.table_of(results)
    trained = results["trained"]
    scores = [name.replace("held_out", "held-out").replace("_", " ") for name in trained]
    lines = [["merged into", "KL nats/token", "largest", "same top", *scores]]
    lines.append(["(as trained)", "0", "0", "100.0%", *(f"{score:.4f}" for score in trained.values())])
    for name, found in results["candidates"].items():
        kl = [f"{found['kl_per_token']:.2e}", f"{found['kl_largest']:.2e}", f"{found['same_top_token']:.1%}"]
        lines.append([INTO[name], *kl, *(f"{found[score]:.4f}" for score in trained)])
    return lines


def verdict_of(results: dict[str, Any]) -> str:
    """In a sentence: what was merged into what, and how far that moved the model."""
    if "scores_measured_on" in results:
        return merge_rewards.verdict_of(results)
    found, place = results["candidates"][results["candidate"]], results["kl_measured_on"]
    return (
        f"Merged into the {INTO[results['candidate']]}: KL(trained || merged) is {found['kl_per_token']:.2e} nats "
        f"a token over {place['positions']} positions of {place['rows']} rows ({place['source']}); "
        f"the fine-tune itself had moved the model by {results['finetune_kl_per_token']:.2e}."
    )


def _card(run: FinishedRun, results: dict[str, Any]) -> str:
    """The model card: what was merged, how far that moved it, and what the run had reported."""
    recipe, shown = run.config.recipe, without_paths(run.config)
    shown.origins = {}
    task, use = "text-generation", []
    if run.is_reward_model:
        task, use = "text-classification", how_to_use(run.config, rewards=True, merged=True)
    heads, *lines = (f"| {' | '.join(line)} |" for line in table_of(results))
    parts = [
        card_metadata(run.config, "transformers", [recipe, "merged"], task),
        f"# {recipe} of {shown.model.name_or_path}, merged",
        "",
        *_reported(run.folder / "report.json"),
        "## Merging",
        "",
        f"{verdict_of(results)} {sentence(results)} Weights: {results['dtype']}.",
        "",
        heads,
        "| --- " * len(table_of(results)[0]) + "|",
        *lines,
        "",
        *(f"Note: {note}\n" for note in results["notes"]),
        *use,
        "## Settings of the run",
        "",
        "```yaml",
        to_yaml(shown, results["versions"]).strip(),
        "```",
        "",
    ]
    return "\n".join(parts)


def _reported(path: Path) -> list[str]:
    if not path.is_file():
        return []
    verdict = read_object(path).get("verdict", "none was kept")
    return [f"The run's own report, of the adapter against its base: {verdict}", ""]
