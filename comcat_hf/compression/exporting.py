"""ONNX and torch.export programs of a model, checked against the model; transformers' exporters do the export."""

import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checks import check, listed
from ..errors import ComCATError, InvalidValueError, brief
from ..modeling import eval_mode
from .counting import example_inputs


__all__ = ["Exported", "export_model"]

_FORMATS = {"onnx": ("model.onnx", "model.onnx.data"), "torch": ("model.pt2",)}
# Largest difference from the model's outputs, as a share of their range.
_LIMITS = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
_BATCHES = (2, 1, 5)


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Attributes:
        folder: with the program, `config.json` and the library's `export.json`.
        difference: largest difference of its outputs from the model's, as a share of their range, over batches of one,
            two and five random samples; from those of the model in the program's dtype, where that is the finer one.
        opset: of ONNX; `None` for torch.
        bytes: of the program with its weights.
    """

    folder: Path
    difference: float
    opset: int | None
    bytes: int


def export_model(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    format: str = "onnx",
    *,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Exported:
    """Write a model, dense or compressed, as ONNX or as a torch.export program that needs no code of this package.

    The batch size is dynamic. `transformers.exporters.ExportedModel.from_pretrained(folder)` runs the result, as do
    onnxruntime (`model.onnx`) and `torch.export.load` (`model.pt2`).

    Args:
        model: of transformers.
        folder: to write; nothing is written if the export fails or differs from the model.
        format: `"onnx"` or `"torch"`.
        dtype: of the weights in the program; by default the model's, in ONNX float32 in place of bfloat16, which
            onnxruntime does not compute on CPUs.
        inputs: example inputs, two or more samples; by default random ones of the model's native size.

    Returns:
        the folder, and the figures of the check.

    Raises:
        InvalidValueError: no model of transformers, an unknown format, weights that overflow in `dtype`, inputs whose
            batch sizes differ, or a folder that is not empty.
        ComCATError: a package is missing, the exporter failed, or its program differs from the model.
    """
    check(format, listed(*_FORMATS), "format")
    folder = Path(folder)
    if not isinstance(model, PreTrainedModel):
        raise InvalidValueError(
            f"export_model: expected a model of transformers, found {type(model).__name__}. Call merge_and_unload() "
            "on a PeftModel, and take a wrapped model out of its wrapper."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidValueError(f"{folder}: expected an empty folder to write to, found files. Give another path.")
    if dtype is None and format == "onnx" and model.dtype == torch.bfloat16:
        dtype = torch.float32
    chosen = _cast(model, dtype)
    samples = [_samples(model, size) for size in _BATCHES] if inputs is None else [dict(inputs)]
    exported = _export(chosen, format, samples[0])
    difference = _difference(model, exported, samples, chosen, format)
    if not difference <= _LIMITS[chosen.dtype]:
        raise ComCATError(
            f"{type(model).__name__} as {format} in {chosen.dtype}: expected outputs within "
            f"{_LIMITS[chosen.dtype]:.0e} of the model's range, found a difference of {difference:.1e}. Nothing was "
            "written. Export in float32, or other inputs."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
        made = Path(staging, "made")
        exported.save_pretrained(made)
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    opset = exported.program.opset_imports[""] if format == "onnx" else None
    return Exported(folder, difference, opset, sum((folder / name).stat().st_size for name in _FORMATS[format]))


def _cast(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """A copy in eval mode and in the dtype, whose configuration asks for no package."""
    dtype = model.dtype if dtype is None else dtype
    if dtype not in _LIMITS:
        raise InvalidValueError(f"dtype: expected one of {', '.join(map(str, _LIMITS))}, found {dtype}.")
    chosen = copy.deepcopy(model).to(dtype).eval()
    for name, weight in chosen.named_parameters():
        if not weight.isfinite().all():
            raise InvalidValueError(
                f"{name}: expected finite weights in {chosen.dtype}, found infinite ones or NaN. Export in float32, "
                "or as a program of torch in bfloat16."
            )
    # A program is no checkpoint: it is not loaded by a rank plan.
    for key in ("quantization_config", "auto_map"):
        if hasattr(chosen.config, key):
            delattr(chosen.config, key)
    return chosen


def _samples(model: PreTrainedModel, size: int) -> dict[str, Tensor]:
    """Random inputs of the model's native size."""
    draw = torch.Generator().manual_seed(size)
    words = getattr(model.config.get_text_config(), "vocab_size", None) or 2
    found = {}
    for name, value in example_inputs(model).items():
        shape = (size, *value.shape[1:])
        found[name] = (
            torch.randn(shape, generator=draw)
            if value.is_floating_point()
            else torch.randint(words, shape, generator=draw)
        )
    return found


def _export(model: PreTrainedModel, format: str, inputs: Mapping[str, Tensor]) -> Any:
    from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

    exporter, config = (OnnxExporter, OnnxConfig) if format == "onnx" else (DynamoExporter, DynamoConfig)
    sizes = {name: len(value) for name, value in inputs.items()}
    if len(set(sizes.values())) != 1 or min(sizes.values()) < 2:
        raise InvalidValueError(f"inputs: expected two or more samples in every tensor, found {sizes}.")
    batch = torch.export.Dim("batch", min=1, max=2**16)
    shapes = config(dynamic_shapes={name: {0: batch} for name in inputs})
    with _quiet(), _explained(model, format):
        return exporter().export(model, _like(inputs, model.dtype, model.device), shapes)


@torch.inference_mode()
def _difference(
    model: PreTrainedModel,
    exported: Any,
    samples: Iterable[Mapping[str, Tensor]],
    chosen: PreTrainedModel,
    format: str,
) -> float:
    """The largest difference of an output, as a share of its range; NaN where there is one."""
    # Rounding in half precision is no fault of a program in float32.
    reference = model if _LIMITS.get(model.dtype, 0.0) <= _LIMITS[chosen.dtype] else chosen
    # A program of torch computes where the model did, onnxruntime takes what is in the CPU's memory.
    device = chosen.device if format == "torch" else torch.device("cpu")
    found = []
    for inputs in samples:
        with eval_mode(reference):
            wanted = reference(**_like(inputs, reference.dtype, reference.device))
        with _quiet(), _explained(chosen, format):
            given = exported(**_like(inputs, chosen.dtype, device))
        for one, other in zip(_floats(wanted), _floats(given), strict=True):
            spread = (one.max() - one.min()).clamp(min=torch.finfo(one.dtype).tiny)
            found.append((other - one).abs().max() / spread)
    # Not Python's max(), which passes over NaN.
    return torch.stack(found).max().item()


def _floats(outputs: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in outputs.values():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
            yield value.double().cpu()


def _like(inputs: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {n: value.to(device, dtype if value.is_floating_point() else None) for n, value in inputs.items()}


@contextlib.contextmanager
def _explained(model: PreTrainedModel, format: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ComCATError(
            f"The export needs packages that are not installed ({brief(error)}). Run `pip install 'comcat_hf[onnx]'`."
        ) from error
    # The exporters, and the programs, let errors of any kind of torch, onnxscript and onnxruntime through.
    except Exception as error:
        raise ComCATError(
            f"{type(model).__name__} as {format} in {model.dtype}: transformers' exporter failed, or its program does "
            f"not run ({brief(error)}). Export the dense model, in float32, to see whether the library supports it."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # torch.onnx prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        yield
