"""The low-rank modules: copies, casts, gradients, training and what they share with what they replace."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat_hf.modeling import LowRankAttention, LowRankLinear, apply_ranks, attention_views, find_sites
from tests.helpers import (
    MODELS,
    assert_close,
    attention_ranks,
    attentions_of,
    classes_of,
    compressed,
    full_ranks,
    outputs,
    small_bert,
    small_vit,
)


RANKS = {"qk": 5, "vo": 12}


def test_is_an_instance_of_the_hosts_class():
    model, _ = small_vit()
    hosts = {name: view.module for name, view in attention_views(model).items()}
    apply_ranks(model, attention_ranks(model, **RANKS))
    for name, host in hosts.items():
        module = model.get_submodule(name)
        assert type(module) is not type(host)
        assert isinstance(module, type(host))
        assert module.config is model.config
        assert "qk_rank=5, vo_rank=12" in repr(module)


@pytest.mark.parametrize("family", ["vit", "bert", "siglip"])
def test_copies(family):
    model, inputs = compressed(family, linear=6)
    expected, file = outputs(model, inputs), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    # The hooks that transformers puts in for attentions can be copied, not pickled.
    outputs(model, inputs, output_attentions=True)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert classes_of(twin) == classes_of(model)
        assert_close(outputs(twin, inputs), expected, 0)
        assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert_close(outputs(model, inputs), expected, 0)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_full_rank_in_double_precision(family):
    model, inputs = MODELS[family]()
    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    expected = outputs(model, inputs)
    apply_ranks(model, full_ranks(model, "model"))
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert_close(outputs(model, inputs), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["cast", "compress"])
def test_half_precision(dtype, first):
    model, inputs = small_vit()
    expected, inputs = outputs(model, inputs), {"pixel_values": inputs["pixel_values"].to(dtype)}
    if first == "cast":
        model.to(dtype)
    apply_ranks(model, full_ranks(model, "model"))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    found = outputs(model, inputs)
    assert {tensor.dtype for tensor in found} == {dtype}
    assert_close([tensor.float() for tensor in found], expected, 0.05)


def test_half_and_float_methods():
    model, inputs = compressed(linear=6)
    expected = outputs(model, inputs)
    pixels = inputs["pixel_values"]
    model.half()
    assert model(pixels.half(), attention_mask=inputs["attention_mask"]).logits.dtype == torch.float16
    assert_close(outputs(model.float(), inputs), expected, 0.05)


@pytest.mark.parametrize("family", ["vit", "bert", "dpt"])
def test_gradients_reach_every_factor(family):
    model, inputs = compressed(family, linear=6)
    model.train()
    model(**inputs).logits.square().sum().backward()
    factors = [m for m in model.modules() if isinstance(m, (LowRankAttention, LowRankLinear))]
    assert factors
    for module in factors:
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad
            assert parameter.grad.abs().sum() > 0, name


def test_frozen_stays_frozen():
    model, _ = small_vit()
    model.vit.requires_grad_(False)
    attention = model.vit.layers[1].attention
    attention.q_proj.requires_grad_(True)
    apply_ranks(model, attention_ranks(model, qk=5) | dict.fromkeys(find_sites(model, "mlp"), 6))
    layers = model.vit.layers
    assert not any(p.requires_grad for p in layers[0].parameters())
    # What takes the place of something trained is trained; the pair that was left alone is as it was.
    assert layers[1].attention.q_proj.weight.requires_grad
    assert not any(p.requires_grad for p in layers[1].attention.v_proj.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_gradient_checkpointing_training_step():
    gradients = []
    for checkpointing in (False, True):
        model, inputs = compressed(linear=6)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        loss = model(**inputs, labels=torch.tensor([1, 3])).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        before = outputs(model.eval(), inputs)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert not torch.allclose(outputs(model, inputs)[0], before[0])
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("pair", ["qk", "vo"])
@pytest.mark.parametrize("family", ["vit", "bert", "clip_vision"])
def test_one_pair_alone_leaves_the_other_untouched(family, pair):
    model, inputs = MODELS[family]()
    expected = outputs(model, inputs)
    before = {
        name: {"qk": [view.query, view.key], "vo": [view.value, view.output]}
        for name, view in attention_views(model).items()
    }
    values = {
        name: {p: [[t.clone() for t in linear.state_dict().values()] for linear in pairs[p]] for p in pairs}
        for name, pairs in before.items()
    }
    apply_ranks(model, attention_ranks(model, **{pair: 16}))
    other = {"qk": "vo", "vo": "qk"}[pair]
    kept = {id(module) for module in model.modules()}
    for name, pairs in before.items():
        assert all(id(linear) in kept for linear in pairs[other])
        assert not any(id(linear) in kept for linear in pairs[pair])
        for linear, tensors in zip(pairs[other], values[name][other], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(linear.state_dict().values(), tensors, strict=True))
    assert_close(outputs(model, inputs), expected)


def test_query_bias_stays_and_the_other_two_go():
    model, _ = compressed()
    for attention in attentions_of(model):
        assert attention.q_proj.bias.shape == (3 * 5,)
        assert attention.k_proj.bias is None
        assert attention.v_proj.bias is None
        assert attention.o_proj.weight.shape == (48, 3 * 12)


def test_factors_keep_the_names_of_what_they_replace():
    # An unaware process then stops on a size mismatch.
    model, _ = small_bert()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    apply_ranks(model, attention_ranks(model, **RANKS) | dict.fromkeys(find_sites(model, "mlp"), 6))
    small = {name: tensor.shape for name, tensor in model.state_dict().items()}
    added = set(small) - set(shapes)
    assert all(name.endswith(".first_factor.weight") for name in added)
    assert set(shapes) - set(small) == {n for n in shapes if n.endswith(("key.bias", "value.bias"))}
    assert any(small[name] != shapes[name] for name in set(small) & set(shapes))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.sampled_from([(), (2,), (2, 3)]))
def test_low_rank_linear(inputs, outputs_, rank, bias, batch):
    module = LowRankLinear(inputs, outputs_, rank, bias=bias)
    x = torch.randn(*batch, inputs)
    weight = module.weight @ module.first_factor.weight
    expected = x @ weight.T + (module.bias if bias else 0)
    assert torch.allclose(module(x), expected, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) == rank * (inputs + outputs_) + bias * outputs_
    assert f"rank={rank}, bias={bias}" in repr(module)
