"""The tables, pictures and the report of a run: what a person looks at when it is over."""

import platform
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...reporting import Section, write_report
from ...reporting.cards import shown_base
from ...reporting.plots import plot_compression, plot_reductions, rank_table
from ...version import __version__
from .artefacts import Artefacts
from .planning import CompressPlan
from .sweep import SweepPoint


__all__ = ["NAMES", "comparison", "draw_ranks", "write_run_report"]

Metrics = Mapping[str, Mapping[str, float]]

NAMES = {"dense": "dense", "initial": "compressed, before fine-tuning", "final": "compressed"}
_SPECTRA = "Ranks and widths kept, and the singular values of the attention products with the kept ranks marked"


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


def draw_ranks(dense: nn.Module, plan: CompressPlan, statistics: Mapping[str, Any] | None, path: Path) -> Path | None:
    """Draw ranks and spectra of a run; nothing where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        path.unlink(missing_ok=True)
        return None
    title = (
        f"{shown_base(plan.settings.model_name_or_path)}: {1 - plan.parameters[1] / plan.parameters[0]:.1%} removed"
    )
    return plot_compression(dense, plan.plan, path, statistics=statistics, title=title)


def write_run_report(
    artefacts: Artefacts,
    dense: nn.Module,
    plan: CompressPlan,
    metrics: Metrics,
    statistics: Mapping[str, Any] | None,
    points: Sequence[SweepPoint],
) -> Path:
    """Write `report.html`: one file with the tables and, where matplotlib is installed, the pictures of a run."""
    before, after = plan.parameters
    base = shown_base(plan.settings.model_name_or_path)
    with tempfile.TemporaryDirectory() as folder:
        sections = [
            Section("Result", table=comparison(plan, metrics)),
            *_pictures(Path(folder), dense, plan, metrics, statistics, points),
            Section("Every layer", "Ranks are per head for attention.", table=_layers(dense, plan)),
            Section("How it was made", code=f"{plan.describe()}\n\n{_versions()}"),
        ]
        summary = f"{base} compressed with ComCAT: {before:,} parameters became {after:,} ({after / before - 1:+.1%})."
        return write_report(artefacts.report, f"{base}, compressed", summary, sections)


def _pictures(
    folder: Path,
    dense: nn.Module,
    plan: CompressPlan,
    metrics: Metrics,
    statistics: Mapping[str, Any] | None,
    points: Sequence[SweepPoint],
) -> list[Section]:
    ranks = draw_ranks(dense, plan, statistics, folder / "ranks.svg")
    if ranks is None:
        return []
    sections = [Section("Ranks and spectra", pictures=[(_SPECTRA, ranks)])]
    if metrics:
        reached = plan.plan.reached if plan.plan.reached is not None else 1 - plan.parameters[1] / plan.parameters[0]
        curves = {"not fine-tuned": [(point.reached, point.top1) for point in points]}
        curves["not fine-tuned"].append((reached, metrics["initial"]["top1"]))
        if metrics["final"] != metrics["initial"]:
            curves["fine-tuned"] = [(reached, metrics["final"]["top1"])]
        drawn = plot_reductions(
            curves, folder / "reductions.svg", dense=metrics["dense"]["top1"], quality="top-1 accuracy"
        )
        caption = f"Top-1 accuracy against the share of the {plan.plan.metric} removed"
        sections.append(Section("Accuracy against reduction", pictures=[(caption, drawn)], table=_points(points)))
    return sections


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
