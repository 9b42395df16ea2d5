"""Images made ready for a classifier: as its own image processor does it, or augmented for training.

Every draw comes from the generator that is handed in, so what an image becomes depends on its position alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidValueError, brief
from ..images import to_tensor
from ..seeds import MAX_SEED
from .settings import MAGNITUDES, CompressSettings


__all__ = ["ImagePreparation", "Mixing", "process_image"]

_RATIOS = (3 / 4, 4 / 3)
_ERASED_SHARE = (0.02, 1 / 3)
_ERASED_RATIOS = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class ImagePreparation:
    """Pillow images in, model inputs out.

    Attributes:
        processor: the model's image processor.
        settings: how training images are augmented.
        scale, offset: `(3, 1, 1)` each; a pixel `x` between 0 and 1 enters the model as `x * scale + offset`.
        channels: which channel of the image each channel of the input is.
        coloring: what is done to pixels between 0 and 1, one after the other; `(1, 3, H, W)` in and out.
        erasing: what is done to the finished input.
    """

    processor: Any
    settings: CompressSettings
    size: tuple[int, int]
    scale: Tensor
    offset: Tensor
    channels: tuple[int, ...]
    coloring: tuple[nn.Module, ...]
    erasing: tuple[nn.Module, ...]

    @classmethod
    def of(cls, settings: CompressSettings, image_processor: Any) -> "ImagePreparation":
        """What the settings ask for, with the sizes and the normalisation of the model's image processor.

        Raises:
            InvalidValueError: the processor's inputs have another form, or an augmentation needs kornia, which is
                not installed.
        """
        probed = _probe(image_processor)
        return cls(image_processor, settings, *probed, _modules(settings, _COLORING), _modules(settings, _ERASING))

    def evaluate(self, image: Any) -> Tensor:
        """What the image processor makes of a Pillow image in RGB: `(3, H, W)`, float32."""
        return process_image(self.processor, image)[0].to(torch.float32)

    def restore(self, inputs: Tensor) -> Tensor:
        """Pixels between 0 and 1 of a model's input `(3, H, W)`, in the order of the image's channels."""
        return inputs.sub(self.offset).div_(self.scale).clamp_(0, 1)[torch.tensor(self.channels).argsort()]

    def check(self, model: nn.Module, source: str) -> None:
        """See whether a model takes these inputs.

        Raises:
            InvalidValueError: it does not.
        """
        pixels = torch.zeros(1, 3, *self.size, device=next(model.parameters()).device)
        try:
            with torch.no_grad():
                model(pixel_values=pixels)
        except (ValueError, RuntimeError, TypeError) as error:
            raise InvalidValueError(
                f"{source}: expected a model that takes what {type(self.processor).__name__} makes, images of "
                f"{tuple(pixels.shape[1:])}, found an error "
                f"({brief(error)}). Save the processor that the model was trained with beside it."
            ) from error

    def train(self, image: Any, generator: torch.Generator) -> Tensor:
        """Augment a Pillow image in RGB.

        Args:
            image: any size.
            generator: where all draws come from; as many are made for every image.

        Returns:
            `(3, H, W)`, float32.
        """
        flip, first, second = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        cropped = self.settings.random_resized_crop_scale < 1
        if cropped:
            pixels = to_tensor(self._crop(image, generator))
        else:
            pixels = self.restore(self.evaluate(image)) if self.coloring else self.evaluate(image)
        if flip < self.settings.horizontal_flip:
            pixels = pixels.flip(-1)
        pixels = _apply_seeded(self.coloring, pixels, int(first * MAX_SEED))
        if cropped or self.coloring:
            pixels = pixels[list(self.channels)].mul_(self.scale).add_(self.offset)
        return _apply_seeded(self.erasing, pixels, int(second * MAX_SEED)).contiguous()

    def _crop(self, image: Any, generator: torch.Generator) -> Any:
        from PIL import Image

        resample = getattr(self.processor, "resample", None)
        if resample not in set(Image.Resampling):
            resample = Image.Resampling.BILINEAR
        box = _crop_box(image.size, self.settings.random_resized_crop_scale, generator)
        return image.resize(self.size[::-1], resample=resample, box=box)


@dataclass(frozen=True)
class Mixing:
    """Mixup, CutMix and label smoothing of a batch.

    The partner of an image is the one as far from the batch's end as it is from its start; the share is drawn once
    per batch. The batch is that of one process: with other sizes and numbers of processes others are mixed. kornia's
    RandomMixUpV2 draws shares evenly, not from the beta distribution that the recipes of these models name, and its
    RandomCutMixV2 keeps rectangles inside the image, where the recipes cut them off at its edge, so this is torch.
    """

    settings: CompressSettings
    classes: int

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed at all."""
        settings = self.settings
        return settings.mixup_prob > 0 and (settings.mixup_alpha > 0 or settings.cutmix_alpha > 0)

    def __call__(
        self, pixel_values: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            generator: where the draws come from; not needed where nothing mixes.

        Returns:
            the pixels, and as targets the labels where nothing mixes or smooths, else probabilities `(B, classes)`.
        """
        settings = self.settings
        if not self.mixes and not settings.label_smoothing:
            return pixel_values, labels
        rest = settings.label_smoothing / self.classes
        targets = torch.full((len(labels), self.classes), rest, device=labels.device)
        targets.scatter_(1, labels[:, None], 1 - settings.label_smoothing + rest)
        if not self.mixes:
            return pixel_values, targets
        mix, switch, seed = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
        if mix >= settings.mixup_prob:
            return pixel_values, targets
        mixup, cutmix = settings.mixup_alpha, settings.cutmix_alpha
        cut = cutmix > 0 and (mixup == 0 or switch < settings.mixup_switch_prob)
        share = _beta(cutmix if cut else mixup, int(seed * MAX_SEED))
        if cut:
            pixel_values, share = _cut(pixel_values, share, generator)
        else:
            pixel_values = pixel_values.lerp(pixel_values.flip(0), 1 - share)
        return pixel_values, targets.lerp(targets.flip(0), 1 - share)


def process_image(processor: Any, image: Any) -> Tensor:
    """What an image processor makes of a Pillow image in RGB: `(1, 3, H, W)`.

    Raises:
        InvalidValueError: it does not take images in RGB, such as one for images of one channel.
    """
    try:
        return processor(image, return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise InvalidValueError(
            f"{type(processor).__name__}: expected an image processor for images in RGB, found one that does not take "
            f"them ({brief(error)}). Give a model for RGB images, with its own image processor."
        ) from error


def _probe(processor: Any) -> tuple[tuple[int, int], Tensor, Tensor, tuple[int, ...]]:
    """Size, scale, offset and order of channels, found by plain images: processors name them in many ways."""
    from PIL import Image

    # Of different shapes, for some processors keep them.
    colors = {(0, 0, 0): (64, 64), (255, 255, 255): (64, 96), (51, 51, 51): (96, 64), (0, 102, 204): (64, 64)}
    inputs = [process_image(processor, Image.new("RGB", size, color))[0].float() for color, size in colors.items()]
    shapes = sorted({tuple(found.shape) for found in inputs})
    if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][0] != 3:
        raise InvalidValueError(
            f"{type(processor).__name__}: expected inputs of one shape (3, height, width), found "
            f"{' and '.join(map(str, shapes))}. Give a model for RGB images, and a processor that brings them to one "
            "size (size with height and width, or crop_size)."
        )
    height, width = shapes[0][1:]
    black, white, grey, ramp = (found[:, height // 2, width // 2] for found in inputs)
    scale = white - black
    if not bool((scale > 0).all()) or not torch.allclose(grey, black + 0.2 * scale, atol=1e-3):
        raise InvalidValueError(
            f"{type(processor).__name__}: expected inputs that grow with the pixels in a straight line, found others. "
            "Give a model with an image processor that rescales and normalises."
        )
    channels = tuple(((ramp - black) / scale / 0.4).round().long().tolist())
    return (height, width), scale.view(3, 1, 1), black.view(3, 1, 1), channels


def _crop_box(size: tuple[int, int], least: float, generator: torch.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop of some share of the area and some shape, as far as it fits."""
    width, height = size
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for share, shape, x, y in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
        area = width * height * (least + (1 - least) * share)
        ratio = math.exp(low + (high - low) * shape)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = math.floor(x * (width - across + 1)), math.floor(y * (height - down + 1))
            return left, top, left + across, top + down
    # The middle, in the nearest shape that is allowed.
    across = min(width, round(height * _RATIOS[1]))
    down = min(height, round(width / _RATIOS[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _color_jitter(settings: CompressSettings, kornia: Any) -> nn.Module:
    # Factors from 1 - strength to 1 + strength; kornia takes brightness up to 2 only.
    strength = min(settings.color_jitter, 1.0)
    return kornia.ColorJitter(strength, strength, strength, 0.0, p=1.0)


def _rand_augment(settings: CompressSettings, kornia: Any) -> nn.Module:
    # Both ends are left out there.
    magnitude = min(max(settings.rand_augment_magnitude, 1e-3), MAGNITUDES - 1e-3)
    try:
        return kornia.auto.RandAugment(settings.rand_augment_num_ops, magnitude, transformation_matrix_mode="skip")
    except ValueError as error:
        raise InvalidValueError(
            f"--rand_augment_num_ops {settings.rand_augment_num_ops}: kornia refuses it ({brief(error)}). Give fewer."
        ) from error


def _random_erasing(settings: CompressSettings, kornia: Any) -> nn.Module:
    # After the normalisation, where 0 is the mean colour.
    return kornia.RandomErasing(scale=_ERASED_SHARE, ratio=_ERASED_RATIOS, value=0.0, p=settings.random_erasing)


# By the flag that is 0 where they are left out.
_Makers = Mapping[str, Callable[[CompressSettings, Any], nn.Module]]
_COLORING: _Makers = {"rand_augment_num_ops": _rand_augment, "color_jitter": _color_jitter}
_ERASING: _Makers = {"random_erasing": _random_erasing}


def _modules(settings: CompressSettings, makers: _Makers) -> tuple[nn.Module, ...]:
    asked = [flag for flag in makers if getattr(settings, flag) > 0]
    if not asked:
        return ()
    try:
        import kornia.augmentation
    except ImportError as error:
        raise InvalidValueError(
            f"--{asked[0]} needs the package kornia, which cannot be imported ({brief(error)}). Run `pip install "
            f"comcat_hf[train]`, or leave the flag at 0."
        ) from error
    return tuple(makers[flag](settings, kornia.augmentation) for flag in asked)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """A state of its own for what draws from the global generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        # Not `torch.manual_seed`, which would seed the accelerators as well.
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def _apply_seeded(modules: tuple[nn.Module, ...], pixels: Tensor, seed: int) -> Tensor:
    batch = pixels[None]
    with _drawing(seed) if modules else nullcontext():
        for module in modules:
            batch = module(batch)
    return batch[0]


def _beta(alpha: float, seed: int) -> float:
    with _drawing(seed):
        return float(torch.distributions.Beta(alpha, alpha).sample())


def _cut(pixel_values: Tensor, share: float, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Put a rectangle of the partners into the images; the share that stays, and follows from its true size."""
    height, width = pixel_values.shape[-2:]
    side = math.sqrt(1 - share)
    x, y = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    middle, half_across, half_down = (int(x * width), int(y * height)), int(width * side) // 2, int(height * side) // 2
    left, right = max(middle[0] - half_across, 0), min(middle[0] + half_across, width)
    top, bottom = max(middle[1] - half_down, 0), min(middle[1] + half_down, height)
    mixed = pixel_values.clone()
    mixed[..., top:bottom, left:right] = pixel_values.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (right - left) * (bottom - top) / (height * width)
