"""`comcat export`: programs that run without Python code of ours."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .shell import app, command


export = typer.Typer(name="export", help="Write a model as a program that needs no comcat_hf.", no_args_is_help=True)
app.add_typer(export)

_Model = Annotated[str, typer.Argument(help="Folder or Hub id of a model of transformers, dense or compressed.")]
_Out = Annotated[Path, typer.Argument(help="Folder for the program.")]
_Half = Annotated[bool, typer.Option("--fp16", help="Weights in half precision.")]


@command(export)
def onnx(model: _Model, out: _Out, fp16: _Half = False) -> None:
    """An ONNX model with a dynamic batch size, checked against the model in onnxruntime."""
    found = _export(model, out, "onnx", fp16)
    typer.echo(
        f"    import onnxruntime\n\n    session = onnxruntime.InferenceSession({str(found.folder / 'model.onnx')!r})"
    )


@command(export)
def torch(model: _Model, out: _Out, fp16: _Half = False) -> None:
    """A program of torch.export (.pt2) with a dynamic batch size, checked against the model."""
    found = _export(model, out, "torch", fp16)
    typer.echo(f"    import torch\n\n    program = torch.export.load({str(found.folder / 'model.pt2')!r}).module()")


def _export(source: str, out: Path, format: str, fp16: bool) -> Any:
    import torch

    from ..compression import export_model
    from ..hub import readable_size
    from ..native import load_model

    found = export_model(load_model(source), out, format, dtype=torch.float16 if fp16 else None)
    opset = f", opset {found.opset}" if found.opset else ""
    typer.echo(
        f"{found.folder}: {format}{opset}, {readable_size(found.bytes)}, largest difference from the model "
        f"{found.difference:.1e} of the outputs' range.\n"
    )
    return found
