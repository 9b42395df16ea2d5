"""The app that the commands join, what becomes of errors, and tables of text."""

import functools
from collections.abc import Callable
from typing import Any

import typer

from ..errors import ComCATError


__all__ = ["app", "command", "commands", "main", "table"]

app = typer.Typer(
    name="comcat",
    help="Compress and customize attention-based vision models with low-rank attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of `comcat`."""
    app(prog_name="comcat")


@app.callback()
def commands() -> None:
    """Keeps `comcat` an app of several commands while it has one."""


def command(group: typer.Typer) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command; an error that comcat_hf raises on purpose is one message and exit code 1, no traceback.

    Args:
        group: the app, or one for commands of a common first word.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        words = [name for name in (group.info.name if group is not app else None, function.__name__) if name]
        called = " ".join(words).replace("_", "-")

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except ComCATError as error:
                typer.echo(f"comcat {called}: {error}", err=True)
                raise typer.Exit(1) from None

        group.command()(guarded)
        return function

    return add


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def row(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join([row(head), "  ".join("-" * width for width in widths), *map(row, lines)])
