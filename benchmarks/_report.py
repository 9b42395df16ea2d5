"""What every benchmark shares: the environment it ran in, a JSON file and a table."""

import json
import os
import platform
import sys
from pathlib import Path

import torch

from comcat_hf.compression.budget.timing import device_name


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


def write_json(path: str | Path, payload: dict[str, object]) -> None:
    """Write `payload` to `path`, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=2) + "\n")


def print_table(rows: list[list[object]], headers: list[str]) -> None:
    """Print a Markdown table; floats with four significant digits."""
    cells = [headers, *([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    print("\n".join(lines))
