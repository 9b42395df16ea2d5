"""The nested search computes what the written-out one does, and ends in a plan that meets the budget."""

import copy

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from comcat_hf import collect_statistics, count_parameters
from comcat_hf.closed_forms.attention import factorize_qk, factorize_vo
from comcat_hf.closed_forms.linear import factorize_linear
from comcat_hf.compression.budget.budget import TOLERANCE
from comcat_hf.compression.distillation import DistillationLoss
from comcat_hf.compression.search.nested import Candidates, NestedModel
from comcat_hf.compression.search.search import SearchState, search_ranks, split_for_search
from comcat_hf.errors import BudgetError, CheckpointError, ComCATError, InvalidValueError
from comcat_hf.modeling import apply_ranks, find_sites
from tests.helpers import (
    HEAD_DIM,
    MODELS,
    assert_unchanged,
    classes_of,
    images,
    outputs,
    small_vit,
    state_of,
)
from tests.processes import in_processes


RANKS = (4, 8, 12, HEAD_DIM)


def batches(count=4, labels=5):
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
            "labels": torch.randint(labels, (4,), generator=generator),
        }
        for _ in range(count)
    ]


def statistics_of(model, needed):
    return collect_statistics(model, [images(8)]) if needed else None


def scale_of(weights, ranks, size):
    return sum(
        weight * (torch.arange(size) < rank).to(weight.dtype) for weight, rank in zip(weights, ranks, strict=True)
    )


def keys_of(model, scope="model"):
    return [(name, choice) for name, site in find_sites(model, scope).items() for choice in site.choices]


def random_mixture(seed, count=4):
    logits = torch.randn(count, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return logits, logits.softmax(0)


def gradients(loss, logits):
    return torch.cat(torch.autograd.grad(loss, logits, retain_graph=True))


def assert_same(nested, written_out, logits):
    """Values to 1e-5 and gradients of the logits to 1e-4, relative."""
    assert (nested - written_out).norm() <= 1e-5 * written_out.norm()
    probe = torch.randn(nested.shape, generator=torch.Generator().manual_seed(9))
    one, other = gradients((nested * probe).sum(), logits), gradients((written_out * probe).sum(), logits)
    assert (one - other).norm() <= 1e-4 * other.norm()


def heads(view, tensor):
    return None if tensor is None else tensor.unflatten(0, (view.num_heads, HEAD_DIM))


def written_out_attention(view, states, qk_weights, vo_weights, moments):
    """Every candidate as dense per-head d×d products with exact biases, mixed."""
    scores = mixed = 0
    for rank, share in zip(RANKS, qk_weights, strict=True):
        query = heads(view, view.query.weight), heads(view, view.query.bias)
        f = factorize_qk(*query, heads(view, view.key.weight), rank, moments=moments)
        products = torch.einsum("hrd,hre->hde", f.query_weight, f.key_weight)
        shift = torch.einsum("hr,hre->he", f.query_bias, f.key_weight)
        score = torch.einsum("bnd,hde,bme->bhnm", states, products, states)
        scores = scores + share * (score + torch.einsum("he,bme->bhm", shift, states)[:, :, None])
    attention = (scores * getattr(view.module, view.family.scaling)).softmax(-1)
    output = view.output.weight.unflatten(1, (view.num_heads, HEAD_DIM)).transpose(0, 1)
    for rank, share in zip(RANKS, vo_weights, strict=True):
        value = heads(view, view.value.weight), heads(view, view.value.bias)
        f = factorize_vo(*value, output, view.output.bias, rank, moments=moments)
        products = torch.einsum("hrd,hor->hdo", f.value_weight, f.output_weight)
        out = torch.einsum("bhnm,bmd,hdo->bno", attention, states, products)
        mixed = mixed + share * (out + f.output_bias)
    return mixed


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_attention_is_the_written_out_mixture(seed, measured):
    model = small_vit(num_hidden_layers=1)[0].requires_grad_(False)
    statistics = statistics_of(model, measured)
    ((name, site),) = find_sites(model, "attention").items()
    states = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(seed))
    (qk, qk_weights), (vo, vo_weights) = random_mixture(2 * seed), random_mixture(2 * seed + 1)

    nested = NestedModel(model, keys_of(model, "attention"), statistics)
    nested._scales = {
        (name, "qk"): scale_of(qk_weights, RANKS, HEAD_DIM),
        (name, "vo"): scale_of(vo_weights, RANKS, HEAD_DIM),
    }
    found = nested.model.get_submodule(name)(states)[0]
    moments = statistics[name] if measured else None
    expected = written_out_attention(site.view, states, qk_weights, vo_weights, moments)
    assert_same(found, expected, [qk, vo])


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_linear_layers_are_the_written_out_mixture(seed, measured):
    model = small_vit(num_hidden_layers=1)[0].requires_grad_(False)
    statistics = statistics_of(model, measured)
    linears = {name: site for name, site in find_sites(model).items() if site.kind == "linear"}
    nested = NestedModel(model, [(name, "rank") for name in linears], statistics)
    assert len(nested.sizes) == 3
    for name, site in linears.items():
        linear, size = site.linear, min(site.linear.weight.shape)
        ranks = (1, 3, size)
        states = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(seed))
        logits, weights = random_mixture(seed, len(ranks))
        nested._scales = {(name, "rank"): scale_of(weights, ranks, size)}
        expected = 0
        for rank, share in zip(ranks, weights, strict=True):
            f = factorize_linear(linear.weight, linear.bias, rank, moments=statistics[name] if measured else None)
            expected = expected + share * (states @ (f.second_weight @ f.first_weight).T + f.bias)
        assert_same(nested.model.get_submodule(name)(states), expected, [logits])


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "bert", "clip_classifier", "videomae"])
def test_a_certain_choice_is_the_compressed_model(family, measured):
    model, inputs = MODELS[family](qkv_bias=False) if family == "deit" else MODELS[family]()
    model.requires_grad_(False)
    statistics = collect_statistics(model, [inputs]) if measured else None
    keys = keys_of(model)
    nested = NestedModel(model, keys, statistics)
    ones = {key: torch.ones(nested.sizes[key]) for key in keys}
    chosen = {key: (nested.sizes[key] + index % 3) // 3 for index, key in enumerate(keys)}
    masks = {key: (torch.arange(nested.sizes[key]) < rank).float() for key, rank in chosen.items()}
    ranks = {}
    for (name, choice), rank in chosen.items():
        ranks[name] = rank if choice == "rank" else {**ranks.get(name, {}), choice: rank}
    small = copy.deepcopy(model)
    apply_ranks(small, ranks, statistics=statistics)
    for scales, expected in ((ones, model), (masks, small)):
        found, wanted = nested(scales, **inputs).logits, outputs(expected, inputs)[0]
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("scope", "metric", "asked"),
    [("model", "params", 0.4), ("attention", "params", 0.6), ("mlp", "macs", 0.3), ("model", "macs", 0.5)],
)
def test_the_plan_meets_the_budget_and_leaves_the_model(scope, metric, asked):
    model, _ = small_vit(num_hidden_layers=4)
    model.train()
    state, classes, required = state_of(model), classes_of(model), [p.requires_grad for p in model.parameters()]
    plan = search_ranks(model, batches(), asked, scope=scope, metric=metric, steps=3)
    assert asked <= plan.reached <= asked + TOLERANCE
    assert (plan.scope, plan.metric, plan.strategy, plan.reduction) == (scope, metric, "search", asked)
    assert_unchanged(model, state, classes)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == required
    if (scope, metric) == ("model", "params"):
        small = copy.deepcopy(model)
        apply_ranks(small, plan.ranks)
        assert 1 - count_parameters(small) / count_parameters(model) == plan.reached


def expected_share(state, name):
    """Mean rank that an option's logits stand for, 0 to 1; dense counts 1."""
    row = state.probabilities()[name]
    largest = max(row) + min(row.keys() - {0})
    return sum(share * (rank or largest) for rank, share in row.items()) / largest


def test_the_search_lowers_the_cost_to_the_budget():
    model, _ = small_vit(num_hidden_layers=4)
    state, before = SearchState(), SearchState()
    search_ranks(model, batches(), 0.6, scope="attention", steps=1, learning_rate=1e-9, state=before)
    search_ranks(model, batches(), 0.6, scope="attention", steps=60, learning_rate=0.1, state=state)
    means = [sum(expected_share(s, name) for name in s.names) / len(s.names) for s in (before, state)]
    assert means[1] < means[0] - 0.1
    assert means[1] < 0.5


def test_ranks_stay_where_they_matter():
    model = small_vit(num_hidden_layers=3)[0].requires_grad_(False)
    sites = find_sites(model, "attention")
    poor = list(sites)[1]
    apply_to = sites[poor].view
    with torch.no_grad():
        # Beyond rank 4 nothing is in these heads.
        for linear in (apply_to.query, apply_to.key, apply_to.value):
            linear.weight.unflatten(0, (apply_to.num_heads, HEAD_DIM))[:, 4:] = 0
            linear.bias.unflatten(0, (apply_to.num_heads, HEAD_DIM))[:, 4:] = 0
    data = batches(6)
    with torch.no_grad():
        data = [batch | {"labels": model(batch["pixel_values"]).logits.mul(3).softmax(-1)} for batch in data]
    plan = search_ranks(model, data, 0.3, scope="attention", epochs=20, learning_rate=0.1)
    dense = dict.fromkeys(("qk", "vo"), HEAD_DIM)
    kept = {name: sum((dense | dict(plan.ranks.get(name, {}))).values()) for name in sites}
    assert all(kept[poor] < kept[name] for name in sites if name != poor), kept


class Interrupt(Exception):
    pass


class Interrupted:
    """A loader that breaks off after some batches."""

    def __init__(self, loader, after):
        self.loader, self.left = loader, after

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            if self.left == 0:
                raise Interrupt
            self.left -= 1
            yield batch


def shuffled():
    data = batches()
    rows = TensorDataset(*(torch.cat([batch[name] for batch in data]) for name in ("pixel_values", "labels")))

    def collate(samples):
        pixels, labels = zip(*samples, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}

    return DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)


@pytest.mark.parametrize("after", [2, 6])
def test_a_resumed_search_is_the_uninterrupted_one(after, tmp_path):
    model, _ = small_vit()
    whole, half = SearchState(), SearchState()
    plan = search_ranks(model, shuffled(), 0.5, epochs=3, state=whole, seed=3)
    with pytest.raises(Interrupt):
        search_ranks(model, Interrupted(shuffled(), after), 0.5, epochs=3, state=half, seed=3)
    assert half.step == after
    half.save(tmp_path / "state.pt")
    torch.rand(7)
    resumed = SearchState.load(tmp_path / "state.pt")
    assert search_ranks(model, shuffled(), 0.5, epochs=3, state=resumed, seed=3) == plan
    for name, value in whole.state_dict().items():
        other = getattr(resumed, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    other = SearchState()
    search_ranks(model, shuffled(), 0.5, epochs=3, state=other, seed=4)
    assert not torch.equal(other.logits, whole.logits)
    random = torch.get_rng_state()
    search_ranks(model, shuffled(), 0.5, steps=1)
    assert torch.equal(torch.get_rng_state(), random)


class Shuffling:
    """A loader that draws its order from torch's global generator, and keeps it."""

    def __init__(self):
        self.orders = []

    def __iter__(self):
        self.orders.append(torch.randperm(100).tolist())
        return iter(batches(2))


def test_every_epoch_has_an_order_of_its_own_by_the_seed():
    model, _ = small_vit()
    first, again, other = (Shuffling() for _ in range(3))
    for loader, seed in ((first, 3), (again, 3), (other, 5)):
        search_ranks(model, loader, 0.5, steps=4, seed=seed)
    assert first.orders == again.orders
    assert len({tuple(order) for order in first.orders + other.orders}) == 4


def test_the_noise_is_of_the_seed():
    model, _ = small_vit()
    states = [SearchState(), SearchState(), SearchState()]
    for state, seed in zip(states, (3, 3, 4), strict=True):
        search_ranks(model, batches(), 0.5, steps=2, state=state, seed=seed)
    assert torch.equal(states[0].logits, states[1].logits)
    assert not torch.equal(states[0].logits, states[2].logits)


def test_schedules_run_from_the_first_step_to_the_last(monkeypatch):
    temperatures, progress = [], []
    mix, forward = Candidates.mix, DistillationLoss.forward

    def mixing(candidates, logits, noise, temperature):
        temperatures.append(temperature)
        return mix(candidates, logits, noise, temperature)

    def learning(loss, student, teacher, labels, done):
        progress.append(done)
        return forward(loss, student, teacher, labels, done)

    monkeypatch.setattr(Candidates, "mix", mixing)
    monkeypatch.setattr(DistillationLoss, "forward", learning)
    search_ranks(small_vit()[0], batches(3), 0.5, steps=3, temperature=(4.0, 1.0))
    assert temperatures == pytest.approx([4, 2, 1])
    assert progress == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"weight_decay": 0.5}])
def test_options_take_part(options):
    model, _ = small_vit()
    plain, other = SearchState(), SearchState()
    search_ranks(model, batches(), 0.5, steps=2, state=plain)
    search_ranks(model, batches(), 0.5, steps=2, state=other, **options)
    assert not torch.equal(plain.logits, other.logits)


def test_five_epochs_by_default():
    state = SearchState()
    search_ranks(small_vit()[0], batches(2), 0.5, state=state)
    assert state.step == 10


def test_gradients_that_are_not_finite_are_an_error():
    (batch,) = batches(1)
    batch["pixel_values"][:] = float("nan")
    with pytest.raises(ComCATError, match="search step 0 are not finite"):
        search_ranks(small_vit()[0], [batch], 0.5, steps=1)


def test_files_that_hold_no_state_are_refused(tmp_path):
    torch.save({"step": 1}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("other", "empty", "missing"):
        with pytest.raises(CheckpointError, match=name):
            SearchState.load(tmp_path / f"{name}.pt")


def test_a_finished_search_is_not_repeated():
    model, _ = small_vit()
    state = SearchState()
    plan = search_ranks(model, batches(), 0.5, steps=2, state=state)
    assert set(state.probabilities()) == set(state.names)
    assert search_ranks(model, batches(), 0.5, steps=2, state=state) == plan
    assert state.step == 2


def test_statistics_take_part():
    model, _ = small_vit()
    alone, measured = SearchState(), SearchState()
    search_ranks(model, batches(), 0.5, steps=2, state=alone)
    search_ranks(model, batches(), 0.5, steps=2, state=measured, statistics=statistics_of(model, True))
    assert not torch.equal(alone.logits, measured.logits)
    with pytest.raises(InvalidValueError, match="statistics"):
        search_ranks(small_vit(num_hidden_layers=3)[0], batches(), 0.5, statistics=statistics_of(model, True))


def test_a_teacher_takes_part():
    model, _ = small_vit()
    alone = SearchState()
    search_ranks(model, batches(), 0.5, steps=2, state=alone)
    for loss in (None, DistillationLoss(alpha=0.5, alignment=1.0)):
        taught = SearchState()
        search_ranks(model, batches(), 0.5, steps=2, state=taught, teacher=model, loss=loss)
        assert not torch.equal(alone.logits, taught.logits)


def search_together(folder):
    accelerator, state = Accelerator(cpu=True), SearchState()
    assert accelerator.num_processes == 2
    plan = search_ranks(small_vit()[0], shuffled(), 0.5, epochs=2, state=state, accelerator=accelerator)
    found = {"logits": state.logits, "ranks": plan.ranks, "steps": state.step}
    torch.save(found, folder / f"{accelerator.process_index}.pt")


def test_two_processes_find_the_same_plan(tmp_path):
    in_processes(search_together, tmp_path)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    assert first["ranks"] == second["ranks"]
    assert torch.equal(first["logits"], second["logits"])
    assert first["steps"] == second["steps"] == 4, "half of the batches each"


def test_the_search_split_is_cut_from_the_training_set():
    data = TensorDataset(torch.arange(100))
    search, rest = split_for_search(data, 0.2, seed=1)
    assert (len(search), len(rest)) == (20, 80)
    assert sorted(search.indices + rest.indices) == list(range(100))
    assert search.indices == split_for_search(data, 0.2, seed=1)[0].indices
    assert search.indices != split_for_search(data, 0.2, seed=2)[0].indices
    for share in (0, 1, 0.001):
        with pytest.raises(InvalidValueError, match="share"):
            split_for_search(data, share)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"loader": []}, "loader"),
        ({"loader": [], "steps": 2}, "empty"),
        ({"loader": iter(batches(1)), "steps": 2}, "empty"),
        ({"loader": [{"pixel_values": images()}]}, "labels"),
        ({"loader": [images()]}, "labels"),
        ({"reduction": 0}, "reduction"),
        ({"reduction": 1}, "reduction"),
        ({"reduction": "half"}, "reduction"),
        ({"scope": "everything"}, "scope"),
        ({"metric": "flops"}, "metric"),
        ({"steps": 0}, "steps"),
        ({"steps": 2, "epochs": 2}, "either"),
        ({"steps": True}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"temperature": (5.0, 0.0)}, "temperature"),
        ({"beta": -1}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"loss": DistillationLoss(alpha=0.5)}, "teacher"),
    ],
)
def test_what_cannot_be_used_is_refused(wrong, match):
    arguments = {"loader": batches(1), "reduction": 0.5, **({} if "epochs" in wrong else {"steps": None}), **wrong}
    with pytest.raises(InvalidValueError, match=match):
        search_ranks(small_vit()[0], **arguments)


def test_out_of_reach_and_foreign_states_are_refused():
    model, _ = small_vit()
    with pytest.raises(BudgetError, match="out of reach"):
        search_ranks(model, batches(1), 0.95)
    state = SearchState()
    search_ranks(model, batches(1), 0.5, steps=1, state=state)
    for other, options in ((model, {"scope": "attention"}), (model, {"step": 2}), (MODELS["deit"]()[0], {})):
        with pytest.raises(InvalidValueError, match="another search"):
            search_ranks(other, batches(1), 0.5, steps=1, state=state, **options)
    with pytest.raises(InvalidValueError, match="fields"):
        SearchState().load_state_dict({"step": 1})
    whole = state.state_dict()
    for changes, says in (
        ({"step": -1}, "step: expected a whole number"),
        ({"step": 1.5}, "step: expected a whole number"),
        ({"names": whole["names"][1:]}, "expected names, candidates and tensors"),
        ({"candidates": [["many"]]}, "candidates: expected a list"),
        ({"logits": whole["logits"][1:]}, "expected names, candidates and tensors"),
        ({"exp_avg": None}, "expected names, candidates and tensors"),
        ({"exp_avg_sq": whole["exp_avg_sq"] + float("nan")}, "exp_avg_sq: expected a tensor of finite"),
        ({"generator": whole["generator"][1:]}, "expected names, candidates and tensors"),
    ):
        with pytest.raises(InvalidValueError, match=says):
            SearchState().load_state_dict(whole | changes)
