"""Ranks by discarded energy and by measured sensitivity: on budget, where it matters, and the model as it was."""

import logging
import re

import pytest
import torch
from torch.utils.data import DataLoader

from comcat_hf import allocate_ranks, collect_statistics, compress, measure_sensitivities, plan_of
from comcat_hf.compression.budget import sensitivity as module
from comcat_hf.compression.budget.budget import METRICS, TOLERANCE, find_budget
from comcat_hf.compression.budget.sensitivity import interpolate, measure
from comcat_hf.compression.calibration.outputs import Movement, main_output
from comcat_hf.compression.counting import count_parameters
from comcat_hf.compression.request import Request
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import LowRankAttention, NarrowLinear, find_sites
from tests.compression.test_allocation import all_ranks, deit_small, demo_vit, without_weights
from tests.compression.test_compress import correlated_images
from tests.helpers import MODELS, assert_unchanged, classes_of, images, small_bert, small_vit, state_of


LOW = "vit.layers.1.mlp.fc1"


def budget_of(model, reduction=0.4):
    return find_budget(model, find_sites(model), reduction, METRICS["params"], Request())[0]


def movement(model, small, inputs):
    moved = Movement(model)
    with torch.no_grad():
        moved.add(main_output(model(**inputs)), main_output(small(**inputs)))
    return moved.total()


def with_low_rank_layer(rank=3, **settings):
    model, inputs = small_vit(**settings)
    with torch.no_grad():
        weight = model.get_submodule(LOW).weight
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        # As much energy as before.
        values[rank:] = 0
        weight.copy_((left * values * weight.norm() / values.norm()) @ right)
    return model, inputs


def uneven_vit():
    """One layer that matters much more than the others."""
    model, _ = small_vit(num_hidden_layers=4)
    with torch.no_grad():
        for layer, scale in ((1, 4), (2, 0.1)):
            block = model.vit.layers[layer]
            for linear in (block.attention.o_proj, block.mlp.fc2):
                linear.weight.mul_(scale)
    return model


@pytest.mark.parametrize("asked", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("strategy", ["spectrum", "sensitivity"])
def test_plans_land_on_what_was_asked(strategy, scope, asked):
    model = demo_vit()
    pixels = torch.randn(4, 3, 8, 8)
    plan = allocate_ranks(model, asked, scope=scope, strategy=strategy, batches=[pixels])
    assert asked <= plan.reached <= asked + TOLERANCE
    assert (plan.strategy, plan.scope, plan.reduction) == (strategy, scope, asked)
    small = compress(model, plan=plan)
    if scope == "model":
        assert plan.reached == 1 - count_parameters(small) / count_parameters(model)


@pytest.mark.parametrize("family", ["bert", "clip", "videomae", "dpt", "yolos", "siglip_vision"])
def test_every_kind_of_output_can_be_measured(family):
    model, inputs = MODELS[family]()
    state, classes = state_of(model), classes_of(model)
    for options in ({"strategy": "spectrum"}, {"strategy": "sensitivity", "batches": [inputs]}, {"metric": "macs"}):
        plan = allocate_ranks(model, 0.25, **{"strategy": "spectrum", **options})
        assert 0.25 <= plan.reached <= 0.25 + TOLERANCE
    assert_unchanged(model, state, classes)


def test_spectrum_on_a_model_of_real_size():
    model = deit_small()
    for asked in (0.3, 0.6):
        plan = allocate_ranks(model, asked, strategy="spectrum")
        assert asked <= plan.reached <= asked + TOLERANCE
        assert sum(rank % 8 != 0 for rank in all_ranks(plan)) == 0


def test_spectrum_needs_weights():
    with pytest.raises(InvalidValueError, match=r"vit\.layers\.0|deit\.layers\.0"):
        allocate_ranks(without_weights(deit_small), 0.3, strategy="spectrum")


@pytest.mark.parametrize("strategy", ["spectrum", "sensitivity"])
def test_a_layer_of_low_rank_gets_a_low_rank(strategy):
    model, inputs = with_low_rank_layer()
    options = {"strategy": strategy, "batches": [inputs]}
    plan = allocate_ranks(model, 0.3, scope="mlp", mlp="rank", **options)
    others = [rank for name, rank in plan.ranks.items() if name != LOW]
    dense = sorted(set(find_sites(model, "mlp")) - set(plan.ranks))
    assert plan.ranks[LOW] <= 4
    assert dense or min(others) > 3 * plan.ranks[LOW]


@pytest.mark.parametrize("asked", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("mlp", ["width", "rank", "mixed"])
@pytest.mark.parametrize("strategy", ["spectrum", "sensitivity"])
def test_a_cut_that_costs_nothing_is_taken(strategy, mlp, asked):
    model, inputs = small_vit()
    with torch.no_grad():
        for layer in model.vit.layers:
            for parameter in layer.mlp.parameters():
                parameter.zero_()
    small = compress(model, 1.05 * asked, batches=[inputs], strategy=strategy, mlp=mlp)
    assert not any("attention" in name for name in plan_of(small).ranks)
    assert movement(model, small, inputs) < 1e-10


def test_statistics_change_what_counts_as_energy():
    model, _ = small_vit()
    seen = correlated_images(32, 1)
    options = {"strategy": "spectrum", "mlp": "rank"}
    blind = allocate_ranks(model, 0.4, **options)
    informed = allocate_ranks(model, 0.4, statistics=collect_statistics(model, [seen]), **options)
    assert blind.ranks != informed.ranks
    assert plan_of(compress(model, 0.4, batches=[seen], **options)).ranks == informed.ranks
    assert plan_of(compress(model, 0.4, **options)).ranks == blind.ranks


@pytest.mark.parametrize("reduction", [0.2, 0.4])
def test_sensitivity_moves_the_output_less(reduction):
    model = uneven_vit()
    seen, unseen = correlated_images(32, 1), {"pixel_values": correlated_images(64, 2)}
    even, measured = (
        movement(model, compress(model, reduction, strategy=strategy, batches=seen.split(8)), unseen)
        for strategy in ("uniform", "sensitivity")
    )
    assert measured < 0.3 * even


def test_runs_from_a_later_block_measure_the_same(monkeypatch):
    model, _ = small_vit(num_hidden_layers=4)
    budget, batches = budget_of(model), [images(3), images(2) * 0.5]
    skipped = []
    run = module._Meter.movement

    def watched(meter, what):
        skipped.append(len(meter.skipped))
        return run(meter, what)

    monkeypatch.setattr(module._Meter, "movement", watched)
    fast = measure(model, budget.options, budget.step, batches)
    assert set(skipped) == {0, 1, 2, 3}
    monkeypatch.setattr(module, "_blocks_before", lambda model, block: ())
    slow = measure(model, budget.options, budget.step, batches)
    assert list(fast) == list(slow) == [(option.site.name, option.choice) for option in budget.options]
    for key, movements in fast.items():
        assert movements == pytest.approx(slow[key], rel=1e-3, abs=1e-12)
        assert 3 <= len(movements) <= 4


def test_a_model_that_uses_every_block_runs_in_full(monkeypatch):
    model, inputs = MODELS["dpt"]()
    budget = budget_of(model)
    expected = measure(model, budget.options, budget.step, [inputs])
    monkeypatch.setattr(module, "_blocks_before", lambda model, block: ())
    found = measure(model, budget.options, budget.step, [inputs])
    for one, other in zip(expected.values(), found.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-12)


def test_batches_are_read_once_and_may_be_shuffled():
    model, _ = small_vit()
    reads = []

    def once():
        reads.append(True)
        yield from images(4).split(2)

    plan = allocate_ranks(model, 0.4, strategy="sensitivity", batches=once())
    assert len(reads) == 1
    assert plan == allocate_ranks(model, 0.4, strategy="sensitivity", batches=images(4).split(2))
    small = compress(model, 0.4, strategy="sensitivity", batches=once())
    assert plan_of(small).ranks == plan.ranks
    loader = DataLoader(images(4), batch_size=2, shuffle=True)
    assert allocate_ranks(model, 0.4, strategy="sensitivity", batches=loader).reached >= 0.4
    statistics = collect_statistics(model, images(4).split(2))
    given = compress(model, 0.4, strategy="sensitivity", batches=images(4).split(2), statistics=statistics)
    assert plan_of(given).ranks == plan.ranks


def test_measured_once_for_several_plans_of_the_same_way():
    model, _ = small_vit()
    batches = images(4).split(2)
    statistics = collect_statistics(model, batches)
    measured = measure_sensitivities(model, batches, statistics=statistics)
    for reduction in (0.3, 0.5):
        options = {"strategy": "sensitivity", "statistics": statistics}
        plan = allocate_ranks(model, reduction, sensitivities=measured, **options)
        assert plan == allocate_ranks(model, reduction, batches=batches, **options)
    with pytest.raises(InvalidValueError, match=r"lack vit.layers.0.mlp.fc1, rank, and 3 more"):
        allocate_ranks(model, 0.3, mlp="mixed", sensitivities=measured, **options)


@pytest.mark.parametrize("wrong", [{4: float("nan")}, {4: float("inf")}, {4: "0.1"}, {"4": 0.1}, {0: 0.1}, {17: 0.1}])
def test_sensitivities_that_are_none_are_refused(wrong):
    model, inputs = small_vit()
    statistics = collect_statistics(model, [inputs])
    measured = {
        **measure_sensitivities(model, [inputs], statistics=statistics),
        ("vit.layers.1.attention", "vo"): wrong,
    }
    with pytest.raises(
        InvalidValueError, match=r"vit\.layers\.1\.attention, vo: expected ranks from 1 to 16 with finite"
    ):
        allocate_ranks(model, 0.3, statistics=statistics, sensitivities=measured)


def test_the_model_is_left_as_it_was_also_on_error(monkeypatch):
    model, inputs = small_vit()
    model.train()
    model.vit.layers[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state, classes = state_of(model), classes_of(model)
    allocate_ranks(model, 0.4, strategy="sensitivity", batches=[inputs])

    def broken(meter, what):
        if "layers.1.mlp" in what:
            assert any(isinstance(m, (LowRankAttention, NarrowLinear)) for m in model.modules())
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(module._Meter, "movement", broken)
    with pytest.raises(KeyboardInterrupt):
        allocate_ranks(model, 0.4, strategy="sensitivity", batches=[inputs])
    assert_unchanged(model, state, classes)
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_it_will_cost_is_said_and_kept(caplog):
    model, inputs = small_vit()
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(True))
    statistics = collect_statistics(model, [inputs])
    passes.clear()
    with caplog.at_level(logging.INFO, "comcat_hf"):
        allocate_ranks(model, 0.4, strategy="sensitivity", batches=[inputs, inputs], statistics=statistics)
    handle.remove()
    assert "20 truncations of 6 pairs and layers on 2 batches: at most 51 forward passes" in caplog.text
    assert re.search(r"no more than about \d+ seconds", caplog.text)
    assert 40 < len(passes) <= 51


def test_a_long_measurement_is_said_to_everybody(caplog, monkeypatch):
    model, inputs = small_vit()
    monkeypatch.setattr(module, "_LONG", 0.0)
    measure_sensitivities(model, [inputs])
    assert any(r.levelname == "WARNING" and "forward passes" in r.getMessage() for r in caplog.records)


def test_chance_in_the_output_is_warned_of(caplog):
    model, inputs = MODELS["vit_mae"]()
    allocate_ranks(model, 0.3, strategy="sensitivity", batches=[{"pixel_values": inputs["pixel_values"]}])
    assert "another output when it runs again" in caplog.text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strategy": "sensitivity"}, "pass batches="),
        ({"strategy": "sensitivity", "batches": []}, "empty"),
        ({"strategy": "sensitivity", "batches": [{"images": 1}]}, "pixel_values"),
        ({"strategy": "sensitivity", "batches": [torch.zeros(2, 3, 16, 16)]}, "Calibration batch 0"),
        ({"strategy": "sensitivity", "batches": [images() * float("nan")]}, "not finite"),
    ],
)
def test_batches_that_cannot_be_measured_on_are_refused(options, says):
    for call in (allocate_ranks, compress):
        with pytest.raises(InvalidValueError, match=says):
            call(small_vit()[0], 0.4, **options)


@pytest.mark.parametrize("strategy", ["spectrum", "sensitivity"])
def test_statistics_of_another_model_are_refused(strategy):
    model, inputs = small_vit()
    bert, text = small_bert()
    others = {
        "Bert": collect_statistics(bert, [text]),
        "shape": collect_statistics(small_vit(hidden_size=96)[0], [inputs]),
        r"scope='attention', lack": collect_statistics(model, [inputs], scope="attention"),
    }
    for says, statistics in others.items():
        with pytest.raises(InvalidValueError, match=says):
            allocate_ranks(model, 0.4, strategy=strategy, statistics=statistics, batches=[inputs])


def test_movement_between_measured_ranks_follows_the_energy():
    energy = torch.tensor([1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0], dtype=torch.float64)
    measured = {2: 0.4, 4: 0.1, 6: 0.02}
    found = interpolate(energy, measured)
    assert {rank: pytest.approx(float(found[rank])) for rank in measured} == measured
    torch.testing.assert_close(found[:7], 2 * energy[:7])
    assert found[-1] == 0
    chance = interpolate(energy, {2: 0.1, 4: 0.3, 6: 0.02})
    assert (chance.diff() <= 1e-15).all()
    assert float(chance[2]) == pytest.approx(0.3)
    assert (interpolate(torch.zeros(5, dtype=torch.float64), {2: 0.0}) <= 1e-10).all()
    assert interpolate(energy, {}).count_nonzero() == 0
