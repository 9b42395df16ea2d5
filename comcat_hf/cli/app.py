"""`comcat app`: the page in the browser."""

from typing import Annotated

import typer

from ..errors import InvalidValueError
from .shell import app as commands
from .shell import command


@command(commands)
def app(
    pipeline: Annotated[str | None, typer.Option(help="Folder or Hub id of a text-to-image pipeline.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER_OR_ID of one of its adapters; repeat.")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="Folder or Hub id of a dense image classifier.")] = None,
    compressed: Annotated[str | None, typer.Option(help="Folder or Hub id of a compressed one.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default is for this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7860,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address, through gradio's servers.")
    ] = False,
) -> None:
    """Try adapters and compressed models in the browser.

    Whoever reaches the address can load any model that this machine can read.
    """
    adapters = dict(map(_named, adapter or ()))
    if len(adapters) < len(adapter or ()):
        raise InvalidValueError("--adapter: expected names that differ, found one twice; choose another.")
    # gradio takes seconds to import, which other commands need not wait for.
    from ..app import AppSettings, run_app

    settings = AppSettings(pipeline, adapters, dense, compressed, host, port, share)
    run_app(settings, report=lambda address: typer.echo(f"Running on {address}\nPress Ctrl+C to stop."))


def _named(text: str) -> tuple[str, str]:
    name, _, source = text.partition("=")
    if not name or not source:
        raise InvalidValueError(f"--adapter: expected NAME=FOLDER_OR_ID, found {text!r}.")
    return name, source
