"""Ours beside TRL's own trainers and a bare loop: the same rows, order, seed, adapter and optimizer, in turns.

    python benchmarks/methods.py [--jobs sft_lora sft_full dpo reward] [--rounds 2] [--steps 3] [--rows 4]
                                 [--answers FILE] [--pairs FILE] [--max-length 512] [--who ours trl bare] [--profile]

SmolLM2-135M in float32, an adapter of rank 16 on all linear layers (sft_full: all weights), fused AdamW. `--rows`: rows
or pairs a step, from the default task, or from a file with answers and one with pairs. Each job of each side is a
process of its own on one thread, which gives its peak memory; its first step warms up, counts matrix multiplications
(attention left out: torch does not count it on a CPU) and is not timed. Times are CPU seconds, so that another process
on the machine matters less. TRL has its defaults but for bfloat16 and gradient checkpointing, which a CPU does not have
or pays for. `bare` is the leanest loop over the same work: no library but torch, no padding, the head on answer tokens
alone, nothing shared. Ours computes the reference of DPO once, which is in its time and not in its multiplications; the
others compute it in each step.

benchmarks/gpu_trl.py makes the same comparison on a GPU, with other sides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

JOBS = {"sft_lora": "lora_sft", "sft_full": "full_sft", "dpo": "dpo", "reward": "reward_model"}
RECIPES = {**JOBS, "sft_qlora": "qlora_sft"}
ADAPTED = ("sft_lora", "sft_qlora", "dpo")
RATE, RANK, ALPHA = 2e-4, 16, 32
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")  # whose operations the profiler counts


def main() -> None:
    arguments = options().parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child, arguments, MAKERS)))
        return
    own = partial(child, CUDA_VISIBLE_DEVICES="")  # the comparison of a CPU, on a machine with a GPU, too
    for job in arguments.jobs:
        show(job, turns(job, arguments.who, arguments.rounds, own))


def options() -> argparse.ArgumentParser:
    return common_options(__doc__ or "", MAKERS, list(JOBS))


def common_options(about: str, sides: dict[str, Any], jobs: list[str]) -> argparse.ArgumentParser:
    """What every comparison is asked for on its command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=jobs, default=jobs)
    parser.add_argument("--who", nargs="+", choices=sides, default=list(sides))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed ones; one more warms up")
    parser.add_argument("--rows", type=int, default=4, help="rows or pairs in a step")
    parser.add_argument("--answers", help="rows of sft; unset: the default task")
    parser.add_argument("--pairs", help="rows of dpo and reward; unset: the default task")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations, on all sides")
    parser.add_argument("--profile", action="store_true", help="print where the time of one step goes, too")
    parser.add_argument("--model", help="its folder; unset: the embedded one")
    parser.add_argument("--child", nargs=2, metavar=("JOB", "WHO"), help=argparse.SUPPRESS)
    return parser


def turns(
    job: str, sides: Sequence[str], rounds: int, run: Callable[[str, str], dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    """The figures of each side in each round; the sides take turns."""
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in sides}
    for _ in range(rounds):
        for who in sides:
            found[who].append(run(job, who))
    return found


def child(job: str, who: str, script: str = __file__, more: Sequence[str] = (), **environment: str) -> dict[str, Any]:
    """One side's figures from a process of its own, which gets this one's command line and `more`."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **environment}
    command = [sys.executable, script, *sys.argv[1:], *more, "--child", job, who]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own}, check=False)
    if done.returncode:
        sys.exit(f"{job} by {who} ended with code {done.returncode}\n{done.stderr[-4000:]}")
    said = done.stdout.rstrip().splitlines()
    print(*said[:-1], sep="\n", end="\n" if said[:-1] else "", flush=True)
    result: dict[str, Any] = json.loads(said[-1])
    return result


def show(job: str, found: dict[str, list[dict[str, Any]]]) -> None:
    print(f"\n{job}\n| | real tokens a CPU second | peak MiB | GFLOP a real token | padded | losses |")
    print("| --- | --- | --- | --- | --- | --- |")
    for who, rounds in found.items():
        speeds = sorted(one["real"] / one["seconds"] for one in rounds)
        shown = f"{statistics.median(speeds):.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})"
        last, peak = rounds[-1], max(one["peak"] for one in rounds)
        print(
            f"| {who} | {shown} | {peak:,} | {last['flop'] / last['first_real'] / 1e9:.2f} "
            f"| {1 - last['all_real'] / last['slots']:.0%} | {' '.join(f'{loss:.4f}' for loss in last['losses'])} |",
            flush=True,
        )
    show_spent(found)


def show_spent(found: dict[str, list[dict[str, Any]]]) -> None:
    for who, rounds in found.items():
        if rounds[-1]["spent"]:
            print(f"{who}, the last step: {rounds[-1]['spent']}", flush=True)


def measure(
    job: str, who: str, arguments: argparse.Namespace, sides: dict[str, Any], by_formula: bool = False
) -> dict[str, Any]:
    """One side's figures for a job, in this process. `by_formula`: multiplications are those of benchmarks/flop.py."""
    import torch

    torch.set_num_threads(1)
    clock = Clock(arguments.steps, arguments.profile, by_formula)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        config, tokenizer, data = rows_of(job, arguments, Path(scratch))
        before, losses = sides[who](job, config, tokenizer, data, clock)
    steps = arguments.steps
    return {
        "seconds": clock.seconds + before * steps / (steps + 1),
        "real": sum(real for real, _ in clock.batches[1 : steps + 1]),
        "first_real": clock.batches[0][0],
        "all_real": sum(real for real, _ in clock.batches),
        "slots": sum(slots for _, slots in clock.batches),
        "flop": clock.flop,
        "peak": clock.peak(),
        "losses": losses,
        "spent": clock.spent,
    }


class Clock:
    """Seconds of the steps after the first, of the CPU or, on a GPU, of the clock; the first one's matrix
    multiplications; and what the batches hold."""

    def __init__(self, steps: int, profile: bool, by_formula: bool = False) -> None:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler
        from torch.utils.flop_counter import FlopCounterMode

        from finetune_kit.models.device import device

        self.on_gpu = device().type == "cuda"
        # which does not know all that is called on a GPU
        self.counter = None if by_formula or self.on_gpu else FlopCounterMode(display=False)
        self.steps, self.step, self.seconds = steps, 0, 0.0
        self.batches: list[tuple[int, int]] = []  # (real tokens, slots)
        self.first: tuple[list[int], int] | None = None  # lengths of the rows of the first batch, and its labels
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.profiler = profiler(activities=activities, record_shapes=True, with_flops=True) if profile else None
        self.flop, self.spent = 0, ""

    def now(self) -> float:
        """Seconds; of a GPU with all that it was given to do."""
        if not self.on_gpu:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> int:
        """MiB: of the process, or of the GPU's tensors since the first step."""
        if not self.on_gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        import torch

        return torch.cuda.max_memory_allocated() // 2**20

    def begin(self, *args: Any, **kwargs: Any) -> None:
        if self.step == 0:
            if self.on_gpu:
                import torch

                torch.cuda.reset_peak_memory_stats()
            if self.counter:
                self.counter.__enter__()
        if self.step == 1:
            self.started = self.now()
        if self.step == self.steps and self.profiler:
            self.profiler.__enter__()

    def end(self, *args: Any, **kwargs: Any) -> None:
        if self.step == 0 and self.counter:
            self.counter.__exit__(None, None, None)
            self.flop = self.counter.get_total_flops()
        if self.step == self.steps:
            self.seconds = self.now() - self.started
            if self.profiler:
                self.profiler.__exit__(None, None, None)
                self.spent = spent(self.profiler.key_averages(), self.on_gpu)
        self.step += 1

    def counting(self, collate: Any) -> Any:
        """A collator that also notes what it makes."""

        def collated(rows: list[Any]) -> Any:
            batch = collate(rows)
            slots = batch["input_ids"].numel()
            mask = batch.get("attention_mask")  # there is none where rows lie end to end
            self.batches.append((slots if mask is None else int(mask.sum()), slots))
            if self.first is None:
                self.first = row_lengths(batch), count_labels(batch)
            return batch

        return collated


def row_lengths(batch: dict[str, Any]) -> list[int]:
    """Real tokens of each row; of rows that lie end to end, from one position 0 to the next."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return [int(length) for length in mask.sum(dim=1)]
    places = batch["position_ids"].flatten()
    starts = [*(places == 0).nonzero()[:, 0].tolist(), len(places)]
    return [end - start for start, end in itertools.pairwise(starts)]


def count_labels(batch: dict[str, Any]) -> int:
    """Positions whose logits the loss wants; 0 of rewards, which have one number a row."""
    if "labels" in batch and batch["labels"].dim() == 2:
        return int((batch["labels"][:, 1:] != -100).sum())
    return int(batch["completion_mask"].sum()) if "completion_mask" in batch else 0


def spent(events: Sequence[Any], on_gpu: bool) -> str:
    """The operations that took most of a profiled time, and the rate of the matrix products among them."""
    from torch.autograd import DeviceType

    own = [event for event in events if event.device_type == DeviceType.CPU]  # a GPU's kernels are counted there, too
    times = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in own}
    most = sorted(times, key=times.__getitem__, reverse=True)[:8]
    shares = ", ".join(f"{key.removeprefix('aten::')} {times[key] / sum(times.values()):.1%}" for key in most)
    flop, micros = sum(event.flops for event in own if event.key in PRODUCTS), sum(times.get(p, 0) for p in PRODUCTS)
    return f"{shares}; matrix products at {flop / max(micros, 1) / 1e3:,.0f} GFLOP/s"


def rows_of(job: str, arguments: argparse.Namespace, scratch: Path) -> tuple[Any, Any, Any]:
    """Settings, tokenizer and data of a job: as many rows as its steps take."""
    from finetune_kit import recipe as recipes
    from finetune_kit.data.load import load_data
    from finetune_kit.models.embedded import embedded_folder
    from finetune_kit.models.tokenizer import load_tokenizer
    from finetune_kit.settings.load import resolve

    model = arguments.model or str(embedded_folder())  # before the cache is another one
    os.environ["FINETUNE_KIT_CACHE"] = str(scratch)  # no reference of an earlier run
    size = arguments.rows * (arguments.steps + 1)
    words = [f"output_dir={scratch / 'run'}", f"data.max_length={arguments.max_length}", "data.max_lost=1"]
    words += ["evaluate.size=0", "evaluate.general_text=false", f"learning_rate={RATE}", "lr_scheduler_type=constant"]
    words += ["warmup_steps=0", f"per_device_train_batch_size={arguments.rows}", f"max_steps={arguments.steps + 1}"]
    words += ["logging_steps=1", f"gradient_checkpointing={str(arguments.gradient_checkpointing).lower()}"]
    if job == "reward":
        words += ["center_rewards_coefficient=0"]
    path = arguments.answers if job.startswith("sft") else arguments.pairs
    words += [f"data.path={path}", "held_out_size=64", f"data.size={size * 8}"] if path else [f"data.size={size}"]
    found = recipes.load(RECIPES[job])
    config = resolve(found.config_class, found.name, None, words)
    config.model.name_or_path = model
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.kind, tokenizer, seed=0)
    data.train = data.train.select(range(size))
    return config, tokenizer, data


def policy_of(job: str, config: Any, tokenizer: Any, data: Any) -> Any:
    from finetune_kit.models.load import load_policy
    from finetune_kit.models.reward import load_reward_model

    if job == "reward":
        return load_reward_model(config.model, config.lora, tokenizer, data.end_token_ids)
    return load_policy(config.model, getattr(config, "lora", None), trained_in_full=job == "sft_full")


def classes(job: str) -> tuple[Any, Any]:
    import trl

    name = {"dpo": "DPO", "reward": "Reward"}.get(job, "SFT")
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")


def ours(job: str, config: Any, tokenizer: Any, data: Any, clock: Clock) -> tuple[float, list[float]]:
    from finetune_kit.data.trl_columns import whole_pairs
    from finetune_kit.training.build import build
    from finetune_kit.training.reference import set_reference

    trainer_class, config_class = classes(job)
    policy = policy_of(job, config, tokenizer, data)
    more: dict[str, Any] = {"disable_dropout": True} if job in ("dpo", "reward") else {}
    if job == "dpo":
        more |= {"tokenises": True, "beta": config.beta, "precompute_ref_log_probs": True}
    if job == "reward":
        more |= {"rows": whole_pairs(data, False)}
    Path(config.train.output_dir).mkdir()
    trainer = build(trainer_class, config_class, config, policy, tokenizer, data, **more)
    started = clock.now()
    if job == "dpo":
        set_reference(trainer, config, data)
    return clock.now() - started, train(trainer, clock)


def theirs(job: str, config: Any, tokenizer: Any, data: Any, clock: Clock, **best: Any) -> tuple[float, list[float]]:
    """`best`: settings of TRL in the place of those here."""
    from peft import LoraConfig
    from transformers import set_seed

    from finetune_kit.data.trl_columns import placeholder, whole_pairs
    from finetune_kit.models.device import computes_in_bfloat16, device
    from finetune_kit.models.load import load_base

    trainer_class, config_class = classes(job)
    rows, more = data.train, {}
    if job == "reward":
        rows, model = whole_pairs(data, False), policy_of(job, config, tokenizer, data)
        more["disable_dropout"] = True
    else:
        model = load_base(config.model, job == "sft_full")
    if job.startswith("sft"):
        masks = [[int(label != -100) for label in labels] for labels in rows["labels"]]
        rows = type(rows).from_dict({"input_ids": rows["input_ids"], "completion_mask": masks})
        more["completion_only_loss"] = True
    settings = {
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": config.train.per_device_train_batch_size,
        "max_steps": config.train.max_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": device().type == "cpu",
        "bf16": computes_in_bfloat16(),
        "gradient_checkpointing": config.train.gradient_checkpointing,
        "max_length": None,
        "report_to": [],
        "seed": 0,
        "disable_tqdm": True,
        **more,
        **best,
    }
    adapter = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    set_seed(0)
    trainer = trainer_class(
        model=model,
        args=config_class(config.train.output_dir, **settings),
        train_dataset=placeholder(data.kind, Path(config.train.output_dir).parent) if job == "dpo" else rows,
        processing_class=tokenizer,
        peft_config=adapter if job in ADAPTED else None,
    )
    started = clock.now()
    if job == "dpo":
        trainer.train_dataset = rows
        if trainer.precompute_ref_logps:  # those of the placeholder were computed when it was made
            size = config.train.per_device_train_batch_size
            trainer.train_dataset = trainer._precompute_ref_logps(rows, "train", size)
    return clock.now() - started, train(trainer, clock)


def train(trainer: Any, clock: Clock) -> list[float]:
    from finetune_kit.training.progress import hooks

    trainer.data_collator = clock.counting(trainer.data_collator)
    trainer.add_callback(hooks(on_step_begin=clock.begin, on_step_end=clock.end))
    trainer.train()
    if clock.counter is None:
        from flop import step_flop

        assert clock.first is not None
        clock.flop = step_flop(trainer.model, *clock.first)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def bare(job: str, config: Any, tokenizer: Any, data: Any, clock: Clock) -> tuple[float, list[float]]:
    import torch
    from torch.nn.functional import cross_entropy, logsigmoid

    from finetune_kit.data.tokenise import sequences

    policy = policy_of(job, config, tokenizer, data)
    weights = {name.replace("base_model.model.", ""): weight for name, weight in policy.named_parameters()}
    weights = {name.replace("base_layer.", "").replace(".default", ""): weight for name, weight in weights.items()}
    trained = [weight for weight in weights.values() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    # the trainer's order of the first epoch
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0)).tolist()
    size, losses = config.train.per_device_train_batch_size, []
    for step in range(config.train.max_steps):
        clock.begin()
        rows = [data.train[index] for index in order[step * size : (step + 1) * size]]
        texts = [(row["input_ids"], row["labels"]) for row in rows] if job.startswith("sft") else []
        for side in ("chosen", "rejected") if not texts or job in ("dpo", "reward") else ():
            texts += [sequences(row)[side] for row in rows]
        lengths = [len(ids) for ids, _ in texts]
        clock.batches.append((sum(lengths), sum(lengths)))
        ids = torch.tensor([token for ids, _ in texts for token in ids])
        following = torch.tensor([label for _, labels in texts for label in [*labels[1:], -100]])
        wanted = following != -100

        def scored(
            adapted: bool, ids: Any = ids, lengths: Any = lengths, at: Any = wanted, labels: Any = following
        ) -> Any:
            hidden = llama(policy.config, weights, ids, lengths, adapted)[at]
            return -cross_entropy(hidden @ weights["model.embed_tokens.weight"].T, labels[at], reduction="none")

        if job == "reward":
            last = torch.tensor(lengths).cumsum(0) - 1
            head = next(weight for name, weight in weights.items() if "score" in name and weight.requires_grad)
            chosen, rejected = (llama(policy.config, weights, ids, lengths, True)[last] @ head.T)[:, 0].chunk(2)
            loss = -logsigmoid(chosen - rejected).mean()
        elif job == "dpo":
            row = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))[wanted]
            with torch.no_grad():
                reference = scored(False)
            ratio = torch.zeros(len(texts)).index_add(0, row, scored(True) - reference)
            chosen, rejected = ratio.chunk(2)
            loss = -logsigmoid(config.beta * (chosen - rejected)).mean()
        else:
            loss = -scored(True).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        clock.end()
    return 0.0, losses


def llama(config: Any, weights: dict[str, Any], ids: Any, lengths: list[int], adapted: bool) -> Any:
    """Hidden states (n, h) of rows laid end to end: Llama in plain torch."""
    import torch
    from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def project(x: Any, name: str) -> Any:
        y = linear(x, weights[f"{name}.weight"])
        low = weights.get(f"{name}.lora_A.weight") if adapted else None
        return y if low is None else y.addmm_(x @ low.T, weights[f"{name}.lora_B.weight"].T, alpha=ALPHA / RANK)

    def norm(x: Any, name: str) -> Any:
        return rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], config.rms_norm_eps)

    def turn(x: Any) -> Any:
        one, other = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-other, one], dim=-1) * sin

    places = torch.cat([torch.arange(length) for length in lengths])
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angles = (places[:, None] * inverse).repeat(1, 2)[:, None]
    cos, sin = angles.cos(), angles.sin()
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm")
        q, k, v = (project(y, f"{at}.self_attn.{part}_proj").view(len(ids), -1, size) for part in "qkv")
        q, k, v = turn(q), turn(k).repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        rows = zip(*(states.transpose(0, 1)[None].split(lengths, dim=2) for states in (q, k, v)), strict=True)
        seen = torch.cat([scaled_dot_product_attention(*row, is_causal=True) for row in rows], dim=2)
        x = x + project(seen[0].transpose(0, 1).reshape(len(ids), -1), f"{at}.self_attn.o_proj")
        y = norm(x, f"{at}.post_attention_layernorm")
        y = silu(project(y, f"{at}.mlp.gate_proj")) * project(y, f"{at}.mlp.up_proj")
        x = x + project(y, f"{at}.mlp.down_proj")
    return norm(x, "model.norm")


MAKERS = {"ours": ours, "trl": theirs, "bare": bare}

if __name__ == "__main__":
    main()
