"""What stands around a model, or a part of it, and computes nothing of its own: compilation and parallel training."""

from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..errors import InvalidValueError


__all__ = ["base_module", "is_tuner_layer", "unwrapped", "within"]

# Under which names torch.compile, FSDP and activation checkpointing hold the module that they wrap.
_NAMES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def within(module: nn.Module) -> nn.Module | None:
    """The module that this one only wraps, if it does."""
    return next((module._modules[name] for name in _NAMES if name in module._modules), None)


def unwrapped(model: Any) -> nn.Module:
    """The model within what `torch.compile` or parallel training put around it.

    Raises:
        InvalidValueError: what is given is no model, or parts of it are compiled or wrapped.
    """
    if not isinstance(model, nn.Module):
        raise InvalidValueError(
            f"model: expected a torch.nn.Module, found {model!r:.100}. Load the model first, for example with "
            "AutoModelForImageClassification.from_pretrained; of a pipeline give the model, pipe.model or pipe.unet."
        )
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    for path, module in model.named_modules():
        if within(module) is not None or isinstance(module, _PARALLEL):
            raise InvalidValueError(
                f"{path} is compiled or wrapped for parallel training ({type(module).__name__}); expected a model "
                "without such parts. Compress the model before you compile or wrap them, and save it without."
            )
    return model


def base_module(module: nn.Module) -> nn.Module:
    """The module below whatever adapters, compilation and sharding wrap it."""
    while True:
        if is_tuner_layer(module):
            module = module.base_layer
        elif (inner := within(module)) is not None:
            module = inner
        else:
            return module


def is_tuner_layer(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")
