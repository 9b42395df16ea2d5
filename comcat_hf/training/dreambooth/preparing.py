"""What a training needs before its first step: processes, pipeline, adapter, class images, sources of batches."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from torch import nn

from ...errors import InvalidValueError
from .. import machine
from ..checkpoints import Progress
from ..flags import values_deciding
from ..interruption import Interruption, end_if_stopped, on_main, until_stopped
from ..locks import locked
from .data import Example, class_examples, digest
from .families import Family, load_pipeline
from .planning import CustomizePlan
from .sampling import generate_class_images
from .settings import CustomizeSettings
from .sources import Latents, Texts, cache_latents, cache_texts, warn_of_long_prompts
from .stream import ExampleStream


__all__ = [
    "DTYPES",
    "PreparedRun",
    "add_adapters",
    "gathered",
    "make_accelerator",
    "make_sources",
    "modules",
    "with_class_images",
]

DTYPES = {"fp32": torch.float32, "no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PROCESSES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)


@dataclass(frozen=True)
class PreparedRun:
    """All that is read before something is written.

    Attributes:
        images, classes: the examples of the subject and of its class.
        checkpoint, done: what the training goes on from, if anything.
    """

    settings: CustomizeSettings
    accelerator: Accelerator
    pipeline: Any
    family: Family
    parts: Mapping[str, nn.Module]
    images: tuple[Example, ...]
    classes: tuple[Example, ...]
    seed: int
    checkpoint: Path | None
    done: Progress | None

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return getattr(self.pipeline, self.family.denoiser)

    def plan(self) -> CustomizePlan:
        """What the training comes to."""
        counts = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in self.parts.items()}
        everything = sum(p.numel() for model in self.parts.values() for p in model.parameters())
        return CustomizePlan(
            settings=self.settings,
            pipeline=type(self.pipeline).__name__,
            base_dtype=str(self.denoiser.dtype).removeprefix("torch."),
            parameters=counts,
            base_parameters=everything - sum(counts.values()),
            images=len(self.images),
            class_images=len(self.classes),
            positions=len(self.stream(())) if self.settings.buckets else len(self.images),
            processes=self.accelerator.num_processes,
            first_step=0 if self.done is None else self.done.step,
            seed=self.seed,
        )

    def stream(self, classes: tuple[Example, ...]) -> ExampleStream:
        """The stream of examples of the subject, and of its class if there are any."""
        together = self.settings.train_batch_size * self.accelerator.num_processes
        return ExampleStream(self.images, classes, self.seed, self.settings, together)

    def facts(self, steps: int) -> dict[str, Any]:
        """What a continuation must share with this training to be exact."""
        facts = values_deciding(self.settings, "finetune")
        # It counts in the number of steps.
        del facts["num_train_epochs"]
        return facts | {
            "seed": self.seed,
            "max_train_steps": steps,
            "num_processes": self.accelerator.num_processes,
            "mixed_precision": self.accelerator.mixed_precision,
            "images": digest(self.images),
            "class_images": digest(self.classes),
        }


def make_sources(prepared: PreparedRun, interruption: Interruption) -> tuple[ExampleStream, Latents, Texts]:
    """The stream of examples, and how these become latents and texts; raises Interrupted where a signal comes."""
    settings, pipeline, device = prepared.settings, prepared.pipeline, prepared.accelerator.device
    stream = prepared.stream(prepared.classes)
    latents = Latents(pipeline.vae, device)
    texts = Texts(pipeline, prepared.family, device, settings.train_text_encoder)
    prompts = [example.prompt for example in (*prepared.images, *prepared.classes)]
    if prepared.accelerator.is_main_process:
        warn_of_long_prompts(prompts, pipeline, prepared.family)
    if settings.caption_dropout:
        prompts.append("")
    if settings.cache_latents:
        watch = partial(until_stopped, accelerator=prepared.accelerator, interruption=interruption)
        latents = cache_latents(stream, latents, watch)
        pipeline.vae.to("cpu")
        if not settings.train_text_encoder:
            texts = cache_texts(prompts, texts, watch)
            for name in prepared.family.encoders:
                getattr(pipeline, name).to("cpu")
    return stream, latents, texts


def add_adapters(settings: CustomizeSettings, pipeline: Any, family: Family, seed: int) -> dict[str, nn.Module]:
    """Put the adapter into all parts that are trained; returns these by name."""
    # The initial factors are random, and the same on every process.
    set_seed(seed % 2**32)
    names = (family.denoiser, *(family.encoders if settings.train_text_encoder else ()))
    parts = {name: getattr(pipeline, name) for name in names}
    for model in parts.values():
        model.add_adapter(settings.adapter_config(), adapter_name=settings.adapter_name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return parts


def with_class_images(prepared: PreparedRun, interruption: Interruption) -> PreparedRun:
    """Draw the class images that are missing, and read all of them.

    Raises:
        Interrupted: a signal came; images that were drawn are kept.
        InvalidValueError: another run is drawing into the same folder.
    """
    settings, accelerator = prepared.settings, prepared.accelerator
    folder = settings.class_folder
    # The main process counts for all: another run may be drawing into the folder.
    if on_main(accelerator, lambda: len(prepared.classes) >= settings.num_class_images):
        return prepared
    with ExitStack() as stack:
        if folder.resolve() != settings.output_path.resolve():
            on_main(accelerator, lambda: stack.enter_context(locked(folder, "class_data_dir")))
        # Another run may have drawn some in the meantime.
        missing = range(on_main(accelerator, lambda: len(class_examples(settings))), settings.num_class_images)
        _draw_class_images(prepared, missing, interruption)
    end_if_stopped(accelerator, interruption)
    return replace(prepared, classes=tuple(class_examples(settings)))


def _draw_class_images(prepared: PreparedRun, missing: range, interruption: Interruption) -> None:
    settings, accelerator, pipeline = prepared.settings, prepared.accelerator, prepared.pipeline
    asked = settings.prior_generation_precision
    if asked is not None and DTYPES[asked] != prepared.denoiser.dtype:
        pipeline, _ = load_pipeline(settings, DTYPES[asked])
        for model in modules(pipeline):
            model.to(accelerator.device)
    generate_class_images(
        pipeline,
        settings,
        prepared.seed,
        missing[accelerator.process_index :: accelerator.num_processes],
        lambda: interruption.requested is not None,
        accelerator.is_main_process,
    )
    accelerator.wait_for_everyone()


def make_accelerator(settings: CustomizeSettings) -> Accelerator:
    """The processes and devices that train.

    Raises:
        InvalidValueError: the machine or the accelerate configuration does not suit the training.
    """
    # The first text encoder of SDXL is read before its last layer, which so gets no gradient.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=settings.train_text_encoder)
    accelerator = machine.make_accelerator(settings, [parallel])
    if accelerator.distributed_type not in _PROCESSES:
        raise InvalidValueError(
            f"The accelerate configuration: expected one process, or several that each hold the model, found "
            f"{accelerator.distributed_type.value}. Adapters need no sharding; run `accelerate config` for plain "
            "multi-GPU training."
        )
    if accelerator.mixed_precision not in DTYPES:
        raise InvalidValueError(
            f"The accelerate configuration: expected mixed precision no, fp16 or bf16, found "
            f"{accelerator.mixed_precision}. Give --mixed_precision."
        )
    return accelerator


def modules(pipeline: Any) -> list[nn.Module]:
    """The models of a pipeline."""
    return [part for part in pipeline.components.values() if isinstance(part, nn.Module)]


@contextmanager
def gathered(pipeline: Any, device: torch.device) -> Iterator[None]:
    """All parts of a pipeline on one device; those that were elsewhere go back."""
    before = {model: next(model.parameters()).device for model in modules(pipeline)}
    for model in before:
        model.to(device)
    try:
        yield
    finally:
        for model, place in before.items():
            model.to(place)
