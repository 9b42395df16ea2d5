"""Small diffusion models of digits that are taught the digit that they lack: a UNet, an SD3 and a FLUX.2.

The base and the judge of the demo of customizing, also with a rectified-flow transformer in place of the UNet.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from comcat_hf.demos.compress import Digits
from comcat_hf.demos.customize.base import (
    HELD_OUT,
    NEW,
    OLD,
    OLD_DIGITS,
    WIDTH,
    Loss,
    build_pipeline,
    embed,
    encode,
    noise_loss,
    train_base,
    upsample,
)
from comcat_hf.demos.customize.judge import Judge
from comcat_hf.demos.customize.methods import Lesson, teach


HEADS, HEAD = 4, 16
ADAPTER, BATCH, PRIOR, GUIDANCE = "digit", 16, 8, 2.0
_DRAWN_BY_BASE = 2**20  # apart from the seeds of runs

Guided = Callable[[Tensor, Tensor], Tensor]  # of latents and their time


@dataclass(frozen=True)
class Settings:
    """Steps of the trainings and of drawing, and images to judge by."""

    base_steps: int
    adapter_steps: int
    vae_steps: int = 400
    sampling_steps: int = 20
    samples: int = 100
    caption_samples: int = 5


@dataclass(frozen=True)
class Kind:
    """One kind of denoiser.

    Attributes:
        build: of a pipeline.
        predict: what the model says of latents at a time, given the text.
        flow: whether it is a velocity at times 0 to 1, or the noise at a level of the pipeline's schedule.
        settings: of a run.
    """

    build: Callable[[Any], nn.Module]
    predict: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    flow: bool
    settings: Settings

    def loss(self, pipeline: Any) -> Loss:
        """What a training minimises."""

        def velocity_loss(model: nn.Module, clean: Tensor, told: Tensor, drawn: torch.Generator | None) -> Tensor:
            noise, times = torch.randn(clean.shape, generator=drawn), torch.rand(len(clean), generator=drawn)
            noisy = clean + times.view(-1, 1, 1, 1) * (noise - clean)
            return F.mse_loss(self.predict(model, noisy, times, told), noise - clean)

        return velocity_loss if self.flow else noise_loss(pipeline.scheduler)

    def denoise(self, guided: Guided, latents: Tensor, pipeline: Any, steps: int) -> Tensor:
        """Latents from noise, by Euler's method or the pipeline's own."""
        if self.flow:
            for step in range(steps):
                latents = latents - guided(latents, torch.tensor(1 - step / steps)) / steps
            return latents
        pipeline.scheduler.set_timesteps(steps)
        for level in pipeline.scheduler.timesteps:
            latents = pipeline.scheduler.step(guided(latents, level), level, latents).prev_sample
        return latents


def _sd3(pipeline: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        joint_attention_dim=WIDTH,
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=4,
    )


def _flux2(pipeline: Any) -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )


def _predict_flux2(model: nn.Module, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
    side, words, one = noisy.shape[-1], text.shape[1], torch.arange(1)
    places = torch.cartesian_prod(one, torch.arange(side), torch.arange(side), one)
    tokens = torch.cartesian_prod(one, one, one, torch.arange(words))
    found = model(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=times,
        img_ids=places.expand(len(noisy), -1, -1),
        txt_ids=tokens.expand(len(noisy), -1, -1),
        return_dict=False,
    )[0]
    return found.transpose(1, 2).unflatten(2, (side, side))


KINDS: Mapping[str, Kind] = {
    "UNet": Kind(
        lambda pipeline: pipeline.unet,
        lambda model, noisy, times, text: model(noisy, times, text, return_dict=False)[0],
        False,
        Settings(1200, 100),
    ),
    "SD3": Kind(
        _sd3,
        lambda model, noisy, times, text: model(noisy, text, text.mean(1), times * 1000, return_dict=False)[0],
        True,
        Settings(600, 40),
    ),
    "FLUX.2": Kind(_flux2, _predict_flux2, True, Settings(600, 40)),
}


class Steps:
    """Counts steps, and takes the processor's time of each, in milliseconds."""

    def __init__(self) -> None:
        self.spent: list[float] = []

    def __call__(self, total: int, name: str) -> Iterator[int]:
        for step in range(total):
            started = time.process_time()
            yield step
            self.spent.append(1000 * (time.process_time() - started))


@dataclass(frozen=True)
class Taught:
    """An adapted copy of a base: its trained parameters, bytes of them in a file, and milliseconds per step."""

    model: nn.Module
    parameters: int
    size: int
    spent: list[float]


class Studio:
    """A base that was trained with one seed, and what it is taught and judged with."""

    def __init__(self, kind: Kind, seed: int, data: Digits, judge: Judge, cached: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.kind, self.seed, self.data, self.judge = kind, seed, data, judge
        self.pipeline = build_pipeline()
        self.base = kind.build(self.pipeline)
        self._train(cached)
        with torch.no_grad():
            self._told = embed(self.pipeline, [*OLD, NEW, ""])
        self._prior_captions = [i for i in range(len(OLD)) for _ in range(PRIOR)]
        self._prior = self._draw(self.base, self._prior_captions, _DRAWN_BY_BASE + seed)

    def _train(self, cached: Path | None) -> None:
        parts = nn.ModuleDict({"vae": self.pipeline.vae, "text": self.pipeline.text_encoder, "model": self.base})
        scale = torch.ones(1)
        if cached is not None and cached.exists():
            state = load_file(cached)
            scale = state.pop("scale")
            parts.load_state_dict(state)
            self.pipeline.vae.register_to_config(scaling_factor=scale.item())
        else:
            steps, loss = self.kind.settings, self.kind.loss(self.pipeline)
            train_base(self.pipeline, self.data, steps.vae_steps, steps.base_steps, Steps(), self.base, loss)
            scale.fill_(self.pipeline.vae.config.scaling_factor)
            if cached is not None:
                save_file({**parts.state_dict(), "scale": scale}, cached)
        parts.eval().requires_grad_(False)

    def teach(self, config: Callable[[nn.Module], PeftConfig], rate: float, seed: int, ratio: float = 1.0) -> Taught:
        """Teach a copy of the base the new digit, from images, batches and noise that hang on the seed alone.

        `ratio` is the rate of gains, as a multiple of the others'.
        """
        torch.manual_seed(seed)
        taught = get_peft_model(copy.deepcopy(self.base), config(self.base), adapter_name=ADAPTER)
        images = upsample(self.data.train_images[self.data.train_labels == HELD_OUT])
        picked = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:BATCH]
        lesson = Lesson(
            latents=encode(self.pipeline, images[picked]),
            told=self._told[[len(OLD)] * BATCH],
            prior_latents=self._prior,
            prior_told=self._told[self._prior_captions],
            steps=self.kind.settings.adapter_steps,
            batch=BATCH,
            loss=self.kind.loss(self.pipeline),
            seed=seed,
        )
        clock = Steps()
        teach(taught, lesson, rate, clock, "", ratio)
        count = sum(parameter.numel() for parameter in taught.parameters() if parameter.requires_grad)
        state = get_peft_model_state_dict(taught, adapter_name=ADAPTER)
        return Taught(taught, count, len(save({k: v.contiguous() for k, v in state.items()})), clock.spent)

    @torch.no_grad()
    def _draw(self, model: nn.Module, captions: Sequence[int], seed: int) -> Tensor:
        told = self._told[list(captions)]
        text = torch.cat([told, self._told[-1:].expand_as(told)])

        def guided(latents: Tensor, at: Tensor) -> Tensor:
            found, free = self.kind.predict(model, latents.repeat(2, 1, 1, 1), at.expand(len(text)), text).chunk(2)
            return free + GUIDANCE * (found - free)

        noise = torch.randn(len(captions), 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        return self.kind.denoise(guided, noise, self.pipeline, self.kind.settings.sampling_steps)

    def draw(self, model: nn.Module, captions: Sequence[int], seed: int) -> Tensor:
        """Images `(n, 3, 32, 32)` from -1 to 1 of captions by number, the last of which is the new one."""
        vae = self.pipeline.vae
        with torch.no_grad():
            images = vae.decode(self._draw(model, captions, seed) / vae.config.scaling_factor).sample
        return images.clamp(-1, 1)

    def judged(self, model: nn.Module, seed: int) -> tuple[float, float]:
        """Shares of new and of old digits that the judge reads as meant, in images that hang on the seed alone."""
        count, each = self.kind.settings.samples, self.kind.settings.caption_samples
        captions = [len(OLD)] * count + [i for i in range(len(OLD)) for _ in range(each)]
        wanted = torch.tensor([HELD_OUT] * count + [digit for digit in OLD_DIGITS for _ in range(each)])
        right = (self.judge.read(self.draw(model, captions, seed)) == wanted).double()
        return right[:count].mean().item(), right[count:].mean().item()
