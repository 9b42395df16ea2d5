"""The reduction asked for is the reduction reached, counted on the built model."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from comcat_hf import allocate_ranks, compress, count_macs, count_parameters, plan_of
from comcat_hf.compression.budget.allocation import TOLERANCE
from comcat_hf.compression.budget.budget import METRICS, find_budget, find_options
from comcat_hf.compression.request import Request
from comcat_hf.errors import BudgetError, InvalidValueError
from comcat_hf.modeling import find_sites
from tests.helpers import assert_unchanged, classes_of, small_vit, state_of


ASKED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def deit_small():
    return DeiTForImageClassification(
        DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    )


def _bert_small():
    config = BertConfig(
        hidden_size=512, num_attention_heads=8, num_hidden_layers=4, intermediate_size=2048, vocab_size=1000
    )
    return BertForSequenceClassification(config)


def _clip_vision():
    return CLIPVisionModel(CLIPVisionConfig())


def _dinov2_small():
    return Dinov2ForImageClassification(Dinov2Config(hidden_size=384, num_attention_heads=6, num_labels=1000))


REAL = {"deit": deit_small, "bert": _bert_small, "clip_vision": _clip_vision, "dinov2": _dinov2_small}


def without_weights(build):
    with torch.device("meta"):
        return build()


def demo_vit():
    """The demo's: 8x8 images in patches of 2, where a single rank is more than a percent of the attention."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=8,
            patch_size=2,
            num_labels=10,
        )
    ).eval()


def attention_ranks(plan):
    return [entry for entry in plan.ranks.values() if isinstance(entry, dict)]


def all_ranks(plan):
    return [r for e in plan.ranks.values() for r in (e.values() if isinstance(e, dict) else [e])]


@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("name", list(REAL))
def test_parameters_land_on_what_was_asked(name, scope):
    model = without_weights(REAL[name])
    for asked in ASKED:
        plan = allocate_ranks(model, asked, scope=scope)
        assert asked <= plan.reached <= asked + TOLERANCE
        assert (plan.reduction, plan.scope, plan.metric, plan.strategy) == (asked, scope, "params", "uniform")
        ranks = all_ranks(plan)
        assert sum(rank % 8 != 0 for rank in ranks) <= 2
        unequal = [e for e in attention_ranks(plan) if e.get("qk") != e.get("vo")]
        assert len(unequal) <= 2
        assert max(ranks) > 1


@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("name", ["deit", "bert", "dinov2"])
def test_macs_land_on_what_was_asked(name, scope):
    model = without_weights(REAL[name])
    for asked in (0.2, 0.5, 0.8):
        plan = allocate_ranks(model, asked, scope=scope, metric="macs")
        assert asked <= plan.reached <= asked + TOLERANCE
        assert plan.metric == "macs"


@pytest.mark.parametrize(
    ("metric", "scope"), [("params", "model"), ("params", "attention"), ("params", "mlp"), ("macs", "model")]
)
@pytest.mark.parametrize("asked", ASKED)
def test_tiny_models_land_too(metric, scope, asked):
    plan = allocate_ranks(demo_vit(), asked, scope=scope, metric=metric)
    assert asked <= plan.reached <= asked + TOLERANCE
    assert "classifier" not in plan.ranks, "ten classes leave hardly a rank to choose"


@pytest.mark.parametrize("asked", [0.3, 0.6])
def test_reached_is_counted_by_numel_on_the_compressed_model(asked):
    model = demo_vit()
    small = compress(model, asked)
    plan = allocate_ranks(model, asked)
    removed = 1 - count_parameters(small) / count_parameters(model)
    assert removed == plan.reached == pytest.approx(1 - small.num_parameters() / model.num_parameters())
    small = compress(model, asked, metric="macs")
    assert asked <= 1 - count_macs(small) / count_macs(model) <= asked + TOLERANCE
    mlp = tuple(find_sites(model, "mlp"))
    small = compress(model, asked, scope="mlp")
    assert asked <= 1 - count_parameters(small, mlp) / count_parameters(model, mlp) <= asked + TOLERANCE


def test_uniform_gives_every_site_the_same_share():
    plan = allocate_ranks(without_weights(deit_small), 0.5)
    ranks = [rank for entry in attention_ranks(plan) for rank in entry.values()]
    assert len(ranks) == 24
    assert max(ranks) - min(ranks) <= 8
    wide = [rank for name, rank in plan.ranks.items() if ".mlp." in name]
    assert len(wide) == 24
    assert max(wide) - min(wide) <= 32
    assert sum(rank % 32 != 0 for rank in wide) <= 3, "kernels work on tiles"
    assert abs(min(ranks) / 64 - min(wide) / 308) < 0.15


def test_same_call_same_plan_and_model_as_it_was():
    model = demo_vit()
    state, classes = state_of(model), classes_of(model)
    config = model.config.to_dict()
    assert allocate_ranks(model, 0.37) == allocate_ranks(model, 0.37)
    assert_unchanged(model, state, classes)
    assert model.config.to_dict() == config
    assert model.device.type == "cpu"


def test_steps_are_what_was_asked_for():
    model = without_weights(deit_small)
    for step in (2, 16):
        ranks = all_ranks(allocate_ranks(model, 0.4, step=step))
        assert sum(rank % step != 0 for rank in ranks) <= 3
    with pytest.raises(InvalidValueError, match="step"):
        allocate_ranks(model, 0.4, step=0)


def test_out_of_reach_says_what_is_reachable():
    model, _ = small_vit()
    with pytest.raises(BudgetError, match=r"0\.9 .* out of reach: at rank 1 everywhere (0\.\d+)") as caught:
        allocate_ranks(model, 0.9)
    most = float(str(caught.value).split("everywhere ")[1].split()[0])
    assert most <= allocate_ranks(model, most).reached < 0.9


def test_gaps_between_ranks_say_what_is_reachable():
    # One layer's attention in MACs goes in steps of 1/32 and nothing else.
    model, _ = small_vit(num_hidden_layers=1)
    with pytest.raises(BudgetError, match=r"can be reached") as caught:
        allocate_ranks(model, 0.4, scope="attention", metric="macs")
    reachable = float(str(caught.value).split("; ")[1].split()[0])
    assert allocate_ranks(model, reachable, scope="attention", metric="macs").reached >= reachable


def test_nothing_left_to_factorise_is_said():
    model = compress(small_vit()[0], 0.5)
    with pytest.raises(BudgetError, match="nothing is left"):
        allocate_ranks(model, 0.3)


@pytest.mark.parametrize("share", ["", "attention", "mlp"])
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_modules_that_blocks_share_count_as_often_as_they_run(metric, share):
    model, _ = small_vit(num_hidden_layers=3)
    layers = model.vit.layers
    if share:
        setattr(layers[1], share, getattr(layers[0], share))
    else:
        layers[1] = layers[0]
    plan = allocate_ranks(model, 0.3, metric=metric)
    count = {"params": count_parameters, "macs": count_macs}[metric]
    assert plan.reached == 1 - count(compress(model, plan=plan)) / count(model)


def test_every_rank_to_choose_saves_something():
    # A factorised layer has a bias: of 29 ranks it is more than what the last one saves.
    model, inputs = small_vit(intermediate_size=76)
    model.vit.layers[0].mlp.fc1.bias = None
    model.vit.spare = torch.nn.ModuleList([model.vit.layers[0].__class__(model.config)])
    for metric in ("params", "macs"):
        options = find_options(model, find_sites(model, width=True), METRICS[metric], inputs)
        assert all(option.saved(rank) > 0 for option in options for rank in range(1, option.end))
        ends = {option.site.name: option.end for option in options}
        assert ends["vit.layers.0.mlp.fc1"] == (29 if metric == "params" else 30)
        assert ("vit.spare.0.mlp.fc1" in ends) == (metric == "params"), "what is not run has no MACs to save"


def test_rounding_asks_for_nothing():
    model = demo_vit()
    sites, total = find_sites(model), count_parameters(model)
    found = [
        find_budget(model, sites, asked / total, METRICS["params"], Request())[0].asked for asked in range(1, 2000)
    ]
    assert found == list(range(1, 2000))


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 1.5, 50, float("nan"), float("inf"), "0.5", None, True, Fraction(1, 2)])
def test_reductions_that_are_no_share_are_refused(wrong):
    with pytest.raises(InvalidValueError, match="reduction"):
        allocate_ranks(small_vit()[0], wrong)


@pytest.mark.parametrize(
    ("option", "value"), [("scope", "everything"), ("metric", "flops"), ("strategy", "luck"), ("step", 1.5)]
)
def test_options_that_do_not_exist_are_refused(option, value):
    with pytest.raises(InvalidValueError, match=option):
        allocate_ranks(small_vit()[0], 0.5, **{option: value})


@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_an_edited_plan_is_counted_again(metric, scope):
    model = demo_vit()
    plan = allocate_ranks(model, 0.3, metric=metric, scope=scope)
    name, entry = next(iter(plan.ranks.items()))
    smaller = {pair: rank - 1 for pair, rank in entry.items()} if isinstance(entry, dict) else entry - 1
    count = {"params": count_parameters, "macs": count_macs}[metric]
    names = None if scope == "model" else tuple(find_sites(model, scope))
    for edited in (plan.with_ranks({name: smaller}), replace(plan, ranks={name: smaller}), plan):
        small = compress(model, plan=edited)
        reached = 1 - count(small, names) / count(model, names)
        assert plan_of(small) == replace(edited, reached=reached)
    assert reached == plan.reached
    small.vit.layers[0] = model.vit.layers[0]
    assert plan_of(small).reached is None
