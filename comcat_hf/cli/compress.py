"""`comcat compress`: from a dense model to a small one, with its card and, of an image classifier, a report."""

import re
from pathlib import Path
from textwrap import indent
from typing import Annotated, Any

import typer

from ..errors import ComCATError, InvalidValueError
from .shell import app, command, table


_WORDS = {
    "model_name_or_path": "MODEL",
    "output_dir": "OUT",
    "overwrite_output_dir": "--overwrite",
    "dataset_name": "--data",
    "refine_steps": "--refine",
    "calibration_samples": "--samples",
    "max_eval_samples": "--eval-samples",
    "target_modules": "--target-modules",
    "exclude_modules": "--exclude-modules",
    "num_train_epochs": "--epochs",
}

_SAMPLES = 256


@command(app)
def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder for the small model.")],
    reduction: Annotated[float | None, typer.Option(help="Share to remove, 0 to 1.")] = None,
    plan: Annotated[str | None, typer.Option(help="Rank plan to follow instead: folder, file or Hub id.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Labelled images for a classifier: a folder or a Hub id.", show_default="weights alone"),
    ] = None,
    scope: Annotated[str, typer.Option(help="model, attention or mlp.")] = "model",
    target_modules: Annotated[
        str | None, typer.Option(help="Modules to compress, such as layers.0,layers.1; the reduction is of these.")
    ] = None,
    exclude_modules: Annotated[str | None, typer.Option(help="Modules to leave as they are, written alike.")] = None,
    metric: Annotated[str, typer.Option(help="What the reduction is of: params, macs or latency.")] = "params",
    strategy: Annotated[
        str | None,
        typer.Option(help="How ranks are chosen.", show_default="curvature with data, else uniform"),
    ] = None,
    layout: Annotated[
        str, typer.Option(help="free, or plain: the same widths in all layers, so that it loads without comcat_hf.")
    ] = "free",
    refine: Annotated[
        int, typer.Option(help="Steps of training without labels on the images, after the closed forms.", min=0)
    ] = 0,
    samples: Annotated[int, typer.Option(help="Training images to calibrate on.", min=1)] = _SAMPLES,
    eval_samples: Annotated[int | None, typer.Option(help="Validation images to use.", show_default="all")] = None,
    sweep: Annotated[str | None, typer.Option(help="Other reductions to measure, such as 0.3,0.7.")] = None,
    epochs: Annotated[float, typer.Option(help="Epochs of fine-tuning with distillation.", min=0)] = 0,
    subfolder: Annotated[
        str | None, typer.Option(help="Where the model lies in MODEL, such as unet of a pipeline.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice and the order of images.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run or model in OUT.")] = False,
) -> None:
    """Compress a model of transformers or diffusers; an image classifier with data is fitted to images and measured.

    Everything else, such as augmentation, several processes and checkpoints, is for `accelerate launch -m
    comcat_hf.training.classify`, which goes on in the same folder.
    """
    from ..native import class_name, is_image_classifier

    name = class_name(model, subfolder=subfolder)
    how: dict[str, Any] = {"scope": scope, "metric": metric, "layout": layout}
    if subfolder is not None or (name is not None and not is_image_classifier(name)):
        of_images = {"--data": data, "--sweep": sweep, "--epochs": epochs, "--eval-samples": eval_samples}
        of_images |= {"--refine": refine, "--samples": samples != _SAMPLES, "--seed": seed}
        of_images |= {f"--strategy {strategy}": strategy in ("sensitivity", "curvature", "search")}
        if unfit := [flag for flag, value in of_images.items() if value]:
            raise InvalidValueError(
                f"{unfit[0]}: expected an image classifier, found {name or model}, which is compressed by its weights "
                "alone. Leave the option out, or give batches to comcat_hf.compress in Python."
            )
        if (reduction is None) == (plan is None):
            found = "neither" if plan is None else "both"
            raise InvalidValueError(f"Give one of --reduction and --plan, got {found}.")
        named = {"target_modules": target_modules, "exclude_modules": exclude_modules}
        how |= {key: value.split(",") for key, value in named.items() if value}
        how |= {"reduction": reduction, "strategy": strategy}
        _compress_folder(model, out, how, plan=plan, subfolder=subfolder, overwrite=overwrite)
        return
    if refine and data is None:
        raise InvalidValueError("--refine: expected images to train the factors on, found none. Give --data.")
    _compress_classifier(
        out,
        epochs,
        model_name_or_path=model,
        reduction=reduction,
        plan=plan,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        **how,
        strategy=strategy or ("uniform" if data is None else "curvature"),
        weights_only=data is None,
        dataset_name=data,
        refine_steps=refine,
        calibration_samples=samples,
        max_eval_samples=eval_samples,
        sweep=sweep,
        seed=seed,
        overwrite_output_dir=overwrite,
    )


def _compress_folder(model: str, out: Path, how: dict[str, Any], **where: Any) -> None:
    from ..training.classify.folders import compress_folder

    result = compress_folder(model, out, how, **where)
    head, *rows = result.rows
    snippet = indent(result.snippet, " " * 4)
    typer.echo(f"\n{table(head, rows)}\n\nModel: {out}\n\nLoad it with:\n\n{snippet}")


def _compress_classifier(out: Path, epochs: float, **fields: Any) -> None:
    from ..reporting.cards import quoted
    from ..training.classify.run import compress_vit
    from ..training.classify.settings import STAGES, CompressSettings

    stages = [name for name in STAGES if name != "push" and (name != "finetune" or epochs > 0)]
    fields |= {"output_dir": str(out), "stages": ",".join(stages), "report_to": "none"}
    if epochs > 0:
        fields["num_train_epochs"] = epochs
        # The same command goes on where it was stopped.
        fields["resume_from_checkpoint"] = None if fields["overwrite_output_dir"] else "latest"
    try:
        result = compress_vit(CompressSettings(**fields), report=typer.echo)
    except ComCATError as error:
        raise ComCATError(_as_typed(str(error))) from error
    if result.interrupted is not None:
        typer.echo(f"Stopped by {result.interrupted}; the same command goes on.", err=True)
        raise typer.Exit(130)
    needed = "" if result.plan.is_plain else "    import comcat_hf\n"
    typer.echo(
        f"\nModel:  {out}\nReport: {out / 'report.html'}\n\n"
        f"Load it with:\n\n"
        f"{needed}"
        f"    from transformers import pipeline\n\n"
        f'    pipeline("image-classification", {quoted(str(out))})'
    )


def _as_typed(message: str) -> str:
    """A message about the script's flags, in this command's words."""
    for flag, word in _WORDS.items():
        message = re.sub(rf"--{flag}\b", word, message)
    return message
