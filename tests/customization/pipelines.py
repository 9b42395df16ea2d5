"""Text-to-image pipelines of the real classes at tiny sizes, saved as folders, and a few real images."""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


RESOLUTION = 16
TOKENS = 32
WIDTH = 16


def tiny_sd(folder: str | Path, prediction_type: str = "epsilon") -> Path:
    """A StableDiffusionPipeline for 16×16 images, saved in `folder`; `"v_prediction"` makes it an SD 2.x.

    Args:
        folder: where the parts are written.
        prediction_type: what the UNet predicts.
    """
    folder, second = Path(folder), prediction_type == "v_prediction"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "vocabulary")
    unet = tiny_unet(attention_head_dim=(2, 4) if second else 4, use_linear_projection=second)
    scheduler = PNDMScheduler(prediction_type=prediction_type, skip_prk_steps=True, steps_offset=1, **_noise())
    StableDiffusionPipeline(
        vae=tiny_vae(0.18215),
        text_encoder=CLIPTextModel(_text_config(tokenizer, "gelu" if second else "quick_gelu")),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sdxl(folder: str | Path) -> Path:
    """A StableDiffusionXLPipeline for 16×16 images, saved in `folder`.

    Args:
        folder: where the parts are written.
    """
    folder = Path(folder)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder / "vocabulary")
    unet = tiny_unet(
        attention_head_dim=(2, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(0.13025),
        text_encoder=CLIPTextModel(_text_config(tokenizer, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, "gelu", projection_dim=8)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_noise()),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def tiny_unet(**changes: object) -> UNet2DConditionModel:
    """A UNet with attention in both of its levels and in the middle."""
    settings = {
        "sample_size": RESOLUTION // 2,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**(settings | changes))


def tiny_vae(scaling_factor: float) -> AutoencoderKL:
    """An autoencoder that halves the sides of an image."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
    )


def tiny_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """A tokenizer of single characters, from vocabulary files written to `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    signs = string.ascii_lowercase + string.digits + ".,<>*-'!?"
    entries = [*signs, *(f"{sign}</w>" for sign in signs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS)


def write_digits(folder: str | Path, digit: int = 3, count: int = 4) -> Path:
    """Write `count` of scikit-learn's images of one digit into `folder` as PNG files."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    for index, pixels in enumerate(digits.images[digits.target == digit][:count]):
        image = Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).convert("RGB")
        image.resize((20, 24)).save(folder / f"{digit}-{index}.png")
    return folder


def ddpm(prediction_type: str = "epsilon") -> DDPMScheduler:
    """The noise schedule of the pipelines above, as training uses it."""
    return DDPMScheduler(prediction_type=prediction_type, **_noise())


def _noise() -> dict:
    return {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def _text_config(tokenizer: CLIPTokenizer, activation: str, **changes: object) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **changes,
    )
