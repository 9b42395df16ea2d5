"""Latency of compressed against dense DeiT classifiers, both sides interleaved in one run.

The claim: at a reduction of one half, the ratio of latencies is within 1.15 of the ratio of multiply-accumulates.
Weights are random: no latency depends on their values.

Both sides run with an allocator that keeps freed memory, as jemalloc and tcmalloc do: glibc returns a layer's large
buffers to the kernel after every use, and the page faults to get them back cost both sides the same milliseconds,
whatever is computed. `--allocator default` measures with them.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import _report
import torch
from transformers import DeiTConfig, DeiTForImageClassification

import comcat_hf


MODELS = {
    "deit-small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "deit-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
ALLOWED = 1.15
# glibc reads these when a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(10 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(pixel_values=images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    config = DeiTConfig(**MODELS[name], num_labels=1000, attn_implementation="sdpa")
    dense = DeiTForImageClassification(config).eval()
    small = comcat_hf.compress(dense, reduction=args.reduction, metric=args.metric)
    macs = [comcat_hf.count_macs(model) for model in (dense, small)]
    parameters = [comcat_hf.count_parameters(model) for model in (dense, small)]
    images = torch.randn(args.batch_size, 3, 224, 224).to(args.device, getattr(torch, args.dtype))
    dense.to(images)
    small.to(images)
    times: list[tuple[float, float]] = []
    for index in range(args.warmup + args.repeats):
        # The order alternates, so that neither side always finds the caches of the other.
        pair = [(dense, 0), (small, 1)][:: 1 if index % 2 else -1]
        taken = {side: seconds(model, images) for model, side in pair}
        if index >= args.warmup:
            times.append((taken[0], taken[1]))
    ratio = statistics.median(small / dense for dense, small in times)
    mac_ratio = macs[1] / macs[0]
    return {
        "model": name,
        "dense_ms": 1000 * statistics.median(t[0] for t in times),
        "compressed_ms": 1000 * statistics.median(t[1] for t in times),
        "parameter_ratio": parameters[1] / parameters[0],
        "mac_ratio": mac_ratio,
        "latency_ratio": ratio,
        "latency_over_macs": ratio / mac_ratio,
        "holds": ratio <= ALLOWED * mac_ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--reduction", type=float, default=0.5)
    parser.add_argument("--metric", choices=("params", "macs"), default="params")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.allocator == "keep" and not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(args.threads)
    rows = [measure(name, args) for name in args.models]
    _report.print_table(
        [
            [
                row["model"],
                f"{row['dense_ms']:.0f}",
                f"{row['compressed_ms']:.0f}",
                f"{row['mac_ratio']:.3f}",
                f"{row['latency_ratio']:.3f}",
                f"{row['latency_over_macs']:.3f}",
                "yes" if row["holds"] else "no",
            ]
            for row in rows
        ],
        ["model", "dense ms", "compressed ms", "MAC ratio", "latency ratio", "latency/MACs", f"<= {ALLOWED}"],
    )
    if args.output:
        settings = {key: value for key, value in vars(args).items() if key != "output"}
        _report.write_json(args.output, {"environment": _report.environment(), "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
