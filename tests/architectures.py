"""Small real models of the attention classes that `tests.helpers.MODELS` lacks, with inputs; parameters random."""

from functools import partial
from typing import Any

import torch

from tests.helpers import _TEXT, _VISION, Built, build, image_inputs, images, text_inputs


_LABELS = {"num_labels": 5}


def _vision(model_class: str, config_class: str, inputs=image_inputs, **settings: Any):
    return partial(build, model_class, config_class, inputs, **{**_VISION, **settings})


def _text(model_class: str, config_class: str, **settings: Any):
    return partial(build, model_class, config_class, text_inputs, **{**_TEXT, **settings})


def _build_double(*args: Any, **settings: Any) -> Built:
    """In double precision: an output of the model spans less than its hidden states round to."""
    model, inputs = build(*args, **settings)
    return model.double(), {k: v.double() if torch.is_tensor(v) else v for k, v in inputs.items()}


def _naflex_inputs():
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }


def _patches_inputs():
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, 3:] = False
    return {"pixel_values": images(), "patch_attention_mask": mask}


def _video_inputs(frames: int = 4, name: str = "pixel_values"):
    return {name: torch.randn(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(4))}


def _frames_inputs():
    return {"pixel_values": images(4)}


def _tiles_inputs():
    return {
        "pixel_values": torch.randn(1, 1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(4)),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]]]),
    }


def _pixtral_inputs():
    return {"pixel_values": images(), "image_sizes": torch.tensor([[32, 32], [24, 32]])}


def _packed_inputs(patch: int = 8, channels: int = 3, frames: int = 2):
    generator = torch.Generator().manual_seed(6)
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    return torch.randn(24, channels * frames * patch * patch, generator=generator), grid


def _video_llama_inputs():
    pixels, grid = _packed_inputs(frames=1)
    return {"pixel_values": pixels, "grid_thw": grid, "merge_sizes": torch.tensor([1, 1])}


def _tower_inputs(name: str = "hidden_states", frames: int = 2):
    pixels, grid = _packed_inputs(frames=frames)
    return {name: pixels, "grid_thw": grid}


def _sam_inputs():
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": images(),
        "input_points": 32 * torch.rand(2, 2, 1, 2, generator=generator),
        "multimask_output": False,
    }


_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [16, 32],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
_NO_MEAN = {"use_mean_pooling": True, "layer_scale_init_value": 0.5}
_SQUARE = {"image_size": [32, 32], "patch_size": [8, 8]}
_BEIT = {**_NO_MEAN, "num_hidden_layers": 2}

_SAM = {
    "window_size": 2,
    "global_attn_indexes": [1],
    "output_channels": 16,
    "use_rel_pos": True,
    "use_abs_pos": True,
    "mlp_dim": 80,
}
_SAM_WHOLE = {
    "vision_config": {**_VISION, **_SAM, "output_channels": 32, "num_pos_feats": 16},
    "prompt_encoder_config": {
        "hidden_size": 32,
        "image_size": 32,
        "patch_size": 8,
        "image_embedding_size": 4,
        "mask_input_channels": 4,
    },
    "mask_decoder_config": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "mlp_dim": 48,
        "iou_head_depth": 2,
        "iou_head_hidden_dim": 16,
    },
}
_HIERA_OF_SAM = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [32, 32],
    "patch_kernel_size": [3, 3],
    "patch_stride": [2, 2],
    "patch_padding": [1, 1],
    "query_stride": [2, 2],
    "window_positional_embedding_background_size": [4, 4],
    "num_query_pool_stages": 3,
    "blocks_per_stage": [1, 2, 1, 1],
    "embed_dim_per_stage": [16, 32, 48, 64],
    "num_attention_heads_per_stage": [1, 2, 3, 4],
    "window_size_per_stage": [4, 4, 4, 4],
    "global_attention_blocks": [2],
    "mlp_ratio": 2.0,
}
_TOWER = {
    "depth": 2,
    "hidden_size": 48,
    "num_heads": 3,
    "intermediate_size": 320,
    "out_hidden_size": 48,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
_QWEN3 = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
# The towers of vision language models that take packed patches: folder, model, configuration, settings.
_TOWERS = {
    "qwen2_vl_vision": (
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        "Qwen2VLVisionConfig",
        {"embed_dim": 48, "mlp_ratio": 6, "hidden_size": 40},
    ),
    "qwen2_5_vl_vision": (
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl_vision": ("qwen3_vl", "Qwen3VLVisionModel", "Qwen3VLVisionConfig", _QWEN3),
    "qwen3_vl_moe_vision": ("qwen3_vl_moe", "Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig", _QWEN3),
    "qwen3_5_vision": ("qwen3_5", "Qwen3_5VisionModel", "Qwen3_5VisionConfig", _QWEN3),
    "qwen3_5_moe_vision": ("qwen3_5_moe", "Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionConfig", _QWEN3),
    "qwen3_omni_moe_vision": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeVisionEncoder",
        "Qwen3OmniMoeVisionEncoderConfig",
        _QWEN3,
    ),
    "glm4v_vision": ("glm4v", "Glm4vVisionModel", "Glm4vVisionConfig", {"image_size": 32, "attention_bias": True}),
    "glm4v_moe_vision": ("glm4v_moe", "Glm4vMoeVisionModel", "Glm4vMoeVisionConfig", {"image_size": 32}),
    "glm_ocr_vision": ("glm_ocr", "GlmOcrVisionModel", "GlmOcrVisionConfig", {"image_size": 32}),
    "glm_image_vision": ("glm_image", "GlmImageVisionModel", "GlmImageVisionConfig", {"image_size": 32}),
}

# Which modules are meant, where other attention cannot be compressed or most parameters lie elsewhere.
MEANT = {
    "florence2_vision": {"exclude_modules": ["channel_attn"]},
    "glm4v_vision": {"target_modules": ["blocks"]},
    "glm4v_moe_vision": {"target_modules": ["blocks"]},
}

ARCHITECTURES: dict[str, Any] = {
    "beit": _vision("BeitForImageClassification", "BeitConfig", use_relative_position_bias=True, **_BEIT, **_LABELS),
    "beit_shared": _vision("BeitModel", "BeitConfig", use_shared_relative_position_bias=True, **_BEIT),
    "siglip2_vision": _vision("Siglip2VisionModel", "Siglip2VisionConfig", _naflex_inputs, num_patches=16),
    "siglip2_text": _text("Siglip2TextModel", "Siglip2TextConfig", projection_size=48),
    "metaclip2_vision": _vision("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "metaclip2_text": _text("MetaClip2TextModel", "MetaClip2TextConfig"),
    "idefics3_vision": _vision("Idefics3VisionTransformer", "Idefics3VisionConfig", _patches_inputs),
    "smolvlm_vision": _vision("SmolVLMVisionTransformer", "SmolVLMVisionConfig", _patches_inputs),
    "vivit": _vision(
        "VivitForVideoClassification", "VivitConfig", _video_inputs, num_frames=4, tubelet_size=[2, 8, 8], **_LABELS
    ),
    "owlvit_vision": _vision("OwlViTVisionModel", "OwlViTVisionConfig"),
    "owlvit_text": _text("OwlViTTextModel", "OwlViTTextConfig"),
    "owlv2_vision": _vision("Owlv2VisionModel", "Owlv2VisionConfig"),
    "altclip_vision": _vision("AltCLIPVisionModel", "AltCLIPVisionConfig"),
    "altclip_text": _text("AltCLIPTextModel", "AltCLIPTextConfig", project_dim=32),
    "chinese_clip_vision": _vision("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    "chinese_clip_text": _text("ChineseCLIPTextModel", "ChineseCLIPTextConfig", pad_token_id=0),
    "clipseg_vision": _vision("CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "clipseg_text": _text("CLIPSegTextModel", "CLIPSegTextConfig"),
    "xclip_vision": _vision(
        "XCLIPVisionModel",
        "XCLIPVisionConfig",
        _frames_inputs,
        num_frames=4,
        mit_hidden_size=48,
        mit_intermediate_size=80,
        mit_num_hidden_layers=1,
        mit_num_attention_heads=3,
    ),
    "eomt": _vision(
        "EomtForUniversalSegmentation",
        "EomtConfig",
        num_queries=5,
        num_blocks=1,
        mlp_ratio=2,
        num_upscale_blocks=1,
        num_register_tokens=2,
    ),
    "radio": _vision("RadioModel", "RadioConfig", mlp_ratio=2.0, max_img_size=64),
    "tipsv2_vision": _vision("Tipsv2VisionModel", "Tipsv2VisionConfig", mlp_ratio=2),
    "tipsv2_text": _text("Tipsv2TextModel", "Tipsv2TextConfig"),
    "mllama_vision": partial(
        build,
        "MllamaVisionModel",
        "MllamaVisionConfig",
        _tiles_inputs,
        hidden_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=3,
        num_attention_heads=3,
        intermediate_size=80,
        image_size=32,
        patch_size=8,
        max_num_tiles=2,
        vision_output_dim=96,
        intermediate_layers_indices=[0],
        supported_aspect_ratios=[[1, 1], [1, 2]],
    ),
    "aimv2_vision": _vision("Aimv2VisionModel", "Aimv2VisionConfig"),
    "swin": partial(
        build, "SwinForImageClassification", "SwinConfig", image_inputs, **_SWIN, **_LABELS, mlp_ratio=2.0
    ),
    "segformer": partial(
        build, "SegformerForSemanticSegmentation", "SegformerConfig", image_inputs, **_SEGFORMER, **_LABELS
    ),
    "data2vec_vision": _vision(
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        use_relative_position_bias=True,
        **_BEIT,
        **_LABELS,
    ),
    "data2vec_vision_eager": _vision(
        "Data2VecVisionModel",
        "Data2VecVisionConfig",
        use_shared_relative_position_bias=True,
        attn_implementation="eager",
        **_BEIT,
    ),
    "dinov3": _vision("DINOv3ViTModel", "DINOv3ViTConfig", key_bias=True),
    "dinov3_gated": _vision("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True),
    "eomt_dinov3": _vision(
        "EomtDinov3ForUniversalSegmentation",
        "EomtDinov3Config",
        num_queries=5,
        num_blocks=1,
        num_upscale_blocks=1,
        num_register_tokens=2,
    ),
    "pixtral": _vision("PixtralVisionModel", "PixtralVisionConfig", _pixtral_inputs, head_dim=16),
    "mlcd": _vision("MLCDVisionModel", "MLCDVisionConfig"),
    "vjepa2": _vision(
        "VJEPA2Model",
        "VJEPA2Config",
        partial(_video_inputs, name="pixel_values_videos"),
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
        tubelet_size=2,
        mlp_ratio=2,
        pred_hidden_size=36,
        pred_num_attention_heads=3,
        pred_num_hidden_layers=1,
        pred_mlp_ratio=2,
    ),
    "internvl_vision": _vision("InternVLVisionModel", "InternVLVisionConfig", use_qk_norm=False, **_SQUARE),
    "internvl_vision_norm": _vision("InternVLVisionModel", "InternVLVisionConfig", use_qk_norm=True, **_SQUARE),
    "janus_vision": _vision("JanusVisionModel", "JanusVisionConfig", mlp_ratio=2.0),
    "janus_vision_norm": _vision(
        "JanusVisionModel", "JanusVisionConfig", num_attention_heads=1, mlp_ratio=2.0, use_qk_norm=True
    ),
    "video_llama_3": _vision("VideoLlama3VisionModel", "VideoLlama3VisionConfig", _video_llama_inputs),
    "llama4_vision": _vision(
        "Llama4VisionModel",
        "Llama4VisionConfig",
        intermediate_size=192,
        projector_input_dim=48,
        projector_output_dim=48,
        vision_output_dim=48,
    ),
    **{
        name: partial(
            build,
            f"{folder}.{model}",
            f"{folder}.{config}",
            partial(_tower_inputs, "pixel_values", 1) if folder == "glm_image" else _tower_inputs,
            **{**_TOWER, **settings},
        )
        for name, (folder, model, config, settings) in _TOWERS.items()
    },
    "modernbert": _text(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=0,
        sep_token_id=2,
        **_LABELS,
    ),
    "blip_vision": _vision("BlipVisionModel", "BlipVisionConfig", attn_implementation="eager"),
    "blip_2_vision": _vision("Blip2VisionModel", "Blip2VisionConfig"),
    "instructblip_vision": _vision("InstructBlipVisionModel", "InstructBlipVisionConfig"),
    "instructblipvideo_vision": _vision("InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig"),
    "sam_vision": _vision("SamVisionModel", "SamVisionConfig", **_SAM),
    "sam_vision_eager": _vision("SamVisionModel", "SamVisionConfig", attn_implementation="eager", **_SAM),
    "sam_vision_plain": _vision("SamVisionModel", "SamVisionConfig", **{**_SAM, "use_rel_pos": False}),
    "sam_hq_vision": _vision("SamHQVisionModel", "SamHQVisionConfig", **_SAM),
    "sam_hq_vision_eager": _vision("SamHQVisionModel", "SamHQVisionConfig", attn_implementation="eager", **_SAM),
    "sam": partial(build, "SamModel", "SamConfig", _sam_inputs, **_SAM_WHOLE),
    "sam_hq": partial(
        build,
        "SamHQModel",
        "SamHQConfig",
        _sam_inputs,
        **{**_SAM_WHOLE, "mask_decoder_config": {**_SAM_WHOLE["mask_decoder_config"], "vit_dim": 48}},
    ),
    "sam2": partial(
        _build_double,
        "Sam2Model",
        "Sam2Config",
        _sam_inputs,
        vision_config={
            "backbone_config": _HIERA_OF_SAM,
            "backbone_channel_list": [64, 48, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 32,
        },
        **{name: _SAM_WHOLE[name] for name in ("prompt_encoder_config", "mask_decoder_config")},
    ),
    "hiera": partial(
        build,
        "HieraForImageClassification",
        "HieraConfig",
        image_inputs,
        attn_implementation="eager",
        embed_dim=16,
        image_size=[32, 32],
        patch_size=[3, 3],
        patch_stride=[4, 4],
        patch_padding=[1, 1],
        mlp_ratio=2.0,
        depths=[1, 2],
        num_heads=[1, 2],
        num_query_pool=1,
        query_stride=[2, 2],
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        **_LABELS,
    ),
    "sam2_hiera": partial(
        build,
        "Sam2HieraDetModel",
        "Sam2HieraDetConfig",
        image_inputs,
        **_HIERA_OF_SAM,
    ),
    "florence2_vision": partial(
        build,
        "florence2.Florence2VisionBackbone",
        "florence2.Florence2VisionConfig",
        lambda: {"hidden_states": images()},
        depths=[1, 1],
        patch_size=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[3, 1],
        patch_prenorm=[False, True],
        embed_dim=[16, 32],
        num_heads=[1, 2],
        num_groups=[1, 2],
        window_size=4,
        projection_dim=16,
        max_temporal_embeddings=4,
        max_position_embeddings=8,
    ),
}
