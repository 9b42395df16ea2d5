"""Shared parts of all plots: figures and axes of matplotlib, colours, and files."""

import io
from pathlib import Path
from typing import Any

from ...errors import ComCATError, InvalidValueError
from ...hub import write_bytes_atomic


__all__ = [
    *("BLACK", "COLORS", "EMPTY", "FAINT", "MUTED", "RIGHT", "WHITE", "WRONG"),
    *("axes_for", "check_target", "finish", "new_figure", "open_frame", "save_figure"),
]

# The colour-blind safe palette of Okabe and Ito, without its yellow, which is hard to see on white.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Text and lines beside the data, grids, and cells without data.
MUTED, FAINT, EMPTY = "#595959", "#dddddd", "#f2f2f2"
# For text on a coloured cell, which keeps its colour on a dark page; plain black and white change places there.
BLACK, WHITE = "#020202", "#fdfdfd"
# Colours of an SVG on a dark page. The other colours of data stand out from light and from dark paper.
_DARK = {"#000000": "#e8e8e8", "#ffffff": "#16191d", MUTED: "#a8a8a8", FAINT: "#3b4046", EMPTY: "#24282d"}
_DARK |= {COLORS[0]: "#3f9fdc"}
# Colour and line style of frames around right and wrong images.
RIGHT, WRONG = (COLORS[0], "solid"), (COLORS[1], "dashed")

_FORMATS = (".png", ".svg")
_MISSING = "Plots need matplotlib, which is not installed. Install it with: pip install 'comcat_hf[demo]'"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, outside pyplot: the user's figures and backend do not change.

    Raises:
        ComCATError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ComCATError(_MISSING) from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def axes_for(ax: Any | None, width: float, height: float) -> Any:
    """The given axes, or the axes of a new figure of a size in inches."""
    return new_figure(width, height).subplots() if ax is None else ax


def check_target(path: str | Path | None, ax: Any | None = None) -> None:
    """Check the target of a plot before drawing.

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


def open_frame(axes: Any) -> None:
    """Draw a grid, and leave the frame open at the top and on the right."""
    axes.grid(color=FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def finish(figure: Any, path: str | Path | None, title: str | None, ax: Any | None = None) -> Any:
    """Add the title and write the plot; returns the path, or the figure if there is no path.

    On given axes, the title belongs to these axes and not to the whole figure.
    """
    if title and ax is None:
        figure.suptitle(title, fontsize=12)
    elif title:
        ax.set_title(title, fontsize=10)
    return figure if path is None else save_figure(figure, path)


def _format_of(path: str | Path) -> str:
    """`"png"` or `"svg"`, by the suffix of a file's name."""
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InvalidValueError(f"{path}: expected a file name that ends in {' or '.join(_FORMATS)}, got {suffix!r}.")
    return suffix.removeprefix(".")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure in the format of the file's suffix; an existing file is replaced in one step.

    An SVG follows the reader's choice of a light or a dark page, and paints its own paper. The same figure gives the
    same bytes: an SVG contains neither the time nor random names.

    Raises:
        InvalidValueError: a name that does not end in `.png` or `.svg`.
    """
    import matplotlib

    kind = _format_of(path)
    payload = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "comcat_hf"}):
        figure.savefig(payload, format=kind, metadata={"Date": None} if kind == "svg" else None)
    content = payload.getvalue()
    return write_bytes_atomic(path, _themed(content) if kind == "svg" else content)


def _themed(svg: bytes) -> bytes:
    """An SVG of matplotlib with its colours on a dark page; programs that ignore the rule show the light ones."""
    # What has no colour of its own, such as black text, takes the root's.
    rules = [f"svg {{fill: {_DARK['#000000']}}}"]
    for light, dark in _DARK.items():
        rules += [f'[style*="{what}: {light}"] {{{what}: {dark} !important}}' for what in ("fill", "stroke")]
    style = "@media (prefers-color-scheme: dark) {" + " ".join(rules) + "}"
    return svg.replace(b"</style>", style.encode() + b"</style>", 1)
