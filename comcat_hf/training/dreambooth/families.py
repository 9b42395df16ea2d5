"""The kinds of text-to-image pipelines that can be trained; here those with a UNet: how they read text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import native
from ...errors import CheckpointError, ComCATError, InvalidValueError, UnsupportedModuleError, brief
from .flow import FLOWS, FlowFamily, Text
from .settings import CustomizeSettings


__all__ = ["Denoiser", "Family", "PipelineFamily", "Text", "family_of", "load_pipeline", "to_device"]


@dataclass(frozen=True)
class PipelineFamily:
    """How pipelines of one class with a UNet are trained.

    Attributes:
        encoders, tokenizers: names of the parts that read text, in the same order.
        read: from the text encoders' outputs to what the UNet takes.
        time_ids: whether the UNet is told sizes and crops.
    """

    encoders: tuple[str, ...]
    tokenizers: tuple[str, ...]
    read: Callable[[Sequence[Any]], Text]
    time_ids: bool = False

    denoiser = "unet"
    channels = 1

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

    @torch.no_grad()
    def texts(self, pipeline: Any, prompts: Sequence[str], device: torch.device) -> Text:
        """What the UNet takes for some prompts, by the pipeline's own frozen encoders."""
        inputs = to_device(self.tokenize(pipeline, prompts), device)
        return self.encode([getattr(pipeline, name) for name in self.encoders], inputs)

    def predict(
        self, model: nn.Module, noisy: Tensor, timesteps: Tensor, text: Text, guidance: float, time_ids: Tensor | None
    ) -> Tensor:
        """What the UNet says about noisy latents."""
        given = dict(text)
        states = given.pop("encoder_hidden_states")
        if time_ids is not None:
            given["time_ids"] = time_ids
        further = {"added_cond_kwargs": given} if given else {}
        return model(noisy, timesteps, encoder_hidden_states=states, return_dict=False, **further)[0]


def to_device(inputs: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[dict[str, Tensor]]:
    """Tokens of several encoders, on a device."""
    return [{name: ids.to(device) for name, ids in given.items()} for given in inputs]


def _read_one(outputs: Sequence[Any]) -> Text:
    return {"encoder_hidden_states": outputs[0].last_hidden_state}


def _read_two(outputs: Sequence[Any]) -> Text:
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"encoder_hidden_states": states, "text_embeds": outputs[-1].text_embeds}


_ONE = PipelineFamily(("text_encoder",), ("tokenizer",), _read_one)
_TWO = PipelineFamily(("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2"), _read_two, time_ids=True)

Family = PipelineFamily | FlowFamily
_FAMILIES: Mapping[str, Family] = {"StableDiffusionPipeline": _ONE, "StableDiffusionXLPipeline": _TWO, **FLOWS}


def family_of(class_name: str, source: str) -> Family:
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


def load_pipeline(settings: CustomizeSettings, dtype: torch.dtype) -> tuple[Any, Family]:
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
    where: dict[str, Any] = {"revision": settings.revision, "cache_dir": settings.cache_dir}
    try:
        class_name = str(DiffusionPipeline.load_config(source, **where).get("_class_name"))
        family = family_of(class_name, source)
        _check_flags(settings, family, class_name)
        # A checker only takes memory here; a family that has none does not know the words.
        unsafe = {"safety_checker": None, "requires_safety_checker": False} if family is _ONE else {}
        fix = "Check --revision, --variant, the files and the network."
        pipeline = native.load_pipeline(source, dtype=dtype, variant=settings.variant, fix=fix, **where, **unsafe)
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
    _check_size(settings, pipeline, family)
    return pipeline, family


def _check_flags(settings: CustomizeSettings, family: Family, class_name: str) -> None:
    """Refuse flags that mean nothing for a family."""
    if family.denoiser == "unet":
        return
    for flag, fix in {
        "train_text_encoder": "Its text encoders stay frozen; leave the flag out",
        "snr_gamma": "Flow matching has --weighting_scheme in its place",
    }.items():
        if getattr(settings, flag):
            raise InvalidValueError(
                f"--{flag}: expected a pipeline with a UNet, found {class_name}, a rectified-flow transformer. {fix}."
            )


def _check_size(settings: CustomizeSettings, pipeline: Any, family: Family) -> None:
    config = getattr(pipeline, family.denoiser).config
    # Transformers take two by two latents together.
    step = pipeline.vae_scale_factor * (1 if family.denoiser == "unet" else 2)
    for height, width in settings.buckets:
        if height % step or width % step:
            raise InvalidValueError(
                f"--aspect_ratio_buckets: heights and widths must be multiples of {step} for this pipeline, got "
                f"{height},{width}."
            )
    if settings.resolution % step:
        raise InvalidValueError(
            f"--resolution must be a multiple of {step} for this pipeline, got {settings.resolution}. Take "
            f"{max(settings.resolution // step, 1) * step}."
        )
    latents = getattr(pipeline.vae.config, "latent_channels", None) or pipeline.vae.config.z_dim
    if config.in_channels != family.channels * latents:
        raise UnsupportedModuleError(
            f"{settings.pretrained_model_name_or_path}: expected a {family.denoiser} that takes {latents} channels of "
            f"latents ({family.channels * latents} in all), found one of {config.in_channels}, as for inpainting. Use "
            "a text-to-image pipeline."
        )


class Denoiser(nn.Module):
    """All that is trained, as one module: the UNet or transformer and, where they are adapted, the text encoders.

    Args:
        with_text: whether [`forward`] is given tokens, or what the UNet takes.
        guidance: scale that a distilled transformer is told.
    """

    def __init__(self, pipeline: Any, family: Family, with_text: bool, guidance: float) -> None:
        super().__init__()
        self.denoiser = getattr(pipeline, family.denoiser)
        names = family.encoders if with_text else ()
        self.encoders = nn.ModuleList([getattr(pipeline, name) for name in names])
        self.family, self.guidance = family, guidance

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Text | None = None,
        tokens: Sequence[Mapping[str, Tensor]] | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """The prediction from noisy latents."""
        # Text encoders are trained with UNets alone.
        given = self.family.encode(self.encoders, tokens) if text is None else text  # type: ignore[union-attr]
        return self.family.predict(self.denoiser, noisy, timesteps, given, self.guidance, time_ids)
