"""The kinds of text-to-image pipelines that can be trained: how they read text, and what else their UNets are told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import native
from ...errors import CheckpointError, ComCATError, InvalidValueError, UnsupportedModuleError, brief
from .settings import CustomizeSettings


__all__ = ["Denoiser", "PipelineFamily", "Text", "family_of", "load_pipeline"]

# By the name under which the UNet takes it.
Text = dict[str, Tensor]


@dataclass(frozen=True)
class PipelineFamily:
    """How pipelines of one class are trained.

    Attributes:
        encoders, tokenizers: names of the parts that read text, in the same order.
        read: from the text encoders' outputs to what the UNet takes.
        time_ids: whether the UNet is told sizes and crops.
    """

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    read: Callable[[Sequence[Any]], Text]
    time_ids: bool = False

    def tokenize(self, pipeline: Any, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """What each text encoder is given for some prompts."""
        inputs = []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers, strict=True):
            tokenizer, config = getattr(pipeline, tokenizer), getattr(pipeline, encoder).config
            found = tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            masked = getattr(config, "use_attention_mask", False)
            inputs.append({name: found[name] for name in ("input_ids", *(("attention_mask",) if masked else ()))})
        return inputs

    def encode(self, encoders: Sequence[nn.Module], inputs: Sequence[Mapping[str, Tensor]]) -> Text:
        """What the UNet takes for prompts that were tokenized."""
        deep = len(encoders) > 1
        return self.read(
            [encoder(**given, output_hidden_states=deep) for encoder, given in zip(encoders, inputs, strict=True)]
        )


def _read_one(outputs: Sequence[Any]) -> Text:
    return {"encoder_hidden_states": outputs[0].last_hidden_state}


def _read_two(outputs: Sequence[Any]) -> Text:
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": states, "text_embeds": outputs[-1].text_embeds}


_ONE = PipelineFamily(("text_encoder",), ("tokenizer",), _read_one)
_TWO = PipelineFamily(("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"), _read_two, time_ids=True)

_FAMILIES: Mapping[str, PipelineFamily] = {"StableDiffusionPipeline": _ONE, "StableDiffusionXLPipeline": _TWO}


def family_of(class_name: str, source: str) -> PipelineFamily:
    """How pipelines of a class are trained.

    Raises:
        UnsupportedModuleError: the class is not known.
    """
    if class_name not in _FAMILIES:
        raise UnsupportedModuleError(
            f"{source}: expected a pipeline of class {' or '.join(_FAMILIES)}, found {class_name}, whose training is "
            "not known. Use a pipeline of one of these."
        )
    return _FAMILIES[class_name]


def load_pipeline(settings: CustomizeSettings, dtype: torch.dtype) -> tuple[Any, PipelineFamily]:
    """Read the pipeline that is customized.

    Args:
        settings: where it is.
        dtype: of all parts; an autoencoder that overflows in half precision stays in float32.

    Returns:
        the pipeline, frozen and in eval mode, and how it is trained.

    Raises:
        CheckpointError: it cannot be found or read, or lacks weights.
        UnsupportedModuleError: its class or a part of it is not known.
        InvalidValueError: the resolution does not suit it.
    """
    from diffusers import DiffusionPipeline

    source = settings.pretrained_model_name_or_path
    where = {"revision": settings.revision, "cache_dir": settings.cache_dir}
    try:
        class_name = str(DiffusionPipeline.load_config(source, **where).get("_class_name"))
        family = family_of(class_name, source)
        # A checker only takes memory here; a family that has none does not know the words.
        unsafe = {"safety_checker": None, "requires_safety_checker": False} if family is _ONE else {}
        pipeline = native.load_pipeline(source, dtype=dtype, variant=settings.variant, **where, **unsafe)
    except ComCATError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"--pretrained_model_name_or_path {source}: expected a folder or Hub id of a diffusers pipeline, found "
            f"none that loads ({brief(error)}). Check the path, --revision, --variant and the network."
        ) from error
    if pipeline.vae.config.get("force_upcast") and pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
        elif name in family.encoders:
            raise UnsupportedModuleError(f"{source}: expected the part {name}, found none. Use a complete pipeline.")
    _check_size(settings, pipeline)
    return pipeline, family


def _check_size(settings: CustomizeSettings, pipeline: Any) -> None:
    unet, step = pipeline.unet.config, pipeline.vae_scale_factor
    if settings.resolution % step:
        raise InvalidValueError(
            f"--resolution must be a multiple of {step} for this pipeline, got {settings.resolution}. Take "
            f"{max(settings.resolution // step, 1) * step}."
        )
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise UnsupportedModuleError(
            f"{settings.pretrained_model_name_or_path}: expected a UNet that takes latents of "
            f"{pipeline.vae.config.latent_channels} channels, found one of {unet.in_channels}, as for inpainting. Use "
            "a text-to-image pipeline."
        )


class Denoiser(nn.Module):
    """All that is trained, as one module: the UNet and, where they are adapted, the text encoders.

    Args:
        with_text: whether [`forward`] is given tokens, or what the UNet takes.
    """

    def __init__(self, pipeline: Any, family: PipelineFamily, with_text: bool) -> None:
        super().__init__()
        self.unet = pipeline.unet
        names = family.encoders if with_text else ()
        self.encoders = nn.ModuleList([getattr(pipeline, name) for name in names])
        self.family = family

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Text | None = None,
        tokens: Sequence[Mapping[str, Tensor]] | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """What the UNet says about noisy latents."""
        given = self.family.encode(self.encoders, tokens) if text is None else dict(text)
        states = given.pop("encoder_hidden_states")
        if time_ids is not None:
            given["time_ids"] = time_ids
        further = {"added_cond_kwargs": given} if given else {}
        return self.unet(noisy, timesteps, encoder_hidden_states=states, return_dict=False, **further)[0]
