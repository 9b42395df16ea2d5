"""A run that is ready to go, and what it comes to: steps, learning rates, sizes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ...compression.budget.allocation import allocate_ranks, count_again
from ...compression.budget.latency import LatencyTable
from ...compression.budget.sensitivity import Sensitivities, measure_sensitivities
from ...compression.budget.timing import measure_latency
from ...compression.calibration.statistics import Statistics
from ...compression.counting import count_macs, count_parameters
from ...compression.request import Request
from ...configs import RankPlan
from ...errors import CheckpointError, InvalidValueError
from ...hub import readable_size
from ...modeling import apply_ranks, meta_copy
from ...modeling.layout import make_plain
from ...reporting.cards import shown_base
from ..interruption import Interruption, end_if_stopped, on_main
from .artefacts import Artefacts
from .augmentation import ImagePreparation
from .data import BrokenImages, Split, Splits
from .settings import CompressSettings
from .stream import ImageReader


__all__ = [
    "CompressPlan",
    "Setting",
    "Steps",
    "given_plan",
    "learning_rates",
    "rate_at",
    "request_of",
    "warmup_steps",
]

# The images per optimizer step that unscaled rates are for (DeiT).
_IMAGES = 512


def request_of(settings: CompressSettings) -> Request:
    """What a run asks of a compression; it has training images."""
    return Request(
        scope=settings.scope,
        metric=settings.metric,
        strategy=settings.strategy,
        mlp=settings.mlp,
        compensate=None if settings.compensate else False,
        refine=settings.refine_steps,
        layout=settings.layout,
        step=settings.rank_step,
        batches=True,
        weights_only=settings.weights_only,
    )


@dataclass(frozen=True)
class Steps:
    """How long a fine-tuning is.

    Attributes:
        total: optimizer steps.
        epoch: optimizer steps per epoch; of a stream of unknown length the whole training counts as one.
        processes: how many share a step.
    """

    total: int
    epoch: int
    processes: int


def learning_rates(settings: CompressSettings, images: int) -> tuple[float, float]:
    """The highest and the last learning rate.

    Args:
        settings: `learning_rate`, `min_learning_rate` and `scale_lr`.
        images: per optimizer step, over all processes and accumulated batches.

    Raises:
        InvalidValueError: the last is above the highest.
    """
    highest, last = settings.learning_rate, settings.min_learning_rate
    if last > highest:
        raise InvalidValueError(
            f"--min_learning_rate must be at most --learning_rate {highest:g}, got {last:g}. Give a lower one."
        )
    factor = images / _IMAGES if settings.scale_lr else 1.0
    return highest * factor, last * factor


def warmup_steps(settings: CompressSettings, steps: int) -> int:
    """How many of the steps the rate rises in.

    Raises:
        InvalidValueError: both flags are given, or the warmup takes all steps.
    """
    if settings.warmup_steps and settings.warmup_ratio:
        raise InvalidValueError(
            f"Give one of --warmup_steps and --warmup_ratio, got {settings.warmup_steps} and {settings.warmup_ratio}."
        )
    rising = settings.warmup_steps or round(settings.warmup_ratio * steps)
    if rising >= steps > 0 and rising:
        raise InvalidValueError(
            f"The warmup must end before the training, which has {steps} steps, got {rising}. Give a smaller "
            "--warmup_steps or --warmup_ratio."
        )
    return rising


def rate_at(step: int, highest: float, last: float, steps: int, rising: int = 0) -> float:
    """The rate of a step: it rises along a line and falls along half a cosine.

    Args:
        step: counted from 0; behind the end the rate is the last one.
        highest, last: rates, as [`learning_rates`] gives them.
        steps: of the whole training.
        rising: in so many of them the rate rises; the first has `highest / rising`.
    """
    if step < rising:
        return highest * (step + 1) / rising
    done = min((step - rising) / max(steps - rising, 1), 1.0)
    return last + (highest - last) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class CompressPlan:
    """The sizes of a run.

    Attributes:
        model: the dense model's class.
        plan: the ranks; `None` where none can be known yet.
        exact: whether these are the ranks that will be used, and not those of another strategy for the same share.
        parameters, macs: of the dense and the small model; MACs of one image.
        images: to train on; `None` where that is not known.
        first_step: how many of the steps a checkpoint has done.
    """

    settings: CompressSettings
    model: str
    plan: RankPlan
    exact: bool
    parameters: tuple[int, int]
    macs: tuple[int, int]
    images: int | None
    steps: Steps
    first_step: int
    seed: int

    @property
    def is_plain(self) -> bool:
        """Whether the small model is one that loads without this package."""
        return "plain" in (self.plan.layout, self.settings.layout)

    def describe(self) -> str:
        """The plan in lines of text."""
        settings = self.settings
        note = "" if self.exact else " (spread evenly; which module loses how much is chosen later)"
        if not self.exact and settings.metric == "latency":
            note = " before times are measured, which decide"
        (dense, small), (dense_macs, small_macs) = self.parameters, self.macs
        asked = f"{settings.reduction:.0%} asked, " if settings.reduction is not None else ""
        strategy = self.plan.strategy if self.exact else settings.strategy
        lines = {
            "Model": f"{shown_base(settings.model_name_or_path)} ({self.model})",
            "Plan": f"{asked}{len(self.plan.ranks)} modules, scope {settings.scope}, "
            f"{'layout plain, ' if self.is_plain else ''}strategy {strategy}",
            "Parameters": f"{dense:,} -> {small:,} ({small / dense - 1:+.1%}){note}",
            "MACs": f"{dense_macs:,} -> {small_macs:,} ({small_macs / dense_macs - 1:+.1%})",
        }
        if settings.refine_steps:
            lines["Refined"] = f"{settings.refine_steps:,} steps on {settings.calibration_samples:,} images, no labels"
        if settings.has_source:
            lines["Images"] = "unknown (streamed)" if self.images is None else f"{self.images:,}"
        if "finetune" in settings.stage_names:
            lines |= self._training()
        lines |= {"Stages": ", ".join(settings.stage_names), "Seed": str(self.seed)}
        width = max(map(len, lines))
        return "\n".join(f"{name + ':':<{width + 1}} {text}" for name, text in lines.items())

    def _training(self) -> dict[str, str]:
        settings, steps = self.settings, self.steps
        accumulated = settings.gradient_accumulation_steps
        images = settings.per_device_train_batch_size * steps.processes * accumulated
        return {
            # The factors and what is not factorised: route peft leaves the latter frozen, in the base that it keeps.
            "Trained": f"{self.parameters[1]:,} parameters, route {settings.route}",
            "Memory": f"{readable_size(self._bytes)} per process for weights, gradients, optimizer and teacher; "
            "activations come on top",
            "Steps": f"{steps.total:,} ({steps.total / steps.epoch:.2f} epochs) of "
            f"{settings.per_device_train_batch_size} images x {steps.processes} processes x {accumulated} accumulated"
            + (f", {self.first_step:,} of them done" if self.first_step else ""),
            "Rate": f"{learning_rates(settings, images)[0]:g}, cosine to {settings.min_learning_rate:g}",
        }

    @property
    def _bytes(self) -> int:
        """Of float32 weights, gradients, two moments, an average and a teacher, without activations."""
        settings, (dense, small) = self.settings, self.parameters
        taught = settings.distillation_type != "none" or settings.alignment > 0
        kept = dense if settings.route == "peft" or taught else 0
        return 4 * (kept + (4 if settings.ema_decay is None else 5) * small)


@dataclass
class Setting:
    """All that is read before the first stage.

    Attributes:
        dense: the model that is compressed, frozen, in eval mode.
        say: called on the main process with lines for the user.
        interruption: notes signals; the caller has entered it.
        checkpoint, first_step: what the fine-tuning goes on from, if anything, and the steps that it has done.
        statistics: of training images, once the stage calibrate has run; `None` where factors come from weights alone.
    """

    settings: CompressSettings
    accelerator: Accelerator
    artefacts: Artefacts
    dense: nn.Module
    processor: Any
    splits: Splits
    preparation: ImagePreparation
    broken: BrokenImages
    seed: int
    say: Callable[[str], None]
    interruption: Interruption
    checkpoint: Path | None
    first_step: int
    statistics: Statistics | None = None

    @cached_property
    def calibration_batches(self) -> list[dict[str, Tensor]]:
        """The same on every process."""
        return self.reader(self.train_split("statistics"), self.broken).calibrate()

    def reader(self, split: Split, broken: BrokenImages) -> ImageReader:
        """This process's share of a split."""
        share = self.accelerator.process_index, self.accelerator.num_processes
        return ImageReader(split, self.preparation, self.settings, broken, self.seed, *share)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Of the dense model; measured by this process alone."""
        return measure_sensitivities(
            self.dense,
            self.calibration_batches,
            **self.settings.where,
            mlp=request_of(self.settings).mlp,
            statistics=self.statistics,
            step=self.settings.rank_step,
            progress=True,
        )

    @cached_property
    def latency(self) -> LatencyTable:
        """Of the dense model with one image; measured by this process alone."""
        return measure_latency(self.dense, progress=True)

    @cached_property
    def steps(self) -> Steps:
        """How long the fine-tuning is.

        Raises:
            InvalidValueError: a stream of unknown length without `--max_train_steps`.
        """
        settings, train, processes = self.settings, self.splits.train, self.accelerator.num_processes
        most = settings.max_train_steps
        batches = 1 if train is None else self.reader(train, self.broken).batches_per_epoch
        if batches is None and most is None:
            raise InvalidValueError(
                "--streaming: expected --max_train_steps, since nobody knows how many images will come; found none."
            )
        epoch = most if batches is None else max(math.ceil(batches / settings.gradient_accumulation_steps), 1)
        return Steps(most or max(round(settings.num_train_epochs * epoch), 1), epoch, processes)

    def describe(self, plan: RankPlan | None = None) -> CompressPlan:
        """Count what the run comes to; nothing is written.

        Args:
            plan: the ranks; by default those that `--plan` or the run so far names, else ranks spread evenly.

        Raises:
            BudgetError: a reduction out of reach.
            RankPlanError: a plan that does not fit the model.
            InvalidValueError: a warmup that does not fit the steps.
        """
        settings, dense, train = self.settings, self.dense, self.splits.train
        if "finetune" in settings.stage_names:
            warmup_steps(settings, self.steps.total)
        plan = plan if plan is not None else self._known_plan()
        exact = plan is not None
        if plan is None:
            mlp = request_of(settings).mlp
            even = {**settings.where, "metric": settings.metric, "strategy": "uniform", "layout": settings.layout}
            even |= {"mlp": "width" if mlp == "mixed" else mlp, "step": settings.rank_step}
            # Nothing is timed only to be described.
            timed = settings.metric == "latency"
            plan = RankPlan({}) if timed else allocate_ranks(dense, settings.reduction, **even)
        small = meta_copy(dense)
        apply_ranks(small, plan.ranks, initialize=False)
        if "plain" in (plan.layout, settings.layout):
            make_plain(small, dense, plan.ranks)
        return CompressPlan(
            settings=settings,
            model=type(dense).__name__,
            plan=count_again(plan, dense, small) if exact else plan,
            exact=exact,
            parameters=(count_parameters(dense), count_parameters(small)),
            macs=(count_macs(dense), count_macs(small)),
            images=None if train is None else train.size,
            steps=self.steps,
            first_step=self.first_step,
            seed=self.seed,
        )

    def _known_plan(self) -> RankPlan | None:
        if self.settings.plan is not None:
            return given_plan(self.settings)
        return RankPlan.from_pretrained(self.artefacts.folder) if self.artefacts.was_done("allocate") else None

    def train_split(self, purpose: str) -> Split:
        if self.splits.train is None:
            raise CheckpointError(
                f"The data set: expected training images for {purpose}, found none. Give --train_dir, --train_file or "
                "a data set with a training split."
            )
        return self.splits.train

    def done(self, stage: str) -> bool:
        """Whether a stage need not run: finished before with these settings, or left out though its work is there.

        The main process decides for all of them: by the time that another one looks, the stage may be finished.
        """
        if stage not in self.settings.stage_names:
            return on_main(self.accelerator, lambda: self.artefacts.was_done(stage))
        facts = self.settings.facts(stage, self.seed)
        if done := on_main(self.accelerator, lambda: self.artefacts.is_done(stage, facts)):
            self.say(f"Stage {stage}: done before.")
        return done

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Run long work on the main process, where a signal ends it at once; all get what it returns."""
        return on_main(self.accelerator, work, self.interruption)

    def end_if_stopped(self) -> None:
        """Raise Interrupted if a signal has come to any process; all ask together."""
        end_if_stopped(self.accelerator, self.interruption)

    def finish(self, stage: str) -> None:
        """Note that a stage is done; on the main process."""
        self.artefacts.note(stage, self.settings.facts(stage, self.seed))


def given_plan(settings: CompressSettings) -> RankPlan:
    """The rank plan that `--plan` names."""
    return RankPlan.from_pretrained(settings.plan, cache_dir=settings.cache_dir, token=settings.token)
