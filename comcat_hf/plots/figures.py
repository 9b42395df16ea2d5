"""What all pictures share: matplotlib where it is installed, colours, and files."""

import io
from pathlib import Path
from typing import Any

from ..errors import ComCATError, InvalidValueError
from ..transport import write_bytes_atomic


__all__ = ["COLORS", "RIGHT", "WRONG", "check_format", "new_figure", "save_figure"]

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


def check_format(path: str | Path) -> str:
    """`"png"` or `"svg"`, by the end of a file's name.

    Raises:
        InvalidValueError: another end.
    """
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

    kind = check_format(path)
    payload = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "comcat_hf"}):
        figure.savefig(payload, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return write_bytes_atomic(path, payload.getvalue())
