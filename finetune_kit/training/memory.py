"""Memory of a run by part, in bytes, from the model's shapes and the rows: nothing is loaded.

Weights, gradients and optimizer state are exact. What a step needs beyond them is counted by rehearsing one
(rehearsal.py). What the libraries, the C library's heap and the evaluation need is an estimate.
"""

from __future__ import annotations

import functools
import itertools
import logging
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any

from finetune_kit.config import ModelConfig, RecipeConfig
from finetune_kit.data.load import Data
from finetune_kit.data.tokenise import sequences
from finetune_kit.evaluation.compare import MARGIN
from finetune_kit.evaluation.loss import IGNORED, LOGITS
from finetune_kit.model import kernel
from finetune_kit.model.fourbit import compute_dtype
from finetune_kit.model.layout import make_plan
from finetune_kit.model.load import computes_in_bfloat16, device, load_model_config, weight_dtype
from finetune_kit.training.arguments import DEFAULT_OPTIMIZER
from finetune_kit.training.batches import by_row, micro_batch, plan_layout

if TYPE_CHECKING:
    from finetune_kit.training.rehearsal import Batch

log = logging.getLogger(__name__)

# In use before a weight is there: Python, torch, transformers, TRL and what they import; on a GPU its context.
LIBRARIES = 560 * 2**20
GPU_CONTEXT = 512 * 2**20
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
    gradients = sum(parameter.numel() * 4 for parameter in policy.parameters() if parameter.requires_grad)
    batch = longest_batch(config, data, policy)
    checkpointing = config.train.gradient_checkpointing
    step = allocated = step_beyond(config, data, policy, quantised, batch, checkpointing)
    in_heap = lies_in_heap(batch, policy)
    if in_heap and checkpointing:
        allocated = step_beyond(config, data, policy, quantised, batch, checkpointing=False)
    return {
        "libraries": GPU_CONTEXT if device().type == "cuda" else LIBRARIES,
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


def settle_types(policy: Any, model: ModelConfig) -> list[str]:
    """Give an empty policy the types of training; returns the names of the layers whose weights are in 4 bits.

    What is trained is float32, and so is what 4-bit loading leaves unquantised. A 4-bit weight gets the type that it
    is unpacked to.
    """
    import torch

    quantised = quantised_layers(policy) if model.load_in_4bit else {}
    packed_weights = {id(layer.weight) for layer in quantised.values()}
    for parameter in policy.parameters():
        if id(parameter) in packed_weights:
            parameter.data = parameter.data.to(compute_dtype(device(), computes_in_bfloat16()))
        elif parameter.requires_grad or model.load_in_4bit:
            parameter.data = parameter.data.to(torch.float32)
    return list(quantised)


def quantised_layers(policy: Any) -> dict[str, Any]:
    """The layers that 4-bit loading quantises: every linear layer of the base but the head. Name -> layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = set(policy.get_output_embeddings().modules())
    return {
        name: module
        for name, module in policy.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and not module.weight.requires_grad and module not in head
    }


def weights(policy: Any, model: ModelConfig, quantised: list[str]) -> int:
    """Bytes of parameters and buffers as training holds them, the state of quantised ones included."""
    in_4bit = {id(policy.get_submodule(name).weight) for name in quantised}
    tensors = itertools.chain(policy.parameters(), policy.buffers())
    plain = sum(tensor.numel() * tensor.element_size() for tensor in tensors if id(tensor) not in in_4bit)
    sizes = [parameter.numel() for parameter in policy.parameters() if id(parameter) in in_4bit]
    return int(plain + sum(four_bit(size, model.bnb_4bit_use_double_quant) for size in sizes))


def file_pages(policy: Any, model: ModelConfig, quantised: list[str]) -> int:
    """Bytes of the model's file that stay mapped though nothing needs them: the system takes them back when it must.

    On a CPU, a tensor whose type is the file's lies in the mapped file. One of them, such as the embeddings, keeps all
    of it resident, and with it the weights that were read to be quantised.
    """
    if not quantised or device().type != "cpu":
        return 0
    stored = _file_dtype(model.name_or_path, model.revision)
    if stored != weight_dtype(model, trained_in_full=False):
        return 0
    return sum(int(policy.get_submodule(name).weight.numel()) * stored.itemsize for name in quantised)


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


def optimizer_state(policy: Any, optim: str) -> int:
    """Bytes of the optimizer's state: exact for AdamW, AdamW and Lion of bitsandbytes, Adafactor and SGD without
    momentum; others count as AdamW."""
    import torch

    name = DEFAULT_OPTIMIZER if optim == "auto" else optim
    embeddings = {id(m.weight) for m in policy.modules() if isinstance(m, torch.nn.Embedding)}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    if name == "sgd":
        return 0
    if name == "adafactor":
        return sum(_adafactor(parameter.shape) for parameter in trained)
    by_bitsandbytes = name.endswith(("_8bit", "_32bit")) or name in ("ademamix", "rmsprop_bnb")
    if not by_bitsandbytes or name == "adamw_torch_8bit":
        return sum(8 * parameter.numel() + 4 for parameter in trained)  # two moments and the step's number
    moments = 1 if "lion" in name or "rmsprop" in name else 3 if "ademamix" in name else 2
    total = 0
    for parameter in trained:
        size = parameter.numel()
        # small weights and embeddings keep float32; the others a byte each, and a float32 scale for 256
        small = "8bit" not in name or size < 4096 or id(parameter) in embeddings
        total += moments * (4 * size if small else size + 4 * ceil(size / 256))
    return total + (4 * 256 * min(moments, 2) if "8bit" in name else 0)  # a table of 256 values with and without sign


def _adafactor(shape: Any) -> int:
    """A float32 for each row and each column of a matrix, for each element of a vector; and the weights' mean size."""
    if len(shape) < 2:
        return int(4 * shape.numel() + 4)
    return int(4 * (shape[:-1].numel() + shape[:-2].numel() * shape[-1]) + 4)


def step_beyond(
    config: RecipeConfig, data: Data, policy: Any, quantised: list[str], batch: Batch, checkpointing: bool
) -> int:
    """Most bytes that a training step of `batch` needs beyond weights and optimizer state.

    Of a model whose code cannot run without numbers, such as a mixture of experts, the gradients alone: a warning
    says so.
    """
    from finetune_kit.training.rehearsal import Setting, step_bytes

    setting = Setting(
        checkpointing=checkpointing,
        accumulates=micro_batch(config.train, data)[1] > 1,
        on_gpu=computes_in_bfloat16(),
        quantised=quantised,
    )
    layers = [policy.get_submodule(name).weight for name in quantised]
    unpacked = max((weight.numel() * weight.element_size() for weight in layers), default=0)
    try:
        return unpacked + step_bytes(policy, batch, setting)
    except RuntimeError as error:  # torch has no one class for what its fake tensors cannot do
        log.warning("activations are not counted: a step of this model cannot be rehearsed (%s)", error)
        return sum(parameter.numel() * 4 for parameter in policy.parameters() if parameter.requires_grad)


def longest_batch(config: RecipeConfig, data: Data, policy: Any) -> Batch:
    """The batch that would need most: as many rows as are taken together, the longest ones; a pair has two samples.
    Where a step is cut by tokens, that of the first epoch with most of them."""
    import torch

    from finetune_kit.training.rehearsal import Batch

    rows, _ = micro_batch(config.train, data)
    samples = [list(sequences(row).values()) for row in data.train]
    if config.train.max_tokens_per_batch is not None and not by_row(data):
        layout = plan_layout(config.train, data, count=1)
        samples = [samples[row] for row in max(layout.epoch(0), key=layout.slots)]
        rows = len(samples)
    if data.packed:  # TRL lays the rows of a batch end to end, too
        width = min(rows * config.data.max_length, sum(len(ids) for row in samples for ids, _ in row))
        return Batch(1, width, False, width - 1, end_to_end=True)
    samples.sort(key=lambda row: -max(len(ids) for ids, _ in row))
    longest = [sample for row in samples[:rows] for sample in row]
    lengths = [len(ids) for ids, _ in longest]
    width = max(lengths)
    scored = sum(label != IGNORED for _, labels in longest for label in labels[1:])
    plan = None
    unpadded = config.train.padding_free and not config.train.neftune_noise_alpha
    unpadded = unpadded and not kernel.refusal(device(), torch.bfloat16, policy.config)
    if unpadded and policy.config._attn_implementation == "sdpa":
        padded = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids, _ in longest])
        mask = torch.tensor([[1] * length + [0] * (width - length) for length in lengths])
        plan = make_plan(padded, mask, share=True)
        if (attends := kernel.varlen_kernel(device())) is not None:
            plan = replace(plan, varlen=kernel.make_varlen(plan.segments, attends, padded.device))
    return Batch(len(longest), width, min(lengths) < width, scored, plan=plan)


def evaluation(config: RecipeConfig, data: Data, policy: Any) -> int:
    """Bytes that the measurements before and after need beyond the weights, about: the larger of scoring and answering.

    Scoring holds at most LOGITS logits at a time, and a copy of one row of them. Answering keeps keys and values of all
    rows for all layers, one layer's twice while it grows, and three copies of each row's next logits.
    """
    shape = policy.config.get_text_config()
    size = policy.get_input_embeddings().weight.element_size()
    rows = [ids for row in data.held_out for ids, _ in sequences(row).values()]
    scoring = 4 * min(LOGITS, sum(sorted(map(len, rows))[-config.evaluate.batch_size :]) * shape.vocab_size)
    scoring += 8 * max(map(len, rows), default=0) * shape.vocab_size
    if config.evaluate.size == 0 or data.kind == "text" or not rows:
        return int(scoring)
    together = min(config.evaluate.batch_size, config.evaluate.size, len(rows))
    length = max(map(len, rows)) + (config.evaluate.max_new_tokens or MARGIN)
    heads = shape.num_attention_heads
    wide = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    kept = 2 * (getattr(shape, "num_key_value_heads", None) or heads) * wide * (shape.num_hidden_layers + 1)
    return int(max(scoring, together * (length * kept * size + 12 * shape.vocab_size)))
