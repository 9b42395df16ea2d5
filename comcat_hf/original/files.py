"""The original release's files as tensors: read without running what a pickle may hold."""

import argparse
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError


__all__ = ["check_sizes", "read_pickle", "take_tensor"]


def read_pickle(path: str | Path) -> Any:
    """What `torch.save` wrote, if it is made of tensors, numbers, text, lists, mappings and parsed arguments.

    Raises:
        CheckpointError: no such file, a damaged one, or one that would run code when it is read.
    """
    path = Path(path)
    try:
        _check_stored(path)
        # The release saves the arguments of its training beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected tensors in plain containers, found a pickle that asks for more, or a damaged one; "
            "nothing of it was run: do not load it in other ways unless you trust whoever wrote it"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, found none that can be read ({error.strerror or error}); "
            "check the path"
        ) from error
    except Exception as error:
        # Whatever a damaged file makes torch stumble over.
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, found one that is cut short, damaged or of another kind; "
            "download it again"
        ) from error


def check_sizes(tensors: Iterable[Any], path: str | Path) -> None:
    """Refuse tensors of more numbers than their file holds, before anything is made of their shapes.

    Raises:
        CheckpointError: views that repeat a few numbers, or tensors that declare numbers without having any.
    """
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, Tensor))
    held = Path(path).stat().st_size
    if declared > held:
        raise CheckpointError(
            f"{path}: expected tensors of at most {held:,} bytes, the size of the file, found such as declare "
            f"{declared:,}; do not use it"
        )


def take_tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...], source: str) -> Tensor:
    """The tensor of a name in fp32, checked: `None` in `shape` stands for any size."""
    found = tensors.get(name)
    wanted = " × ".join("any" if size is None else str(size) for size in shape)
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"{source}: expected the tensor {name} ({wanted}), found "
            f"{'none' if found is None else type(found).__name__}; check that this is a file of the original release"
        )
    # A plain one, of which no attribute that was saved with it hides a method.
    found = torch.detach(found)
    dense = not found.is_nested and found.layout is torch.strided and found.device.type == "cpu"
    fits = dense and found.ndim == len(shape) and all(map(_agree, shape, found.shape))
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


def _agree(wanted: int | None, size: int) -> bool:
    return wanted in (None, size)


def _check_stored(path: Path) -> None:
    # A few bytes could be unpacked to fill the memory; torch.save packs nothing.
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            f"{path}: expected a file that torch.save wrote, found a zip file with the compressed entry "
            f"{packed[0]!r}; do not use it"
        )
