"""Weights in 4 bits that no 4-bit layer holds: the stacks of a mixture's experts.

bitsandbytes keeps linear layers in 4 bits, and transformers has it do that while a model loads. What transformers keeps
as a plain parameter, such as one for the weights of all experts, they leave in 16 bits, and in a mixture that is nearly
the whole model. Here such a parameter is a tensor that has the shape and type of the weight and holds its 4 bits: any
operation on it unpacks it first and works on what it then is. So a layer's own code, transformers' kernels for experts
and PEFT's adapters on parameters meet a weight as ever.

The proof that a fresh process makes runs this file's text: it uses nothing of this package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from torch.utils._pytree import tree_map_only
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

METHOD = "bitsandbytes_4bit"
aten = torch.ops.aten
SAME = (aten.detach.default, aten.alias.default, aten.clone.default)  # of which the result has the same 4 bits


class Weight4bit(torch.Tensor):
    """A frozen weight in 4 bits. codes: two of its numbers a byte. state: bitsandbytes', of shape, type and scales."""

    codes: torch.Tensor
    state: Any

    @staticmethod
    def __new__(cls, codes: torch.Tensor, state: Any) -> Weight4bit:
        of: dict[str, Any] = {"dtype": state.dtype, "device": codes.device}
        made = torch.Tensor._make_wrapper_subclass(cls, state.shape, **of, requires_grad=False)
        made.codes, made.state = codes, state
        return made

    def unpacked(self) -> torch.Tensor:
        """The numbers that the 4 bits stand for, in the weight's type."""
        with torch.inference_mode(False):  # torch refuses a view of a plain tensor, as this weight is, on one of those
            numbers: torch.Tensor = functional.dequantize_4bit(self.codes, self.state)
        return numbers

    def __repr__(self) -> str:  # type: ignore[override]  # torch's has an argument
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes"], self.state

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], state: Any, *_: Any) -> Weight4bit:
        return cls(inner["codes"], state)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has no class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        one = args[0] if args else None
        if isinstance(one, cls) and func in SAME:
            return cls(one.codes, one.state)
        if isinstance(one, cls) and func is aten._to_copy.default and kwargs.get("dtype") in (None, one.dtype):
            state = copy.deepcopy(one.state)
            state.to(kwargs.get("device") or one.device)
            return cls(one.codes.to(kwargs.get("device") or one.device), state)
        if func._schema.is_mutable and isinstance(one, cls):
            raise RuntimeError(f"{func} would change a weight in 4 bits, whose change would be lost")
        return func(*tree_map_only(cls, cls.unpacked, args), **tree_map_only(cls, cls.unpacked, kwargs))


class _Pack(ConversionOps):  # type: ignore[misc]  # transformers ships no types here
    """Of transformers' loading: what has become one parameter goes into 4 bits, here or by bitsandbytes' layer."""

    def __init__(self, quantizer: Any, layers: ConversionOps) -> None:
        self.quantizer, self.layers = quantizer, layers

    def convert(self, input_dict: dict[str, Any], **given: Any) -> dict[str, Any]:
        found = {}
        for name, value in input_dict.items():
            if name in self.quantizer.names:
                whole = value[0] if isinstance(value, list) else value
                found[name] = pack(whole, self.quantizer.quantization_config)
            else:
                found |= self.layers.convert({name: value}, **given)
        return found


def pack(weight: torch.Tensor, settings: Any) -> torch.nn.Parameter:
    """A weight as a frozen parameter in 4 bits; `settings`: transformers' BitsAndBytesConfig."""
    codes, state = functional.quantize_4bit(
        weight.contiguous(),
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )
    return torch.nn.Parameter(Weight4bit(codes, state), requires_grad=False)


@contextmanager
def packing(
    find: Callable[[Any], Collection[str]], keep: Callable[[Any], Collection[str]] = lambda model: ()
) -> Iterator[None]:
    """In here a model that loads in 4 bits gets the parameters in 4 bits, too, that `find` names of its empty shapes;
    each as it is read, so that the whole model is never there. The layers that `keep` names stay as they are."""

    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # nor here
        names: Collection[str] = ()
        kept: Collection[str] = ()

        def _process_model_before_weight_loading(self, model: Any, *args: Any, **given: Any) -> None:
            self.names, self.kept = set(find(model)), keep(model)
            super()._process_model_before_weight_loading(model, *args, **given)

        def get_modules_to_not_convert(self, *args: Any, **given: Any) -> list[str]:
            owners = [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]
            return [*super().get_modules_to_not_convert(*args, **given), *owners, *self.kept]

        def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
            return param_name in self.names or super().param_needs_quantization(model, param_name, **given)

        def get_quantize_ops(self) -> ConversionOps:
            return _Pack(self, super().get_quantize_ops())

        def _process_model_after_weight_loading(self, model: Any, **given: Any) -> Any:
            compute_in_own_type(model)
            return super()._process_model_after_weight_loading(model, **given)

    before = AUTO_QUANTIZER_MAPPING[METHOD]
    AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[METHOD] = before


def compute_in_own_type(model: Any) -> None:
    """Let a module with such weights compute in their type, whatever its input is in, and answer in the input's: as a
    4-bit layer of bitsandbytes does."""
    for module in model.modules():
        types = {weight.dtype for weight in module.parameters(recurse=False) if isinstance(weight, Weight4bit)}
        if types and types != {torch.float32}:
            module.register_forward_pre_hook(_to_own_type)
            module.register_forward_hook(_to_type_of_input)


def _to_own_type(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(weight.dtype for weight in module.parameters() if isinstance(weight, Weight4bit))
    module.input_type = args[0].dtype
    return (args[0].to(dtype), *args[1:])


def _to_type_of_input(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(module.input_type) if isinstance(output, torch.Tensor) else output


def freeze(model: Any) -> None:
    """As PEFT's prepare_model_for_kbit_training: nothing is trained, and what is in 16 bits is put into float32; it
    does not know these weights, and would unpack them for good."""
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, Weight4bit):
            parameter.data = parameter.data.to(torch.float32)


def unpack(model: Any) -> None:
    """Put plain weights in the place of those in 4 bits, one after another."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if isinstance(weight, Weight4bit):
                setattr(module, name, torch.nn.Parameter(weight.unpacked(), requires_grad=False))
