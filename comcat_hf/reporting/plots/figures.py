"""What all pictures share: matplotlib where it is installed, axes, colours, and files."""

import io
from pathlib import Path
from typing import Any

from ...errors import ComCATError, InvalidValueError
from ...hub import write_bytes_atomic


__all__ = ["COLORS", "RIGHT", "WRONG", "axes_for", "check_target", "finish", "new_figure", "save_figure"]

# Okabe and Ito's colours, which every kind of colour vision tells apart, without their yellow, which white swallows.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Colour and line; wrong ones are dashed besides.
RIGHT, WRONG = (COLORS[0], "solid"), (COLORS[1], "dashed")

_FORMATS = (".png", ".svg")
_MISSING = "Plots need matplotlib, which is not installed. Install it with: pip install 'comcat_hf[demo]'"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, outside of pyplot: the user's own figures and backend are left alone.

    Raises:
        ComCATError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ComCATError(_MISSING) from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def axes_for(ax: Any | None, width: float, height: float) -> Any:
    """The axes to draw on: those given, else those of a new figure of a size in inches."""
    return new_figure(width, height).subplots() if ax is None else ax


def check_target(path: str | Path | None, ax: Any | None = None) -> None:
    """Say before anything is drawn where a picture cannot go.

    Raises:
        InvalidValueError: a name that does not end in `.png` or `.svg`, or both a name and axes.
    """
    if path is not None and ax is not None:
        raise InvalidValueError(
            f"Expected a file or ax=, found both ({path} and {ax!r}). Save the figure of your axes yourself, "
            "ax.figure.savefig(...), or leave ax out."
        )
    if path is not None:
        _format_of(path)


def finish(figure: Any, path: str | Path | None, title: str | None, ax: Any | None = None) -> Any:
    """Put a title on a picture and write it; returns the path, or the figure where there is none.

    The title of axes that were given stands above them alone.
    """
    if title and ax is None:
        figure.suptitle(title, fontsize=12)
    elif title:
        ax.set_title(title, fontsize=10)
    return figure if path is None else save_figure(figure, path)


def _format_of(path: str | Path) -> str:
    """`"png"` or `"svg"`, by the end of a file's name."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InvalidValueError(f"{path}: expected a file name that ends in {' or '.join(_FORMATS)}, got {suffix!r}.")
    return suffix.removeprefix(".")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as what its name says; a file that is there is replaced in one step.

    The same figure gives the same bytes: neither the time nor random names stand in an SVG.

    Raises:
        InvalidValueError: a name that does not end in `.png` or `.svg`.
    """
    import matplotlib

    kind = _format_of(path)
    payload = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "comcat_hf"}):
        figure.savefig(payload, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return write_bytes_atomic(path, payload.getvalue())
