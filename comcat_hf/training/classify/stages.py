"""The stages before fine-tuning: statistics, a plan, a factorised model. Each is made once and read again."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ...compression.budget.allocation import allocate_ranks
from ...compression.calibration.statistics import Statistics, collect_statistics
from ...compression.compress import compress
from ...compression.search.search import SearchState, search_ranks
from ...configs import RankPlan
from ...errors import CheckpointError, InvalidValueError
from ..images import BrokenImageError
from ..interruption import Interrupted, on_main, stopped_by
from .artefacts import digest_of, whole_folder
from .augmentation import ImagePreparation
from .data import BrokenImages, Split
from .models import load_teacher
from .planning import Setting, given_plan, request_of
from .routes import make_loss
from .stream import Batches


__all__ = ["allocate", "allocated", "calibrate", "factorised", "initialize"]

# Search steps between two saves of its state.
_SAVE_SEARCH = 100


def calibrate(run: Setting) -> None:
    """Gather the statistics of training images, unless factors come from weights alone, or the stage is left out.

    Raises:
        Interrupted: a signal came.
    """
    if run.settings.weights_only or not (run.done("calibrate") or _gather(run)):
        return
    # Read by all: what one process gathered may differ from another's in the last digit.
    run.statistics = Statistics.from_pretrained(run.artefacts.statistics)


def allocate(run: Setting) -> RankPlan:
    """The rank plan: read, searched or allocated.

    Raises:
        Interrupted: a signal came; the state of a search is saved.
        CheckpointError: the stage is left out, and its work is not there.
        InvalidValueError: the stage is done, with another plan in the place of `--plan`.
    """
    if not run.done("allocate"):
        if "allocate" not in run.settings.stage_names:
            raise _missing(run, "allocate", "a rank plan")
        plan = _make_plan(run)

        def save() -> None:
            plan.save_pretrained(run.artefacts.folder)
            run.artefacts.search_state.unlink(missing_ok=True)
            run.finish("allocate")

        on_main(run.accelerator, save)
    found = RankPlan.from_pretrained(run.artefacts.folder)
    asked = run.settings.plan is not None and "allocate" in run.settings.stage_names
    # Under the same name there may be another plan now.
    if asked and digest_of(given_plan(run.settings)) != digest_of(found):
        raise InvalidValueError(
            f"{run.artefacts.folder}: the stage allocate was done with another plan than --plan {run.settings.plan} "
            "holds now. Give another --output_dir, or --overwrite_output_dir."
        )
    return found


def initialize(run: Setting, plan: RankPlan) -> None:
    """Make the factorised model before fine-tuning, in its folder.

    Raises:
        Interrupted: a signal came.
        CheckpointError: the stage is left out, and its work is not there.
    """
    if not run.done("initialize"):
        if "initialize" not in run.settings.stage_names:
            raise _missing(run, "initialize", "a factorised model")
        steps = run.settings.refine_steps
        run.say(f"Stage initialize: factors{f', then {steps} steps without labels' if steps else ''}.")
        run.on_main(lambda: _initialize(run, plan))


def factorised(run: Setting, plan: RankPlan) -> nn.Module:
    """A small model as the settings make it, on the CPU; by this process alone."""
    request = request_of(run.settings)
    return compress(
        run.dense.to(run.accelerator.device),
        plan=plan,
        batches=run.calibration_batches if request.compensate or request.refine else None,
        statistics=run.statistics,
        compensate=request.compensate,
        refine=request.refine,
        layout=request.layout,
        progress=True,
    ).cpu()


def allocated(run: Setting, reduction: float) -> RankPlan:
    """A plan as the settings make it, for any reduction; by this process alone."""
    settings, request = run.settings, request_of(run.settings)
    run.dense.to(run.accelerator.device)
    # One reduction measures what it needs by itself; several share it.
    measured = settings.strategy == "sensitivity" and settings.sweep_reductions
    shared: dict[str, Any] = {"sensitivities": run.sensitivities} if measured else {}
    if settings.metric == "latency":
        shared["latency"] = run.latency
    return allocate_ranks(
        run.dense,
        reduction,
        **settings.where,
        metric=settings.metric,
        strategy=settings.strategy,
        mlp=request.mlp,
        layout=request.layout,
        statistics=run.statistics,
        batches=run.calibration_batches if request.measures else None,
        step=settings.rank_step,
        progress=True,
        **shared,
    )


def _gather(run: Setting) -> bool:
    """Gather and save statistics; `False` where the stage is left out."""
    if "calibrate" not in run.settings.stage_names:
        return False
    run.say(f"Stage calibrate: statistics of {run.settings.calibration_samples} images.")
    found = collect_statistics(
        run.dense.to(run.accelerator.device),
        Batches(partial(_own_batches, run)),
        **run.settings.where,
        curvature=run.settings.strategy == "curvature",
        mlp=request_of(run.settings).mlp,
        progress=True,
        accelerator=run.accelerator,
    )

    def save() -> None:
        with whole_folder(run.artefacts.statistics) as folder:
            found.save_pretrained(folder)
        run.finish("calibrate")

    on_main(run.accelerator, save)
    return True


def _initialize(run: Setting, plan: RankPlan) -> None:
    small = factorised(run, plan)
    with whole_folder(run.artefacts.initial) as folder:
        small.save_pretrained(folder)
        run.processor.save_pretrained(folder)
    run.finish("initialize")


def _own_batches(run: Setting) -> Iterator[dict[str, Tensor]]:
    """The calibration batches of this process; between two, all processes ask for signals together."""
    process, processes = run.accelerator.process_index, run.accelerator.num_processes
    with run.interruption.at_once() if processes == 1 else nullcontext():
        batches = run.calibration_batches
    for first in range(0, len(batches), processes):
        run.end_if_stopped()
        yield from batches[first : first + processes][process:][:1]


def _make_plan(run: Setting) -> RankPlan:
    settings = run.settings
    if settings.plan is not None:
        run.say(f"Stage allocate: the plan of {settings.plan}.")
        plan = given_plan(settings)
        plan.check_model(run.dense)
        return plan
    run.say(f"Stage allocate: {settings.strategy}, {settings.reduction:.0%} of the {settings.metric}.")
    if settings.strategy == "search":
        return _search(run)
    # One process decides: what each measures for itself might differ.
    return run.on_main(lambda: allocated(run, settings.reduction))


def _search(run: Setting) -> RankPlan:
    settings, accelerator = run.settings, run.accelerator
    if run.splits.search is None:
        raise CheckpointError(
            "--strategy search: expected a split of the training images to search on, found none: a data set that is "
            "streamed cannot be split. Leave --streaming out, or take another --strategy."
        )
    size = max(settings.search_batch_size // accelerator.num_processes, 1)
    loader = accelerator.prepare_data_loader(
        DataLoader(_Labelled(run.splits.search, run.preparation, run.broken), batch_size=size, shuffle=True)
    )
    path = run.artefacts.search_state
    state = SearchState.load(path) if path.is_file() else SearchState()
    # With other settings its state is not gone on from.
    on_main(accelerator, lambda: run.artefacts.begin("allocate", settings.facts("allocate", run.seed)))
    loss = make_loss(settings, alignment=0.0, without_token=False)
    return search_ranks(
        run.dense,
        _Watched(loader, state, run),
        settings.reduction,
        **settings.where,
        metric=settings.metric,
        epochs=settings.search_epochs,
        teacher=load_teacher(settings, run.dense) if loss.needs_teacher else None,
        loss=loss,
        beta=settings.search_beta,
        learning_rate=settings.search_learning_rate,
        statistics=run.statistics,
        step=settings.rank_step,
        accelerator=accelerator,
        state=state,
        seed=run.seed,
        progress=True,
    )


class _Watched:
    """The batches of a search: between two, its state is saved now and then, and at a signal."""

    def __init__(self, loader: Any, state: SearchState, run: Setting) -> None:
        self._loader, self._state, self._run = loader, state, run
        self._saved = state.step

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for batch in self._loader:
            yield batch
            signal = stopped_by(self._run.accelerator, self._run.interruption)
            due = self._state.step - self._saved >= _SAVE_SEARCH or signal is not None
            if due and self._state.step > self._saved:
                if self._run.accelerator.is_main_process:
                    self._state.save(self._run.artefacts.search_state)
                self._saved = self._state.step
            if signal is not None:
                raise Interrupted(signal)


@dataclass(frozen=True)
class _Labelled(Dataset):
    split: Split
    preparation: ImagePreparation
    broken: BrokenImages

    def __len__(self) -> int:
        return self.split.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        while True:
            try:
                image, label = self.split.read(index)
                break
            except BrokenImageError as error:
                self.broken.note(f"{self.split.name}, image {index}", str(error))
                index = (index + 1) % self.split.size
        return {"pixel_values": self.preparation.evaluate(image), "labels": torch.tensor(label)}


def _missing(run: Setting, stage: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{run.artefacts.folder}: expected {what} of an earlier run, as --stages leaves {stage} out, found none. Add "
        f"{stage} to --stages."
    )
