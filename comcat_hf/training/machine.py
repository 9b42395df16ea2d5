"""The processes and devices that a training or an evaluation runs on, and the tracker that it reports to."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from ..errors import InvalidValueError, brief
from .settings import RunSettings


__all__ = ["make_accelerator", "start_trackers", "tracker_of"]

# One process may measure sensitivities or draw images for hours while the others wait.
_PATIENCE = timedelta(hours=24)
# Of `--report_to auto`, and what no tracker is told.
_DEFAULT = "tensorboard"
_SECRETS = ("token", "hub_token")


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


def tracker_of(asked: str) -> str | None:
    """What `Accelerator(log_with=...)` is given for a `--report_to`.

    Args:
        asked: the name of a tracker that accelerate knows, `"all"`, `"none"`, or `"auto"`: TensorBoard where it is
            installed.

    Returns:
        a name, or `None` for no tracker.

    Raises:
        InvalidValueError: a tracker that is unknown or not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if asked == "none":
        return None
    installed = [_text(name) for name in get_available_trackers()]
    if asked == "auto":
        return _DEFAULT if _DEFAULT in installed else None
    if asked != "all" and asked not in installed:
        known = sorted(map(_text, LOGGER_TYPE_TO_CLASS))
        if asked in known:
            raise InvalidValueError(
                f"--report_to {asked}: expected an installed tracker, found {', '.join(installed) or 'none'}. Install "
                f"{asked}, or leave the flag out."
            )
        raise InvalidValueError(f"--report_to must be one of {', '.join(known)}, all, auto or none, got {asked!r}.")
    return asked


def start_trackers(accelerator: Accelerator, project: str, settings: Any) -> None:
    """Start the trackers of a training, if it has any, with its settings but for tokens."""
    if accelerator.log_with:
        shown = {name: value for name, value in vars(settings).items() if isinstance(value, int | float | str)}
        accelerator.init_trackers(project, config={k: v for k, v in shown.items() if k not in _SECRETS})


def _text(name: object) -> str:
    return str(getattr(name, "value", name))
