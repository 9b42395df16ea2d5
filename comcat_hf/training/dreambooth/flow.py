"""Rectified-flow transformers that can be trained (SD3, FLUX.1, FLUX.2, Qwen-Image): their text and latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


__all__ = ["FLOWS", "FlowFamily", "Text"]

# By the name under which a UNet or transformer takes it.
Text = dict[str, Tensor]


@dataclass(frozen=True)
class FlowFamily:
    """How pipelines of one class are trained by flow matching; their text encoders are frozen.

    Attributes:
        encoders: names of the parts that read text.
        read: gets the pipeline, prompts and the device; returns what the transformer takes, one row per prompt.
        call: gets the transformer, noisy latents, timesteps (0 to 1,000), text and the guidance scale; returns the
            predicted velocity of the latents.
        channels: how many channels the transformer takes for each of the autoencoder.
    """

    encoders: tuple[str, ...]
    read: Callable[[Any, list[str], torch.device], Text]
    call: Callable[[nn.Module, Tensor, Tensor, Text, float], Tensor]
    channels: int = 4

    denoiser = "transformer"
    tokenizers: tuple[str, ...] = ()
    time_ids = False

    @torch.no_grad()
    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Text:
        """What the transformer takes for some prompts, by the pipeline's own frozen encoders."""
        return self.read(pipeline, list(prompts), device)

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float, time_ids: None = None
    ) -> Tensor:
        """The transformer's velocity, in the shape of the latents."""
        return self.call(model, noisy, timesteps, text, guidance)


def _read_sd3(pipeline: Any, prompts: list[str], device: torch.device) -> Text:
    found = pipeline.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}


def _read_flux(pipeline: Any, prompts: list[str], device: torch.device) -> Text:
    states, pooled, _ = pipeline.encode_prompt(prompts, device=device)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _read_flux2(pipeline: Any, prompts: list[str], device: torch.device) -> Text:
    states, ids = pipeline.encode_prompt(prompts, device=device)
    return {"encoder_hidden_states": states, "txt_ids": ids}


def _read_qwen(pipeline: Any, prompts: list[str], device: torch.device) -> Text:
    states, mask = pipeline.encode_prompt(prompts, device=device)
    # No mask means that every token counts.
    mask = torch.ones(states.shape[:2], device=device) if mask is None else mask
    return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask.bool()}


def _call_sd3(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float) -> Tensor:
    return model(hidden_states=noisy, timestep=timesteps, **text, return_dict=False)[0]


def _call_flux(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float) -> Tensor:
    height, width = noisy.shape[-2] // 2, noisy.shape[-1] // 2
    return _call_packed(
        model,
        noisy,
        timesteps,
        guidance,
        img_ids=_positions(noisy, 3, height, width),
        txt_ids=noisy.new_zeros(text["encoder_hidden_states"].shape[1], 3),
        **text,
    )


def _call_flux2(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float) -> Tensor:
    ids = _positions(noisy, 4, *noisy.shape[-2:]).expand(len(noisy), -1, -1)
    return _call_tokens(model, noisy, timesteps, guidance, img_ids=ids, **text)


def _call_qwen(model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float) -> Tensor:
    shape = (1, noisy.shape[-2] // 2, noisy.shape[-1] // 2)
    return _call_packed(model, noisy, timesteps, guidance, img_shapes=[[shape]] * len(noisy), **text)


def _call_packed(model: nn.Module, noisy: Tensor, timesteps: Tensor, guidance: float, **given: Any) -> Tensor:
    """The velocity by a transformer whose tokens are squares of two by two latents."""
    return F.pixel_shuffle(_call_tokens(model, F.pixel_unshuffle(noisy, 2), timesteps, guidance, **given), 2)


def _call_tokens(model: nn.Module, noisy: Tensor, timesteps: Tensor, guidance: float, **given: Any) -> Tensor:
    """The velocity by a transformer that takes one token per latent and timesteps from 0 to 1."""
    found = model(
        hidden_states=_tokens(noisy),
        timestep=timesteps / 1000,
        guidance=noisy.new_full((len(noisy),), guidance) if model.config.guidance_embeds else None,
        **given,
        return_dict=False,
    )[0]
    return _images(found, *noisy.shape[-2:])


def _tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def _images(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def _positions(like: Tensor, axes: int, height: int, width: int) -> Tensor:
    """Rows and columns of latents on the axes 1 and 2, `(height * width, axes)`."""
    found = like.new_zeros(height, width, axes)
    found[..., 1] = torch.arange(height, device=like.device)[:, None]
    found[..., 2] = torch.arange(width, device=like.device)
    return found.flatten(0, 1)


_SD3_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_FLUX2 = FlowFamily(("text_encoder",), _read_flux2, _call_flux2)

FLOWS: Mapping[str, FlowFamily] = {
    "StableDiffusion3Pipeline": FlowFamily(_SD3_ENCODERS, _read_sd3, _call_sd3, channels=1),
    "FluxPipeline": FlowFamily(("text_encoder", "text_encoder_2"), _read_flux, _call_flux),
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "QwenImagePipeline": FlowFamily(("text_encoder",), _read_qwen, _call_qwen),
}
