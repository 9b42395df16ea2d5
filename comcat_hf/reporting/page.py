"""The HTML page of a report: sections of text, tables and pictures in one file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..errors import CheckpointError, InvalidValueError
from ..hub import write_text_atomic


__all__ = ["Section", "write_report"]

_KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


@dataclass(frozen=True)
class Section:
    """A section of a report; empty parts are left out.

    Attributes:
        heading: the heading.
        text: a paragraph.
        table: rows of cells; the first row is the head.
        pictures: captions, and PNG or SVG files to embed.
        gallery: captions, which may have several lines, and small PNG or SVG files to embed side by side, such as
            images of a data set: `push_folder` leaves a page that has one where it is.
        code: lines in a fixed-width font.
    """

    heading: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[tuple[str, Path]] = ()
    gallery: Sequence[tuple[str, Path]] = ()
    code: str = ""


def write_report(path: str | Path, title: str, summary: str, sections: Sequence[Section]) -> Path:
    """Write a report as one HTML file, without scripts and without links to other files.

    Args:
        path: file to write; an existing file is replaced in one step.
        title: title of the page.
        summary: a sentence or two below the title.
        sections: the sections, in order.

    Returns:
        the path.

    Raises:
        InvalidValueError: a picture that is neither PNG nor SVG.
        CheckpointError: a picture that cannot be read.
    """
    # Jinja escapes what it is given; torch needs it, so it is there.
    from jinja2 import Environment

    source = (resources.files("comcat_hf.reporting") / "page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    shown = [file for section in sections for _, file in (*section.pictures, *section.gallery)]
    pictures = {file: _embedded(file) for file in shown}
    return write_text_atomic(path, template.render(title=title, summary=summary, sections=sections, pictures=pictures))


def _embedded(file: Path) -> str:
    kind = _KINDS.get(Path(file).suffix.lower())
    if kind is None:
        raise InvalidValueError(f"{file}: expected a picture that ends in {' or '.join(_KINDS)}, got another file.")
    try:
        payload = Path(file).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: expected a picture for the report, found {error.strerror or error}; draw it first"
        ) from error
    # Embedded as an image: names inside two SVGs do not clash, and scripts inside an SVG do not run.
    return f"data:{kind};base64,{base64.b64encode(payload).decode('ascii')}"
