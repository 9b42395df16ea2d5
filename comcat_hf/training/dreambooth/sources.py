"""Latents and texts of a batch, computed when it is needed or kept from before the training."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .families import Family, Text, to_device
from .stream import ExampleStream


__all__ = ["Latents", "Texts", "cache_latents", "cache_texts", "from_latents", "to_latents"]

logger = logging.getLogger(__name__)

Item = Mapping[str, Any]
Watch = Callable[[Iterable[Any]], Iterable[Any]]

# Which image, and whether it is mirrored.
Place = tuple[str, int, bool]


@dataclass(frozen=True)
class _Kept:
    """What the autoencoder says about an image: means and deviations of its latents."""

    mean: Tensor
    deviation: Tensor
    time_ids: tuple[int, ...]


@dataclass(frozen=True)
class Latents:
    """From items of the stream to latents.

    Attributes:
        kept: what [`cache_latents`] made, or `None`: images are encoded as they come.
    """

    vae: Any
    device: torch.device
    kept: Mapping[Place, _Kept] | None = None

    @torch.no_grad()
    def __call__(self, items: Sequence[Item], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and time ids.

        Args:
            generator: which of the latents that an image may have are drawn from it.
        """
        if self.kept is None:
            pixels = torch.stack([item["image"].pixels for item in items])
            mean, deviation = _encode(self.vae, pixels.to(self.device))
            ids = [item["image"].time_ids for item in items]
        else:
            found = [self.kept[_place(item)] for item in items]
            mean = torch.stack([kept.mean for kept in found]).to(self.device)
            deviation = torch.stack([kept.deviation for kept in found]).to(self.device)
            ids = [kept.time_ids for kept in found]
        drawn = torch.randn(mean.shape, generator=generator).to(self.device)
        return to_latents(self.vae, mean + deviation * drawn), torch.tensor(ids, device=self.device)


@dataclass(frozen=True)
class Texts:
    """From prompts to what [`Denoiser`] takes.

    Attributes:
        pipeline, family: what reads them.
        trained: whether the text encoders are trained, so that the denoiser reads tokens.
        kept: what [`cache_texts`] made, or `None`.
    """

    pipeline: Any
    family: Family
    device: torch.device
    trained: bool
    kept: Mapping[str, Text] | None = None

    def __call__(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the denoiser for some prompts."""
        if self.kept is not None:
            found = [self.kept[prompt] for prompt in prompts]
            return {"text": {name: _padded([f[name] for f in found]).to(self.device) for name in found[0]}}
        if self.trained:
            tokens = self.family.tokenize(self.pipeline, prompts)  # type: ignore[union-attr]
            return {"tokens": to_device(tokens, self.device)}
        return {"text": self.family.texts(self.pipeline, prompts, self.device)}


def cache_latents(stream: ExampleStream, latents: Latents, watch: Watch) -> Latents:
    """Encode every image of a stream, and its mirror image where images are mirrored."""
    kept = {}
    flips = (False, True) if stream.settings.random_flip else (False,)
    for kind, examples in {"instance": stream.instances, "class": stream.classes}.items():
        for index in watch(range(len(examples))):
            for flip in flips:
                image = stream.prepare(kind, index, flip)
                mean, deviation = _encode(latents.vae, image.pixels[None].to(latents.device))
                kept[kind, index, flip] = _Kept(mean[0].cpu(), deviation[0].cpu(), image.time_ids)
    return Latents(latents.vae, latents.device, kept)


def cache_texts(prompts: Iterable[str], texts: Texts, watch: Watch) -> Texts:
    """Encode prompts once."""
    kept = {}
    for prompt in watch(dict.fromkeys(prompts)):
        kept[prompt] = {name: value[0].cpu() for name, value in texts([prompt])["text"].items()}
    return Texts(texts.pipeline, texts.family, texts.device, texts.trained, kept)


def warn_of_long_prompts(prompts: Iterable[str], pipeline: Any, family: Family) -> None:
    """Say which prompts are longer than the text encoders can read."""
    for prompt in dict.fromkeys(prompts) if family.tokenizers else ():
        tokenizer = getattr(pipeline, family.tokenizers[0])
        if (count := len(tokenizer(prompt, verbose=False).input_ids)) > tokenizer.model_max_length:
            logger.warning(
                "The prompt %r has %d tokens, of which the text encoder reads %d; the rest is cut off.",
                prompt,
                count,
                tokenizer.model_max_length,
            )


def to_latents(vae: Any, encoded: Tensor) -> Tensor:
    """From the autoencoder's numbers to those that the UNet or transformer works on."""
    if hasattr(vae, "bn"):
        # FLUX.2: two by two numbers become channels, each with statistics of its own.
        patches, norm = F.pixel_unshuffle(encoded, 2), vae.bn
        variance = norm.running_var.view(1, -1, 1, 1).float() + vae.config.batch_norm_eps
        return (patches - norm.running_mean.view(1, -1, 1, 1).float()) / variance.sqrt()
    mean, deviation, scale = _statistics(vae, encoded)
    return (encoded - mean) * (scale / deviation)


def from_latents(vae: Any, latents: Tensor) -> Tensor:
    """Undo [`to_latents`] for a pipeline with a UNet."""
    mean, deviation, scale = _statistics(vae, latents)
    return latents * (deviation / scale) + mean


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor, float]:
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    found = (getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None))
    # Qwen-Image's has no scaling_factor beside them.
    scale = getattr(vae.config, "scaling_factor", 1.0)
    mean, deviation = (
        default if value is None else value for value, default in zip(found, ([shift], [1.0]), strict=True)
    )
    mean, deviation = (torch.tensor(value, device=like.device).view(1, -1, 1, 1) for value in (mean, deviation))
    return mean, deviation, scale


@torch.no_grad()
def _encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    pixels = pixels.to(vae.dtype)
    if hasattr(vae.config, "temperal_downsample"):
        # An autoencoder of videos, of one frame here.
        found = vae.encode(pixels[:, :, None]).latent_dist
        return found.mean[:, :, 0].float(), found.std[:, :, 0].float()
    found = vae.encode(pixels).latent_dist
    return found.mean.float(), found.std.float()


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows as one tensor, zeros behind the shorter ones."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True) if rows[0].ndim else torch.stack(list(rows))


def _place(item: Item) -> Place:
    return item["kind"], item["index"], item["flip"]
