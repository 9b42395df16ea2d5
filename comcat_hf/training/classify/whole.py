"""Whole checkpoints of a `Trainer`: a marker is written last, with the names and sizes of all files."""

import re
from pathlib import Path

from ...errors import CheckpointError
from ...hub import read_json, write_json_atomic


__all__ = ["check_whole", "last_whole", "mark_whole", "unmark"]

_MARKER = "comcat_whole.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_whole(folder: Path) -> None:
    """Write the marker of a checkpoint whose files are all there."""
    write_json_atomic(folder / _MARKER, {"files": _sizes(folder)})


def unmark(folder: Path) -> None:
    """Remove the marker, before the files are written anew."""
    (folder / _MARKER).unlink(missing_ok=True)


def check_whole(folder: Path) -> None:
    """See that a checkpoint has all the files that were written, in full.

    Raises:
        CheckpointError: no marker, or a file is missing or of another size.
    """
    if not (folder / _MARKER).is_file():
        raise CheckpointError(
            f"{folder}: expected a checkpoint that was written to the end, with {_MARKER}, found none. Resume with "
            "resume_from_checkpoint=True, which takes the last whole one."
        )
    recorded = read_json(folder / _MARKER).get("files")
    found = _sizes(folder)
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{folder / _MARKER}: expected 'files', found {recorded!r}. Give another checkpoint.")
    for name, size in recorded.items():
        if found.get(name) != size:
            raise CheckpointError(
                f"{folder / name}: expected a file of {size} bytes, found "
                f"{'none' if name not in found else f'{found[name]} bytes'}. Give another checkpoint."
            )


def last_whole(run: Path) -> Path | None:
    """The last whole checkpoint of a run's folder, if there is one."""
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / _MARKER).is_file()]
    return max(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), default=None)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _MARKER)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
