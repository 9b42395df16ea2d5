"""Budgets in measured latency: tables by hand, since times are noise; what is measured is looked at for its form."""

import itertools
import json
import logging

import pytest
import torch

from comcat_hf import LatencyTable, RankPlan, allocate_ranks, compress, measure_latency, plan_of, search_ranks
from comcat_hf.compression import measure_sensitivities
from comcat_hf.compression.budget import allocation
from comcat_hf.compression.budget.budget import TOLERANCE
from comcat_hf.compression.budget.latency import LATENCY_NAME, LatencyMetric, ShapeTimes
from comcat_hf.compression.budget.timing import _WHOLE, _shapes
from comcat_hf.compression.counting import trace
from comcat_hf.compression.request import sites_by_way
from comcat_hf.errors import BudgetError, CheckpointError, InvalidValueError
from comcat_hf.modeling import find_sites
from tests.compression.test_allocation import all_ranks, deit_small, without_weights
from tests.helpers import (
    MODELS,
    assert_unchanged,
    classes_of,
    image_inputs,
    images,
    small_bert,
    small_dinov2,
    small_vit,
    state_of,
)


def wide_vit():
    """With weights, and heads wide enough that a single rank is less than what a plan may be off."""
    return small_vit(hidden_size=128, num_attention_heads=2, intermediate_size=256, num_hidden_layers=4)


def table_of(model, inputs=None, *, fixed=0.1, total=None):
    """A table by hand: times that grow with the rank from a fixed share of the dense time."""
    sites, tokens = find_sites(model, width=True), trace(model, inputs, whole=False).tokens
    shapes, every = {}, 0
    for name, site in sites.items():
        inside = any(name in other.dense_modules() for other in sites.values() if other.kind == "mlp")
        numbers = sum(p.numel() for module in site.dense_modules().values() for p in module.parameters())
        dense = 1000 * numbers * tokens[site.moments_path].queries
        every += 0 if inside else dense
        limit = next(iter(site.choices.values()))
        ranks = {max(limit * i // 6, 1) for i in range(1, 6)}
        times = {rank: round(dense * (fixed + (1 - fixed) * rank / limit)) for rank in ranks}
        shape = site.signature(tokens[site.moments_path])
        count = shapes[shape].sites + 1 if shape in shapes else 1
        shapes[shape] = ShapeTimes(count, dense, {"+".join(site.choices): times})
    return LatencyTable(total or round(1.25 * every), shapes, "a class", "a device", "torch.float32", 2, 8)


def predicted(table, model, ranks, inputs=None):
    """Nanoseconds that a plan saves, entry by entry."""
    sites, tokens = find_sites(model, width=True), trace(model, inputs, whole=False).tokens
    return sum(
        table.shapes[sites[n].signature(tokens[sites[n].moments_path])].saved(c, sites[n].choices[c])[rank]
        for n, entry in ranks.items()
        for c, rank in sites[n].ranks(entry).items()
        if rank is not None
    )


def falls_to_zero(saved):
    return saved[-1] == 0 and all(high > low or high == low == 0 for high, low in itertools.pairwise(saved[1:]))


def test_between_the_ranks_timed_a_line():
    saved = ShapeTimes(1, 1_000_000, {"rank": {10: 400_000, 20: 600_000}}).saved("rank", 40)
    assert len(saved) == 41
    assert falls_to_zero(saved)
    expected = {1: 600_000, 10: 600_000, 15: 500_000, 20: 400_000, 30: 200_000, 40: 0}
    assert {rank: saved[rank] for rank in expected} == pytest.approx(expected, abs=40)
    beyond = ShapeTimes(1, 1_000_000, {"rank": {10: 400_000, 20: 600_000, 40: 500_000, 50: 500_000}})
    assert beyond.saved("rank", 40) == saved


def test_pairs_timed_together_share_what_they_save():
    times = ShapeTimes(1, 1_000_000, {"qk+vo": {16: 500_000, 48: 800_000}})
    assert times.saved("qk", 64) == times.saved("vo", 64)
    assert [times.saved("qk", 64)[rank] for rank in (16, 32, 48)] == pytest.approx([250e3, 175e3, 100e3], abs=100)


@pytest.mark.parametrize(
    "noisy", [{8: 500, 16: 900, 24: 300, 32: 800}, {8: 1500, 16: 400}, {8: 999, 16: 1000, 24: 1001}, {8: 700}]
)
def test_noise_saves_nothing_and_never_less(noisy):
    times = {rank: 1000 * time for rank, time in noisy.items()}
    saved = ShapeTimes(1, 1_000_000, {"rank": times}).saved("rank", 40)
    assert falls_to_zero(saved)
    assert min(saved) == 0
    assert max(saved) < 1_000_000


def test_times_that_fall_are_averaged():
    saved = ShapeTimes(1, 1_000_000, {"rank": {8: 900_000, 16: 600_000, 24: 300_000}}).saved("rank", 40)
    assert [saved[rank] for rank in (8, 16, 24)] == pytest.approx([400e3] * 3, abs=40)


def test_what_was_not_timed_saves_nothing():
    assert ShapeTimes(1, 1000).saved("rank", 12) == (0,) * 13
    assert ShapeTimes(1, 1000, {"rank": {8: 1000, 16: 2000}}).saved("rank", 40) == (0,) * 41


@pytest.mark.parametrize("mlp", ["rank", "width"])
@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
def test_uniform_lands_on_what_was_asked(scope, mlp):
    model = without_weights(deit_small)
    table = table_of(model)
    for asked in (0.1, 0.3, 0.5):
        plan = allocate_ranks(model, asked, scope=scope, metric="latency", latency=table, mlp=mlp)
        assert asked <= plan.reached <= asked + TOLERANCE
        assert (plan.metric, plan.scope, plan.reduction) == ("latency", scope, asked)
        total = table.total if scope == "model" else scope_total(table, model, scope, mlp)
        assert plan.reached == pytest.approx(predicted(table, model, plan.ranks) / total)
        kinds = {type(entry) for entry in plan.ranks.values()}
        assert (int in kinds) == (scope != "attention" and (mlp == "rank" or "classifier" in plan.ranks))


def scope_total(table, model, scope, mlp):
    tokens = trace(model).tokens
    sites = sites_by_way(find_sites(model, scope, width=True), mlp)
    return sum(table.shapes[site.signature(tokens[site.moments_path])].dense for site in sites.values())


@pytest.mark.parametrize("scope", ["model", "attention", "mlp"])
@pytest.mark.parametrize("strategy", ["spectrum", "sensitivity"])
@pytest.mark.parametrize("mlp", ["rank", "width", "mixed"])
def test_informed_strategies_land_too(strategy, scope, mlp):
    model, inputs = wide_vit()
    table = table_of(model)
    plan = allocate_ranks(
        model, 0.4, scope=scope, metric="latency", latency=table, strategy=strategy, mlp=mlp, batches=[inputs]
    )
    assert 0.4 <= plan.reached <= 0.4 + TOLERANCE
    assert plan.strategy == strategy


def test_mixed_counts_every_mlp_once():
    model = without_weights(deit_small)
    table, tokens = table_of(model), trace(model).tokens
    sites = find_sites(model, "mlp", width=True)
    names = tuple(sites)
    mixed = LatencyMetric(table, sites, tokens)(model, names)
    assert mixed == LatencyMetric(table, sites_by_way(sites, "width"), tokens)(model, names)


@pytest.mark.parametrize("build", [small_bert, small_dinov2, MODELS["dinov2_swiglu"], MODELS["clip_vision"]])
def test_families_land_and_compress(build):
    model, inputs = build()
    inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    small = compress(
        model, 0.3, metric="latency", latency=table_of(model, inputs), inputs=inputs, mlp="width", strategy="uniform"
    )
    plan = plan_of(small)
    assert plan.metric == "latency"
    assert 0.3 <= plan.reached <= 0.3 + TOLERANCE


def test_ranks_that_save_nothing_are_not_chosen():
    model = without_weights(deit_small)
    table = table_of(model)
    slow = {
        shape: ShapeTimes(
            times.sites, times.dense, {c: dict.fromkeys(r, 2 * times.dense) for c, r in times.choices.items()}
        )
        if shape.startswith("attention")
        else ShapeTimes(times.sites, times.dense, {"rank": {32: times.dense // 4, 200: times.dense}})
        if shape.startswith("linear 384 to 1536")
        else times
        for shape, times in table.shapes.items()
    }
    table = LatencyTable(table.total, slow)
    plan = allocate_ranks(model, 0.2, metric="latency", latency=table, mlp="rank")
    assert not any("attention" in name for name in plan.ranks)
    assert all(rank < 200 for name, rank in plan.ranks.items() if name.endswith("fc1"))
    with pytest.raises(BudgetError, match="latency is out of reach: nothing is left"):
        allocate_ranks(model, 0.2, scope="attention", metric="latency", latency=table)


def test_out_of_reach_says_what_is_reachable():
    model = without_weights(deit_small)
    table = table_of(model, fixed=0.5)
    with pytest.raises(BudgetError, match=r"latency is out of reach: at rank 1 everywhere 0\.\d+") as caught:
        allocate_ranks(model, 0.9, metric="latency", latency=table)
    most = float(str(caught.value).split("everywhere ")[1].split()[0])
    assert most <= allocate_ranks(model, most, metric="latency", latency=table).reached < 0.9


def test_sensitivities_measured_before_serve():
    model, inputs = small_vit()
    table = table_of(model)
    table = LatencyTable(
        table.total,
        {
            # Nothing is saved from a low rank on, which the sensitivities know nothing of.
            shape: ShapeTimes(
                times.sites, times.dense, {c: {1: times.dense // 9, 8: times.dense} for c in times.choices}
            )
            for shape, times in table.shapes.items()
        },
    )
    known = measure_sensitivities(model, [inputs], mlp="rank")
    plan = allocate_ranks(
        model,
        0.2,
        metric="latency",
        latency=table,
        strategy="sensitivity",
        mlp="rank",
        sensitivities=known,
        batches=[inputs],
    )
    assert 0.2 <= plan.reached <= 0.2 + TOLERANCE
    assert max(all_ranks(plan)) < 8


def test_tables_are_kept(tmp_path):
    table = table_of(small_vit()[0])
    table.save_pretrained(tmp_path)
    assert LatencyTable.from_pretrained(tmp_path) == table == LatencyTable.from_pretrained(tmp_path / LATENCY_NAME)
    assert [path.name for path in tmp_path.iterdir()] == [LATENCY_NAME]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(format="comcat_ranks"),
        lambda content: content.update(format_version=2),
        lambda content: content.update(colour="red"),
        lambda content: content.update(total=0),
        lambda content: content.update(total=1.5),
        lambda content: content.update(batch_size=0),
        lambda content: content.pop("shapes"),
        lambda content: content.pop("total"),
        lambda content: content["shapes"].update(more=3),
        lambda content: content["shapes"].update(more={"sites": 0, "dense": 10, "choices": {}}),
        lambda content: content["shapes"].update(more={"sites": 1, "dense": 10, "choices": {"rank": {"few": 3}}}),
        lambda content: content["shapes"].update(more={"sites": 1, "dense": 10, "choices": {"rank": {"8": -3}}}),
    ],
)
def test_damaged_tables_are_refused(tmp_path, change):
    table_of(small_vit()[0]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / LATENCY_NAME).read_text())
    change(content)
    (tmp_path / LATENCY_NAME).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=LATENCY_NAME):
        LatencyTable.from_pretrained(tmp_path)


def test_a_rank_file_is_no_table(tmp_path):
    RankPlan({"a": 3}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=LATENCY_NAME):
        LatencyTable.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 96}, r"no times for vit.*'attention 96, 3 heads of 32.*measure_latency"),
        ({"image_size": 64}, r"65 tokens', found .*17 tokens.*measure_latency"),
        ({"num_hidden_layers": 3}, r"2 sites of the shape 'attention .*', found 3"),
        ({"attn_implementation": "eager"}, "eager"),
    ],
)
def test_another_models_table_is_refused(settings, message):
    table = table_of(small_vit()[0])
    with pytest.raises(InvalidValueError, match=message):
        allocate_ranks(small_vit(**settings)[0], 0.3, metric="latency", latency=table)


@pytest.mark.parametrize("path", ["vit.layers.0.attention.q_proj", "classifier"])
def test_biases_are_part_of_a_shape(path):
    model, _ = small_vit()
    table = table_of(model)
    model.get_submodule(path).bias = None
    with pytest.raises(InvalidValueError, match=f"no times for {path.removesuffix('.q_proj')}"):
        allocate_ranks(model, 0.3, metric="latency", latency=table)


@pytest.mark.parametrize("scope", ["model", "mlp"])
def test_what_no_sample_runs_takes_no_time(scope):
    model, _ = wide_vit()
    options = {"scope": scope, "metric": "latency", "latency": table_of(model)}
    plan = allocate_ranks(model, 0.3, **options)
    model.vit.layers[0].mlp.spare = torch.nn.Linear(128, 128)
    assert "vit.layers.0.mlp.spare" in find_sites(model, scope)
    assert allocate_ranks(model, 0.3, **options) == plan


def test_other_inputs_need_a_table_of_their_own():
    model, inputs = small_bert()
    table = table_of(model, {"input_ids": inputs["input_ids"][:, :7]})
    with pytest.raises(InvalidValueError, match=r"10 tokens.*inputs="):
        allocate_ranks(model, 0.3, metric="latency", latency=table, inputs=inputs)


def test_in_a_scope_of_its_own_the_depth_does_not_matter():
    table = table_of(small_vit()[0])
    plan = allocate_ranks(small_vit(num_hidden_layers=3)[0], 0.3, scope="attention", metric="latency", latency=table)
    assert 0.3 <= plan.reached <= 0.3 + TOLERANCE


def test_what_was_compressed_before_is_in_the_total():
    model = compress(wide_vit()[0], 0.3, scope="attention")
    plan = allocate_ranks(model, 0.3, metric="latency", latency=table_of(model))
    assert 0.3 <= plan.reached <= 0.3 + TOLERANCE
    assert not any("attention" in name for name in plan.ranks)


@pytest.mark.parametrize("options", [{"metric": "params"}, {"metric": "macs"}])
def test_a_table_is_for_latency_alone(options):
    model, _ = small_vit()
    with pytest.raises(InvalidValueError, match="latency must be a LatencyTable beside metric='latency'"):
        allocate_ranks(model, 0.3, latency=table_of(model), **options)
    with pytest.raises(InvalidValueError, match="got dict"):
        allocate_ranks(model, 0.3, metric="latency", latency={})


def test_the_search_says_who_takes_latency():
    with pytest.raises(InvalidValueError, match=r"'params', 'macs' here, got 'latency', which allocate_ranks"):
        search_ranks(small_vit()[0], [{**image_inputs(), "labels": torch.zeros(2)}], 0.3, metric="latency", steps=1)


def test_without_a_table_one_is_measured_and_that_is_said(monkeypatch, caplog):
    model, inputs = small_vit()
    asked = []

    def measure(model, inputs, *, progress):
        asked.append(inputs)
        return table_of(model, inputs)

    monkeypatch.setattr(allocation, "measure_latency", measure)
    with caplog.at_level(logging.INFO, logger="comcat_hf"):
        plan = allocate_ranks(model, 0.3, metric="latency", inputs=inputs)
    assert asked == [inputs]
    assert 0.3 <= plan.reached <= 0.3 + TOLERANCE
    assert "no table given" in caplog.text


def check_form(table, model, inputs):
    tokens = trace(model, inputs, whole=False).tokens
    sites = find_sites(model, width=True)
    shapes = {site.signature(tokens[site.moments_path]) for site in sites.values()}
    assert set(table.shapes) == shapes
    assert sum(times.sites for times in table.shapes.values()) == len(sites)
    assert {choice for times in table.shapes.values() for choice in times.choices} == {"qk+vo", "width", "rank"}
    every = [table.total, *(times.dense for times in table.shapes.values())]
    for times in table.shapes.values():
        assert all(1 <= len(ranks) <= 6 for ranks in times.choices.values())
        every += [time for ranks in times.choices.values() for time in ranks.values()]
    assert all(type(time) is int and time > 0 for time in every)
    assert table.device
    assert (table.dtype, table.threads) == ("torch.float32", torch.get_num_threads())
    assert type(model).__name__ in table.architecture
    LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))).check_model(sites, tokens, whole=True)


@pytest.mark.parametrize("family", ["vit", "bert", "videomae", "dinov2_swiglu", "clip"])
def test_what_is_measured_has_the_form_of_a_table(family, caplog):
    model, inputs = MODELS[family]()
    model.train()
    state, classes, noise = state_of(model), classes_of(model), torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="comcat_hf"):
        table = measure_latency(model, inputs, batch_size=3, repeats=1)
    assert table.batch_size == 3
    check_form(table, model, inputs)
    assert_unchanged(model, state, classes)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), noise)
    assert "rounds: about" in caplog.text
    # Nothing that inference mode made has stayed behind.
    loss = sum(value.float().sum() for value in model(**inputs).to_tuple() if isinstance(value, torch.Tensor))
    loss.backward()


def test_native_size_where_no_inputs_are_given():
    model, _ = small_vit()
    check_form(measure_latency(model, repeats=1, step=2), model, None)


def test_equal_blocks_are_timed_once_and_drift_cancels():
    rounds = {
        _WHOLE: [100.0, 300.0, 100.0],
        ("a", "", 0): [10.0, 30.0, 10.0],
        ("a", "rank", 8): [5.0, 15.0, 5.0],
        ("b", "", 0): [20.0, 60.0, 20.0],
    }
    seconds = {key: [time / 1e9 for time in times] for key, times in rounds.items()}
    assert _shapes(seconds, {"a": 12, "b": 1}) == {
        "a": ShapeTimes(12, 10, {"rank": {8: 5}}),
        "b": ShapeTimes(1, 20, {}),
    }


def test_what_cannot_be_measured_is_refused():
    model, _ = small_vit()
    for wrong in ({"batch_size": 0}, {"repeats": 0}, {"step": 1.5}, {"batch_size": True}):
        with pytest.raises(InvalidValueError, match=next(iter(wrong))):
            measure_latency(model, **wrong)
    with pytest.raises(InvalidValueError, match=r"meta device.*LatencyTable"):
        measure_latency(model.to("meta"))
    with pytest.raises(InvalidValueError, match="inputs"):
        measure_latency(small_vit()[0], {"pixel_values": images()[:, :1]}, repeats=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_table_is_of_the_gpu(dtype):
    model, inputs = small_vit()
    table = measure_latency(model.to("cuda", dtype), inputs, repeats=1)
    assert (table.device, table.dtype) == (torch.cuda.get_device_name(), str(dtype))
    assert all(times.dense > 0 for times in table.shapes.values())
