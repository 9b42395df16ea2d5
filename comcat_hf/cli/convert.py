"""`comcat convert`: files of the original release and LoRAs into ours, and ours into LoRA."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidValueError
from .shell import app, command, table


convert = typer.Typer(
    name="convert",
    help="Turn files of the original release and LoRAs into ours, and ours into LoRA.",
    no_args_is_help=True,
)
app.add_typer(convert)


@command(convert)
def vit(
    folder: Annotated[Path, typer.Argument(help="With checkpoint.pth and ranks.txt.")],
    out: Annotated[Path, typer.Argument(help="Folder for the compressed model.")],
    heads: Annotated[int | None, typer.Option(help="Attention heads of a block.", show_default="width / 64")] = None,
) -> None:
    """A compressed ViT. Image and patch size come from the shapes; nothing is unpickled that could run code."""
    from transformers import DeiTImageProcessorPil
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    from ..compression import count_parameters
    from ..original import read_original_vit
    from ..reporting.cards import quoted

    _check_output(out)
    model = read_original_vit(folder, heads=heads)

    size = model.config.image_size
    # As the release evaluates (its datasets.py), which is not what the class does by default.
    processor = DeiTImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    typer.echo(
        f"{out}: {type(model).__name__}, {count_parameters(model):,} parameters, images of {size} × {size}.\n\n"
        f"    import comcat_hf\n"
        f"    from transformers import pipeline\n\n"
        f'    pipeline("image-classification", {quoted(str(out))})'
    )


@command(convert)
def adapter(
    file: Annotated[Path, typer.Argument(help="comcat_weight.pt of the release, or a LoRA as .safetensors.")],
    out: Annotated[Path, typer.Argument(help="Folder for the adapter.")],
    base: Annotated[
        str, typer.Option(help="Folder or Hub id of the pipeline it was trained on; of a .pt file, or of its UNet.")
    ],
    alpha: Annotated[
        float | None, typer.Option(help="Of a .pt file: as given to the release when it draws.", show_default="1")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of a LoRA: rank of the adapter, per head.", min=1)] = None,
    most_lost: Annotated[
        float | None, typer.Option(help="Of a LoRA: the share of its change that may be lost.", show_default="0.25")
    ] = None,
) -> None:
    """A ComCAT adapter of a diffusion pipeline, from the original release's file or from a LoRA on attention."""
    from ..reporting.cards import quoted

    _check_output(out)
    is_lora = file.suffix == ".safetensors"
    of_others = {"--alpha": alpha} if is_lora else {"--rank": rank, "--most-lost": most_lost}
    for option in (option for option, value in of_others.items() if value is not None):
        wanted = "a file of the release, a .pt" if is_lora else "a LoRA, a .safetensors file"
        raise InvalidValueError(f"{option} is for {wanted}; found {file}. Leave {option} out.")
    if is_lora:
        typer.echo(f"Lost share of the change of each product:\n\n{_from_lora(file, out, base, rank, most_lost)}\n")
    else:
        from ..original import convert_original_adapter

        convert_original_adapter(file, out, base, alpha=1.0 if alpha is None else alpha)
    typer.echo(
        f"{out}: an adapter of {base}.\n\n"
        f"    import comcat_hf\n"
        f"    from diffusers import DiffusionPipeline\n\n"
        f"    pipe = DiffusionPipeline.from_pretrained({quoted(base)})\n"
        f"    comcat_hf.load_comcat_weights(pipe, {quoted(str(out))})"
    )


def _from_lora(file: Path, out: Path, base: str, rank: int | None, most_lost: float | None) -> str:
    import torch

    from ..customization import adapter_from_lora, save_comcat_weights
    from ..customization.from_lora import MOST_LOST
    from ..native import load_pipeline

    if rank is None:
        raise InvalidValueError(f"{file}: a LoRA becomes an adapter of a rank per head that you choose; give --rank.")
    pipeline = load_pipeline(base, dtype=torch.float32, fix="Give another --base.")
    lost = adapter_from_lora(pipeline, file, rank, most_lost=MOST_LOST if most_lost is None else most_lost)
    save_comcat_weights(pipeline, out, base_model_name_or_path=base)
    return _lost_table(lost)


@command(convert)
def lora(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of a ComCAT adapter of a pipeline.")],
    out: Annotated[Path, typer.Argument(help="Folder for the LoRA.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of its pipeline.", show_default="the one that it names")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Highest rank of a LoRA; with gains, give one.", show_default="heads x rank of the adapter", min=1
        ),
    ] = None,
    kohya: Annotated[bool, typer.Option("--kohya", help="Names of kohya's scripts, ComfyUI and A1111.")] = False,
    half: Annotated[bool, typer.Option("--half", help="Write float16.")] = False,
) -> None:
    """A LoRA file of a ComCAT adapter, for diffusers' load_lora_weights and for other tools.

    Cores are exact. Full factors, and gains at a rank below that of the layer, lose the share that is printed.
    """
    import torch

    from ..configs.index import INDEX, read_index
    from ..customization import load_comcat_weights, save_as_lora
    from ..customization.lora import LORA_NAME
    from ..hub import resolve_file
    from ..native import load_pipeline

    _check_output(out)
    revision = None
    if base is None:
        index = read_index(resolve_file(adapter, INDEX))
        base, revision = index.get("base_model_name_or_path"), index.get("revision")
    if base is None:
        raise InvalidValueError(f"{adapter}: expected an adapter that names its pipeline, found none. Give --base.")
    pipeline = load_pipeline(base, dtype=torch.float32, revision=revision, fix="Check the path, or give --base.")
    load_comcat_weights(pipeline, adapter)
    dtype = torch.float16 if half else None
    lost = save_as_lora(pipeline, out, rank=rank, kohya=kohya, dtype=dtype)
    typer.echo(f"Lost share of the change of each product:\n\n{_lost_table(lost)}")
    at = f", revision {revision}" if revision else ""
    typer.echo(f"\n{out / LORA_NAME}: a LoRA of {base}{at}.")


def _lost_table(lost: dict[str, dict[str, float]]) -> str:
    kinds = [kind for kind in ("qk", "vo", "gains") if any(kind in shares for shares in lost.values())]
    rows = [
        (name, *(f"{shares[kind]:.1%}" if kind in shares else "" for kind in kinds)) for name, shares in lost.items()
    ]
    return table(("module", *kinds), rows)


def _check_output(out: Path) -> None:
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InvalidValueError(f"{out}: expected a folder to write to, found the file {there}; give another path")
