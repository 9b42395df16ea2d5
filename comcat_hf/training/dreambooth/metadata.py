"""Rows of the metadata file of an image folder, and text in the encodings that say which they are."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InvalidValueError, brief


__all__ = ["METADATA", "NAME", "read_metadata", "read_text"]

NAME = "file_name"
# The mark of UTF-16 is how that of UTF-32 begins.
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def read_metadata(path: Path) -> dict[str, Mapping[str, Any]]:
    """The rows of a metadata file by the line where they begin.

    Raises:
        InvalidValueError: it cannot be read, has no rows, or a row has no name of an image.
    """
    rows = METADATA[path.name.lower()](path)
    if not rows:
        raise InvalidValueError(f"{path}: expected a row for each image, found none. Add them or remove the file.")
    for line, row in rows.items():
        name = row.get(NAME)
        if not isinstance(name, str) or not name.strip():
            raise InvalidValueError(
                f"{path}, {line}: expected the name of an image under {NAME!r}, found {name!r:.80}. Correct the line."
            )
    return rows


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what its byte order mark says.

    Raises:
        InvalidValueError: it is in another encoding, or cannot be read.
    """
    try:
        content = path.read_bytes()
        encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
        return content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(
            f"{path}: expected text in UTF-8, found a file that cannot be read "
            f"({brief(error)}). Save it as UTF-8, or remove it."
        ) from error


def _read_jsonl(path: Path) -> dict[str, Mapping[str, Any]]:
    rows = {}
    # Only line feeds and carriage returns end a line: a caption may hold what else str.splitlines takes for an end.
    for number, line in enumerate(io.StringIO(read_text(path), newline=None), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, Mapping):
            raise InvalidValueError(
                f"{path}: expected JSON with {NAME!r} in line {number}, found {line.strip()!r:.80}. Correct the line."
            )
        rows[f"line {number}"] = row
    return rows


def _read_csv(path: Path) -> dict[str, Mapping[str, Any]]:
    text = read_text(path)
    for delimiter in ",;\t|":
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            header = [cell.strip() for cell in next(cells, [])]
        except csv.Error:
            # By another separator, quotation marks may stand in their places.
            continue
        if NAME in header:
            return _csv_rows(path, header, cells)
    first = text.strip().split("\n")[0]
    raise InvalidValueError(
        f"{path}: expected column names with {NAME!r} in line 1, found {first!r:.80}. Correct the line."
    )


def _table(path: Path, cells: Any) -> Iterator[list[str]]:
    try:
        yield from cells
    except csv.Error as error:
        raise InvalidValueError(
            f"{path}: expected a table, found line {cells.line_num} that cannot be read ({brief(error)}). Correct it."
        ) from error


def _csv_rows(path: Path, header: Sequence[str], cells: Any) -> dict[str, Mapping[str, Any]]:
    rows: dict[str, Mapping[str, Any]] = {}
    line = cells.line_num + 1
    for row in _table(path, cells):
        if len(row) > len(header):
            raise InvalidValueError(
                f"{path}, line {line}: expected {len(header)} values, found {len(row)}. Put quotation marks around a "
                "caption that holds the separator."
            )
        if any(row):
            # A caption is no number; in this format alone the type does not tell.
            rows[f"line {line}"] = {
                name: float(value) if re.fullmatch(r"[-+]?\d+(\.\d+)?", value) and name != NAME else value
                for name, value in zip(header, row, strict=False)
            }
        line = cells.line_num + 1
    return rows


METADATA = {"metadata.jsonl": _read_jsonl, "metadata.csv": _read_csv, "metadata.tsv": _read_csv}
