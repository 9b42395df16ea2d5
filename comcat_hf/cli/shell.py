"""The app that the commands join, what becomes of errors, and tables of text."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ..errors import ComCATError
from ..hub import without_secrets
from ..version import __version__


__all__ = ["Revision", "app", "command", "commands", "main", "table"]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")]


class _Commands(typer.core.TyperGroup):
    """The commands, whose usage errors repeat no token that stands where a name belongs."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        # typer keeps its usage errors in a private module.
        except Exception as error:
            if isinstance(message := getattr(error, "message", None), str):
                error.message = without_secrets(message)  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="comcat",
    cls=_Commands,
    help="Compress and customize attention-based vision models with low-rank attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of `comcat`."""
    app(prog_name="comcat")


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"comcat_hf {__version__}")
        raise typer.Exit


@app.callback()
def commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `comcat` itself."""


def command(group: typer.Typer, *, light: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command; an error that comcat_hf raises on purpose is one message and exit code 1, no traceback.

    Args:
        group: the app, or one for commands of a common first word.
        light: it needs no model, so that it starts without torch. Others import what they need when they run.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        words = [name for name in (group.info.name if group is not app else None, function.__name__) if name]
        called = " ".join(words).replace("_", "-")

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                if not light:
                    _run_package()
                function(*args, **kwargs)
            except ComCATError as error:
                typer.echo(without_secrets(f"comcat {called}: {error}"), err=True)
                raise typer.Exit(1) from None

        group.command()(guarded)
        return function

    return add


def _run_package() -> None:
    """Run `comcat_hf/__init__.py`, which registers with the libraries, where comcat_cli.py left it to the command."""
    package = sys.modules[__name__.partition(".")[0]]
    if not hasattr(package, "compress"):
        package.__spec__.loader.exec_module(package)


def table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def row(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join([row(head), "  ".join("-" * width for width in widths), *map(row, lines)])
