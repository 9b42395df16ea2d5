"""A text-to-image pipeline with adapters: loads them, lists them, and draws an image without and with them."""

import copy
import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..checks import check, finite, whole
from ..compression.clock import wait_for
from ..customization.pipelines import load_comcat_weights, unload_comcat_weights
from ..errors import CheckpointError, ComCATError, InvalidValueError, brief
from ..native import load_pipeline
from .devices import best_device
from .sources import expanded, needed, prompts_of


if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["LARGEST", "DrawSettings", "Drawing", "Studio", "adapter_name"]

LARGEST = 2048  # side of an image
_MULTIPLE = 8
_NATIVE = 512  # where the pipeline does not say
_MOST_STEPS, _MOST_SEED = 1000, 2**32 - 1
_CALLED_WITH = ("prompt", "num_inference_steps", "guidance_scale", "height", "width", "generator")


@dataclass(frozen=True)
class DrawSettings:
    """Settings of a drawing.

    Attributes:
        prompt: the caption.
        seed: seed of the noise, the same for both images.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        height, width: size of the image; by default the pipeline's own.
    """

    prompt: str
    seed: int = 0
    steps: int = 30
    guidance: float = 7.5
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Drawing:
    """Two images of one prompt and seed.

    Attributes:
        before, after: Pillow images without and with adapters.
        seconds_before, seconds_after: time to draw each image.
        blackened: the pipeline's safety checker replaced one of the images.
    """

    before: "Image"
    after: "Image"
    seconds_before: float
    seconds_after: float
    blackened: bool = False


class Studio:
    """One pipeline with its adapters.

    A copy (`copy.deepcopy`) has its own modules, adapters and scheduler over the same frozen weights: every visitor of
    the app gets one, at no cost in memory.
    """

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._source = ""
        self._adapters: dict[str, str] = {}
        self._prompts: dict[str, tuple[str, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Studio":
        models = [part for part in self._components().values() if isinstance(part, nn.Module)]
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        memo |= {id(tensor): tensor for tensor in tensors}
        other = Studio()
        other._pipeline = copy.deepcopy(self._pipeline, memo)
        other._source, other._adapters = self._source, dict(self._adapters)
        other._prompts = dict(self._prompts)
        return other

    @property
    def source(self) -> str:
        """Folder or Hub id of the pipeline; empty until one is loaded."""
        return self._source

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of loading."""
        return tuple(self._adapters)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Example prompts of the adapters' cards."""
        return tuple(dict.fromkeys(prompt for name in self._adapters for prompt in self._prompts[name]))

    def load(self, source: str) -> None:
        """Replace the pipeline and its adapters by another pipeline; on an error they stay.

        Args:
            source: folder or Hub id.

        Raises:
            CheckpointError: no pipeline could be loaded from there.
            InvalidValueError: the pipeline needs more than text, or takes no adapters.
            ComCATError: diffusers is not installed.
        """
        source = needed(source, "pipeline")
        pipeline = _read(source)
        _check_kind(pipeline, source)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline, self._source, self._adapters = pipeline, source, {}

    def add(self, name: str, source: str) -> str:
        """Load a ComCAT adapter beside the present ones.

        Args:
            name: its name in the app; empty for the last word of its source.
            source: folder or Hub id.

        Returns:
            its name.

        Raises:
            CheckpointError: there is no ComCAT adapter, or it is damaged.
            InvalidValueError: no pipeline is loaded, the name is taken, or the adapter is for another base.
        """
        pipeline, source = self._loaded(), needed(source, "adapter")
        name = name.strip() or adapter_name(source)
        if name in self._adapters:
            raise InvalidValueError(
                f"{name}: expected a name of its own for the adapter {source}, found one that {self._adapters[name]} "
                "has; choose another, or remove that adapter first."
            )
        load_comcat_weights(pipeline, expanded(source), name)
        self._adapters[name], self._prompts[name] = source, prompts_of(source)
        return name

    def remove(self, name: str) -> None:
        """Remove an adapter; after the last one the pipeline is as it was loaded.

        Args:
            name: name of the adapter.

        Raises:
            InvalidValueError: there is no adapter of that name.
        """
        self._check_names([name])
        pipeline, left = self._loaded(), [other for other in self._adapters if other != name]
        if left:
            # Removed while active, it would be deactivated with a warning.
            pipeline.set_adapters(left)
            pipeline.delete_adapters(name)
        else:
            unload_comcat_weights(pipeline)
        del self._adapters[name]

    def draw(
        self,
        settings: DrawSettings,
        scales: Mapping[str, float] | None = None,
        report: Callable[[float], None] = lambda share: None,
    ) -> Drawing:
        """Draw the same prompt and noise without and with adapters.

        Args:
            settings: prompt, seed and size.
            scales: scales by adapter name, 1 by default. An adapter at 0 is left out; with no adapter left, the second
                image is the first.
            report: called after every step with the finished share of the work.

        Returns:
            both images.

        Raises:
            InvalidValueError: nothing is loaded, or a setting or a scale cannot be used.
            ComCATError: the pipeline stops with an error.
        """
        pipeline = self._loaded()
        _check(settings)
        scales = {**dict.fromkeys(self._adapters, 1.0), **(scales or {})}
        self._check_names(scales)
        for name, scale in scales.items():
            if not finite().holds(scale):
                raise InvalidValueError(f"{name}: expected a number as its scale, found {scale!r}.")
        active = {name: float(scale) for name, scale in scales.items() if scale}
        if self._adapters:
            pipeline.disable_lora()
        try:
            images = [self._image(settings, report, (0.0, 0.5 if active else 1.0))]
        finally:
            if self._adapters:
                pipeline.enable_lora()
        if active:
            pipeline.set_adapters(list(active), list(active.values()))
            images.append(self._image(settings, report, (0.5, 1.0)))
        (before, spent, black), (after, spent_after, black_after) = images[0], images[-1]
        return Drawing(before, after, spent, spent_after, black or black_after)

    def native_size(self) -> tuple[int, int]:
        """Height and width of the pipeline's training images."""
        parts = self._components()
        config = getattr(parts.get("unet") or parts.get("transformer"), "config", None)
        # Transformers of packed latents leave it to their pipeline.
        size = getattr(config, "sample_size", None) or getattr(self._pipeline, "default_sample_size", None)
        if not size:
            return _NATIVE, _NATIVE
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        factor = getattr(self._pipeline, "vae_scale_factor", _MULTIPLE)
        return height * factor, width * factor

    def describe(self) -> str:
        """One line on the pipeline."""
        if self._pipeline is None:
            return "No pipeline is loaded."
        height, width = self.native_size()
        return f"{type(self._pipeline).__name__}, made for {width} × {height}, on {self._pipeline.device}"

    def _components(self) -> dict[str, Any]:
        return {} if self._pipeline is None else self._pipeline.components

    def _loaded(self) -> Any:
        if self._pipeline is None:
            raise InvalidValueError("Expected a pipeline, found none; load one first.")
        return self._pipeline

    def _check_names(self, names: Any) -> None:
        unknown = [name for name in names if name not in self._adapters]
        if unknown:
            raise InvalidValueError(
                f"{unknown[0]}: expected the name of an adapter of this pipeline, which has "
                f"{', '.join(self._adapters) or 'none'}; add it first."
            )

    def _image(
        self, settings: DrawSettings, report: Callable[[float], None], span: tuple[float, float]
    ) -> tuple[Any, float, bool]:
        """Draw an image; returns it, its time in seconds, and whether the safety checker replaced it."""
        pipeline, (first, last) = self._pipeline, span
        native = self.native_size()
        height, width = settings.height or native[0], settings.width or native[1]
        done = 0

        def step(pipeline: Any, index: int, timestep: Any, values: dict) -> dict:
            nonlocal done
            # Some schedulers take a step more than asked.
            done = min(done + 1, settings.steps)
            report(first + (last - first) * done / settings.steps)
            return values

        watched = "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters
        started = time.perf_counter()
        try:
            output = pipeline(
                prompt=settings.prompt,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                height=height,
                width=width,
                # On the CPU whatever draws, so that a seed means the same image on every machine.
                generator=torch.Generator("cpu").manual_seed(settings.seed),
                **({"callback_on_step_end": step} if watched else {}),
            )
        except torch.OutOfMemoryError as error:
            raise ComCATError(
                f"{self._source}: expected {pipeline.device} to hold an image of {width} × {height}, found too little "
                "memory; draw a smaller one."
            ) from error
        except (ValueError, TypeError, RuntimeError) as error:
            raise ComCATError(
                f"{self._source}: expected {type(pipeline).__name__} to draw {width} × {height} in {settings.steps} "
                f"steps, found an error ({brief(error)}); try other settings."
            ) from error
        wait_for(pipeline.device)
        flags = getattr(output, "nsfw_content_detected", None) or [False]
        return output.images[0], time.perf_counter() - started, bool(flags[0])


def adapter_name(source: str) -> str:
    """A name for an adapter from where it lies: the last word of the path, with what names may hold."""
    last = Path(source.strip()).name
    return "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in last) or "adapter"


def _read(source: str) -> Any:
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ComCATError(
            "Pipelines need diffusers, which is not installed. Install what the app needs with: "
            "pip install 'comcat_hf[app]'"
        ) from error
    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    try:
        return load_pipeline(expanded(source), dtype=dtype).to(device)
    except ComCATError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: expected a pipeline that can be drawn with on {device}, found an error "
            f"({brief(error)}). Check the path, and the memory that is free."
        ) from error


def _check_kind(pipeline: Any, source: str) -> None:
    taken = inspect.signature(type(pipeline).__call__).parameters
    missing = [name for name in _CALLED_WITH if name not in taken]
    required = [
        name
        for name, parameter in taken.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    others = [name for name in required if name not in ("self", *_CALLED_WITH)]
    if missing or others:
        found = f"does not take {', '.join(missing)}" if missing else f"needs {', '.join(others)}"
        raise InvalidValueError(
            f"{source}: expected a pipeline that draws from text, found {type(pipeline).__name__}, which {found}; "
            "load a text-to-image pipeline."
        )
    if not hasattr(pipeline, "set_adapters"):
        raise InvalidValueError(
            f"{source}: expected a pipeline that takes adapters, found {type(pipeline).__name__}, which has no "
            "set_adapters; load one that has."
        )


def _check(settings: DrawSettings) -> None:
    sides = {"height": settings.height, "width": settings.width}
    sides = {name: side for name, side in sides.items() if side is not None}
    check(settings.steps, whole(1, _MOST_STEPS), "steps")
    check(settings.seed, whole(0, _MOST_SEED), "seed")
    for name, side in sides.items():
        check(side, whole(_MULTIPLE, LARGEST), name)
        if side % _MULTIPLE:
            raise InvalidValueError(f"{name}: expected a multiple of {_MULTIPLE}, found {side}.")
    check(settings.guidance, finite(), "guidance")
