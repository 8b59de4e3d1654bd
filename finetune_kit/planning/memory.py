"""Memory of a run by part, in bytes, from the model's shapes and the rows: nothing is loaded.

Weights, gradients and optimizer state are exact. What a step needs beyond them is counted by rehearsing one
(fake_step.py). What the libraries, the C library's heap and the evaluation need is an estimate.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.evaluation.loss import IGNORED, LOGITS
from finetune_kit.evaluation.measure import MARGIN
from finetune_kit.models import quantization
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.coverage import without_wrappers
from finetune_kit.models.device import computes_in_bfloat16, device, weight_dtype
from finetune_kit.models.quantization import compute_dtype
from finetune_kit.models.source import load_model_config
from finetune_kit.packing import attention as kernel
from finetune_kit.packing.plan import make_plan
from finetune_kit.settings.schema import ModelConfig, RecipeConfig
from finetune_kit.system.terminal import format_bytes
from finetune_kit.training.batching import by_row, micro_batch, plan_batches, token_lengths
from finetune_kit.training.optimizer import optimizer_scratch, optimizer_state

if TYPE_CHECKING:
    from finetune_kit.planning.fake_step import Batch

log = logging.getLogger(__name__)

# In use before a weight is there: Python, torch, transformers, TRL and what they import; on a GPU the context of CUDA
# with its loaded kernels (0.4 to 0.6 GiB by card and driver) and cuBLAS's workspaces, 32 MiB each for it and cuBLASLt.
LIBRARIES = 560 * 2**20
GPU_CONTEXT = 512 * 2**20
WORKSPACES = 64 * 2**20
# On a CPU, glibc keeps freed tensors of up to 32 MiB in a heap. Small objects that live longer come to lie between
# them, so that holes stay which no tensor of the next layer fits into. They follow what a step allocates, which
# gradient checkpointing does not make less: a share of the activations without it. On six models of random weights the
# share was 0.0 to 0.45, median 0.23 (benchmarks/memory.py --holes); one shape differs between two steps by as much.
HEAP_HOLES = 0.25
LARGEST_IN_HEAP = 2**25


def memory(config: RecipeConfig, data: Data, policy: Any) -> dict[str, int]:
    """Bytes by part; their sum is the peak, of the GPU where there is one, else of the process.

    `policy`: the empty one of `config`; its types become those of training.
    """
    quantised = settle_types(policy, config.model)
    on_cuda = device().type == "cuda"
    gradients = sum(parameter.numel() * 4 for parameter in policy.parameters() if parameter.requires_grad)
    batch = longest_batch(config, data, policy)
    checkpointing = config.train.gradient_checkpointing
    step = allocated = step_beyond(config, data, policy, quantised, batch, checkpointing)
    step = max(step, gradients + optimizer_scratch(policy, config.train.optim))
    in_heap = lies_in_heap(batch, policy)
    if in_heap and checkpointing:
        allocated = step_beyond(config, data, policy, quantised, batch, checkpointing=False)
    return {
        **({"cuda_context": GPU_CONTEXT, "workspaces": WORKSPACES} if on_cuda else {"libraries": LIBRARIES}),
        "file_pages": file_pages(policy, config.model, quantised),
        "weights": weights(policy, config.model, quantised),
        "gradients": gradients,
        "optimizer_state": optimizer_state(policy, config.train.optim),
        "activations": step - gradients,
        "heap": int(HEAP_HOLES * (allocated - gradients)) if in_heap else 0,
        "evaluation": max(0, evaluation(config, data, policy) - step),
    }


def lies_in_heap(batch: Batch, policy: Any) -> bool:
    """Whether the batch's hidden states are small enough for the C library's heap."""
    states = batch.rows * batch.width * policy.config.get_text_config().hidden_size * 4
    return device().type == "cpu" and states < LARGEST_IN_HEAP


def settle_types(policy: Any, model: ModelConfig) -> Quantised:
    """Give an empty policy the types of training; returns the names of the weights that are in 4 bits.

    What is trained is float32, and so is what 4-bit loading leaves unquantised. A 4-bit weight gets the type that it
    is unpacked to.
    """
    import torch

    quantised = quantised_weights(policy) if model.load_in_4bit else Quantised()
    packed_weights = {id(policy.get_parameter(name)) for name in quantised.of_layers}
    stacks = {id(policy.get_parameter(name)) for name in quantised.stacks}
    for parameter in policy.parameters():
        if id(parameter) in packed_weights:
            parameter.data = parameter.data.to(compute_dtype(device(), computes_in_bfloat16()))
        elif id(parameter) in stacks:
            parameter.data = parameter.data.to(weight_dtype(model, trained_in_full=False))
        elif parameter.requires_grad or model.load_in_4bit:
            parameter.data = parameter.data.to(torch.float32)
    return quantised


@dataclass(frozen=True)
class Quantised:
    """Names of a policy's weights in 4 bits: those of bitsandbytes' layers, and the stacks that no layer holds."""

    of_layers: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[str, ...]:
        return self.of_layers + self.stacks


def quantised_weights(policy: Any) -> Quantised:
    """What 4-bit loading quantises of an empty policy, by its names within an adapter."""
    base = policy.get_base_model() if is_adapter(policy) else policy
    layers, stacks = quantization.layers(base), set(quantization.stacked(base))
    found: tuple[list[str], list[str]] = ([], [])
    for name, parameter in policy.named_parameters():
        own = without_wrappers(name.removeprefix("base_model.model."))
        if own in stacks:
            found[1].append(name)
        elif own.removesuffix(".weight") in layers and own.endswith(".weight") and not parameter.requires_grad:
            found[0].append(name)
    return Quantised(tuple(found[0]), tuple(found[1]))


def weights(policy: Any, model: ModelConfig, quantised: Quantised) -> int:
    """Bytes of parameters and buffers as training holds them, the state of quantised ones included."""
    in_4bit = {id(policy.get_parameter(name)) for name in quantised.every}
    tensors = itertools.chain(policy.parameters(), policy.buffers())
    plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors if id(tensor) not in in_4bit)
    sizes = [parameter.numel() for parameter in policy.parameters() if id(parameter) in in_4bit]
    return int(plain + sum(four_bit(size, model.bnb_4bit_use_double_quant) for size in sizes))


def in_4_bits(policy: Any, model: ModelConfig, quantised: Quantised) -> str:
    """Of the frozen base, what is in 4 bits and what is not, in bytes, for people; "" where nothing is."""
    if not quantised.every:
        return ""
    packed = {id(policy.get_parameter(name)) for name in quantised.every}
    kept: Counter[str] = Counter()
    for name, parameter in policy.named_parameters():
        if id(parameter) not in packed and not parameter.requires_grad:
            owner = without_wrappers(name).split(".")[-2]
            kept[owner] += parameter.numel() * parameter.element_size()
    sizes = [policy.get_parameter(name).numel() for name in quantised.every]
    small = sum(four_bit(size, model.bnb_4bit_use_double_quant) for size in sizes)
    whole = sum(kept.values())
    most = ", ".join(f"{owner} {format_bytes(size)}" for owner, size in kept.most_common(3))
    return (
        f"{sum(sizes):,} weights in {format_bytes(small)}; not quantised, in 32 bits: {format_bytes(whole)} ({most}); "
        f"{format_bytes(small + whole)} together"
    )


def file_pages(policy: Any, model: ModelConfig, quantised: Quantised) -> int:
    """Bytes of the model's file that stay mapped though nothing needs them: the system takes them back when it must.

    On a CPU, a tensor whose type is the file's lies in the mapped file. One of them, such as the embeddings, keeps all
    of it resident, and with it the weights that were read to be quantised.
    """
    if not quantised.every or device().type != "cpu":
        return 0
    stored = _file_dtype(model.name_or_path, model.revision)
    if stored != weight_dtype(model, trained_in_full=False):
        return 0
    return sum(int(policy.get_parameter(name).numel()) * stored.itemsize for name in quantised.every)


@functools.cache  # verifying the embedded model's files takes seconds
def _file_dtype(name_or_path: str, revision: str | None) -> Any:
    return load_model_config(ModelConfig(name_or_path=name_or_path, revision=revision)).dtype


def four_bit(size: int, double: bool) -> int:
    """Bytes of a layer of `size` weights in 4 bits: half a byte each, a table of 16 values, a scale for each 64.

    A scale is a float32. With double quantisation it is a byte, with a float32 for each 256 of them, their mean, and a
    table of 256 values.
    """
    blocks = ceil(size / 64)
    scales = blocks + 4 * ceil(blocks / 256) + 4 + 4 * 256 if double else 4 * blocks
    return ceil(size / 2) + 4 * 16 + scales


def step_beyond(
    config: RecipeConfig, data: Data, policy: Any, quantised: Quantised, batch: Batch, checkpointing: bool
) -> int:
    """Most bytes that a training step of `batch` needs beyond weights and optimizer state.

    Of a model whose code cannot run without numbers the gradients alone: a warning says so.
    """
    from finetune_kit.planning.fake_step import Setting, step_bytes

    setting = Setting(
        checkpointing=checkpointing,
        accumulates=micro_batch(config.train, data)[1] > 1,
        on_gpu=computes_in_bfloat16(),
        quantised=[name.removesuffix(".weight") for name in quantised.of_layers],
        stacks=quantised.stacks,
    )
    packed = [policy.get_parameter(name) for name in quantised.every]
    unpacked = max((weight.numel() * weight.element_size() for weight in packed), default=0)
    try:
        return unpacked + step_bytes(policy, batch, setting)
    except RuntimeError as error:  # torch has no one class for what its fake tensors cannot do
        log.warning("activations are not counted: a step of this model cannot be rehearsed (%s)", error)
        return sum(parameter.numel() * 4 for parameter in policy.parameters() if parameter.requires_grad)


def longest_batch(config: RecipeConfig, data: Data, policy: Any) -> Batch:
    """The batch that would need most: as many rows as are taken together, the longest ones; a pair has two samples.
    Where a step is cut by tokens, that of the first epoch with most of them."""
    import torch

    from finetune_kit.planning.fake_step import Batch

    rows, _ = micro_batch(config.train, data)
    found = token_lengths(data.train)
    places: Sequence[int] = range(len(data.train))
    if config.train.max_tokens_per_batch is not None and not by_row(data):
        layout = plan_batches(config.train, data, count=1)
        places = max(layout.epoch(0), key=layout.slots)
        rows = len(places)
    if data.packed:  # TRL lays the rows of a batch end to end, too
        width = min(rows * config.data.max_length, found.total)
        return Batch(1, width, False, width - 1, end_to_end=True)
    places = sorted(places, key=lambda place: -found.longest[place])[:rows]
    longest = [sample for place in places for sample in sequences(data.train[place]).values()]
    lengths = [len(ids) for ids, _ in longest]
    width = max(lengths)
    scored = sum(label != IGNORED for _, labels in longest for label in labels[1:])
    plan = None
    if not padded_because(config, policy):
        padded = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids, _ in longest])
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        plan = make_plan(padded, mask, share=True)
        if (attends := kernel.varlen_kernel(device())) is not None:
            plan = replace(plan, varlen=kernel.make_varlen(plan.segments, attends, padded.device))
    return Batch(len(longest), width, min(lengths) < width, scored, plan=plan)


def padded_because(config: RecipeConfig, policy: Any) -> str:
    """Why rows are planned padded on the device that is planned for; "" where they are packed. What only the loaded
    model can show is not known here."""
    import torch

    if not config.train.padding_free:
        return "train.padding_free=false"
    if config.train.neftune_noise_alpha:
        return "NEFTune scales its noise by the padded length"
    if (attention := policy.config._attn_implementation) != "sdpa":
        return f"the packed forward needs sdpa attention, not {attention}"
    return kernel.refusal(device(), torch.bfloat16, policy.config)


def planned_for(config: RecipeConfig, data: Data, policy: Any) -> dict[str, str]:
    """What a plan takes for granted: device, the types of frozen and of trained weights and of the arithmetic, how rows
    go through the layers, and what attends. `policy`: in the types of training."""
    import torch

    quantised = bool(config.model.load_in_4bit)
    trained_in_full = config.lora is None
    arithmetic = compute_dtype(device(), computes_in_bfloat16()) if quantised else torch.float32
    if not quantised:
        frozen = weight_dtype(config.model, trained_in_full)
        arithmetic = torch.bfloat16 if computes_in_bfloat16() else frozen
    names = {"frozen": "4-bit" if quantised else _name(frozen), "trained": "float32", "arithmetic": _name(arithmetic)}
    if all(parameter.requires_grad for parameter in policy.parameters()):
        del names["frozen"]
    reason = padded_because(config, policy)
    rows = "end to end, by TRL" if data.packed else f"padded ({reason})" if reason else "packed"
    by_segment = not reason and not data.packed
    varlen = by_segment and kernel.varlen_kernel(device()) is not None
    attention = "torch's varlen kernel" if varlen else "sdpa, segment by segment" if by_segment else ""
    return {
        "device": device().type,
        **names,
        "rows": rows,
        "attention": attention or str(policy.config._attn_implementation),
    }


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def evaluation(config: RecipeConfig, data: Data, policy: Any) -> int:
    """Bytes that the measurements before and after need beyond the weights, about: the larger of scoring and answering.

    Scoring holds at most LOGITS logits at a time, and a copy of one row of them. Answering keeps keys and values of all
    rows for all layers, one layer's twice while it grows, and three copies of each row's next logits.
    """
    if config.scores:  # its hidden states are those of a step, or fewer
        return 0
    shape = policy.config.get_text_config()
    size = policy.get_input_embeddings().weight.element_size()
    rows = [ids for row in data.held_out for ids, _ in sequences(row).values()]
    scoring = 4 * min(LOGITS, sum(sorted(map(len, rows))[-config.evaluate.batch_size :]) * shape.vocab_size)
    scoring += 8 * max(map(len, rows), default=0) * shape.vocab_size
    if config.evaluate.size == 0 or data.kind == "text" or not rows:
        return int(scoring)
    together = min(config.evaluate.batch_size, config.evaluate.size, len(rows))
    length = max(map(len, rows)) + (config.evaluate.max_new_tokens or MARGIN)
    kept = 2 * _kept(shape) * (shape.num_hidden_layers + 1)
    return int(max(scoring, together * (length * kept * size + 12 * shape.vocab_size)))


def _kept(shape: Any) -> int:
    """Numbers of a token's key in a layer. A state space keeps none; it counts as if it had full attention."""

    def of(name: str) -> int:
        try:
            return int(getattr(shape, name, None) or 0)
        except (AttributeError, ValueError, TypeError):  # of some configs it is another number for each layer
            return 0

    heads = of("num_attention_heads") or 1
    return (of("num_key_value_heads") or heads) * (of("head_dim") or of("hidden_size") // heads)
