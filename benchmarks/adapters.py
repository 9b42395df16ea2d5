"""Bytes against quality: adapters of diffusion models are taught a digit that their base lacks.

The claims: a core with gains learns as many new digits as LoRA of rank 1, within one standard error, with at most 60 %
of its parameters, and keeps the old digits; with at most 30 % it is ahead of every method of PEFT that is so small.

Bases are trained from scratch on scikit-learn's digits without the four: the UNet of `comcat demo-customize` and a
small SD3 (`--models FLUX.2`: a small FLUX.2, too). Adapters learn the four from 16 images under a new name, beside
images that the base drew of the old digits. A classifier that saw other images reads what is drawn. Each method takes
the best of three learning rates, half a decade apart, on a validation seed of the first base; where the best is the
lowest or highest of the three, one more is tried. A seed decides images, batches, noise and initial weights, the same
ones for every method, so that differences between methods are paired. Whatever comes out is reported.

Results are written after every run, and a run that is in the file is not repeated: stop it at any time, and start it
again.

    python benchmarks/adapters.py --json results.json --plot results.svg
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import _report
import torch
from _digits import KINDS, Steps, Studio
from peft import (
    BOFTConfig,
    FourierFTConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PsoftConfig,
    TinyLoraConfig,
    VeraConfig,
)
from torch import nn
from transformers.utils import logging

from comcat_hf import ComCATConfig
from comcat_hf.demos.compress import load_digits
from comcat_hf.demos.customize.base import HELD_OUT, OLD
from comcat_hf.demos.customize.judge import train_judge
from comcat_hf.errors import ComCATError
from comcat_hf.hub import read_json, write_json_atomic
from comcat_hf.reporting.plots import plot_image_grid
from comcat_hf.reporting.plots.figures import COLORS, finish, new_figure
from comcat_hf.tuners.groups import GAINS_LR_RATIO


REFERENCE, UNTOUCHED, OURS, GAINS, FASTER = "LoRA 1", "base", "ComCAT", "gains", "gains x3"
NEAR, LOW = 0.6, 0.3
VALIDATION = 100  # a seed
SHOWN = 6  # images of the new digit in the picture
_GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)
_KEYS_AND_VALUES = ("to_k", "to_v", "add_k_proj", "add_v_proj")
_HIDDEN_UNITS = ("net.2", "linear_out")  # the layers of feed-forwards that read them

Attach = Callable[[nn.Module], PeftConfig]


def _linears(model: nn.Module, *ends: str) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def _attention(model: nn.Module) -> list[str]:
    return [name for name in _linears(model, "") if ".attn" in name]


def _ours(qk: int | None = None, vo: int | None = None, **further: bool) -> Attach:
    return lambda model: ComCATConfig(mode="customize", qk_rank=qk, vo_rank=vo, **further)


def _cores(rank: int, **further: bool) -> Attach:
    return _ours(rank, rank, core=True, **further)


def _peft(kind: Callable[..., PeftConfig], **fields: Any) -> Attach:
    return lambda model: kind(target_modules=_attention(model), **fields)


def _lora(rank: int) -> Attach:
    return _peft(LoraConfig, r=rank, lora_alpha=rank)


def _lora_of_values(model: nn.Module) -> PeftConfig:
    return LoraConfig(r=1, lora_alpha=1, target_modules=_linears(model, "to_v", "add_v_proj"))


def _ia3(model: nn.Module) -> PeftConfig:
    hidden = _linears(model, *_HIDDEN_UNITS)
    return IA3Config(target_modules=_linears(model, *_KEYS_AND_VALUES) + hidden, feedforward_modules=hidden)


def _tiny(rank: int, numbers: int) -> Attach:
    return _peft(TinyLoraConfig, r=rank, u=numbers, save_projection=False)


def _xs(rank: int) -> Attach:
    # A free matrix between the principal directions of the weights, these scaled by the singular values.
    return _peft(PsoftConfig, r=rank, psoft_alpha=rank, psoft_orth=False, psoft_mag_a=False, psoft_mag_b=False)


# By name: what is attached, and the middle of the rates that are tried. The decisive ones come first. Of those named
# x3 gains have three times the rate of cores, of the others the same.
METHODS: Mapping[str, tuple[Attach, float]] = {
    "LoRA 1": (_lora(1), 3e-2),
    "ComCAT core 3 + gains x3": (_cores(3, gains=True), 3e-1),
    "ComCAT core 3 + head gains x3": (_cores(3, head_gains=True), 3e-1),
    "ComCAT core 4 + gains": (_cores(4, gains=True), 3e-1),
    "ComCAT core 3 + gains": (_cores(3, gains=True), 3e-1),
    "ComCAT core 6 + gains": (_cores(6, gains=True), 3e-1),
    "IA3": (_ia3, 1e-1),
    "ComCAT core 1 + head gains": (_cores(1, head_gains=True), 3e-1),
    "ComCAT core 2 + head gains": (_cores(2, head_gains=True), 3e-1),
    "ComCAT core 3 + head gains": (_cores(3, head_gains=True), 3e-1),
    "ComCAT core 1 + gains x3": (_cores(1, gains=True), 3e-1),
    "ComCAT core 1 + head gains x3": (_cores(1, head_gains=True), 3e-1),
    "ComCAT core 2 + head gains x3": (_cores(2, head_gains=True), 3e-1),
    "ComCAT core 4 + gains x3": (_cores(4, gains=True), 3e-1),
    "ComCAT core 1 + all gains": (_cores(1, gains=True, head_gains=True), 3e-1),
    "ComCAT gains": (_ours(gains=True), 1e-1),
    "ComCAT head gains": (_ours(head_gains=True), 3e-1),
    "ComCAT core 4": (_cores(4), 3e-1),
    "ComCAT core 8": (_cores(8), 1e-1),
    "LoRA 1, V alone": (_lora_of_values, 3e-2),
    "LoRA-XS 5": (_xs(5), 1e-1),
    "LoRA-XS 7": (_xs(7), 1e-1),
    "TinyLoRA 25": (_tiny(8, 25), 3e-2),
    "ComCAT core VO 5": (_ours(None, 5, core=True), 3e-1),
    "ComCAT core 3": (_cores(3), 3e-1),
    "ComCAT core 2 + gains": (_cores(2, gains=True), 3e-1),
    "ComCAT core 1 + gains": (_cores(1, gains=True), 3e-1),
    "LoRA 2": (_lora(2), 3e-2),
    "ComCAT full 1": (_ours(1, 1), 3e-2),
    "VeRA 16": (_peft(VeraConfig, r=16, save_projection=False), 1e-1),
    "PSOFT 8": (_peft(PsoftConfig, r=8, psoft_alpha=8), 1e-1),
    "ComCAT core VO 8": (_ours(None, 8, core=True), 3e-1),
    "LoKr 4": (_peft(LoKrConfig, r=4, alpha=4), 3e-2),
    "OFT 2": (_peft(OFTConfig, oft_block_size=2), 1e-1),
    "OFT 8": (_peft(OFTConfig, oft_block_size=8), 1e-1),
    "FourierFT 25": (_peft(FourierFTConfig, n_frequency=25), 1e-2),
    "TinyLoRA 50": (_tiny(8, 50), 3e-2),
    "ComCAT core 6": (_cores(6), 3e-1),
    "ComCAT full VO 1": (_ours(None, 1), 3e-2),
    "ComCAT full QK 1": (_ours(1, None), 3e-2),
    "LoRA 4": (_lora(4), 3e-2),
    "LoRA 8": (_lora(8), 3e-2),
    "ComCAT full 2": (_ours(2, 2), 3e-2),
    "ComCAT core 16": (_cores(16), 1e-1),
    "BOFT 4": (_peft(BOFTConfig, boft_block_size=4), 3e-2),
}


def ratio_of(method: str) -> float:
    """The rate of gains, as a multiple of the others'."""
    return GAINS_LR_RATIO if method.endswith(FASTER) else 1.0


class Results:
    """What was measured so far, by model and method; every change is written."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.found = path, {"settings": dict(settings), "environment": _report.environment(), "models": {}}
        if path is not None and path.exists():
            self.found = read_json(path)
            for model, given in settings.items():
                if self.found["settings"].setdefault(model, given) != given:
                    raise SystemExit(f"{path}: measured with other settings of {model}; give another file to --json.")

    def of(self, model: str, method: str) -> dict[str, Any]:
        """What is known of one method on one model."""
        return self.found["models"].setdefault(model, {}).setdefault(method, {"tried": {}, "runs": {}})

    def save(self) -> None:
        """Write everything, if there is a file."""
        if self.path is not None:
            write_json_atomic(self.path, self.found)


def choose_rate(known: dict[str, Any], middle: float, score: Callable[[float], list[float]]) -> None:
    """Try the rates around the middle, and one beyond if the best is at an edge; the best by both shares together."""
    places = [_GRID.index(middle) + step for step in (-1, 0, 1)]

    def best() -> int:
        for place in places:
            name = f"{_GRID[place]:g}"
            if name not in known["tried"]:
                known["tried"][name] = score(_GRID[place])
        return max(places, key=lambda place: sum(known["tried"][f"{_GRID[place]:g}"]))

    found = best()
    if found in (places[0], places[-1]):
        places.append(found - 1 if found == places[0] else found + 1)
        places.sort()
        found = best()
    known |= {"rate": _GRID[found], "edge": found in (places[0], places[-1])}


def measure(
    results: Results, model: str, method: str, studio: Callable[[int], Studio], bases: int, seeds: int
) -> None:
    """Measure what is missing of one method on one model."""
    known, (attach, middle) = results.of(model, method), METHODS[method]
    ratio = ratio_of(method)

    def score(rate: float) -> list[float]:
        return list(studio(0).judged(studio(0).teach(attach, rate, VALIDATION, ratio).model, VALIDATION))

    def run(base: int, seed: int) -> list[float]:
        taught = studio(base).teach(attach, known["rate"], seed, ratio)
        known.update(parameters=taught.parameters, bytes=taught.size)
        return [*studio(base).judged(taught.model, seed), round(statistics.median(taught.spent), 2)]

    try:
        if "rate" not in known:
            choose_rate(known, middle, score)
            results.save()
            print(f"{model}, {method}: {known['tried']} -> {known['rate']:g}", flush=True)
        _fill(results, known, bases, seeds, run)
    except ComCATError as error:
        known["cannot"] = str(error)
    results.save()


def _fill(
    results: Results, known: dict[str, Any], bases: int, seeds: int, run: Callable[[int, int], list[float]]
) -> None:
    for name, base, seed in ((f"base {b}, seed {s}", b, s) for b in range(bases) for s in range(seeds)):
        if name not in known["runs"]:
            known["runs"][name] = run(base, seed)
            results.save()


def _mean(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def rows_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each model and method: means and standard errors over bases and seeds."""
    rows = []
    for model, methods in found["models"].items():
        reference = methods.get(REFERENCE, {})
        for method, known in methods.items():
            if not known["runs"]:
                continue
            new, old, spent = zip(*known["runs"].values(), strict=True)
            row = {"model": model, "method": method, "runs": len(new), "rate": known.get("rate")}
            row |= {"edge": known.get("edge", False), "parameters": known.get("parameters", 0)}
            row |= {"bytes": known.get("bytes", 0)}
            for share, values in (("new", new), ("old", old)):
                row[share], row[f"{share}_error"] = _mean(list(values))
            if reference.get("runs"):
                row["of_reference"] = row["parameters"] / reference["parameters"]
                row["time"] = statistics.median(spent) / statistics.median(v[2] for v in reference["runs"].values())
            rows.append(row)
    return sorted(rows, key=lambda row: (list(found["models"]).index(row["model"]), row["parameters"]))


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], place: int) -> tuple[float, float]:
    shared = [name for name in one["runs"] if name in other["runs"]]
    return _mean([one["runs"][name][place] - other["runs"][name][place] for name in shared])


def verdict(methods: Mapping[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Both claims on one model, with the differences that decide them: mean and standard error of paired runs."""

    def best(limit: float, chosen: Callable[[str], bool]) -> list[str]:
        small = [row for row in rows if 0 < row.get("of_reference", 0) <= limit and chosen(row["method"])]
        return [row["method"] for row in sorted(small, key=lambda row: -row["new"])]

    said: dict[str, Any] = {}
    near = []
    for name in best(NEAR, lambda method: method.startswith(OURS) and GAINS in method):
        new, old = (_difference(methods[name], methods[REFERENCE], place) for place in (0, 1))
        holds = new[0] >= -new[1] and old[0] >= -old[1]
        near.append({"ours": name, "new": new, "old": old, "holds": holds})
    if near:
        # The best for which both hold, or else the best of all.
        said["near"] = next((one for one in near if one["holds"]), near[0])
    for name in best(LOW, lambda method: method.startswith(OURS))[:1]:
        others = best(LOW, lambda method: not method.startswith(OURS))
        ahead = {other: _difference(methods[name], methods[other], 0) for other in others}
        said["low"] = {"ours": name, "ahead of": ahead, "holds": all(mean > 0 for mean, _ in ahead.values())}
    return said


def print_report(found: Mapping[str, Any]) -> None:
    """The table, what could not be attached, and the verdicts."""
    rows = rows_of(found)
    head = ["model", "method", "parameters", "of LoRA 1", "bytes", "new right", "old right", "time", "rate", "runs"]
    _report.print_table([_line(row) for row in rows], head)
    print("A rate with a star is the lowest or highest that was tried. Time: of a step, as a multiple of LoRA 1's.")
    for model, methods in found["models"].items():
        for method, known in methods.items():
            if "cannot" in known:
                print(f"{model}, {method}: {known['cannot']}")
        said = verdict(methods, [row for row in rows if row["model"] == model])
        if near := said.get("near"):
            new, old = (f"{mean:+.3f} ± {error:.3f}" for mean, error in (near["new"], near["old"]))
            print(f"{model}, at most {NEAR:.0%} of {REFERENCE}: {near['ours']} {_word(near)}: new {new}, old {old}.")
        if low := said.get("low"):
            behind = ", ".join(f"{mean:+.3f} ± {error:.3f} {name}" for name, (mean, error) in low["ahead of"].items())
            print(f"{model}, at most {LOW:.0%} of {REFERENCE}: {low['ours']} {_word(low)}: {behind}.")


def _word(said: Mapping[str, Any]) -> str:
    return "holds" if said["holds"] else "falls short"


def _line(row: Mapping[str, Any]) -> list[object]:
    shares = [f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in ("new", "old")]
    rate = "" if row["rate"] is None else f"{row['rate']:g}{'*' * row['edge']}"
    of_reference, spent = (f"{row[name]:{form}}" if row.get(name) else "" for name, form in _RATIOS)
    size = [f"{row['parameters']:,}", of_reference, f"{row['bytes']:,}"]
    return [row["model"], row["method"], *size, *shares, spent, rate, row["runs"]]


_RATIOS = (("of_reference", ".0%"), ("time", ".2f"))
# The first that a method's name begins or ends with: its colour and marker in the plot.
_FAMILIES = {"gains": "o", FASTER: "P", "ComCAT core": "s", "ComCAT full": "D", "LoRA ": "^", "": "v"}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """New digits right against trained parameters, a panel for each model."""
    rows = rows_of(found)
    models = [model for model in found["models"] if any(row["model"] == model for row in rows)]
    figure = new_figure(7 * len(models), 5)
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        for row in (row for row in rows if row["model"] == model and row["parameters"]):
            family = next(end for end in _FAMILIES if row["method"].startswith(end) or row["method"].endswith(end))
            color = COLORS[list(_FAMILIES).index(family)]
            point = row["parameters"], row["new"]
            panel.errorbar(*point, row["new_error"], fmt=_FAMILIES[family], color=color, markersize=6, linewidth=1)
            name = row["method"].removeprefix("ComCAT ")
            panel.annotate(name, point, (5, 3), textcoords="offset points", fontsize=6.5, color=color)
        panel.set_xscale("log")
        panel.set_xlabel("trained parameters")
        panel.set_ylabel("share of new digits right")
        panel.set_title(f"{model} (bars: one standard error)", fontsize=10)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    finish(figure, path, None)


def picture(results: Results, studio: Studio, model: str, methods: list[str], path: Path) -> None:
    """What the base draws, and adapters on it: the new digit, and each old one; a frame says what the judge read."""
    captions = [len(OLD)] * SHOWN + list(range(len(OLD)))
    old = [digit for digit in range(10) if digit != HELD_OUT]
    wanted = torch.tensor([HELD_OUT] * SHOWN + old)
    drawn = {"before": studio.draw(studio.base, captions, 0)}
    for method in methods:
        taught = studio.teach(METHODS[method][0], results.of(model, method)["rate"], 0, ratio_of(method))
        drawn[f"{method}, {taught.size / 1e3:.0f} kB"] = studio.draw(taught.model, captions, 0)
    plot_image_grid(
        {name: (images.mean(dim=1) + 1) / 2 for name, images in drawn.items()},
        path,
        columns=["V*"] * SHOWN + [str(digit) for digit in old],
        right={name: (studio.judge.read(images) == wanted).tolist() for name, images in drawn.items()},
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print the table and the verdicts, and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(KINDS), default=["UNet", "SD3"])
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--bases", type=int, default=2, help="trained with different seeds, of each model")
    parser.add_argument("--seeds", type=int, default=5, help="of adapters, on each base")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--picture", type=Path, help="images of the first model's first base by --methods")
    parser.add_argument("--cache", type=Path, help="a folder for trained bases, which a later run loads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    results = Results(given.json, {model: asdict(KINDS[model].settings) for model in given.models})
    torch.manual_seed(0)
    data = load_digits()
    judge = train_judge(data, 40, Steps())
    opened: dict[tuple[str, int], Studio] = {}

    def studio(model: str, base: int) -> Studio:
        if (model, base) not in opened:
            cached = given.cache and given.cache / f"{model}-{base}.safetensors"
            opened[model, base] = Studio(KINDS[model], base, data, judge, cached)
        return opened[model, base]

    for model in given.models:
        known, of = results.of(model, UNTOUCHED), partial(studio, model)
        _fill(results, known, given.bases, given.seeds, lambda b, s, of=of: [*of(b).judged(of(b).base, s), 0.0])
    for method in given.methods:
        for model in given.models:
            measure(results, model, method, partial(studio, model), given.bases, given.seeds)
    print_report(results.found)
    if given.plot:
        plot(results.found, given.plot)
    if given.picture:
        model = given.models[0]
        picture(results, studio(model, 0), model, given.methods, given.picture)


if __name__ == "__main__":
    main()
