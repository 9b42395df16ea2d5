"""Settings from a recipe (YAML) and the command line, which has the last word."""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from ..checks import shown
from ..errors import InvalidValueError
from ..hub import without_secrets
from .flags import FLAG


__all__ = ["parse_settings", "recipe_names"]

Settings = TypeVar("Settings")

_DESCRIPTION = """The first argument may be a recipe: a YAML file of flags and values, or the name of one that comes
with comcat_hf."""


def parse_settings(
    cls: type[Settings],
    arguments: Sequence[str],
    *,
    kind: str,
    description: str,
    nullable: Sequence[str] = (),
    joint: Mapping[str, Sequence[str]] | None = None,
    alternatives: Mapping[Any, Sequence[str]] | None = None,
) -> Settings:
    """Read the command line of a script.

    Args:
        cls: the dataclass of its settings.
        arguments: flags, with a recipe as the first argument or behind `--config`; flags go over the recipe's values.
        kind: which recipes of the package may be named: `"customize"` or `"compress"`.
        description: what the script does, for `--help`.
        nullable: fields that a recipe may set to `null`; elsewhere that is as if the line were not there.
        joint: flags that set several fields each, with the names of these.
        alternatives: fields that stand for each other, with fields that belong to them. A flag for one of the former
            displaces whatever the recipe says of them all.

    Returns:
        the settings, not yet checked.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a recipe that cannot be read.
    """
    recipe, flags = _split_recipe(list(arguments))
    parser = _Parser(cls, prog=_called(), description=f"{description} {_DESCRIPTION}", allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="A recipe, if it is not the first argument.")
    joint = joint or {}
    for name, members in joint.items():
        parser.add_argument(f"--{name}", help=f"Sets {' and '.join(f'--{member}' for member in members)}.")
    known = [*(field.name for field in fields(cls)), *joint]  # type: ignore[arg-type]
    # Through the same parser as the flags, so that one rule says what a value may be.
    given = [] if recipe is None else _as_flags(recipe, _read_recipe(recipe, kind), known, nullable)
    gone = _displaced(flags, alternatives or {})
    given = [flag for flag in given if _name_of(flag) not in gone]
    parsed, *_, unknown = parser.parse_args_into_dataclasses(
        [*_spread(given, joint), *_spread(flags, joint)], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        # By its name alone: what stands behind a mistyped --hub_token is a secret.
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        hint = _hint(flags[0].lstrip("-"), known) if flags else ""
        parser.error(f"unrecognized arguments: {', '.join(flags) or 'a value without a flag'}{hint}")
    return parsed


def recipe_names(kind: str) -> tuple[str, ...]:
    """The names of the recipes of one kind that come with the package."""
    return tuple(sorted(item.name.removesuffix(".yaml") for item in _recipes(kind) if item.name.endswith(".yaml")))


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit."""

    def add_argument(self, *names: str, **how: Any) -> Any:
        how.pop(FLAG, None)
        return super().add_argument(*names, **how)

    def error(self, message: str) -> NoReturn:
        message = without_secrets(message)
        raise InvalidValueError(f"The command line cannot be read: {message}. `--help` lists the flags.")


def _called() -> str | None:
    """How the program was called; `None` for argparse's own guess, which of `python -m` would be `__main__.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return None if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def _split_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    first = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    reader = _Parser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config", action="append", default=[])
    given, rest = reader.parse_known_args(arguments[len(first) :])
    named = [*first, *given.config]
    if len(named) > 1:
        raise InvalidValueError(
            f"Expected one recipe, found {', '.join(named)}. Name one, and give the rest as flags."
        )
    return next(iter(named), None), rest


def _read_recipe(name: str, kind: str) -> list[tuple[Any, Any]]:
    import yaml

    path = Path(name).expanduser()
    packaged = {item.name.removesuffix(".yaml"): item for item in _recipes(kind)}
    source = path if path.is_file() else packaged.get(name.removesuffix(".yaml"))
    if source is None:
        raise InvalidValueError(
            f"{name}: expected a recipe, found no such file. Give the path of a YAML file or one of: "
            f"{', '.join(recipe_names(kind))}."
        )
    try:
        text = source.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise InvalidValueError(f"{name}: expected flags and values, found none of them. Correct it.")
        make = yaml.SafeLoader("").construct_object
        # Nothing but single values is made of what is read: a few lines can stand for lists without end.
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
                raise InvalidValueError(
                    f"{name}: {key.value if isinstance(key.value, str) else 'a name'}: expected one value, found a "
                    f"{value.id}. Write a single value."
                )
        return [(make(key), _as_written(value, make(value))) for key, value in node.value]
    except InvalidValueError:
        raise
    # Dates that are none, numbers of thousands of digits and lists a thousand deep each end in another.
    except (yaml.YAMLError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidValueError(
            f"{name}: expected a YAML file of flags and values, found one that cannot be read ({_problem(error)}). "
            "Correct the file."
        ) from error


def _as_written(node: Any, value: Any) -> Any:
    """A value of YAML, as text where its parser reads a truth or a number into words and digits of other meaning."""
    return node.value if isinstance(value, int) and node.value.lower() not in ("on", "off") else value


def _problem(error: Exception) -> str:
    """What is wrong with a recipe and where, without its lines, which may hold a token."""
    mark = getattr(error, "problem_mark", None)
    return (
        str(error)
        if mark is None
        else f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None)}"
    )


def _name_of(flag: str) -> str:
    return flag.removeprefix("--").split("=")[0].replace("-", "_")


def _displaced(flags: Sequence[str], alternatives: Mapping[Any, Sequence[str]]) -> set[str]:
    given = {_name_of(flag) for flag in flags if flag.startswith("--")}
    return {
        name for names, further in alternatives.items() if given.intersection(names) for name in (*names, *further)
    }


def _as_flags(
    recipe: str, lines: Sequence[tuple[Any, Any]], known: Sequence[str], nullable: Sequence[str]
) -> list[str]:
    flags = []
    for key, value in lines:
        if key not in known:
            raise InvalidValueError(
                f"{recipe}: expected the names of flags, found {shown(key)}{_hint(str(key), known)}. `--help` lists "
                "them."
            )
        if [before for before, _ in lines].count(key) > 1:
            raise InvalidValueError(f"{recipe}: {key}: expected it once, found it again. Strike one of the lines.")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidValueError(f"{recipe}: {key}: expected a finite number, found {value}. Correct it.")
        if value is not None:
            flags.append(f"--{key}={value}")
        elif key in nullable:
            flags.append(f"--{key}=none")
    return flags


def _spread(flags: list[str], joint: Mapping[str, Sequence[str]]) -> list[str]:
    """The flags with a flag of each field in place of one that sets several."""
    for name, members in joint.items():
        reader = _Parser(add_help=False, allow_abbrev=False)
        for one in (name, *members):
            reader.add_argument(f"--{one}", f"--{one.replace('_', '-')}", dest=one)
        given, rest = reader.parse_known_args(flags)
        value = getattr(given, name)
        if value is None:
            continue
        for member in members:
            if getattr(given, member) not in (None, value):
                raise InvalidValueError(
                    f"--{name} sets --{member}, found --{name} {value} and --{member} {getattr(given, member)}. Give "
                    "one of them."
                )
        flags = [*rest, *(f"--{member}={value}" for member in members)]
    return flags


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _recipes(kind: str) -> list[Any]:
    folder = resources.files("comcat_hf.configs") / "recipes" / kind
    return list(folder.iterdir()) if folder.is_dir() else []
