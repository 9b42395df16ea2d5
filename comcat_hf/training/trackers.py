"""Which tracker a training reports to, and what it is told of the settings."""

from typing import Any

from accelerate import Accelerator

from ..errors import InvalidValueError


__all__ = ["start_trackers", "tracker_of"]

_DEFAULT = "tensorboard"
_SECRETS = ("token", "hub_token")


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
