"""What the demos share: how settings are checked, and torch and the libraries while they run."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import ComCATError, InvalidValueError


__all__ = ["check_settings", "missing", "quiet", "threads"]


def missing(package: str, extras: str = "demo") -> ComCATError:
    """The error that says which package a demo lacks, and the extras of comcat_hf that bring it."""
    return ComCATError(
        f"The demo needs {package}, which is not installed. Install what it needs with: pip install "
        f"'comcat_hf[{extras}]'"
    )


def check_settings(settings: Any, least: Mapping[str, int], output: Path) -> None:
    """See whether the results can go into a folder, and whether whole numbers are large enough.

    Raises:
        InvalidValueError: one is not.
    """
    if output.exists() and not output.is_dir():
        raise InvalidValueError(f"{output}: expected a folder for the results, found a file; give another --output.")
    for name, lowest in least.items():
        if getattr(settings, name) < lowest:
            raise InvalidValueError(f"{name} must be a whole number from {lowest}, got {getattr(settings, name)!r}.")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """CPU threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """No bars for the reading and writing of small files, and no word of what the libraries do without."""
    with ExitStack() as stack:
        for name in libraries:
            # One after the other: the import of diffusers makes transformers warn.
            logging = import_module(f"{name}.utils.logging")
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            if logging.is_progress_bar_enabled():
                stack.callback(logging.enable_progress_bar)
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield
