"""The base of the demo: a small Stable Diffusion of the real classes, trained on all digits but one."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..compress import Digits


__all__ = [
    "BASE_FOLDER",
    "HELD_OUT",
    "NAMES",
    "NEW",
    "OLD",
    "OLD_DIGITS",
    "build_pipeline",
    "build_tokenizer",
    "embed",
    "encode",
    "noise_loss",
    "old_digits",
    "train_base",
    "train_vae",
    "upsample",
]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BASE_FOLDER = "base"  # beside those of what is taught
# Held out. Its open crossing is part of no other digit, so no mixture of the old ones passes for it; and a classifier
# confuses it with few.
HELD_OUT = 4
NEW = "a photo of a V*"
OLD_DIGITS = tuple(digit for digit in range(len(NAMES)) if digit != HELD_OUT)
OLD = tuple(f"a photo of a {NAMES[digit]}" for digit in OLD_DIGITS)

BATCH = 64
WIDTH = 32  # of the text encoder
TOKENS = 8  # the longest caption has seven, with those for start and end
_DROPPED = 0.1  # share of the captions, for classifier-free guidance
_VAE_RATE, _UNET_RATE = 3e-3, 2e-3
_KL = 1e-4
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}

Bar = Callable[[int, str], Iterator[int]]
# Of a model, clean latents, what the model is told of each, and a generator (`None`: torch's global one).
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator | None], Tensor]


def build_pipeline() -> Any:
    """A StableDiffusionPipeline for 16×16 images with random weights, drawn from torch's global generator."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # in this class, the number of heads
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **_NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A tokenizer with one token for each word of the captions, and for `v` and `*`, which no caption has."""
    words = sorted({word for text in OLD for word in text.split()} | {NAMES[HELD_OUT], "v", "*"})
    chains = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    # Each word is put together from the left: t h, th r, thr e, …
    merges = [("".join(chain[:i]), chain[i]) for chain in chains for i in range(1, len(chain))]
    letters = sorted({sign for word in words for sign in word})
    entries = [*letters, *(f"{sign}</w>" for sign in letters), *("".join(pair) for pair in merges)]
    entries = [*dict.fromkeys(entries), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, rules = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({entry: i for i, entry in enumerate(entries)}), encoding="utf-8")
        lines = dict.fromkeys(" ".join(pair) for pair in merges)
        rules.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
        return CLIPTokenizer(vocab=str(vocabulary), merges=str(rules), model_max_length=TOKENS)


def upsample(images: Tensor) -> Tensor:
    """8×8 digits as the 16×16 images that everything here sees."""
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


def old_digits(data: Digits) -> tuple[Tensor, Tensor]:
    """What the base learns: training images `(n, 3, 16, 16)` and, for each, the number of its caption in `OLD`."""
    kept = data.train_labels != HELD_OUT
    labels = data.train_labels[kept]
    return upsample(data.train_images[kept]), labels - (labels > HELD_OUT).long()


def embed(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """What the UNet is told of some captions: `(n, tokens, width)`."""
    tokens = pipeline.tokenizer(list(captions), padding="max_length", max_length=TOKENS, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids).last_hidden_state


@torch.no_grad()
def encode(pipeline: Any, images: Tensor) -> Tensor:
    """Latents of images as the UNet takes them."""
    return pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor


def train_base(
    pipeline: Any,
    data: Digits,
    vae_steps: int,
    steps: int,
    bar: Bar,
    model: nn.Module | None = None,
    loss: Loss | None = None,
) -> None:
    """Train the autoencoder, then the denoiser together with the text encoder, of which the running mean is kept.

    Args:
        pipeline: with random weights.
        data: all ten digits; the held-out one is left out.
        vae_steps, steps: of the autoencoder, and of the other two.
        bar: counts the steps.
        model, loss: another denoiser than the pipeline's UNet, and what it minimises.
    """
    images, captions = old_digits(data)
    train_vae(pipeline.vae, images, vae_steps, bar)
    latents = encode(pipeline, images)
    loss = loss or noise_loss(pipeline.scheduler)
    _train_denoiser(pipeline, pipeline.unet if model is None else model, loss, latents, captions, steps, bar)
    pipeline.vae.requires_grad_(False)


def train_vae(vae: Any, images: Tensor, steps: int, bar: Bar) -> None:
    """Train the autoencoder, and measure by what its latents are scaled."""
    optimizer, schedule = _optimizer(vae.parameters(), _VAE_RATE, steps)
    vae.train()
    for _ in bar(steps, "Autoencoder"):
        batch = images[torch.randint(len(images), (BATCH,))]
        posterior = vae.encode(batch).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        loss = F.l1_loss(drawn, batch) + _KL * posterior.kl().mean() / batch[0].numel()
        _step(loss, optimizer, schedule)
    vae.eval()
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(images).latent_dist.mode().std().item())


def noise_loss(schedule: Any) -> Loss:
    """The error of a UNet's guesses of the noise, at random levels of a schedule."""

    def loss(unet: nn.Module, clean: Tensor, told: Tensor, drawn: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(clean.shape, generator=drawn)
        times = torch.randint(len(schedule.alphas_cumprod), (len(clean),), generator=drawn)
        return F.mse_loss(unet(schedule.add_noise(clean, noise, times), times, told).sample, noise)

    return loss


def _train_denoiser(
    pipeline: Any, model: nn.Module, loss: Loss, latents: Tensor, captions: Tensor, steps: int, bar: Bar
) -> None:
    from diffusers.training_utils import EMAModel

    parts = nn.ModuleList([model, pipeline.text_encoder]).train()
    optimizer, schedule = _optimizer(parts.parameters(), _UNET_RATE, steps)
    mean = EMAModel(parts.parameters(), decay=0.995)
    for _ in bar(steps, "Base"):
        picks = torch.randint(len(latents), (BATCH,))
        told = captions[picks].where(torch.rand(BATCH) >= _DROPPED, len(OLD))
        _step(loss(model, latents[picks], embed(pipeline, [*OLD, ""])[told], None), optimizer, schedule)
        mean.step(parts.parameters())
    mean.copy_to(parts.parameters())
    parts.eval().requires_grad_(False)


def _optimizer(parameters: Any, rate: float, steps: int) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-4, fused=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)


def _step(loss: Tensor, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()
