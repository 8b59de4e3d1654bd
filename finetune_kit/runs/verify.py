"""Does what was saved give what was trained? A fresh process loads the folder, and the outputs are compared.

It runs reload.py, without this package, with plain transformers and PEFT. Both sides compute in the same arithmetic:
the type that the weights were loaded in, no mixed precision, no packed rows, nothing compiled, the same attention, the
same device. That the files hold every trained bit is shown apart from this, by saved_tensors.py.

How far outputs may be apart depends on that type. float32: 1e-4. In 16 bits each of the two additions of each layer
rounds the state by up to u of its size (2^-8 in bfloat16, 2^-11 in float16), as do the last norm and the head. Such
errors add up like a random walk: a logit is off by about r = u * sqrt(2 * layers + 2) * (deviation of the logits), and
the difference of two by sqrt(2) r. Allowed are 8 r, 5.7 deviations, which not one of ten million logits exceeds by
chance; and where the best token leads by more than 8 r, it must be the same one.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit import distributed
from finetune_kit.data.tokenise import sequences
from finetune_kit.errors import NumericsError, ResourceError
from finetune_kit.models import device as devices
from finetune_kit.models import language
from finetune_kit.models.adapters import is_adapter
from finetune_kit.models.classifier import definition
from finetune_kit.models.coverage import changed_in_place, without_wrappers
from finetune_kit.models.device import weight_dtype
from finetune_kit.models.precision import as_loaded
from finetune_kit.models.source import resolve_name
from finetune_kit.settings.schema import ModelConfig
from finetune_kit.training import resources

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4  # largest difference of a float32 logit or score after saving and loading
PROBE = 64  # tokens
EXPERTS = Path(devices.__file__).with_name("quantized_experts.py")  # which needs bitsandbytes when it is imported
ROUNDINGS = 8  # of 16 bits: as many times the rounding of a logit
REWARDS = "AutoModelForSequenceClassification"
# what a launcher tells its processes: the fresh one is alone
LAUNCHER = re.compile(r"ACCELERATE_|FSDP_|TORCHELASTIC_|(RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_\w+)$")
# of the allocators of CUDA, torch, Python and C++
SHORT_OF_MEMORY = ("out of memory", "not enough memory", "allocate memory", "MemoryError", "std::bad_alloc")

RELOAD = Path(__file__).with_name("reload.py")


class NotMade(ResourceError):
    """A proof could not be made here, for want of memory or of a package: nothing is known against the weights."""


@dataclass(frozen=True)
class Outputs:
    """What a model gives for some tokens: logits (1, tokens, vocabulary), or a score (1, 1), float32 on the CPU.

    `rounding`: how far a logit is off in 16 bits, about; 0 in float32.
    """

    logits: torch.Tensor
    rounding: float

    @property
    def tolerance(self) -> float:
        return max(TOLERANCE, ROUNDINGS * self.rounding)


@dataclass(frozen=True)
class Proof:
    """What the fresh process showed. `difference`: the largest one of a logit; None where `reason` says why no proof
    could be made."""

    difference: float | None
    tolerance: float
    dtype: str
    device: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As it is in report.json and merge.json."""
        made = {"tolerance": self.tolerance, "dtype": self.dtype, "device": self.device}
        return {
            "reload_max_logit_difference": self.difference,
            "reload": {"not_made": self.reason} if self.reason else made,
        }


def sentence(results: dict[str, Any]) -> str:
    """What results with a proof in them say of it, for a card."""
    difference, told = results["reload_max_logit_difference"], results["reload"]
    if difference is None:
        return (
            "After saving, every trained tensor was compared with memory, bit for bit. That a fresh process gives the "
            f"same outputs was not proven: {told['not_made']}."
        )
    return (
        "After saving, every trained tensor was compared with memory, bit for bit, and a fresh process loaded this "
        f"folder with plain libraries and reproduced its outputs to {difference:.1e} ({told['dtype']})."
    )


def auto_class(model: Any) -> str:
    """The auto class of transformers that loads a model like this one."""
    base = model.get_base_model() if is_adapter(model) else model
    return REWARDS if type(base).__name__.endswith("ForSequenceClassification") else language.class_of(base)


def probe_of(model: Any, data: Any) -> list[int]:
    """Tokens of a training row that prove the saved model: the first ones, or all where the last one's score counts."""
    ids = next(iter(sequences(data.train[0]).values()))[0]
    return list(ids if auto_class(model) == REWARDS else ids[:PROBE])


def outputs(model: Any, probe: list[int], dtype: torch.dtype | None = None) -> Outputs:
    """What the model in memory gives for token ids, as a process would that has just loaded it. It is left in
    evaluation mode. `dtype`: the coarsest type that it computes in; else that of its weights."""
    import torch

    causal = model.get_base_model() if is_adapter(model) else model
    heads: list[Any] = []
    hook = None
    if auto_class(model) == REWARDS:
        hook = causal.score.register_forward_pre_hook(lambda head, given: heads.append(given[0].detach()[0, -1]))
    try:
        with as_loaded(model), torch.inference_mode():
            logits: torch.Tensor = model.eval()(input_ids=torch.tensor([probe], device=model.device)).logits
            logits = logits.float().cpu()
            # a score is a sum over the state, of which each part has been rounded
            scored = (heads[0].float() * causal.score.weight[0].float()).norm() if heads else logits.std()
    finally:
        if hook is not None:
            hook.remove()
    layers = causal.config.get_text_config().num_hidden_layers
    return Outputs(logits, unit(dtype or model.dtype) * math.sqrt(2 * layers + 2) * float(scored))


def unit(dtype: torch.dtype) -> float:
    """By how much of its size a number is rounded, at most; 0 for float32, which TOLERANCE is for."""
    import torch

    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2


def probe_logits(model: Any, probe: list[int]) -> torch.Tensor:
    """The logits alone."""
    return outputs(model, probe).logits


def computed_in(model: Any, config: ModelConfig) -> torch.dtype:
    """The coarsest type of the arithmetic that the model in memory computes in, mixed precision left out."""
    import torch

    if devices.computes_in_bfloat16() and (config.load_in_4bit or distributed.is_sharded(model)):
        return torch.bfloat16  # 4-bit products, and shards under a policy of mixed precision that stays on
    return loaded_in(model, config) if not config.load_in_4bit else torch.float32


def loaded_in(model: Any, config: ModelConfig) -> torch.dtype:
    """The type that the model's weights were read in: those of an adapter's base, or its own."""
    dtype: torch.dtype = weight_dtype(config, trained_in_full=False) if is_adapter(model) else model.dtype
    return dtype


def prove(model: Any, config: ModelConfig, folder: Path, probe: list[int], expected: Outputs | None = None) -> Proof:
    """That a fresh process gives for `probe` what the model in memory gives, on its device, or, where two models do not
    fit there, both on the CPU, where the model in memory then stays.

    `expected`: the outputs of a model in shards, which all processes have computed. Raises NumericsError where the
    folder cannot be loaded or gives something else. A proof that cannot be made says so, and raises nothing.
    """
    import torch

    dtype = loaded_in(model, config)
    coarsest = computed_in(model, config)
    base = resolve_name(config.name_or_path) if is_adapter(model) else ""
    quantised = model.config.quantization_config.to_json_string(use_diff=False) if config.load_in_4bit else ""
    # 4-bit codes are another device's own, and shards are where they are
    elsewhere = [] if quantised or expected is not None else ["cpu"]
    reasons = []
    for device in dict.fromkeys([place(model), *elsewhere]):
        release()
        try:
            if device != place(model):
                model.to(device)
                release()
            here = expected if expected is not None else outputs(model, probe, coarsest)
            got = reload_logits(
                config,
                folder,
                probe,
                dtype,
                torch.device(device),
                base=base,
                quantised=quantised,
                stacks=stacks_of(model) if quantised else [],
                kept=changed_in_place(model) if quantised else [],
                kind=auto_class(model),
                class_code=definition(model.config) if auto_class(model) == REWARDS else "",
            )
        except NotMade as error:
            reasons.append(f"on {device} {error.message}")
            continue
        except (RuntimeError, MemoryError) as error:
            if not resources.out_of_memory(error):
                raise
            reasons.append(f"on {device} the model in memory ran out of it")
            continue
        return Proof(judged(here, got, folder), here.tolerance, _name(coarsest), device)
    return Proof(None, 0.0, _name(coarsest), place(model), "; ".join(reasons))


def stacks_of(model: Any) -> list[str]:
    """The base's names of the weights in 4 bits that no 4-bit layer holds (models/quantized_experts.py)."""
    from finetune_kit.models.quantized_experts import Weight4bit

    base = model.get_base_model() if is_adapter(model) else model
    weights = base.named_parameters()
    return [without_wrappers(name) for name, weight in weights if isinstance(weight, Weight4bit)]


def place(model: Any) -> str:
    """The device that a model is on, such as cuda:0."""
    return str(model.device)


def judged(here: Outputs, got: torch.Tensor, folder: Path) -> float:
    """The largest difference of two models' outputs. Raises NumericsError where it is more than rounding."""
    difference = float((got - here.logits).abs().max())
    top = here.logits.topk(min(2, here.logits.shape[-1]))
    leads = top.values[..., 0] - top.values[..., -1] > here.tolerance
    others = int((leads & (got.argmax(-1) != top.indices[..., 0])).sum())
    if not difference <= here.tolerance or others:
        more = f", and the best token is another one at {others} of {int(leads.sum())} places" if others else ""
        raise NumericsError(
            f"What was saved in {folder} is not what was trained: loaded, its outputs differ by {difference:.3g}, "
            f"where rounding explains {here.tolerance:.1g}{more}.",
            "The folder is kept for inspection. Please report this with its run.yaml.",
        )
    return difference


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reload_logits(
    model: ModelConfig,
    folder: Path,
    probe: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    base: str = "",
    quantised: str = "",
    stacks: Sequence[str] = (),
    kept: Sequence[str] = (),
    kind: str = language.CAUSAL,
    class_code: str = "",
) -> torch.Tensor:
    """What `folder` gives in a fresh process: an adapter on `base`, or a whole model where it is "".

    `kind`: the auto class of transformers that loads it. `class_code` makes one that transformers lacks.
    Raises NotMade for want of memory or of a package, NumericsError where transformers or PEFT cannot load it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        path, definition = Path(scratch) / "probe.safetensors", Path(scratch) / "definition.py"
        save_file({"ids": torch.tensor([probe])}, path)
        definition.write_text(class_code, encoding="utf-8")
        given = {
            "path": packages(),
            "folder": str(folder),
            "base": base or str(folder),
            "revision": model.revision or None,
            "trusted": model.trust_remote_code,
            "attention": model.attn_implementation or None,
            "quantised": quantised,
            "stacks": list(stacks),
            "kept": list(kept),
            "experts": str(EXPERTS),
            "definition": str(definition) if class_code else "",
            "dtype": _name(dtype),
            "device": str(device),
            "kind": kind,
            "probe": str(path),
        }
        # the base was loaded a moment ago, so that the cache has it
        alone = {name: value for name, value in os.environ.items() if not LAUNCHER.match(name)}
        code, said = in_a_fresh_process(RELOAD, json.dumps(given), {**alone, "HF_HUB_OFFLINE": "1"})
        if code:
            raise _failure(code, said, folder)
        logits: torch.Tensor = load_file(f"{path}.out")["logits"]
    return logits


def in_a_fresh_process(program: Path, argument: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and standard error of a Python of its own that runs the file `program` with one argument."""
    done = subprocess.run(
        [sys.executable, "-I", str(program), argument], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, done.stderr


def packages() -> list[str]:
    """Where the fresh process finds its packages: where this one does (PYTHONPATH, the user's own), but for the working
    folder, and this package's own folder where that is a checkout."""
    here = Path.cwd().resolve()
    checkout = Path(__file__).resolve().parents[1]
    own = {here, *([checkout] if checkout.name not in ("site-packages", "dist-packages") else [])}
    return [entry for entry in sys.path if entry and Path(entry).is_absolute() and Path(entry).resolve() not in own]


def _failure(code: int, said: str, folder: Path) -> NotMade | NumericsError:
    """What a fresh process that ended with `code` has failed of."""
    last = (said.strip().splitlines() or ["it said nothing"])[-1].strip()
    if any(sign in said for sign in SHORT_OF_MEMORY):
        return NotMade(f"the fresh process ran out of memory ({last[:200]})")
    if code < 0:
        name = signal.Signals(-code).name
        why = ", as a system does that is short of memory" if name == "SIGKILL" else ""
        return NotMade(f"the fresh process was ended by {name}{why}")
    if re.match(r"(ImportError|ModuleNotFoundError|importlib\.metadata\.PackageNotFoundError)\b", last):
        return NotMade(f"the fresh process lacks a package ({last[:200]})")
    return NumericsError(f"What was saved in {folder} cannot be loaded by transformers and PEFT:", last)


def release() -> None:
    """Give the memory of what nothing refers to back at once: modules refer to each other in circles."""
    gc.collect()
    resources.empty_cache()
