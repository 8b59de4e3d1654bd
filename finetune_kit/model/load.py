"""Tokenizer and policy, from the embedded default, a local folder or the Hub. Safetensors only."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_kit.config import LoraConfig, ModelConfig
from finetune_kit.errors import FinetuneKitError, ResourceError, SecurityError, SettingsError
from finetune_kit.model import adapters, classifier, fourbit, language
from finetune_kit.model.adapter_config import read_adapter_config
from finetune_kit.model.embedded import HUB_ID, embedded_folder
from finetune_kit.model.embedded import LICENSE as EMBEDDED_LICENSE
from finetune_kit.model.embedded import NAME as EMBEDDED
from finetune_kit.model.folder import check_files, check_model, check_settings, check_weights, settings_with
from finetune_kit.names import near_path
from finetune_kit.network import hub_reachable
from finetune_kit.parsing import read_object
from finetune_kit.terminal import doing
from finetune_kit.values import LARGEST, load_text

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ITS_OWN = {"local_files_only": True, "trust_remote_code": False}  # a run's folder is never asked for code
TRUST = "model.trust_remote_code=true model.revision=<its commit, 40 digits>, both on the command line"
PLANNED: ContextVar[str | None] = ContextVar("PLANNED", default=None)  # the kind of device that a plan is for
BASE_RECORD = "base.json"  # beside an adapter: which base it belongs to
# settings of sampling, with the value that asks for nothing
SAMPLES = {
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0},
    **{"epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
}
# settings of generation that act with others alone, and that transformers refuses to save without them
IDLE = (
    *("early_stopping", "length_penalty", "cache_implementation", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "num_return_sequences", "pad_token_id"),
)
OFFLINE_DEFAULT = f"Without a network, the embedded default works: model.name_or_path={EMBEDDED}"


def resolve_name(name_or_path: str, weights: bool = False) -> str:
    """What transformers is to load: the embedded model's folder, a local folder, or a Hub id.

    Raises SettingsError for a path that is not there, SecurityError for a folder whose weights are pickles; with
    `weights`, SettingsError for a folder without any: from its shapes a run can be planned, not made.
    """
    if name_or_path == EMBEDDED:
        return str(embedded_folder())
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            what = "an adapter" if (folder / "adapter_config.json").is_file() else "no model: it has no config.json"
            raise SettingsError(f"model.name_or_path={name_or_path} is {what}.", "Name the folder of a base model.")
        if not any(folder.glob("*.safetensors")):
            pickles = [path.name for path in folder.glob("*.bin")] + [path.name for path in folder.glob("*.pt")]
            if pickles:
                raise SecurityError(
                    f"{name_or_path} has weights only as pickle ({pickles[0]}), which can run code when it is read.",
                    "Get the model as safetensors.",
                )
            if weights:
                raise SettingsError(
                    f"{name_or_path} holds no *.safetensors file.", "Get the model's weights as safetensors."
                )
        return str(folder)
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1:
        raise SettingsError(
            f"model.name_or_path={name_or_path}: no such folder.",
            f"{near_path(name_or_path)}Name it: model.name_or_path=FOLDER. {OFFLINE_DEFAULT}",
        )
    return name_or_path


def load_tokenizer(model: ModelConfig, saved: Path | None = None, weights: bool = True) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padded on the right, with a pad token that ends nothing where the vocabulary has one.

    `saved`: a finished run's folder to take it from, which need not hold a model. `weights`: the model's are going to
    be needed, so a folder without any is refused now.
    """
    from transformers import AutoTokenizer

    if saved:
        check_files(saved)
        check_settings(saved)
    with _said_plainly(model), doing(f"loading the tokenizer of {public_name(model.name_or_path)}"):
        source = {"pretrained_model_name_or_path": saved, **ITS_OWN} if saved else _from(model, weights)
        if lacks_tokenizer(folder := Path(str(source["pretrained_model_name_or_path"]))):
            raise SettingsError(
                f"{folder} has no tokenizer: there is neither a tokenizer.json nor another vocabulary file.",
                "Put the model's tokenizer.json and tokenizer_config.json there.",
            )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if tokenizer.eos_token is None:
        raise SettingsError(f"The tokenizer of {model.name_or_path} has no end token.", "Set eos_token in its config.")
    if tokenizer.chat_template is None and saved is None:
        tokenizer.chat_template = _processors_template(model)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        spare = [token for token in tokenizer.all_special_tokens if token not in taken]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _processors_template(model: ModelConfig) -> str | None:
    """The chat template that a model which reads more than text keeps with its processor; None where it has none."""
    if not language.has_parts(load_model_config(model)):
        return None
    for file in ("chat_template.json", "processor_config.json"):
        path = _file_of(model, file)
        found = read_object(path, SettingsError, "Get the model again.").get("chat_template") if path else None
        if isinstance(found, str):
            return found
    return None


def _file_of(model: ModelConfig, file: str) -> Path | None:
    """A file beside the model's weights, in its folder or on the Hub; None where it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    name = resolve_name(model.name_or_path)
    if Path(name).is_dir():
        return Path(name) / file if (Path(name) / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=model.revision, local_files_only=not hub_reachable()))
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a folder of a model is here, and no vocabulary in it."""
    patterns = ("tokenizer.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")
    return folder.is_dir() and not any(path for pattern in patterns for path in folder.glob(pattern))


def load_model_config(model: ModelConfig) -> PretrainedConfig:
    """The shapes of the model, without its weights."""
    from transformers import AutoConfig

    with _said_plainly(model):
        return AutoConfig.from_pretrained(**_from(model))


def weight_dtype(model: ModelConfig, trained_in_full: bool) -> torch.dtype:
    """float32 for weights that are trained; bfloat16 for frozen ones where the device computes in it."""
    import torch

    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        if trained_in_full and dtype != torch.float32:
            raise SettingsError(
                f"model.dtype={model.dtype}: weights that are trained need float32, or small updates round to nothing.",
                "Leave it out: on a GPU the arithmetic is done in bfloat16 all the same. Or train an adapter: lora_sft",
            )
        return dtype
    return torch.bfloat16 if computes_in_bfloat16() and not trained_in_full else torch.float32


def computes_in_bfloat16() -> bool:
    """True on a GPU with bfloat16 units. On a CPU without them bfloat16 is eight times slower than float32.

    Everything that depends on it asks this function; a GPU without them trains in float32.
    """
    return _has_bfloat16_units()


def _has_bfloat16_units() -> bool:
    """Where a test puts another device's answer."""
    import torch

    if (kind := PLANNED.get()) is not None:
        return kind == "cuda"
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def device() -> torch.device:
    """CUDA, else MPS, else the CPU; inside `planning_for`, what is planned for."""
    import torch

    if (kind := PLANNED.get()) is not None:
        return torch.device(kind)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def planning_for(kind: str | None) -> Iterator[None]:
    """In here `device` and `computes_in_bfloat16` answer for a machine with a cuda, cpu or mps device, to count what it
    would need: nothing may be put on it. cuda is a GPU with bfloat16 units, unless the one here is asked for. None, or
    the kind that is here: this machine.
    """
    token = PLANNED.set(None)
    if kind not in (None, device().type):
        PLANNED.set(kind)
    try:
        yield
    finally:
        PLANNED.reset(token)


def load_base(
    model: ModelConfig, trained_in_full: bool = False, auto_class: str | None = None, **own: Any
) -> PreTrainedModel:
    """The language model on its device, in evaluation mode; with model.load_in_4bit quantised while it loads.

    `auto_class`: of transformers, for another head. `own`: further settings of the model's config, such as num_labels.
    A checkpoint that reads more than text is loaded as its own class; what is no part of the language model is frozen.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    quantised = {}
    packing: Any = nullcontext()
    writes = auto_class is None
    auto_class = auto_class or language_class(model)
    own_heads = ("score.",) if own else ("no head",)  # a new head is random
    if model.load_in_4bit:
        if trained_in_full:
            raise SettingsError("model.load_in_4bit: quantised weights cannot be trained.", "Run qlora_sft")
        for note in fourbit.check_device(device()):
            _say_once(note)
        fourbit.check_base(load_model_config(model), model.name_or_path)
        quantised = {"quantization_config": fourbit.quantization_config(model, device(), computes_in_bfloat16())}
        packing = fourbit.packing_stacks()
    disable_progress_bar()
    with _said_plainly(model), doing(f"loading {public_name(model.name_or_path)}"), packing:
        source = _from(model, weights=True)
        base: PreTrainedModel
        base, loading = getattr(transformers, auto_class).from_pretrained(
            **source,
            **quantised,
            **own,
            adapter_kwargs={"local_files_only": source["local_files_only"]},  # it looks for an adapter there, too
            dtype=weight_dtype(model, trained_in_full),
            attn_implementation=model.attn_implementation,
            device_map={"": device()},  # each tensor goes straight to its device: no second copy of the model
            use_safetensors=True,
            output_loading_info=True,
        )
    # transformers fills them with random numbers and only warns
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith(own_heads)):
        raise SettingsError(
            f"model.name_or_path={model.name_or_path} lacks {len(missing)} of its weights, such as {missing[0]}.",
            "Get all of its files again.",
        )
    if model.load_in_4bit:
        fourbit.keep_exact(base)
    if base.base_model is base and hasattr(base, "model"):
        # Llama 4's text model names its backbone by the word of the multimodal one, and transformers and TRL miss it
        base.base_model_prefix = "model"
    if writes:
        settle_generation(base.generation_config, model.name_or_path)
    language.freeze_beside(base)
    language.settle_text(base)
    return base.eval()


def language_class(model: ModelConfig) -> str:
    """The auto class of transformers that loads the language model. Raises SettingsError where there is none."""
    return language.auto_class(load_model_config(model), model.name_or_path)


def settle_generation(config: Any, name: str) -> None:
    """Mend a generation config that transformers would refuse to save after all the training.

    Sampling settings without do_sample, as many models have them, mean do_sample=true; what else has no effect where it
    stands is put back to its default; both are said. Raises SettingsError for what cannot be.
    """
    from transformers import GenerationConfig

    if config.temperature == 0:  # greedy, in the words of other libraries
        config.temperature = None
    samples = any(getattr(config, key, None) not in (None, default) for key, default in SAMPLES.items())
    if samples and config.do_sample is not True:
        config.do_sample = True
        _say_once(f"note: {name}: its generation_config.json has sampling settings: do_sample=true is added to it")
    plain, idle = GenerationConfig(), []
    for key in IDLE:
        was = getattr(config, key, None)
        if was != getattr(plain, key, None) and _refused(config):
            setattr(config, key, getattr(plain, key, None))
            idle.append(f"{key}={was}")
    if idle and not _refused(config):
        _say_once(f"note: {name}: left out of its generation_config.json, without effect there: {', '.join(idle)}")
    if said := _refused(config):
        raise SettingsError(
            f"model.name_or_path={name}: its generation_config.json could not be saved with the result: {said}",
            "Mend that file in a copy of the model's folder, and name the folder.",
        )


def _refused(config: Any) -> str:
    """What transformers has against saving a generation config, in one line; "" for nothing."""
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())[:300]
    return ""


@functools.cache
def _say_once(note: str) -> None:
    """A command may load a model more than once; what its device lacks is news the first time."""
    log.warning(note)


def load_dequantised(model: ModelConfig) -> PreTrainedModel:
    """The 4-bit language model, dequantised."""
    return dequantised(load_base(model))


def dequantised(base: PreTrainedModel) -> PreTrainedModel:
    """A 4-bit model with its weights written out again in the type it was loaded in, a layer at a time."""
    import torch
    from transformers.pytorch_utils import Conv1D

    swapped = [name for name, module in base.named_modules() if vars(module).get("source_cls") is Conv1D]
    logging.getLogger("transformers.integrations.bitsandbytes").setLevel("ERROR")  # says that it does as it is told
    base.dequantize()
    fourbit.unpack_stacks(base)
    for name in swapped:  # GPT-2's layers keep their weight the other way round, and dequantize() leaves them turned
        linear = base.get_submodule(name)
        with torch.device("meta"):
            layer = Conv1D(*linear.weight.shape)
        layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous()), linear.bias
        base.set_submodule(name, layer)
    return base.eval()


def load_adapted(model: ModelConfig, folder: Path, base: PreTrainedModel | None = None) -> PeftModel:
    """The base of a saved adapter with that adapter, frozen; `base` where it is loaded already.

    A vocabulary that the run made longer is made as long again. Raises SettingsError for an adapter of another base.
    """
    if base is None:
        base = load_base(model)
        base = fourbit.prepare(base) if model.load_in_4bit else base  # as in training: norms and embeddings in float32
    check_base(model, folder)  # now that its files are here
    rows = _saved_vocabulary(base, folder)
    if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return adapters.load_adapter(base, str(folder)).eval()


def _saved_vocabulary(base: PreTrainedModel, folder: Path) -> int | None:
    """Rows of the embeddings or of the head that an adapter carries in full; None where it carries neither."""
    from safetensors import safe_open

    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    names = {f"base_model.model.{name}.weight" for name, module in base.named_modules() if module in ends}
    check_weights(folder / "adapter_model.safetensors")
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        found = names.intersection(file.keys())
        return int(file.get_slice(found.pop()).get_shape()[0]) if found else None


def load_policy(
    model: ModelConfig, lora: LoraConfig | None = None, *, trained_in_full: bool = False, seed: int = 0
) -> Any:
    """The model to train: with an adapter where `lora` is given and its rank is not 0, else in full.

    Raises SettingsError for a model, or an adapter to go on from, that scores texts and writes none.
    """
    from transformers import set_seed

    check_writes(model, lora)
    if lora is not None and lora.r == 0:
        lora, trained_in_full = None, True
    if lora is not None and lora.init_from:
        check_base(model, adapters.adopt(lora))
    base = load_base(model, trained_in_full)
    language.check_order(base, model.name_or_path)
    if beside := language.said(language.left_alone(base)):
        _say_once(f"note: {public_name(model.name_or_path)}: only its language model is trained; left alone: {beside}")
    if lora is None:
        return base
    if model.load_in_4bit:
        base = fourbit.prepare(base)
    if lora.init_from:
        return adapters.go_on(base, lora, adapters.adopt(lora))
    set_seed(seed)  # the adapter's A starts at random
    return adapters.attach(base, lora)


def check_writes(model: ModelConfig, lora: LoraConfig | None) -> None:
    """Raises SettingsError for what scores texts and writes none, be it the model or the adapter to go on from, and for
    a model that is no language model."""
    config = load_model_config(model)
    named = [("model.name_or_path", model.name_or_path, config.architectures or [])]
    if lora is not None and lora.init_from:
        saved = Path(lora.init_from).expanduser()
        task = read_adapter_config(saved)["task_type"] if (saved / "adapter_config.json").is_file() else None
        named.append(("lora.init_from", lora.init_from, ["ForSequenceClassification"] if task == "SEQ_CLS" else []))
    for setting, value, architectures in named:
        if any(name.endswith("ForSequenceClassification") for name in architectures):
            raise SettingsError(
                f"{setting}={value} is a classifier, such as a reward model: it scores texts and writes none.",
                "Name a language model, or the run that this one was trained from.",
            )
    language.auto_class(config, model.name_or_path)


def empty_policy(model: ModelConfig, lora: LoraConfig | None, trained_in_full: bool, scores: bool = False) -> Any:
    """The policy's shapes and types without weights (torch's meta device), to count before anything is loaded.

    `scores`: under a head that gives one number, as a reward model is trained, not under that of a language model.
    """
    import torch

    if lora is not None and lora.r == 0:
        lora, trained_in_full = None, True
    dtype = weight_dtype(model, trained_in_full)
    base = _empty(model, scores, dtype=dtype, attn_implementation=model.attn_implementation)
    with torch.device("meta"):
        if lora is not None and lora.init_from:
            adapters.adopt(lora)
        return base if lora is None else adapters.attach(base, lora, "SEQ_CLS" if scores else "CAUSAL_LM")


def coverage_of(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """What an adapter with these settings covers of the model, and what it leaves out, in lines; nothing is loaded."""
    policy = empty_policy(model, lora, trained_in_full=False)
    return adapters.covered(policy).in_words() if adapters.is_adapter(policy) else []


def _empty(model: ModelConfig, scores: bool = False, **given: Any) -> PreTrainedModel:
    """The language model's shapes on torch's meta device, what is no part of it frozen as in training; `scores`: as in
    empty_policy."""
    import torch
    import transformers

    shapes = load_model_config(model)
    if scores:
        classifier.make_known(shapes)
        shapes.num_labels = 1
    kind = getattr(transformers, classifier.AUTO_CLASS if scores else language.auto_class(shapes, model.name_or_path))
    with _said_plainly(model), torch.device("meta"):
        base: PreTrainedModel = kind.from_config(shapes, trust_remote_code=model.trust_remote_code, **given)
    language.freeze_beside(base)
    language.settle_text(base)
    return base


def check_text(model: ModelConfig) -> None:
    """Raises SettingsError for a model that reads more than text, and cannot be trained on text alone, and for one
    whose tokens see those behind them, as far as it can be told without weights."""
    base = _empty(model)
    if language_class(model) in language.MULTIMODAL and (reason := language.refuses_text(base)):
        raise SettingsError(f"model.name_or_path={model.name_or_path} {reason}", language.TAKE_ANOTHER)
    language.check_order(base, model.name_or_path)


def learned_positions(model: ModelConfig) -> int | None:
    """How many positions the model has a table for, learned or computed once; None where any length can be read."""
    shapes = load_model_config(model)
    if not isinstance(getattr(shapes.get_text_config(), "max_position_embeddings", None), int):
        return None
    try:
        return positions_of(_empty(model))
    except SettingsError:  # no language model, which is said elsewhere
        return None


def positions_of(model: Any) -> int | None:
    """The same of a model that is loaded, with an adapter or without."""
    import torch

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    words = model.get_input_embeddings()
    tables = [(name, part.weight) for name, part in model.named_modules() if isinstance(part, torch.nn.Embedding)]
    tables = [(name, weight) for name, weight in tables if words is None or weight is not words.weight]
    tables += [(name, buffer) for name, buffer in model.named_buffers() if buffer is not None]
    named = [weight for name, weight in tables if re.search(r"wpe|pos", name.rpartition(".")[2] or name)]
    # OPT and BART keep two rows more
    return most if any(weight.dim() > 1 and most <= weight.shape[0] <= most + 2 for weight in named) else None


def base_record(model: ModelConfig) -> dict[str, Any]:
    """What an adapter remembers of its base: name, revision, the settings of its architecture, and its weights' hash.

    To be taken while the base is at hand: the weights are those of the local folder or cache.
    """
    config = load_model_config(model)
    return {
        "name": public_name(model.name_or_path),
        "revision": _commit(model) or model.revision,
        "config": _architecture(config),
        "weights": _weights_hash(model),
    }


def _commit(model: ModelConfig) -> str | None:
    """The commit that a model of the Hub was loaded from, which is its folder's name in the cache."""
    name = resolve_name(model.name_or_path)
    found = None if Path(name).is_dir() else _cached_folder(name, model.revision)
    return found.name if found else None


def check_base(model: ModelConfig, folder: Path) -> None:
    """Raises SettingsError where `folder` holds an adapter of another base; one without base.json is trusted."""
    from transformers import AutoConfig

    if not (folder / BASE_RECORD).is_file():
        return
    path = folder / BASE_RECORD
    then = read_object(path)
    try:
        # through this transformers' own class, so that a default which a release adds is on both sides
        known = _architecture(AutoConfig.for_model(**_with_infinities(then["config"])))
        if not {"name", "revision", "weights"} <= then.keys():
            raise KeyError("name, revision or weights")
    except Exception as error:  # what such a class makes of settings that are none has no one class
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise SettingsError(
            f"{path} does not say which base the adapter belongs to: {what}.",
            "Get the folder again; without base.json the adapter is tried on the base that you name.",
        ) from None
    now = base_record(model)
    keys = [key for key in sorted(known.keys() | now["config"]) if known.get(key) != now["config"].get(key)]
    differing = [f"{key} {known.get(key)} → {now['config'].get(key)}" for key in keys[:3]]
    if not keys and None not in (then["weights"], now["weights"]) and then["weights"] != now["weights"]:
        differing = ["the same shapes, other weights"]
    if differing:
        was, found = (f"{side['name']} (revision {side['revision'] or 'not known'})" for side in (then, now))
        raise SettingsError(
            f"{folder} is an adapter of {was}; {found} is another model: {', '.join(differing)}.",
            "Name the base that it was trained on, in its run.yaml: model.name_or_path and model.revision.",
        )


def _with_infinities(values: Any) -> Any:
    """Numbers that JSON lacks, which transformers writes as {"__float__": "Infinity"}, as such again."""
    if isinstance(values, dict):
        if values.keys() == {"__float__"}:
            return float(values["__float__"])
        return {key: _with_infinities(value) for key, value in values.items()}
    return [_with_infinities(value) for value in values] if isinstance(values, list) else values


def _architecture(config: PretrainedConfig) -> dict[str, Any]:
    """The model's settings without those that leave its outputs as they are."""
    settings: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    idle = {"transformers_version", "_name_or_path", "dtype", "use_cache", "architectures", "quantization_config"}
    return {key: value for key, value in settings.items() if key not in idle and not key.endswith("_token_id")}


def copy_processor(model: ModelConfig, folder: Path) -> None:
    """Put what the base's processor is made of, beside its tokenizer, into the folder of a whole model: without it the
    pictures or the sound that the model still reads could not be given to it."""
    if not language.has_parts(load_model_config(model)):
        return
    for file in language.PROCESSOR:
        if (path := _file_of(model, file)) is not None and not (folder / file).exists():
            shutil.copyfile(path, folder / file)


def weights_stamp(model: ModelConfig) -> list[tuple[str, int, int]]:
    """(name, bytes, time of the last change) of every weights file at hand: equal for files that nobody touched."""
    files = [path for path in _weight_files(model) if path.is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _weight_files(model: ModelConfig) -> list[Path]:
    """The model's weights in its folder or in the cache, where they are."""
    name = resolve_name(model.name_or_path)
    folder = Path(name) if Path(name).is_dir() else _cached_folder(name, model.revision) or Path(name)
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not files[0].is_file():
        listed = read_object(index, SettingsError, "Get the model again.").get("weight_map") if index.is_file() else {}
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise SettingsError(f"{index}: expected a weight_map of file names.", "Get the model again.")
        files = [folder / file for file in sorted(set(listed.values()))]
    return files


def _weights_hash(model: ModelConfig) -> str | None:
    """SHA-256 of every tensor's name, shape and first row: files of many gigabytes in a moment. None without files."""
    from safetensors import safe_open

    rows = {}
    for path in _weight_files(model):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no dict
                part = file.get_slice(key)
                shape = part.get_shape()
                first = part[:1] if shape else file.get_tensor(key)
                rows[key] = (str(shape), first.float().numpy().tobytes())
    if not rows:
        return None
    digest = hashlib.sha256()
    for key, (shape, content) in sorted(rows.items()):
        digest.update(f"{key} {shape}".encode() + content)
    return digest.hexdigest()


def public_name(name_or_path: str) -> str:
    """The model's name for others: a Hub id or the embedded default as it is, a local folder without its path."""
    folder = Path(name_or_path).expanduser()
    return folder.resolve().name if folder.is_dir() else name_or_path


def hub_name(name_or_path: str) -> str:
    """The name that other tools load the base by: the Hub id of the embedded default, else as `public_name`."""
    return HUB_ID if name_or_path == EMBEDDED else public_name(name_or_path)


def base_license(model: ModelConfig) -> str | None:
    """The licence that the base model's own card states; None where there is no card to read."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    if model.name_or_path == EMBEDDED:
        return EMBEDDED_LICENSE
    card = Path(model.name_or_path).expanduser() / "README.md"
    if not card.parent.is_dir():
        where: dict[str, Any] = {"revision": model.revision, "local_files_only": not hub_reachable()}
        try:
            card = Path(hf_hub_download(model.name_or_path, "README.md", **where))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            return None
    if not card.is_file():
        return None
    with card.open("rb") as file:
        parts = file.read(2 * LARGEST).decode("utf-8", errors="replace").split("---\n", 2)
    try:
        metadata = load_text(parts[1], str(card)) if len(parts) == 3 and not parts[0].strip() else {}
    except FinetuneKitError:  # a card is no part of the model: one that cannot be read states nothing
        return None
    stated = metadata.get("license")
    return stated if isinstance(stated, str) else None


def _from(model: ModelConfig, weights: bool = False) -> dict[str, Any]:
    """Arguments of every from_pretrained: without a network only the local cache is asked, and answers at once."""
    name = resolve_name(model.name_or_path, weights)
    local = Path(name).is_dir() or not hub_reachable()
    if model.revision and Path(name).is_dir():
        message = f"model.revision={model.revision} has no effect: {model.name_or_path} is not from the Hub."
        raise SettingsError(message, "Leave it out.")
    if Path(name).is_dir():
        check_model(Path(name))
    elif cached := _cached_folder(name, model.revision):
        check_model(cached, whole=False)
    if model.trust_remote_code:
        _say_once(_own_code(name, model.revision, local))
    return {
        "pretrained_model_name_or_path": name,
        "revision": model.revision,
        "local_files_only": local,
        "trust_remote_code": model.trust_remote_code,  # left out, transformers would ask on a terminal
    }


def _cached_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot of a Hub model in the local cache; None where nothing of it is there yet."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _own_code(name: str, revision: str | None, local: bool) -> str:
    """What model.trust_remote_code lets run, in words. Raises SecurityError where the revision does not pin it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(name).is_dir():
        raise SecurityError(
            f"model.trust_remote_code: {name} is a local folder, whose code no revision pins.",
            "Name the model's Hub id with its revision, or leave it out: transformers knows most architectures.",
        )
    modules: set[str] = set()
    for file in ("config.json", "tokenizer_config.json"):
        try:
            path = hf_hub_download(name, file, revision=revision, local_files_only=local)
        except EntryNotFoundError:
            continue
        named = read_object(Path(path), SettingsError, "Get the model again.").get("auto_map") or {}
        if not isinstance(named, dict):
            raise SecurityError(f"{path}: auto_map is no object, so the code that would be run is not known.")
        for value in named.values():
            modules.update(str(part) for part in (value if isinstance(value, list) else [value]) if part)
    if elsewhere := sorted(module for module in modules if "--" in module):
        raise SecurityError(
            f"{name} runs code of another repository, which model.revision does not pin: {elsewhere[0]}.",
            "Leave model.trust_remote_code out, or take another model.",
        )
    files = ", ".join(sorted({f"{module.split('.')[0]}.py" for module in modules})) or "none"
    return f"model.trust_remote_code: code of {name} at {revision} is run, starting in: {files}"


@contextmanager
def _said_plainly(model: ModelConfig) -> Iterator[None]:
    """Turns transformers' long answers about a model that it cannot get into one line and the way out."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    name = model.name_or_path
    try:
        yield
    except (OSError, HfHubHTTPError) as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        if any(isinstance(link, GatedRepoError) for link in chain):
            fix = f"Accept its terms on https://huggingface.co/{name}, then: hf auth login"
            raise ResourceError(f"{name} is gated.", fix) from None
        if any(isinstance(link, RepositoryNotFoundError) for link in chain):
            raise SettingsError(
                f"model.name_or_path={name}: no local folder, and no Hub model that may be read from here.",
                f"Where it is private: hf auth login, or set HF_TOKEN. {OFFLINE_DEFAULT}",
            ) from None
        if any(isinstance(link, LocalEntryNotFoundError) for link in chain) or not hub_reachable():
            message = f"The Hub cannot be reached, and {name} is neither a local folder nor in the local cache."
            raise ResourceError(message, OFFLINE_DEFAULT) from None
        raise SettingsError(f"model.name_or_path={name}: {str(error).splitlines()[0]}", OFFLINE_DEFAULT) from None
    except FinetuneKitError:
        raise
    except (
        Exception
    ) as error:  # what a broken file makes transformers, tokenizers and safetensors raise has no one class
        import torch

        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "not enough memory" in str(error):
            raise
        if "trust_remote_code" in str(error):
            raise SecurityError(
                f"{name} can only be loaded by running code of its own; transformers does not know its architecture.",
                f"Read that code. If you trust it: {TRUST}",
            ) from None
        if "ignore_mismatched_sizes" in str(error):
            raise SettingsError(
                f"model.name_or_path={name}: the shapes in config.json are not those of its weights.", "Get it again."
            ) from None
        said = " ".join(str(error).split())[:200]
        value = error.args[0] if isinstance(error, KeyError) and error.args else None
        if isinstance(value, str) and (keys := settings_with(Path(name).expanduser(), value)):
            raise SettingsError(
                f"{Path(name) / 'config.json'}: {' and '.join(keys)} is {value!r}, which transformers does not know.",
                "Get the file again, or take another model.",
            ) from error
        if isinstance(error, ImportError):
            named = re.search(r"pip install ([\w.-]+)", said)
            command = f"pip install {named[1]}" if named else "Install it"
            raise ResourceError(
                f"model.name_or_path={name} needs a package that is not here: {said}", f"{command}, and run this again."
            ) from None
        encoder = isinstance(error, AssertionError) and "is_decoder" in said  # Reformer's
        raise SettingsError(
            f"model.name_or_path={name} cannot be loaded: {type(error).__name__}: {said}",
            language.TAKE_ANOTHER if encoder else "Get all of its files again, or take another model.",
        ) from error
