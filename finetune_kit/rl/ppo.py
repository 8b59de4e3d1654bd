"""PPO: sample completions, score them, and move the policy towards the better ones, never far from the reference.

One update, in the order of this file: rollout (sample, reward, look at each token once) -> advantages -> epochs of
mini-batches -> watchdogs. All randomness follows from (seed, update), so that a run resumes from a checkpoint as if it
had never stopped. The arithmetic is in rl/math.py, each equation with its source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_kit import distributed
from finetune_kit.data.load import Data
from finetune_kit.data.records import prompt_of
from finetune_kit.errors import DataError, FinetuneKitError, NumericsError, SettingsError
from finetune_kit.generation.toolbox import toolbox_of
from finetune_kit.models.completion_rows import Rows, make_rows
from finetune_kit.models.device import computes_in_bfloat16, device
from finetune_kit.packing import forward
from finetune_kit.rewards.sources import Rewards
from finetune_kit.rl import math as ppo
from finetune_kit.rl.checkpoint import Snapshot, load_optimizer, optimizer_tensors, read_checkpoint
from finetune_kit.rl.loop import Loop
from finetune_kit.rl.rollout import Reference, Sampled, passes, sample, shuffled, token_stats
from finetune_kit.rl.settings import PPOSettings, check_prompts, check_settings
from finetune_kit.rl.tool_rollouts import check_template, sample_with_tools
from finetune_kit.rl.value import NAME, build_value, value_parameters
from finetune_kit.system.terminal import doing
from finetune_kit.training.guard import CAUSES as NOT_FINITE
from finetune_kit.training.guard import MOST_IN_A_ROW, said_rows
from finetune_kit.training.progress import Record


@dataclass
class Rollout:
    """One process's part of an update: b completions, laid out to t tokens; all tensors (b, t), 0 where masked.

    chosen: the training row of each. own: which tokens of each the policy wrote; the others have no place in (b, t).
    """

    chosen: list[int]
    prompts: list[list[int]]
    completions: list[list[int]]
    own: list[list[bool]]
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def rows(self, chosen: list[int]) -> Rows:
        """Some of its rows as the model takes them."""
        prompts, completions = [self.prompts[row] for row in chosen], [self.completions[row] for row in chosen]
        own = [self.own[row] for row in chosen]
        return make_rows(prompts, completions, self.mask.shape[1], self.mask.device, own)


def copied(tensor: Tensor, beside: bool) -> Tensor:
    """One copy: beside the tensor, or on the CPU."""
    return tensor.clone() if beside or tensor.device.type == "cpu" else tensor.cpu()


class PPOTrainer:
    """Trains `policy` on the prompts of `data` for `rewards`; `train()` returns the lines of metrics.jsonl.

    Raises SettingsError (batch sizes that do not divide, settings that have no effect), DataError (a prompt too long).
    """

    def __init__(self, policy: Any, tokenizer: Any, data: Data, rewards: Rewards, config: PPOSettings) -> None:
        from accelerate import Accelerator
        from transformers import get_scheduler

        cpu = device().type == "cpu"
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if computes_in_bfloat16() else "no")
        self.model, self.tokenizer, self.data, self.rewards, self.config = policy, tokenizer, data, rewards, config
        self.is_main = self.accelerator.is_main_process
        check_settings(config, self.accelerator.num_processes)
        self.share = config.batch_size // self.accelerator.num_processes  # completions of this process in an update
        self.prompts: list[list[int]] = [list(ids) for ids in data.train["prompt_ids"]]
        check_prompts(self.prompts, data, policy, config.max_new_tokens)
        self.toolbox = toolbox_of(config)
        if self.toolbox is not None:
            check_template(tokenizer, self.toolbox)
        self.sample = self._sampler()
        self.reference = Reference(policy)
        self.value = build_value(config.value_model, policy, config.model, config.value_init_from, config.train.seed)
        policy.eval()  # dropout off, in sampling and in training: the ratio would otherwise measure it
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad and f".{NAME}." not in name}
        self.trained |= value_parameters(self.value, policy)
        if config.train.gradient_checkpointing:
            policy.gradient_checkpointing_enable()
        self.padded_because = "train.padding_free=false"
        if config.train.padding_free:
            with doing("proving that packed rows give what padded ones do"):
                self.padded_because = forward.enable(policy, self.prompts)
        train, every = config.train, self.trained.values()
        self.optimizer = torch.optim.AdamW(every, train.learning_rate, eps=1e-5, weight_decay=train.weight_decay)
        epochs = math.ceil(train.num_train_epochs * len(self.prompts) / config.batch_size)
        self.updates = train.max_steps if train.max_steps > 0 else epochs
        warmup = train.warmup_steps if train.warmup_steps >= 1 else train.warmup_steps * self.updates
        self.scheduler = get_scheduler(train.lr_scheduler_type, self.optimizer, math.ceil(warmup), self.updates)
        self.record = Record(Path(config.train.output_dir or ""))
        self.step = self.making = 0  # the last update, and the one that is being made
        self.kl_coef = config.kl_coef
        self.constant = 0  # updates in a row in which all scores were alike
        self.varied = False  # whether they ever were not
        self.skipped = self.in_a_row = 0  # steps that moved nothing, for a gradient that is not finite
        self.logged: dict[str, list[float]] = {}  # what reward functions gave to log_metric in this update
        self.states: list[Snapshot] = []  # the last good one, and the one that the update began with
        self.beside: bool | None = None  # whether they are kept on the GPU; None: no update has shown its peak yet

    def _sampler(self) -> Any:
        """What draws the completions: rollout.sample, or vLLM in its place."""
        if not self.config.use_vllm:
            return sample
        from finetune_kit.rl import vllm

        return vllm.sampler(
            self.model,
            self.config.model,
            longest=max(map(len, self.prompts)) + self.config.max_new_tokens,
            gpu_memory_utilization=self.config.vllm_gpu_memory_utilization,
            processes=self.accelerator.num_processes,
        )

    def train(self) -> list[dict[str, float]]:
        """All updates, from the newest whole checkpoint in the run's folder, or from where this trainer is.

        The value is saved beside the policy, which is left without it. Raises as Loop.run does.
        """
        return Loop(self).run()

    def try_longest(self) -> None:
        """Forward and backward of the longest prompts with completions as long as can be, as many rows as go through
        the model at once, beside the optimizer's state: what does not fit into memory shows before the first update.
        Nothing is moved, and no random number drawn."""
        config, device = self.config, self.model.device
        count = min(config.train.per_device_train_batch_size, self.share // config.num_mini_batches)
        longest = sorted(range(len(self.prompts)), key=lambda row: -len(self.prompts[row]))
        chosen = [longest[place % len(longest)] for place in range(count)]
        # each its own token: rows that are alike would be computed once
        completions = [
            [row % self.model.get_input_embeddings().num_embeddings] * config.max_new_tokens for row in range(count)
        ]
        shape = (count, config.max_new_tokens)
        blank = [torch.zeros(shape, device=device) for _ in range(4)]
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        own = [[True] * config.max_new_tokens] * count
        rollout = Rollout(chosen, [self.prompts[row] for row in chosen], completions, own, mask, *blank)
        taken = 0 if self.optimizer.state else sum(8 * parameter.numel() for parameter in self.trained.values())
        states = torch.empty(taken, dtype=torch.uint8, device=device)
        with self._recomputing():
            loss, _ = self._loss(rollout, list(range(count)))
            loss.backward()
        del states
        self.optimizer.zero_grad()

    def update(self) -> dict[str, float]:
        """One update of the policy and the value; returns what it was like, by the field's names."""
        started, self.making = time.perf_counter(), self.step + 1
        orders = [self._order(epoch) for epoch in range(self.config.num_ppo_epochs)]
        rollout, line = self._roll_out(orders[0])
        scored = time.perf_counter()
        self.step += 1
        line |= self._optimise(rollout, orders)
        line["learning_rate"] = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        if (target := self.config.adaptive_kl_target) is not None:
            batch, horizon = self.config.batch_size, self.config.adaptive_kl_horizon
            self.kl_coef = ppo.adaptive_kl_coef(self.kl_coef, line["objective/kl"], target, batch, horizon)
        ended = time.perf_counter()
        whole = max(ended - started, 1e-9)
        line["time/update"] = whole
        line["time/scoring"] = (scored - started) / whole - line["time/generation"] / whole
        line["time/generation"] /= whole
        line["time/training"] = (ended - scored) / whole
        tokens = sum(map(len, rollout.prompts)) + sum(map(len, rollout.completions))
        made = int(self._total(torch.tensor(tokens, device=rollout.mask.device)))
        line["tokens"], line["tokens_per_second"] = self.record.last_tokens + made, round(made / whole, 1)
        return {"step": self.step, "epoch": self.step * self.config.batch_size / len(self.prompts), **line}

    def _roll_out(self, order: list[list[list[int]]]) -> tuple[Rollout, dict[str, float]]:
        """Sample, reward, and look at each token once with policy, value and reference.

        Rows are looked at in the micro-batches of the first epoch, so that there the ratio is exactly 1.
        """
        config, started = self.config, time.perf_counter()
        chosen = self._next_prompts()
        prompts = [self.prompts[row] for row in chosen]
        self._now("sampling", 0, len(prompts))
        with self.accelerator.autocast():  # the policy is what it is trained as
            sampled = self._sample(chosen, prompts)
        generation = time.perf_counter() - started
        self._now("scoring", 0, len(prompts))
        scores, parts = self._score(chosen, sampled)
        completions, own = [completion.ids for completion in sampled], [completion.written for completion in sampled]
        width = max(map(sum, own))
        mask = make_rows(prompts, completions, width, self.model.device, own).mask
        blank = torch.zeros(mask.shape, device=mask.device)
        rollout = Rollout(chosen, prompts, completions, own, mask, *(blank.clone() for _ in range(4)))
        ref_logprobs, entropy = blank.clone(), blank.clone()
        with torch.no_grad():
            micros = [micro for mini in order for micro in mini]
            for at, rows in enumerate(micros):
                self._now("values and log-probabilities", at, len(micros))
                laid = rollout.rows(rows)
                with self.accelerator.autocast():
                    seen = token_stats(self.model, laid, config.temperature, self.value, entropy=True)
                    with self.reference():
                        ref_logprobs[rows] = token_stats(self.model, laid, config.temperature).logprobs
                assert seen.entropy is not None
                assert seen.values is not None
                rollout.logprobs[rows], rollout.values[rows], entropy[rows] = seen.logprobs, seen.values, seen.entropy
        ended = torch.tensor([completion.ended for completion in sampled], device=mask.device)
        scored = ~scores.isnan()
        penalised = scores.nan_to_num() - config.missing_eos_penalty * (~ended)
        kl = ppo.KL_ESTIMATORS[config.kl_estimator](rollout.logprobs, ref_logprobs)
        rewards = ppo.token_rewards(penalised, kl, mask, self.kl_coef)
        if config.whiten_rewards:
            rewards = ppo.whiten(rewards, mask & scored[:, None], shift_mean=False, total=self._total)
        rollout.advantages, rollout.returns = ppo.gae(rewards, rollout.values, mask, config.gamma, config.lam)
        if config.whiten_advantages:
            rollout.advantages = ppo.whiten(rollout.advantages, mask & scored[:, None], total=self._total)
        # to which no reward applies: it moves neither policy nor value
        rollout.advantages[~scored], rollout.returns[~scored] = 0.0, rollout.values[~scored]

        def mean(values: Tensor) -> float:
            """Over completions; `values` (b,)."""
            return float(self._total(values.float().sum()) / config.batch_size)

        def of_scored(values: Tensor) -> float:
            """Over completions that have a score; `values` (b,), NaN where they have none. NaN where none has."""
            found = ~values.isnan()
            sums = self._total(torch.stack([values[found].float().sum(), found.float().sum()]))
            return float(sums[0] / sums[1]) if sums[1] else math.nan

        far, per_row = mean((kl * mask).sum(1)), of_scored(scores)
        if math.isnan(per_row):
            raise DataError(
                f"No reward applies to any completion of update {self.step + 1}: each gave None.",
                "Let a reward apply to most rows: docs/ppo.md says what None does.",
            )
        means = {f"reward/{name}": of_scored(values) for name, values in parts.items()}
        logged = {name: sum(values) / len(values) for name, values in self.logged.items()}
        line = {
            **{name: number for name, number in logged.items() if math.isfinite(number)},
            "objective/kl": far,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": mean(-(rollout.logprobs * mask).sum(1)),
            "objective/scores": per_row,
            "objective/scores_std": math.sqrt(max(0.0, of_scored((scores - per_row) ** 2))),
            "objective/non_score_reward": -self.kl_coef * far,
            "objective/rlhf_reward": of_scored(penalised.masked_fill(~scored, math.nan)) - self.kl_coef * far,
            **{name: number for name, number in means.items() if not math.isnan(number)},
            "policy/entropy_avg": float(ppo.masked_mean(entropy, mask, self._total)),
            "val/explained_variance": ppo.explained_variance(rollout.values, rollout.returns, mask, self._total),
            "completions/mean_length": mean(mask.sum(1)),
            "completions/ended": mean(ended),
            **self._call_figures(sampled),
            "time/generation": generation,
        }
        return rollout, line

    def _sample(self, chosen: list[int], prompts: list[list[int]]) -> list[Sampled]:
        """A completion of each prompt, which those rows of the data have."""
        given: dict[str, Any] = {
            "max_new_tokens": self.config.max_new_tokens,
            "temperature": self.config.temperature,
            "seed": self._seed("sampling"),
            "batch_size": self.config.evaluate.batch_size,
            "progress": lambda done: self._now("sampling", done, len(prompts)),
        }
        if self.toolbox is not None:
            return sample_with_tools(self.model, self.tokenizer, self.data, chosen, self.toolbox, **given)
        found: list[Sampled] = self.sample(self.model, prompts, end_token_ids=self.data.end_token_ids, **given)
        return found

    def _call_figures(self, sampled: list[Sampled]) -> dict[str, float]:
        """How tools were called, over all processes' completions; nothing without tools."""
        if self.toolbox is None:
            return {}
        calls = [call for completion in sampled for call in completion.calls]
        counts = [len(calls), sum(not call.ok for call in calls)]
        made, failed = self._total(torch.tensor(counts, device=self.model.device)).tolist()
        return {"tools/call_frequency": made / self.config.batch_size, "tools/failure_frequency": failed / max(1, made)}

    def _optimise(self, rollout: Rollout, orders: list[list[list[list[int]]]]) -> dict[str, float]:
        """Epochs of mini-batches. Gradients are of the mean over all tokens of a mini-batch, over all processes."""
        config = self.config
        sums: dict[str, float] = {}
        steps = 0
        stopped = False
        minis = [mini for order in orders for mini in order]
        for at, mini in enumerate(minis):
            self._now("training", at, len(minis))
            tokens = self._total(torch.stack([rollout.mask[rows].sum() for rows in mini]).sum())
            figures = torch.zeros(6, device=rollout.mask.device)
            for rows in mini:
                with self._recomputing():
                    loss, parts = self._loss(rollout, rows)
                    (loss / tokens).backward()
                figures += torch.stack(parts).detach()
            figures = self._total(figures) / tokens
            names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio")
            found = dict(zip((*names, "val/clipfrac_avg"), figures.tolist(), strict=True))
            stopped = config.target_kl is not None and found["policy/approxkl_avg"] > config.target_kl
            if stopped and steps:
                self.optimizer.zero_grad()
                break
            norm = self._move()
            if norm is None:
                self._pass_over(self._named(rollout, [row for rows in mini for row in rows]))
                continue
            found["grad_norm"] = norm
            found["loss"] = found["loss/policy_avg"] + config.vf_coef * found["loss/value_avg"]
            steps += 1
            sums = {name: sums.get(name, 0.0) + number for name, number in found.items()}
        line = {name: number / steps for name, number in sums.items()}
        line |= {"skipped_steps": float(self.skipped)} if self.skipped else {}
        return {**line, "policy/steps": steps, "policy/stopped_early": float(stopped)}

    def _now(self, what: str, done: int, total: int) -> None:
        """Say, where an update takes long, what of it is done."""
        if self.is_main:
            self.record.now(self.making, self.updates, f"{what}, {done} of {total}")

    def _loss(self, rollout: Rollout, rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The loss summed over the tokens of some rows, and its parts for the log, summed likewise."""
        config = self.config
        with self.accelerator.autocast():
            entropy_bonus = config.entropy_coef > 0
            seen = token_stats(self.model, rollout.rows(rows), config.temperature, self.value, entropy=entropy_bonus)
        assert seen.values is not None
        mask, old, old_values = rollout.mask[rows], rollout.logprobs[rows], rollout.values[rows]
        policy = ppo.policy_loss(seen.logprobs, old, rollout.advantages[rows], mask, config.cliprange)
        value = ppo.value_loss(seen.values, old_values, rollout.returns[rows], mask, config.cliprange_value)
        loss = policy.loss + config.vf_coef * value.loss
        if seen.entropy is not None and entropy_bonus:
            loss = loss - config.entropy_coef * ppo.masked_sum(seen.entropy, mask)
        return loss, [policy.loss, value.loss, policy.clipped, policy.approxkl, policy.ratio, value.clipped]

    def _move(self) -> float | None:
        """One step of the optimizer; returns the gradient's norm, None where it is not finite and moves nothing."""
        parameters = [p for p in self.trained.values() if p.grad is not None]
        if self.accelerator.num_processes > 1:
            flat = self._total(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        limit = self.config.train.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            return None
        self.in_a_row = 0
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _named(self, rollout: Rollout, rows: list[int]) -> str:
        """Rows of a rollout, with where their prompts come from and the lengths of prompt and completion."""
        records = [self.data.train_records[self.data.train[rollout.chosen[row]]["row"]] for row in rows]
        return said_rows(
            [
                f"{record.where} ({len(rollout.prompts[row])} + {len(rollout.completions[row])} tokens)"
                for record, row in zip(records, rows, strict=True)
            ]
        )

    def _pass_over(self, rows: str) -> None:
        """What train.on_nonfinite says of a gradient that is not finite; `rows`: those of its mini-batch, in words.

        Raises NumericsError where that is to stop.
        """
        policy = self.config.train.on_nonfinite
        self.in_a_row += 1
        found = f"A gradient is not finite at update {self.step}; no weight has been moved by it. {rows}"
        if policy == "stop" or self.in_a_row > MOST_IN_A_ROW:
            often = f" It is the {self.in_a_row}th in a row." if self.in_a_row > 1 else ""
            raise NumericsError(found + often, NOT_FINITE)
        self.optimizer.zero_grad()
        self.skipped += 1
        if policy == "rollback" and self.states:
            kept = self.step, self.constant, self.varied, self.kl_coef, self.scheduler.state_dict()
            self.restore(self.states[-1])
            self.step, self.constant, self.varied, self.kl_coef = kept[:4]
            self._set_schedule(kept[4])
        if self.is_main:
            back = "; weights and optimizer are those it began with" if policy == "rollback" else ""
            self.record.say(f"note: a step of update {self.step} is skipped{back}: a gradient is not finite. {rows}")

    def _score(self, chosen: list[int], sampled: list[Sampled]) -> tuple[Tensor, dict[str, Tensor]]:
        """(b,) scores, and those of each reward by name, of the completions' texts without their end tokens; NaN where
        no reward applies."""
        from transformers import TrainerState

        ids = [completion.ids[:-1] if completion.ended else completion.ids for completion in sampled]
        texts = [
            str(self.tokenizer.decode(tokens, skip_special_tokens=True)) if completion.text is None else completion.text
            for completion, tokens in zip(sampled, ids, strict=True)
        ]
        records = [self.data.train_records[self.data.train[row]["row"]] for row in chosen]
        turns = [prompt_of(record) for record in records]
        prompts = [str(before[-1]["content"]) if before else "" for before in turns]
        where, failed = self.model.device, None
        self.logged.clear()
        more = {
            "completion_ids": [completion.ids for completion in sampled],
            "trainer_state": TrainerState(global_step=self.step, max_steps=self.updates),
            "log_metric": lambda name, value: self.logged.setdefault(str(name), []).append(float(value)),
            "calls": None if self.toolbox is None else [list(completion.calls) for completion in sampled],
        }
        try:
            scores, parts = self.rewards(prompts, texts, records, **more)
        except FinetuneKitError as error:
            failed = error
        distributed.stop_together(failed)
        return torch.tensor(scores, device=where), {k: torch.tensor(v, device=where) for k, v in parts.items()}

    def _next_prompts(self) -> list[int]:
        """Rows of this process's prompts of this update."""
        first = self.step * self.config.batch_size + self.accelerator.process_index * self.share
        return passes(len(self.prompts), first, self.share, self.config.train.seed)

    def _order(self, epoch: int) -> list[list[list[int]]]:
        """Mini-batches of micro-batches of the rollout's rows, in the order of an epoch."""
        rows = shuffled(self.share, self._seed("epoch"), epoch)
        mini, micro = self.share // self.config.num_mini_batches, self.config.train.per_device_train_batch_size
        batches = [rows[at : at + mini] for at in range(0, self.share, mini)]
        return [[batch[at : at + micro] for at in range(0, mini, micro)] for batch in batches]

    def _seed(self, purpose: str) -> int:
        """A seed for this update and process, unlike those of other purposes."""
        where: int = self.step * self.accelerator.num_processes + self.accelerator.process_index
        return (self.config.train.seed * 1_000_003 + where) * 2 + (purpose == "sampling")

    def _total(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return summed

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """With train.gradient_checkpointing: activations are recomputed in backward. Dropout stays off."""
        layers = [m for m in self.model.modules() if getattr(m, "gradient_checkpointing", False)]
        for layer in layers:  # its own flag, not those of the dropouts in it
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def snapshot(self) -> Snapshot:
        """Everything that the updates to come depend on, copied once: on its device where `beside`, else to the CPU."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.trained.items()}
        tensors |= optimizer_tensors(self.optimizer, list(self.trained))
        copies = {name: copied(tensor, bool(self.beside)) for name, tensor in tensors.items()}
        return Snapshot(copies, self._numbers(), self.scheduler.state_dict(), self.record.state())

    def _numbers(self) -> dict[str, Any]:
        """Where the run is, and what it must have in common with one that resumes from a snapshot."""
        numbers = {"step": self.step, "kl_coef": self.kl_coef, "constant": self.constant, "varied": self.varied}
        same = {"batch_size": self.config.batch_size, "seed": self.config.train.seed, "prompts": len(self.prompts)}
        return {**numbers, **same}

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot back. Raises SettingsError where it is of a run with other prompts, batches or weights."""
        here = self._numbers()
        for name in ("batch_size", "seed", "prompts"):
            if snapshot.numbers[name] != here[name]:
                was, now = snapshot.numbers[name], here[name]
                raise SettingsError(f"The checkpoint was made with {name} {was}, this run has {now}.", "Set it back.")
        weights = {name: snapshot.tensors.get(f"weights.{name}") for name in self.trained}
        if differing := [n for n, w in weights.items() if w is None or w.shape != self.trained[n].shape]:
            raise SettingsError(f"The checkpoint is of another policy or value: {differing[0]}.", "See its run.yaml.")
        with torch.no_grad():
            for name, weight in weights.items():
                assert weight is not None
                self.trained[name].copy_(weight)
        load_optimizer(self.optimizer, list(self.trained), snapshot.tensors)
        self._set_schedule(snapshot.scheduler)
        self.step, self.kl_coef = int(snapshot.numbers["step"]), float(snapshot.numbers["kl_coef"])
        self.constant, self.varied = int(snapshot.numbers["constant"]), bool(snapshot.numbers["varied"])

    def _set_schedule(self, state: dict[str, Any]) -> None:
        """Put the schedule back, and the rates that follow from it into the optimizer."""
        self.scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint folder of this very run."""
        snapshot = read_checkpoint(folder)
        self.restore(snapshot)
        self.record.last_tokens = snapshot.record.get("tokens", 0.0)

    def put_value_aside(self, folder: Path) -> None:
        """The value into value.safetensors, its adapter out of the policy: what is left is what is served."""
        from safetensors.torch import save_file

        if self.is_main:
            tensors = value_parameters(self.value, self.model)
            save_file(
                {name: p.detach().cpu().contiguous() for name, p in tensors.items()}, folder / "value.safetensors"
            )
        if self.value.kind == "adapter":
            self.model.delete_adapter(NAME)
