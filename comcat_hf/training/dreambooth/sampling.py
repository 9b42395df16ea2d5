"""Images from a pipeline: of the class before the training, for validation during it."""

import io
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ...hub import write_bytes_atomic
from ...modeling import eval_mode
from ...reporting.plots import plot_image_grid
from ..images import to_tensor
from ..seeds import seeded
from .data import DRAWN_FOR
from .settings import CustomizeSettings
from .sources import from_latents


__all__ = ["BEFORE_AFTER", "compare", "generate", "generate_class_images", "validate"]

BEFORE_AFTER = "before_after.png"
_COMPARED = 4  # images that are shown side by side


@torch.no_grad()
def generate(
    pipeline: Any, prompts: Sequence[str], generators: Sequence[torch.Generator], settings: CustomizeSettings
) -> list[Any]:
    """Draw images.

    Args:
        prompts, generators: one per image.
        settings: their resolution, and the number of denoising steps.

    Returns:
        Pillow images.
    """
    size, vae = settings.resolution, pipeline.vae
    pipeline.set_progress_bar_config(disable=True)
    draw = partial(
        pipeline,
        prompt=list(prompts),
        generator=list(generators),
        height=size,
        width=size,
        num_inference_steps=settings.num_inference_steps,
    )
    if not hasattr(pipeline, "unet"):
        return draw(output_type="pil").images
    latents = draw(output_type="latent").images
    # Not by the pipeline, which cannot where the autoencoder alone is in float32.
    decoded = vae.decode(from_latents(vae, latents.float()).to(vae.dtype)).sample
    return pipeline.image_processor.postprocess(decoded.float(), output_type="pil")


def generate_class_images(
    pipeline: Any,
    settings: CustomizeSettings,
    seed: int,
    numbers: Sequence[int],
    stopping: Callable[[], bool],
    progress: bool,
) -> None:
    """Draw images of the class into its folder.

    Args:
        pipeline: without adapters.
        settings: prompt and folder.
        seed: of the run.
        numbers: of the images, which their noise and their names depend on.
        stopping: asked between batches whether to leave off.
        progress: show a bar.
    """
    folder = settings.class_folder
    with tqdm(total=len(numbers), desc="Class images", unit="image", disable=not progress) as bar:
        for start in range(0, len(numbers), settings.sample_batch_size):
            if stopping():
                return
            batch = numbers[start : start + settings.sample_batch_size]
            generators = [seeded(seed, "prior", number) for number in batch]
            images = generate(pipeline, [settings.class_prompt] * len(batch), generators, settings)
            for number, image in zip(batch, images, strict=True):
                # Not over an image that was there before.
                _write(image, folder / f"class-{number:05d}-{uuid.uuid4().hex[:8]}.png", settings.class_prompt)
            bar.update(len(batch))


def validate(
    pipeline: Any, denoiser: nn.Module, settings: CustomizeSettings, seed: int, step: int, trackers: Sequence[Any]
) -> list[Any]:
    """Draw the validation prompt into a grid, and hand the images to the trackers.

    Args:
        denoiser: what is in training.
        seed: of the run; every validation starts from the same noise.
        step: of the training.

    Returns:
        the images.
    """
    from diffusers.utils import make_image_grid
    from PIL import Image

    with eval_mode(denoiser):
        images = _draw(pipeline, settings, seed)
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    blank = Image.new("RGB", images[0].size)
    grid = make_image_grid(images + [blank] * (rows * columns - len(images)), rows, columns)
    _write(grid, settings.output_path / "validation" / f"step-{step:06d}.png")
    for tracker in trackers:
        if hasattr(tracker, "log_images"):
            tracker.log_images({"validation": images}, step=step)
    return images


def compare(
    pipeline: Any, denoiser: nn.Module, settings: CustomizeSettings, seed: int, after: Sequence[Any]
) -> Path | None:
    """Draw the validation prompt without the adapter, and put these images above those with it.

    Args:
        denoiser: what is in training.
        seed: of the run; the noise is that of the validation.
        after: what [`validate`] drew.

    Returns:
        the picture; `None` where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return None
    with eval_mode(denoiser), _without_adapters(pipeline):
        before = _draw(pipeline, settings, seed)
    rows = {"before": before, "after": after}
    shown = {name: torch.stack([to_tensor(image) for image in images[:_COMPARED]]) for name, images in rows.items()}
    columns = [str(number + 1) for number in range(len(shown["before"]))]
    path = settings.output_path / BEFORE_AFTER
    return plot_image_grid(shown, path, columns=columns, title=settings.validation_prompt, size=1.8)


def _draw(pipeline: Any, settings: CustomizeSettings, seed: int) -> list[Any]:
    generators = [seeded(seed, "validation", number) for number in range(settings.num_validation_images)]
    images = []
    for start in range(0, len(generators), settings.sample_batch_size):
        batch = generators[start : start + settings.sample_batch_size]
        images += generate(pipeline, [settings.validation_prompt] * len(batch), batch, settings)
    return images


@contextmanager
def _without_adapters(pipeline: Any) -> Iterator[None]:
    adapted = [model for model in pipeline.components.values() if getattr(model, "_hf_peft_config_loaded", False)]
    for model in adapted:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in adapted:
            model.enable_adapters()


def _write(image: Any, path: Path, class_prompt: str | None = None) -> Path:
    from PIL.PngImagePlugin import PngInfo

    payload, notes = io.BytesIO(), PngInfo()
    if class_prompt is not None:
        notes.add_itxt(DRAWN_FOR, class_prompt)
    image.save(payload, format="png", pnginfo=notes)
    return write_bytes_atomic(path, payload.getvalue())
