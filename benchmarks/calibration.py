"""Time and memory of `compress` with data, as multiples of one dense forward pass over the same images.

The claims: choosing ranks (statistics, curvature, budget) takes at most 6 dense passes over the calibration images,
and the whole of `compress` at most 15, for DeiT-base and 64 images; the peak of memory is at most twice that of the
statistics alone. Beside them the old way, `strategy="sensitivity"`: its truncations are measured in a few blocks and
the rest is extrapolated, as it may take an hour.

Weights and images are random: time does not depend on them. Every part runs in a process of its own, with the same
images, so that its peak of memory is its own, next to a dense pass in another; times are CPU seconds of all threads.
"""

import argparse
import resource
import statistics as numbers
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import _report
import torch
from _measuring import apart
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTForImageClassification
from transformers.utils import logging

import comcat_hf
from comcat_hf.compression.budget.budget import METRICS, default_step, find_options
from comcat_hf.compression.budget.sensitivity import measure
from comcat_hf.compression.request import Request, sites_by_way


REDUCTION = 0.5

# Pairs and MLPs whose sensitivities are measured, from the first, a middle and the last block.
BLOCKS = (0, 6, 11)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return DeiTForImageClassification(DeiTConfig(**_report.DEIT[name], num_labels=1000)).eval()


def batches_of(images: int, batch: int) -> list[Tensor]:
    return list(torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(batch))


@torch.inference_mode()
def dense(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def statistics(model: nn.Module, batches: list[Tensor]) -> None:
    comcat_hf.collect_statistics(model, batches, progress=False)


def allocate(model: nn.Module, batches: list[Tensor]) -> None:
    comcat_hf.allocate_ranks(model, REDUCTION, batches=batches, strategy="curvature", progress=False)


def whole(model: nn.Module, batches: list[Tensor]) -> None:
    comcat_hf.compress(model, REDUCTION, batches=batches, progress=False)


def sensitivity(model: nn.Module, batches: list[Tensor]) -> float:
    """Seconds of all truncations, from those of a few blocks."""
    sites = sites_by_way(Request().find_sites(model), "width")
    options = find_options(model, sites, METRICS["params"])
    chosen = [option for option in options if any(f".{block}." in option.site.name for block in BLOCKS)]
    step = default_step(sites)
    start = time.process_time()
    measure(model, [], step, batches, progress=False)
    empty, start = time.process_time() - start, time.process_time()
    measure(model, chosen, step, batches, progress=False)
    return empty + (time.process_time() - start - empty) * len(options) / len(chosen)


PARTS: Mapping[str, Callable[[nn.Module, list[Tensor]], float | None]] = {
    "dense pass": dense,
    "statistics": statistics,
    "ranks by curvature": allocate,
    "compress": whole,
    "sensitivities (extrapolated)": sensitivity,
}


def run_part(args: argparse.Namespace, name: str, part: str) -> dict[str, float]:
    """In a process of its own."""
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    model, batches = build(name), batches_of(args.images, args.batch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(args.repeats if part == "dense pass" else 1):
        start = time.process_time()
        told = PARTS[part](model, batches)
        seconds.append(time.process_time() - start if told is None else told)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": numbers.median(seconds), "gigabytes": (peak - before) / 2**20}


def measured(args: argparse.Namespace, name: str) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    # The dense pass in turns with the others: machines are shared.
    dense_seconds = []
    for part in args.parts:
        for each in dict.fromkeys(("dense pass", part)):
            result = apart(run_part, args, name, each)
            print(f"{name}, {each}: {result['seconds']:.1f} CPU s, {result['gigabytes']:.2f} GB", file=sys.stderr)
            if each == "dense pass":
                dense_seconds.append(result["seconds"])
            else:
                result["passes"] = result["seconds"] / dense_seconds[-1]
            found[each] = result
    found["dense pass"] |= {"seconds": numbers.median(dense_seconds), "passes": 1.0}
    return {"model": name, "parts": found}


def main() -> None:
    parser = _report.parser(__doc__, threads=1)
    parser.add_argument("--models", nargs="+", choices=_report.DEIT, default=list(_report.DEIT))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="of the dense pass, each time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measured(args, name) for name in args.models]
    table = [
        [row["model"], part, found["passes"], found["seconds"], found["gigabytes"]]
        for row in rows
        for part, found in row["parts"].items()
    ]
    _report.print_table(table, ["model", "part", "dense passes", "CPU seconds", "GB above the model and images"])
    _report.write(args, {"rows": rows})


if __name__ == "__main__":
    main()
