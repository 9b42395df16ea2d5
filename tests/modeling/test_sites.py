"""Sites: what can be factorised where, what it saves, what is shared, and what is refused."""

import copy
import functools

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from comcat_hf import RankPlan, compress
from comcat_hf.compression.budget.budget import METRICS
from comcat_hf.errors import InvalidValueError, RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import (
    LowRankAttention,
    LowRankLinear,
    Tokens,
    apply_ranks,
    find_sites,
    read_ranks,
    replace_module,
    views,
)
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    classes_of,
    full_ranks,
    outputs,
    small_bert,
    small_bert_mlm,
    small_deit_distilled,
    small_vit,
    state_of,
)


ATTENTION, FC1 = "vit.layers.0.attention", "vit.layers.0.mlp.fc1"


# --- what is found


@pytest.mark.parametrize("name", ["vit", "bert", "clip", "dinov2"])
def test_low_rank_attention_and_its_output_are_no_sites(name):
    """Neither where all of it is low-rank nor beside attention that is dense."""
    model, _ = MODELS[name]()
    dense, attention = find_sites(model, "model", width=True), find_sites(model, "attention")
    for chosen in (list(attention)[:1], list(attention)):
        small = compress(model, plan=RankPlan({path: {"qk": 3, "vo": 3} for path in chosen}))
        assert set(find_sites(small, "model", width=True)) == set(dense) - set(chosen)


def test_scopes_of_vit():
    model, _ = small_vit()
    attention = [f"vit.layers.{i}.attention" for i in range(2)]
    mlp = [f"vit.layers.{i}.mlp.{fc}" for i in range(2) for fc in ("fc1", "fc2")]
    assert list(find_sites(model, "attention")) == attention
    assert list(find_sites(model, "mlp")) == mlp
    in_order = [attention[0], *mlp[:2], attention[1], *mlp[2:], "classifier"]
    assert list(find_sites(model)) == list(find_sites(model, "model")) == in_order
    assert [site.kind for site in find_sites(model).values()] == ["attention", "linear", "linear"] * 2 + ["linear"]


def test_scopes_of_bert():
    model, _ = small_bert()
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert list(find_sites(model, "attention")) == [f"{layer}.attention.self" for layer in layers]
    mlp = [f"{layer}.{name}.dense" for layer in layers for name in ("intermediate", "output")]
    assert list(find_sites(model, "mlp")) == mlp
    # The pooler and the attention's own output are neither MLP nor classifier.
    assert set(find_sites(model)) == {*find_sites(model, "attention"), *mlp, "classifier"}


@pytest.mark.parametrize("family, prefix", [("yolos", "vit.encoder.layer."), ("dpt", "dpt.encoder.layer.")])
def test_heads_with_numbered_layers_are_no_mlps(family, prefix):
    model, _ = MODELS[family]()
    numbered = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]
    assert any(".layers.0" in name or ".0." in name for name in numbered)
    mlp = find_sites(model, "mlp")
    assert mlp
    assert all(name.startswith(prefix) and name.endswith(("intermediate.dense", "output.dense")) for name in mlp)
    assert set(find_sites(model)) == {*mlp, *find_sites(model, "attention")}


def test_both_classifiers_of_distilled_deit():
    model, _ = small_deit_distilled()
    assert list(find_sites(model))[-2:] == ["cls_classifier", "distillation_classifier"]


@pytest.mark.parametrize("family", ["siglip_text", "siglip", "clip"])
def test_projections_are_no_classifiers(family):
    model, _ = MODELS[family]()
    assert set(find_sites(model)) == {*find_sites(model, "attention"), *find_sites(model, "mlp")}


def test_without_a_classifier():
    assert "classifier" not in find_sites(MODELS["vit"](num_labels=0)[0])


def test_blocks_inside_numbered_stages():
    class Stage(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.blocks = nn.ModuleList([block])
            self.reduction = nn.Linear(48, 24)

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(small_vit()[0].vit.layers[0])])
    assert list(find_sites(model, "mlp")) == ["stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mlp.fc2"]


def test_blocks_of_a_bare_list():
    layers = copy.deepcopy(small_vit()[0].vit.layers)
    assert list(find_sites(layers))[:3] == ["0.attention", "0.mlp.fc1", "0.mlp.fc2"]


def test_unknown_scope():
    with pytest.raises(InvalidValueError, match="scope must be one of 'model', 'attention', 'mlp', got 'heads'"):
        find_sites(small_vit()[0], "heads")


def test_what_is_low_rank_already_is_no_site():
    model, _ = small_vit()
    apply_ranks(model, {ATTENTION: {"qk": 4}, FC1: 4})
    assert not {ATTENTION, FC1} & set(find_sites(model))
    assert not any(name.startswith((ATTENTION, FC1)) for name in find_sites(model))
    apply_ranks(model, full_ranks(model, "model"))
    with pytest.raises(UnsupportedModuleError, match="low-rank already"):
        find_sites(model)


# --- what it saves


@functools.cache
def dense(family):
    return MODELS[family]()


def macs_of(model, inputs):
    """Multiply-accumulates of one sample in linear layers and attention products, counted on what runs."""
    total, products, hooks = [0], [], []

    def count(module, args, output):
        weights = [module.weight, *([module.first_factor.weight] if isinstance(module, LowRankLinear) else [])]
        total[0] += output[..., 0].numel() * sum(weight.numel() for weight in weights)

    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) or (isinstance(module, nn.Linear) and not name.endswith(".first_factor")):
            hooks.append(module.register_forward_hook(count))
    for module in model.modules():
        family = getattr(module, "_family", None) or views._registry.find(module)
        if family is not None:
            for role in (family.query, family.value):
                linear = getattr(module, role)
                hooks.append(linear.register_forward_hook(lambda m, args, out: products.append(out.shape)))
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return total[0] + sum(batch * tokens * tokens * width for batch, tokens, width in products)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_savings_agree_with_what_is_built(data):
    family = data.draw(st.sampled_from(["vit", "bert", "dinov2_swiglu", "yolos", "clip_text", "videomae"]))
    host, inputs = dense(family)
    model = copy.deepcopy(host)
    if data.draw(st.booleans()):
        # Without biases the counts of what is folded and added differ.
        for module in model.modules():
            if isinstance(module, nn.Linear) and data.draw(st.booleans()):
                module.bias = None
    sites = find_sites(model)
    ranks, saved, saved_macs = {}, 0, 0
    batch = len(next(iter(inputs.values())))
    tokens = _tokens(model, inputs, sites)
    for name in data.draw(st.sets(st.sampled_from(list(sites)), min_size=1)):
        site = sites[name]
        limits = {"qk": 16, "vo": 16} if site.kind == "attention" else {"rank": min(site.linear.weight.shape)}
        chosen = {choice: data.draw(st.none() | st.integers(1, limit)) for choice, limit in limits.items()}
        if site.entry(chosen) is None:
            continue
        ranks[name] = site.entry(chosen)
        assert site.ranks(ranks[name]) == chosen
        kept = [(choice, rank) for choice, rank in chosen.items() if rank is not None]
        saved += sum(site.saved_parameters(*one) for one in kept)
        saved_macs += sum(site.saved_macs(*one, tokens[name]) for one in kept)
    parameters, macs = sum(p.numel() for p in model.parameters()), macs_of(model, inputs)
    apply_ranks(model, ranks, initialize=False)
    for parameter in model.parameters():
        parameter.data.nan_to_num_(0.0)
    assert parameters - sum(p.numel() for p in model.parameters()) == saved
    assert macs - macs_of(model, inputs) == batch * saved_macs
    assert read_ranks(model) == ranks


def _tokens(model, inputs, sites):
    seen, hooks = {}, []
    for name, site in sites.items():
        linear = site.view.query if site.kind == "attention" else site.linear

        def hook(module, args, output, name=name):
            rows = output[..., 0].numel() // len(output)
            seen[name] = Tokens(rows, rows)

        hooks.append(linear.register_forward_hook(hook))
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_dense_choices_save_nothing():
    model, _ = small_vit()
    savings = [metric.savings(model) for metric in METRICS.values()]
    for site in find_sites(model, width=True).values():
        assert all(saved(site, choice)[0](None) == 0 for saved in savings for choice in site.choices)
        assert site.entry(dict.fromkeys(site.choices)) is None


@given(st.integers(1, 40), st.integers(1, 40))
def test_linear_break_even(inputs, outputs_):
    model = nn.Module()
    model.classifier = nn.Linear(inputs, outputs_)
    site = find_sites(model)["classifier"]
    limit = site.choices["rank"]
    assert site.saved_parameters("rank", limit) <= 0
    assert limit == 1 or site.saved_parameters("rank", limit - 1) > 0


# --- shared and tied


def test_shared_attention_is_factorised_once():
    model, inputs = small_vit()
    model.vit.layers[1].attention = model.vit.layers[0].attention
    expected = outputs(model, inputs)
    before = sum(p.numel() for p in model.parameters())
    sites = find_sites(model, "attention")
    assert list(sites) == [ATTENTION]
    apply_ranks(model, full_ranks(model))
    assert model.vit.layers[1].attention is model.vit.layers[0].attention
    assert isinstance(model.vit.layers[1].attention, LowRankAttention)
    assert_close(outputs(model, inputs), expected)
    saved = sum(sites[ATTENTION].saved_parameters(choice, 16) for choice in ("qk", "vo"))
    assert before - sum(p.numel() for p in model.parameters()) == saved


def test_shared_block_is_factorised_once():
    model, inputs = small_bert()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    expected = outputs(model, inputs)
    ranks = full_ranks(model, "model")
    assert not any(".layer.1." in name for name in ranks)
    apply_ranks(model, ranks)
    assert model.bert.encoder.layer[1] is model.bert.encoder.layer[0]
    assert_close(outputs(model, inputs), expected)


def test_a_module_held_twice_by_one_parent_is_replaced_twice():
    parent = nn.Module()
    parent.first = parent.second = nn.Linear(2, 2)
    new = nn.Linear(2, 2)
    replace_module(parent, parent.first, new)
    assert parent.first is new
    assert parent.second is new


def test_shared_self_attention_with_outputs_of_its_own_is_refused():
    model, _ = small_bert()
    layers = model.bert.encoder.layer
    layers[1].attention.self = layers[0].attention.self
    with pytest.raises(UnsupportedModuleError, match=r"^bert\.encoder\.layer\.1\.attention is a .*BertAttention"):
        find_sites(model, "attention")
    assert find_sites(model, "mlp")


def test_tied_attention_weights_are_refused():
    model, _ = small_vit()
    layers = model.vit.layers
    layers[1].attention.o_proj.weight = layers[0].attention.o_proj.weight
    with pytest.raises(UnsupportedModuleError, match=r"layers\.1.*o_proj shares its weight with .*layers\.0.*o_proj"):
        find_sites(model, "attention")
    assert find_sites(model, "mlp")


def test_tied_linear_weights_stay_dense():
    model, inputs = small_bert_mlm()
    decoder = model.cls.predictions.decoder
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    expected, ranks = outputs(model, inputs), full_ranks(model, "model")
    assert not any(name.startswith("cls") for name in ranks)
    apply_ranks(model, ranks)
    assert decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert_close(outputs(model, inputs), expected)


def test_mlps_tied_to_each_other_stay_dense():
    model, _ = small_vit()
    layers = model.vit.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    assert list(find_sites(model, "mlp")) == ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"]


# --- quantised layers and adapters


class Linear8bit(nn.Linear):
    pass


class QuantizedTensor(torch.Tensor):
    """Passes for floating point, as the tensors of torchao do."""


def _subclass(linear):
    linear.__class__ = Linear8bit


def _int8(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def _float8(linear):
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def _tensor_subclass(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(QuantizedTensor))


QUANTISED = (_subclass, _int8, _float8, _tensor_subclass)


@pytest.mark.parametrize(
    ("quantize", "role"), list(zip(QUANTISED, ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True))
)
def test_quantised_attention_is_refused(quantize, role):
    model, _ = small_vit()
    quantize(model.vit.layers[0].attention.get_submodule(role))
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(UnsupportedModuleError, match=rf"^{ATTENTION}\.{role} is a .*Dequantise"):
        apply_ranks(model, {ATTENTION: {"qk": 4}})
    assert_unchanged(model, state, classes)
    # Another module's weights are nobody's business.
    apply_ranks(model, {"vit.layers.1.attention": {"qk": 4}})
    assert read_ranks(model) == {"vit.layers.1.attention": {"qk": 4}}


@pytest.mark.parametrize("quantize", QUANTISED)
def test_quantised_linear_layers_are_no_sites(quantize):
    model, _ = small_vit()
    quantize(model.vit.layers[0].mlp.fc1)
    assert FC1 not in find_sites(model)
    with pytest.raises(RankPlanError, match=r"vit\.layers\.0\.mlp\.fc1, which .* cannot be factorised"):
        apply_ranks(model, {FC1: 4})


def test_attention_is_factorised_beside_quantised_layers():
    model, _ = small_vit()
    for name, module in model.named_modules():
        if name.endswith((".fc1", ".fc2")) or name == "classifier":
            _tensor_subclass(module)
    apply_ranks(model, {ATTENTION: {"qk": 4}})
    assert read_ranks(model) == {ATTENTION: {"qk": 4}}
    with pytest.raises(UnsupportedModuleError, match=r"fc1 is a .*QuantizedTensor; .*Dequantise"):
        find_sites(model, "mlp")


def test_torch_dynamic_quantisation_is_refused():
    class Dynamic(nn.Module):
        """`torch.ao.nn.quantized.dynamic.Linear` has a method where the weight should be."""

        def weight(self):
            return None

    model, _ = small_vit()
    model.vit.layers[0].attention.q_proj = Dynamic()
    with pytest.raises(UnsupportedModuleError, match=r"q_proj is a .*Dynamic; expected a plain"):
        find_sites(model)


def test_lora_on_attention_is_refused_until_merged():
    model, inputs = small_vit()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with pytest.raises(UnsupportedModuleError, match=r"q_proj carries an adapter of peft.*Merge or unload"):
        find_sites(adapted.base_model.model)
    expected = outputs(adapted, inputs)
    merged = adapted.merge_and_unload()
    apply_ranks(merged, full_ranks(merged))
    assert_close(outputs(merged, inputs), expected)
