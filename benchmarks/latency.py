"""Latency of compressed against dense DeiT classifiers, both sides interleaved in one run.

The claim: at a reduction of one half, the ratio of latencies is within 1.15 of the ratio of multiply-accumulates.
Weights are random: no latency depends on their values.

With `--metric latency` the reductions are of the latency itself, by a table that is measured first, and the claim is
that the built model removes what the table predicts, to 0.05 of the dense latency. A reduction that the table does not
reach is a row without figures.

On a GPU (`--device cuda`) a small batch in half precision may take less time to run than to launch. With `--graph`
both sides are also replayed as CUDA graphs, which leaves launching out, and with `--compile` compiled.

Both sides run with an allocator that keeps freed memory, as jemalloc and tcmalloc do: glibc returns a layer's large
buffers to the kernel after every use, and the page faults to get them back cost both sides the same milliseconds,
whatever is computed. `--allocator default` measures with them.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from functools import partial

import _report
import torch
from _measuring import captured, interleave, ratio, seconds_of
from transformers import DeiTConfig, DeiTForImageClassification

import comcat_hf


MODELS = {
    **_report.DEIT,
    # For a dry run.
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 128,
        "image_size": 32,
    },
}
ALLOWED = 1.15
# Of the dense latency, between what is predicted and what is measured.
OFF = 0.05
REDUCTIONS = {"params": (0.5,), "macs": (0.5,), "latency": (0.3, 0.5)}
# glibc reads these when a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(10 << 30),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


def build(name: str) -> DeiTForImageClassification:
    torch.manual_seed(0)
    config = DeiTConfig(**MODELS[name], num_labels=1000, attn_implementation="sdpa")
    return DeiTForImageClassification(config).eval()


@torch.inference_mode()
def in_rounds(
    models: list[torch.nn.Module], dtype: str, size: int, args: argparse.Namespace
) -> dict[str, list[dict[int, float]]]:
    """Seconds of every model by round, of each way to run them on a batch of some size."""
    side = models[0].config.image_size
    images = torch.randn(size, 3, side, side).to(args.device, getattr(torch, dtype))
    ways = {"launched": [partial(model.to(images), pixel_values=images) for model in models]}
    if args.graph:
        ways["graph"] = [captured(call) for call in ways["launched"]]
    if args.compile:
        ways["compiled"] = [
            partial(torch.compile(model, backend=args.compile), pixel_values=images) for model in models
        ]
    return {way: interleave(dict(enumerate(calls)), args) for way, calls in ways.items()}


def measure(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """A metric that is counted: the ratio of latencies against that of multiply-accumulates."""
    dense = build(name)
    reductions = args.reduction or REDUCTIONS[args.metric]
    models = [dense, *(comcat_hf.compress(dense, r, metric=args.metric, mlp=args.mlp) for r in reductions)]
    macs = [comcat_hf.count_macs(model) for model in models]
    parameters = [comcat_hf.count_parameters(model) for model in models]
    for dtype, size in itertools.product(args.dtype, args.batch_size):
        found = in_rounds(models, dtype, size, args).items()
        for (way, rounds), (side, reduction) in itertools.product(found, enumerate(reductions, start=1)):
            latency_ratio, mac_ratio = ratio(rounds, side, 0), macs[side] / macs[0]
            yield {
                "model": name,
                "dtype": dtype,
                "batch_size": size,
                "way": way,
                "reduction": reduction,
                "dense_ms": 1000 * seconds_of(rounds, 0),
                "compressed_ms": 1000 * seconds_of(rounds, side),
                "parameter_ratio": parameters[side] / parameters[0],
                "mac_ratio": mac_ratio,
                "latency_ratio": latency_ratio,
                "latency_over_macs": latency_ratio / mac_ratio,
                "holds": latency_ratio <= ALLOWED * mac_ratio,
            }


def measure_predicted(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """The latency that a table predicts against that of the built models."""
    for dtype, size in itertools.product(args.dtype, args.batch_size):
        yield from measure_predicted_in(name, dtype, size, args)


def measure_predicted_in(name: str, dtype: str, size: int, args: argparse.Namespace) -> list[dict]:
    dense = build(name).to(args.device, getattr(torch, dtype))
    table = comcat_hf.measure_latency(dense, batch_size=size, repeats=args.repeats, progress=True)
    asked = args.reduction or REDUCTIONS["latency"]
    about = {"model": name, "dtype": dtype, "batch_size": size, "way": "launched"}
    rows = [about | {"reduction": reduction} for reduction in asked]
    models = [dense]
    for row in rows:
        try:
            small = comcat_hf.compress(dense, row["reduction"], metric="latency", latency=table, mlp=args.mlp)
        except comcat_hf.errors.BudgetError as error:
            row["error"] = str(error)
            continue
        models.append(small)
        row |= {"predicted": comcat_hf.plan_of(small).reached, "side": len(models) - 1}
    rounds = in_rounds(models, dtype, size, args)["launched"]
    for row in rows:
        row["dense_ms"] = 1000 * seconds_of(rounds, 0)
        row["table_dense_ms"] = table.total / 1e6
        if "side" in row:
            side = row.pop("side")
            row["compressed_ms"] = 1000 * seconds_of(rounds, side)
            row["mac_ratio"] = comcat_hf.count_macs(models[side]) / comcat_hf.count_macs(dense)
            row["measured"] = 1 - ratio(rounds, side, 0)
            row["holds"] = abs(row["measured"] - row["predicted"]) <= OFF
    return rows


def show(rows: list[dict]) -> None:
    _report.print_table(
        [
            [
                *(row[key] for key in ABOUT[:4]),
                f"{row['reduction']:.2f}",
                milliseconds(row["dense_ms"]),
                milliseconds(row["compressed_ms"]),
                f"{row['mac_ratio']:.3f}",
                f"{row['latency_ratio']:.3f}",
                f"{row['latency_over_macs']:.3f}",
                "yes" if row["holds"] else "no",
            ]
            for row in rows
        ],
        [*ABOUT, "MAC ratio", "latency ratio", "latency/MACs", f"<= {ALLOWED}"],
    )


def show_predicted(rows: list[dict]) -> None:
    _report.print_table(
        [
            [
                *(row[key] for key in ABOUT[:4]),
                f"{row['reduction']:.2f}",
                milliseconds(row["dense_ms"]),
                milliseconds(row["compressed_ms"]) if "compressed_ms" in row else "-",
                *(f"{row[key]:.3f}" if key in row else "-" for key in PREDICTED),
                {True: "yes", False: "no"}.get(row.get("holds"), "out of reach"),
            ]
            for row in rows
        ],
        [*ABOUT, "MAC ratio", "predicted", "measured", f"within {OFF}"],
    )
    for row in rows:
        if "error" in row:
            print(row["error"])


def milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


ABOUT = ("model", "dtype", "batch_size", "way", "asked", "dense ms", "compressed ms")
PREDICTED = ("mac_ratio", "predicted", "measured")
# How a metric is measured, and how it is shown.
WAYS = {"params": (measure, show), "macs": (measure, show), "latency": (measure_predicted, show_predicted)}


def main() -> None:
    parser = _report.parser(__doc__, device="cpu", threads=2, warmup=2, repeats=15)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit-small", "deit-base"])
    parser.add_argument("--reduction", type=float, nargs="+", help="0.5 by default, 0.3 and 0.5 of latency")
    parser.add_argument("--metric", choices=WAYS, default="params")
    parser.add_argument("--mlp", choices=("rank", "width"), default="rank")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--graph", action="store_true", help="also as CUDA graphs")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND", help="also compiled")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep")
    args = parser.parse_args()
    if args.allocator == "keep" and not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    torch.set_num_threads(args.threads)
    run, tell = WAYS[args.metric]
    rows = []
    for row in itertools.chain.from_iterable(run(name, args) for name in args.models):
        rows.append(row)
        # Each at once: who stops the program keeps what was measured.
        _report.write(args, {"rows": rows})
    tell(rows)


if __name__ == "__main__":
    main()
