"""Time to factorise a ViT's attention weights: p×p problems (ours) against one dense d×d SVD per head and pair.

    python benchmarks/factorization.py --model deit-base --output benchmarks/results/factorization.json

Both ways end in the same rank-r factors of `[W_Q; a] W_K^T` and `W_V W_O`, from float32 weights; the largest
difference of the products is reported (random weights have close singular values at the cut, where the dense float32
SVD errs). Weights are random, of the model's shapes. By default the dense way is timed on one layer and nothing is
extrapolated; `--all-layers` times it on every layer.
"""

import os
import statistics
import time
from typing import NamedTuple

import _report
import torch
from _measuring import wait

from comcat_hf.closed_forms.attention import QKFactors, VOFactors, factorize_qk, factorize_vo


MODELS = {"deit-small": (12, 384, 6), "deit-base": (12, 768, 12)}  # layers, width, heads


def random_layer(width: int, heads: int, seed: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """One layer's attention weights, split per head."""
    size = width // heads
    shapes = {"wq": (size, width), "bq": (size,), "wk": (size, width), "wv": (size, width), "bv": (size,)}
    generator = torch.Generator().manual_seed(seed)
    shapes |= {"wo": (width, size)}
    drawn = {name: torch.randn(heads, *shape, generator=generator) * 0.05 for name, shape in shapes.items()}
    return {name: tensor.to(device) for name, tensor in drawn.items()}


def ours(layer: dict[str, torch.Tensor], rank: int) -> tuple[QKFactors, VOFactors]:
    """The factors of the two pairs, for all heads at once."""
    qk = factorize_qk(layer["wq"], layer["bq"], layer["wk"], rank)
    return qk, factorize_vo(layer["wv"], layer["bv"], layer["wo"], None, rank)


def pairs_of(qk: QKFactors, vo: VOFactors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Left and right factors of the two pairs, as `dense` returns them."""
    left = torch.cat([qk.query_weight, qk.query_bias.unsqueeze(-1)], -1).mT
    return [(left, qk.key_weight), (vo.value_weight.mT, vo.output_weight.mT)]


def dense(layer: dict[str, torch.Tensor], rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same factors from an SVD of every head's dense product."""
    rows = torch.cat([layer["wq"], layer["bq"].unsqueeze(-1)], -1)
    pairs = [(rows.mT, layer["wk"]), (layer["wv"].mT, layer["wo"].mT)]
    found = []
    for left, right in pairs:
        factors = []
        for head_left, head_right in zip(left, right, strict=True):
            u, s, vh = torch.linalg.svd(head_left @ head_right, full_matrices=False)
            root = s[:rank].sqrt()
            factors.append((u[:, :rank] * root, root.unsqueeze(-1) * vh[:rank]))
        found.append(tuple(torch.stack(side) for side in zip(*factors, strict=True)))
    return found


class Timing(NamedTuple):
    """Seconds: elapsed, and of all threads' CPU time, which other work on the machine hardly touches at one thread."""

    wall: float
    cpu: float

    def over(self, other: "Timing") -> "Timing":
        return Timing(self.wall / other.wall, self.cpu / other.cpu)


def timed(function, layer: dict[str, torch.Tensor], rank: int) -> tuple[Timing, object]:
    device = layer["wq"].device
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(layer, rank)
    wait(device)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu), result


def median(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def total(timings: list[Timing]) -> Timing:
    return Timing(*(sum(column) for column in zip(*timings, strict=True)))


def median_time(function, layer: dict[str, torch.Tensor], rank: int, repeats: int) -> Timing:
    function(layer, rank)  # warm up
    return median([timed(function, layer, rank)[0] for _ in range(repeats)])


def largest_difference(found: list, wanted: list) -> float:
    """Largest |difference| of a head's product over the largest |entry| of that product, over heads and pairs."""
    worst = 0.0
    for (left, right), (dense_left, dense_right) in zip(found, wanted, strict=True):
        for head in range(len(left)):
            product = dense_left[head].double() @ dense_right[head].double()
            difference = left[head].double() @ right[head].double() - product
            worst = max(worst, (difference.abs().max() / product.abs().max()).item())
    return worst


def main() -> None:
    # The repeats are those of our way.
    parser = _report.parser(__doc__, device="cpu", threads=2, repeats=5)
    parser.add_argument("--model", choices=MODELS, default="deit-base")
    parser.add_argument("--rank", type=int, default=32, help="per head (default 32)")
    parser.add_argument("--all-layers", action="store_true", help="time the dense way on every layer, not only on one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layers, width, heads = MODELS[arguments.model]
    weights = [random_layer(width, heads, seed, arguments.device) for seed in range(layers)]
    rank = arguments.rank

    dense(random_layer(width // heads, 1, 0, arguments.device), 1)  # warm up, small
    ours_times, dense_times, differences = [], [], []
    for index, layer in enumerate(weights):
        ours_times.append(median_time(ours, layer, rank, arguments.repeats))
        if index == 0 or arguments.all_layers:
            seconds, wanted = timed(dense, layer, rank)
            dense_times.append(seconds)
            differences.append(largest_difference(pairs_of(*ours(layer, rank)), wanted))

    found = {"one layer": (median(ours_times), median(dense_times))}
    found[f"all {layers} layers"] = (total(ours_times), total(dense_times) if arguments.all_layers else None)
    ratios = {what: slow.over(fast) for what, (fast, slow) in found.items() if slow}
    rows = [
        [what, *fast, *(slow or ("not run", "")), *ratios.get(what, ("", ""))] for what, (fast, slow) in found.items()
    ]
    print(f"{arguments.model}: {heads} heads, d = {width}, p = {width // heads}, rank {rank}, QK and VO")
    columns = ["ours, s", "CPU s", "dense SVD, s", "CPU s", "times faster", "in CPU time"]
    _report.print_table(rows, ["what", *columns])
    if not arguments.all_layers:
        print("The dense way was timed on one layer only (--all-layers times it on every layer).")
    print(f"max relative difference of the products: {max(differences):.1e}")

    payload = {
        "shape": {"layers": layers, "width": width, "heads": heads, "head_dim": width // heads},
        "dense_layers_timed": len(dense_times),
        "seconds": {
            what: {"ours": fast._asdict(), "dense": slow._asdict() if slow else None}
            for what, (fast, slow) in found.items()
        },
        "times_faster": {what: ratio._asdict() for what, ratio in ratios.items()},
        "max_relative_difference": max(differences),
        "load_average_at_the_end": os.getloadavg()[0],
    }
    _report.write(arguments, payload)


if __name__ == "__main__":
    main()
