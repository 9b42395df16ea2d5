"""Weights that can be factorised, and quantised ones, which cannot or only after a detour."""

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError


__all__ = ["class_path", "compute_dtype", "float_weight", "is_plain_linear", "is_quantised", "kind_of_weight"]

_PLAIN_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


def class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_plain_linear(module: nn.Module) -> bool:
    # Quantised weights may be tensors of their own class which pass for floating point.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.dtype in _PLAIN_DTYPES


def compute_dtype(linear: nn.Module, states: Tensor | None = None) -> torch.dtype:
    """The dtype that a linear layer computes in: under diffusers' layerwise casting not that of its weights."""
    hooks = getattr(linear, "_diffusers_hook", None)
    casting = None if hooks is None else hooks.get_hook("layerwise_casting")
    if casting is not None:
        return casting.compute_dtype
    if isinstance(linear.weight, Tensor):
        return linear.weight.dtype
    # In a layer of torch.ao.quantization the weight is a method, and floats are taken as they are.
    return torch.float32 if states is None else states.dtype


def float_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear layer in floating point, dequantised where it must be.

    Raises:
        UnsupportedModuleError: a weight that does not dequantise itself.
    """
    weight = linear.weight.detach()
    if compute_dtype(linear) != weight.dtype:
        return weight.to(compute_dtype(linear))
    if not is_quantised(weight):
        return weight
    try:
        return weight.dequantize()
    except (RuntimeError, NotImplementedError) as error:
        raise UnsupportedModuleError(
            f"A {class_path(type(linear))}{kind_of_weight(linear)} cannot be dequantised; expected weights in "
            "floating point. Dequantise the model first (`model.dequantize()`)."
        ) from error


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is of a library's own class, or of whole numbers or eight bits."""
    # Classes of torch itself split a weight over processes, or have none yet.
    return type(weight).__module__.partition(".")[0] != "torch" or weight.dtype not in _PLAIN_DTYPES


def kind_of_weight(linear: nn.Module) -> str:
    """Words for an error: what the weights of a layer are."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor):
        return ""
    return f" with weights of {weight.dtype if type(weight) is nn.Parameter else class_path(type(weight))}"
