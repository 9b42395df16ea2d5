"""Files of tensors: safetensors, and what `torch.save` wrote, read without running what a pickle may hold."""

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, brief
from .hub import replacing


__all__ = ["check_shapes", "open_safetensors", "read_safetensors", "read_saved", "write_safetensors", "write_saved"]

_AGAIN = "Save or download it again."


@contextmanager
def open_safetensors(
    path: str | os.PathLike, what: str = "weights", fix: str = _AGAIN, device: str = "cpu"
) -> Iterator[Any]:
    """A safetensors file, opened by its library.

    Args:
        path: the file.
        what: what it should hold; errors say so.
        fix: what to do about an error.
        device: where its tensors go.

    Raises:
        CheckpointError: it is missing, cut short, damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file of {what}, found one that cannot be read "
            f"({brief(error)}). It was cut short, is damaged or of another kind. {fix}"
        ) from error


def read_safetensors(
    path: str | os.PathLike, what: str = "weights", fix: str = _AGAIN, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and the texts of its header; arguments as of [`open_safetensors`]."""
    with open_safetensors(path, what, fix, device) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors and header texts as safetensors, straight to disk; equal content gives equal bytes.

    Args:
        path: the file; a reader sees the old one or the whole new one.
        tensors: by name; they are moved to the CPU and made contiguous, one copy at most.
        metadata: texts of the header.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, dict(metadata or {}))
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Sort the texts of a header in place: the library writes them in an order that differs between processes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The library pads the header with spaces, so that tensors start at a multiple of eight bytes.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def check_shapes(
    found: Mapping[str, Any], expected: Mapping[str, Any], source: str | os.PathLike, fix: str = _AGAIN
) -> None:
    """Raise CheckpointError, with the name, if tensors are missing, unexpected or of other shapes."""
    for name in sorted(expected.keys() | found.keys()):
        wanted, there = (tuple(side[name].shape) if name in side else None for side in (expected, found))
        if wanted != there:
            raise CheckpointError(f"{source}: expected {name} of shape {wanted}, found {there}. {fix}")


def read_saved(
    path: str | os.PathLike,
    what: str = "tensors",
    fix: str = _AGAIN,
    *,
    classes: Collection[type] = (),
    old: bool = False,
) -> Any:
    """What `torch.save` wrote, if it is made of tensors, numbers, text, lists and mappings, and is whole.

    Args:
        path: the file.
        what: what it should hold; errors say so.
        fix: what to do about an error.
        classes: further ones that it may hold.
        old: whether it may be of a torch before 1.6, which kept no checksums.

    Raises:
        CheckpointError: it is missing, damaged or of another kind, or would run code when it is read.
    """
    path = Path(path)
    try:
        _check_archive(path, old)
        with torch.serialization.safe_globals(list(classes)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: expected {what} in plain containers, found a pickle that asks for more, or a damaged one; "
            f"nothing of it was run: do not load it in other ways unless you trust whoever wrote it. {fix}"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected {what} that torch.save wrote, found none that can be read ({error.strerror or error}); "
            f"check the path. {fix}"
        ) from error
    # Whatever a damaged file makes torch stumble over.
    except Exception as error:
        raise CheckpointError(
            f"{path}: expected {what} that torch.save wrote, found a file that is cut short, damaged or of another "
            f"kind. {fix}"
        ) from error


def write_saved(path: str | os.PathLike, content: Any) -> None:
    """Write with `torch.save` so that a reader sees the old file or the whole new one."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _check_archive(path: Path, old: bool) -> None:
    # torch compares no checksum, and unpacks a few bytes until the memory is full; torch.save packs nothing.
    if old and not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(
                f"{path}: expected a file that torch.save wrote, found a zip file with the compressed entry "
                f"{packed[0]!r}; do not use it"
            )
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the entry {damaged} has another checksum")
