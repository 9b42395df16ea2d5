"""Labels of a data set, matched with those of a model: by name where both have names, else by number."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...checks import some_of
from ...errors import InvalidValueError


__all__ = ["LabelTable", "match_labels", "model_labels"]

_SINGLE = "single_label_classification"
_NEARLY_ALL = 0.9
# Folders of ImageNet have WordNet ids for names; their order is that of its models' labels, told by these three.
_WORDNET_IDS = MappingProxyType({"n01440764": "tench", "n02123045": "tabby", "n15075141": "toilet tissue"})


@dataclass(frozen=True)
class LabelTable:
    """From what a data set writes to the model's numbers."""

    numbers: Mapping[Any, int] = field(repr=False)
    place: str
    column: str

    def __call__(self, value: Any) -> int:
        """The model's number of a label.

        Raises:
            InvalidValueError: the model lacks it.
        """
        # True and 1.0 would be found under 1.
        number = self.numbers.get(value) if type(value) in (int, str) else None
        if number is None:
            raise InvalidValueError(
                f"{self.place}: expected labels of the model in --label_column_name {self.column!r}, found {value!r}. "
                "Remove these rows, or give the data set that the model was trained for."
            )
        return number


def model_labels(config: Any, place: str) -> tuple[tuple[str, ...], bool]:
    """The names of a model's labels by number, and whether someone chose them (`LABEL_0` and so on nobody did).

    Raises:
        InvalidValueError: it is one for regression or for several labels per image, or its labels are not numbered
            from 0.
    """
    kind = config.problem_type or (_SINGLE if config.num_labels > 1 else "regression")
    if kind != _SINGLE or config.num_labels < 2:
        raise InvalidValueError(
            f"{place}: expected a classifier that gives each image one of several labels (problem_type {_SINGLE}), "
            f"found problem_type {kind} with num_labels {config.num_labels}. Give one; in Python, "
            "comcat_hf.compress takes the others as well."
        )
    if set(config.id2label) != set(range(config.num_labels)):
        raise InvalidValueError(
            f"{place}: expected the numbers from 0 to {config.num_labels - 1} in the id2label of config.json, found "
            f"{some_of(map(str, config.id2label), 5)}. Number the labels as the model's outputs are: from 0, without "
            "a gap."
        )
    names = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return names, any(name != f"LABEL_{number}" for number, name in enumerate(names))


def match_labels(
    rows: Any, column: str, names: tuple[str, ...], chosen: bool, place: str
) -> tuple[LabelTable, tuple[str, ...]]:
    """Give every label of a data set its number in the model.

    Args:
        rows: the data set; a map-style one is looked through.
        column: of its labels.
        names: of the model, by number.
        chosen: whether these names mean something.
        place: for messages.

    Returns:
        the table, and the names by number: the data set's where the model had none that mean anything.

    Raises:
        InvalidValueError: a column of another kind, or the model lacks labels that occur.
    """
    from datasets import Dataset

    classes, numbered = _kind_of(rows.features[column], column, place)
    found = tuple(rows.unique(column)) if isinstance(rows, Dataset) else None
    theirs = classes
    if not numbered and found is not None:
        theirs = tuple(sorted(value for value in found if value is not None))
    if theirs is None:
        if not numbered and not chosen:
            raise InvalidValueError(
                f"{place}: expected labels by number in --label_column_name {column!r}, for the model's labels are "
                "only numbered, found names, which cannot be numbered while they are streamed. Leave out --streaming, "
                "or name the labels in the id2label of the model's configuration."
            )
        known: dict[Any, int] = dict(enumerate(range(len(names)))) if numbered else dict(_by_name(names))
    else:
        numbers = _numbers_of(theirs, numbered, names, chosen)
        if numbers is None and len(theirs) != len(names):
            raise InvalidValueError(
                f"{place}: expected {len(names)} labels, as the model has, in --label_column_name {column!r}, found "
                f"{len(theirs)}: {some_of(theirs, 5)}. Give the data set that the model was trained for, or a model "
                "trained for these labels."
            )
        if numbers is None:
            numbers, names = _enumerated(theirs), theirs
        written = enumerate(theirs) if numbered else zip(theirs, theirs, strict=True)
        known = {value: numbers[name] for value, name in written if name in numbers}
    # What no row has may be missing from the model; where rows are read later, what is declared counts.
    occurring = range(len(classes or ())) if found is None else found
    if lacking := [value for value in occurring if value not in known]:
        named = dict(enumerate(classes or ()))
        raise _lacking(sorted((named.get(value, value) for value in lacking), key=str), names, column, place)
    return LabelTable(known, place, column), names


def _kind_of(feature: Any, column: str, place: str) -> tuple[tuple[str, ...] | None, bool]:
    """The classes that a column declares, if it does, and whether its rows hold numbers."""
    from datasets import ClassLabel, Value

    if isinstance(feature, ClassLabel):
        return tuple(feature.names), True
    kind = feature.dtype if isinstance(feature, Value) else ""
    # Lists and structs hold strings as well, and cannot be looked through.
    if not kind.startswith(("int", "uint")) and "string" not in kind:
        raise InvalidValueError(
            f"{place}: expected class names or whole numbers in --label_column_name {column!r}, found {feature}. Name "
            "the column that holds one label per image."
        )
    return None, "string" not in kind


def _lacking(lacked: Sequence[Any], names: Sequence[str], column: str, place: str) -> InvalidValueError:
    why = ""
    if all(re.fullmatch(r"n\d{8}", str(name)) for name in lacked):
        why = " WordNet ids are matched by their order, where folders and model have all of ImageNet's classes."
    return InvalidValueError(
        f"{place}: expected labels of the model ({len(names)}: {some_of(names, 5)}) in --label_column_name "
        f"{column!r}, found {len(lacked)} that it lacks: {some_of(map(str, lacked), 5)}.{why} Give the data set that "
        "the model was trained for, or a model trained for these labels."
    )


def _numbers_of(
    theirs: tuple[str, ...], numbered: bool, names: tuple[str, ...], chosen: bool
) -> dict[str, int] | None:
    """The model's numbers of the data set's names; `None` where the model's names say nothing of these."""
    if theirs == names:
        return _enumerated(theirs)
    if all(map(str.isdecimal, theirs)) and not set(theirs) & set(names):
        # Folders called 0, 1, 10, 2 are numbers, not places in the alphabet.
        return {name: int(name) for name in theirs if int(name) < len(names)}
    ranks = _enumerated(sorted(theirs))
    # Ids of WordNet, and a model's labels of the same classes in the same order.
    if len(theirs) == len(names) and all(
        one in ranks and word in names[ranks[one]].casefold() for one, word in _WORDNET_IDS.items()
    ):
        return ranks
    if not chosen and not set(theirs) <= set(names):
        return None
    # Names that differ in case, spaces or hyphens only are the same where that is unambiguous.
    exact, folded = _by_name(names), _by_name([_fold(name) for name in names])
    matched = {name: exact.get(name, folded.get(_fold(name))) for name in theirs}
    found = {name: number for name, number in matched.items() if number is not None}
    return found | (_at_the_same_place(theirs, names, found) if numbered else {})


def _at_the_same_place(theirs: Sequence[str], names: Sequence[str], found: Mapping[str, int]) -> dict[str, int]:
    """The few labels without a match, where nearly all others have theirs under their own number.

    ImageNet is like that: models call two of its classes crane, and a data set cannot have a name twice.
    """
    same = sum(found.get(name) == place for place, name in enumerate(theirs))
    if len(theirs) != len(names) or same < _NEARLY_ALL * len(names):
        return {}
    taken = set(found.values())
    return {name: place for place, name in enumerate(theirs) if name not in found and place not in taken}


def _enumerated(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _by_name(names: Sequence[str]) -> dict[str, int]:
    """Names that stand for one number only: two of ImageNet's classes are called crane."""
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
