"""What a GPU makes of this project, in at most 8 minutes: does it run, is `check` right about memory, how fast is it.

    python benchmarks/gpu.py [--only WORDS …] [--limit 480] [--data FOLDER] [--out FOLDER]
    python benchmarks/gpu.py --toy      # on a CPU, at a toy shape: that the program runs; its figures say nothing

Stages have limits of their own, and so has each job, a process; what it found is written when it ends, to results.jsonl
and results.md in --out, $OUT or runs/gpu-check:

    card      versions, driver, the card's best torch.mm in bfloat16
    kernels   the tests that need a GPU (where pytest is installed)
    recipes   every recipe, in full, with an adapter and in 4 bits, 6 steps each, to exit code 0; FSDP2 with one
              process; merge, generate and evaluate of what came out
    memory    what `check` predicts beside torch.cuda.max_memory_allocated
    speed     ours beside TRL with its best documented settings, 8B, 1.7B and 0.6B shapes: real tokens a second, share
              of the best torch.mm, peak memory, losses
    sampling  64 prompts of 128 tokens, 128 new ones, beside transformers' generate; an update of PPO

No network is needed, no weights and no data: weights are random, of the real shapes; the tokenizer is the embedded
model's, or one of a token a byte where its package is not installed; rows are made of words, or gsm8k_train.jsonl and
hh_harmless_train.jsonl of --data. The package may be installed or not: this checkout comes first on PYTHONPATH.
Ends with 0 where all passed, with 1 where one failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"card": 40, "kernels": 40, "recipes": 120, "memory": 50, "speed": 170, "sampling": 60}  # seconds, of 480
HERE = str(Path(__file__).resolve())
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", "gpu"]
VARIANTS = (
    *(("pretrain",), ("full_sft",), ("lora_sft",), ("qlora_sft",), ("lora_sft", "train.extra.torch_compile=true")),
    *(("reward_model",), ("reward_model", "model.load_in_4bit=true")),
    *((name, *own) for name in ("dpo", "kto", "orpo") for own in ((), ("lora.r=0",), ("model.load_in_4bit=true",))),
    *((name, *own) for name in ("ppo", "grpo", "rloo") for own in ((), ("lora.r=0",), ("model.load_in_4bit=true",))),
)
MEASURED = (("full_sft",), ("lora_sft",), ("lora_sft", "gradient_checkpointing=true"), ("qlora_sft",), ("dpo",))
# shape; job; rows or pairs a step; file of rows; sides
SPEEDS = (
    ("8B", "sft_lora", 8, "long", ("ours", "trl", "trl_packed")),
    ("8B", "sft_lora", 8, "short", ("ours", "trl", "trl_packed")),
    ("8B", "dpo", 4, "pairs", ("ours", "trl")),
    ("8B", "sft_qlora", 8, "long", ("ours", "trl")),
    ("0.6B", "sft_full", 8, "long", ("ours", "trl", "trl_packed")),
    ("1.7B", "sft_full", 8, "long", ("ours", "trl", "trl_packed")),
    ("0.6B", "reward", 8, "pairs", ("ours", "trl")),
)
PREPARED = "models and rows"
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
]
ONLINE = {"ppo": ("batch_size=8", "num_mini_batches=1", "num_ppo_epochs=1"), "grpo": (), "rloo": ()}


@dataclass(frozen=True)
class Job:
    """A process: its stage and name, its command, the seconds it may take, and what is read from what it said."""

    stage: str
    name: str
    command: Sequence[str]
    limit: float
    figures: Callable[[str], dict[str, Any]] = lambda said: {}
    after: str = ""  # the job that has to pass before


class Results:
    """What jobs found: a line each in results.jsonl as it ends, and all of it for people in results.md."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.lines = folder, list[dict[str, Any]]()
        (folder / "results.jsonl").write_text("")

    def add(self, job: Job, status: str, seconds: float, **more: Any) -> None:
        line = {"stage": job.stage, "name": job.name, "status": status, "seconds": round(seconds, 1), **more}
        self.lines.append(line)
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        (self.folder / "results.md").write_text(table(self.lines))
        why = f": {reason(more['said'])[:200]}" if more.get("said", "").strip() else ""
        print(f"{job.stage:9} {job.name:44} {status}, {seconds:.0f} s  {shown(line)}{why}", flush=True)

    def passed(self, name: str) -> bool:
        return any(line["name"] == name and line["status"] == "passed" for line in self.lines)


def shown(line: dict[str, Any]) -> str:
    """The figures of a line, in words."""
    known = ("stage", "name", "status", "seconds", "said")
    return ", ".join(f"{key.replace('_', ' ')} {said(value)}" for key, value in line.items() if key not in known)


def said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(said, value))
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def reason(output: str) -> str:
    """The line of a failed job's output that says most: its error, else the last one."""
    lines = [line for line in output.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if re.match(r"(error:|\w*Error\b|[\w.]+Error:)", line)), lines[-1])


def table(lines: Sequence[dict[str, Any]]) -> str:
    rows = [f"| {x['stage']} | {x['name']} | {x['status']} | {x['seconds']} | {shown(x)} |" for x in lines]
    return "\n".join(["| stage | what | | seconds | found |", "| --- | --- | --- | --- | --- |", *rows]) + "\n"


def run_jobs(
    jobs: Iterable[Job], results: Results, ends: float, environment: dict[str, str], together: int = 1
) -> None:
    """Run jobs until `ends` (time.monotonic), `together` at a time; none that fails or takes too long ends the others.

    A job that comes after another one of them waits until all others are done.
    """
    jobs = list(jobs)
    names = {job.name for job in jobs}
    for batch in ([job for job in jobs if job.after not in names], [job for job in jobs if job.after in names]):
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(partial(run_job, results=results, ends=ends, environment=environment), batch))


def run_job(job: Job, results: Results, ends: float, environment: dict[str, str]) -> None:
    if job.after and not results.passed(job.after):
        results.add(job, "not run", 0.0, said=f"{job.after} did not pass")
        return
    left = min(job.limit, ends - time.monotonic())
    if left < 1:
        results.add(job, "not run", 0.0, said="the time of its stage was up")
        return
    started = time.monotonic()
    process = subprocess.Popen(
        list(job.command),
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes end with it
    )
    try:
        output, _ = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        found = figures_of(job, output)
        results.add(job, "too long", time.monotonic() - started, **found, said=output[-2000:] or "it said nothing")
        return
    seconds = time.monotonic() - started
    found = figures_of(job, output)
    if process.returncode:
        results.add(job, f"failed with {process.returncode}", seconds, **found, said=output[-4000:])
    else:
        results.add(job, "passed", seconds, **found)


def figures_of(job: Job, output: str) -> dict[str, Any]:
    """What a job's output says, as far as it got."""
    try:
        return job.figures(output)
    except (OSError, ValueError, KeyError, IndexError) as error:
        return {"unread": f"{type(error).__name__}: {error}"}


def last_json(output: str) -> dict[str, Any]:
    """The last line that is a JSON object."""
    found: dict[str, Any] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    return found


def pytest_counts(output: str) -> dict[str, Any]:
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}


def speeds(output: str, best: float) -> dict[str, Any]:
    """Each side of a comparison that ended: real tokens a second, share of the best torch.mm, peak, losses."""
    found: dict[str, Any] = {}
    sides = [json.loads(line) for line in output.splitlines() if line.startswith('{"job"')]
    for side in sides:
        rate = side["real"] / side["seconds"]
        found[f"{side['who']}_tokens_s"] = round(rate, 1)
        if best:
            found[f"{side['who']}_of_mm"] = round(side["flop"] / side["first_real"] * rate / best, 3)
        found[f"{side['who']}_peak_mib"] = side["peak"]
        found[f"{side['who']}_losses"] = [round(loss, 4) for loss in side["losses"][:3]]
    rates = {side["who"]: found[f"{side['who']}_tokens_s"] for side in sides}
    if "ours" in rates and len(rates) > 1:
        found["ours_by_best_trl"] = round(rates["ours"] / max(rate for who, rate in rates.items() if who != "ours"), 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a CPU and a toy shape; so it is where there is no GPU")
    parser.add_argument("--only", nargs="+", default=[], help="jobs whose stage and name hold one of these words")
    parser.add_argument("--limit", type=float, help="seconds, of all of it; unset: 480, and 3600 of a toy")
    parser.add_argument("--data", type=Path, help="a folder with gsm8k_train.jsonl and hh_harmless_train.jsonl")
    parser.add_argument("--out", type=Path, help="unset: $OUT, else runs/gpu-check")
    parser.add_argument("--keep", type=Path, help="where models and runs are kept; unset: a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *words = arguments.child
        print(json.dumps(CHILDREN[what](*words)), flush=True)
        return 0
    started = time.monotonic()
    toy = arguments.toy or not has_gpu()
    whole = arguments.limit or (3600.0 if toy else 480.0)
    out = arguments.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "runs" / "gpu-check")
    results = Results(out.resolve())
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
        **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if toy else {}),
    }
    if toy:
        print("a toy shape on a CPU: that the program runs; its figures say nothing", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        home = (arguments.keep or Path(scratch)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        share = 0.0
        for stage, limit in LIMITS.items():
            jobs = STAGES[stage](home, toy, results, arguments.data)
            asked = [job for job in jobs if wanted(job, arguments.only)]
            before = {job.after for job in asked}  # what those cannot do without
            jobs = [job for job in jobs if job in asked or job.name in before]
            if stage not in ("card", "kernels"):  # which need nothing that is made
                jobs = [replace(job, after=job.after or PREPARED) for job in jobs]
            share += limit / sum(LIMITS.values())  # what an earlier stage left is there, too
            ends = started + whole * share
            if toy:  # a CPU may be slow, and is not what is measured
                jobs = [replace(job, limit=600) for job in jobs]
            together = 1 if toy or stage not in ("recipes",) else max(1, min(4, (os.cpu_count() or 1) // 3))
            run_jobs(jobs, results, ends, environment, together)
    bad = [line for line in results.lines if line["status"] != "passed"]
    print(f"{len(results.lines) - len(bad)} of {len(results.lines)} passed; {out / 'results.md'} has all of it")
    return 1 if bad or not results.lines else 0


def room_for(folder: Path, shape: str) -> bool:
    """Whether the weights of a shape fit on the disk."""
    return shape != "8B" or (folder / "model-8B").is_dir() or shutil.disk_usage(folder).free > 20 * 10**9


def wanted(job: Job, only: Sequence[str]) -> bool:
    return not only or job.name == PREPARED or any(word in f"{job.stage} {job.name}" for word in only)


def has_gpu() -> bool:
    """Asked in a process of its own: one that has opened the GPU holds half a GiB of it."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def child(*words: str) -> list[str]:
    return [sys.executable, HERE, "--child", *words]


def card_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    kind = "cpu" if toy else "cuda"
    return [
        Job("card", "versions and the best torch.mm", child("card", kind), 60, last_json),
        Job(
            "card",
            "models and rows",
            child("prepare", str(home), "tiny" if toy else "135M", kind, str(data or "")),
            90,
            last_json,
        ),
    ]


def kernel_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    return [
        Job(
            "kernels",
            "tests that need a GPU",
            [*PYTEST, "tests/packing/test_forward.py", "tests/training/test_collate.py"],
            120,
            pytest_counts,
        )
    ]


def recipe_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    kit = [sys.executable, "-m", "finetune_kit"]
    limit = 150.0 if toy else 75.0
    jobs = [
        Job("recipes", " ".join(variant), [*kit, "run", *variant, *settings(home, variant)], limit)
        for variant in VARIANTS
    ]
    if not toy:  # accelerate shards on GPUs alone
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
        launch += ["--config_file", str(ROOT / "docs" / "accelerate" / "fsdp2.yaml"), "-m", "finetune_kit", "run"]
        for name in ("full_sft", "lora_sft"):
            own = settings(home, (name, "fsdp2"))
            jobs.append(Job("recipes", f"{name} by FSDP2, one process", [*launch, name, *own], limit))
    for name in ("lora_sft", "qlora_sft"):
        run = str(home / "runs" / name)
        jobs.append(Job("recipes", f"merge {name}", [*kit, "merge", run, f"{run}-merged"], limit, after=name))
    run = str(home / "runs" / "lora_sft")
    ask = [*kit, "generate", run, "time year people", "--max-new-tokens", "8"]
    jobs.append(Job("recipes", "generate", ask, limit, after="lora_sft"))
    jobs.append(Job("recipes", "evaluate", [*kit, "evaluate", run], limit, after="lora_sft"))
    return jobs


def settings(home: Path, variant: Sequence[str]) -> list[str]:
    """Six steps of a recipe on the small model and rows, in a folder of its own."""
    name = variant[0]
    kind = "pairs" if name in ("reward_model", "dpo", "orpo") else "labelled" if name == "kto" else "short"
    folder = "-".join(re.sub(r"[^a-z0-9]+", "-", word.lower()) for word in variant)
    words = [
        f"model.name_or_path={home / 'small'}",
        f"data.path={home / kind}.jsonl",
        "held_out_size=4",
        "data.size=64",
    ]
    words += [f"output_dir={home / 'runs' / folder}", "max_steps=6", "logging_steps=1", "evaluate.general_text=false"]
    words += ["evaluate.bootstrap_samples=50", "data.max_length=1024", "data.max_lost=1"]
    if name == "pretrain":  # it makes its own model, and has texts of its own
        return ["depth=2", *words[4:], "per_device_train_batch_size=4"]
    if name in ONLINE:
        words[1] = f"data.path={home / 'prompts.jsonl'}"
        own = [f"reward.sources=[{home / 'reward.py'}:score]", "max_new_tokens=16", "evaluate.max_new_tokens=16"]
        return [*words, *own, "evaluate.size=2", *ONLINE[name]]
    return [*words, "per_device_train_batch_size=4", "evaluate.size=0"]


def memory_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    shape = "tiny" if toy else "0.6B"
    return [
        Job("memory", f"of {' '.join(variant)}", child("memory", str(home), shape, *variant), 75, last_json)
        for variant in MEASURED
    ]


def speed_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    best = next((line["best_mm_tflops"] * 1e12 for line in results.lines if "best_mm_tflops" in line), 0.0)
    jobs = []
    for shape, job, rows, file, sides in SPEEDS:
        if not toy and not room_for(home, shape):
            results.add(
                Job("speed", f"{shape} {job}", [], 0), "not run", 0.0, said="its weights need 20 GB of disk: --keep"
            )
            continue
        words = ["--shape", "tiny" if toy else shape, "--device", "cpu" if toy else "cuda", "--json", "--jobs", job]
        words += ["--who", *sides, "--rounds", "1", "--steps", "1" if toy else "5", "--rows", "2" if toy else str(rows)]
        words += ["--answers", f"{home / file}.jsonl", "--pairs", f"{home / 'pairs'}.jsonl", "--max-length", "2048"]
        words += ["--folder", str(home / f"model-{'tiny' if toy else shape}")]
        command = [sys.executable, str(ROOT / "benchmarks" / "gpu_trl.py"), *words]
        name = f"{shape} {job}, {rows} {file}"
        jobs.append(Job("speed", name, command, 150, partial(speeds, best=best)))
    return jobs


def sampling_jobs(home: Path, toy: bool, results: Results, data: Path | None) -> list[Job]:
    shape = "tiny" if toy else "0.6B"
    kit = [sys.executable, "-m", "finetune_kit", "run", "ppo"]
    sizes = ("8", "8") if toy else ("64", "64")
    words = [f"model.name_or_path={home / f'model-{shape}'}", f"data.path={home / 'prompts.jsonl'}", "held_out_size=4"]
    words += [
        f"output_dir={home / 'runs' / 'ppo-update'}",
        "max_steps=3",
        f"reward.sources=[{home / 'reward.py'}:score]",
    ]
    words += [f"batch_size={sizes[0]}", f"max_new_tokens={sizes[1]}", "num_ppo_epochs=1", "num_mini_batches=2"]
    words += ["evaluate.size=0", "evaluate.general_text=false"]
    counts = ("4", "16", "8") if toy else ("64", "128", "128")
    return [
        Job("sampling", "tokens a second", child("sampling", str(home), shape, *counts), 120, last_json),
        Job(
            "sampling",
            "an update of PPO",
            [*kit, *words],
            120,
            partial(update, folder=home / "runs" / "ppo-update"),
            "tokens a second",
        ),
    ]


def update(output: str, folder: Path) -> dict[str, Any]:
    """Seconds of PPO's last update and the shares of its parts."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "time/update" in line][-1]
    return {key.removeprefix("time/"): round(value, 3) for key, value in last.items() if key.startswith("time/")}


# what runs in processes of their own


def show_card(kind: str) -> dict[str, Any]:
    """Versions, the card, its driver and best torch.mm (TFLOP/s)."""
    import importlib.metadata
    import importlib.util

    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_trl import card, matrix_peak

    names = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "bitsandbytes",
        "flash_attn",
        "liger_kernel",
        "kernels",
    )
    found: dict[str, Any] = {"card": card(kind), "python": sys.version.split()[0]}
    for name in names:
        if importlib.util.find_spec(name) is not None:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name.replace("_", "-"))
    if kind == "cuda":
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
            found["driver"] = said[0] if said else "not known"
        found["cuda"] = torch.version.cuda
        found["gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return {**found, "best_mm_tflops": round(matrix_peak(kind) / 1e12, 3)}


def prepare(home: str, shape: str, kind: str, data: str) -> dict[str, Any]:
    """The small model, rows of several lengths and a reward, in a folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_trl import write_model
    from transformers import AutoTokenizer

    folder = Path(home)
    if not (folder / "small" / "config.json").is_file():
        write_model(folder / "small", shape, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder / "small")
    if getattr(tokenizer, "chat_template", None) is None:
        raise SystemExit("the tokenizer has no chat template")
    each = len(tokenizer(" ".join(WORDS))["input_ids"]) / len(WORDS)  # tokens a word
    draw = random.Random(0)

    def text(tokens: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(2, int(tokens / each))))

    def rows(count: int, prompt: int, answer: int) -> list[dict[str, Any]]:
        """Of about that many tokens; answers between half and one and a half of it."""
        return [
            {"prompt": f"{n} {text(prompt)}", "completion": text(answer * draw.uniform(0.5, 1.5))} for n in range(count)
        ]

    long, short = rows(256, 128, 64 if shape == "tiny" else 850), rows(512, 60, 90)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text(90)}
        for row in rows(256, 64 if shape == "tiny" else 450, 100)
    ]
    labelled = [{**row, "label": n % 2 == 0} for n, row in enumerate(short)]
    prompts = [{"prompt": row["prompt"]} for row in short]
    every = {"long": long, "short": short, "pairs": pairs, "labelled": labelled, "prompts": prompts}
    for name, made in every.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    for name, file in (("short", "gsm8k_train"), ("pairs", "hh_harmless_train")) if data else ():
        if (Path(data) / f"{file}.jsonl").is_file():
            shutil.copy(Path(data) / f"{file}.jsonl", folder / f"{name}.jsonl")
    (folder / "reward.py").write_text(
        "def score(prompts, completions, records):\n    return [len(set(text)) / 10 for text in completions]\n"
    )
    return {"tokens_a_word": round(each, 2)}


def compare_memory(home: str, shape: str, recipe: str, *words: str) -> dict[str, Any]:
    """MiB that `check` predicts of the GPU's tensors, and the most that two steps had, without CUDA's context."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_trl import write_model

    from finetune_kit.models.device import device

    folder, kind = Path(home) / f"model-{shape}", device().type
    if not (folder / "config.json").is_file():
        write_model(folder, shape, kind)
    name = "-".join(["memory", recipe, *(re.sub(r"\W+", "-", word) for word in words)])
    run = [f"model.name_or_path={folder}", f"data.path={Path(home) / ('pairs' if recipe == 'dpo' else 'long')}.jsonl"]
    run += [f"output_dir={Path(home) / 'runs' / name}", "max_steps=2", "held_out_size=2", "evaluate.size=0", *words]
    run += ["data.max_length=2048", "evaluate.general_text=false", "per_device_train_batch_size=4", "data.size=64"]
    run += ["data.max_lost=1"]
    from finetune_kit import recipe as recipes
    from finetune_kit.data.load import load_data
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.planning.plan import plan
    from finetune_kit.settings.load import resolve

    found = recipes.load(recipe)
    config = resolve(found.config_class, found.name, None, run)
    data = load_data(config.data, config.kind, load_tokenizer(config.model), seed=config.train.seed)
    parts = plan(config, data)["memory_bytes"]
    predicted = sum(size for part, size in parts.items() if part != "cuda_context")
    measured = most_of_training(found, config)
    return {
        "predicted_mib": predicted // 2**20,
        "measured_mib": int(measured // 2**20),
        "predicted_by_measured": round(predicted / measured, 3),
        **{f"{part}_mib": size // 2**20 for part, size in parts.items() if size},
    }


def most_of_training(recipe: Any, config: Any) -> float:
    """Most bytes of the GPU's tensors from the start of a run to the end of its steps; on a CPU, of the process."""
    from finetune_kit.run_folder.claim import claim
    from finetune_kit.training.progress import peak_memory_gib

    class Enough(Exception):
        """The steps are done: what follows, saving and the proof, is not part of the prediction."""

    module, seen = recipe.module, dict[str, float]()
    real = module.fit

    def fit(*given: Any, **named: Any) -> Any:
        real(*given, **named)
        seen["peak"] = peak_memory_gib() * 2**30
        raise Enough

    module.fit = fit
    claim(config)
    with contextlib.suppress(Enough):
        recipe.run(config)
    return seen["peak"]


def compare_sampling(home: str, shape: str, count: str, length: str, new: str) -> dict[str, Any]:
    """New tokens a second: PPO's sampling, our greedy answers, transformers' own generate."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu_trl import write_model

    from finetune_kit.generation.generate import generate
    from finetune_kit.models.device import device
    from finetune_kit.models.load import load_base
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.rl.rollout import sample
    from finetune_kit.settings.schema import ModelConfig

    folder, at = Path(home) / f"model-{shape}", device()
    if not (folder / "config.json").is_file():
        write_model(folder, shape, at.type)
    config = ModelConfig(name_or_path=str(folder))
    tokenizer, model = load_tokenizer(config), load_base(config)
    size, most, together = int(length), int(new), int(count)
    draw = random.Random(0)
    prompts = [[draw.randrange(10, 200) for _ in range(size)] for _ in range(together)]
    ids = torch.tensor(prompts, device=at)
    never = [model.config.vocab_size + 1]  # an end token that no model draws: all rows are as long

    def plain() -> Any:
        own = {"do_sample": True, "top_k": 0, "max_new_tokens": most, "min_new_tokens": most, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **own)

    ways: dict[str, Callable[[], Any]] = {
        "transformers": plain,
        "ppo_sample": lambda: sample(
            model, prompts, max_new_tokens=most, end_token_ids=never, temperature=1.0, seed=0, batch_size=together
        ),
        "greedy": lambda: generate(
            model, tokenizer, prompts, max_new_tokens=most, end_token_ids=never, batch_size=together
        ),
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            with torch.no_grad():
                way()
            if at.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        found[f"{name}_tokens_s"] = round(together * most / seconds, 1)
    found["ppo_sample_by_transformers"] = round(found["ppo_sample_tokens_s"] / found["transformers_tokens_s"], 2)
    return found


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "card": show_card,
    "prepare": prepare,
    "memory": compare_memory,
    "sampling": compare_sampling,
}
STAGES: dict[str, Callable[[Path, bool, Results, Path | None], list[Job]]] = {
    "card": card_jobs,
    "kernels": kernel_jobs,
    "recipes": recipe_jobs,
    "memory": memory_jobs,
    "speed": speed_jobs,
    "sampling": sampling_jobs,
}

if __name__ == "__main__":
    sys.exit(main())
