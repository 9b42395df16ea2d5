"""Parameters and MACs against hand-computed numbers, the literature and PyTorch's own counter."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Swinv2Config, Swinv2ForImageClassification

from comcat_hf import RankPlan, compress, count_macs, count_parameters
from comcat_hf.compression.counting import example_inputs, samples_in, trace
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites
from tests.architectures import ARCHITECTURES
from tests.compression.test_allocation import deit_small, without_weights
from tests.helpers import (
    MODELS,
    assert_unchanged,
    classes_of,
    images,
    small_bert,
    small_bert_mlm,
    small_clip,
    small_vit,
    state_of,
)
from tests.modeling.test_diffusers import batch, unet


# The small models of tests/helpers.py: width 48, 3 heads, MLP 80, 16 patches of 8x8x3 and one class token, 5 labels.
D, MLP, PATCHES, LAYERS = 48, 80, 16, 2


def vit_macs(qk=D, vo=D, tokens=PATCHES + 1):
    attention = tokens * (2 * D * qk + 2 * D * vo) + tokens * tokens * (qk + vo)
    return PATCHES * 8 * 8 * 3 * D + LAYERS * (attention + tokens * 2 * D * MLP) + D * 5


def test_parameters_are_counted_by_numel_and_shared_ones_once():
    model, _ = small_bert_mlm()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert count_parameters(model) == model.num_parameters() == sum(p.numel() for p in model.parameters())
    twice = nn.ModuleList([nn.Linear(3, 4)])
    twice.append(twice[0])
    assert count_parameters(twice) == 16
    assert count_parameters(twice, ("0", "1")) == 16
    assert count_parameters(small_vit()[0], ("classifier",)) == D * 5 + 5


def test_macs_of_a_small_vit_by_hand():
    model, inputs = small_vit()
    state, classes = state_of(model), classes_of(model)
    assert count_macs(model) == vit_macs()
    assert count_macs(model, inputs=inputs) == vit_macs(), "one sample, however many are given"
    assert count_macs(model, inputs={"pixel_values": images(7)}) == vit_macs()
    assert count_macs(model, ("classifier",)) == D * 5
    assert_unchanged(model, state, classes)


def test_macs_of_a_compressed_vit_by_hand():
    model, _ = small_vit()
    plan = RankPlan({f"vit.layers.{i}.attention": {"qk": 4, "vo": 8} for i in range(LAYERS)})
    assert count_macs(compress(model, plan=plan)) == vit_macs(qk=3 * 4, vo=3 * 8)
    small = compress(model, plan=RankPlan({"vit.layers.0.mlp.fc1": 6}))
    assert count_macs(model) - count_macs(small) == (PATCHES + 1) * (D * MLP - 6 * (D + MLP))


def test_macs_of_deit_small_are_those_of_the_literature():
    model = without_weights(deit_small)
    assert count_parameters(model) == pytest.approx(22.05e6, rel=1e-3)
    assert count_macs(model) == pytest.approx(4.6e9, rel=0.01)


@pytest.mark.parametrize("family", [name for name in MODELS if name not in ("clip", "siglip")])
def test_macs_agree_with_the_flop_counter(family):
    model, inputs = MODELS[family](attn_implementation="eager")
    assert count_macs(model, inputs=inputs) == flops(model, inputs) // 2 // 2


def flops(model, inputs):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["vit", "bert", "videomae", "dinov2_swiglu"])
def test_macs_of_compressed_models_agree_with_the_flop_counter(family):
    model, inputs = MODELS[family](attn_implementation="eager")
    small = compress(model, 0.5)
    assert count_macs(small, inputs=inputs) == flops(small, inputs) // 2 // 2 < count_macs(model, inputs=inputs)


@pytest.mark.parametrize("family", list(MODELS))
def test_every_family_has_one_sample_of_its_native_size(family):
    model, inputs = MODELS[family]()
    native = example_inputs(model)
    assert {k: v.shape[0] for k, v in native.items()} == dict.fromkeys(native, 1)
    if "input_ids" in native:
        assert native["input_ids"].shape[1] == 16
    if "pixel_values" in native:
        assert native["pixel_values"].shape[1:] == inputs["pixel_values"].shape[1:]
    towers = count_macs(model)
    assert towers > 0
    if family == "clip":
        assert towers > count_macs(model.vision_model) + count_macs(model.text_model)


def test_saved_macs_are_what_the_built_model_saves():
    for model in (small_vit()[0], small_bert()[0]):
        tokens, before = trace(model).tokens, count_macs(model)
        for name, site in find_sites(model).items():
            for choice in site.choices:
                small = compress(model, plan=RankPlan({name: site.entry({choice: 3})}))
                assert before - count_macs(small) == site.saved_macs(choice, 3, tokens[name]), (name, choice)
                assert count_parameters(model) - count_parameters(small) == site.saved_parameters(choice, 3)


def test_names_that_are_none_are_said():
    model, _ = small_vit()
    for count in (count_macs, count_parameters):
        for names in ("classifier", ("vit.layer.0",), ("classifier", 3)):
            with pytest.raises(InvalidValueError, match="names: expected a list, each item the path of a module"):
                count(model, names)
        assert count(model, ["classifier"]) == count(model, {"classifier": 2}.keys()) > 0


def test_a_tensor_is_the_main_input():
    model, inputs = small_vit()
    assert count_macs(model, inputs=inputs["pixel_values"]) == count_macs(model)
    with pytest.raises(InvalidValueError, match=r"or a tensor of 'pixel_values', found a list"):
        count_macs(model, inputs=[inputs["pixel_values"]])


def test_towers_with_other_numbers_of_samples():
    model, inputs = small_clip()
    texts, images = inputs["input_ids"], inputs["pixel_values"]
    one = count_macs(model, inputs={"input_ids": texts[:1], "pixel_values": images[:1]})
    both = {"input_ids": torch.cat([texts] * 2)[:3], "pixel_values": torch.cat([images] * 2)[:3]}
    assert count_macs(model, inputs=both) == one
    # Tiles, or several images of a text.
    more = {"input_ids": texts[:1], "pixel_values": images[:1].repeat(2, 1, 1, 1)}
    assert count_macs(model, inputs=more) > one
    with pytest.raises(InvalidValueError, match=r"found 3 texts and 1 images\. Give one of each"):
        count_macs(model, inputs=both | {"pixel_values": images[:1]})


def test_a_time_step_for_all_samples():
    model = unet()
    one, several = count_macs(model, inputs=batch(1)), batch(4)
    several.pop("timestep")
    assert count_macs(model, inputs={"timestep": torch.zeros(1), **several}) == one
    pooled = {"timestep": torch.zeros(4), "class_labels": None, "timestep_cond": None}
    assert samples_in({**pooled, "pooled": torch.zeros(4, 8), **several}) == 4


def test_what_cannot_be_counted_is_said():
    model, _ = small_vit()
    sizeless = nn.Linear(2, 2)
    sizeless.config = SimpleNamespace()
    with pytest.raises(InvalidValueError, match="inputs="):
        count_macs(sizeless)
    for wrong in ({"pixel_values": torch.zeros(1, 3, 8, 8)}, {"pictures": images()}, {}):
        with pytest.raises(InvalidValueError, match="ViTForImageClassification could not be run"):
            count_macs(model, inputs=wrong)
    clip, _ = small_clip()
    with pytest.raises(InvalidValueError, match="inputs="):
        count_macs(clip, inputs={"pixel_values": images()})


def test_unknown_attention_is_an_error_of_the_whole_and_not_of_the_mlp():
    config = Swinv2Config(
        image_size=32, patch_size=8, embed_dim=32, depths=[1], num_heads=[2], window_size=4, mlp_ratio=2.0
    )
    model = Swinv2ForImageClassification(config)
    with pytest.raises(UnsupportedModuleError, match="Swinv2Attention"):
        count_macs(model)
    mlp = tuple(find_sites(model, "mlp"))
    assert count_macs(model, mlp) == 16 * 2 * 32 * 64


def test_queries_attend_within_windows():
    model, inputs = ARCHITECTURES["swin"]()
    name, site = next(iter(find_sites(model, "attention").items()))
    # 256 tokens in windows of 16: four projections of width 16, two products with 16 keys.
    dense, ranks = 256 * (4 * 16 * 16 + 2 * 16 * 16), {"qk": 4, "vo": 2}
    assert count_macs(model, (name,), inputs) == dense
    saved = [site.saved_macs(pair, rank, trace(model, inputs).tokens[name]) for pair, rank in ranks.items()]
    apply_ranks(model, {name: ranks})
    assert count_macs(model, (name,), inputs) == dense - sum(saved)
