"""The command line: `comcat <command>`. Everything that prints is here."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .demo import BATCH, DemoResult, DemoSettings, run_demo
from .demo_customize import CustomizeDemoResult, CustomizeDemoSettings, run_customize_demo
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
            name = function.__name__.replace("_", "-")
            typer.echo(f"comcat {name}: {error}", err=True)
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


@command
def demo_customize(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("comcat_demo/customize"),
    steps: Annotated[int, typer.Option(help="Steps in which each method learns the new digit.", min=1)] = 100,
    base_steps: Annotated[int, typer.Option(help="Steps of training the base.", min=2)] = 1200,
    samples: Annotated[int, typer.Option(help="Images of the new digit to judge a method by.", min=6)] = 200,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads for torch.", min=1)] = 1,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
    """Train a small Stable Diffusion on nine of scikit-learn's digits, and teach it the tenth in four ways.

    Takes several minutes on two CPU cores. The table compares the size of what is saved, how well the new digit is
    drawn, and how well the old ones still are.
    """
    settings = CustomizeDemoSettings(steps, base_steps, samples=samples, seed=seed, threads=threads)
    show_customize(run_customize_demo(output, settings, report=typer.echo, progress=progress))


def show_customize(result: CustomizeDemoResult) -> None:
    """Print the table of the demo of customizing and what to do next."""
    head = ("method", "bytes", "trained", "steps", "rate", "seconds", "V* right", "old right")
    lines = [
        (
            *(row.name, f"{row.size:,}", f"{row.parameters:,}", str(row.steps)),
            *("-" if row.rate is None else f"{row.rate:g}", f"{row.seconds:.1f}", f"{row.new:.1%}", f"{row.old:.1%}"),
        )
        for row in result.rows
    ]
    settings = result.settings
    typer.echo()
    typer.echo(table(head, lines))
    typer.echo(
        f"\nBytes of all files saved; seconds of training at the rate shown, which was the best of three on other "
        f"images.\n"
        f"V* right: share of {settings.samples} images of V* that a classifier reads as {result.new!r}; old right: of "
        f"{settings.caption_samples} images\nfor each of the nine old captions, as what they say. Of real images that "
        f"it has not seen, the classifier reads {result.accuracy:.1%}\nright, and {result.recall:.1%} of those of "
        f"{result.new!r}. All images were drawn with what was saved, loaded again.\n\n"
        f"Images:  {result.image}\n"
        f"Base:    {result.base}\n"
        f"Adapter: {result.adapter}\n\n"
        f"Load it with:\n\n"
        f"    import comcat_hf\n"
        f"    from diffusers import StableDiffusionPipeline\n\n"
        f'    pipe = StableDiffusionPipeline.from_pretrained("{result.base}")\n'
        f'    comcat_hf.load_comcat_weights(pipe, "{result.adapter}")\n'
        f'    pipe("a photo of a V*", guidance_scale={settings.guidance:g}).images[0]\n\n'
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
