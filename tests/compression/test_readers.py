"""Layers that read drifted states get weights that predict the dense model's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comcat_hf import compress, plan_of
from comcat_hf.compression.calibration.statistics import TokenMask
from comcat_hf.compression.fitting.first_layers import FirstLayers
from comcat_hf.compression.fitting.readers import Readers, shared_parameters
from comcat_hf.modeling.rows import Rows
from tests.compression.test_compensation import batches_for, error, scaled
from tests.helpers import MODELS


def drifted(bias=True, count=4):
    """A layer, what it reads in the dense model, and the same after a linear map with a shift."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=bias)
    states = [torch.randn(5, 20, 8) for _ in range(count)]
    mixing, shift = torch.eye(8) + 0.2 * torch.randn(8, 8), 0.3 * torch.randn(8)
    return layer, states, [batch @ mixing + (shift if bias else 0) for batch in states]


@torch.no_grad()
def correct(readers, model, dense, small, mask=None):
    with readers.recording():
        for batch in dense:
            model(batch)

    def run(until):
        for batch in small:
            model(batch)
            yield

    holder = TokenMask()
    holder.mask = mask
    readers.correct(run, holder)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_drift_is_undone(bias):
    layer, states, moved = drifted(bias)
    wanted = [layer(batch) for batch in states]
    assert F.mse_loss(layer(moved[0]), wanted[0]) > 0.05
    correct(Readers([layer], set()), layer, states, moved)
    for batch, output in zip(moved, wanted, strict=True):
        # The least pull that is tried remains.
        assert F.mse_loss(layer(batch), output) < 1e-4 * output.var()


def test_of_a_fused_layer_the_rows_named_alone():
    layer, states, moved = drifted()
    before, wanted = copy.deepcopy(layer), layer(states[0])[..., 4:8]
    correct(Readers([Rows(layer, 4, 8)], set()), layer, states, moved)
    others = [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(layer.weight[others], before.weight[others])
    assert torch.equal(layer.bias[others], before.bias[others])
    assert F.mse_loss(layer(moved[0])[..., 4:8], wanted) < 1e-4


@pytest.mark.parametrize("why", ["no drift", "shared", "called twice", "one batch that is not finite"])
def test_weights_stay_to_the_bit_where_there_is_nothing_to_correct(why):
    layer, states, moved = drifted()
    before = copy.deepcopy(layer)
    model, shared = layer, set()
    if why == "no drift":
        moved = states
    elif why == "shared":
        other = nn.Linear(8, 12)
        other.weight = layer.weight
        shared = shared_parameters(nn.ModuleList([layer, other]))
    elif why == "called twice":
        model = nn.Sequential(layer, nn.Linear(12, 8), layer)
    else:
        moved[2] = moved[2] * float("inf")
    correct(Readers([layer], shared), model, states, moved)
    assert torch.equal(layer.weight, before.weight)
    assert torch.equal(layer.bias, before.bias)


def test_padded_tokens_do_not_count():
    layer, states, moved = drifted()
    wanted = layer(states[0])[:, :15]
    mask = torch.ones(5, 20)
    mask[:, 15:] = 0
    for batch in moved:
        batch[:, 15:] = 100 * torch.randn(5, 5, 8)
    correct(Readers([layer], set()), layer, states, moved, mask)
    assert F.mse_loss(layer(moved[0])[:, :15], wanted) < 1e-3


@pytest.mark.parametrize("name", ["vit", "dinov2", "bert"])
def test_a_compressed_model_is_nearer_to_the_dense_one(name, monkeypatch):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = scaled(model)
    batches = batches_for(model, inputs, 48)
    # First layers that are fitted to the outputs make up for drift too.
    monkeypatch.setattr(FirstLayers, "improve", lambda self: False)
    near = compress(model, 0.3, batches=batches[:32])
    monkeypatch.setattr(Readers, "correct", lambda *args: None)
    far = compress(model, plan=plan_of(near), batches=batches[:32])
    assert error(near, model, batches[32:]) < error(far, model, batches[32:])
