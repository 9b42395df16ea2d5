"""Mode "customize" on one attention module: the formula written out, processors, scales, merging, compiling."""

import copy
import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from comcat_hf import ComCATConfig, initialize_comcat_weights
from comcat_hf.closed_forms.bases import head_basis
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from comcat_hf.modeling.stand_in import common_width, fold_heads, pad_heads, split_heads
from comcat_hf.tuners.residual.layer import CustomizeLayer
from tests.helpers import randomize


HEADS, HEAD_DIM, WIDTH = 3, 8, 24
FULL = {"qk_rank": 2, "vo_rank": 3}
CORE = {"qk_rank": 3, "vo_rank": 2, "core": True}


class Host(nn.Module):
    """A model that is one attention module of diffusers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attn = Attention(**{"query_dim": WIDTH, "heads": HEADS, "dim_head": HEAD_DIM, **settings})

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.attn(*args, **kwargs)


def host(*adapters: dict[str, Any], **settings: Any) -> Host:
    """With adapters named "a", "b", … that are random and all active."""
    names = [chr(ord("a") + index) for index in range(len(adapters))]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        torch.manual_seed(0)
        model = randomize(Host(**settings)).eval()
        for name, adapter in zip(names, adapters, strict=True):
            inject_adapter_in_model(ComCATConfig(mode="customize", init_weights=False, **adapter), model, name)
    if adapters:
        model.attn.set_adapter(names)
    return model


def states(batch: int = 2, tokens: int = 5, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _basis(rows: Tensor, heads: int, rank: int) -> Tensor:
    return head_basis(rows.unflatten(0, (heads, -1)), rank).float()


def _with_bias(linear: nn.Linear) -> Tensor:
    return linear.weight if linear.bias is None else torch.cat([linear.weight, linear.bias[:, None]], dim=1)


def written_out(
    layer: CustomizeLayer, x: Tensor, y: Tensor, scales: Sequence[float], scale: float, mask: Tensor | None = None
) -> Tensor:
    """The paper's form, with every score matrix: `softmax(s (q k^T + sum t q' k'^T)) v D + sum t (attn v') D'`."""
    dense, heads = layer.base_layer, layer.base_layer.heads
    linear_q, linear_k, linear_v, linear_o = dense.to_q, dense.to_k, dense.to_v, dense.to_out[0]
    query, key, value = (_heads(f(z), heads) for f, z in ((linear_q, x), (linear_k, y), (linear_v, y)))
    adapters = [(layer.comcat_factors[n], t) for n, t in zip(layer.active_adapters, scales, strict=True)]
    moved = query
    for factors, t in adapters:
        if factors.qk_core is not None:
            rank = factors.qk_core.weight.shape[-1]
            first, second = (_basis(_with_bias(linear), heads, rank) for linear in (linear_q, linear_k))
            moved = moved + t * query @ (first @ factors.qk_core.weight @ second.mT)
    scores = moved @ key.mT
    for factors, t in adapters:
        if factors.query is not None:
            scores = scores + t * _heads(factors.query(x), heads) @ _heads(factors.key(y), heads).mT
    scores = scores * scale
    if mask is not None:
        scores = scores + mask
    attention = scores.softmax(-1)
    attended = attention @ value
    moved = attended
    for factors, t in adapters:
        if factors.vo_core is not None:
            rank = factors.vo_core.weight.shape[-1]
            first = _basis(_with_bias(linear_v), heads, rank)
            last = _basis(linear_o.weight.T, heads, rank)
            moved = moved + t * attended @ (first @ factors.vo_core.weight @ last.mT)
    output = linear_o(moved.transpose(1, 2).flatten(2))
    for factors, t in adapters:
        if factors.value is not None:
            output = output + t * factors.output(
                (attention @ _heads(factors.value(y), heads)).transpose(1, 2).flatten(2)
            )
    return output


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return (found - expected).abs().max().item() <= tolerance * max(expected.abs().max().item(), 1e-3)


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "comcat_" in name}


_rank = st.one_of(st.none(), st.integers(1, 4))
_adapter = st.tuples(_rank, _rank, st.booleans()).filter(lambda drawn: drawn[:2] != (None, None))


@settings(max_examples=80, deadline=None)
@given(
    adapters=st.lists(_adapter, min_size=1, max_size=3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 8]),
    tokens=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cross=st.one_of(st.none(), st.just(10)),
    bias=st.booleans(),
    masked=st.booleans(),
    scale_qk=st.booleans(),
    processor=st.sampled_from([AttnProcessor2_0, AttnProcessor, lambda: SlicedAttnProcessor(1)]),
    scales=st.lists(st.sampled_from([-0.7, 0.0, 0.3, 1.0, 2.0]), min_size=3, max_size=3),
)
@example(  # every gradient but that of y is zero, by cancelling
    adapters=[(2, 3, False)],
    heads=1,
    head_dim=6,
    tokens=(1, 1),
    cross=10,
    bias=False,
    masked=False,
    scale_qk=False,
    processor=AttnProcessor2_0,
    scales=[0.0] * 3,
)
def test_the_formula(adapters, heads, head_dim, tokens, cross, bias, masked, scale_qk, processor, scales):
    model = host(
        *({"qk_rank": qk, "vo_rank": vo, "core": core} for qk, vo, core in adapters),
        heads=heads,
        dim_head=head_dim,
        cross_attention_dim=cross,
        bias=bias,
        scale_qk=scale_qk,
    )
    layer = model.attn
    layer.base_layer.set_processor(processor())
    # The kernel of AttnProcessor2_0 is given no scale, whatever scale_qk says.
    scale = 1.0 if not scale_qk and processor is not AttnProcessor2_0 else head_dim**-0.5
    scales = scales[: len(adapters)]
    for name, value in zip(layer.active_adapters, scales, strict=True):
        layer.set_scale(name, value)
    x = states(tokens=tokens[0]).requires_grad_()
    y = x if cross is None else states(tokens=tokens[1], width=cross, seed=2).requires_grad_()
    length = y.shape[1]
    mask = torch.zeros(2, 1, length)
    mask[1, 0, length // 2 + 1 :] = -10000.0
    given = {"attention_mask": mask} if masked else {}
    if cross is not None:
        given["encoder_hidden_states"] = y
    found = model(x, **given)
    expected = written_out(layer, x, y, scales, scale, mask[:, None] if masked else None)
    assert near(found, expected)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    # `y` among them: its gradient through the dense values says how large the terms are that cancel in the others.
    wanted = list(dict.fromkeys([x, y, *factors_of(model).values()]))
    one, other = (
        torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True) for output in (found, expected)
    )
    largest = max(g.norm().item() for g in other if g is not None)
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            # With one key the scores have no gradient but rounding.
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5 * largest


_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "no_output_bias": {"out_bias": False},
    "group_norm": {"norm_num_groups": 4},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.7},
    "upcast": {"upcast_attention": True, "upcast_softmax": True},
    "norm_cross": {"cross_attention_dim": 16, "cross_attention_norm": "layer_norm"},
    "group_norm_cross": {
        "cross_attention_dim": 16,
        "cross_attention_norm": "group_norm",
        "cross_attention_norm_num_groups": 4,
    },
    "spatial": {"spatial_norm_dim": 6, "norm_num_groups": 4, "residual_connection": True},
    "out_dim": {"out_dim": 16},
    "dropout": {"dropout": 0.4},
}


def _inputs(option: str, image: bool = False) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if option == "spatial":
        return (states(tokens=16).mT.unflatten(2, (4, 4)).contiguous(),), {"temb": torch.randn(2, 6, 4, 4)}
    if "cross" in option:
        return (states(),), {"encoder_hidden_states": states(tokens=4, width=16, seed=5)}
    if image:
        return (states(tokens=16).mT.unflatten(2, (4, 4)).contiguous(),), {}
    return (states(),), {}


@pytest.mark.parametrize(
    ("option", "image"),
    # diffusers gives images back with the channels they came with, so none of another width.
    [(option, image) for option in _OPTIONS for image in (False, True) if (option, image) != ("out_dim", True)],
)
def test_what_the_host_does_around_attention_stays(option, image):
    """The adapter as a module of its own: a merged one is the host's own class with other weights."""
    if option == "spatial":
        # SpatialNorm makes groups of 32 channels.
        model = host(FULL, CORE, **_OPTIONS[option], query_dim=32, heads=2)
        args, kwargs = (torch.randn(2, 32, 4, 4),), {"temb": torch.randn(2, 6, 4, 4)}
    else:
        model = host(FULL, CORE, **_OPTIONS[option])
        args, kwargs = _inputs(option, image)
    dense = model.attn.base_layer(*args, **kwargs)
    found = model(*args, **kwargs)
    assert found.shape == dense.shape and not near(found, dense, 1e-2)
    processors = [AttnProcessor(), SlicedAttnProcessor(2), AttnProcessor2_0()]
    for processor in processors:
        if option == "spatial" and isinstance(processor, SlicedAttnProcessor):
            continue  # it takes no temb
        model.attn.base_layer.set_processor(processor)
        assert near(model(*args, **kwargs), found)
    model.attn.merge()
    merged = model.attn.merged_layer
    assert type(merged) is Attention and near(merged(*args, **kwargs), found)
    model.attn.unmerge()
    # Written out for what stands around: run the host with residuals of zero, and with none.
    with torch.no_grad():
        for name, parameter in factors_of(model).items():
            if name.endswith((".key.weight", ".output.weight")) or "core" in name:
                parameter.zero_()
    assert near(model(*args, **kwargs), dense)


def test_options_reach_the_output():
    """Residual, rescaling and the norms, against the formula."""
    model = host(FULL, CORE, norm_num_groups=4, residual_connection=True, rescale_output_factor=1.7, bias=True)
    x = states()
    normed = model.attn.base_layer.group_norm(x.mT).mT
    expected = (written_out(model.attn, normed, normed, (1, 1), HEAD_DIM**-0.5) + x) / 1.7
    assert near(model(x), expected)


def test_output_dropout_is_the_hosts():
    model = host(FULL, dropout=0.5).train()
    torch.manual_seed(7)
    found = model(states())
    torch.manual_seed(7)
    expected = F.dropout(written_out(model.attn, states(), states(), (1,), HEAD_DIM**-0.5), 0.5)
    assert near(found, expected)


class TestProcessors:
    @pytest.mark.parametrize("settings", [{}, {"bias": True}, {"cross_attention_dim": 16}])
    def test_fused_projections(self, settings):
        model = host(FULL, CORE, **settings)
        args = (states(), states(tokens=4, width=16, seed=2) if "cross_attention_dim" in settings else None)
        expected, dense = model(*args), model.attn.base_layer(*args)
        model.attn.base_layer.fuse_projections()
        model.attn.base_layer.set_processor(FusedAttnProcessor2_0())
        assert near(model(*args), expected)
        model.attn.merge()
        assert near(model(*args), expected)
        assert not any(p.requires_grad for p in model.attn.merged_layer.parameters())
        model.attn.unmerge()
        assert near(model(*args), expected)
        model.attn.enable_adapters(False)
        assert near(model(*args), dense)

    @pytest.mark.parametrize(
        ("processor", "adapter"),
        [
            (lambda: IPAdapterAttnProcessor(WIDTH, WIDTH), FULL),
            (lambda: IPAdapterAttnProcessor2_0(WIDTH, WIDTH), CORE),
            (PAGIdentitySelfAttnProcessor2_0, {"vo_rank": 2}),
            (PAGIdentitySelfAttnProcessor2_0, {"head_gains": True}),
        ],
    )
    def test_others_are_refused_by_name(self, processor, adapter):
        model = host(adapter)
        expected = model(states())
        processor = processor()
        model.attn.base_layer.set_processor(processor)
        name = type(processor).__name__
        why = "does not compute plain" if "PAG" in name else "calls its kernel a second time"
        with pytest.raises(UnsupportedModuleError, match=rf"{name} {why}.*AttnProcessor2_0"):
            model(states())
        with pytest.raises(UnsupportedModuleError, match=name):
            model.attn.merge()
        assert not model.attn.merged
        model.attn.base_layer.set_processor(AttnProcessor2_0())
        assert torch.equal(model(states()), expected)

    def test_attention_that_is_not_plain_is_refused(self):
        for options, words in (({"added_kv_proj_dim": 8}, "added_kv_proj_dim"), ({"kv_heads": 1}, "fewer heads")):
            for adapter in (FULL, {"head_gains": True}):
                with pytest.raises(UnsupportedModuleError, match=words):
                    host(adapter, **options)

    @pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor, lambda: SlicedAttnProcessor(1)])
    def test_norms_of_queries_and_keys(self, processor):
        """Some processors apply them, others pass them over; further columns have none, cores stand behind."""
        model = host({**FULL, "scale": 0.6}, {"qk_rank": 2, "core": True}, qk_norm="rms_norm")
        layer, dense, x = model.attn, model.attn.base_layer, states()
        layer.base_layer.set_processor(processor())
        query, key, value = (_heads(f(x), HEADS) for f in (dense.to_q, dense.to_k, dense.to_v))
        if processor is AttnProcessor2_0:
            query, key = dense.norm_q(query), dense.norm_k(key)
        full, core = layer.comcat_factors["a"], layer.comcat_factors["b"].qk_core
        first, last = layer.bases("qk", 2)
        scores = (query + query @ (first @ core.weight @ last.mT)) @ key.mT
        scores = scores + 0.6 * _heads(full.query(x), HEADS) @ _heads(full.key(x), HEADS).mT
        attention = (scores * HEAD_DIM**-0.5).softmax(-1)
        expected = dense.to_out[0]((attention @ value).transpose(1, 2).flatten(2))
        expected = expected + 0.6 * full.output((attention @ _heads(full.value(x), HEADS)).transpose(1, 2).flatten(2))
        assert near(model(x), expected)
        layer.set_adapter("a")
        expected = model(x)
        layer.merge()
        assert near(model(x), expected)
        layer.base_layer.set_processor(IPAdapterAttnProcessor2_0(WIDTH, WIDTH))
        with pytest.raises(UnsupportedModuleError, match="IPAdapterAttnProcessor2_0 calls its kernel a second time"):
            model(x)


class TestKernel:
    """One call of the fused kernel, with one width, and no scores in memory."""

    @pytest.fixture
    def calls(self, monkeypatch):
        calls, attend = [], F.scaled_dot_product_attention

        def record(query, key, value, **kwargs):
            calls.append((query.shape, key.shape, value.shape, kwargs))
            return attend(query, key, value, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", record)
        return calls

    @pytest.mark.parametrize(
        ("adapters", "width"),
        [
            ([FULL], 16),
            ([{"qk_rank": 4}], 16),
            ([{"vo_rank": 8}, {"vo_rank": 1}], 24),
            ([FULL, {"qk_rank": 4}, {"vo_rank": 1}], 16),
            ([CORE], 8),
            ([CORE, CORE, {"qk_rank": 1}], 16),
        ],
    )
    def test_one_call(self, calls, adapters, width):
        model = host(*adapters)
        for _ in range(2):
            calls.clear()
            model(states())
            assert len(calls) == 1
            assert [shape[-1] for shape in calls[0][:3]] == [width] * 3
            assert [shape[1] for shape in calls[0][:3]] == [HEADS] * 3
            assert calls[0][3].get("scale") is None
            model.attn.merge()

    def test_no_score_matrix_in_memory(self):
        model, tokens, largest = host(FULL), 64, 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                nonlocal largest
                result = func(*args, **(kwargs or {}))
                outputs = result if isinstance(result, tuple | list) else [result]
                largest = max([largest, *(out.numel() for out in outputs if isinstance(out, Tensor))])
                return result

        with Watch():
            model(states(tokens=tokens)).sum().backward()
        assert largest < 2 * HEADS * tokens**2

    def test_widths_are_multiples_of_eight(self):
        found = [common_width(q, v) for q, v in ((41, 40), (40, 42), (40, 40), (64, 73))]
        assert found == [48, 48, 40, 80]

    def test_filling_up_heads(self):
        x = states(width=12)
        assert torch.equal(split_heads(pad_heads(x, 3, 6), 3)[..., :4], split_heads(x, 3))
        assert not split_heads(pad_heads(x, 3, 6), 3)[..., 4:].any()
        assert torch.equal(pad_heads(x, 3, 4), x)
        parts = [split_heads(x, 3), split_heads(-x, 3)]
        assert torch.equal(fold_heads(parts, 8), torch.cat(parts, dim=-1).flatten(-2))


class TestScales:
    def test_set_scale_is_relative_to_the_configuration(self):
        model = host({**FULL, "scale": 2.0}, FULL)
        layer, x = model.attn, states()
        assert near(model(x), written_out(layer, x, x, (2, 1), HEAD_DIM**-0.5))
        layer.set_scale("a", 0.25)
        assert near(model(x), written_out(layer, x, x, (0.5, 1), HEAD_DIM**-0.5))
        layer.set_scale("nobody", 0.25)
        assert near(model(x), written_out(layer, x, x, (0.5, 1), HEAD_DIM**-0.5))

    @pytest.mark.parametrize("factor", [0, 0.0, 0.3, 1, 3, -1.1])
    def test_scaling_a_layer_and_back(self, factor):
        model = host({**FULL, "scale": 0.7}, CORE)
        layer, x = model.attn, states()
        layer.set_scale("b", 1.3)
        expected = model(x)
        layer.scale_layer(factor)
        assert near(model(x), written_out(layer, x, x, (0.7 * factor, 1.3 * factor), HEAD_DIM**-0.5))
        if factor == 0:
            # As diffusers undoes it: one name after the other.
            for name in layer.active_adapters:
                layer.set_scale(name, 1.0)
        else:
            layer.unscale_layer(factor)
        assert torch.equal(model(x), expected)
        assert layer.scaling == {"a": 0.7, "b": 1.3}
        layer.set_scale("a", 1.0)
        assert layer.scaling["a"] == 0.7

    def test_what_was_scaled_comes_back_whatever_happened_in_between(self):
        layer = host({**FULL, "scale": 0.7}, FULL, FULL).attn
        layer.set_adapter(["a", "b"])
        layer.scale_layer(0.1)
        layer.scale_layer(0.3)
        layer.set_adapter(["b", "c"])
        layer.set_initial_scale("b", 3.0)
        layer.unscale_layer(0.1)
        assert layer.scaling == {"a": 0.7 * 0.3, "b": 3.0 * 0.3, "c": 1.0}
        layer.unscale_layer(0.3)
        assert layer.scaling == {"a": 0.7, "b": 3.0, "c": 1.0}
        layer.set_adapter("b")
        for factor in (0.1, 0.7, 3.0):
            layer.scale_layer(factor)
        # Only what is active is scaled, and all of it taken back at once.
        assert layer.scaling["a"] == 0.7 and layer.scaling["b"] == pytest.approx(3.0 * 0.21)
        layer.unscale_layer()
        assert layer.scaling == {"a": 0.7, "b": 3.0, "c": 1.0}

    def test_a_zero_is_taken_back_for_one_adapter_alone(self):
        layer = host(FULL, FULL).attn
        layer.set_scale("a", 0.4)
        layer.scale_layer(0)
        layer.set_scale("a", 1.0)
        assert layer.scaling == {"a": 0.4, "b": 0.0}
        layer.set_scale("b", 2.0)
        layer.set_scale("b", 1.0)
        assert layer.scaling == {"a": 0.4, "b": 1.0}

    def test_a_merged_adapter_keeps_its_scale(self):
        model = host(FULL)
        model.attn.merge()
        merged, x = model(states()), states()
        model.attn.set_scale("a", 0.5)
        assert torch.equal(model(x), merged) and model.attn.scaling == {"a": 0.5}
        assert near(model.attn.get_base_layer()(x), merged)
        model.attn.unmerge()
        assert near(model(x), written_out(model.attn, x, x, (0.5,), HEAD_DIM**-0.5))

    def test_a_scale_may_change_before_the_backward(self):
        model, other = host(FULL, CORE), host(FULL, CORE)
        for one in (model, other):
            one.attn.scale_layer(0.5)
        expected = torch.autograd.grad(other(states()).square().sum(), list(factors_of(other).values()))
        output = model(states())
        model.attn.unscale_layer(0.5)
        found = torch.autograd.grad(output.square().sum(), list(factors_of(model).values()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class TestCompiling:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_scale_may_change(self):
        model, counter = host(FULL, CORE), CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = states()
        for scale in (1.0, 0.5, 0.0, 2.0):
            model.attn.set_scale("a", scale)
            model.attn.set_scale("b", 1 - scale)
            assert near(compiled(x), model(x))
        model.attn.scale_layer(0.3)
        assert near(compiled(x), model(x))
        model.attn.unscale_layer(0.3)
        with torch.no_grad():
            for parameter in factors_of(model).values():
                parameter.mul_(0.5)
        assert near(compiled(x), model(x))
        assert counter.frame_count == 1

    def test_merging_and_disabling_compile_once_each(self):
        model, counter = host(FULL), CompileCounter()
        compiled, x = torch.compile(model, backend=counter, fullgraph=True), states()
        expected = compiled(x)
        for _ in range(2):
            model.attn.merge()
            assert near(compiled(x), expected)
            model.attn.unmerge()
            assert near(compiled(x), expected)
            model.attn.enable_adapters(False)
            assert near(compiled(x), model.attn.base_layer(x))
            model.attn.enable_adapters(True)
        assert counter.frame_count <= 4


class TestMerging:
    @pytest.mark.parametrize(
        ("adapters", "settings"),
        [
            ([FULL], {"scale_qk": False}),
            ([CORE], {"bias": True, "cross_attention_dim": 16}),
            ([FULL, CORE, {"vo_rank": 1}], {}),
            ([FULL, CORE, {"vo_rank": 1}], {"bias": True, "cross_attention_dim": 16}),
        ],
    )
    def test_exact_and_undone(self, adapters, settings):
        model = host(*adapters, **settings)
        model.attn.set_scale("a", 0.3)
        args = (states(), states(tokens=4, width=16, seed=2) if "cross_attention_dim" in settings else None)
        expected, state = model(*args), {k: v.clone() for k, v in model.state_dict().items()}
        model.attn.merge()
        assert model.attn.merged and near(model(*args), expected)
        model.attn.unmerge()
        assert torch.equal(model(*args), expected)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert model.state_dict().keys() == state.keys()

    def test_cores_widen_nothing(self):
        model = host(CORE, CORE)
        model.attn.merge()
        dense, merged = model.attn.base_layer.state_dict(), model.attn.merged_layer.state_dict()
        assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in dense.items()}
        plain = Host().attn
        plain.load_state_dict(merged)
        assert near(plain(states()), model(states()))
        assert torch.equal(merged["to_k.weight"], dense["to_k.weight"])
        assert torch.equal(merged["to_v.weight"], dense["to_v.weight"])

    def test_one_after_the_other(self):
        model = host(FULL, CORE)
        expected = model(states())
        model.attn.merge(adapter_names=["a"])
        model.attn.merge(adapter_names=["b"])
        assert model.attn.merged_adapters == ["a", "b"] and near(model(states()), expected)

    def test_what_is_shared_is_left_as_it_was(self):
        model = host(FULL, norm_num_groups=4)
        dense = model.attn.base_layer
        dense.group_norm.weight.requires_grad_(True)
        model.attn.merge()
        assert model.attn.merged_layer.group_norm is dense.group_norm
        assert not any(p.requires_grad for n, p in model.attn.merged_layer.named_parameters() if n.startswith("to_"))
        model.attn.unmerge()
        assert dense.group_norm.weight.requires_grad
        assert (dense.heads, dense.scale) == (HEADS, HEAD_DIM**-0.5)

    def test_nans(self):
        model = host(FULL, FULL)
        with torch.no_grad():
            model.attn.comcat_factors["b"].key.weight[0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter b seems"):
            model.attn.merge(safe_merge=True)
        assert not model.attn.merged
        model.attn.merge(safe_merge=True, adapter_names=["a"])
        assert model.attn.merged_adapters == ["a"]

    def test_what_is_merged_cannot_be_deleted(self):
        model = host(FULL, CORE)
        expected = model(states())
        model.attn.merge()
        with pytest.raises(InvalidValueError, match="a is fused"):
            model.attn.delete_adapter("a")
        model.attn.unmerge()
        assert torch.equal(model(states()), expected)


class TestBesideLora:
    def _both(self, target: str = "to_out.0") -> Host:
        model = host()
        inject_adapter_in_model(LoraConfig(target_modules=[target], r=2, init_lora_weights=False), model, "style")
        for adapter in (FULL, CORE):
            name = "full" if adapter is FULL else "core"
            inject_adapter_in_model(ComCATConfig(mode="customize", init_weights=False, **adapter), model, name)
        model.attn.set_adapter(["full", "core"])
        lora = model.attn.base_layer.get_submodule(target)
        lora.set_adapter("style")
        return model

    @pytest.mark.parametrize("target", ["to_out.0", "to_q", "to_v"])
    def test_both_act(self, target):
        model, x = self._both(target), states()
        lora = model.attn.base_layer.get_submodule(target)
        both = model(x)
        lora.enable_adapters(False)
        assert not near(model(x), both, 1e-2)
        lora.enable_adapters(True)
        lora.merge()
        assert near(model(x), both)
        model.attn.merge()
        assert near(model(x), both)
        model.attn.unmerge()
        lora.unmerge()
        assert near(model(x), both)

    @pytest.mark.parametrize("target", ["to_out.0", "to_k"])
    def test_merging_beside_one_that_is_not_is_refused(self, target):
        model = self._both(target)
        expected = model(states())
        with pytest.raises(UnsupportedModuleError, match=rf"attn\.{target} carries the adapter style.*not merged"):
            model.attn.merge()
        assert torch.equal(model(states()), expected)
        model.attn.base_layer.get_submodule(target).merge()
        model.attn.merge()
        assert near(model(states()), expected)

    def test_bases_are_not_taken_from_a_fused_base(self):
        model = host()
        inject_adapter_in_model(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), model, "style")
        lora = model.attn.to_q
        lora.merge()
        with pytest.raises(InvalidValueError, match=r"attn\.to_q.*style are merged.*Unfuse"):
            inject_adapter_in_model(ComCATConfig(mode="customize", **CORE), model, "core")
        assert type(model.attn) is Attention
        lora.unmerge()
        inject_adapter_in_model(ComCATConfig(mode="customize", **CORE), model, "core")
        assert "core" in model.attn.comcat_factors


class TestLayer:
    def test_nothing_is_run_but_the_dense_module_without_an_active_adapter(self):
        model = host(FULL, CORE)
        seen, x = [], states()
        model.attn.base_layer.register_forward_hook(lambda *_: seen.append("dense"))
        dense = host()(x)
        model.attn.enable_adapters(False)
        assert torch.equal(model(x), dense) and seen == ["dense"]
        model.attn.enable_adapters(True)
        model.attn.set_adapter([])
        assert torch.equal(model(x), dense) and seen == ["dense"] * 2
        model.attn.set_adapter(["a", "b"])
        model.attn.merge()
        model.attn.enable_adapters(False)
        assert torch.equal(model(x), dense) and not model.attn.merged

    def test_a_change_of_processor_is_followed(self):
        model = host(FULL)
        seen = []

        class Recording(AttnProcessor):
            def __call__(self, attn, *args, **kwargs):
                seen.append(attn.heads)
                return super().__call__(attn, *args, **kwargs)

        Recording.__name__ = "AttnProcessor"
        expected, given = model(states()), []
        # Hooks of the dense module still run.
        model.attn.base_layer.register_forward_hook(lambda module, args, output: given.append(output))
        model.attn.base_layer.set_processor(Recording())
        found = model(states())
        assert near(found, expected) and seen == [HEADS]
        assert len(given) == 1 and torch.equal(given[0], found)

    @pytest.mark.parametrize("merged", [False, True])
    def test_copies_are_whole_and_apart(self, merged):
        model = host(FULL, CORE)
        model.attn.set_scale("a", 0.5)
        if merged:
            model.attn.merge()
        x = states()
        expected = model(x)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
            assert torch.equal(copied(x), expected)
            parameters = [
                {id(p): p for part in (m, m.attn.merged_layer) if part is not None for p in part.parameters()}
                for m in (model, copied)
            ]
            assert parameters[0].keys().isdisjoint(parameters[1])
            assert {id(m) for m in model.modules()}.isdisjoint(id(m) for m in copied.modules())
            with torch.no_grad():
                for parameter in parameters[1].values():
                    parameter.mul_(1.5)
            copied.attn.set_scale("a", 2.0)
            assert not near(copied(x), expected, 1e-2)
            assert torch.equal(model(x), expected) and model.attn.scaling["a"] == 0.5

    def test_deleting(self):
        model = host(FULL, CORE)
        x = states()
        model.attn.delete_adapter("a")
        alone = model(x)
        assert near(alone, written_out(model.attn, x, x, (1,), HEAD_DIM**-0.5))
        assert (model.attn.r.keys(), model.attn.scaling.keys()) == ({"b"}, {"b"})
        model.attn.delete_adapter("b")
        assert torch.equal(model(x), model.attn.base_layer(x))

    def test_ranks(self):
        layer = host(FULL, CORE, {"qk_rank": 1}, {"vo_rank": 4, "core": True}).attn
        assert layer.r == {"a": (2, 3), "b": (3, 2), "c": (1, None), "d": (None, 4)}
        shapes = {n: tuple(p.shape) for n, p in factors_of(layer).items()}
        assert shapes["comcat_factors.a.query.weight"] == (2 * HEADS, WIDTH)
        assert shapes["comcat_factors.a.output.weight"] == (WIDTH, 3 * HEADS)
        assert shapes["comcat_factors.b.qk_core.weight"] == (HEADS, 3, 3)
        assert {n.split(".")[2] for n in shapes if n.startswith("comcat_factors.c")} == {"query", "key"}
        assert {n.split(".")[2] for n in shapes if n.startswith("comcat_factors.d")} == {"vo_core"}

    @pytest.mark.parametrize("adapter", [{"qk_rank": 9}, {"vo_rank": 9, "core": True}])
    def test_a_rank_above_the_head_is_refused(self, adapter):
        with pytest.raises(InvalidValueError, match="9"):
            host(adapter)


def test_there_is_no_closed_form_to_start_from():
    model = host(FULL)
    with pytest.raises(InvalidValueError, match=r"mode 'customize'.*no closed form"):
        initialize_comcat_weights(model, adapter_name=next(iter(model.attn.comcat_factors)))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
    def test_factors_stay_in_float32(self, dtype):
        model = host(FULL, CORE)
        expected = model(states())
        if dtype == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                found = model(states())
        else:
            for name, parameter in model.named_parameters():
                if "comcat_" not in name:
                    parameter.data = parameter.data.to(dtype)
            found = model(states().to(dtype))
        assert found.dtype == (torch.bfloat16 if dtype == "autocast" else dtype)
        assert near(found.float(), expected, 5e-2)
        found.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in factors_of(model).values())

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
    def test_merged_in_half_precision(self, dtype, tolerance):
        model = host(FULL, CORE).to(dtype)
        expected = model(states().to(dtype))
        model.attn.merge()
        assert {p.dtype for p in model.attn.merged_layer.parameters()} == {dtype}
        assert near(model(states().to(dtype)).float(), expected.float(), tolerance)

    def test_scales_keep_their_precision_under_another_default_dtype(self):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = host(FULL).attn
            layer.set_scale("a", 0.3)
        finally:
            torch.set_default_dtype(torch.float32)
        model, reference = layer.float(), host(FULL)
        reference.attn.load_state_dict(model.state_dict())
        reference.attn.set_scale("a", 0.3)
        assert torch.equal(model(states()), reference(states()))


class TestMetaDevice:
    @pytest.mark.parametrize("adapter", [{**FULL, "scale": 0.5}, {**CORE, "scale": 0.5}])
    def test_made_there_and_filled_later(self, adapter, monkeypatch):
        expected = host(adapter)
        computed = []
        monkeypatch.setattr(
            "comcat_hf.tuners.residual.factors.head_basis", lambda *a: computed.append(a) or head_basis(*a)
        )
        with torch.device("meta"):
            model = Host().eval()
            inject_adapter_in_model(ComCATConfig(mode="customize", **adapter), model, "a")
        assert not computed and all(p.is_meta for p in model.parameters())
        model = model.to_empty(device="cpu")
        model.load_state_dict(expected.state_dict())
        with torch.inference_mode():
            assert torch.equal(model(states()), expected(states()))
        assert len(computed) == (4 if "core" in adapter else 0)
        # What was found while only inferring serves training.
        model(states()).sum().backward()
        assert all(p.grad is not None for p in factors_of(model).values())

    def test_empty_factors_beside_a_real_base(self):
        model = host()
        inject_adapter_in_model(ComCATConfig(mode="customize", **CORE), model, "a", low_cpu_mem_usage=True)
        assert all(p.is_meta == ("comcat_" in n) for n, p in model.named_parameters())
