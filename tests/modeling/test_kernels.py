"""The kernels behind low-rank attention: masks, dropout, one width, flex attention, compiling and export."""

import pytest
import torch
import transformers.integrations.flex_attention as flex
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.profiler import ProfilerActivity, profile
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from comcat_hf.modeling import apply_ranks, attention_views
from comcat_hf.modeling import lowrank as modules
from tests.helpers import MODELS, assert_close, attention_ranks, attentions_of, compressed, outputs, small_vit


RANKS = {"qk": 5, "vo": 12}


@pytest.fixture
def record(monkeypatch):
    """An attention implementation of its own that keeps what it is called with and then attends as SDPA."""
    calls = []

    def recording(module, query, key, value, attention_mask, **kwargs):
        causal = kwargs.get("is_causal")
        calls.append(
            {
                "widths": (query.shape[-1], key.shape[-1], value.shape[-1]),
                "scaling": kwargs["scaling"],
                "dropout": kwargs["dropout"],
                "causal": module.is_causal if causal is None else causal,
                "mask": None if attention_mask is None else attention_mask.clone(),
            }
        )
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "recording", recording)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "recording", sdpa_mask)

    def run(model, inputs):
        for module in model.modules():
            if hasattr(module, "config"):  # ViTMAE's decoder has one of its own
                module.config._attn_implementation = "recording"
        calls.clear()
        outputs(model, inputs)
        return list(calls)

    return run


def set_dropout(model, p):
    for view in attention_views(model).values():
        dropout = getattr(view.module, view.family.dropout)
        if isinstance(dropout, nn.Dropout):
            dropout.p = p
        else:
            setattr(view.module, view.family.dropout, p)


@pytest.mark.parametrize("family", MODELS)
def test_kernel_gets_what_the_host_gives_it(record, family):
    model, inputs = MODELS[family]()
    set_dropout(model, 0.3)
    expected = record(model, inputs) + record(model.train(), inputs)
    apply_ranks(model, attention_ranks(model, **RANKS))
    found = record(model.eval(), inputs) + record(model.train(), inputs)
    half = len(attentions_of(model))
    assert [call["dropout"] for call in expected] == [0.0] * half + [0.3] * half
    for ours, host in zip(found, expected, strict=True):
        assert ours["widths"] == (12, 12, 12)
        for key in ("scaling", "dropout", "causal"):
            assert ours[key] == host[key]
        assert (ours["mask"] is None) == (host["mask"] is None)
        assert host["mask"] is None or torch.equal(ours["mask"], host["mask"])
    assert ("attention_mask" in inputs) == any(call["mask"] is not None for call in expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["vit", "bert", "clip_text"])
def test_dropout_acts_in_training_only(family, implementation):
    model, inputs = MODELS[family](attn_implementation=implementation)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    set_dropout(model, 0.3)
    apply_ranks(model, attention_ranks(model, **RANKS))
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(model, inputs), strict=True))
    model.train()
    assert any(not torch.allclose(a, b) for a, b in zip(outputs(model, inputs), outputs(model, inputs), strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masked_patches_have_no_influence(implementation):
    model, inputs = compressed(linear=6, attn_implementation=implementation)
    before = model(**inputs).logits
    changed = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    changed["pixel_values"][1, :, 24:] += 3.0  # the last four of the five patches that the mask excludes
    after = model(**changed).logits
    assert torch.allclose(after, before, atol=1e-6)
    del changed["attention_mask"]
    assert not torch.allclose(model(**changed).logits[1], before[1], atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_has_no_influence(implementation):
    model, inputs = compressed("bert", attn_implementation=implementation)
    before = model(**inputs).logits
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][1, 6:] = 7
    assert torch.allclose(model(**changed).logits, before, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_text_does_not_look_ahead(implementation, masked):
    model, inputs = compressed("clip_text", attn_implementation=implementation)
    if not masked:
        del inputs["attention_mask"]
    before = model(**inputs).last_hidden_state
    changed = dict(inputs, input_ids=inputs["input_ids"].clone())
    changed["input_ids"][:, 4] = 9
    after = model(**changed).last_hidden_state
    assert torch.allclose(after[:, :4], before[:, :4], atol=1e-6)
    assert not torch.allclose(after[:, 4:], before[:, 4:], atol=1e-2)


def sdpa_paths(model, inputs):
    with profile(activities=[ProfilerActivity.CPU]) as trace, torch.no_grad():
        model(**inputs)
    return {event.key for event in trace.key_averages() if event.key.startswith("aten::_scaled_dot_product")}


@pytest.mark.parametrize("qk, vo", [(5, 12), (12, 5), (4, None), (None, 4), (8, 8)])
@pytest.mark.parametrize("family", ["vit", "bert", "clip_text"])
def test_unequal_ranks_never_build_the_score_matrix(family, qk, vo):
    model, inputs = compressed(family, qk, vo)
    assert sdpa_paths(model, inputs) == {"aten::_scaled_dot_product_flash_attention_for_cpu"}


def test_without_padding_the_score_matrix_would_be_built(monkeypatch):
    model, inputs = compressed()
    monkeypatch.setattr(modules, "_pad_to_one_width", lambda query, key, value, implementation: (query, key, value))
    assert sdpa_paths(model, inputs) == {"aten::_scaled_dot_product_attention_math"}


@pytest.mark.parametrize("ranks, expected", [((5, 11), 16), ((17, 3), 24), ((8, 8), 8)])
def test_widths_on_a_gpu_are_multiples_of_8(ranks, expected):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda")

    query, value = (torch.ones(1, 2, 3, rank).as_subclass(OnGPU) for rank in ranks)
    assert [t.shape[-1] for t in modules._pad_to_one_width(query, query, value, "sdpa")] == [expected] * 3


@pytest.mark.parametrize("width, expected", [(3, 16), (16, 16), (17, 32), (33, 64)])
def test_flex_widths_are_powers_of_two_from_16(width, expected):
    query, value = torch.ones(1, 2, 3, width), torch.ones(1, 2, 3, 2)
    padded = modules._pad_to_one_width(query, query, value, "flex_attention")
    assert [t.shape[-1] for t in padded] == [expected] * 3
    assert all(t.sum() == original.sum() for t, original in zip(padded, (query, query, value), strict=True))


# Uncompiled, flex attention materialises the scores and says so.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["vit", "bert", "clip_text", "siglip"])
def test_flex_attention_equals_eager(family, monkeypatch):
    # One test below compiles as transformers does; these do not, which differs in speed only.
    monkeypatch.setattr(flex.WrappedFlexAttention, "__call__", lambda self: flex_attention)
    create = masking_utils.create_block_mask
    monkeypatch.setattr(
        masking_utils, "create_block_mask", lambda *args, **kwargs: create(*args, **{**kwargs, "_compile": False})
    )
    model, inputs = compressed(family, attn_implementation="flex_attention")
    eager, _ = compressed(family, attn_implementation="eager")
    assert_close(outputs(model, inputs), outputs(eager, inputs))


def test_compiled_flex_attention_equals_eager():
    # The padded width is that of the dense head: both use one compiled kernel.
    model, inputs = small_vit(attn_implementation="flex_attention", num_hidden_layers=1)
    host, _ = small_vit(attn_implementation="eager", num_hidden_layers=1)
    try:
        dense = outputs(model, inputs)
    except Exception as error:
        pytest.skip(f"the host model does not run with flex_attention here: {error}")
    assert_close(dense, outputs(host, inputs))
    for each in (model, host):
        apply_ranks(each, attention_ranks(each, **RANKS))
    assert_close(outputs(model, inputs), outputs(host, inputs))


def test_implementation_can_be_changed_afterwards():
    model, inputs = compressed()
    before = outputs(model, inputs)
    assert not model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    assert_close(outputs(model, inputs), before)
    attentions = model(**inputs, output_attentions=True).attentions
    assert len(attentions) == 2
    assert torch.allclose(attentions[0].sum(-1), torch.ones(()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend):
    model, inputs = compressed(linear=6)
    expected = outputs(model, inputs)
    torch.compiler.reset()
    assert_close(outputs(torch.compile(model, fullgraph=True, backend=backend), inputs), expected)
