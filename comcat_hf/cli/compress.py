"""`comcat compress`: from a dense image classifier to a small one, with its card and a report."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..compression.training.run import compress_vit
from ..compression.training.settings import STAGES, CompressSettings
from ..errors import ComCATError
from .shell import app, command


_WORDS = {
    "model_name_or_path": "MODEL",
    "output_dir": "OUT",
    "overwrite_output_dir": "--overwrite",
    "dataset_name": "--data",
    "calibration_samples": "--samples",
    "max_eval_samples": "--eval-samples",
    "target_modules": "--target-modules",
    "exclude_modules": "--exclude-modules",
    "num_train_epochs": "--epochs",
}


@command(app)
def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the dense image classifier.")],
    out: Annotated[Path, typer.Argument(help="Folder for the small model and the report.")],
    reduction: Annotated[float | None, typer.Option(help="Share to remove, 0 to 1.")] = None,
    plan: Annotated[str | None, typer.Option(help="Rank plan to follow instead: folder, file or Hub id.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Labelled images: a folder or a Hub id.", show_default="weights alone")
    ] = None,
    scope: Annotated[str, typer.Option(help="model, attention or mlp.")] = "model",
    target_modules: Annotated[
        str | None, typer.Option(help="Modules to compress, such as layers.0,layers.1; the reduction is of these.")
    ] = None,
    exclude_modules: Annotated[str | None, typer.Option(help="Modules to leave as they are, written alike.")] = None,
    metric: Annotated[str, typer.Option(help="What the reduction is of: params or macs.")] = "params",
    strategy: Annotated[
        str | None,
        typer.Option(help="How ranks are chosen.", show_default="sensitivity with data, else uniform"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Training images to calibrate on.", min=1)] = 256,
    eval_samples: Annotated[int | None, typer.Option(help="Validation images to use.", show_default="all")] = None,
    sweep: Annotated[str | None, typer.Option(help="Other reductions to measure, such as 0.3,0.7.")] = None,
    epochs: Annotated[float, typer.Option(help="Epochs of fine-tuning with distillation.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice and the order of images.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in the folder.")] = False,
) -> None:
    """Compress an image classifier; with data, fitted to images and measured on others.

    Everything else, such as augmentation, several processes and checkpoints, is scripts/compress_vit.py's, which goes
    on in the same folder.
    """
    stages = [name for name in STAGES if name != "push" and (name != "finetune" or epochs > 0)]
    settings = CompressSettings(
        model_name_or_path=model,
        output_dir=str(out),
        reduction=reduction,
        plan=plan,
        scope=scope,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        metric=metric,
        strategy=strategy or ("uniform" if data is None else "sensitivity"),
        weights_only=data is None,
        dataset_name=data,
        calibration_samples=samples,
        max_eval_samples=eval_samples,
        sweep=sweep,
        stages=",".join(stages),
        **({"num_train_epochs": epochs} if epochs > 0 else {}),
        seed=seed,
        overwrite_output_dir=overwrite,
        report_to="none",
    )
    try:
        result = compress_vit(settings, report=typer.echo)
    except ComCATError as error:
        raise ComCATError(_as_typed(str(error))) from error
    if result.interrupted is not None:
        typer.echo(f"Stopped by {result.interrupted}; the same command goes on.", err=True)
        raise typer.Exit(130)
    typer.echo(
        f"\nModel:  {out}\nReport: {out / 'report.html'}\n\n"
        f"Load it with:\n\n"
        f"    import comcat_hf\n"
        f"    from transformers import pipeline\n\n"
        f'    pipeline("image-classification", "{out}")'
    )


def _as_typed(message: str) -> str:
    """A message about the script's flags, in this command's words."""
    for flag, word in _WORDS.items():
        message = re.sub(rf"--{flag}\b", word, message)
    return message
