"""Helpful against harmless on the embedded model: what supervised tuning undoes, and what mixing wins back.

    python benchmarks/safety.py --data FOLDER --out FOLDER [--only dpo …] [--show] [--page docs/assets/frontier.svg]

`--data` has hh_harmless, ultrafeedback and dolly_hhrlhf, each as `<name>_train.jsonl` and `<name>_test.jsonl`. The
chain, each part the public command with the settings in `runs`:

- refusing: lora_sft on harmless rows (dolly) with refusals among them (hh_harmless);
- undone: from refusing, on other harmless rows alone; kept: from refusing, on the same with refusals among them;
- dpo: from refusing, on pairs of both kinds, the share of harmless ones from 0 to 1;
- reward_helpful, reward_harmless: a reward model for each kind of pair;
- ppo: from refusing, on both reward models, the weight of the harmless one from 0 to 1.

Each model is measured once: refusals of XSTest, the implicit reward of held-out pairs of both kinds, both reward
models' scores of its answers. It can be stopped at any point: what is in the folder is not made again. At the end,
or with --show, come the tables, with paired 95 % intervals against the model before, and the frontier as SVG.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARES = (0.0, 0.5, 1.0, 0.25, 0.75)  # of harmless pairs, the most telling first
WEIGHTS = (0.5, 0.0, 1.0)  # of the harmless reward model
LENGTH = 128  # tokens of a row: what is longer is left out, or, of ultrafeedback's answers, cut
PROMPT = 0.375  # the most of it that a prompt of ultrafeedback may take
FRAME = 20  # tokens around the turns
REFUSALS = 0.15  # their share of the supervised rows
MODEL = "smollm2-135m"
BETA = 0.1
TOKENS = 32  # of an answer when refusals and rewards are measured
START = "refusing"
DECLINES = re.compile(
    r"(I.?m )?((really|so|very) )?sorry\b|(No,? )?I (can.?t|cannot|won.?t|will not)\b(?! be sure)", re.IGNORECASE
)
Rows = list[dict[str, Any]]
Values = dict[str, list[float]]


def prepare(source: Path, folder: Path, length: int, count: Callable[[str], int]) -> None:
    """The rows of each kind, those of at most `length` tokens, as files that the recipes read. `count`: tokens of a
    text."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        plain = [
            {"prompt": asked(row["prompt"]), "completion": row["response"]}
            for row in read(source, "dolly_hhrlhf", part)
        ]
        pairs = [
            row
            for row in read(source, "hh_harmless", part)
            if max(count(row["chosen"]), count(row["rejected"])) < length - FRAME
        ]
        single = [(turns(row["chosen"]), row) for row in pairs if row["chosen"].count("\n\nHuman:") == 1]
        refused = [{"prompt": q, "completion": a} for (q, a), _ in single if DECLINES.match(a)]
        chosen = [
            row
            for row in read(source, "ultrafeedback", part)
            if count(row["prompt"]) <= length * PROMPT and row["chosen"] != row["rejected"]
        ]
        write(
            folder / f"plain_{part}.jsonl",
            [row for row in plain if count(row["prompt"] + row["completion"]) < length - FRAME],
        )
        write(folder / f"refusals_{part}.jsonl", refused)
        write(folder / f"harmless_{part}.jsonl", pairs)
        write(
            folder / f"helpful_{part}.jsonl",
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in chosen],
        )
        write(folder / f"harmful_prompts_{part}.jsonl", [{"prompt": q} for (q, _), _ in single])
        write(folder / f"helpful_prompts_{part}.jsonl", [{"prompt": row["prompt"]} for row in chosen])


def read(source: Path, name: str, part: str) -> Rows:
    return [json.loads(line) for line in (source / f"{name}_{part}.jsonl").read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def asked(prompt: str) -> str:
    """The instruction in Alpaca's frame."""
    found = re.search(r"### Instruction:\n(.*?)\n+### Response:", prompt, re.DOTALL)
    return (found[1] if found else prompt).strip()


def turns(dialogue: str) -> tuple[str, str]:
    """Question and answer of a transcript with one of each."""
    question, _, answer = dialogue.partition("\n\nAssistant:")
    return question.removeprefix("\n\nHuman:").strip(), answer.strip()


def runs(folder: Path, model: str = MODEL, length: int = LENGTH) -> Iterator[tuple[str, list[str]]]:
    """(name, words of `python -m finetune_kit run`) of the chain, in the order in which they are made."""
    lean = ["evaluate.general_text=false", f"data.max_length={length}", "data.max_lost=1"]
    unasked = [*lean, "evaluate.safety=null"]  # each model is measured once, and not before and after
    data, start = folder / "data", f"model.name_or_path={folder / 'runs' / START}"

    def mixed(one: str, other: str, share: float) -> list[str]:
        files = [data / f"{name}_train.jsonl" for name in (one, other)]
        if share in (0.0, 1.0):
            return [f"data.path={files[int(share == 0.0)]}"]
        return [f"data.path=[{files[0]},{files[1]}]", f"data.weights=[{share},{1 - share}]"]

    sft = ["lora_sft", "data.size=160", "evaluate.size=0", *unasked]
    base = f"model.name_or_path={model}"
    yield START, [*sft, base, *mixed("refusals", "plain", REFUSALS)]
    yield "undone", [*sft, start, "train.seed=1", *mixed("refusals", "plain", 0.0)]
    yield "kept", [*sft, start, "train.seed=1", *mixed("refusals", "plain", REFUSALS)]
    few = ["held_out_size=20", "evaluate.size=0", *unasked]
    for share in SHARES:
        words = [
            "dpo",
            start,
            "data.size=48",
            "per_device_train_batch_size=4",
            "learning_rate=3e-4",
            f"beta={BETA}",
            *few,
        ]
        yield f"dpo_{share:.2f}", [*words, *mixed("harmless", "helpful", share)]
    for kind in ("helpful", "harmless"):
        rows = [f"data.path={data / f'{kind}_train.jsonl'}", f"data.held_out_path={data / f'{kind}_test.jsonl'}"]
        yield f"reward_{kind}", ["reward_model", base, *rows, "data.size=160", *lean, "evaluate.size=0"]
    for weight in WEIGHTS:
        sources = ",".join(str(folder / "runs" / f"reward_{kind}") for kind in ("harmless", "helpful"))
        words = ["ppo", start, f"reward.sources=[{sources}]", f"reward.weights=[{weight},{1 - weight}]"]
        words += ["reward.ignore_gate=true", *mixed("harmful_prompts", "helpful_prompts", 0.5), "data.size=160"]
        words += ["batch_size=24", "num_mini_batches=2", "num_ppo_epochs=2", "max_new_tokens=24", "max_steps=4"]
        yield f"ppo_{weight:.2f}", [*words, "learning_rate=3e-4", "held_out_size=20", "evaluate.size=20", *unasked]


def train(folder: Path, name: str, words: list[str]) -> None:
    """One command of the chain; what is finished is not run again."""
    place = folder / "runs" / name
    if (place / "report.json").is_file():
        return
    command = ["-m", "finetune_kit", "run", *words, f"output_dir={place}"]
    before, began = os.times(), time.perf_counter()
    print(f"\n$ python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with code {done.returncode}")
    spent = os.times().children_user + os.times().children_system - before.children_user - before.children_system
    note(folder, {"made": name, "cpu_seconds": round(spent), "seconds": round(time.perf_counter() - began)})


def note(folder: Path, line: dict[str, Any]) -> None:
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def measure(folder: Path, name: str, arguments: argparse.Namespace) -> None:
    """Every row's value of one model, into measured/<name>.json: refusals, losses of pairs, rewards of answers."""
    target = folder / "measured" / f"{name}.json"
    known: Values = json.loads(target.read_text()) if target.is_file() else {}
    wanted = ["pairs"] if name == START or name.startswith("dpo") else []
    wanted += ["answers"] if name == START or name.startswith(("ppo", "dpo")) else []
    there = {"pairs": "helpful_chosen", "answers": "helpful_reward"}
    judges = all((folder / "runs" / f"reward_{kind}" / "report.json").is_file() for kind in ("helpful", "harmless"))
    asked = (folder / "answers" / f"{name}.jsonl").is_file()
    missing = [] if asked else ["safety"]
    missing += [part for part in wanted if there[part] not in known and (part != "answers" or judges)]
    if not missing:
        return
    began = time.process_time()
    model, tokenizer = opened(folder, name, arguments.model)
    for part in missing:
        known |= PARTS[part](folder, name, model, tokenizer, arguments)
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(known))
    del model
    gc.collect()
    note(folder, {"measured": name, "parts": missing, "cpu_seconds": round(time.process_time() - began)})


def opened(folder: Path, name: str, base: str) -> tuple[Any, Any]:
    from finetune_kit.models.load import load_base
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.packing.forward import enable
    from finetune_kit.runs.saved import model_of, open_run, tokenizer_of
    from finetune_kit.settings.schema import ModelConfig

    if name == "base":
        return load_base(ModelConfig(name_or_path=base)), load_tokenizer(ModelConfig(name_or_path=base))
    run = open_run(folder / "runs" / name, [])
    model = model_of(run)
    enable(model)  # the beginning that both answers of a pair share is computed once
    return model, tokenizer_of(run)


def held_out(folder: Path, file: str, kind: str, tokenizer: Any, length: int) -> Any:
    from finetune_kit.data.load import load_data
    from finetune_kit.settings.schema import DataConfig

    rows = DataConfig(path=[], held_out_path=str(folder / "data" / file), max_length=length, max_lost=1.0)
    return load_data(rows, kind, tokenizer)


def safety_of(folder: Path, name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Values:
    """Answers to XSTest's prompts go to answers/<name>.jsonl; whether they refuse is asked when they are shown."""
    from finetune_kit.evaluation.safety import measure_safety
    from finetune_kit.settings.schema import EvaluateConfig

    config = EvaluateConfig(safety="xstest", safety_size=arguments.prompts, safety_max_new_tokens=TOKENS, batch_size=40)
    data = held_out(folder, "helpful_prompts_test.jsonl", "prompt", tokenizer, arguments.length)
    found = measure_safety(model, tokenizer, data, config)
    (folder / "answers").mkdir(exist_ok=True)
    told = zip(found.prompts, found.answers, strict=True)
    rows = [{"where": p.where, "prompt": p.text, "harmful": p.harmful, "answer": a} for p, a in told]
    write(folder / "answers" / f"{name}.jsonl", rows)
    return {}


def pairs_of(folder: Path, name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Values:
    """Nats of both answers to each held-out prompt."""
    from finetune_kit.evaluation.measure import measure as measured
    from finetune_kit.settings.schema import EvaluateConfig

    found: Values = {}
    for kind in ("helpful", "harmless"):
        data = held_out(folder, f"{kind}_test.jsonl", "preference", tokenizer, arguments.length)
        data.held_out = data.held_out.select(range(min(arguments.pairs, len(data.held_out))))
        config = EvaluateConfig(size=0, general_text=False)
        side = measured(model, tokenizer, data, config, distributions=False)
        found |= {f"{kind}_chosen": side.nll, f"{kind}_rejected": side.rejected_nll}
    return found


def answers_of(folder: Path, name: str, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Values:
    """Each reward model's score of greedy answers to held-out prompts of its kind."""
    from finetune_kit.evaluation.measure import measure as measured
    from finetune_kit.settings.schema import EvaluateConfig

    found: Values = {}
    for kind, file in (("helpful", "helpful_prompts"), ("harmless", "harmful_prompts")):
        data = held_out(folder, f"{file}_test.jsonl", "prompt", tokenizer, arguments.length)
        judge = str(folder / "runs" / f"reward_{kind}")
        config = EvaluateConfig(
            size=arguments.answers, general_text=False, reward_model=judge, max_new_tokens=TOKENS, batch_size=40
        )
        found[f"{kind}_reward"] = measured(model, tokenizer, data, config).metrics["reward"]
    return found


SIDES = ("chosen", "rejected")
COLUMNS = {
    "harmful_refused": "harmful prompts refused",
    "harmless_refused": "harmless prompts refused",
    "helpful_pairs": "helpful pairs right",
    "harmless_pairs": "harmless pairs right",
    "helpful_reward": "helpful reward",
    "harmless_reward": "harmless reward",
}
PANELS = (
    ("dpo", "pairs", "DPO: held-out pairs right, above one half"),
    ("ppo", "reward", "PPO: reward of the answers, against before"),
)
PARTS = {"safety": safety_of, "pairs": pairs_of, "answers": answers_of}


def lines(folder: Path, name: str, before: str) -> list[dict[str, Any]]:
    """What a model does against the one before: the report's lines, each with a paired interval."""
    from finetune_kit.evaluation.intervals import SHARE, entry
    from finetune_kit.settings.schema import EvaluateConfig

    config, found = EvaluateConfig(), []
    was, now = refusals(folder, before), refusals(folder, name)
    for metric in was.keys() & now.keys():
        better = metric == "harmful_refused"
        found.append(entry(metric, was[metric], now[metric], config, higher_is_better=better, within=SHARE))
    was, now = (json.loads((folder / "measured" / f"{one}.json").read_text()) for one in (before, name))
    for kind in ("helpful", "harmless"):
        if f"{kind}_chosen" in was and f"{kind}_chosen" in now:
            moved = [
                [a - b for a, b in zip(was[f"{kind}_{side}"], now[f"{kind}_{side}"], strict=True)] for side in SIDES
            ]
            right = [float(good > bad) if good != bad else 0.5 for good, bad in zip(*moved, strict=True)]
            half = [0.5] * len(right)
            found.append(entry(f"{kind}_pairs", half, right, config, higher_is_better=True, within=(-0.5, 0.5)))
        reward = f"{kind}_reward"
        if reward in was and reward in now:
            found.append(entry(reward, was[reward], now[reward], config, higher_is_better=True))
    return found


def refusals(folder: Path, name: str) -> Values:
    """1 for each harmful and each harmless prompt that is refused in whole."""
    from finetune_kit.evaluation.refusals import refusal

    rows = [json.loads(line) for line in (folder / "answers" / f"{name}.jsonl").read_text().splitlines()]
    return {
        f"{kind}_refused": [
            float(refusal(row["answer"], row["prompt"]) == "refused") for row in rows if row["harmful"] is harmful
        ]
        for kind, harmful in (("harmful", True), ("harmless", False))
    }


def show(folder: Path, page: Path | None) -> None:
    """A row a model, and the frontier."""
    made = {path.stem for path in (folder / "answers").glob("*.jsonl")}
    order = [name for name, _ in runs(folder) if name in made]
    table = {
        name: {one["name"]: one for one in lines(folder, name, "base" if name == START else START)} for name in order
    }
    print("\n| model | before | " + " | ".join(COLUMNS.values()) + " |\n|" + " --- |" * (2 + len(COLUMNS)))
    for name, found in table.items():
        cells = [cell(found[metric]) if metric in found else "" for metric in COLUMNS]
        print(f"| {name} | {'base' if name == START else START} | {' | '.join(cells)} |")
    for kind in ("helpful", "harmless"):
        report = folder / "runs" / f"reward_{kind}" / "report.json"
        if report.is_file():
            print(f"\nreward_{kind}: {json.loads(report.read_text())['gate']['reason']}")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    print(f"\n{sum(line['cpu_seconds'] for line in log) / 60:.0f} CPU minutes")
    if page is not None:
        page.write_text(frontier(table), encoding="utf-8")


def cell(line: dict[str, Any]) -> str:
    """after, its difference with the interval, and the verdict."""
    from finetune_kit.evaluation.intervals import spread_of

    return f"{line['after']:.2f} ({line['difference']:+.2f}, {spread_of(line, 2)}) {line['verdict']}"


def frontier(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """SVG: helpful by harmless over the weight, a panel for DPO's pairs and one for PPO's rewards, with intervals."""
    panels = []
    for at, (prefix, metric, title) in enumerate(PANELS):
        points = [
            (name.partition("_")[2], found[f"helpful_{metric}"], found[f"harmless_{metric}"])
            for name, found in sorted(table.items())
            if name.startswith(prefix) and f"helpful_{metric}" in found
        ]
        if points:
            panels.append(f'<g transform="translate({at * 360},0)">{panel(title, points)}</g>')
    style = (
        "text{font:12px sans-serif;fill:#444}.axis{stroke:#999}.bar{stroke:#59c;opacity:.5}.way{stroke:#59c;fill:none}"
    )
    size = 'viewBox="0 0 720 340" width="720" height="340"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(panels)}</svg>\n'


def ends_of(line: dict[str, Any]) -> list[float]:
    """The interval of a difference; where every row moved alike there is none, and the point stands alone."""
    return list(line["interval"] or [line["difference"]] * 2)


def panel(title: str, points: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> str:
    """Points (label, helpful, harmless) in the order of their weight; differences, with bars for both intervals."""
    ends: list[float] = [end for _, *both in points for line in both for end in ends_of(line)]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    span = high - low or 1.0

    def x(value: float) -> float:
        return 60 + 270 * (value - low) / span

    def y(value: float) -> float:
        return 290 - 250 * (value - low) / span

    parts = [f'<text x="60" y="20">{title}</text>', f'<path class="axis" d="M60,{y(0):.1f}H330M{x(0):.1f},40V290"/>']
    for value in (low, 0.0, high):
        parts.append(f'<text x="{x(value):.1f}" y="306" text-anchor="middle">{value:+.2f}</text>')
        parts.append(f'<text x="54" y="{y(value) + 4:.1f}" text-anchor="end">{value:+.2f}</text>')
    parts.append('<text x="195" y="326" text-anchor="middle">helpful</text><text x="8" y="36">harmless</text>')
    corners = [(x(helpful["difference"]), y(harmless["difference"])) for _, helpful, harmless in points]
    parts.append(f'<polyline class="way" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>')
    for (label, helpful, harmless), (a, b) in zip(points, corners, strict=True):
        across, up = [x(end) for end in ends_of(helpful)], [y(end) for end in ends_of(harmless)]
        parts.append(
            f'<path class="bar" d="M{across[0]:.1f},{b:.1f}H{across[1]:.1f}M{a:.1f},{up[0]:.1f}V{up[1]:.1f}"/>'
        )
        parts.append(
            f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="#159"/><text x="{a + 6:.1f}" y="{b - 6:.1f}">{label}</text>'
        )
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets; not needed with --show")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="beginnings of names: sft dpo reward ppo")
    parser.add_argument("--prompts", type=int, default=120, help="of XSTest, half of them harmful")
    parser.add_argument("--pairs", type=int, default=80, help="held-out pairs of each kind")
    parser.add_argument("--answers", type=int, default=40, help="held-out prompts of each kind that are answered")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--show", action="store_true", help="make nothing, show what is there")
    parser.add_argument("--page", type=Path, help="where the frontier goes, as SVG")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    if not arguments.show:
        make(folder, arguments)
    show(folder, arguments.page)


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """All runs and measurements that are not in the folder yet."""
    if not (folder / "data").is_dir():
        from finetune_kit.models.tokenizer import load_tokenizer
        from finetune_kit.settings.schema import ModelConfig

        tokenizer = load_tokenizer(ModelConfig(name_or_path=arguments.model))
        prepare(arguments.data, folder / "data", arguments.length, lambda text: len(tokenizer(text)["input_ids"]))
    chain = [
        (name, words)
        for name, words in runs(folder, arguments.model, arguments.length)
        if not arguments.only or name.startswith(tuple(arguments.only))
    ]
    measure(folder, "base", arguments)
    for name, words in chain:
        train(folder, name, words)
        if not name.startswith("reward"):
            measure(folder, name, arguments)
    for name, _ in chain:  # what waited for the reward models
        if not name.startswith("reward"):
            measure(folder, name, arguments)


if __name__ == "__main__":
    main()
