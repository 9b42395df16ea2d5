"""The first layers of narrowed MLPs follow the dense model too."""

import copy

import pytest
import torch
from torch import nn

from comcat_hf.compression.calibration.inputs import run_batch
from comcat_hf.compression.fitting import first_layers
from comcat_hf.compression.fitting.compensation import compress_in_order
from comcat_hf.compression.fitting.first_layers import FirstLayers
from comcat_hf.modeling import find_sites
from tests.compression.test_compensation import batches_for, error, scaled
from tests.helpers import MODELS


# An activation alone, a scale on the output, a gate, a norm behind the stream with padding.
HOSTS = ("vit", "dinov2", "dinov2_swiglu", "bert")


def host(name):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return scaled(model).eval(), inputs


def mlp_of(model):
    site = next(site for site in find_sites(model, "mlp", width=True).values() if site.kind == "mlp")
    return [layer for _, layer in site.view.first], site.view.output


def narrow(model, share=0.5):
    sites = find_sites(model, "mlp", width=True)
    return {n: {"width": max(int(s.view.width * share), 1)} for n, s in sites.items() if s.kind == "mlp"}


def toy(units=12, inputs=6, outputs=4, count=400, seed=0, noise=0.0):
    """A layer pair and the outputs of one with other first weights, for `count` inputs."""
    torch.manual_seed(seed)
    first, output = nn.Linear(inputs, units), nn.Linear(units, outputs)
    true = copy.deepcopy(first)
    with torch.no_grad():
        true.weight += 0.05 * torch.randn(units, inputs)
        true.bias += 0.05 * torch.randn(units)
        states = torch.randn(count, inputs)
        wanted = output(nn.functional.gelu(true(states)))
        wanted += noise * torch.randn_like(wanted)
    return first, output, states, wanted


@torch.no_grad()
def fitted(first, output, states, wanted, parts=8):
    found = FirstLayers([first], output, torch.ones(len(output.weight)))
    with found.recording():
        for index, (x, y) in enumerate(zip(states.chunk(parts), wanted.chunk(parts), strict=True)):
            missing = y - output(nn.functional.gelu(first(x)))
            found.add(missing, {index % 2: torch.ones(len(x), dtype=torch.bool)})
    return found, found.improve()


def missed(first, output, states, wanted):
    with torch.no_grad():
        return float((wanted - output(nn.functional.gelu(first(states)))).square().sum())


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_changes_add_what_is_said(name):
    model, inputs = host(name)
    layers, output = mlp_of(model)
    gave = []
    handle = output.register_forward_hook(lambda module, args, y: gave.append(y))
    scale = torch.linspace(0.5, 2.0, output.out_features)
    found = FirstLayers(layers, output, scale)
    with found.recording():
        run_batch(model, inputs, 0)
    found.add(torch.zeros_like(gave[0]), {0: torch.ones(gave[0].shape[:-1], dtype=torch.bool)})
    half = found._halves[0]
    width = layers[0].in_features
    change = 1e-3 * torch.randn(sum(len(layer.weight) for layer in layers), width + 1)
    said = half._forth(half.tokens[0], change)
    for layer, rows in zip(layers, change.chunk(len(layers)), strict=True):
        layer.weight += rows[:, :width]
        layer.bias += rows[:, width]
    run_batch(model, inputs, 0)
    handle.remove()
    added = ((gave[1] - gave[0]) * scale).flatten(0, -2)
    assert (said - added).norm() < 0.02 * added.norm()


def test_first_weights_are_found():
    first, output, states, wanted = toy(count=2000)
    before = missed(first, output, states, wanted)
    found, changed = fitted(first, output, states, wanted)
    assert changed and found.error == pytest.approx(before, rel=1e-4)
    assert missed(first, output, states, wanted) < 0.05 * before


def test_steps_are_those_of_conjugate_gradients():
    """As many as there are numbers give the least squares solution, whatever the preconditioner."""
    _, output, states, wanted = toy(units=4, inputs=3, count=300)
    half = first_layers._Half(output.weight.detach())
    ones = torch.cat([states, torch.ones(300, 1)], 1)
    slopes = torch.rand(300, 4) + 0.5
    half.add(first_layers._Tokens(ones, slopes, wanted.detach()))
    preconditioner = half.preconditioner()
    for _ in range(16):
        half.step(*preconditioner)
    design = torch.einsum("nk,ok,ni->noki", slopes, output.weight, ones).reshape(-1, 16).double().detach()
    solved = torch.linalg.lstsq(design, wanted.detach().reshape(-1, 1).double()).solution.reshape(4, 4)
    torch.testing.assert_close(half.change, solved, atol=1e-4, rtol=1e-3)


def test_noise_is_left_alone():
    """Where the halves of the data ask for opposite changes, none is made."""
    first, output, states, wanted = toy()
    with torch.no_grad():
        given = output(nn.functional.gelu(first(states)))
        halves = torch.arange(8).repeat_interleave(50) % 2
        wanted = given + (wanted - given) * (1 - 2 * halves[:, None])
    before = first.weight.detach().clone()
    _, changed = fitted(first, output, states, wanted)
    assert not changed and torch.equal(first.weight, before)


@pytest.mark.parametrize(("noise", "most"), [(0.1, 0.8), (0.2, 1.05)])
def test_few_noisy_tokens_do_no_harm(noise, most):
    """On other data the change is of use, or at least of no harm, where the mean of both halves would be."""
    shares, whole = [], []
    for seed in range(8):
        first, output, states, wanted = toy(units=24, inputs=12, count=160, noise=noise, seed=seed)
        other = toy(units=24, inputs=12, count=4000, seed=seed)[2:]
        before = missed(first, output, *other)
        mean = copy.deepcopy(first)
        found, _ = fitted(first, output, states, wanted)
        change = sum(half.change for half in found._halves).float() / 2
        with torch.no_grad():
            mean.weight += change[:, :-1]
            mean.bias += change[:, -1]
        shares.append(missed(first, output, *other) / before)
        whole.append(missed(mean, output, *other) / before)
    assert sum(shares) / 8 < most < sum(whole) / 8


class Rounded(nn.Module):
    """An activation without a gradient."""

    def forward(self, states):
        return nn.functional.gelu(states.detach())


@pytest.mark.parametrize(("activation", "changed"), [(nn.ReLU(inplace=True), True), (Rounded(), False)])
def test_activations_in_place_and_without_gradients(activation, changed):
    dense, inputs = host("vit")
    for module in dense.modules():
        if hasattr(module, "activation_fn"):
            module.activation_fn = activation
    batches = batches_for(dense, inputs, 32)
    small, plain = compressed(dense, batches), compressed(dense, batches, lambda self: False)
    assert torch.equal(mlp_weight(small), mlp_weight(plain)) is not changed


@torch.no_grad()
def test_layers_that_run_several_times_are_left_alone():
    first, output, states, wanted = toy(count=800)
    found = FirstLayers([first], output, torch.ones(4))
    with found.recording():
        for half, (x, y) in enumerate(zip(states.chunk(2), wanted.chunk(2), strict=True)):
            missing = y - output(nn.functional.gelu(first(x)))
            output(nn.functional.gelu(first(x)))
            found.add(missing, {half: torch.ones(len(x), dtype=torch.bool)})
    assert not found.improve()


def test_nothing_missing_and_single_tokens_change_nothing():
    first, output, states, _ = toy(count=8)
    before = first.weight.detach().clone()
    with torch.no_grad():
        # One by one, as they are read: a product of several rows may be rounded otherwise.
        wanted = torch.cat([output(nn.functional.gelu(first(state))) for state in states.split(1)])
    assert not fitted(first, output, states, wanted)[1]
    assert not fitted(first, output, states[:1], wanted[:1] + 1, parts=1)[1]
    assert torch.equal(first.weight, before)


def compressed(dense, batches, improve=FirstLayers.improve):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FirstLayers, "improve", improve)
        small = copy.deepcopy(dense)
        compress_in_order(small, narrow(dense), batches)
    return small


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "bert"])
def test_narrow_mlps_are_nearer_on_other_data(name):
    dense, inputs = host(name)
    batches = batches_for(dense, inputs, 152)
    with_it, without = (
        compressed(dense, batches[:128], improve) for improve in (FirstLayers.improve, lambda self: False)
    )
    assert error(with_it, dense, batches[128:]) < 0.95 * error(without, dense, batches[128:])


def test_a_change_for_the_worse_is_taken_back():
    dense, inputs = host("vit")
    batches = batches_for(dense, inputs, 4)

    def worse(self):
        for layer in self._layers:
            layer.weight.mul_(-30)
        return True

    one, other = (compressed(dense, batches, improve).state_dict() for improve in (worse, lambda self: False))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_padding_is_no_matter():
    dense, inputs = host("bert")
    batches = [
        {**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches_for(dense, inputs, 6)
    ]
    padded = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        padded.append(
            {
                **{k: v for k, v in batch.items() if v.shape != ids.shape},
                "input_ids": torch.cat([ids, ids[:, :2]], 1),
                "attention_mask": torch.cat([mask, 0 * mask[:, :2]], 1),
            }
        )
    weights = [mlp_weight(compressed(dense, given)) for given in (batches, padded)]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)


def mlp_weight(model):
    return next(m.weight for m in model.modules() if getattr(m, "is_narrow", False))


def test_one_batch_is_halved():
    dense, inputs = host("dinov2_swiglu")
    batches = batches_for(dense, inputs, 32)
    one = [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]
    small, plain = compressed(dense, one), compressed(dense, one, lambda self: False)
    assert not torch.equal(mlp_weight(small), mlp_weight(plain))


def test_modes_are_as_they_were():
    dense, inputs = host("vit")
    batches = batches_for(dense, inputs, 16)
    small = compressed(dense, batches)
    assert not torch.equal(mlp_weight(small), mlp_weight(compressed(dense, batches, lambda self: False)))
    with torch.inference_mode():
        inside = compressed(dense, batches)
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    torch.testing.assert_close(mlp_weight(inside), mlp_weight(small))
    hooks = [m for m in small.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and all(p.grad is None for p in small.parameters())


def test_an_error_inside_leaves_the_modes_as_they_were():
    first, output, states, _ = toy()
    found = FirstLayers([first], output, torch.ones(4))
    with pytest.raises(ZeroDivisionError), torch.no_grad(), found.recording():
        first(states)
        assert torch.is_grad_enabled()
        raise ZeroDivisionError
    assert torch.is_grad_enabled() and not first._forward_hooks
    with torch.no_grad():
        try:
            with found.recording():
                first(states)
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert not torch.is_grad_enabled()
