"""Tiny diffusion transformers of the real classes of diffusers, with inputs; every parameter is random."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.helpers import randomize


HEADS, WIDTH = 2, 16
DIM, TEXT = HEADS * WIDTH, 24
_HEADS = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH}
_AXES = [4, 4, 8]


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _image(channels: int = 4, size: int = 8) -> dict[str, Any]:
    return {"hidden_states": _noise(2, channels, size, size), "timestep": torch.tensor([3, 700])}


def _text(tokens: int = 5, width: int = TEXT) -> dict[str, Tensor]:
    return {"encoder_hidden_states": _noise(2, tokens, width, seed=1)}


def _mask(tokens: int = 5, dtype: torch.dtype = torch.long) -> Tensor:
    mask = torch.ones(2, tokens, dtype=dtype)
    mask[1, -2:] = 0
    return mask


def _positions(tokens: int, axes: int, place: int) -> Tensor:
    ids = torch.zeros(tokens, axes)
    ids[:, place] = torch.arange(tokens)
    return ids


def _packed(axes: int = 3, **more: Any) -> dict[str, Any]:
    """Sixteen packed latents and five tokens of text, with their positions."""
    ids = {"img_ids": _positions(16, axes, 1), "txt_ids": _positions(5, axes, axes - 1)}
    return {"hidden_states": _noise(2, 16, 4), "timestep": torch.tensor([0.3, 0.7]), **_text(), **ids, **more}


def _sd3(**settings: Any):
    sizes = {"joint_attention_dim": TEXT, "caption_projection_dim": DIM, "pooled_projection_dim": 12}
    more = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8, "num_layers": 2}
    inputs = {**_image(), **_text(), "pooled_projections": _noise(2, 12)}
    return "SD3Transformer2DModel", {**_HEADS, **sizes, **more, **settings}, inputs


_PACKED = {"in_channels": 4, "num_layers": 1, "joint_attention_dim": TEXT}
_SPATIAL = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1}
_VIDEO = {"hidden_states": _noise(2, 4, 3, 4, 4), "timestep": torch.tensor([3, 700])}
_CROP = dict.fromkeys(("original_size", "target_size", "crop_coords"), torch.full((2, 2), 8.0))

# By name: class, settings, inputs.
_ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd3": _sd3(),
    "sd3.5": _sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "flux": (
        "FluxTransformer2DModel",
        {**_HEADS, **_PACKED, "num_single_layers": 1, "pooled_projection_dim": 12, "axes_dims_rope": _AXES},
        _packed(pooled_projections=_noise(2, 12)),
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            **_HEADS,
            **_PACKED,
            "num_single_layers": 1,
            "axes_dims_rope": _AXES,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _packed(attention_mask=_mask(21, torch.float)),
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            **_HEADS,
            **_PACKED,
            "num_single_layers": 1,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        _packed(4, guidance=torch.tensor([1.0, 2.0])),
    ),
    "flux3": (
        "Flux3Transformer2DModel",
        {
            **_HEADS,
            **_PACKED,
            "cond_in_channels": 4,
            "num_single_layers": 1,
            "timestep_channels": 8,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        _packed(4, image_cond_hidden_states=_noise(2, 6, 4, seed=2), image_cond_ids=_positions(6, 4, 2)),
    ),
    "bria": (
        "BriaTransformer2DModel",
        {**_HEADS, **_PACKED, "num_single_layers": 1, "axes_dims_rope": _AXES},
        _packed(timestep=torch.tensor([3.0, 700.0])),
    ),
    "bria-fibo": (
        "BriaFiboTransformer2DModel",
        {**_HEADS, **_PACKED, "num_single_layers": 1, "axes_dims_rope": _AXES, "text_encoder_dim": 16},
        _packed(text_encoder_layers=[_noise(2, 5, 16, seed=3)] * 2),
    ),
    "ovis": (
        "OvisImageTransformer2DModel",
        {**_HEADS, **_PACKED, "out_channels": 4, "num_single_layers": 1, "axes_dims_rope": _AXES},
        _packed(),
    ),
    "longcat": (
        "LongCatImageTransformer2DModel",
        {**_HEADS, **_PACKED, "num_single_layers": 1, "axes_dims_rope": _AXES},
        _packed(),
    ),
    "hunyuan-image": (
        "HunyuanImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "rope_axes_dim": [8, 8],
        },
        {
            **_image(size=4),
            **_text(),
            "encoder_attention_mask": _mask(),
            "timestep": torch.tensor([3.0, 700.0]),
        },
    ),
    "chronoedit": (
        "ChronoEditTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT,
            "freq_dim": 8,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        },
        {**_VIDEO, **_text()},
    ),
    "skyreels": (
        "SkyReelsV2Transformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT,
            "freq_dim": 8,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        },
        {**_VIDEO, **_text()},
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        {**_HEADS, **_PACKED, "out_channels": 4, "num_layers": 2, "patch_size": 1, "axes_dims_rope": _AXES},
        {
            "hidden_states": _noise(2, 16, 4),
            "timestep": torch.tensor([0.3, 0.7]),
            **_text(),
            "encoder_hidden_states_mask": _mask(dtype=torch.bool),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": DIM,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": HEADS,
            "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT,
            "axes_dims": _AXES,
            "axes_lens": [64, 32, 32],
        },
        {
            "x": [_noise(4, 1, 8, 8), _noise(4, 1, 4, 8, seed=1)],
            "t": torch.tensor([0.3, 0.7]),
            "cap_feats": [_noise(5, TEXT, seed=2), _noise(3, TEXT, seed=3)],
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": DIM,
            "pos_embed_max_size": 16,
        },
        {**_image(), **_text(), "timestep": torch.tensor([0.3, 0.7])},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "axes_dim_rope": _AXES,
            "cap_feat_dim": TEXT,
        },
        {**_image(), **_text(), "encoder_attention_mask": _mask(), "timestep": torch.tensor([0.3, 0.7])},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "sample_size": 4,
            "patch_size": 1,
            "num_cross_attention_heads": HEADS,
            "cross_attention_head_dim": WIDTH,
            "cross_attention_dim": DIM,
            "caption_channels": TEXT,
            "qk_norm": "rms_norm_across_heads",
        },
        {**_image(size=4), **_text(), "encoder_attention_mask": _mask()},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
            "num_layers": 1,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 5,
            "use_rotary_positional_embeddings": True,
        },
        {
            "hidden_states": _noise(2, 3, 4, 4, 4),
            "timestep": torch.tensor([3, 700]),
            **_text(),
            "image_rotary_emb": (_noise(12, WIDTH).cos(), _noise(12, WIDTH).sin()),
        },
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": [8, 8],
        },
        {**_image(), **_text(), **_CROP},
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": 12,
            "rope_axes_dim": _AXES,
        },
        {
            **_VIDEO,
            **_text(),
            "encoder_attention_mask": _mask(),
            "pooled_projections": _noise(2, 12),
            "guidance": torch.tensor([1000.0, 2000.0]),
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": DIM,
            "num_layers": 1,
            "caption_channels": TEXT,
        },
        {
            "hidden_states": _noise(2, 12, 4),
            "timestep": torch.tensor([3, 700]),
            **_text(),
            "encoder_attention_mask": _mask(),
            "num_frames": 3,
            "height": 2,
            "width": 2,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT,
            "freq_dim": 8,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        },
        {**_VIDEO, **_text()},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**_HEADS, **_SPATIAL, "out_channels": 4, "cross_attention_dim": DIM, "caption_channels": TEXT},
        {**_image(), **_text(), "encoder_attention_mask": _mask(), "added_cond_kwargs": {}},
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**_HEADS, **_SPATIAL, "num_embeds_ada_norm": 10},
        {**_image(), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])},
    ),
}
_ROWS["pixart"][1]["use_additional_conditions"] = False
_ROWS["cogvideox"][2]["encoder_hidden_states"] = _noise(2, 5, TEXT, seed=1)


def build(name: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model in eval mode by its name, with changes to its settings, and inputs for it."""
    cls, settings, inputs = _ROWS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(diffusers, cls)(**settings | changes)
    return randomize(model).eval(), dict(inputs)


TRANSFORMERS: dict[str, Callable] = {name: partial(build, name) for name in _ROWS}
