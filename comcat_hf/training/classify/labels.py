"""Labels of a data set, matched with those of a model: by name where both have names, else by number."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ...errors import InvalidValueError


__all__ = ["LabelTable", "Vocabulary", "match_labels", "model_labels", "read_vocabulary", "shown"]

_SHOWN = 5
_SINGLE = "single_label_classification"
_NEARLY_ALL = 0.9
# Folders of ImageNet have WordNet ids for names; their order is that of its models' labels, told by these three.
_WORDNET_IDS = MappingProxyType({"n01440764": "tench", "n02123045": "tabby", "n15075141": "toilet tissue"})


@dataclass(frozen=True)
class Vocabulary:
    """The labels that a data set writes.

    Attributes:
        names: by number where the data set numbers them, else sorted; `None` where there are none, or where they
            only turn up while reading.
        numbered: whether the rows hold numbers.
        found: the values that occur; `None` where that turns up while reading.
    """

    names: tuple[str, ...] | None
    numbered: bool
    found: tuple[Any, ...] | None = None


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
            f"{shown(config.id2label)}. Number the labels as the model's outputs are: from 0, without a gap."
        )
    names = tuple(str(config.id2label[number]) for number in range(config.num_labels))
    return names, any(name != f"LABEL_{number}" for number, name in enumerate(names))


def shown(values: Iterable[Any]) -> str:
    """The first few values, for messages."""
    listed = [str(value) for value in values]
    return ", ".join(listed[:_SHOWN]) + (", …" if len(listed) > _SHOWN else "")


def read_vocabulary(rows: Any, features: Mapping[str, Any], column: str, place: str) -> Vocabulary:
    """The labels of a data set; map-style ones are looked through.

    Raises:
        InvalidValueError: a column of another kind.
    """
    from datasets import ClassLabel, Dataset, Value

    feature = features[column]
    kind = feature.dtype if isinstance(feature, Value) else ""
    named, numbered = isinstance(feature, ClassLabel), kind.startswith(("int", "uint"))
    # Lists and structs hold strings as well, and cannot be looked through.
    if not named and not numbered and "string" not in kind:
        raise InvalidValueError(
            f"{place}: expected class names or whole numbers in --label_column_name {column!r}, found {feature}. Name "
            "the column that holds one label per image."
        )
    found = tuple(rows.unique(column)) if isinstance(rows, Dataset) else None
    if named:
        return Vocabulary(tuple(feature.names), numbered=True, found=found)
    if numbered:
        return Vocabulary(None, numbered=True, found=found)
    names = None if found is None else tuple(sorted(value for value in found if value is not None))
    return Vocabulary(names, numbered=False, found=found)


def match_labels(
    vocabulary: Vocabulary, names: tuple[str, ...], chosen: bool, place: str, column: str
) -> tuple[LabelTable, tuple[str, ...]]:
    """Give every label of a data set its number in the model.

    Args:
        vocabulary: of the data set.
        names: of the model, by number.
        chosen: whether these names mean something.
        place, column: for messages.

    Returns:
        the table, and the names by number: the data set's where the model had none that mean anything.

    Raises:
        InvalidValueError: the model lacks labels that occur.
    """
    if vocabulary.names is None and vocabulary.numbered:
        known: dict[Any, int] = {number: number for number in range(len(names))}
    elif vocabulary.names is None and not chosen:
        raise InvalidValueError(
            f"{place}: expected labels by number in --label_column_name {column!r}, for the model's labels are only "
            "numbered, found names, which cannot be numbered while they are streamed. Leave out --streaming, or name "
            "the labels in the id2label of the model's configuration."
        )
    elif vocabulary.names is None:
        known = _by_name(names)
    elif vocabulary.names == names:
        known = _enumerated(vocabulary)
    elif _are_numbers(vocabulary.names) and not set(vocabulary.names) & set(names):
        known = _numbered(vocabulary, len(names))
    elif _are_imagenets(vocabulary.names, names):
        known = _ranked(vocabulary)
    elif chosen or set(vocabulary.names) <= set(names):
        known = _named(vocabulary, names)
    elif len(vocabulary.names) == len(names):
        known, names = _enumerated(vocabulary), vocabulary.names
    else:
        raise InvalidValueError(
            f"{place}: expected {len(names)} labels, as the model has, in --label_column_name {column!r}, found "
            f"{len(vocabulary.names)}: {shown(vocabulary.names)}. Give the data set that the model was trained for, "
            "or a model trained for these labels."
        )
    _check_found(vocabulary, known, names, place, column)
    return LabelTable(known, place, column), names


def _check_found(
    vocabulary: Vocabulary, known: Mapping[Any, int], names: tuple[str, ...], place: str, column: str
) -> None:
    # What no row has may be missing from the model; where rows are read later, what is declared counts.
    if vocabulary.found is not None:
        occurring = vocabulary.found
    elif vocabulary.names is not None and vocabulary.numbered:
        occurring = tuple(range(len(vocabulary.names)))
    else:
        return
    lacking = [value for value in occurring if value not in known]
    if lacking:
        lacked = sorted((_shown(vocabulary, value) for value in lacking), key=str)
        ids = all(_is_wordnet_id(str(name)) for name in lacked)
        why = (
            " WordNet ids are matched by their order, where folders and model have all of ImageNet's classes."
            if ids
            else ""
        )
        raise InvalidValueError(
            f"{place}: expected labels of the model ({len(names)}: {shown(names)}) in --label_column_name {column!r}, "
            f"found {len(lacking)} that it lacks: {shown(lacked)}.{why} Give the data set that the model was trained "
            "for, or a model trained for these labels."
        )


def _shown(vocabulary: Vocabulary, value: Any) -> Any:
    named = vocabulary.names is not None and vocabulary.numbered and isinstance(value, int)
    return vocabulary.names[value] if named and 0 <= value < len(vocabulary.names) else value


def _values(vocabulary: Vocabulary) -> list[tuple[str, Any]]:
    """Every name, with what the rows hold for it."""
    names = vocabulary.names or ()
    return [(name, number if vocabulary.numbered else name) for number, name in enumerate(names)]


def _enumerated(vocabulary: Vocabulary) -> dict[Any, int]:
    return {value: number for number, (_, value) in enumerate(_values(vocabulary))}


def _is_wordnet_id(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def _are_imagenets(ids: tuple[str, ...], names: tuple[str, ...]) -> bool:
    """Whether ids of WordNet and a model's labels are the same classes in the same order."""
    places = {name: number for number, name in enumerate(sorted(ids))}
    return len(ids) == len(names) and all(
        one in places and word in names[places[one]].casefold() for one, word in _WORDNET_IDS.items()
    )


def _ranked(vocabulary: Vocabulary) -> dict[Any, int]:
    """Numbers by the order of the names."""
    ranks = {name: number for number, name in enumerate(sorted(vocabulary.names or ()))}
    return {value: ranks[name] for name, value in _values(vocabulary)}


def _are_numbers(names: tuple[str, ...]) -> bool:
    return all(name.isdecimal() for name in names)


def _numbered(vocabulary: Vocabulary, count: int) -> dict[Any, int]:
    """Names that are numbers, as folders called 0, 1, 10, 2 are: not by their place in the alphabet."""
    return {value: int(name) for name, value in _values(vocabulary) if int(name) < count}


def _named(vocabulary: Vocabulary, names: tuple[str, ...]) -> dict[Any, int]:
    """By name; names that differ in case, spaces or hyphens only are the same where that is unambiguous."""
    exact, folded = _by_name(names), _by_name(tuple(map(_fold, names)))
    known = {}
    for name, value in _values(vocabulary):
        match = exact.get(name, folded.get(_fold(name)))
        if match is not None:
            known[value] = match
    return known | _at_the_same_place(vocabulary, names, known)


def _at_the_same_place(vocabulary: Vocabulary, names: tuple[str, ...], known: Mapping[Any, int]) -> dict[Any, int]:
    """The few labels without a match, where nearly all others have theirs under their own number.

    ImageNet is like that: models call two of its classes crane, and a data set cannot have a name twice.
    """
    if not vocabulary.numbered or len(vocabulary.names or ()) != len(names):
        return {}
    if sum(number == match for number, match in known.items()) < _NEARLY_ALL * len(names):
        return {}
    taken = set(known.values())
    return {number: number for number in range(len(names)) if number not in known and number not in taken}


def _by_name(names: tuple[str, ...]) -> dict[Any, int]:
    """Names that stand for one number only: two of ImageNet's classes are called crane."""
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return {name: number for number, name in enumerate(names) if name not in twice}


def _fold(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
