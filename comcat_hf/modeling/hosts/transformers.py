"""The attention and MLP classes of transformers that we know, and the attention that we refuse with a reason."""

from collections.abc import Callable
from functools import partial

from torch import nn

from ..families import AttentionFamily, MLPFamily


def _path(name: str) -> str:
    """The import path of a class, from the name of its model's folder and its own: `"vit.ViTAttention"`."""
    folder, _, cls = name.partition(".")
    return f"transformers.models.{folder}.modeling_{_MODULES.get(name, folder)}.{cls}"


def _paths(names: str) -> list[str]:
    return list(map(_path, names.split()))


# Classes in a module that is not named as its folder.
_MODULES = dict.fromkeys(
    (
        "data2vec.Data2VecVisionSelfAttention",
        "data2vec.Data2VecVisionSdpaSelfAttention",
        "data2vec.Data2VecVisionLayer",
    ),
    "data2vec_vision",
)

_ROTARY = "it rotates queries and keys by their positions, so the query/key product is not one matrix"
_NORM = "it normalises queries and keys after their projections, so the query/key product is not one matrix"


def _refuse_decoder(module: nn.Module) -> str | None:
    if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        return "it is a decoder's attention with a key/value cache (config.is_decoder=True)"
    return None


def _refuse_rotary(module: nn.Module) -> str | None:
    return _ROTARY


def _refuse_norm(module: nn.Module) -> str | None:
    return None if isinstance(module.q_norm, nn.Identity) else _NORM


def _scale_of_width(module: nn.Module) -> float:
    return module.attention_head_size**-0.5


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
# Rotary positions: their own forward runs, and the value/output product alone is one matrix.
_rotary: Callable[..., AttentionFamily] = partial(
    _vit, num_heads="num_heads", dropout="dropout", refuse_qk=_refuse_rotary, hosted=True
)

FAMILIES: tuple[AttentionFamily, ...] = (
    *map(
        _vit,
        _paths(
            "vit.ViTAttention deit.DeiTAttention dinov2.Dinov2Attention ijepa.IJepaAttention vit_msn.ViTMSNAttention "
            "dinov2_with_registers.Dinov2WithRegistersAttention vit_mae.ViTMAEAttention beit.BeitAttention "
            "vivit.VivitAttention tipsv2.Tipsv2VisionAttention"
        ),
    ),
    *map(
        _clip,
        _paths(
            "clip.CLIPAttention siglip.SiglipAttention siglip2.Siglip2Attention metaclip_2.MetaClip2Attention "
            "idefics3.Idefics3VisionAttention smolvlm.SmolVLMVisionAttention owlvit.OwlViTAttention "
            "owlv2.Owlv2Attention altclip.AltCLIPAttention chinese_clip.ChineseCLIPVisionAttention "
            "clipseg.CLIPSegAttention x_clip.XCLIPAttention eomt.EomtAttention tipsv2.Tipsv2TextAttention "
            "aimv2.Aimv2Attention"
        ),
    ),
    *map(_bert, _paths("videomae.VideoMAESelfAttention dpt.DPTSelfAttention yolos.YolosSelfAttention")),
    _bert(_path("bert.BertSelfAttention"), dropout="dropout", refuse=_refuse_decoder),
    *map(
        partial(_bert, dropout="attention_dropout", refuse=_refuse_decoder),
        _paths("altclip.AltRobertaSelfAttention chinese_clip.ChineseCLIPTextSelfAttention"),
    ),
    _vit(_path("mllama.MllamaVisionAttention"), num_heads="num_heads", dropout=None),
    # Packed images, windows, biases and reduced keys are the host's own.
    *map(partial(_vit, hosted=True), _paths("radio.RadioAttention swin.SwinAttention segformer.SegformerAttention")),
    *map(
        partial(_bert, dropout=None, scale_of=_scale_of_width),
        _paths("data2vec.Data2VecVisionSelfAttention data2vec.Data2VecVisionSdpaSelfAttention"),
    ),
    *map(
        _rotary,
        _paths("dinov3_vit.DINOv3ViTAttention pixtral.PixtralAttention eomt_dinov3.EomtDinov3Attention"),
    ),
    _rotary(_path("mlcd.MLCDAttention"), output="out_proj", tokens_first=True),
    _rotary(_path("video_llama_3.VideoLlama3VisionAttention"), output="out_proj", dropout="attention_dropout"),
    _rotary(_path("llama4.Llama4VisionAttention"), dropout="attention_dropout"),
    _rotary(
        _path("vjepa2.VJEPA2RopeAttention"),
        query="query",
        key="key",
        value="value",
        output="proj",
        num_heads="num_attention_heads",
        head_dim="attention_head_size",
        dropout="dropout_prob",
    ),
    *map(
        partial(
            _vit,
            output="projection_layer",
            num_heads="num_heads",
            refuse_qk=_refuse_norm,
            hosted=True,
            fixed_width=True,
        ),
        _paths("internvl.InternVLVisionAttention janus.JanusVisionAttention"),
    ),
)

# One module with both layers.
_fc: Callable[..., MLPFamily] = partial(MLPFamily, first=("fc1",), second="fc2")
_up: Callable[..., MLPFamily] = partial(MLPFamily, first=("up_proj",), second="down_proj")
# Gate and value are layers of their own, also where a checkpoint holds them as one tensor.
_swiglu: Callable[..., MLPFamily] = partial(MLPFamily, first=("gate_proj", "up_proj"), second="down_proj")
# Older style: both layers in modules of the block, whose output also adds the residual.
_block: Callable[..., MLPFamily] = partial(MLPFamily, first=("intermediate.dense",), second="output.dense")

MLPS: tuple[MLPFamily, ...] = (
    *map(
        _fc,
        _paths(
            "vit.ViTMLP deit.DeiTMLP dinov2.Dinov2MLP dinov2_with_registers.Dinov2WithRegistersMLP ijepa.IJepaMLP "
            "vit_msn.ViTMSNMLP vit_mae.ViTMAEMLP clip.CLIPMLP siglip.SiglipMLP beit.BeitMLP vivit.VivitMLP "
            "siglip2.Siglip2MLP metaclip_2.MetaClip2MLP idefics3.Idefics3VisionMLP smolvlm.SmolVLMVisionMLP "
            "owlvit.OwlViTMLP owlv2.Owlv2MLP altclip.AltCLIPMLP chinese_clip.ChineseCLIPVisionMLP clipseg.CLIPSegMLP "
            "x_clip.XCLIPMLP eomt.EomtMLP radio.RadioMLP tipsv2.Tipsv2VisionMLP tipsv2.Tipsv2MLP "
            "mllama.MllamaVisionMLP swin.SwinMLP mlcd.MLCDMLP vjepa2.VJEPA2MLP internvl.InternVLVisionMLP "
            "janus.JanusVisionMLP video_llama_3.VideoLlama3VisionMLP llama4.Llama4VisionMLP"
        ),
    ),
    *map(_up, _paths("dinov3_vit.DINOv3ViTMLP eomt_dinov3.EomtDinov3MLP")),
    *map(
        _swiglu,
        _paths(
            "dinov2.Dinov2SwiGLUFFN dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN eomt.EomtSwiGLUFFN "
            "radio.RadioSwiGLUFFN tipsv2.Tipsv2VisionSwiGLUFFN aimv2.Aimv2MLP dinov3_vit.DINOv3ViTGatedMLP "
            "pixtral.PixtralMLP eomt_dinov3.EomtDinov3GatedMLP"
        ),
    ),
    *map(
        _block,
        _paths(
            "videomae.VideoMAELayer dpt.DPTViTLayer yolos.YolosLayer bert.BertLayer altclip.AltRobertaLayer "
            "chinese_clip.ChineseCLIPTextLayer data2vec.Data2VecVisionLayer"
        ),
    ),
)

_COSINE = "it scores by the cosine of queries and keys"
_DECODER = "cross attention of a text decoder keeps a key/value cache"

REFUSED: tuple[tuple[str, str], ...] = (
    (_path("swinv2.Swinv2Attention"), _COSINE),
    (_path("bert.BertCrossAttention"), _DECODER),
)
