"""Checks of values, strict JSON, and documents that say their format, version and digest."""

import hashlib
import json
import logging
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import CheckpointError, ComCATError, InvalidValueError


__all__ = [
    "FLAG",
    "TEXT",
    "Kind",
    "above",
    "check",
    "check_fields",
    "finite",
    "list_of",
    "listed",
    "make_document",
    "mapping_of",
    "open_document",
    "optional",
    "parse_json",
    "shown",
    "some_of",
    "whole",
]

logger = logging.getLogger(__name__)

# Deeper JSON than this is none of ours, and would end in a RecursionError where it is copied or shown.
_DEEPEST = 64
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Kind:
    """What a value must be.

    Attributes:
        words: what an error says was expected.
        holds: whether a value is one.
    """

    words: str
    holds: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


def whole(low: int = 0, high: int | None = None) -> Kind:
    """A whole number within bounds, both included."""
    words = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    return Kind(words, lambda value: type(value) is int and value >= low and (high is None or value <= high))


def finite(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A number that is neither NaN nor infinite, within bounds, both included."""
    bounds = [f" {word} {bound:g}" for word, bound in (("from", low), ("to", high)) if math.isfinite(bound)]

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        # A whole number may be too large for a float.
        return low <= value <= high and -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT

    return Kind(f"a finite number{''.join(bounds)}", holds)


def above(low: float) -> Kind:
    """A number that is neither NaN nor infinite, above a bound."""
    number = finite(low)
    return Kind(f"a finite number above {low:g}", lambda value: number.holds(value) and value > low)


def listed(*options: str) -> Kind:
    """One of a few texts."""
    return Kind(f"one of {', '.join(options)}", lambda value: isinstance(value, str) and value in options)


def optional(kind: Kind) -> Kind:
    """That kind, or nothing."""
    return Kind(f"{kind.words} or nothing", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind) -> Kind:
    """A list of that kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, list | tuple | set) and all(map(kind.holds, value))

    return Kind(f"a list, each item {kind.words}", holds)


def mapping_of(kind: Kind) -> Kind:
    """A mapping from texts to that kind."""

    def holds(value: Any) -> bool:
        return isinstance(value, Mapping) and all(isinstance(k, str) and kind.holds(v) for k, v in value.items())

    return Kind(f"a mapping from names, each value {kind.words}", holds)


def shown(value: Any) -> str:
    """A value as an error shows it, however large it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def some_of(names: Iterable[str], most: int = 3, comma: str = ", ") -> str:
    """The first of some names as an error shows them, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return comma.join(names[:most]) + (f" and {more} more" if more > 0 else "")


def check(
    value: Any, kind: Kind, where: str, *, error: type[ComCATError] = InvalidValueError, fix: str = "Correct it."
) -> Any:
    """Return a value that is of a kind, or raise an error that names its place."""
    if not kind.holds(value):
        raise error(f"{where}: expected {kind.words}, found {shown(value)}. {fix}")
    return value


def check_fields(
    content: Any,
    kinds: Mapping[str, Kind],
    source: str,
    *,
    required: Collection[str] | None = None,
    error: type[ComCATError] = InvalidValueError,
    fix: str = "Correct it.",
) -> Mapping[str, Any]:
    """Return a mapping that has fields of these names and kinds, or raise an error that names one.

    Args:
        content: the mapping.
        kinds: what its values must be; other names are refused.
        source: where it came from.
        required: which may not be missing; by default all.
        error: what is raised.
        fix: what to do about it.
    """
    if not isinstance(content, Mapping):
        raise error(f"{source}: expected the fields {', '.join(kinds)}, found {shown(content)}. {fix}")
    missing = [name for name in (kinds if required is None else required) if name not in content]
    unknown = [name for name in content if name not in kinds]
    if missing or unknown:
        found = f"unknown {', '.join(map(shown, unknown[:3]))}" if unknown else f"no {missing[0]}"
        raise error(f"{source}: expected the fields {', '.join(kinds)}, found {found}. {fix}")
    for name, value in content.items():
        check(value, kinds[name], f"{source}: {name}", error=error, fix=fix)
    return content


def parse_json(text: str, source: str) -> Any:
    """Read JSON as its standard has it: without NaN and infinities, repeated names or broken texts.

    Raises:
        CheckpointError: it is none, or is nested deeper than any file of ours.
    """
    try:
        content = json.loads(text, parse_constant=_refuse, parse_float=_finite_float, object_pairs_hook=_unique)
        _check_values(content)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{source}: expected JSON, found {error.msg} at line {error.lineno}, column {error.colno}; "
            "the file is truncated or was edited by hand: save or download it again"
        ) from error
    except (RecursionError, ValueError) as error:
        reason = f"lists within lists, more than {_DEEPEST} deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(
            f"{source}: expected JSON, found {reason}; the file is damaged or was edited by hand: save or download it "
            "again"
        ) from error
    return content


def make_document(name: str, version: int | str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with the name and version of their format and a digest of all, as [`open_document`] reads them."""
    content = {"format": name, "format_version": version, **fields}
    return content | {"digest": _digest(content)}


def open_document(
    content: Mapping[str, Any],
    name: str,
    version: int | str,
    kinds: Mapping[str, Kind],
    source: str,
    *,
    required: Collection[str] | None = None,
    error: type[ComCATError] = CheckpointError,
    fix: str = "Save or download it again.",
    edits: bool = False,
) -> dict[str, Any]:
    """The fields of what [`make_document`] made, checked.

    Args:
        content: as it was read. Files without a digest are taken as they are.
        name, version: of the format.
        kinds, required, error, fix: as of [`check_fields`].
        source: where it came from; errors name it.
        edits: whether a person may have changed the fields: another digest is then a warning, else an error.
    """
    content = dict(content)
    digest = content.pop("digest", None)
    fields = dict(content)
    found = fields.pop("format", None)
    # Files of earlier versions may call it `version`.
    said = fields.pop("format_version" if "format_version" in fields else "version", None)
    if found != name or type(said) is not type(version) or said != version:
        raise error(
            f"{source}: expected format {name!r}, format_version {version}, found format {shown(found)}, "
            f"format_version {shown(said)}. Update comcat_hf if the file is newer; else give a file of this format."
        )
    check_fields(fields, kinds, source, required=required, error=error, fix=fix)
    if digest is not None and digest != _digest(content):
        if not edits:
            raise error(f"{source}: expected what was written there, found it changed (by its digest). {fix}")
        logger.warning("%s: it is not as comcat_hf wrote it (by its digest): edited by hand, or damaged.", source)
    return fields


def _digest(content: Mapping[str, Any]) -> str:
    # As JSON reads it: numbers as names become texts, tuples lists.
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which is no number of JSON")


def _finite_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]}, which is too large a number")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))} more than once")
    return content


def _check_values(content: Any) -> None:
    """Refuse what is nested too deep, and texts with half a surrogate pair, which cannot be written again."""
    level = [content]
    for _ in range(_DEEPEST):
        following: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                following += [*value, *value.values()]
            elif isinstance(value, list):
                following += value
            elif isinstance(value, str):
                value.encode("utf-8")
        if not following:
            return
        level = following
    raise RecursionError


_LARGEST_FLOAT = 1.7976931348623157e308
