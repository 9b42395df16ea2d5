"""Which tracker a training reports to."""

from ..errors import InvalidValueError


__all__ = ["tracker_of"]

_DEFAULT = "tensorboard"


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


def _text(name: object) -> str:
    return str(getattr(name, "value", name))
