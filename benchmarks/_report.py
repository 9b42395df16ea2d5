"""What every benchmark shares: flags, the environment it ran in, a JSON file and a table."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from comcat_hf.compression.budget.timing import device_name


DEIT: Mapping[str, Mapping[str, int]] = {
    "deit-small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "deit-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
# Flags that several benchmarks have.
_FLAGS: Mapping[str, Mapping[str, Any]] = {
    "device": {},
    "dtype": {"type": lambda name: getattr(torch, name)},
    "threads": {"type": int},
    "batch_size": {"type": int},
    "warmup": {"type": int},
    "repeats": {"type": int},
    "runs": {"type": int, "help": "of a side in a round; the fastest counts"},
}


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """The parser of a benchmark with `--output`, and with the shared flags that are given a default."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--output", type=Path, help="JSON file")
    for name, value in defaults.items():
        found.add_argument(f"--{name.replace('_', '-')}", default=value, **_FLAGS[name])
    return found


def write(args: argparse.Namespace, found: Mapping[str, Any], hidden: tuple[str, ...] = ()) -> None:
    """Write where and how a benchmark ran, and what it found, to `--output`, if there is one."""
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key not in ("output", *hidden)}
        where = environment(getattr(args, "device", "cpu"))
        write_json(args.output, {"environment": where, "settings": settings, **found})


def environment(device: str = "cpu") -> dict[str, object]:
    """Hardware and versions that a timing on `device` depends on."""
    info: dict[str, object] = {
        "device": "cpu" if device == "cpu" else device_name(torch.device(device)),
        "cpu": device_name(torch.device("cpu")),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("transformers", "peft", "diffusers"):
        if name in sys.modules:
            info[name] = sys.modules[name].__version__
    return info


def write_json(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` to `path`, making its folder; what JSON does not know becomes text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=2, default=str) + "\n")


def print_table(rows: list[list[object]], headers: list[str]) -> None:
    """Print a Markdown table; floats with four significant digits."""
    cells = [headers, *([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    print("\n".join(lines))
