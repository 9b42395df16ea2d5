"""The attention classes of transformers that we know, and those we refuse with a reason."""

from collections.abc import Callable
from functools import partial

from torch import nn

from .views import AttentionFamily


def _models(path: str) -> str:
    return f"transformers.models.{path}"


def _refuse_decoder(module: nn.Module) -> str | None:
    if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        return "it is a decoder's attention with a key/value cache (config.is_decoder=True)"
    return None


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

_POSITION_BIAS = "it adds a relative position bias to the scores, which is no product of query and key"
_ROTARY = "it rotates queries and keys by their positions, so the query/key product is not one matrix"
_NORM = "it can normalise queries and keys after their projections, so the query/key product is not one matrix"
_DECODER = "cross attention of a text decoder keeps a key/value cache"

REFUSED: tuple[tuple[str, str], ...] = (
    (_models("beit.modeling_beit.BeitAttention"), _POSITION_BIAS),
    (_models("swin.modeling_swin.SwinAttention"), _POSITION_BIAS),
    (_models("swinv2.modeling_swinv2.Swinv2Attention"), _POSITION_BIAS + ", and scores by cosine"),
    (_models("data2vec.modeling_data2vec_vision.Data2VecVisionAttention"), _POSITION_BIAS),
    (_models("dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention"), _ROTARY),
    (_models("pixtral.modeling_pixtral.PixtralAttention"), _ROTARY),
    (_models("internvl.modeling_internvl.InternVLVisionAttention"), _NORM),
    (_models("bert.modeling_bert.BertCrossAttention"), _DECODER),
)
