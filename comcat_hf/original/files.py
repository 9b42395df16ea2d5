"""The original release's files as tensors: read without running what a pickle may hold."""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


__all__ = ["read_pickle", "take_tensor"]


def read_pickle(path: str | Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors, numbers, text, lists, mappings and parsed arguments.

    Raises:
        CheckpointError: no such file, a damaged one, or one that would run code when it is read.
    """
    path = Path(path)
    try:
        # The release saves the arguments of its training beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected tensors in plain containers, found a pickle that asks for more, or a damaged one; "
            "nothing of it was run: do not load it in other ways unless you trust whoever wrote it"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, found none that can be read ({reason}); "
            "check the path, or download it again"
        ) from error


def take_tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...], source: str) -> Tensor:
    """The tensor of a name in fp32, checked: `None` in `shape` stands for any size."""
    found = tensors.get(name)
    wanted = " × ".join("any" if size is None else str(size) for size in shape)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"{source}: expected the tensor {name} ({wanted}), found "
            f"{'none' if found is None else type(found).__name__}; check that this is a file of the original release"
        )
    fits = found.ndim == len(shape) and all(
        size in (None, there) for size, there in zip(shape, found.shape, strict=False)
    )
    if not fits or not found.is_floating_point():
        there = " × ".join(map(str, found.shape)) or "a single number"
        raise CheckpointError(
            f"{source}: expected {name} to be {wanted} floating-point numbers, found {there} of {found.dtype}; "
            "the file is damaged, or of another model"
        )
    return found.float()
