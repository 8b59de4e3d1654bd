"""How the rows of an epoch reach a trainer: in which order, and in which forward passes.

A step has per_device_train_batch_size x gradient_accumulation_steps x processes rows, however it is cut. A trainer's
own loader cuts it into passes of as many rows as there are in each; what is here is for what that cannot do:

- train.max_tokens_per_batch: the rows of a step, sorted by length, in passes of at most so many tokens;
- train.train_sampling_strategy=group_by_length: an order in which the rows of a step are about as long as each other,
  drawn anew for each epoch from the seed alone, so that a run continues with the order that it had (transformers' own
  sampler draws from whatever random state there is, in each process);
- several processes: each row of an epoch once, where accelerate fills the last batches up with rows from its beginning.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_kit import distributed
from finetune_kit.data.chat import IGNORED
from finetune_kit.data.load import Data
from finetune_kit.errors import SettingsError
from finetune_kit.models.device import device
from finetune_kit.settings.schema import RecipeConfig, TrainConfig
from finetune_kit.training.sharding import last_round

# columns with the tokens of a row's sequences, ours and those of TRL's trainers; prompt_ids precede each of them
SEQUENCES = {
    *("input_ids", "completion_ids", "chosen_ids", "rejected_ids"),
    *("chosen_input_ids", "rejected_input_ids"),
}


def check_batches(config: RecipeConfig, data: Data) -> None:
    """Raises SettingsError where the order or the cut of a step's rows cannot be chosen."""
    strategy, budget = config.train.train_sampling_strategy, config.train.max_tokens_per_batch
    if budget is None and strategy == "random":
        return
    name = f"train.train_sampling_strategy={strategy}" if budget is None else "train.max_tokens_per_batch"
    reason = config.micro_batch_dependence if budget is not None else ""
    if data.kind == "prompt":
        reason = "completions are sampled on the way, and their lengths are not known before"
    elif data.kind == "labelled_completion":
        reason = reason or "the KL estimate of a row comes from its neighbours in one fixed order"
    elif data.packed and (budget is not None or strategy == "group_by_length"):
        reason = "packed rows all are about data.max_length tokens long"
    if reason:
        raise SettingsError(f"{name} has no effect: {reason}.", "Leave it out.")


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row's longest sequence, the sequences that a row has (2 of a pair), and all tokens of all rows."""

    longest: list[int]
    sequences: int
    total: int


def token_lengths(rows: Any) -> Lengths:
    """Of a datasets.Dataset in the columns of data.train, or in those of a trainer."""
    import numpy as np

    names = [name for name in rows.column_names if name in SEQUENCES]
    prompts = ["prompt_ids"] if "prompt_ids" in rows.column_names else []
    table = rows.select_columns([*names, *prompts]).with_format("arrow")[:]
    counted = {
        name: np.concatenate([chunk.value_lengths().to_numpy() for chunk in table[name].chunks])
        for name in table.column_names
    }
    before = counted["prompt_ids"] if prompts else np.zeros(len(rows), dtype=np.int64)
    sides = [before + counted[name] for name in names] or [before]
    return Lengths(np.max(sides, axis=0).tolist(), len(sides), int(sum(side.sum() for side in sides)))


def micro_batch(train: TrainConfig, data: Data, count: int = 1) -> tuple[int, int]:
    """(rows in one forward pass, passes in one optimizer step) of each of `count` processes.

    Packed rows lie end to end in one forward pass, and without a varlen kernel its attention mask grows with the square
    of their sum: on a CPU they go through one by one. With max_tokens_per_batch the passes are the fewest in which
    every step of the run keeps to it, and the rows their mean, rounded up; where the loss is a mean over rows, a part
    of the step that as many of the longest rows fit into. Raises SettingsError where the longest row alone does not.
    """
    rows, passes, budget = (
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.max_tokens_per_batch,
    )
    together = rows * passes
    if data.packed:
        return (1, together) if device().type == "cpu" else (rows, passes)
    if budget is None:
        return rows, passes
    found = token_lengths(data.train)
    most = budget // found.sequences
    longest = max(found.longest)
    if longest > most:
        record = data.train_records[data.train[found.longest.index(longest)]["row"]]
        what = f"{longest:,} tokens" if found.sequences == 1 else f"two answers of up to {longest:,} tokens"
        raise SettingsError(
            f"train.max_tokens_per_batch={budget}: {record.where} alone has {what}.",
            f"Set it to at least {longest * found.sequences}, or a smaller data.max_length.",
        )
    if by_row(data):
        each = next(part for part in range(together, 0, -1) if together % part == 0 and part * longest <= most)
        return each, together // each
    layout = BatchPlan(
        found, train.train_sampling_strategy, seed_of(train), together * count, passes, count, True, True
    )
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * layout.steps)
    needed = math.ceil(_most_runs(layout, most, math.ceil(steps / layout.steps)) / count)
    return math.ceil(together / needed), needed


def by_row(data: Data) -> bool:
    """Whether the loss is a mean over rows; else it is one over the labels of all passes of a step."""
    return data.kind not in ("prompt_completion", "text")


def seed_of(train: TrainConfig) -> int:
    """The seed of the order of rows."""
    seed = train.extra.get("data_seed")
    return train.seed if seed is None else int(seed)


def plan_batches(train: TrainConfig, data: Data, count: int) -> BatchPlan:
    """How the rows of a run will be laid out, counted from the data alone."""
    _, passes = micro_batch(train, data, count)
    together = train.per_device_train_batch_size * train.gradient_accumulation_steps * count
    strategy, cuts = train.train_sampling_strategy, train.max_tokens_per_batch is not None
    return BatchPlan(
        token_lengths(data.train), strategy, seed_of(train), together, passes, count, not by_row(data), cuts
    )


@dataclass(frozen=True)
class BatchPlan:
    """Where each row of an epoch goes.

    `rows`: in a step, of all processes. `passes`: forward passes that a step takes in each process. `count`: processes.
    `by_token`: the loss is a mean over the labels of all of them. `sorts`: a step is cut by length.
    """

    lengths: Lengths
    strategy: str
    seed: int
    rows: int
    passes: int
    count: int
    by_token: bool
    sorts: bool

    @property
    def steps(self) -> int:
        """In an epoch."""
        return math.ceil(len(self.lengths.longest) / self.rows)

    @property
    def each(self) -> int:
        """Rows in a pass of one process, where all passes have as many."""
        return max(1, self.rows // (self.passes * self.count))

    def passes_of(self, rows: int) -> int:
        """Forward passes of a step in each process; fewer than `passes` in the last step of an epoch alone."""
        if rows == self.rows:
            return self.passes
        if not self.sorts:
            return math.ceil(rows / (self.each * self.count))
        if self.by_token:
            return min(self.passes, math.ceil(rows / self.count))
        share = len(self._shares(range(rows))[0])
        fewest = math.ceil(share / self.each)
        return next((passes for passes in range(fewest, self.passes + 1) if share % passes == 0), fewest)

    def in_epoch(self) -> int:
        """Forward passes of an epoch, those of all processes."""
        whole, rest = divmod(len(self.lengths.longest), self.rows)
        return self.count * (whole * self.passes + (self.passes_of(rest) if rest else 0))

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch; rows of a step are neighbours."""
        import torch
        from accelerate.data_loader import SeedableRandomSampler
        from transformers.trainer_pt_utils import get_length_grouped_indices

        number = len(self.lengths.longest)
        if self.strategy == "sequential":
            return list(range(number))
        if self.strategy == "random":  # as accelerate has it for a trainer's own loader
            sampler = SeedableRandomSampler(range(number), data_seed=self.seed)
            sampler.set_epoch(epoch)
            return list(sampler)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        rows: list[int] = get_length_grouped_indices(self.lengths.longest, self.rows, generator=generator)
        whole = number // self.rows
        # the first step has the longest row, so that a lack of memory shows at once; within their windows steps go from
        # long to short, which training would see as a drift: they are shuffled
        places = [*range(min(whole, 1)), *(1 + torch.randperm(max(whole - 1, 0), generator=generator)).tolist()]
        steps = [rows[place * self.rows : (place + 1) * self.rows] for place in places]
        return [row for step in [*steps, rows[whole * self.rows :]] for row in step]

    def cut(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a step as passes: those of all processes for the first time, for the second, ….

        An empty one is for a process that has to take part, and has no row left to take.
        """
        if not self.sorts:
            size = self.each * self.count
            rounds = [rows[start : start + size] for start in range(0, len(rows), size)]
            return [batch for some in rounds for batch in last_round(some, self.count, self.each, self.by_token)]
        passes = self.passes_of(len(rows))
        if not self.by_token:
            shares = self._shares(rows)
            rows, share = [row for some in shares for row in some], len(shares[0])
        rows = sorted(rows, key=lambda row: -self.lengths.longest[row])
        if self.by_token:
            sizes = run_sizes([self.lengths.longest[row] for row in rows], passes * self.count)
        else:  # TRL gathers numbers of each row: processes have equally many at a time
            sizes = [share // passes + (turn < share % passes) for turn in range(passes) for _ in range(self.count)]
        ends = list(itertools.accumulate(sizes))
        return [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def _shares(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of a step for each process, where each of these has to have as many."""
        return last_round(rows, self.count, self.each * self.passes, by_token=False)

    def epoch(self, epoch: int) -> Iterable[list[int]]:
        """All passes of an epoch, in turn."""
        order = self.order(epoch)
        for start in range(0, len(order), self.rows):
            yield from self.cut(order[start : start + self.rows])

    def slots(self, rows: Sequence[int]) -> int:
        """Tokens of a pass, padding counted."""
        longest = max((self.lengths.longest[row] for row in rows), default=0)
        return len(rows) * longest * self.lengths.sequences


def padded_share(layout: BatchPlan) -> float:
    """Of the slots of the first epoch's padded batches, the share without a token."""
    return 1 - layout.lengths.total / sum(layout.slots(rows) for rows in layout.epoch(0))


def run_sizes(lengths: Sequence[int], number: int) -> list[int]:
    """Sizes of `number` runs of rows sorted from long to short, so that the largest has as few slots as possible; a run
    has as many slots for each of its rows as the first one has tokens. Empty ones at the end where there are not as
    many rows."""

    def within(most: int) -> list[int]:
        sizes, place = [], 0
        while place < len(lengths):
            sizes.append(min(most // lengths[place], len(lengths) - place))
            place += sizes[-1]
        return sizes

    low, high = lengths[0], lengths[0] * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(within(middle)) <= number else (middle + 1, high)
    sizes = within(low)
    while len(sizes) < min(number, len(lengths)):
        starts = [0, *itertools.accumulate(sizes)]
        largest = max((p for p, size in enumerate(sizes) if size > 1), key=lambda p: sizes[p] * lengths[starts[p]])
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    return sizes + [0] * (number - len(sizes))


def _most_runs(layout: BatchPlan, most: int, epochs: int) -> int:
    """Runs of at most `most` slots that any step of some epochs needs, its rows sorted by length."""
    import numpy as np

    lengths = np.asarray(layout.lengths.longest)

    def runs(order: Any) -> int:
        steps = np.zeros((math.ceil(len(order) / layout.rows), layout.rows), dtype=np.int64)
        steps.flat[: len(order)] = lengths[order]
        steps = -np.sort(-steps, axis=1)
        place, found = np.zeros(len(steps), dtype=np.int64), 0
        while len(steps := steps[place < layout.rows]):
            place = place[place < layout.rows]
            longest = steps[np.arange(len(steps)), place]
            if not longest.any():
                break
            found += 1
            place = np.where(longest > 0, place + most // np.maximum(longest, 1), layout.rows)
        return found

    bound = runs(np.argsort(-lengths, kind="stable")[: layout.rows])  # no step needs more than the longest rows
    needed = 0
    for epoch in range(epochs):
        needed = max(needed, runs(np.asarray(layout.order(epoch))))
        if needed >= bound:
            break
    return needed


def cuts_batches(train: TrainConfig) -> bool:
    """Whether rows are laid out here; else the trainer's own loader does as much."""
    return (
        distributed.count() > 1
        or train.max_tokens_per_batch is not None
        or train.train_sampling_strategy == "group_by_length"
    )


def check_loader(arguments: Any, train: TrainConfig) -> None:
    """Raises SettingsError for arguments of a trainer that would lay out the rows in another way."""
    if not cuts_batches(train) or hasattr(arguments, "num_generations"):
        return
    if arguments.dataloader_persistent_workers:
        raise SettingsError(
            "train.extra.dataloader_persistent_workers: the workers would keep the order of their first epoch.",
            "Leave it out.",
        )
    if arguments.auto_find_batch_size:
        raise SettingsError(
            "train.extra.auto_find_batch_size would change the rows of a step.",
            "Leave it out: where memory is short, more passes are made of the same step.",
        )
    if arguments.accelerator_config.dispatch_batches or arguments.accelerator_config.split_batches:
        raise SettingsError(
            "train.extra.accelerator_config: batches are shared out so that each row of an epoch counts once.",
            "Leave dispatch_batches and split_batches out.",
        )


def set_batches(trainer: Any, train: TrainConfig) -> None:
    """Give a trainer of transformers its rows in passes of ours, where its own loader cannot make them.

    It samples in its own way where it samples completions. The rows of its present train_dataset stay what they are.
    """
    args = trainer.args
    if not cuts_batches(train) or hasattr(args, "num_generations"):
        return
    rows, count = trainer.train_dataset, distributed.count()
    if args.dataloader_drop_last:
        together = args.per_device_train_batch_size * count
        together *= args.gradient_accumulation_steps if train.max_tokens_per_batch is not None else 1
        rows = rows.select(range(len(rows) - len(rows) % together))
    layout = BatchPlan(
        lengths=token_lengths(rows),
        strategy=args.train_sampling_strategy,
        seed=seed_of(train),
        rows=train.per_device_train_batch_size * train.gradient_accumulation_steps * count,
        passes=args.gradient_accumulation_steps,
        count=count,
        by_token="labels" in rows.column_names,
        sorts=train.max_tokens_per_batch is not None,
    )
    trainer.train_dataset = Passes(rows, layout, args)
    args.train_sampling_strategy = "sequential"


class Passes:
    """Rows as the passes of an epoch, a data set for torch's loader and a sequential sampler.

    The loader asks for per_device_train_batch_size indices at a time, and gets the rows of one pass, however many these
    are: by __getitems__, which it calls where there is one. accelerate gives the passes to the processes in turn, and
    says which epoch it is. `args`: the trainer's, which may be cut down to fewer rows on the way.
    """

    def __init__(self, rows: Any, layout: BatchPlan, args: Any) -> None:
        self.rows, self._layout, self.args = rows, layout, args
        self.epoch = 0
        self._order: tuple[int, list[int]] | None = None  # of an epoch
        self._cut: tuple[tuple[int, int, int], list[list[int]]] | None = None  # of a step, which several passes ask for
        self._shortest = min(range(len(rows)), key=layout.lengths.longest.__getitem__)

    @property
    def layout(self) -> BatchPlan:
        return replace(self._layout, passes=self.args.gradient_accumulation_steps)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Indices: as many for each pass as the loader takes together."""
        return self.layout.in_epoch() * int(self.args.per_device_train_batch_size)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        taken = self.pass_of(indices[0] // int(self.args.per_device_train_batch_size))
        if taken:
            found: list[dict[str, Any]] = self.rows.__getitems__(taken)
            return found
        row = self.rows[self._shortest]
        return [{**row, "labels": [IGNORED] * len(row["labels"])}]

    def pass_of(self, number: int) -> list[int]:
        """The rows of a pass of this epoch; each number is that of one process."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self.layout.order(self.epoch)
        layout = self.layout
        step, place = divmod(number, layout.passes * layout.count)
        if self._cut is None or self._cut[0] != (self.epoch, step, layout.passes):
            rows = self._order[1][step * layout.rows : (step + 1) * layout.rows]
            self._cut = (self.epoch, step, layout.passes), layout.cut(rows)
        return self._cut[1][place]
