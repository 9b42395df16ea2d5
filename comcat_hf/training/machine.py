"""The processes and devices that a training or an evaluation runs on."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..errors import InvalidValueError, brief
from .trackers import tracker_of


__all__ = ["make_accelerator"]

# One process may measure sensitivities or draw images for hours while the others wait.
_PATIENCE = timedelta(hours=24)


def make_accelerator(
    output_dir: str | Path | None = None,
    *,
    logging_dir: str = "",
    report_to: str = "none",
    mixed_precision: str | None = None,
    handlers: tuple[Any, ...] = (),
) -> Accelerator:
    """What accelerate makes of the processes that were launched.

    Args:
        logging_dir: where a tracker writes, in it.
        mixed_precision: `None` for that of the accelerate configuration.
        handlers: of accelerate, for further settings.

    Raises:
        InvalidValueError: the machine does not have the precision or the tracker.
    """
    folder = None if output_dir is None else Path(output_dir).expanduser()
    project = {} if folder is None else {"project_dir": str(folder), "logging_dir": str(folder / logging_dir)}
    tracker = tracker_of(report_to)
    asked = "The accelerate configuration" if mixed_precision is None else f"--mixed_precision {mixed_precision}"
    refused = f"{asked}: expected a precision that this machine has"
    try:
        accelerator = Accelerator(
            # Without cpu=True accelerate starts CPU processes as unconnected single-process runs.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed_precision,
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
