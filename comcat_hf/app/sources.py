"""Folders and Hub ids as people type them."""

from pathlib import Path

from ..errors import InvalidValueError


__all__ = ["expanded", "needed"]


def needed(source: str | None, what: str) -> str:
    """What was typed, without blanks around it.

    Args:
        source: folder or Hub id.
        what: which model it should be; the error names it.

    Raises:
        InvalidValueError: nothing was typed.
    """
    source = (source or "").strip()
    if not source:
        raise InvalidValueError(f"Expected a folder or a Hub id of the {what}, found nothing; type one.")
    return source


def expanded(source: str) -> str:
    """The source with the home folder in place of `~`, which the libraries do not read."""
    return str(Path(source).expanduser()) if source.startswith("~") else source
