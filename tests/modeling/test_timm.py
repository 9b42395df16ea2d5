"""Attention of timm: exact at full and at low rank, compressed, and saved within transformers' TimmWrapper."""

import copy

import pytest
import torch
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from comcat_hf import compress, plan_of
from comcat_hf.errors import RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites, read_ranks
from tests.helpers import assert_close, attention_ranks, images, make_low_rank, outputs, randomize


timm = pytest.importorskip("timm", reason="timm is an optional dependency, and needs a torchvision that loads")

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
MODELS = {
    "vit_tiny_patch16_224": _VIT,
    "deit3_small_patch16_224": _VIT,
    "vit_small_patch14_reg4_dinov2": _VIT,
    "vit_base_patch16_clip_224": _VIT,
    "swin_tiny_patch4_window7_224": _SWIN,
    "eva02_tiny_patch14_224": {**_VIT, "qkv_fused": False},
    "vit_base_patch16_siglip_224": _VIT,
}


def model_of(name, **settings):
    return randomize(timm.create_model(name, num_classes=5, **{**MODELS.get(name, _VIT), **settings})).eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [None, (4, 3), (5, 11)])
def test_what_loses_nothing_is_exact(name, ranks):
    model, inputs = model_of(name), {"x": images()}
    if ranks is not None:
        make_low_rank(model, *ranks)
    expected, sites = outputs(model, inputs), find_sites(model, "attention")
    apply_ranks(model, attention_ranks(model, *ranks) if ranks else {n: dict(s.choices) for n, s in sites.items()})
    assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_is_compressed(name):
    model, inputs = model_of(name), {"x": images()}
    small = compress(model, 0.2, batches=[inputs])
    reached = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert 0.2 <= reached <= 0.205
    assert all(tensor.isfinite().all() for tensor in outputs(small, inputs))


def test_saved_within_transformers(tmp_path):
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=_VIT, num_labels=5)
    model, inputs = randomize(TimmWrapperForImageClassification(config)).eval(), {"pixel_values": images()}
    small = compress(model, 0.3, batches=[inputs])
    assert 0.3 <= plan_of(small).reached <= 0.305
    small.save_pretrained(tmp_path)
    loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path)
    assert read_ranks(loaded) == read_ranks(small)
    assert all(map(torch.equal, outputs(loaded, inputs), outputs(small, inputs)))


def test_what_is_refused():
    path = "blocks.0.attn"
    normed = model_of("vit_tiny_patch16_224", qk_norm=True)
    assert set(find_sites(normed, "attention")[path].choices) == {"vo"}
    with pytest.raises(RankPlanError, match=rf"^{path} is a .*normalises queries and keys"):
        apply_ranks(normed, {path: {"qk": 2}})
    scaled = model_of("vit_tiny_patch16_224", scale_attn_norm=True)
    with pytest.raises(UnsupportedModuleError, match=rf"^{path} is a .*a norm stands between its values"):
        apply_ranks(copy.deepcopy(scaled), {path: {"vo": 2}})
    with pytest.raises(UnsupportedModuleError, match="whose bias it holds apart"):
        find_sites(model_of("eva02_tiny_patch14_224", qkv_fused=True))
    with pytest.raises(UnsupportedModuleError, match=r"timm.*no family describes this class"):
        find_sites(timm.create_model("beit_base_patch16_224", **_VIT))
