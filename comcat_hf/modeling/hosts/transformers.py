"""The attention and MLP classes of transformers that we know, and the attention that we refuse with a reason."""

from collections.abc import Callable
from functools import partial

from torch import nn

from ..families import AttentionFamily, Form, MLPFamily


def _models(path: str) -> str:
    return f"transformers.models.{path}"


_ROTARY = "it rotates queries and keys by their positions, so the query/key product is not one matrix"


def _refuse_decoder(module: nn.Module) -> str | None:
    if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        return "it is a decoder's attention with a key/value cache (config.is_decoder=True)"
    return None


def _refuse_rotary(module: nn.Module) -> str | None:
    return _ROTARY


# One module with q_proj, k_proj, v_proj and o_proj.
_vit: Callable[..., AttentionFamily] = partial(
    AttentionFamily, query="q_proj", key="k_proj", value="v_proj", output="o_proj"
)
# The same, named as CLIP has it.
_clip: Callable[..., AttentionFamily] = partial(
    _vit, output="out_proj", num_heads="num_heads", scaling="scale", dropout="dropout"
)
# Older style: query, key and value in one module, the output projection in a sibling.
_bert: Callable[..., AttentionFamily] = partial(
    AttentionFamily,
    query="query",
    key="key",
    value="value",
    output="output.dense",
    output_in_parent=True,
    head_dim="attention_head_size",
    dropout="dropout_prob",
)

FAMILIES: tuple[AttentionFamily, ...] = (
    _vit(_models("vit.modeling_vit.ViTAttention")),
    _vit(_models("deit.modeling_deit.DeiTAttention")),
    _vit(_models("dinov2.modeling_dinov2.Dinov2Attention")),
    _vit(_models("dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention")),
    _vit(_models("ijepa.modeling_ijepa.IJepaAttention")),
    _vit(_models("vit_msn.modeling_vit_msn.ViTMSNAttention")),
    _vit(_models("vit_mae.modeling_vit_mae.ViTMAEAttention")),
    _clip(_models("clip.modeling_clip.CLIPAttention")),
    _clip(_models("siglip.modeling_siglip.SiglipAttention")),
    _bert(_models("videomae.modeling_videomae.VideoMAESelfAttention")),
    _bert(_models("dpt.modeling_dpt.DPTSelfAttention")),
    _bert(_models("yolos.modeling_yolos.YolosSelfAttention")),
    _bert(_models("bert.modeling_bert.BertSelfAttention"), dropout="dropout", refuse=_refuse_decoder),
)

# Of these only the value/output product is one matrix; adapters go beside both.
PARTIAL: tuple[AttentionFamily, ...] = (
    _vit(
        _models("dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention"),
        num_heads="num_heads",
        dropout="dropout",
        refuse_qk=_refuse_rotary,
        form=Form(rotary="position_embeddings", layout="halves"),
    ),
)

_BIASED = "it adds a bias by relative positions to the scores; compression is not built for it"

# Those that adapters go beside and that are not compressed: the text encoders of diffusion transformers.
ADAPTED: tuple[AttentionFamily, ...] = tuple(
    AttentionFamily(
        _models(path),
        query="q",
        key="k",
        value="v",
        output="o",
        num_heads="n_heads",
        head_dim="key_value_proj_dim",
        dropout="dropout",
        sizes=(("inner_dim",), ()),
        refuse=_refuse_decoder,
        form=Form(compress=_BIASED),
    )
    for path in ("t5.modeling_t5.T5Attention", "umt5.modeling_umt5.UMT5Attention")
)

# One module with both layers.
_fc: Callable[..., MLPFamily] = partial(MLPFamily, first=("fc1",), second="fc2")
# Gate and value are layers of their own, also where a checkpoint holds them as one tensor.
_swiglu: Callable[..., MLPFamily] = partial(MLPFamily, first=("gate_proj", "up_proj"), second="down_proj")
# Older style: both layers in modules of the block, whose output also adds the residual.
_block: Callable[..., MLPFamily] = partial(MLPFamily, first=("intermediate.dense",), second="output.dense")

MLPS: tuple[MLPFamily, ...] = (
    _fc(_models("vit.modeling_vit.ViTMLP")),
    _fc(_models("deit.modeling_deit.DeiTMLP")),
    _fc(_models("dinov2.modeling_dinov2.Dinov2MLP")),
    _swiglu(_models("dinov2.modeling_dinov2.Dinov2SwiGLUFFN")),
    _fc(_models("dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersMLP")),
    _swiglu(_models("dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN")),
    _fc(_models("ijepa.modeling_ijepa.IJepaMLP")),
    _fc(_models("vit_msn.modeling_vit_msn.ViTMSNMLP")),
    _fc(_models("vit_mae.modeling_vit_mae.ViTMAEMLP")),
    _fc(_models("clip.modeling_clip.CLIPMLP")),
    _fc(_models("siglip.modeling_siglip.SiglipMLP")),
    _block(_models("videomae.modeling_videomae.VideoMAELayer")),
    _block(_models("dpt.modeling_dpt.DPTViTLayer")),
    _block(_models("yolos.modeling_yolos.YolosLayer")),
    _block(_models("bert.modeling_bert.BertLayer")),
)

_POSITION_BIAS = "it adds a relative position bias to the scores, which is no product of query and key"
_NORM = "it can normalise queries and keys after their projections, so the query/key product is not one matrix"
_DECODER = "cross attention of a text decoder keeps a key/value cache"

REFUSED: tuple[tuple[str, str], ...] = (
    (_models("beit.modeling_beit.BeitAttention"), _POSITION_BIAS),
    (_models("swin.modeling_swin.SwinAttention"), _POSITION_BIAS),
    (_models("swinv2.modeling_swinv2.Swinv2Attention"), _POSITION_BIAS + ", and scores by cosine"),
    (_models("data2vec.modeling_data2vec_vision.Data2VecVisionAttention"), _POSITION_BIAS),
    (_models("pixtral.modeling_pixtral.PixtralAttention"), _ROTARY),
    (_models("internvl.modeling_internvl.InternVLVisionAttention"), _NORM),
    (_models("bert.modeling_bert.BertCrossAttention"), _DECODER),
)
