"""Reads tensors from the original release's files, without running code in a pickle."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tensor_files import read_saved


__all__ = ["check_sizes", "read_pickle", "take_tensor"]


def read_pickle(path: str | Path) -> Any:
    """Read a file of the release with [`read_saved`]; raises the same errors."""
    # The release saves the arguments of its training beside the weights.
    return read_saved(path, classes=[argparse.Namespace], old=True, fix="Download it again.")


def check_sizes(tensors: Iterable[Any], path: str | Path) -> None:
    """Refuse tensors that declare more numbers than their file holds, before their shapes are used.

    Raises:
        CheckpointError: views that repeat a few numbers, or tensors that declare numbers but have none.
    """
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
    held = Path(path).stat().st_size
    if declared > held:
        raise CheckpointError(
            f"{path}: expected tensors of at most {held:,} bytes, the size of the file, found declared sizes of "
            f"{declared:,}; do not use it"
        )


def take_tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...], source: str) -> Tensor:
    """The tensor of a name, checked and in float32; `None` in `shape` means any size."""
    found = tensors.get(name)
    wanted = " × ".join("any" if size is None else str(size) for size in shape)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"{source}: expected the tensor {name} ({wanted}), found "
            f"{'none' if found is None else type(found).__name__}; check that this is a file of the original release"
        )
    # Detached to a plain tensor: attributes saved with a tensor could hide its methods.
    found = torch.detach(found)
    dense = not found.is_nested and found.layout is torch.strided and found.device.type == "cpu"
    fits = dense and found.ndim == len(shape)
    fits = fits and all(wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True))
    if not fits or not found.is_floating_point():
        there = (" × ".join(map(str, found.shape)) or "a single number") if dense else "no dense tensor"
        raise CheckpointError(
            f"{source}: expected {name} to be {wanted} floating-point numbers, found {there} of {found.dtype}; "
            "the file is damaged, or of another model"
        )
    if not found.isfinite().all():
        raise CheckpointError(
            f"{source}: expected {name} to be finite, found NaN or infinity; the training that wrote it diverged"
        )
    return found.float()
