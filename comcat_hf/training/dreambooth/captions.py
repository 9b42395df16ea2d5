"""Captions of images: in text files beside them, in a metadata file, or in a column of a data set."""

import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checks import some_of
from ...errors import InvalidValueError
from .metadata import METADATA, NAME, read_metadata, read_text


__all__ = ["BESIDE", "TABLES", "clean_caption", "column_captions", "folder_captions", "warn_of_unread_captions"]

logger = logging.getLogger(__name__)

_KEYS = ("text", "caption")
BESIDE = (".txt", ".caption")
# Files that may hold captions, but not where this module looks for them.
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")


@dataclass(frozen=True)
class _Caption:
    """A text and where it stands."""

    name: str
    text: str
    place: str


def folder_captions(
    folder: Path, images: Sequence[Path], column: str | None, suffixes: Collection[str]
) -> dict[Path, str]:
    """Captions by image; metadata files go over text files, and one warning counts what does not fit.

    Args:
        folder: holds the images, and captions beside them or in a metadata file.
        images: which files of the folder are trained on.
        column: key of the captions in the metadata file; by default `text` or `caption`.
        suffixes: of images, in lower case.

    Raises:
        InvalidValueError: a file cannot be read, a caption is no text, or it is not clear which image has which.
    """
    finder = _Finder(folder, images, suffixes)
    files = _visible(folder)
    tables = [path for path in files if path.name.lower() in METADATA]
    if column is not None and not tables:
        raise InvalidValueError(
            f"--caption_column {column!r}: expected one of {', '.join(METADATA)} in {folder}, which holds captions "
            "under this name, found none. Add the file, or leave --caption_column out."
        )
    beside = [path for path in files if path.suffix.lower() in BESIDE]
    strays = [path.name for path in files if path.suffix.lower() in TABLES and path not in tables]
    strays += [path.name for path in beside if not finder.find(path.stem, str(path))]
    written, unmatched = finder.assign(one for path in tables for one in _metadata_captions(path, column))
    if unmatched and not written:
        raise InvalidValueError(
            f"{unmatched[0].place}: expected the name of an image in {folder} under {NAME!r}, found "
            f"{unmatched[0].name!r}, and no other of the {len(unmatched)} captions has an image. The images are "
            f"{some_of([path.name for path in images])}."
        )
    texts, _ = finder.assign(_file_captions(beside, finder))
    overruled = [one.place for path, one in texts.items() if one.text != written.get(path, one).text]
    captions = {path: one.text for path, one in (texts | written).items()}
    bare = [path.name for path in images if path not in captions]
    facts = {
        f"of {len(images)} images, those without a caption get the instance prompt": bare if captions else [],
        "captions without an image": [f"{one.name!r} in {one.place}" for one in unmatched],
        "files not read, because they belong to no image": strays,
        "files not used, because a metadata file has another caption": overruled,
    }
    found = [f"{what}: {len(names)} ({some_of(names)})" for what, names in facts.items() if names]
    if found:
        logger.warning("%s: %s.", folder, "; ".join(found))
    return captions


def column_captions(rows: Any, column: str | None, place: str) -> list[str | None]:
    """A caption, or `None`, for each row of a data set; one warning counts the rows without.

    Raises:
        InvalidValueError: the column holds something else than texts, or none at all.
    """
    text_columns = [name for name in rows.column_names if _holds_texts(rows.features[name])]
    if column is None:
        if text_columns:
            unnamed = "%s: no --caption_column is given, so all images get the instance prompt; texts are in %s."
            logger.warning(unnamed, place, some_of(text_columns, 5))
        return [None] * len(rows)
    if column not in text_columns:
        raise InvalidValueError(
            f"{place}: expected texts in --caption_column {column!r}, found {rows.features[column]}. "
            f"{f'Name one of {some_of(text_columns, 5)}' if text_columns else 'No column holds texts: leave it out'}."
        )
    captions = [clean_caption(text, f"{place}, row {row}") for row, text in enumerate(rows[column])]
    bare = [f"row {row}" for row, text in enumerate(captions) if text is None]
    if len(bare) == len(captions):
        raise InvalidValueError(
            f"{place}: expected captions in --caption_column {column!r}, found all {len(bare)} rows empty. Name "
            "another column, or leave it out."
        )
    if bare:
        counted = "%s: of %d images, those without a caption get the instance prompt: %d (%s)."
        logger.warning(counted, place, len(captions), len(bare), some_of(bare))
    return captions


def warn_of_unread_captions(folder: Path, suffixes: Collection[str], reason: str) -> None:
    """Say which caption files of a folder are passed over."""
    files = _visible(folder) if folder.is_dir() else []
    if found := [path.name for path in files if path.suffix.lower() in suffixes]:
        logger.warning("%s: %s; files not read: %d (%s).", folder, reason, len(found), some_of(found))


def clean_caption(value: Any, place: str) -> str | None:
    """A caption on one line, in composed characters and without byte order marks; `None` where it is empty.

    Raises:
        InvalidValueError: it is no text, or no text that can be printed.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidValueError(
            f"{place}: expected a caption, which is one text, found {value!r:.80}. Write one text, or take the row "
            "or the file away."
        )
    text = unicodedata.normalize("NFC", " ".join(value.replace("\ufeff", "").split()))
    broken = next((sign for sign in text if unicodedata.category(sign) in ("Cc", "Cs")), None)
    if broken is not None:
        raise InvalidValueError(
            f"{place}: expected a caption, found the character U+{ord(broken):04X}, which no text has, in "
            f"{text!r:.80}. Save it as UTF-8."
        )
    return text or None


class _Finder:
    """Finds the images that captions are for."""

    def __init__(self, folder: Path, images: Sequence[Path], suffixes: Collection[str]) -> None:
        self._folder = Path(os.path.abspath(folder))
        self._suffixes = suffixes
        # From the strictest way to read a name to the loosest: as it is, composed, in any case, without its suffix.
        self._indices = tuple(
            _grouped(images, key)
            for key in (
                lambda path: path.name,
                lambda path: _composed(path.name),
                lambda path: _folded(path.name),
                lambda path: _folded(path.stem),
            )
        )

    def find(self, name: str, place: str) -> Path | None:
        """The image that a name means.

        Args:
            name: of a file, perhaps behind folders, of another case or without its suffix.

        Raises:
            InvalidValueError: it may mean several images.
        """
        inside = Path(os.path.abspath(self._folder / name.replace("\\", "/")))
        if self._folder in inside.parents[1:] and os.path.isfile(inside):
            # A file in a folder of its own, which is not trained on.
            return None
        base = re.split(r"[\\/]", name.strip())[-1]
        stem, suffix = os.path.splitext(base)
        keys = (base, _composed(base), _folded(base), _folded(base))
        attempts = [(name, self._indices[0]), *zip(keys, self._indices, strict=True)]
        if suffix.lower() in self._suffixes:
            attempts.append((_folded(stem), self._indices[-1]))
        found = next((index[key] for key, index in attempts if key in index), [])
        if len(found) > 1:
            raise InvalidValueError(
                f"{place}: expected the caption of one image, found {name!r}, which may mean "
                f"{' or '.join(path.name for path in found)}. Write the whole name."
            )
        return found[0] if found else None

    def assign(self, captions: Iterator[_Caption]) -> tuple[dict[Path, _Caption], list[_Caption]]:
        """Captions by image, and those that have none.

        Raises:
            InvalidValueError: two captions of one image differ.
        """
        assigned: dict[Path, _Caption] = {}
        unmatched: list[_Caption] = []
        for caption in captions:
            image = self.find(caption.name, caption.place)
            if image is None:
                unmatched.append(caption)
            elif assigned.setdefault(image, caption).text != caption.text:
                raise InvalidValueError(
                    f"{image}: expected one caption, found {assigned[image].text!r:.80} ({assigned[image].place}) "
                    f"and {caption.text!r:.80} ({caption.place}). Remove one."
                )
        return assigned, unmatched


def _file_captions(paths: Sequence[Path], finder: _Finder) -> Iterator[_Caption]:
    for path in paths:
        # Only what belongs to an image needs to be readable.
        if finder.find(path.stem, str(path)) and (text := clean_caption(read_text(path), str(path))):
            yield _Caption(path.stem, text, str(path))


def _metadata_captions(path: Path, column: str | None) -> list[_Caption]:
    rows = read_metadata(path)
    keys = _KEYS if column is None else (column,)
    captions = []
    for line, row in rows.items():
        place = f"{path}, {line}"
        if column is not None and column not in row:
            raise InvalidValueError(
                f"{path}: expected the --caption_column {column!r} in {line}, found {', '.join(row)}. Name one of "
                "these."
            )
        found = {key: text for key in keys if (text := clean_caption(row.get(key), place)) is not None}
        if len(set(found.values())) > 1:
            raise InvalidValueError(
                f"{place}: expected one caption, found others under {' and '.join(found)}. Name one with "
                "--caption_column."
            )
        captions += [_Caption(row[NAME], text, place) for text in set(found.values())]
    texts = {
        key: None for row in rows.values() for key, value in row.items() if isinstance(value, str) and key != NAME
    }
    if not captions and (texts or column is not None):
        raise InvalidValueError(
            f"{path}: expected captions under {' or '.join(map(repr, keys))}, found none in {len(rows)} rows. "
            f"Name their key with --caption_column (texts are under {some_of(texts, 5) or 'none'}), or remove the "
            "file."
        )
    return captions


def _holds_texts(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())


def _grouped(images: Sequence[Path], key: Any) -> Mapping[str, list[Path]]:
    groups = defaultdict(list)
    for path in images:
        groups[key(path)].append(path)
    return groups


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(_composed(name).casefold())
