"""Local files: atomic writes, and checked reading of JSON."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checks import parse_json
from ..errors import CheckpointError, InvalidValueError, brief


__all__ = ["read_json", "replacing", "write_bytes_atomic", "write_json_atomic", "write_text_atomic"]

_LARGEST_JSON = 2**26


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are readable by their owner only, and the renamed file would keep that mode.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("r+b") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: str | os.PathLike, payload: bytes) -> Path:
    """Write `payload` to `path`: a reader sees the old file or the whole new one, never a part."""
    with replacing(path) as temporary:
        temporary.write_bytes(payload)
    return Path(path)


def write_text_atomic(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 with `write_bytes_atomic`."""
    return write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike, payload: Mapping[str, Any]) -> Path:
    """Write `payload` as indented JSON with `write_bytes_atomic`; NaN and infinity are refused."""
    try:
        text = json.dumps(payload, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(
            f"{path}: expected JSON-serialisable content, found other values ({brief(error)}); "
            "use plain finite numbers, strings, lists and mappings"
        ) from error
    return write_text_atomic(path, text + "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a JSON object from `path`; for other content raise a `CheckpointError` that names file and position."""
    path = Path(path)
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise CheckpointError(f"{path}: expected a small JSON file, found {size:,} bytes; check the path")
        content = parse_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: expected UTF-8 JSON, found an invalid byte at position {error.start}; "
            "save or download the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable JSON file, found {error.strerror or error}; check the path"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(content).__name__}; save or download the file again"
        )
    return content
