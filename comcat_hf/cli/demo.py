"""`comcat demo` and `comcat demo-customize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..hub import readable_size
from .shell import app, command, table


if TYPE_CHECKING:
    from ..demos.compress import DemoResult
    from ..demos.customize import CustomizeDemoResult


@command(app)
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
    from ..demos.compress import DemoSettings, run_demo

    settings = DemoSettings(reduction, epochs, finetune_epochs, seed, threads=threads)
    show(run_demo(output, settings, report=typer.echo, progress=progress))


def show(result: "DemoResult") -> None:
    """Print the demo's table and what to do next."""
    from ..demos.compress import BATCH

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


@command(app)
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
    from ..demos.customize import CustomizeDemoSettings, run_customize_demo

    settings = CustomizeDemoSettings(steps, base_steps, samples=samples, seed=seed, threads=threads)
    show_customize(run_customize_demo(output, settings, report=typer.echo, progress=progress))


def show_customize(result: "CustomizeDemoResult") -> None:
    """Print the table of the demo of customizing and what to do next."""
    head = ("method", "size", "trained", "steps", "rate", "seconds", "V* right", "old right")
    lines = [
        (
            *(row.name, readable_size(row.size), f"{row.parameters:,}", str(row.steps)),
            *("-" if row.rate is None else f"{row.rate:g}", f"{row.seconds:.1f}", f"{row.new:.1%}", f"{row.old:.1%}"),
        )
        for row in result.rows
    ]
    settings = result.settings
    typer.echo()
    typer.echo(table(head, lines))
    typer.echo(
        f"\nSize of all files saved; seconds of training at the rate shown, which was the best of three on other "
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
