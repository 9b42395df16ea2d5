"""Flags of a script, as fields of a dataclass: each says what its value decides and which values it takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import InvalidValueError


__all__ = [
    "ABOVE_ZERO",
    "BELOW_ONE",
    "COUNT",
    "FLAG",
    "FROM_ZERO",
    "NOTHING",
    "SHARE",
    "Flag",
    "Rule",
    "check_flags",
    "fixed_flags",
    "flag",
    "flag_of",
    "values_deciding",
]

# Where a field's metadata holds its [`Flag`].
FLAG = "comcat_flag"

# Of a flag that no kept result depends on.
NOTHING: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """Which values a flag takes.

    Attributes:
        holds: whether a value may be used; never asked of `None`.
        wanted: the same in words.
    """

    holds: Callable[[Any], bool]
    wanted: str


COUNT = Rule(lambda value: value >= 1, "a whole number from 1")
ABOVE_ZERO = Rule(lambda value: 0 < value < math.inf, "a number above 0")
FINITE = Rule(math.isfinite, "a finite number")
FROM_ZERO = Rule(lambda value: 0 <= value < math.inf, "a number from 0")
BELOW_ONE = Rule(lambda value: 0 <= value < 1, "a number from 0 to below 1")
SHARE = Rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")


@dataclass(frozen=True)
class Flag:
    """What a flag decides, and which values it takes.

    Attributes:
        decides: names of the results that depend on the value: made with another value, they are not used again.
        check: which values it takes; `None` for those of its type.
        fixed: whether a checkpoint of another value cannot be gone on from at all.
    """

    decides: tuple[str, ...]
    check: Rule | None = None
    fixed: bool = False


def flag(default: Any, help: str, decides: tuple[str, ...], check: Rule | None = None, *, fixed: bool = False) -> Any:
    """A field of a settings class; the arguments behind the help text are those of [`Flag`]."""
    return field(default=default, metadata={"help": help, FLAG: Flag(decides, check, fixed)})


def flag_of(cls: Any, name: str) -> Flag:
    """What a field of a settings class says."""
    return cls.__dataclass_fields__[name].metadata[FLAG]


def values_deciding(settings: Any, what: str) -> dict[str, Any]:
    """The settings that decide a result, by name."""
    names = [f.name for f in fields(settings) if what in flag_of(type(settings), f.name).decides]
    return {name: getattr(settings, name) for name in names}


def fixed_flags(cls: type) -> tuple[str, ...]:
    """Names of the flags that a checkpoint cannot be gone on from with another value."""
    return tuple(f.name for f in fields(cls) if flag_of(cls, f.name).fixed)


def check_flags(settings: Any) -> None:
    """See whether each value is one that its flag takes.

    Raises:
        InvalidValueError: one is not.
    """
    for name, value in vars(settings).items():
        rule = flag_of(type(settings), name).check
        if value is not None and rule is not None and not rule.holds(value):
            raise InvalidValueError(f"--{name} must be {rule.wanted}, got {value!r}.")
