"""The command line: `comcat <command>`. Everything that prints is here."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .demo import BATCH, DemoResult, DemoSettings, run_demo
from .errors import ComCATError


__all__ = ["app", "main"]

app = typer.Typer(
    name="comcat",
    help="Compress and customize attention-based vision models with low-rank attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of `comcat`."""
    app(prog_name="comcat")


@app.callback()
def commands() -> None:
    """Keeps `comcat` an app of several commands while it has one."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Add a command; an error that comcat_hf raises on purpose is one message and exit code 1, no traceback."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except ComCATError as error:
            typer.echo(f"comcat {function.__name__}: {error}", err=True)
            raise typer.Exit(1) from None

    app.command()(guarded)
    return function


@command
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("comcat_demo"),
    reduction: Annotated[float, typer.Option(help="Share of the parameters to remove, 0 to 1.")] = 0.5,
    epochs: Annotated[int, typer.Option(help="Epochs of training the dense model.", min=1)] = 30,
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning the compressed model.", min=1)] = 10,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads for torch.", min=1)] = 1,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Train a small ViT on scikit-learn's digits, compress it, fine-tune it, save it and load it again.

    Takes a few minutes on two CPU cores. The table compares accuracy on images held out, size and latency.
    """
    settings = DemoSettings(reduction, epochs, finetune_epochs, seed, threads=threads)
    show(run_demo(output, settings, report=typer.echo, progress=progress))


def show(result: DemoResult) -> None:
    """Print the demo's table and what to do next."""
    head = ("model", "accuracy", "parameters", "MACs", "latency")
    lines = [
        (row.name, f"{row.accuracy:.2%}", f"{row.parameters:,}", f"{row.macs:,}", f"{row.latency * 1e3:.2f} ms")
        for row in result.rows
    ]
    typer.echo()
    typer.echo(table(head, lines))
    typer.echo(
        f"\nAccuracy on the third of the images that was held out; MACs of one image; latency of a batch of {BATCH}, "
        f"median, CPU threads: {result.settings.threads}.\n"
        f"The saved model, loaded in a new process, gave bit for bit the same logits.\n\n"
        f"Model:             {result.model}\n"
        f"Ranks and spectra: {result.plot}\n\n"
        f"Load it with:\n\n"
        f"    import comcat_hf\n"
        f"    from transformers import pipeline\n\n"
        f'    pipeline("image-classification", "{result.model}")("{result.image}")\n\n'
        f"Done in {result.seconds:.0f} s."
    )


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]

    def row(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join([row(head), "  ".join("-" * width for width in widths), *map(row, lines)])


if __name__ == "__main__":
    main()
