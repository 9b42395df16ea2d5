"""Settings from a recipe (YAML) and the command line, which has the last word."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from transformers import HfArgumentParser

from ..errors import InvalidValueError
from .flags import FLAG


__all__ = ["parse_settings", "recipe_names"]

Settings = TypeVar("Settings")

_DESCRIPTION = """The first argument may be a recipe: a YAML file of flags and values, or the name of one that comes
with comcat_hf."""


def parse_settings(
    cls: type[Settings], arguments: Sequence[str], *, kind: str, description: str, nullable: Sequence[str] = ()
) -> Settings:
    """Read the command line of a script.

    Args:
        cls: the dataclass of its settings.
        arguments: flags, with a recipe as the first argument or behind `--config`; flags go over the recipe's values.
        kind: which recipes of the package may be named: `"customize"` or `"compress"`.
        description: what the script does, for `--help`.
        nullable: fields that a recipe may set to `null`; elsewhere that is as if the line were not there.

    Returns:
        the settings, not yet checked.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a recipe that cannot be read.
    """
    recipe, flags = _split_recipe(list(arguments))
    parser = _Parser(cls, description=f"{description} {_DESCRIPTION}", allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="A recipe, if it is not the first argument.")
    known = [field.name for field in fields(cls)]
    # Through the same parser as the flags, so that one rule says what a value may be.
    given = [] if recipe is None else _as_flags(recipe, _read_recipe(recipe, kind), known, nullable)
    parsed, *_, unknown = parser.parse_args_into_dataclasses(
        [*given, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        hint = _hint(unknown[0].lstrip("-").split("=")[0], known)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
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
        raise InvalidValueError(f"The command line cannot be read: {message}. `--help` lists the flags.")


def _split_recipe(arguments: list[str]) -> tuple[str | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config="), arguments[:index] + arguments[index + 1 :]
        if argument == "--config":
            if index + 1 == len(arguments):
                raise InvalidValueError("--config needs the path or the name of a recipe, found nothing behind it.")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
    return None, arguments


def _read_recipe(name: str, kind: str) -> Mapping[str, Any]:
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
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InvalidValueError(
            f"{name}: expected a YAML file of flags and values, found one that cannot be read ({error}). "
            "Correct the file."
        ) from error
    if not isinstance(content, Mapping):
        raise InvalidValueError(f"{name}: expected flags and values, found {type(content).__name__}. Correct it.")
    return content


def _as_flags(recipe: str, content: Mapping[str, Any], known: Sequence[str], nullable: Sequence[str]) -> list[str]:
    flags = []
    for key, value in content.items():
        if key not in known:
            raise InvalidValueError(
                f"{recipe}: expected the names of flags, found {key!r}{_hint(str(key), known)}. `--help` lists them."
            )
        if isinstance(value, Mapping | list):
            raise InvalidValueError(f"{recipe}: {key}: expected one value, found {value!r}. Write a single value.")
        if value is not None:
            flags.append(f"--{key}={value}")
        elif key in nullable:
            flags.append(f"--{key}=none")
    return flags


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _recipes(kind: str) -> list[Any]:
    folder = resources.files("comcat_hf.configs") / "recipes" / kind
    return list(folder.iterdir()) if folder.is_dir() else []
