"""Sizes of files and what they keep: a model, half of it, and half of it in eight bits, four bits, and as ONNX.

Of every case that `quality.py` has and that is at hand: the model as it is; compressed by half with its calibration
data (of its attention and MLP parameters for the encoder, of all for ViTs); that one quantised by torchao and loaded
again; its ONNX programs in float32 and float16, run by onnxruntime. Bytes count weights and programs.

    PYTHONPATH=.venv/torchao python benchmarks/files.py --cases minilm cifar10 --data FOLDER
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _report
import torch
from _cases import BOTH, CASES, TOKENS, WHOLE, Absent, Case, Subject
from torch import nn

import comcat_hf


REDUCTION = 0.5
# Of weights that share a scale, in four bits.
GROUPS = (32, 16, 8, 4)


def folder_bytes(folder: Path) -> int:
    kinds = (".safetensors", ".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)


def saved(model: nn.Module, folder: Path) -> nn.Module:
    """The model after it was written and loaded again."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def quantised(model: nn.Module, folder: Path, bits: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if bits == 8:
        quantize_(model, Int8WeightOnlyConfig())
    else:
        to_four_bits(model)
    return saved(model, folder)


def to_four_bits(model: nn.Module) -> None:
    """Weights of four bits in groups, a byte each: the packed form of torchao has kernels for GPUs alone."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    def size_of(module: nn.Module) -> int | None:
        """The largest group that divides the inputs."""
        return (
            next((g for g in GROUPS if module.in_features % g == 0), None) if isinstance(module, nn.Linear) else None
        )

    for size in GROUPS:
        chosen = [name for name, module in model.named_modules() if size_of(module) == size]
        how = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(size))
        quantize_(model, how, filter_fn=lambda _, name, chosen=chosen: name in chosen)


def exported(model: nn.Module, folder: Path, dtype: torch.dtype) -> Callable[..., Any]:
    from transformers.exporters import ExportedModel

    inputs = None
    if model.main_input_name == "input_ids":
        ids = torch.randint(model.config.vocab_size, (2, TOKENS))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    comcat_hf.export_model(model, folder, "onnx", dtype=dtype, inputs=inputs)
    program = ExportedModel.from_pretrained(folder)

    def run(images: torch.Tensor | None = None, **inputs: torch.Tensor) -> Any:
        if images is not None:
            return program(pixel_values=images.to(dtype))
        # A program of text has one length.
        length = inputs["input_ids"].shape[1]
        output = program(**{name: nn.functional.pad(value, (0, TOKENS - length)) for name, value in inputs.items()})
        output["last_hidden_state"] = output["last_hidden_state"][:, :length].float()
        return output

    return run


FORMS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "half": saved,
    "half, int8": lambda model, folder: quantised(model, folder, 8),
    "half, int4": lambda model, folder: quantised(model, folder, 4),
    "half, ONNX float32": lambda model, folder: exported(model, folder, torch.float32),
    "half, ONNX float16": lambda model, folder: exported(model, folder, torch.float16),
}


def rows_of(case: Case, subject: Subject) -> Iterator[dict[str, Any]]:
    scope = BOTH if case.metric == "cosine" else WHOLE
    share = scope.asked(subject.model, REDUCTION)
    with tempfile.TemporaryDirectory() as root:
        half = Path(root, "half-to-copy")
        comcat_hf.compress(subject.model, share, scope=scope.sites, batches=subject.batches).save_pretrained(half)
        forms = {"dense": lambda _, folder: saved(subject.model, folder), **FORMS}
        for number, (name, form) in enumerate(forms.items()):
            folder, row = Path(root, str(number)), {"form": name}
            try:
                model = form(type(subject.model).from_pretrained(half).eval(), folder)
            except ImportError as error:
                yield row | {"refused": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
                continue
            with torch.inference_mode():
                found = subject.measure(model)
            yield row | {"bytes": folder_bytes(folder)} | {key: value.mean().item() for key, value in found.items()}


def main() -> None:
    parser = _report.parser(__doc__, threads=1)
    parser.add_argument("--data", type=Path, help="folder with vit-cifar10 and cifar10")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["minilm", "cifar10"])
    parser.add_argument("--seeds", type=int, default=1, help="models of the digits; the first is measured")
    parser.add_argument("--calibration", type=int)
    parser.add_argument("--held-out", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.cases:
        try:
            case = CASES[name](args)
        except Absent as reason:
            print(f"{name}: left out, {reason}.")
            continue
        found[name] = list(rows_of(case, case.subjects[0]))
        head = ["form", "kB", case.metric]
        cells = [
            [row["form"], "", row["refused"]]
            if "refused" in row
            else [row["form"], f"{row['bytes'] / 1e3:,.0f}", f"{row[case.metric]:.4f}"]
            for row in found[name]
        ]
        print(f"{name}, {case.dense}")
        _report.print_table(cells, head)
    if args.output:
        settings = {"calibration": args.calibration, "held_out": args.held_out, "reduction": REDUCTION}
        _report.write_json(args.output, {"environment": _report.environment(), "settings": settings, "forms": found})


if __name__ == "__main__":
    main()
