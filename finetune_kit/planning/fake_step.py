"""One training step on tensors without content: how many bytes are alive at once, for any model, before it is loaded.

Torch's fake tensors have shapes, types and lifetimes, but no memory behind them. The model's own code runs on them,
with the attention, the checkpointing and the head that training uses, and each storage counts from the operation that
makes it until it is freed.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import types
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_kit.models.coverage import layers_of
from finetune_kit.packing import forward as packed
from finetune_kit.packing.head import is_plain, label_log_probs
from finetune_kit.packing.plan import Plan

log = logging.getLogger(__name__)

# TRL's head works on tiles of this many tokens and words, and measures these besides the loss
TILE_TOKENS, TILE_WORDS = 4096, 32768
MEASURED = ("log_probs", "entropy", "is_top1")
MOST_OPERATIONS = 20_000  # of a rehearsed step: some 5 s; a Llama with adapters takes 10,000
MOST_IN_A_BLOCK = 4_000  # of them, in one block's forward pass: a Llama's with adapters takes 800
SHORT = (4, 8)  # tokens of the rows in the place of those that take more


class TooLong(RuntimeError):
    """A step of more operations than can be waited for."""


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass.

    `rows`, `width`: its shape, padding included. `padded`: some row is shorter. `scored`: tokens that have a label.
    `end_to_end`: each row holds several samples, kept apart by their positions. `plan`: what the packed forward makes
    of the rows; None where they go through as they are.
    """

    rows: int
    width: int
    padded: bool
    scored: int
    end_to_end: bool = False
    plan: Plan | None = None


@dataclass(frozen=True)
class Setting:
    """How a step is taken. `accumulates`: gradients of an earlier pass are there already. `on_gpu`: with mixed
    precision and TRL's Triton head. `quantised`: names of the layers that unpack their weights for each product.
    """

    checkpointing: bool
    accumulates: bool
    on_gpu: bool
    quantised: Collection[str] = ()
    stacks: Collection[str] = ()


def step_bytes(policy: Any, batch: Batch, setting: Setting) -> int:
    """Most bytes alive in one forward and backward pass beyond the weights: activations, gradients, logits.

    `policy`: on the meta device, in the types that training has; it is left as it is. Blocks of one kind are alike, so
    two and three of each are run and the rest is a straight line: until the gradient has left the last block the most
    grows with each block's activations, from then on with each block's gradients. Where a step takes more operations
    than can be waited for, as in a loop over a row's tokens, two short rows are run, and that is a straight line, too.
    Raises RuntimeError where the model's code cannot run on tensors without content.
    """
    try:
        return max(_by_blocks(policy, batch, setting))
    except TooLong as error:
        tokens = batch.rows * batch.width if batch.plan is None else len(batch.plan.tokens)
        log.warning("activations are those of rows of %d and %d tokens, drawn out: %s", *SHORT, error)
        few, many = (
            _by_blocks(policy, Batch(1, width, False, max(1, width * batch.scored // tokens)), setting, least=1)
            for width in SHORT
        )
        steps = (tokens - SHORT[1]) / (SHORT[1] - SHORT[0])
        return max(int(b + steps * (b - a)) for a, b in zip(few, many, strict=True))


def _by_blocks(policy: Any, batch: Batch, setting: Setting, least: int = 2) -> list[int]:
    """Most bytes until the gradient has left the last block, and from then on; `least`: how many blocks of a kind are
    run, and one more of each."""
    kinds = _kinds(layers_of(policy))
    first = sorted(place for places in kinds for place in places[:least])
    most = _rehearse(policy, first, batch, setting)
    growth = [0] * len(most)
    for places in kinds:
        if len(places) > least:
            more = _rehearse(policy, sorted([*first, places[least]]), batch, setting)
            growth = [g + (len(places) - least) * (b - a) for g, a, b in zip(growth, most, more, strict=True)]
    return [a + g for a, g in zip(most, growth, strict=True)]


def _kinds(blocks: Iterable[Any]) -> list[list[int]]:
    """The places of the blocks that are built alike, for each way that they are built."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for place, block in enumerate(blocks):
        parts = tuple((name, type(part).__name__) for name, part in block.named_modules())
        weights = tuple((name, tuple(weight.shape)) for name, weight in block.named_parameters())
        found.setdefault((parts, weights), []).append(place)
    return list(found.values())


def _rehearse(policy: Any, places: Sequence[int], batch: Batch, setting: Setting) -> tuple[int, int]:
    """(most bytes until the gradient has left the last of the blocks at `places`, most from then on)."""
    policy, blocks, stacks = _copy(policy, places, setting.stacks)
    causal = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    _as_in_training(policy, causal, batch, setting)
    with _quiet_torch(), FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes(policy, stacks)
        live = Live(policy, bound=MOST_OPERATIONS)
        for block in blocks:
            block.register_forward_pre_hook(live.begin)
        if len(blocks):
            blocks[-1].register_forward_pre_hook(live.watch)
        with live, Between(live):
            if setting.accumulates:
                for parameter in policy.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with torch.autocast("cpu", torch.bfloat16) if setting.on_gpu else contextlib.nullcontext():
                loss = _loss(causal, batch, setting)
            live.begun = None
            torch.autograd.backward(loss)  # Tensor's own method would be one operation to Between
    return live.most[0], live.most[1]


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """Where a fake tensor cannot do something, torch logs a page besides raising the error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _copy(
    policy: Any, places: Sequence[int], stacks: Collection[str]
) -> tuple[Any, torch.nn.ModuleList, Collection[str]]:
    """A policy of its own with the blocks at `places` only, those, and the names that `stacks` have in it."""
    blocks = layers_of(policy)
    every = list(blocks)
    known = {id(policy.get_parameter(name)) for name in stacks}
    del blocks[:]
    blocks.extend(every[place] for place in places)
    renamed = {name for name, parameter in policy.named_parameters() if id(parameter) in known}
    fewer = copy.deepcopy(policy)
    home = next((name for name, module in policy.named_modules() if module is blocks), None)
    kept = blocks if home is None else fewer.get_submodule(home)  # None: there are no blocks to be had
    del blocks[:]
    blocks.extend(every)
    _name_kinds(fewer.config.get_text_config(), places, len(every))
    return fewer, kept, renamed


def _name_kinds(config: Any, places: Sequence[int], count: int) -> None:
    """Keep what a config says of each block, such as layer_types: some models ask it by a block's place."""
    for value in vars(config).values():
        if isinstance(value, list) and len(value) == count:
            value[:] = [value[place] for place in places]


def _as_in_training(policy: Any, causal: Any, batch: Batch, setting: Setting) -> None:
    policy.train()
    if batch.plan is not None:
        packed.register()
        causal.config._attn_implementation = packed.ATTENTION
    for name, layer in policy.named_modules():
        if name in setting.quantised:
            layer.forward = types.MethodType(_unpacked(layer.forward), layer)
    if setting.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename it
            policy.gradient_checkpointing_enable()
        if policy is not causal:
            policy.enable_input_require_grads()


def _unpacked(product: Any) -> Any:
    """The forward pass of a 4-bit layer: in the type that its weight is unpacked to, and back to that of its input."""

    def forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = product(inputs.to(layer.weight.dtype))
        return outputs.to(inputs.dtype)

    return forward


def _give_shapes(policy: Any, stacks: Collection[str]) -> None:
    """Put fake tensors in the place of those on the meta device; weights that are one stay one."""
    made: dict[int, torch.nn.Parameter] = {}
    for home, module in policy.named_modules():
        for name, old in module._parameters.items():
            if old is not None:
                if f"{home}.{name}" in stacks:
                    made[id(old)] = _shape_in_4_bits(old)
                if id(old) not in made:
                    made[id(old)] = torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad)
                module._parameters[name] = made[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _shape_in_4_bits(weight: torch.Tensor) -> torch.nn.Parameter:
    """A stack of experts in 4 bits without content, which any operation unpacks."""
    from finetune_kit.models.quantized_experts import Weight4bit

    class Shape(Weight4bit):
        def unpacked(self) -> torch.Tensor:
            return self.codes.new_empty(self.shape, dtype=self.dtype)

    codes = torch.empty(-(-weight.numel() // 2), dtype=torch.uint8)
    shape = types.SimpleNamespace(shape=weight.shape, dtype=weight.dtype)
    return torch.nn.Parameter(Shape(codes, shape), requires_grad=False)


def _loss(causal: Any, batch: Batch, setting: Setting) -> torch.Tensor:
    """A forward pass as TRL makes it. Nothing but the loss holds on to its tensors."""
    hidden = causal.base_model(**_inputs(batch), use_cache=False).last_hidden_state
    if hasattr(causal, "score"):  # of each row the score at its end
        return causal.score(hidden[:, : batch.rows]).sum()  # type: ignore[no-any-return]
    head = causal.get_output_embeddings()
    if batch.plan is not None and is_plain(head):
        hidden = hidden[0][torch.zeros(batch.scored, dtype=torch.long)]
        targets = torch.zeros(batch.scored, dtype=torch.long)
        return label_log_probs(hidden, head.weight, head.bias, targets, MEASURED[1:])["log_probs"].sum()
    if batch.plan is not None:  # the packed forward hands out the positions with a label, and one more
        hidden = hidden[0][torch.zeros(batch.scored + 1, dtype=torch.long)][None]
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    if setting.on_gpu:
        scored = hidden[torch.zeros(batch.scored, dtype=torch.long)]
        return TritonHead.apply(scored, head.weight).sum()  # type: ignore[no-any-return, no-untyped-call]  # torch's
    from trl.kernels import ChunkedLogProbFunction

    targets = torch.zeros(len(hidden), dtype=torch.long)
    answer = ChunkedLogProbFunction.apply(hidden, head.weight, head.bias, targets, 1.0, TILE_WORDS, None, 1.0, MEASURED)
    loss: torch.Tensor = answer[0].sum()
    return loss


def _inputs(batch: Batch) -> dict[str, Any]:
    plan = batch.plan
    if plan is not None:
        row = torch.zeros(1, len(plan.tokens), dtype=torch.long)
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
        return {"input_ids": row, "position_ids": row.clone(), "attention_mask": unused, "packed": plan}
    ids = torch.zeros(batch.rows, batch.width, dtype=torch.long)
    if batch.end_to_end:
        return {"input_ids": ids, "position_ids": ids.clone()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if batch.padded else None}


class Live(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on; `most` has one maximum a phase.

    `bound`: of a rehearsal, the operations after which it raises TooLong; None: what runs is real.
    """

    def __init__(self, policy: Any, bound: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.bound, self.operations = bound, 0
        self.begun: int | None = None  # how many there were when the block began whose forward pass is on
        self.inside = False  # an operation that Python has called
        self.now = 0
        self.most = [0, 0]
        self.phase = 0
        weights = [*policy.parameters(), *policy.buffers()]
        self.known = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.bound is None:
            outputs = func(*args, **(kwargs or {}))
        else:
            self.operations += 1
            if not self.inside:
                self.look()
            # the products of a mixture's experts: torch's own, without content, take bfloat16 alone
            grouped = str(func).startswith("aten._grouped_mm")
            outputs = _grouped_product(*args[:3]) if grouped else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def look(self) -> None:
        """Raises TooLong where there were more operations than are waited for."""
        if self.bound is not None and self.operations > self.bound:
            raise TooLong(f"a step of a few blocks takes more than {self.bound:,} operations")
        if self.begun is not None and self.operations > self.begun + MOST_IN_A_BLOCK:
            raise TooLong(f"the forward pass of one block takes more than {MOST_IN_A_BLOCK:,} operations")

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most[self.phase] = max(self.most[self.phase], self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def begin(self, block: Any, args: tuple[Any, ...]) -> None:
        """Before a block's forward pass: its operations are counted by themselves."""
        self.begun = self.operations

    def watch(self, block: Any, args: tuple[Any, ...]) -> None:
        """Before a block's forward pass: the second phase begins when the gradient comes out of it."""
        if args[0].requires_grad:
            args[0].register_hook(self._turn)

    def _turn(self, gradient: torch.Tensor) -> None:
        self.phase = 1


class Between(TorchFunctionMode):
    """Has Live look between two operations of the model's code: inside of one, such as an assignment to a slice, torch
    may be where no error of Python's can come through, and the process would end."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.live.look()
        self.live.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.live.inside = False


def _grouped_product(one: torch.Tensor, other: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """What a grouped product makes, in shape and type: (s, k) by (e, k, n) is (s, n); (m, s) by (s, n), cut along s at
    the e ends, is (e, m, n)."""
    if other.dim() == 3:
        return one.new_empty(one.shape[0], other.shape[-1])
    return one.new_empty(len(ends), one.shape[0], other.shape[-1])


class TritonHead(torch.autograd.Function):
    """The memory of TRL's head with Triton kernels, which work in place: one tile of logits, gradients in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        _tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_WORDS, dtype=dtype)
        _words = weight[:TILE_WORDS].to(dtype)
        return torch.empty(len(hidden))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        by_hidden, by_weight = (
            torch.empty_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=True)
        )
        _tile = torch.empty(min(len(hidden), TILE_TOKENS), TILE_WORDS, dtype=ctx.dtype)
        _words = weight[:TILE_WORDS].to(ctx.dtype)
        return (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
        )
