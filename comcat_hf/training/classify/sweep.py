"""Other reductions of the same model, measured without fine-tuning: what a run's own result is compared with."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn

from ...errors import CheckpointError
from ...hub import read_json, write_json_atomic
from ..interruption import on_main
from .artefacts import whole_folder
from .models import load_classifier
from .stages import Setting, allocated, factorised


__all__ = ["SweepPoint", "measure_sweep", "read_sweep"]


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


def measure_sweep(
    run: Setting,
    evaluate: Callable[[nn.Module, str], Mapping[str, float]],
) -> tuple[SweepPoint, ...]:
    """Compress the dense model by each of `sweep_reductions` and evaluate it; all processes call it together.

    Nothing is kept but the figures.

    Raises:
        BudgetError: a reduction out of reach.
        Interrupted: a signal came.
    """
    points = []
    try:
        for reduction in run.settings.sweep_reductions:
            run.say(f"Sweep: {reduction:.0%} of the {run.settings.metric}.")
            reached = run.on_main(partial(_make, run, reduction))
            small = load_classifier(run.artefacts.sweep, "--output_dir")
            found = evaluate(small, f"{reduction:.0%} less")
            points.append(SweepPoint(reduction, reached, found["top1"], found["top5"]))
            run.say(f"Sweep: {points[-1].reached:.2%} removed, top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}.")
    finally:
        if run.accelerator.is_main_process:
            shutil.rmtree(run.artefacts.sweep, ignore_errors=True)
    written = {"points": [asdict(point) for point in points]}
    on_main(run.accelerator, lambda: write_json_atomic(run.artefacts.sweep_results, written))
    return tuple(points)


def read_sweep(path: Path) -> tuple[SweepPoint, ...]:
    """What [`measure_sweep`] wrote; nothing where nothing was measured.

    Raises:
        CheckpointError: the file holds something else.
    """
    if not path.is_file():
        return ()
    try:
        return tuple(SweepPoint(**point) for point in read_json(path)["points"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected points of a sweep, found something else. Run the stage evaluate with --sweep again."
        ) from error


def _make(run: Setting, reduction: float) -> float:
    plan = allocated(run, reduction)
    with whole_folder(run.artefacts.sweep) as folder:
        factorised(run, plan).save_pretrained(folder)
    return plan.reached
