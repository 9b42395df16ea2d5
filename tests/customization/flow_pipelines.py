"""Rectified-flow pipelines of the real classes at tiny sizes, saved as folders; 16×16 images."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.customization.pipelines import TOKENS, WIDTH, _text_config, tiny_tokenizer


HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


def _vae(cls: type = AutoencoderKL, **settings: object) -> torch.nn.Module:
    return cls(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=16,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    )


def _t5(width: int = WIDTH) -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = ["<pad>", "</s>", "<unk>", *map(chr, range(32, 127)), "▁"]
    tokenizer = T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=TOKENS)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def _qwen_tokenizer() -> Qwen2Tokenizer:
    signs = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={sign: i for i, sign in enumerate(signs)}, merges=[], model_max_length=TOKENS)
    tokenizer.chat_template = _CHAT
    return tokenizer


def tiny_sd3(folder: str | Path) -> Path:
    """A StableDiffusion3Pipeline."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(Path(folder) / "vocabulary")
    tokenizer_3, text_encoder_3 = _t5(2 * WIDTH)
    transformer = SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer, "quick_gelu", projection_dim=8)),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, "gelu", projection_dim=8)),
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
    ).save_pretrained(folder)
    return Path(folder)


def tiny_flux(folder: str | Path) -> Path:
    """A FluxPipeline whose transformer is told a guidance scale."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(Path(folder) / "vocabulary")
    tokenizer_2, text_encoder_2 = _t5()
    FluxPipeline(
        transformer=FluxTransformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(_text_config(tokenizer, "quick_gelu")),
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    ).save_pretrained(folder)
    return Path(folder)


def tiny_flux2(folder: str | Path) -> Path:
    """A Flux2KleinPipeline, which is not distilled."""
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    vae = _vae(AutoencoderKLFlux2)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=3 * 8,
            timestep_guidance_channels=8,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        is_distilled=False,
    ).save_pretrained(folder)
    return Path(folder)


def tiny_qwen(folder: str | Path) -> Path:
    """A QwenImagePipeline."""
    torch.manual_seed(0)
    tokenizer = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 1.0, 2.0]}
    QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            **HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], **statistics
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return Path(folder)


FLOWS: dict[str, Callable[[str | Path], Path]] = {
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2": tiny_flux2,
    "qwen": tiny_qwen,
}
