"""The attention and MLP classes of transformers that we know, and the attention that we refuse with a reason."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ..families import NORMALISED, ROTATED, AttentionFamily, Form, MLPFamily


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


def _refuse_decoder(module: nn.Module) -> str | None:
    if getattr(module, "is_decoder", False) or getattr(module, "is_causal", False):
        return "it is a decoder's attention with a key/value cache (config.is_decoder=True)"
    return None


def _refuse_rotary(module: nn.Module) -> str | None:
    return ROTATED


def _refuse_norm(module: nn.Module) -> str | None:
    return None if isinstance(module.q_norm, nn.Identity) else NORMALISED


def _refuse_bias_of_queries(module: nn.Module) -> str | None:
    return "it adds a bias to the scores that is a function of the queries" if module.use_rel_pos else None


def _refuse_pooled_queries(module: nn.Module) -> str | None:
    pooled = module.query_stride not in (None, 1, (1, 1))
    return "it takes the largest of several queries, channel by channel" if pooled else None


def _scale(module: nn.Module) -> float:
    return module.scale


def _scale_of_width(module: nn.Module) -> float:
    return module.attention_head_size**-0.5


def _scale_of_head_dim(module: nn.Module) -> float:
    return module.head_dim**-0.5


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
# One layer for queries, keys and values.
_fused: Callable[..., AttentionFamily] = partial(
    AttentionFamily,
    query="qkv",
    key="qkv",
    value="qkv",
    output="proj",
    num_heads="num_heads",
    dropout=None,
    hosted=True,
)
# Cosines and sines that take the columns of either half of a head together.
_HALVES = Form(rotary="position_embeddings", layout="halves")
# Rotary positions: their own forward runs, and the value/output product alone is one matrix.
_rotary: Callable[..., AttentionFamily] = partial(
    _vit, num_heads="num_heads", dropout="dropout", refuse_qk=_refuse_rotary, hosted=True, form=_HALVES
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
    _rotary(
        _path("llama4.Llama4VisionAttention"),
        dropout="attention_dropout",
        form=Form(rotary="freqs_ci"),
        scale_of=_scale_of_head_dim,
    ),
    _rotary(
        _path("vjepa2.VJEPA2RopeAttention"),
        query="query",
        key="key",
        value="value",
        output="proj",
        num_heads="num_attention_heads",
        head_dim="attention_head_size",
        dropout="dropout_prob",
        form=Form(by_itself=True),
        sizes=(("all_head_size",), ()),
    ),
    *map(
        partial(
            _vit,
            output="projection_layer",
            num_heads="num_heads",
            refuse_qk=_refuse_norm,
            hosted=True,
            fixed_width=True,
            norms=("q_norm", "k_norm"),
            sizes=(("embed_dim",), ()),
        ),
        _paths("internvl.InternVLVisionAttention janus.JanusVisionAttention"),
    ),
    *map(
        partial(_fused, refuse_qk=_refuse_rotary, form=_HALVES),
        _paths(
            "qwen2_vl.VisionAttention qwen2_5_vl.Qwen2_5_VLVisionAttention qwen3_vl.Qwen3VLVisionAttention "
            "qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen3_5.Qwen3_5VisionAttention "
            "qwen3_5_moe.Qwen3_5MoeVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention "
            "glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention"
        ),
    ),
    _fused(_path("glm_ocr.GlmOcrVisionAttention"), refuse_qk=_refuse_norm, norms=("q_norm", "k_norm"), form=_HALVES),
    _fused(_path("glm_image.GlmImageVisionAttention")),
    _fused(
        _path("modernbert.ModernBertAttention"),
        **dict.fromkeys(("query", "key", "value"), "Wqkv"),
        output="Wo",
        num_heads="config.num_attention_heads",
        refuse_qk=_refuse_rotary,
        form=_HALVES,
        scale_of=_scale_of_head_dim,
    ),
    *map(
        partial(_fused, output="projection", fixed_width=True),
        _paths(
            "blip.BlipAttention blip_2.Blip2Attention instructblip.InstructBlipAttention "
            "instructblipvideo.InstructBlipVideoAttention"
        ),
    ),
    _fused(_path("florence2.Florence2VisionWindowAttention"), head_dim=None, fixed_width=True),
    *map(
        partial(
            _fused,
            num_heads="num_attention_heads",
            head_dim=None,
            scaling="scale",
            refuse_qk=_refuse_bias_of_queries,
            # One of the two kernels takes the scale from the width.
            scale_of=_scale,
        ),
        _paths(
            "sam.SamVisionAttention sam.SamVisionSdpaAttention sam_hq.SamHQVisionAttention "
            "sam_hq.SamHQVisionSdpaAttention"
        ),
    ),
    _fused(
        _path("sam2.Sam2MultiScaleAttention"),
        num_heads="num_attention_heads",
        head_dim=None,
        refuse_qk=_refuse_pooled_queries,
    ),
    _fused(_path("hiera.HieraMaskUnitAttention"), refuse_qk=_refuse_pooled_queries, fixed_width=True),
    *map(
        partial(_clip, num_heads="num_attention_heads", head_dim=None, dropout=None, hosted=True),
        _paths("sam.SamAttention sam_hq.SamHQAttention"),
    ),
    _vit(_path("sam2.Sam2Attention"), dropout=None, hosted=True),
)

_BIASED = "it adds a bias by relative positions to the scores; compression is not built for it"

# Those that adapters go beside and that are not compressed: the text encoders of diffusion transformers.
ADAPTED: tuple[AttentionFamily, ...] = tuple(
    AttentionFamily(
        path,
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
    for path in _paths("t5.T5Attention umt5.UMT5Attention")
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
            "janus.JanusVisionMLP video_llama_3.VideoLlama3VisionMLP llama4.Llama4VisionMLP qwen2_vl.VisionMlp "
            "blip.BlipMLP blip_2.Blip2MLP instructblip.InstructBlipMLP instructblipvideo.InstructBlipVideoMLP "
            "florence2.Florence2VisionMLP hiera.HieraMlp glm_image.GlmImageVisionMLP"
        ),
    ),
    *map(_up, _paths("dinov3_vit.DINOv3ViTMLP eomt_dinov3.EomtDinov3MLP")),
    *map(
        _swiglu,
        _paths(
            "dinov2.Dinov2SwiGLUFFN dinov2_with_registers.Dinov2WithRegistersSwiGLUFFN eomt.EomtSwiGLUFFN "
            "radio.RadioSwiGLUFFN tipsv2.Tipsv2VisionSwiGLUFFN aimv2.Aimv2MLP dinov3_vit.DINOv3ViTGatedMLP "
            "pixtral.PixtralMLP eomt_dinov3.EomtDinov3GatedMLP qwen2_5_vl.Qwen2_5_VLMLP glm4v.Glm4VisionMlp "
            "glm4v_moe.Glm4vMoeisionMlp glm_ocr.GlmOcrVisionMlp"
        ),
    ),
    *map(
        partial(MLPFamily, first=("linear_fc1",), second="linear_fc2"),
        _paths(
            "qwen3_vl.Qwen3VLVisionMLP qwen3_vl_moe.Qwen3VLMoeVisionMLP qwen3_5.Qwen3_5VisionMLP "
            "qwen3_5_moe.Qwen3_5MoeVisionMLP qwen3_omni_moe.Qwen3OmniMoeVisionMLP"
        ),
    ),
    *map(partial(MLPFamily, first=("lin1",), second="lin2"), _paths("sam.SamMLPBlock sam_hq.SamHQMLPBlock")),
    *map(
        _block,
        _paths(
            "videomae.VideoMAELayer dpt.DPTViTLayer yolos.YolosLayer bert.BertLayer altclip.AltRobertaLayer "
            "chinese_clip.ChineseCLIPTextLayer data2vec.Data2VecVisionLayer"
        ),
    ),
)

# Those that adapters put gains beside and that keep their width: text encoders of diffusion pipelines.
FEED_FORWARDS: tuple[MLPFamily, ...] = (
    *map(partial(MLPFamily, first=("wi",), second="wo"), _paths("t5.T5DenseActDense umt5.UMT5DenseActDense")),
    *map(
        partial(MLPFamily, first=("wi_0", "wi_1"), second="wo"),
        _paths("t5.T5DenseGatedActDense umt5.UMT5DenseGatedActDense"),
    ),
    *map(
        _swiglu,
        _paths(
            "llama.LlamaMLP gemma.GemmaMLP gemma2.Gemma2MLP gemma3.Gemma3MLP mistral.MistralMLP "
            "qwen2.Qwen2MLP qwen2_5_vl.Qwen2MLP qwen3.Qwen3MLP qwen3_vl.Qwen3VLTextMLP"
        ),
    ),
)

_COSINE = "it scores by the cosine of queries and keys"
_LEVIT = "an activation stands between its values and its output, so their product is not one matrix"
_NOT_BUILT = "it attends to reduced keys; this is not built"
_DECODER = "cross attention of a text decoder keeps a key/value cache"

REFUSED: Mapping[str, str] = {
    _path("swinv2.Swinv2Attention"): _COSINE,
    _path("bert.BertCrossAttention"): _DECODER,
    **dict.fromkeys(_paths("levit.LevitAttention levit.LevitAttentionSubsample"), _LEVIT),
    **dict.fromkeys(_paths("pvt.PvtAttention pvt_v2.PvtV2SelfAttention"), _NOT_BUILT),
    _path("florence2.Florence2VisionChannelAttention"): "its channels attend to each other, between two layers",
}
