"""The processes and devices that a training or an evaluation runs on."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..errors import InvalidValueError, brief
from .settings import RunSettings
from .trackers import tracker_of


__all__ = ["make_accelerator"]

# One process may measure sensitivities or draw images for hours while the others wait.
_PATIENCE = timedelta(hours=24)


def make_accelerator(settings: RunSettings | None = None, handlers: Sequence[Any] = ()) -> Accelerator:
    """What accelerate makes of the processes that were launched.

    Args:
        settings: of the run; by default it has full precision, no tracker and no folder.
        handlers: of accelerate, for further settings.

    Raises:
        InvalidValueError: the machine does not have the precision or the tracker.
    """
    folder = None if settings is None else settings.output_path
    project = {} if folder is None else {"project_dir": str(folder), "logging_dir": str(folder / settings.logging_dir)}
    tracker = None if settings is None else tracker_of(settings.report_to)
    precision = "no" if settings is None else settings.mixed_precision
    asked = "The accelerate configuration" if precision is None else f"--mixed_precision {precision}"
    refused = f"{asked}: expected a precision that this machine has"
    try:
        accelerator = Accelerator(
            # Without cpu=True accelerate starts CPU processes as unconnected single-process runs.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=precision,
            log_with=tracker,
            project_config=ProjectConfiguration(**project),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE), *handlers],
        )
    except ValueError as error:
        raise InvalidValueError(
            f"{refused}, found that accelerate refuses it ({brief(error)}). Take another, or no."
        ) from error
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise InvalidValueError(f"{refused}, found {accelerator.device.type}, which trains in bf16 or no. Take one.")
    return accelerator
