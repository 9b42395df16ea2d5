"""The tables, pictures and the report of a run: what a person looks at when it is over."""

import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...compression.budget.timing import device_name
from ...hub import readable_size
from ...reporting import Section, write_report
from ...reporting.cards import shown_base
from ...reporting.plots import (
    head_spectra,
    plot_compression,
    plot_ranks,
    plot_reductions,
    plot_shares,
    plot_spectra,
    plot_training,
    rank_table,
)
from ...version import __version__
from ..programs import RunResult
from .augmentation import ImagePreparation
from .evaluation import Changes
from .labels import model_labels
from .logs import LOG, read_log
from .planning import CompressPlan, Setting


__all__ = ["NAMES", "CompressResult", "SweepPoint", "comparison", "draw_ranks", "write_run_report"]

Metrics = Mapping[str, Mapping[str, float]]
Models = tuple[nn.Module, nn.Module]

NAMES = {"dense": "dense", "initial": "compressed, before fine-tuning", "final": "compressed"}
_METRICS = {"params": "parameters", "macs": "MACs"}
_RANKS = "Ranks of heads and layers, and widths of MLPs: kept of all"
_SPECTRA = "Singular values of the attention products, with the kept ranks marked"


def comparison(plan: CompressPlan, metrics: Metrics) -> list[tuple[str, ...]]:
    """Dense against compressed: parameters, MACs, and accuracies where they were measured."""
    sizes = dict(zip(("dense", "final"), zip(plan.parameters, plan.macs, strict=True), strict=True))
    rows = [("model", "parameters", "MACs", *(("top-1", "top-5", "images") if metrics else ()))]
    for name in metrics or sizes:
        if name == "initial" and metrics[name] == metrics.get("final"):
            continue
        parameters, macs = sizes.get(name, sizes["final"])
        found = metrics.get(name)
        measured = () if found is None else _measured(found)
        rows.append((NAMES.get(name, name), f"{parameters:,}", f"{macs:,}", *measured))
    return rows


def _measured(found: Mapping[str, float]) -> tuple[str, ...]:
    return f"{found['top1']:.2%}", f"{found['top5']:.2%}", f"{found['samples']:,.0f}"


@dataclass(frozen=True)
class SweepPoint:
    """One reduction.

    Attributes:
        reduction: the share that was asked to be removed.
        reached: the share that the plan removes.
    """

    reduction: float
    reached: float
    top1: float
    top5: float


@dataclass(frozen=True)
class CompressResult(RunResult):
    """What became of a run.

    Attributes:
        metrics: of `"dense"`, `"initial"` (before fine-tuning) and `"final"`, as [`evaluate_classifier`] returns them.
        sweep: other reductions, where these were measured.
    """

    plan: CompressPlan | None = None
    metrics: Metrics = field(default_factory=dict)
    sweep: tuple[SweepPoint, ...] = ()


def draw_ranks(run: Setting, plan: CompressPlan, dense: nn.Module) -> Path | None:
    """Draw ranks and spectra of a run; nothing where matplotlib is not installed."""
    path, (before, after) = run.artefacts.picture, plan.parameters
    if not _drawing():
        path.unlink(missing_ok=True)
        return None
    title = f"{shown_base(run.settings.model_name_or_path)}: {1 - after / before:.1%} removed"
    return plot_compression(dense, plan.plan, path, statistics=run.statistics, title=title)


def write_run_report(
    run: Setting,
    result: CompressResult,
    models: Models,
    speed: Sequence[Mapping[str, Any]],
    changes: Changes | None,
) -> Path:
    """Write `report.html`: one file with the tables and, where matplotlib is installed, the pictures of a run.

    Args:
        models: the dense one and the small one.
        speed: rows of [`measure_speed`] for `"dense"` and `"compressed"`.
        changes: the classes that changed; `None` leaves the section out.
    """
    plan, (dense, _) = result.plan, models
    before, after = plan.parameters
    base = shown_base(run.settings.model_name_or_path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sections = [Section("Result", table=comparison(plan, result.metrics))]
        sections.append(_sizes(folder, run, plan, models, speed))
        if _drawing():
            sections += _pictures(folder, run, result, dense)
        if changes is not None and changes.compared:
            sections.append(_changed(folder, dense, changes, run.preparation))
        sections += [
            Section("Every layer", "Ranks are per head for attention.", table=_layers(dense, plan)),
            Section("How it was made", code=f"{plan.describe()}\n\n{_versions()}"),
        ]
        summary = f"{base} compressed with ComCAT: {before:,} parameters became {after:,} ({after / before - 1:+.1%})."
        return write_report(run.artefacts.report, f"{base}, compressed", summary, sections)


def _sizes(
    folder: Path, run: Setting, plan: CompressPlan, models: Models, speed: Sequence[Mapping[str, Any]]
) -> Section:
    """Sizes and, where they were measured, times beside the dense model's."""
    rows: dict[str, tuple[float, float, Callable[..., str]]]
    rows = {"parameters": (*plan.parameters, "{:,}".format), "MACs": (*plan.macs, "{:,}".format)}
    dense, small = map(_bytes, models)
    rows["weights on disk"] = (dense, small, readable_size)
    for row in speed:
        count, speeds = row["batch_size"], row["images_per_second"]
        times = [1e3 * count / speeds[name] for name in ("dense", "compressed")]
        rows[f"time of {count} image{'s' if count > 1 else ''}"] = (*times, "{:.3g} ms".format)
    table = [("", "dense", "compressed", "left")]
    table += [(name, show(large), show(small), f"{small / large:.1%}") for name, (large, small, show) in rows.items()]
    hardware = f"{device_name(run.accelerator.device)} with torch's threads set to {torch.get_num_threads()}"
    text = f"Times are medians, measured in turns on {hardware}." if speed else ""
    pictures = []
    if _drawing():
        shares = {name: small / large for name, (large, small, _) in rows.items()}
        pictures = [("What is left of the dense model", plot_shares(shares, folder / "sizes.svg"))]
    return Section("Size and speed", text, table, pictures)


def _drawing() -> bool:
    return find_spec("matplotlib") is not None


def _bytes(model: nn.Module) -> int:
    """What the tensors of a saved model take."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def _pictures(folder: Path, run: Setting, result: CompressResult, dense: nn.Module) -> Iterator[Section]:
    plan, metrics = result.plan, result.metrics
    log = read_log(run.artefacts.folder / LOG) if run.artefacts.was_done("finetune") else []
    top1 = metrics["dense"]["top1"] if metrics else None
    if metrics:
        reached = plan.plan.reached if plan.plan.reached is not None else 1 - plan.parameters[1] / plan.parameters[0]
        curves = {"not fine-tuned": [(point.reached, point.top1) for point in result.sweep]}
        curves["not fine-tuned"].append((reached, metrics["initial"]["top1"]))
        if metrics["final"] != metrics["initial"]:
            curves["fine-tuned"] = [(reached, metrics["final"]["top1"])]
        drawn = plot_reductions(curves, folder / "reductions.svg", dense=top1, quality="top-1 accuracy")
        what = _METRICS.get(plan.plan.metric, plan.plan.metric)
        caption = f"Top-1 accuracy against the share of the {what} removed"
        yield Section("Accuracy against reduction", table=_points(result.sweep), pictures=[(caption, drawn)])
    losses, evaluations = (
        [(line["step"], line[key]) for line in log if line.get(key) is not None] for key in ("loss", "eval_top1")
    )
    if losses:
        drawn = plot_training(losses, evaluations, folder / "training.svg", dense=top1, quality="top-1 accuracy")
        caption = "Loss of the fine-tuning" + (", and top-1 accuracy on the validation images" if evaluations else "")
        yield Section("Fine-tuning", pictures=[(caption, drawn)])
    yield Section("Ranks", pictures=[(_RANKS, plot_ranks(dense, plan.plan, folder / "ranks.svg"))])
    if head_spectra(dense):
        drawn = plot_spectra(dense, plan.plan, folder / "spectra.svg", statistics=run.statistics)
        yield Section("Spectra", pictures=[(_SPECTRA, drawn)])


def _changed(folder: Path, dense: nn.Module, changes: Changes, preparation: ImagePreparation) -> Section:
    """Images to which the models give different classes."""
    from PIL import Image

    names, _ = model_labels(dense.config, "The dense model")
    gallery = []
    for number, (inputs, classes) in enumerate(changes.images):
        pixels = (preparation.restore(inputs) * 255).round().byte().movedim(0, -1)
        file = folder / f"changed-{number}.png"
        Image.fromarray(pixels.numpy()).save(file)
        gallery.append(("\n".join(f"{who}: {names[place]}" for who, place in classes.items()), file))
    text = f"The compressed model gives {changes.changed:,} of {changes.compared:,} images another class."
    if len(gallery) < changes.changed:
        text += f" The first {len(gallery)} of them:"
    return Section("Images whose class changed", text, gallery=gallery)


def _points(points: Sequence[SweepPoint]) -> list[tuple[str, ...]]:
    rows = [(f"{p.reduction:.0%}", f"{p.reached:.2%}", f"{p.top1:.2%}", f"{p.top5:.2%}") for p in points]
    return [("asked", "removed", "top-1", "top-5"), *rows] if rows else []


def _layers(dense: nn.Module, plan: CompressPlan) -> list[tuple[str, ...]]:
    """The rank map as a table, for those who cannot see it."""
    table = rank_table(dense, plan.plan)
    rows = list(dict.fromkeys(row for row, _ in table))
    columns = list(dict.fromkeys(column for _, column in table))

    def cell(place: tuple[str, str]) -> str:
        if place not in table:
            return ""
        rank, full = table[place]
        return "dense" if rank is None else f"{rank} of {full}"

    return [("layer", *(c or "rank" for c in columns)), *((row, *(cell((row, c)) for c in columns)) for row in rows)]


def _versions() -> str:
    names = ("transformers", "peft", "accelerate")
    libraries = ", ".join(f"{name} {version(name)}" for name in names)
    return f"comcat_hf {__version__}, torch {torch.__version__}, {libraries}, Python {platform.python_version()}"
