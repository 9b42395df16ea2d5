"""Weights are trained in coordinates in which their layer's inputs are white."""

import pytest
import torch
from torch import nn

from comcat_hf.compression.calibration.statistics import TokenMask
from comcat_hf.compression.fitting import whitening
from comcat_hf.compression.fitting.descent import Descent
from comcat_hf.compression.fitting.whitening import Whitened, input_moments
from comcat_hf.modeling import LowRankLinear
from comcat_hf.progress import progress_bar


def linear(seed=0, inputs=6, outputs=4):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def mixed(seed=0, count=256, width=6):
    """Inputs whose directions differ in size by a factor of thirty."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return torch.randn(count, width, generator=generator) @ (basis * torch.logspace(0, 1.5, width)) @ basis.T


def moments_of(states):
    return (states.T @ states).double() / len(states)


def test_a_step_of_the_coordinates_moves_the_weights():
    layer, moments = linear(), moments_of(mixed())
    one, before = Whitened([layer.weight, layer.bias], moments), layer.weight.detach().clone()
    one.push()
    torch.testing.assert_close(layer.weight.detach(), before, atol=1e-5, rtol=1e-5)
    gradient = torch.randn_like(before)
    layer.weight.grad = gradient.clone()
    one.pull()
    with torch.no_grad():
        one.coordinates -= 0.1 * one.coordinates.grad
    one.push()
    # By the chain rule a step along the gradient of V moves W by that of W times L L.
    scale = moments.diagonal().mean()
    damped = moments / scale + whitening._DAMPING * torch.eye(6, dtype=torch.float64)
    wanted = before - 0.1 * gradient @ damped.inverse().float()
    torch.testing.assert_close(layer.weight.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_the_scale_of_inputs_is_no_matter():
    layer, moments = linear(), moments_of(mixed())
    coordinates = [Whitened([layer.weight], scale * moments).coordinates for scale in (1.0, 1e6)]
    torch.testing.assert_close(*coordinates)


def test_groups_have_the_pace_of_the_weights():
    layer = linear()
    one = Whitened([layer.bias, layer.weight], moments_of(mixed()))
    white, bias = one.groups(0.5)
    assert white["params"] == [one.coordinates] and bias["params"] == [layer.bias]
    assert white["lr"] == pytest.approx(0.5 * one.coordinates.square().mean().sqrt().item())
    assert bias["lr"] == pytest.approx(0.5 * layer.weight.square().mean().sqrt().item())


@pytest.mark.parametrize("moments", [None, torch.zeros(6, 6).double(), torch.full((6, 6), torch.nan).double()])
def test_without_moments_the_weight_is_trained_as_it_is(moments):
    layer = linear()
    one, before = Whitened([layer.weight], moments), layer.weight.detach().clone()
    assert one.coordinates is layer.weight
    layer.weight.grad = torch.ones_like(before)
    one.pull()
    one.push()
    assert torch.equal(layer.weight.grad, torch.ones_like(before))
    assert torch.equal(layer.weight, before)


def test_directions_of_unlike_size_are_learned_alike():
    states, goal = mixed(), linear(seed=1)
    parts = states.split(32)
    scale = goal(states).square().mean().detach()

    def after(moments):
        layer = linear()

        def errors(index):
            squares = (layer(parts[index]) - goal(parts[index]).detach()).square()
            return torch.stack([squares.sum() / scale, squares.new_tensor(squares.numel())])[:, None]

        parameters = list(layer.parameters())
        descent = Descent(60, 0.1, 0, learned=range(1, len(parts)), apart=[0])
        with progress_bar(total=60, desc="", unit="step", progress=False) as bar:
            return descent.run([parameters], [moments], [torch.float32] * 2, errors, bar).after

    assert after(moments_of(states)) < 0.5 * after(None)


def test_moments_are_those_of_real_tokens():
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), LowRankLinear(5, 4, 2)
    model = nn.ModuleDict({"first": first, "second": second, "norm": nn.LayerNorm(4), "idle": nn.Linear(4, 4)})
    batches = [torch.randn(3, 7, 6) for _ in range(2)]
    masks = [torch.arange(7) < torch.tensor([[7], [3], [5]]), None]
    mask, seen = TokenMask(), []

    def run(index):
        seen.append(index)
        mask.mask = masks[index]
        model["norm"](second(first(batches[index])))

    found = input_moments(dict(model.items()), run, [0, 1], mask)
    assert seen == [0, 1]
    assert set(found) == {"first", "second"}
    real = torch.cat([batches[0][masks[0]], batches[1].flatten(0, 1)])
    torch.testing.assert_close(found["first"].float(), moments_of(real).float())
    torch.testing.assert_close(found["second"].float(), moments_of(second.first_factor(first(real)).detach()).float())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
