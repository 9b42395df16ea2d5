"""MLPs and their width: which are known, what narrowing saves and computes, what is shared, and what is refused."""

import copy
import importlib

import peft
import pytest
import torch
from torch import nn

from comcat_hf import RankPlan, collect_statistics, count_macs, count_parameters, register_mlp_family
from comcat_hf.closed_forms.width import HiddenUnits
from comcat_hf.compression.counting import trace
from comcat_hf.errors import InvalidValueError, RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import (
    LowRankLinear,
    MLPFamily,
    NarrowLinear,
    apply_ranks,
    find_sites,
    mlps,
    read_ranks,
    replace_module,
)
from comcat_hf.modeling.hosts.transformers import FAMILIES, MLPS
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    classes_of,
    outputs,
    randomize,
    small_bert,
    small_vit,
    state_of,
)
from tests.modeling.test_sites import QUANTISED


MLP, FC1, FC2 = "vit.layers.0.mlp", "vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2"
every_family = pytest.mark.parametrize("family", list(MODELS))


def widths(model, share=1.0):
    """A plan that keeps this share of the hidden units of every MLP."""
    return {name: {"width": max(1, int(site.view.width * share))} for name, site in mlp_sites(model).items()}


def mlp_sites(model):
    return {n: site for n, site in find_sites(model, "mlp", width=True).items() if site.kind == "mlp"}


# --- what is found


def test_rows_name_classes_of_transformers():
    assert len({row.host for row in MLPS}) == len(MLPS)
    for row in MLPS:
        module, _, name = row.host.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), nn.Module)
    # Every module with an attention row has one for its MLP. That of Segformer mixes tokens between its layers, that
    # of SAM 2 may have further ones, and that of ModernBERT has one layer for gate and value.
    without = {row.host.rpartition(".")[0] for row in FAMILIES} - {row.host.rpartition(".")[0] for row in MLPS}
    assert {path.rpartition(".modeling_")[2] for path in without} == {"segformer", "sam2", "modernbert"}


@every_family
def test_every_mlp_of_a_known_family_is_known(family):
    model, _ = MODELS[family]()
    sites = mlp_sites(model)
    layers = [path for site in sites.values() for path in site.dense_modules()]
    assert sorted(layers) == sorted(find_sites(model, "mlp"))
    # SigLIP pools its tokens by attention that stays dense, with an MLP behind it.
    poolers = [name for name in sites if name.endswith("head.mlp")]
    assert len(sites) == len(find_sites(model, "attention")) + len(poolers)
    assert len(poolers) == (family in ("siglip", "siglip_vision"))
    for name, site in sites.items():
        assert site.name == name
        assert all(model.get_submodule(path) is module for path, module in site.dense_modules().items())
        assert list(site.dense_modules())[-1] == site.moments_path
        assert site.choices == {"width": model.get_submodule(site.moments_path).in_features}


def test_names_and_order():
    model, _ = small_bert()
    block = "bert.encoder.layer.0"
    assert list(find_sites(model, width=True))[:4] == [
        f"{block}.attention.self",
        block,
        f"{block}.intermediate.dense",
        f"{block}.output.dense",
    ]
    swiglu = mlp_sites(MODELS["dinov2_swiglu"]()[0])["dinov2.encoder.layer.0.mlp"]
    parts = ("gate_proj", "up_proj", "down_proj")
    assert list(swiglu.dense_modules()) == [f"{swiglu.name}.{part}" for part in parts]


@pytest.mark.parametrize("scope", ["model", "mlp", "attention"])
def test_widths_are_given_where_asked_for(scope):
    model, _ = small_vit()
    sites, plain = find_sites(model, scope, width=True), find_sites(model, scope)
    assert [site.kind for site in plain.values()].count("mlp") == 0
    assert sites.keys() - plain.keys() == (set() if scope == "attention" else {MLP, "vit.layers.1.mlp"})
    assert [name for name in sites if name in plain] == list(plain)


# --- what it computes


@every_family
@pytest.mark.parametrize("with_statistics", [False, True])
def test_full_width_is_the_original(family, with_statistics):
    model, inputs = MODELS[family]()
    expected = outputs(model, inputs)
    statistics = collect_statistics(model, [inputs], scope="mlp") if with_statistics else None
    plan = widths(model)
    apply_ranks(model, plan, statistics=statistics)
    assert_close(outputs(model, inputs), expected)
    assert read_ranks(model) == plan


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "bert", "clip", "videomae"])
def test_units_that_never_vary_are_left_out_exactly(family):
    model, inputs = MODELS[family]()
    for site in mlp_sites(model).values():
        # Fewer vary than there are tokens, so that each is worth more than any constant one.
        constant = torch.arange(site.view.width) % 8 > 0
        for _, first in site.view.first:
            first.weight.data[constant] = 0.0
    expected, statistics = outputs(model, inputs), collect_statistics(model, [inputs], scope="mlp")
    plain = copy.deepcopy(model)
    apply_ranks(model, widths(model, 0.5), statistics=statistics)
    assert_close(outputs(model, inputs), expected, 2e-5)
    # They carry a mean, which only data shows.
    apply_ranks(plain, widths(plain, 0.5))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(outputs(plain, inputs), expected, 1e-3)


@pytest.mark.parametrize("family", ["vit", "dinov2_swiglu", "bert"])
def test_twins_stand_in_for_each_other(family):
    model, inputs = MODELS[family]()
    for site in mlp_sites(model).values():
        half = site.view.width // 2
        for _, first in site.view.first:
            first.weight.data[half:], first.bias.data[half:] = first.weight[:half], first.bias[:half]
    expected, statistics = outputs(model, inputs)[0], collect_statistics(model, [inputs], scope="mlp")
    errors = []
    for moments in (statistics, None):
        small = copy.deepcopy(model)
        apply_ranks(small, widths(small, 0.5), statistics=moments)
        errors.append((outputs(small, inputs)[0] - expected).norm() / expected.norm())
    # Not zero: a ridge pulls the output weights toward the dense ones.
    assert errors[0] < min(0.05, errors[1] / 5)


def test_without_data_small_rows_go_first():
    model, _ = MODELS["dinov2_swiglu"]()
    site = next(iter(mlp_sites(model).values()))
    gate, up = (first for _, first in site.view.first)
    with torch.no_grad():
        # A unit's size is the product of both its rows'; the bias counts.
        for zero, large, unit in ((gate, up, 3), (up, gate, 5)):
            zero.weight[unit], zero.bias[unit], large.bias[unit] = 0.0, 0.0, 50.0
        gate.weight[7], gate.bias[7] = 0.0, 100.0
    order = site.prepare().order.tolist()
    assert set(order[-2:]) == {3, 5}
    assert order[0] == 7


def test_several_ranks_of_a_linear_layer_share_one_basis(monkeypatch):
    model, inputs = small_vit()
    site = find_sites(model)[FC1]
    moments = collect_statistics(model, [inputs])[site.moments_path]
    prepared = site.prepare(moments)
    assert site.prepare() is None and site.moments_path == site.name
    for rank in (1, 7, 20):
        made = [site.substitutes({"rank": rank}) for _ in range(2)]
        for substitutes, value in zip(made, (moments, prepared), strict=True):
            site.initialize(substitutes, value)
        assert_unchanged(made[0][FC1], state_of(made[1][FC1]), classes_of(made[1][FC1]))
    monkeypatch.setattr("comcat_hf.closed_forms.linear._basis", None)
    site.initialize(made[0], prepared)


def test_several_widths_share_one_ordering():
    model, inputs = small_vit()
    site = mlp_sites(model)[MLP]
    moments = collect_statistics(model, [inputs])[site.moments_path]
    prepared = site.prepare(moments)
    assert isinstance(prepared, HiddenUnits) and site.prepare(prepared) is prepared
    for width in (1, 30, 80):
        for given in ((moments, prepared), (None, site.prepare())):
            made = [site.substitutes({"width": width}) for _ in given]
            for substitutes, value in zip(made, given, strict=True):
                site.initialize(substitutes, value)
            for path in made[0]:
                assert torch.equal(made[0][path].weight, made[1][path].weight)
                assert torch.equal(made[0][path].bias, made[1][path].bias)


def test_several_ranks_share_one_basis():
    model, inputs = small_vit()
    site = find_sites(model)["vit.layers.0.attention"]
    moments = collect_statistics(model, [inputs])[site.moments_path]
    prepared = site.prepare(moments)
    assert site.prepare() is None and prepared.attended is moments.attended
    for rank in (1, 3, 8):
        made = [site.substitutes({"qk": rank, "vo": rank}) for _ in range(2)]
        for substitutes, given in zip(made, (moments, prepared), strict=True):
            site.initialize(substitutes, given)
        for one, other in zip(*(substitutes[site.name].parameters() for substitutes in made), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    for choice in ("qk", "vo"):
        assert torch.allclose(site.discarded(choice, prepared), site.discarded(choice, moments))


# --- what it saves


@pytest.mark.parametrize(
    ("family", "biases"),
    [
        *(("vit", biases) for biases in ("all", "none", "first", "second")),
        *(("dinov2_swiglu", biases) for biases in ("all", "none", "first", "second")),
        *(("bert", "first"), ("clip_text", "second"), ("videomae", "all")),
    ],
)
def test_savings_agree_with_what_is_built(family, biases):
    model, inputs = MODELS[family]()
    for site in mlp_sites(model).values():
        if biases in ("none", "second"):
            for _, first in site.view.first:
                first.bias = None
        if biases in ("none", "first"):
            site.view.output.bias = None
    sites, tokens = mlp_sites(model), trace(model).tokens
    expected, parameters, macs = outputs(model, inputs), count_parameters(model), count_macs(model)
    full = copy.deepcopy(model)
    apply_ranks(full, widths(full))
    assert_close(outputs(full, inputs), expected)
    plan = {name: {"width": 7 * (index + 1)} for index, name in enumerate(sites)}
    apply_ranks(model, plan)
    saved = [(site, plan[name]["width"]) for name, site in sites.items()]
    assert parameters - count_parameters(model) == sum(s.saved_parameters("width", k) for s, k in saved)
    assert macs - count_macs(model) == sum(s.saved_macs("width", k, tokens[s.moments_path]) for s, k in saved)


# --- plans


def test_width_and_ranks_in_one_plan(tmp_path):
    model, inputs = MODELS["vit"]()
    plan = RankPlan({MLP: {"width": 20}, "vit.layers.1.mlp.fc1": 7, "vit.layers.0.attention": {"vo": 9}})
    plan.save_pretrained(tmp_path)
    assert RankPlan.from_pretrained(tmp_path) == plan
    statistics = collect_statistics(model, [inputs])
    apply_ranks(model, plan.ranks, statistics=statistics)
    assert read_ranks(model) == plan.ranks
    layer = model.vit.layers[0].mlp
    assert type(layer.fc1) is type(layer.fc2) is NarrowLinear
    assert (layer.fc1.weight.shape, layer.fc2.weight.shape) == ((20, 48), (48, 20))
    assert isinstance(model.vit.layers[1].mlp.fc1, LowRankLinear)
    assert all(tensor.isfinite().all() for tensor in outputs(model, inputs))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({MLP: 4}, r"vit\.layers\.0\.mlp is an MLP: its entry must be \{'width': k\}, got 4"),
        ({MLP: {"qk": 4}}, r"is an MLP.*got \{'qk': 4\}"),
        ({MLP: {"width": 4, "vo": 4}}, r"is an MLP"),
        ({MLP: {"width": 81}}, r"vit\.layers\.0\.mlp: the width must be .* from 1 to 80 \(its hidden units\), got 81"),
        ({MLP: {"width": 0}}, r"got 0"),
        ({MLP: {"width": True}}, r"got True"),
        ({MLP: {"width": None}}, r"got None"),
        ({FC1: {"width": 4}}, r"vit\.layers\.0\.mlp\.fc1: the rank must be .*got \{'width': 4\}"),
        ({"vit.layers.0.attention": {"width": 4}}, r"vit\.layers\.0\.attention is an attention module"),
        ({"vit.layers.7.mlp": {"width": 4}}, r"names vit\.layers\.7\.mlp, which ViT"),
        (
            {FC2: 4, MLP: {"width": 9}},
            r"vit\.layers\.0\.mlp\.fc2 has the entry 4 and vit\.layers\.0\.mlp the entry \{'width': 9\}; both replace",
        ),
        ({MLP: {"width": 9}, FC1: 4}, r"mlp has the entry \{'width': 9\} and vit\.layers\.0\.mlp\.fc1 the entry 4"),
    ],
)
def test_plans_that_do_not_fit(plan, says):
    model, _ = small_vit()
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(RankPlanError, match=says):
        apply_ranks(model, {"vit.layers.1.mlp": {"width": 8}, **plan})
    assert_unchanged(model, state, classes)


def test_statistics_of_another_model_are_refused_by_name():
    model, inputs = small_vit()
    statistics = collect_statistics(MODELS["vit"](intermediate_size=64)[0], [inputs], scope="mlp")
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(InvalidValueError, match=r"^vit\.layers\.0\.mlp: .*moments"):
        apply_ranks(model, {MLP: {"width": 8}}, statistics=statistics)
    assert_unchanged(model, state, classes)


def test_narrow_layers_keep_device_dtype_mode_and_training():
    model, _ = small_vit()
    model = model.bfloat16().train()
    model.vit.layers[0].mlp.requires_grad_(False)
    apply_ranks(model, {MLP: {"width": 8}, "vit.layers.1.mlp": {"width": 9}})
    for index, trained in ((0, False), (1, True)):
        for layer in (model.vit.layers[index].mlp.fc1, model.vit.layers[index].mlp.fc2):
            assert {(p.dtype, p.requires_grad) for p in layer.parameters()} == {(torch.bfloat16, trained)}
            assert layer.training
    with torch.device("meta"):
        empty = type(model)(model.config)
    apply_ranks(empty, {MLP: {"width": 8}}, initialize=False)
    assert empty.vit.layers[0].mlp.fc2.weight.is_meta


# --- what has no width


def test_what_is_compressed_already_is_no_site():
    model, _ = small_vit()
    apply_ranks(model, {MLP: {"width": 80}, "vit.layers.1.mlp.fc2": 4})
    assert list(find_sites(model, "mlp", width=True)) == ["vit.layers.1.mlp.fc1"]


@pytest.mark.parametrize("quantize", QUANTISED)
@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_quantised_layers_have_no_width(quantize, layer):
    model, _ = small_vit()
    quantize(model.vit.layers[0].mlp.get_submodule(layer))
    assert list(mlp_sites(model)) == ["vit.layers.1.mlp"]
    with pytest.raises(RankPlanError, match=r"vit\.layers\.0\.mlp, which .* cannot be factorised"):
        apply_ranks(model, {MLP: {"width": 4}})


def _tie_weights(layers):
    layers[1].output.dense.weight = layers[0].output.dense.weight


def _share_layer(layers):
    layers[1].intermediate.dense = layers[0].intermediate.dense


def _share_container(layers):
    layers[1].intermediate = layers[0].intermediate


def _take_out(layers):
    layers[0].output = nn.Identity()
    layers[1].intermediate.dense = nn.Sequential(nn.Linear(48, 80))


@pytest.mark.parametrize("change", [_tie_weights, _share_layer, _share_container, _take_out])
def test_layers_that_others_use_keep_their_width(change):
    model, _ = small_bert()
    change(model.bert.encoder.layer)
    assert mlp_sites(model) == {}
    assert read_ranks(model) == {}
    # A rank does not change what a layer computes for others.
    assert find_sites(model, "mlp")


def test_a_shared_mlp_is_narrowed_once():
    model, inputs = small_vit()
    model.vit.layers[1].mlp = model.vit.layers[0].mlp
    expected = outputs(model, inputs)
    apply_ranks(model, widths(model))
    assert model.vit.layers[1].mlp is model.vit.layers[0].mlp
    assert read_ranks(model) == {MLP: {"width": 80}}
    assert_close(outputs(model, inputs), expected)


@pytest.mark.parametrize(
    ("layer", "ranks"),
    [
        ("fc1", {MLP: {"width": 9}}),
        ("fc2", {MLP: {"width": 9}}),
        ("fc1", {"vit.layers.0.attention": {"qk": 4}, FC1: 4}),
    ],
)
def test_lora_on_a_layer_is_refused_until_merged(layer, ranks):
    model, _ = small_vit()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[layer]))
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(UnsupportedModuleError, match=rf"^vit\.layers\.0\.mlp\.{layer} carries an adapter of peft"):
        apply_ranks(model, ranks)
    assert_unchanged(model, state, classes)


# --- registration


class OwnMLP(nn.Module):
    """What a user may bring: gated, with other names, one of them inside a container."""

    def __init__(self, gate=64, hidden=64):
        super().__init__()
        self.inner = nn.ModuleDict({"gate": nn.Linear(48, gate, bias=False), "value": nn.Linear(48, hidden)})
        self.back = nn.Linear(hidden, 48, bias=False)

    def forward(self, states):
        return self.back(
            self.inner["gate"](states)[..., : self.back.in_features].sigmoid() * self.inner["value"](states)
        )


HOST = f"{OwnMLP.__module__}.OwnMLP"


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(mlps._registry, "families", dict(mlps._registry.families))


def with_own_mlps(**sizes):
    model, inputs = small_vit()
    for layer in model.vit.layers:
        replace_module(layer, layer.mlp, randomize(OwnMLP(**sizes)))
    return model, inputs


def test_a_class_becomes_known(registry):
    model, inputs = with_own_mlps()
    assert mlp_sites(model) == {}
    register_mlp_family(MLPFamily(HOST, first=("inner.gate", "inner.value"), second="back"))
    register_mlp_family(MLPFamily(HOST, first=("inner.gate", "inner.value"), second="back"))
    expected, plan = outputs(model, inputs), widths(model)
    small = copy.deepcopy(model)
    apply_ranks(model, plan)
    assert read_ranks(model) == plan
    assert model.vit.layers[0].mlp.back.bias is not None
    assert_close(outputs(model, inputs), expected)
    apply_ranks(small, widths(small, 0.5))
    assert outputs(small, inputs)[0].isfinite().all()
    with pytest.raises(InvalidValueError, match=r"The MLP class .*OwnMLP is registered already"):
        register_mlp_family(MLPFamily(HOST, first=("inner.value",), second="back"))


@pytest.mark.parametrize(
    ("first", "second"), [(("inner.gate", "inner.value"), "back"), (("inner.gate",), "back"), (("gone",), "back")]
)
def test_a_description_that_does_not_fit_gives_no_site(registry, first, second):
    model, _ = with_own_mlps(gate=128)
    register_mlp_family(MLPFamily(HOST, first=first, second=second))
    assert mlp_sites(model) == {}
    assert read_ranks(model) == {}


@pytest.mark.parametrize(("first", "second"), [("fc1", "fc2"), ((), "fc2"), (("fc2",), "fc2"), (("a", "a"), "b")])
def test_bad_descriptions(first, second):
    with pytest.raises(InvalidValueError, match=r"MLPFamily of own\.Class: first must be a tuple"):
        MLPFamily("own.Class", first=first, second=second)
