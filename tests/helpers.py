"""Small real models of every known attention family, with inputs; built from configs, seeded, in eval mode.

Every parameter is random: biases, class tokens and norms would else start at values that hide errors.
"""

import copy
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from comcat_hf.modeling import LowRankAttention, apply_ranks, find_sites, known_sites


# At these sizes further threads only wait for each other.
torch.set_num_threads(1)

Inputs = dict[str, Tensor]
Built = tuple[PreTrainedModel, Inputs]

HEAD_DIM = 16
_VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_PATCHES = 16

# The first lines of a program that runs as if this package was not installed.
WITHOUT_PACKAGE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "comcat_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all parameters random values away from zero, so that no bias, token or norm is at its start value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim < 2 else 1.5 / max(parameter[0].numel(), 1) ** 0.5
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(noise + (parameter if parameter.ndim < 2 else 0))
    return model


def find_class(name: str) -> type:
    """A class of transformers, or one of a model that it does not give at the top: `"qwen3_vl.Qwen3VLVisionModel"`."""
    folder, _, cls = name.rpartition(".")
    if not folder:
        return getattr(transformers, cls)
    kind = "configuration" if cls.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}"), cls)


def build(model_class: str, config_class: str, inputs: Callable[[], Inputs], **settings: Any) -> Built:
    """A seeded model in eval mode from the names of its classes, and inputs for it."""
    attention = settings.pop("attn_implementation", "sdpa")
    # A copy: some configurations change what they are given.
    config = find_class(config_class)(**copy.deepcopy(settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = find_class(model_class)._from_config(config, attn_implementation=attention)
    return randomize(model).eval(), inputs()


def images(batch: int = 2, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def image_inputs() -> Inputs:
    return {"pixel_values": images()}


def masked_image_inputs(extra_tokens: int = 1) -> Inputs:
    """Images with a mask over tokens, which the ViT family of transformers 5 takes; the second sample is shorter."""
    mask = torch.ones(2, _PATCHES + extra_tokens, dtype=torch.long)
    mask[1, -5:] = 0
    return {"pixel_values": images(), "attention_mask": mask}


def text_inputs() -> Inputs:
    """Token ids whose second sample is padded."""
    ids = torch.randint(3, 50, (2, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 1
    ids[0, -1], ids[1, 5] = 2, 2
    return {"input_ids": ids, "attention_mask": mask}


def pair_inputs() -> Inputs:
    return {**text_inputs(), **image_inputs()}


def mae_inputs() -> Inputs:
    # The noise decides which patches are masked: given, so that two runs see the same.
    noise = torch.rand(2, _PATCHES, generator=torch.Generator().manual_seed(3))
    return {"pixel_values": images(), "noise": noise}


def video_inputs() -> Inputs:
    return {"pixel_values": torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(4))}


def _vision(model_class: str, config_class: str, inputs: Callable[[], Inputs] = image_inputs, **settings: Any):
    defaults = dict(_VISION)
    if config_class.startswith("Dinov2"):
        defaults |= {"mlp_ratio": 2}
        del defaults["intermediate_size"]
    return partial(_build_with, model_class, config_class, inputs, {**defaults, **settings})


def _build_with(model_class: str, config_class: str, inputs: Callable[[], Inputs], defaults: dict, **settings: Any):
    return build(model_class, config_class, inputs, **{**defaults, **settings})


def _text(model_class: str, config_class: str, **settings: Any):
    return partial(_build_with, model_class, config_class, text_inputs, {**_TEXT, **settings})


def _pair(model_class: str, config_class: str, **settings: Any):
    text = {**_TEXT, "projection_size": 48} if "Siglip" in model_class else _TEXT
    towers = {"text_config": text, "vision_config": _VISION, **settings}
    return partial(_build_with, model_class, config_class, pair_inputs, towers)


_LABELS = {"num_labels": 5}
_masked = masked_image_inputs
_vit = _vision("ViTForImageClassification", "ViTConfig", _masked, **_LABELS)
_vit_mae = _vision(
    "ViTMAEForPreTraining",
    "ViTMAEConfig",
    mae_inputs,
    decoder_hidden_size=32,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=2,
    decoder_intermediate_size=64,
    mask_ratio=0.5,
)
_dpt = _vision(
    "DPTForSemanticSegmentation",
    "DPTConfig",
    num_hidden_layers=4,
    backbone_out_indices=[0, 1, 2, 3],
    neck_hidden_sizes=[8, 8, 16, 16],
    fusion_hidden_size=8,
    **_LABELS,
)

# By family; call with settings to change the config or attn_implementation: MODELS["vit"](num_hidden_layers=3).
MODELS: dict[str, Callable[..., Built]] = {
    "vit": _vit,
    "deit": _vision("DeiTForImageClassification", "DeiTConfig", partial(_masked, 2), **_LABELS),
    "deit_distilled": _vision("DeiTForImageClassificationWithTeacher", "DeiTConfig", partial(_masked, 2), **_LABELS),
    "dinov2": _vision("Dinov2ForImageClassification", "Dinov2Config", _masked, **_LABELS),
    "dinov2_swiglu": _vision("Dinov2ForImageClassification", "Dinov2Config", _masked, use_swiglu_ffn=True, **_LABELS),
    "dinov2_with_registers": _vision(
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", partial(_masked, 5), **_LABELS
    ),
    "ijepa": _vision("IJepaForImageClassification", "IJepaConfig", partial(_masked, 0), **_LABELS),
    "vit_msn": _vision("ViTMSNForImageClassification", "ViTMSNConfig", _masked, **_LABELS),
    "vit_mae": _vit_mae,
    "clip_vision": _vision("CLIPVisionModelWithProjection", "CLIPVisionConfig", projection_dim=32),
    "clip_text": _text("CLIPTextModelWithProjection", "CLIPTextConfig", projection_dim=32),
    "clip": _pair("CLIPModel", "CLIPConfig", projection_dim=32),
    "clip_classifier": partial(
        _build_with,
        "CLIPForImageClassification",
        "CLIPConfig",
        image_inputs,
        {"text_config": _TEXT, "vision_config": _VISION, "projection_dim": 32, **_LABELS},
    ),
    "siglip_vision": _vision("SiglipVisionModel", "SiglipVisionConfig"),
    "siglip_text": _text("SiglipTextModel", "SiglipTextConfig", projection_size=48),
    "siglip": _pair("SiglipModel", "SiglipConfig"),
    "videomae": _vision(
        "VideoMAEForVideoClassification", "VideoMAEConfig", video_inputs, num_frames=4, tubelet_size=2, **_LABELS
    ),
    "dpt": _dpt,
    "yolos": _vision("YolosForObjectDetection", "YolosConfig", image_size=[32, 32], num_detection_tokens=4, **_LABELS),
    "bert": _text("BertForSequenceClassification", "BertConfig", **_LABELS),
}


def small_vit(**settings: Any) -> Built:
    """ViTForImageClassification and unmasked images."""
    return MODELS["vit"](**settings)[0], image_inputs()


def small_deit(**settings: Any) -> Built:
    return MODELS["deit"](**settings)[0], image_inputs()


def small_deit_distilled(**settings: Any) -> Built:
    """DeiT with class and distillation head and unmasked images."""
    return MODELS["deit_distilled"](**settings)[0], image_inputs()


def small_dinov2(**settings: Any) -> Built:
    return MODELS["dinov2"](**settings)[0], image_inputs()


def small_clip(**settings: Any) -> Built:
    return MODELS["clip"](**settings)


def small_bert(**settings: Any) -> Built:
    return MODELS["bert"](**settings)


def small_bert_mlm(**settings: Any) -> Built:
    """BertForMaskedLM: its decoder is tied to the word embeddings."""
    return _text("BertForMaskedLM", "BertConfig")(**settings)


def tensors_of(output: Any) -> list[Tensor]:
    """Every floating point tensor in a model output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs, **kwargs: Any) -> list[Tensor]:
    return tensors_of(model(**inputs, **kwargs))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    """Same number of tensors, each within `tolerance` times the range of what is expected."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        span = (other.max() - other.min()).item() if other.numel() > 1 else other.abs().item()
        error = (one - other).abs().max().item()
        assert error <= tolerance * span, f"off by {error:.3g} where values span {span:.3g}"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, state: dict[str, Tensor], classes: dict[str, type]) -> None:
    """The model has the parameters and classes that [`state_of`] and [`classes_of`] saw before."""
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert classes_of(model) == classes


def classes_of(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@torch.no_grad()
def make_low_rank(model: nn.Module, qk: int, vo: int) -> None:
    """Give the dense weights products of these ranks per head, so that those ranks lose nothing; biases stay."""
    for site in known_sites(model, "attention").values():
        view, ranks = site.view, {"qk": qk, "vo": vo}
        for pair, linear in (("qk", view.key), ("vo", view.value)):
            if pair in site.choices:
                u, s, v = torch.linalg.svd(linear.weight.unflatten(0, (view.num_heads, -1)), full_matrices=False)
                s[:, ranks[pair] :] = 0
                linear.weight.copy_((u * s.unsqueeze(1) @ v).flatten(0, 1))


def full_ranks(model: nn.Module, scope: str = "attention") -> dict[str, int | dict[str, int]]:
    """A plan at full rank: what it makes of a model must compute the same."""
    return {
        name: dict(site.choices) if site.kind == "attention" else min(_sides(site.linear))
        for name, site in find_sites(model, scope).items()
    }


def attention_ranks(model: nn.Module, qk: int | None = None, vo: int | None = None) -> dict[str, dict[str, int]]:
    """The same ranks for all attention of a model."""
    entry = {pair: rank for pair, rank in (("qk", qk), ("vo", vo)) if rank is not None}
    return {
        name: {pair: rank for pair, rank in entry.items() if pair in site.choices}
        for name, site in known_sites(model, "attention").items()
    }


def compressed(family: str = "vit", qk: int = 5, vo: int = 12, linear: int | None = None, **settings: Any) -> Built:
    """A model with these ranks in all attention and, with `linear`, in all MLPs."""
    model, inputs = MODELS[family](**settings)
    ranks = attention_ranks(model, qk, vo)
    if linear is not None:
        ranks |= dict.fromkeys(find_sites(model, "mlp"), linear)
    apply_ranks(model, ranks)
    return model, inputs


def attentions_of(model: nn.Module) -> list[LowRankAttention]:
    return [module for module in model.modules() if isinstance(module, LowRankAttention)]


def _sides(linear: nn.Linear) -> tuple[int, int]:
    return linear.in_features, linear.out_features
