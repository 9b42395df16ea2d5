"""Scaled dot products by the width of their heads: which kernel takes them, and how long it takes.

Adapters and low-rank factors make heads of uncommon widths, which are padded with zeros to a multiple of 8. The table
says what a width costs beside the next power of two, and that no width takes the path that keeps every score
(`math`), which queries and values of unequal widths do.
"""

import argparse
from functools import partial

import _report
import torch
from _measuring import interleave, seconds_of
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend


WIDTHS = (32, 40, 48, 64, 72, 80, 96, 104, 128, 136, 160)


def tensors(args: argparse.Namespace, width: int, value: int) -> list[Tensor]:
    shape = args.batch_size, args.heads, args.tokens
    made = [torch.randn(*shape, each, device=args.device, dtype=args.dtype) for each in (width, width, value)]
    return [tensor.requires_grad_() for tensor in made]


def step(query: Tensor, key: Tensor, value: Tensor) -> None:
    F.scaled_dot_product_attention(query, key, value).sum().backward()


def measure(args: argparse.Namespace) -> list[dict]:
    """Forward and backward passes of all widths, in turns."""
    pairs = [*((width, width) for width in args.widths), (args.widths[-1], args.widths[0])]
    given = {pair: tensors(args, *pair) for pair in pairs}
    rounds = interleave({pair: partial(step, *given[pair]) for pair in pairs}, args)
    medians = {pair: seconds_of(rounds, pair) for pair in pairs}
    rows = []
    for pair in pairs:
        above = [width for width in args.widths if width >= pair[0] and width.bit_count() == 1]
        rows.append(
            {
                "width": pair[0],
                "value_width": pair[1],
                "kernel": SDPBackend(torch._fused_sdp_choice(*given[pair])).name.lower(),
                "ms": 1000 * medians[pair],
                "beside": above[0] if above else None,
                "ratio": medians[pair] / medians[above[0], above[0]] if above else None,
            }
        )
        rows[-1]["holds"] = pair[0] != pair[1] or rows[-1]["kernel"] != "math"
    return rows


def main() -> None:
    shared = {"device": "cpu", "dtype": torch.float32, "threads": 1, "batch_size": 1, "warmup": 2, "repeats": 9}
    parser = _report.parser(__doc__, **shared)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args)
    keys = ("width", "value_width", "kernel", "ms", "beside", "ratio", "holds")
    _report.print_table([["" if row[key] is None else row[key] for key in keys] for row in rows], list(keys))
    _report.write(args, {"rows": rows})


if __name__ == "__main__":
    main()
