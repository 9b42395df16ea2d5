"""What a training comes to: counted before it starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...hub import readable_size
from ...reporting.cards import shown_base
from .settings import CustomizeSettings


__all__ = ["CustomizePlan"]


@dataclass(frozen=True)
class CustomizePlan:
    """The sizes of a training.

    Attributes:
        parameters: trained parameters by part.
        base_parameters: of the parts that are adapted.
        images, class_images: of the subject; of the class, that are there.
        positions: images of the subject per epoch, with those that fill up the batches of each bucket.
        first_step: how many of them a checkpoint has done.
    """

    settings: CustomizeSettings
    pipeline: str
    base_dtype: str
    parameters: Mapping[str, int]
    base_parameters: int
    images: int
    class_images: int
    positions: int
    processes: int
    first_step: int
    seed: int

    def describe(self) -> str:
        """The plan in lines of text."""
        settings, total = self.settings, sum(self.parameters.values())
        kind = "core matrices" if settings.core else "full factors"
        gains = [f", {name}" for name in ("gains", "head_gains") if getattr(settings, name)]
        base = shown_base(settings.pretrained_model_name_or_path)
        lines = {
            "Pipeline": f"{base} ({self.pipeline}), base in {self.base_dtype}",
            "Adapter": f"{kind}, rank {settings.qk_rank or 'none'} for query/key, "
            f"{settings.vo_rank or 'none'} for value/output{''.join(gains)}",
            "Parameters": f"{total:,} trained ({total / self.base_parameters:.3%} of the adapted parts): "
            + ", ".join(f"{name} {count:,}" for name, count in self.parameters.items()),
            "Bytes": f"{4 * total:,} ({readable_size(4 * total)}) in float32",
            "Images": f"{self.images} of the subject" + self._describe_class(),
            "Steps": f"{self.steps:,} of {settings.train_batch_size} images x {self.processes} processes x "
            f"{settings.gradient_accumulation_steps} accumulated"
            + (f", {self.first_step:,} of them done" if self.first_step else ""),
            "Rate": f"{self.learning_rate:g}, {settings.lr_scheduler}, {settings.lr_warmup_steps} steps of warm-up",
            "Seed": str(self.seed),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name + ':':<{width + 1}} {text}" for name, text in lines.items())

    def _describe_class(self) -> str:
        if not self.settings.with_prior_preservation:
            return ""
        missing = self.settings.num_class_images - self.class_images
        return f", {self.class_images} of the class" + (f", {missing} more are generated" if missing > 0 else "")

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        settings = self.settings
        length = max(self.positions, settings.num_class_images if settings.with_prior_preservation else 0)
        return settings.max_train_steps or settings.num_train_epochs * math.ceil(length / self._together)

    @property
    def learning_rate(self) -> float:
        """The highest rate, scaled if that was asked."""
        return self.settings.learning_rate * (self._together if self.settings.scale_lr else 1)

    @property
    def _together(self) -> int:
        """Images of the subject per optimizer step."""
        return self.settings.train_batch_size * self.processes * self.settings.gradient_accumulation_steps
