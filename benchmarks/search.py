"""One step of the rank search: the nested form against the written-out mixture of candidates, in one run.

The claims, on DeiT-small shapes at batch 8: the nested step is at least 15 times faster and needs at most a fifth of
the memory. A step is forward and backward from the logits' Gumbel-softmax weights to their gradients. Both sides get
the same weights, inputs, candidates (`search_ranks`' own, attention, MLP and classifier) and mixture; their outputs
and gradients are compared.

Written out, as the original release does: every candidate is a dense product per head (d×d) or layer, evaluated on the
tokens, and the results are mixed. The dense candidates are made before the clock starts, on either side, so is the
singular basis. `--layers` cuts the number of blocks, for both sides alike, where time or memory is short.

Each side's memory is measured in a process of its own: the peak of the resident set in a step, less the resident set
before anything is built, so that weights, candidates and activations all count. `step_mib` is what the step itself
adds. Times are taken in one process, both sides in turns, by the wall and in processor time: where other work shares
the cores, take one thread and look at the second. On a GPU (`--device cuda`) memory is what is allocated there.
"""

import argparse
import statistics
import time

import _report
import torch
from _measuring import apart, peak_since, start_peak, wait
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeiTConfig, DeiTForImageClassification

from comcat_hf.closed_forms.attention import factorize_qk, factorize_vo
from comcat_hf.closed_forms.linear import factorize_linear
from comcat_hf.compression.budget.budget import METRICS, find_budget, sites_of
from comcat_hf.compression.request import Request
from comcat_hf.compression.search.nested import NestedModel
from comcat_hf.compression.search.search import Candidates
from comcat_hf.modeling import find_sites


FASTER, SMALLER = 15, 1 / 5
TEMPERATURE = 5.0


class WrittenOutAttention(nn.Module):
    """Candidates as dense products: scores and outputs of each are computed and mixed."""

    def __init__(self, view, qk_ranks, vo_ranks) -> None:
        super().__init__()
        rows = (view.num_heads, view.head_dim)
        query, key, value = (
            (linear.weight.unflatten(0, rows), linear.bias.unflatten(0, rows))
            for linear in (view.query, view.key, view.value)
        )
        output = view.output.weight.unflatten(1, rows).transpose(0, 1)
        self.scaling = getattr(view.module, view.family.scaling)
        self.qk, self.vo = [], []
        for rank in qk_ranks:
            f = factorize_qk(*query, key[0], rank or view.head_dim)
            product = f.query_weight.mT @ f.key_weight
            self.qk.append((product, (f.query_bias.unsqueeze(-2) @ f.key_weight).squeeze(-2)))
        for rank in vo_ranks:
            f = factorize_vo(*value, output, view.output.bias, rank or view.head_dim)
            self.vo.append(((f.output_weight @ f.value_weight).mT.contiguous(), f.output_bias))
        self.weights: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
        qk, vo = self.weights
        states = hidden_states.unsqueeze(1)
        scores = output = 0
        for (product, bias), weight in zip(self.qk, qk, strict=True):
            score = (states @ product + bias[:, None]) @ states.mT
            scores = scores + score * self.scaling * weight
        attention = scores.softmax(-1)
        for (product, bias), weight in zip(self.vo, vo, strict=True):
            output = output + ((attention @ states @ product).sum(1) + bias) * weight
        return output, None


class WrittenOutLinear(nn.Module):
    """Candidates as dense products of the layer's size."""

    def __init__(self, linear: nn.Linear, ranks) -> None:
        super().__init__()
        self.products, self.bias, self.weights = [], linear.bias, None
        largest = max(rank for rank in ranks if rank is not None)
        f = factorize_linear(linear.weight, linear.bias, largest)
        for rank in ranks:
            dense = rank is None
            product = linear.weight.clone() if dense else f.second_weight[:, :rank] @ f.first_weight[:rank]
            self.products.append(product)

    def forward(self, states: Tensor) -> Tensor:
        pairs = zip(self.products, self.weights, strict=True)
        return sum(F.linear(states, product) * weight for product, weight in pairs) + self.bias


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, Candidates]:
    torch.manual_seed(0)
    sizes = _report.DEIT[name]
    config = DeiTConfig(**sizes, num_hidden_layers=args.layers, num_labels=1000, attn_implementation="sdpa")
    model = DeiTForImageClassification(config).eval().requires_grad_(False).to(args.device)
    sites = find_sites(model)
    budget, _ = find_budget(model, sites, 0.5, METRICS["params"], Request())
    return model, Candidates(budget)


def mixture_of(candidates: Candidates) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(candidates.padding.shape, generator=generator).requires_grad_()
    return logits, candidates.mix(logits, torch.zeros_like(logits), TEMPERATURE)


def nested_side(model: nn.Module, candidates: Candidates):
    nested = NestedModel(model, [(o.site.name, o.choice) for o in candidates.budget.options])

    def forward(mixture: Tensor, images: Tensor) -> Tensor:
        # As the search does it: in one piece to the device.
        scales = candidates.scales(mixture, nested.sizes)
        packed = torch.cat(list(scales.values())).to(images.device)
        scales = dict(zip(scales, packed.split([len(scale) for scale in scales.values()]), strict=True))
        return nested(scales, pixel_values=images).logits

    return forward


def written_out_side(model: nn.Module, candidates: Candidates):
    options = candidates.budget.options
    rows = {(option.site.name, option.choice): index for index, option in enumerate(options)}
    modules = []
    for site in sites_of(options).values():
        indices = [rows[site.name, choice] for choice in site.choices]
        ranks = [candidates.ranks[index] for index in indices]
        attention = site.kind == "attention"
        module = WrittenOutAttention(site.view, *ranks) if attention else WrittenOutLinear(site.linear, *ranks)
        model.set_submodule(site.name, module)
        modules.append((module, indices))

    def forward(mixture: Tensor, images: Tensor) -> Tensor:
        mixture = mixture.to(images.device)
        for module, indices in modules:
            found = [mixture[index, : len(candidates.ranks[index])] for index in indices]
            module.weights = tuple(found) if len(found) > 1 else found[0]
        return model(pixel_values=images).logits

    return forward


SIDES = {"nested": nested_side, "written_out": written_out_side}


def step(
    forward, candidates: Candidates, images: Tensor, labels: Tensor
) -> tuple[tuple[float, float], Tensor, Tensor]:
    """Seconds on the wall and of the processor, the model's logits and the gradients of the rank logits."""
    logits, mixture = mixture_of(candidates)
    wait(images.device)
    start = time.perf_counter(), time.process_time()
    output = forward(mixture, images)
    F.cross_entropy(output, labels).backward()
    wait(images.device)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return seconds, output.detach(), logits.grad


def memory_of(side: str, name: str, args: argparse.Namespace) -> dict:
    """Peak bytes of the resident set, or of a GPU's memory, over all and in the step alone, in this process."""
    torch.set_num_threads(args.threads)
    images, labels = batch_of(args)
    # What a first use of the kernels loads is nobody's.
    torch.linalg.svd(torch.randn(64, 64, requires_grad=True))[1].sum().backward()
    start = start_peak(args.device)
    model, candidates = build(name, args)
    forward = SIDES[side](model, candidates)
    del model
    built = start_peak(args.device)
    step(forward, candidates, images, labels)
    peak = peak_since(args.device)
    return {"whole": peak - start, "step": peak - built}


def times_of(name: str, args: argparse.Namespace) -> dict:
    """Seconds of both sides in turns, and how far outputs and gradients are apart."""
    torch.set_num_threads(args.threads)
    images, labels = batch_of(args)
    sides = {}
    for side, make in SIDES.items():
        model, candidates = build(name, args)
        sides[side] = make(model, candidates)
    times: dict[str, list[tuple[float, ...]]] = {side: [] for side in SIDES}
    found = {}
    for forward in sides.values() if args.device != "cpu" else [sides["nested"]]:
        step(forward, candidates, images, labels)
    for _ in range(args.rounds):
        for side, forward in sides.items():
            # The short side several times, so that a moment's load on the machine weighs less.
            taken = []
            for _ in range(5 if side == "nested" else 1):
                seconds, *found[side] = step(forward, candidates, images, labels)
                taken.append(seconds)
            times[side].append(tuple(map(statistics.median, zip(*taken, strict=True))))
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(*found.values(), strict=True)]
    return {"times": times, "errors": errors}


def batch_of(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(args.batch_size, 3, 224, 224, generator=generator)
    return images.to(args.device), torch.arange(args.batch_size, device=args.device)


def compare(name: str, args: argparse.Namespace) -> dict:
    memory = {side: apart(memory_of, side, name, args) for side in SIDES}
    timed = apart(times_of, name, args)
    rounds, busy = (
        list(zip(*([taken[clock] for taken in timed["times"][side]] for side in SIDES), strict=True))
        for clock in range(2)
    )
    faster = statistics.median(slow / fast for fast, slow in rounds)
    ratio = memory["nested"]["whole"] / memory["written_out"]["whole"]
    return {
        "model": name,
        "layers": args.layers,
        "nested_s": statistics.median(fast for fast, _ in rounds),
        "written_out_s": statistics.median(slow for _, slow in rounds),
        "times_faster": faster,
        "times_faster_by_round": [slow / fast for fast, slow in rounds],
        "nested_cpu_s": statistics.median(fast for fast, _ in busy),
        "written_out_cpu_s": statistics.median(slow for _, slow in busy),
        "times_faster_cpu": statistics.median(slow / fast for fast, slow in busy),
        "nested_mib": memory["nested"]["whole"] / 2**20,
        "written_out_mib": memory["written_out"]["whole"] / 2**20,
        "memory_ratio": ratio,
        "step_mib": {side: memory[side]["step"] / 2**20 for side in SIDES},
        "step_memory_ratio": memory["nested"]["step"] / memory["written_out"]["step"],
        "output_error": timed["errors"][0],
        "gradient_error": timed["errors"][1],
        "holds": faster >= FASTER and ratio <= SMALLER,
    }


def main() -> None:
    parser = _report.parser(__doc__, device="cpu", threads=2, batch_size=8)
    parser.add_argument("--model", nargs="+", choices=_report.DEIT, default=list(_report.DEIT))
    parser.add_argument("--layers", type=int, default=2, help="blocks, the same on both sides; the models have 12")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [compare(name, args) for name in args.model]
    shown = {
        "model": "model",
        "layers": "layers",
        "nested_s": "nested s",
        "written_out_s": "written out s",
        "times_faster": "faster",
        "times_faster_cpu": "in CPU time",
        "nested_mib": "nested MiB",
        "written_out_mib": "written out MiB",
        "memory_ratio": "memory",
    }
    table = [[*(row[key] for key in shown), "yes" if row["holds"] else "no"] for row in rows]
    _report.print_table(table, [*shown.values(), f">= {FASTER}x, <= {SMALLER}"])
    _report.write(args, {"rows": rows})


if __name__ == "__main__":
    main()
