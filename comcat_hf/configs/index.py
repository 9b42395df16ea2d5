"""`comcat_adapter.json`, the index of a pipeline adapter: its base, and its parts by name."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import TEXT, Kind, check_fields, finite, make_document, mapping_of, open_document, optional, shown
from ..errors import CheckpointError
from ..hub import read_json, write_json_atomic


__all__ = ["INDEX", "read_index", "write_index"]

INDEX = "comcat_adapter.json"
_FORMAT, _VERSION = "comcat_adapter", 1
_PART = {"class": TEXT, "base_sizes": mapping_of(finite(0))}
_FIELDS = {
    **dict.fromkeys(("base_model_name_or_path", "revision"), optional(TEXT)),
    "parts": mapping_of(Kind("what is known of a part", lambda about: isinstance(about, Mapping))),
}


def read_index(file: Path) -> dict[str, Any]:
    """Read the index of a pipeline adapter.

    Raises:
        CheckpointError: the file is not an index, or is damaged.
    """
    fix = "Download or save the adapter again."
    index = open_document(read_json(file), _FORMAT, _VERSION, _FIELDS, str(file), fix=fix)
    for name, about in index["parts"].items():
        if not re.fullmatch(r"\w+", name):
            raise CheckpointError(f"{file}: expected 'parts' by their names, found {shown(name)}. {fix}")
        check_fields(about, _PART, f"{file}: {name}", error=CheckpointError, fix=fix)
    return index


def write_index(file: Path, index: Mapping[str, Any]) -> None:
    """Write an index for [`read_index`]."""
    write_json_atomic(file, make_document(_FORMAT, _VERSION, index))
