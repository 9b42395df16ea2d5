"""Settings from a recipe (YAML) and the command line, which has the last word."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ...errors import InvalidValueError
from .settings import CustomizeSettings


__all__ = ["parse_settings", "recipe_names"]

_DESCRIPTION = """Train a ComCAT adapter on images of a subject, DreamBooth style. The first argument may be a recipe:
a YAML file of flags and values, or the name of one that comes with comcat_hf."""


def parse_settings(arguments: Sequence[str]) -> CustomizeSettings:
    """Read the command line.

    Args:
        arguments: flags, with a recipe as the first argument or behind `--config`; flags go over the recipe's values.

    Returns:
        the settings, not yet checked.

    Raises:
        InvalidValueError: an unknown flag or key, a value of the wrong kind, a recipe that cannot be read.
    """
    recipe, flags = _split_recipe(list(arguments))
    parser = _Parser(CustomizeSettings, description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE", help="A recipe, if it is not the first argument.")
    # Through the same parser as the flags, so that one rule says what a value may be.
    given = [] if recipe is None else _as_flags(recipe, _read_recipe(recipe))
    parsed, *_, unknown = parser.parse_args_into_dataclasses(
        [*given, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_hint(unknown[0].lstrip('-').split('=')[0])}")
    return parsed


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    return tuple(sorted(item.name.removesuffix(".yaml") for item in _recipes() if item.name.endswith(".yaml")))


class _Parser(HfArgumentParser):
    """Raises where argparse would print and exit."""

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


def _read_recipe(name: str) -> Mapping[str, Any]:
    import yaml

    path = Path(name).expanduser()
    packaged = {item.name.removesuffix(".yaml"): item for item in _recipes()}
    source = path if path.is_file() else packaged.get(name.removesuffix(".yaml"))
    if source is None:
        raise InvalidValueError(
            f"{name}: expected a recipe, found no such file. Give the path of a YAML file or one of: "
            f"{', '.join(recipe_names())}."
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


def _as_flags(recipe: str, content: Mapping[str, Any]) -> list[str]:
    known = [field.name for field in fields(CustomizeSettings)]
    flags = []
    for key, value in content.items():
        if key not in known:
            raise InvalidValueError(
                f"{recipe}: expected the names of flags, found {key!r}{_hint(str(key))}. `--help` lists the names."
            )
        if isinstance(value, Mapping | list):
            raise InvalidValueError(f"{recipe}: {key}: expected one value, found {value!r}. Write a single value.")
        if value is not None:
            flags.append(f"--{key}={value}")
        elif key in ("qk_rank", "vo_rank"):
            flags.append(f"--{key}=none")
    return flags


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, [field.name for field in fields(CustomizeSettings)], n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _recipes() -> list[Any]:
    folder = resources.files("comcat_hf.configs") / "recipes"
    return list(folder.iterdir()) if folder.is_dir() else []
