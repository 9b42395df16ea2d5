"""The figures of README.md and docs/benchmarks.md, drawn from the committed results.

python benchmarks/_figures.py  # or: make figures
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comcat_hf.reporting.plots.figures import COLORS, FAINT, MUTED, new_figure, open_frame, save_figure


ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"

# Names of methods in quality.py, how figures call them, and their colour, marker and line.
BLUE, ORANGE, GREEN, PINK = COLORS[:4]
METHODS = {
    "curvature + compensation": ("ours: curvature", BLUE, "o", "solid"),
    "sensitivity + compensation": ("ours: sensitivity", GREEN, "s", "solid"),
    "whitened": ("SVD-LLM's form", PINK, "^", "dashed"),
    "weights-only": ("SVD of the weights", ORANGE, "D", "dashed"),
    "original": ("original release", MUTED, "v", "dotted"),
}
QUALITY = (
    *("quality", "quality-minilm", "quality-minilm-both"),
    *("quality-curvature-vits", "quality-curvature-attention", "quality-curvature-both"),
)
# The case and the scope of the first figure.
OVERVIEW = ("cifar10", "model")
NAMES = {"cosine": "cosine to the dense embeddings", "accuracy": "accuracy"}
CASES = {"minilm": "sentence encoder", "digits": "ViT on digits", "cifar10": "ViT on CIFAR-10"}
SCOPES = {"attention": "attention alone", "mlp": "MLPs alone"}
SCOPES |= {"attention+mlp": "attention and MLPs", "model": "whole model"}
_WIDTH = 8.33  # inches: 800 pixels
_LEAST_SPAN = 0.08


def read(name: str) -> dict[str, Any]:
    """A committed result; empty where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def quality_curves(case: str, scope: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """The metric of a case, and by method points (share of parameters left, quality), from the dense model down."""
    found = [row for name in QUALITY for row in read(name).get("rows", ())]
    rows = [row for row in found if (row["case"], row["scope"]) == (case, scope)]
    metric = next(name for name in NAMES if name in rows[0]["metrics"])
    said = next(found for name in QUALITY if (found := read(name).get("dense", {}).get(case)))
    dense = 1.0 if metric == "cosine" else float(said.split()[1])
    curves = {}
    for method in METHODS:
        points = {1 - row["reached"]: row["metrics"][metric]["mean"] for row in rows if row["method"] == method}
        if points:
            curves[method] = sorted({1.0: dense, **points}.items(), reverse=True)
    return metric, curves


def draw_quality(axes: Any, case: str, scope: str, methods: Mapping[str, tuple[str, ...]] = METHODS) -> None:
    """Quality against the parameters that are left, with the methods' names at the ends of their curves."""
    metric, curves = quality_curves(case, scope)
    ends = []
    for method in (name for name in methods if name in curves):
        name, color, marker, line = methods[method]
        style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 2, "markersize": 6}
        axes.plot(*zip(*curves[method], strict=True), markeredgecolor="white", clip_on=False, **style)
        ends.append((curves[method][-1], name, color))
    axes.set_xlabel("parameters left")
    axes.set_ylabel(NAMES[metric])
    axes.xaxis.set_major_formatter("{x:.0%}")
    if metric == "accuracy":
        axes.yaxis.set_major_formatter("{x:.0%}")
    low, high = axes.get_ylim()
    # Noise must not look like a cliff.
    spare = max(_LEAST_SPAN - (high - low), 0) / 2
    axes.set_ylim(low - spare, high + spare)
    # From the dense model on the left to the smallest on the right.
    axes.invert_xaxis()
    open_frame(axes)
    name_ends(axes, ends)


def name_ends(axes: Any, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """Names to the right of the ends of curves, apart from each other."""
    low, high = axes.get_ylim()
    # A line of text, in the units of the axis; three quarters of a panel's height are its frame.
    tall = axes.figure.get_size_inches()[1] / axes.get_gridspec().nrows
    gap = 12 / 72 / (0.75 * tall) * (high - low)
    heights = []
    for (_, y), _, _ in sorted(ends, key=lambda end: end[0][1]):
        heights.append(max([y, *(height + gap for height in heights[-1:])]))
    # Pushed up at most to the top of the frame, then down.
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else high)
    right = axes.get_xlim()[1]
    for height, ((_, _), name, color) in zip(heights, sorted(ends, key=lambda end: end[0][1]), strict=True):
        place = {"textcoords": "offset points", "xytext": (6, 0), "va": "center", "annotation_clip": False}
        axes.annotate(name, (right, height), fontsize=9, color=color, **place)


def draw_times(axes: Any) -> None:
    """Bars of the time of the dense and the compressed DeiTs, one below the other."""
    found = read("latency")
    names = {"deit-small": "DeiT-small", "deit-base": "DeiT-base"}
    for place, row in enumerate(found["rows"]):
        share, middle = row["latency_ratio"], 1.5 * place
        axes.barh([middle, middle + 0.5], [1, share], 0.44, color=[FAINT, BLUE])
        axes.text(0.02, middle, f"{names[row['model']]}, dense: {row['dense_ms']:,.0f} ms", va="center", fontsize=9)
        kept = f"{row['parameter_ratio']:.0%} of the parameters: {row['compressed_ms']:,.0f} ms"
        axes.annotate(kept, (share, middle + 0.5), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    settings = found["settings"]
    axes.set_xlabel(f"time of {settings['batch_size']} images, {settings['threads']} CPU threads")


def overview() -> Any:
    """One message: half of the parameters, nearly the same answers, nearly half of the time."""
    figure = new_figure(_WIDTH, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    ours = {"curvature + compensation": ("ours", BLUE, "o", "solid")}
    draw_quality(left, *OVERVIEW, ours | {name: METHODS[name] for name in ("whitened", "weights-only", "original")})
    draw_times(right)
    titles = {left: ("The accuracy stays", "a ViT on CIFAR-10, 5,000 images held out, not fine-tuned")}
    titles |= {right: ("and the time falls with the size", "DeiT, float32, measured in turns")}
    for axes, (title, below) in titles.items():
        axes.set_title(f"{title}\n", fontsize=11, loc="left")
        axes.annotate(below, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=9, color=MUTED)
    return figure


def latency() -> Any:
    """The times alone."""
    figure = new_figure(_WIDTH, 2.6)
    draw_times(figure.subplots())
    return figure


def quality_figure(*parts: tuple[str, str]) -> Callable[[], Any]:
    """Panels of quality, one below the other where there are more than two."""

    def draw() -> Any:
        across = min(len(parts), 2)
        down = -(-len(parts) // across)
        figure = new_figure(_WIDTH, 3.4 * down)
        panels = list(figure.subplots(down, across, squeeze=False).flat)
        for axes, (case, scope) in zip(panels, parts, strict=False):
            draw_quality(axes, case, scope)
            axes.set_title(f"{CASES[case]}, {SCOPES[scope]}", fontsize=10, loc="left")
        for axes in panels[len(parts) :]:
            axes.set_axis_off()
        return figure

    return draw


def rows_of_runs(models: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the runs in adapters.json: model, method, trained parameters, share of new digits right with its error."""
    rows = []
    for model, methods in models.items():
        for method, known in methods.items():
            if known.get("parameters") and known["runs"]:
                right = [new for new, *_ in known["runs"].values()]
                error = statistics.stdev(right) / len(right) ** 0.5 if len(right) > 1 else 0.0
                row = {"model": model, "method": method, "parameters": known["parameters"]}
                rows.append(row | {"new": statistics.mean(right), "new_error": error})
    return rows


def transformers_digits() -> Any:
    """Adapters of a small SD3 and a small FLUX.2, by trained parameters."""
    return adapters_figure([row for row in read("transformers-digits")["rows"] if row["parameters"]])


def adapters() -> Any:
    """Adapters of bases trained on digits, by trained parameters."""
    return adapters_figure(rows_of_runs(read("adapters")["models"]))


def adapters_figure(rows: list[dict[str, Any]]) -> Any:
    """New digits right against the adapter's size; names where there is room, else at the best of their size."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = new_figure(_WIDTH, 4.2)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["parameters"])
        best = 0.0
        for row in own:
            ours = row["method"].startswith("ComCAT")
            color = BLUE if ours else ORANGE
            bar = {"fmt": "o" if ours else "D", "color": color, "markersize": 6, "linewidth": 1, "capsize": 2}
            axes.errorbar(row["parameters"], row["new"], row["new_error"], **bar)
            if len(own) <= 8 or row["new"] > best:
                name = row["method"].replace("ComCAT,", "ours:").replace("ComCAT", "ours:")
                place = {"textcoords": "offset points", "xytext": (6, -11)}
                axes.annotate(name, (row["parameters"], row["new"]), fontsize=8.5, color=color, **place)
            best = max(best, row["new"])
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("share of new digits right")
        axes.set_title(model, fontsize=10, loc="left")
        axes.margins(0.2, 0.12)
        if own[-1]["parameters"] > 8 * own[0]["parameters"]:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        open_frame(axes)
    return figure


FIGURES: dict[str, Callable[[], Any]] = {
    "overview": overview,
    "latency": latency,
    "quality-encoder": quality_figure(*(("minilm", scope) for scope in ("attention", "mlp", "attention+mlp"))),
    "quality-vits": quality_figure(("digits", "model"), ("cifar10", "model")),
    "transformers-digits": transformers_digits,
    "adapters": adapters,
}


def draw_all(folder: Path) -> list[Path]:
    """Draw every figure into a folder; returns the files."""
    return [save_figure(draw(), folder / f"{name}.svg") for name, draw in FIGURES.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the figures")
    print("\n".join(map(str, draw_all(parser.parse_args().output))))
