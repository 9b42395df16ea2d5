"""What a run comes to, counted before it is trained: steps, learning rates, sizes."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...compression.budget.allocation import allocate_ranks, count_again
from ...compression.counting import count_macs, count_parameters
from ...compression.request import Request
from ...configs import RankPlan
from ...errors import InvalidValueError
from ...hub import readable_size
from ...modeling import apply_ranks, meta_copy
from ...modeling.layout import make_plain
from ...reporting.cards import shown_base
from .artefacts import Artefacts
from .settings import CompressSettings


__all__ = [
    "CompressPlan",
    "Steps",
    "describe_run",
    "given_plan",
    "learning_rates",
    "plan_steps",
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


def plan_steps(settings: CompressSettings, batches: int | None, processes: int) -> Steps:
    """Count the steps of a fine-tuning.

    Raises:
        InvalidValueError: a stream of unknown length without `--max_train_steps`.
    """
    if batches is None:
        if settings.max_train_steps is None:
            raise InvalidValueError(
                "--streaming: expected --max_train_steps, since nobody knows how many images will come; found none."
            )
        return Steps(settings.max_train_steps, settings.max_train_steps, processes)
    epoch = max(math.ceil(batches / settings.gradient_accumulation_steps), 1)
    return Steps(settings.max_train_steps or max(round(settings.num_train_epochs * epoch), 1), epoch, processes)


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


def describe_run(
    settings: CompressSettings,
    dense: nn.Module,
    artefacts: Artefacts,
    plan: RankPlan | None = None,
    **known: Any,
) -> CompressPlan:
    """Count what a run comes to; nothing is written.

    Args:
        artefacts: of the run so far; a plan that is there is used.
        plan: the ranks, where these are known.
        **known: further fields of [`CompressPlan`].

    Raises:
        BudgetError: a reduction out of reach.
        RankPlanError: a plan that does not fit the model.
    """
    plan = plan if plan is not None else _known_plan(settings, artefacts)
    exact = plan is not None
    if plan is None:
        mlp = request_of(settings).mlp
        even = {**settings.where, "metric": settings.metric, "strategy": "uniform", "layout": settings.layout}
        even["mlp"] = "width" if mlp == "mixed" else mlp
        # Nothing is timed only to be described.
        timed = settings.metric == "latency"
        plan = RankPlan({}) if timed else allocate_ranks(dense, settings.reduction, step=settings.rank_step, **even)
    small = meta_copy(dense)
    apply_ranks(small, plan.ranks, initialize=False)
    if "plain" in (plan.layout, settings.layout):
        make_plain(small, dense, plan.ranks)
    if exact:
        plan = count_again(plan, dense, small)
    parameters = count_parameters(dense), count_parameters(small)
    macs = count_macs(dense), count_macs(small)
    return CompressPlan(settings, type(dense).__name__, plan, exact, parameters, macs, **known)


def given_plan(settings: CompressSettings) -> RankPlan:
    """The rank plan that `--plan` names."""
    return RankPlan.from_pretrained(settings.plan, cache_dir=settings.cache_dir, token=settings.token)


def _known_plan(settings: CompressSettings, artefacts: Artefacts) -> RankPlan | None:
    if settings.plan is not None:
        return given_plan(settings)
    return RankPlan.from_pretrained(artefacts.folder) if artefacts.was_done("allocate") else None
