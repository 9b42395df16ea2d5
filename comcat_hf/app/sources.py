"""Folders and Hub ids as users type them."""

from pathlib import Path

from ..errors import InvalidValueError


__all__ = ["expanded", "needed"]


def needed(source: str | None, what: str) -> str:
    """Strip blanks around a source, and refuse an empty one.

    Args:
        source: folder or Hub id.
        what: kind of model, for the error.

    Raises:
        InvalidValueError: the source is empty.
    """
    source = (source or "").strip()
    if not source:
        raise InvalidValueError(f"Expected a folder or a Hub id of the {what}, found nothing; type one.")
    return source


def expanded(source: str) -> str:
    """Replace `~` in a source by the home folder, which the libraries do not do."""
    return str(Path(source).expanduser()) if source.startswith("~") else source
