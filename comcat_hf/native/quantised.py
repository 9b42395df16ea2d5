"""Weights quantised by torchao in the files of compressed models."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers import HfQuantizer

from ..errors import CheckpointError, InvalidValueError, brief


__all__ = ["TORCHAO", "flat_state", "is_torchao", "read_metadata", "torchao_quantizer"]

TORCHAO = "torchao"


def is_torchao(model: nn.Module) -> bool:
    """Whether torchao has quantised weights of a model."""
    return any(type(weight).__module__.partition(".")[0] == TORCHAO for weight in model.parameters())


def flat_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors of a quantised model as plain ones, and the texts by which torchao puts them together again.

    Raises:
        InvalidValueError: torchao has no such form of one of its tensors.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    try:
        return flatten_tensor_state_dict(model.state_dict())
    # torchao refuses a kind of tensor with errors of several kinds.
    except Exception as error:
        raise InvalidValueError(
            f"{type(model).__name__}: expected weights that torchao can write as safetensors, found others "
            f"({brief(error)}). Save the model before it is quantised, and quantise it after loading."
        ) from error


def torchao_quantizer() -> HfQuantizer:
    """The library's reader of tensors of torchao.

    Raises:
        InvalidValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig
        from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
    except ImportError as error:
        raise InvalidValueError(
            f"The weights are quantised by torchao, which cannot be imported ({brief(error)}). Run `pip install "
            "torchao`."
        ) from error
    # The kind of a tensor stands in the file; a configuration must name one.
    return TorchAoHfQuantizer(TorchAoConfig(Int8WeightOnlyConfig()), pre_quantized=True)


def read_metadata(quantizer: HfQuantizer, files: Sequence[str] | None) -> dict[str, str]:
    """Let the reader see the headers of the files, which say how tensors are put together.

    Raises:
        CheckpointError: they do not.
    """
    from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao

    quantizer.metadata = {}
    if files:
        quantizer.set_metadata(files)
    if not quantizer.metadata or not is_metadata_torchao(quantizer.metadata):
        raise CheckpointError(
            f"{next(iter(files or ()), 'The state')}: expected weights quantised by torchao, as config.json says, "
            "found none. The files do not belong together; download or save the model again."
        )
    return quantizer.metadata
