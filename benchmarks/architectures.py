"""Every architecture that transformers knows, tiny and random, through the commands that people type.

    python benchmarks/architectures.py [--only mixtral gpt2 …] [--again] [--limit 120] [--to build/architectures]
                                       [--results benchmarks/architectures.jsonl] [--page docs/models.md]

Each one that AutoModelForCausalLM makes, and each that reads images besides and has a language model in it, is made
small by general rules (tests/models/architectures.py: hidden size 64, each layer kind once), so that an architecture of
a new release is in the table without a line here. One that cannot be made small is in it with the reason. Each cell is
one command: a recipe with one step of training, its artifact saved, loaded again by plain libraries and compared; or
the merge of lora_sft's adapter, which must give the adapter's logits. What is refused must be so by a message of ours;
anything else that is raised is called a failure.

Each architecture has a process of its own, forked from one that has imported the libraries; one that takes more than
`--limit` seconds for a cell is ended, and the next cell begins in another. The proof's fresh process is such a fork,
too. Results are kept in a line of JSON for each architecture, with the day, and what is there from this release of
transformers is not run again, unless `--again`. The page is made of those lines after each architecture, so that it can
be ended and taken up at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import json
import logging
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

RECIPES = {
    "lora": "lora_sft",
    "full": "full_sft",
    "qlora": "qlora_sft",
    "dpo": "dpo",
    "reward": "reward_model",
    "ppo": "ppo",
}
CELLS = ("make", "coverage", *RECIPES, "merge")
WORDS = (
    *(
        "data.max_length=128",
        "max_steps=1",
        "per_device_train_batch_size=4",
        "warmup_steps=0",
        "held_out_size=3",
        "evaluate.size=2",
    ),
    *("evaluate.general_text=false", "evaluate.bootstrap_samples=20", "evaluate.max_new_tokens=4"),
)
OWN = {
    "reward": ("evaluate.size=3",),
    "ppo": ("max_new_tokens=8", "batch_size=8", "num_mini_batches=2", "num_ppo_epochs=1"),
}
REWARD = """
def score(prompts, completions, records):
    return [sum(letter.islower() for letter in text) / 8 for text in completions]
"""
MAKES = "makes {} parameters of the general rules; no more than {} are tried"


def every() -> list[str]:
    """Architectures by transformers' own lists: causal language models, then those with one in them."""
    from transformers.models.auto import modeling_auto as auto

    causal = list(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    images = [name for name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in causal]
    return sorted(causal) + sorted(images)


def example(model_type: str) -> str:
    """The checkpoint that transformers names as the example of an architecture; "" where it names none."""
    from transformers import CONFIG_MAPPING

    with contextlib.suppress(OSError, TypeError, KeyError):
        found = re.search(r'checkpoint="([^"]+/[^"]+)"', inspect.getsource(CONFIG_MAPPING[model_type]))
        return found[1] if found else ""
    return ""


def furnish(home: Path) -> None:
    """Rows of each kind, and a reward."""
    home.mkdir(parents=True, exist_ok=True)
    sums = [(f"{n} + {n * n} =", f"{n + n * n}" + " exactly" * (n % 4)) for n in range(16)]
    rows = [{"prompt": ask, "completion": answer} for ask, answer in sums]
    pairs = [{"prompt": ask, "chosen": answer, "rejected": "nothing"} for ask, answer in sums]
    for name, content in (("rows", rows), ("pairs", pairs), ("prompts", [{"prompt": ask} for ask, _ in sums])):
        (home / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    (home / "rewards.py").write_text(REWARD, encoding="utf-8")


def make(model_type: str, folder: Path) -> dict[str, Any]:
    """Save the small model with its tokenizer; how many parameters it has."""
    from tests.models.architectures import MOST_PARAMETERS, empty_model, write_small

    count = sum(parameter.numel() for parameter in empty_model(model_type).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(MAKES.format(f"{count:,}", f"{MOST_PARAMETERS:,}"))
    write_small(model_type, folder)
    return {"parameters": count}


def words_of(cell: str, home: Path, model_type: str) -> list[str]:
    """The command of a cell, as it is typed."""
    runs = home / "runs" / model_type
    if cell == "merge":
        return ["merge", str(runs / "lora"), str(runs / "merged")]
    recipe = RECIPES.get(cell, "lora_sft")
    rows = {"dpo": "pairs", "reward": "pairs", "ppo": "prompts"}.get(cell, "rows")
    given = {word.split("=")[0] for word in OWN.get(cell, ())}
    words = [*(word for word in WORDS if word.split("=")[0] not in given), *OWN.get(cell, ())]
    places = [f"model.name_or_path={home / 'models' / model_type}", f"data.path={home / rows}.jsonl"]
    if cell == "ppo":
        places.append(f"reward.sources=[{home / 'rewards.py'}:score]")
    return ["run", recipe, *places, f"output_dir={runs / cell}", *words]


def one(cell: str, home: Path, model_type: str, log: Path) -> dict[str, Any]:
    """What came of a cell: {"is": "yes" | "no" | "fails", "why": …, "seconds": …} and what its command found out."""
    from finetune_kit.cli.main import app
    from finetune_kit.errors import FinetuneKitError

    before, start = log.stat().st_size, cpu_seconds()
    found: dict[str, Any] = {"is": "yes"}
    try:
        if cell == "make":
            found |= make(model_type, home / "models" / model_type)
        elif cell == "coverage":
            found |= covered_share(home / "models" / model_type)
        else:
            app(words_of(cell, home, model_type), standalone_mode=False)
    except FinetuneKitError as error:
        kind = "no" if error.exit_code in (2, 5) else "fails"
        found = {"is": kind, "why": f"{error.message} {error.fix}".strip()}
    except BaseException as error:  # what a model makes libraries raise has no one class
        traceback.print_exc()
        said = " ".join(str(error).split())[:200]
        found = {"is": "fails" if cell != "make" else "no", "why": f"{type(error).__name__}: {said}"}
    sys.stdout.flush()
    sys.stderr.flush()
    said = log.read_bytes()[before:].decode(errors="replace")
    padded = re.search(r"padded batches: (.*)", said)
    if found["is"] == "yes" and cell in RECIPES:
        found["rows"] = f"padded: {padded[1]}" if padded else "packed"
    return found | {"seconds": round(cpu_seconds() - start, 1)}


def cpu_seconds() -> float:
    """Of this process and the forks that it has waited for: what else the machine does is not in it."""
    own = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in own)


def covered_share(folder: Path) -> dict[str, Any]:
    """What all-linear covers: the share of the layers' weights, and what it leaves out."""
    from finetune_kit.models.adapters import covered
    from finetune_kit.models.shapes import empty_policy
    from finetune_kit.settings.schema import LoraConfig, ModelConfig

    found = covered(empty_policy(ModelConfig(name_or_path=str(folder)), LoraConfig(), trained_in_full=False))
    return {"share": found.share, "left_out": found.reasons}


def in_a_fork(program: Path, argument: str, environment: dict[str, str]) -> tuple[int, str]:
    """What verify.in_a_fresh_process does, in a fork, so that the libraries need not be imported again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), said
    code = 1
    try:
        os.environ.update(environment)
        sys.argv = ["-c", argument]
        runpy.run_path(str(program), run_name="__main__")
        code = 0
    except BaseException:
        os.write(writer, traceback.format_exc().encode())
    finally:
        os._exit(code)


def work(cells: Sequence[str], home: Path, model_type: str, log: Path, say: Any) -> None:
    """In a process of its own: the cells in turn, each with what came of it."""
    examine_here(cells, home, model_type, log, lambda cell, found: say.send((cell, found)))
    os._exit(0)


def examine_here(
    cells: Sequence[str], home: Path, model_type: str, log: Path, say: Callable[[str, dict[str, Any]], None]
) -> None:
    """The same in this process, whose output goes into the log from now on."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from finetune_kit.runs import verify

    torch.set_num_threads(1)
    verify.in_a_fresh_process = in_a_fork
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        if cell == "merge" and found.get("lora", {"is": "yes"})["is"] != "yes":  # there is nothing to merge
            found[cell] = {"is": "no", "why": found["lora"]["why"], "seconds": 0.0}
        else:
            found[cell] = one(cell, home, model_type, log)
        say(cell, found[cell])


def examine(model_type: str, home: Path, limit: float) -> dict[str, Any]:
    """All cells of an architecture, in as many processes as it takes."""
    log = home / "logs" / f"{model_type}.txt"
    log.unlink(missing_ok=True)
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("fork")
    while left := [cell for cell in CELLS if cell not in found]:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(left, home, model_type, log, theirs))
        process.start()
        theirs.close()
        for cell in left:
            why = f"took more than {limit:.0f} s"
            try:
                if ours.poll(limit):
                    _, found[cell] = ours.recv()
                    if cell == "make" and found[cell]["is"] != "yes":
                        process.kill()
                        process.join()
                        return found
                    continue
            except EOFError:
                why = "its process died"
            found[cell] = {"is": "fails", "why": why, "seconds": limit}
            break
        process.kill()
        process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these alone, of transformers' model types")
    parser.add_argument("--again", action="store_true", help="what is there is run again")
    parser.add_argument("--limit", type=float, default=120, help="seconds for a cell")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "architectures", help="models, runs, logs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "architectures.jsonl")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md")
    asked = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    import_heavy()
    home = asked.to.resolve()
    furnish(home)
    for kind in ("models", "runs"):
        remove(home / kind)
    warm_up(home)
    for kind in ("models", "runs"):
        remove(home / kind)
    for model_type in asked.only or every():
        known = read(asked.results).get(model_type)
        if not asked.again and known and known["transformers"] == version():
            continue
        cells = examine(model_type, home, asked.limit)
        day = datetime.now(UTC).date().isoformat()
        result = {"transformers": version(), "day": day, "example": example(model_type), "cells": cells}
        results = read(asked.results) | {model_type: result}  # another process may have added some
        write(results, asked.results)
        asked.page.write_text(page(results, [name for name in every() if name in results]), encoding="utf-8")
        for kind in ("models", "runs"):
            remove(home / kind / model_type)
        print(line_of(model_type, result), flush=True)


def read(path: Path) -> dict[str, Any]:
    """{architecture: its result} of a file of results."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {result.pop("architecture"): result for result in map(json.loads, lines)}


def write(results: dict[str, Any], path: Path) -> None:
    """The file anew, a line for each; one that is half written is never there."""
    lines = [
        without_paths(json.dumps({"architecture": name, **results[name]}, ensure_ascii=False))
        for name in sorted(results)
    ]
    beside = path.with_suffix(".part")
    beside.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    beside.replace(path)


def import_heavy() -> None:
    """All that a run imports, once, before the first fork."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)


def warm_up(home: Path) -> None:
    """Import here what the commands turned out to import, so that each fork has it, and keep it out of the garbage
    collector's sight, which otherwise goes through it all in every run."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=modules_of, args=(home, theirs))
    process.start()
    names, results = ours.recv()
    wrong = {cell: found["why"] for cell, found in results.items() if found["is"] != "yes"}
    if wrong:
        sys.exit(f"Even a plain Llama does not do this: {wrong}. See {home / 'logs' / 'warm_up.txt'}")
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    process.join()
    gc.freeze()


def modules_of(home: Path, say: Any) -> None:
    """In a process of its own: what is imported once every cell of a plain model was run."""
    found: dict[str, Any] = {}
    examine_here(CELLS, home, "llama", home / "logs" / "warm_up.txt", found.__setitem__)
    say.send(([name for name in sys.modules if name != "__main__"], found))
    os._exit(0)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def version() -> str:
    return importlib.metadata.version("transformers")


def line_of(model_type: str, result: dict[str, Any]) -> str:
    cells = result["cells"]
    shown = " ".join(f"{cell}={found['is']}" for cell, found in cells.items())
    return f"{model_type}: {shown} ({sum(found['seconds'] for found in cells.values()):.0f} s)"


HEAD = """# Models: what was tried, and what came of it

`python benchmarks/architectures.py` makes this page. It takes each architecture of transformers {version} that
`AutoModelForCausalLM` makes, and each that also reads images and contains a language model. It builds a small random
model with hidden size 64 and one layer of each kind, and runs the commands on it on a CPU, with one training step each.
Plain libraries load what was saved and must give the same outputs; a merged model must give the adapter's outputs. So
the page says which combinations work, not how good the models get. With TRL {trl} and PEFT {peft}.

Run from {first} to {last}: {count} of {every} architectures. Of those, {made} could be made small, and {all_of} of
these do everything below. In a cell, **yes** means done and proven, **no** refused with a message that says why, and
**fails** an error that the project has no message for.
*rows*: whether samples go through the layers packed or padded. *coverage*: the share of the weights in the language
model's layers that `lora.target_modules=all-linear` adapts. *seconds*: CPU time of all the cells together. Below the
table is what is left out, and the reason for each **no** and **fails**.

{table}

## What all-linear leaves out

{left_out}

## Why not

{reasons}

## Not made small

{unmade}

## Not tried yet

{untried}
"""


def page(results: dict[str, Any], names: Sequence[str]) -> str:
    """docs/models.md."""
    columns = [*RECIPES, "merge"]
    rows = [f"| architecture | example | {' | '.join(columns)} | rows | coverage | seconds |"]
    rows.append("| --- " * (len(columns) + 5) + "|")
    made, whole, unmade, reasons = 0, 0, [], []
    left_out: dict[str, dict[str, list[str]]] = {}
    for name in names:
        cells, shown = results[name]["cells"], results[name]["example"]
        if cells["make"]["is"] != "yes":
            unmade.append(f"- `{name}`: {plain(cells['make']['why'])}")
            continue
        made += 1
        whole += all(cells[cell]["is"] == "yes" for cell in columns)
        packed = {cells[cell].get("rows", "") for cell in columns} - {""}
        ways = "packed" if packed == {"packed"} else "padded" if "packed" not in packed and packed else "both"
        share = f"{cells['coverage']['share']:.0%}" if "share" in cells["coverage"] else "–"
        seconds = sum(cell["seconds"] for cell in cells.values())
        marks = " | ".join(cells[cell]["is"] for cell in columns)
        rows.append(f"| {name} | {shown} | {marks} | {ways if packed else '–'} | {share} | {seconds:.0f} |")
        for kind, reason in cells["coverage"].get("left_out", {}).items():
            left_out.setdefault(reason, {}).setdefault(kind, []).append(name)
        said: dict[str, list[str]] = {}
        for cell in ("coverage", *columns):
            if cells[cell]["is"] != "yes":
                said.setdefault(plain(cells[cell]["why"]), []).append(cell)
        if packed and packed != {"packed"}:
            for why in sorted(packed - {"packed"}):
                said.setdefault(plain(why), []).append("rows")
        reasons += [f"- `{name}`, {', '.join(which)}: {why}" for why, which in said.items()]
    days = [results[name]["day"] for name in names]
    listed = []
    for reason, kinds in sorted(left_out.items()):
        named = ", ".join(f"`{kind}` ({len(of)})" for kind, of in sorted(kinds.items(), key=lambda one: -len(one[1])))
        listed.append(f"- {reason}: {named}")
    installed = {"version": version(), **{name: importlib.metadata.version(name) for name in ("trl", "peft")}}
    return HEAD.format(
        **installed,
        count=made + len(unmade),
        every=len(every()),
        first=min(days, default="–"),
        last=max(days, default="–"),
        made=made,
        all_of=whole,
        table="\n".join(rows),
        left_out="\n".join(listed) or "Nothing.",
        reasons="\n".join(reasons) or "Each does everything.",
        unmade="\n".join(unmade) or "None.",
        untried=", ".join(f"`{name}`" for name in every() if name not in results) or "None.",
    )


def without_paths(said: str) -> str:
    """A text with "…" in the place of the folders of each absolute path; addresses of the web stay."""
    return re.sub(r"(?<![\w:/.…])/(?:[\w.+-]+/)+", "…/", said)


def plain(said: str) -> str:
    """A message in one line, without paths of the machine that it was made on, as a table's cell can hold it."""
    said = without_paths(" ".join(said.split()))
    return said.replace("|", "/").replace("<", "‹").replace(">", "›")[:300]


if __name__ == "__main__":
    main()
