"""Ridge regression on sums."""

import pytest
import torch

from comcat_hf.compression.fitting.regression import RIDGES, Regression


def problem(tokens=400, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, tokens // 4, 6, generator=generator, dtype=torch.float64) + 1
    truth = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    wanted = z @ truth + 2 + noise * torch.randn(*z.shape[:-1], 3, generator=generator, dtype=torch.float64)
    return z, truth, wanted


def fitted(z, wanted, start, weights=None, scale=None, **kwargs):
    regression = Regression()
    for index, (batch, target) in enumerate(zip(z, wanted, strict=True)):
        regression.add(batch, target, torch.ones(len(batch)) if weights is None else weights[index])
    return regression.solve(start, torch.ones(3, dtype=torch.float64) if scale is None else scale, **kwargs)


def test_without_a_pull_it_is_least_squares():
    z, _, wanted = problem()
    weight, bias = fitted(z, wanted, torch.zeros(6, 3, dtype=torch.float64), ridge=0.0)
    rows = torch.cat([z.flatten(0, 1), torch.ones(400, 1)], 1)
    expected = torch.linalg.lstsq(rows, wanted.flatten(0, 1)).solution
    torch.testing.assert_close(torch.cat([weight, bias[None]]), expected)


def test_tokens_without_weight_do_not_count():
    z, _, wanted = problem()
    weights = torch.ones(4, 100)
    weights[:, 60:] = 0
    wanted[:, 60:] = 1e6
    start = torch.zeros(6, 3, dtype=torch.float64)
    found = fitted(z, wanted, start, weights, ridge=0.1)
    expected = fitted(z[:, :60], wanted[:, :60], start, ridge=0.1)
    torch.testing.assert_close(found, expected)


def test_a_scale_on_the_output_is_taken_out():
    z, truth, wanted = problem(noise=0.0)
    scale = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    weight, bias = fitted(z, wanted * scale, torch.zeros_like(truth), scale=scale, ridge=0.0)
    torch.testing.assert_close(weight, truth)
    torch.testing.assert_close(bias, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(("noise", "offset", "most"), [(0.01, 1.0, RIDGES[2]), (30.0, 0.0, None)])
def test_the_pull_follows_the_noise(noise, offset, most):
    z, truth, wanted = problem(noise=noise)
    weight, _ = fitted(z, wanted, truth + offset)
    free, _ = fitted(z, wanted, truth + offset, ridge=0.0)
    error = (weight - truth).norm()
    if most is None:
        # Noise only: what held-out data cannot confirm must not be learnt.
        assert error < 0.3 * (free - truth).norm()
    else:
        assert error < 0.02


@pytest.mark.parametrize("noise", [0.01, 0.3, 1.0, 3.0, 10.0, 30.0])
def test_the_pull_is_the_best_of_all(noise):
    z, truth, wanted = problem(noise=noise)
    start = truth + 0.3
    found, _ = fitted(z, wanted, start)
    halves = [(z[half::2], wanted[half::2]) for half in (0, 1)]

    def error(ridge):
        total = 0.0
        for (x, y), (other, target) in (halves, halves[::-1]):
            weight, _ = fitted(x, y, start, ridge=ridge)
            left = target - other @ weight
            total += float((left - left.mean((0, 1))).square().mean((0, 1)).sum())
        return total

    best = min(RIDGES, key=error)
    torch.testing.assert_close(found, fitted(z, wanted, start, ridge=best / 2)[0])


def test_a_dead_input_keeps_its_start():
    z, _, wanted = problem()
    z[..., 0] = 0
    start = torch.full((6, 3), 7.0, dtype=torch.float64)
    weight, bias = fitted(z, wanted, start)
    assert weight.isfinite().all()
    assert bias.isfinite().all()
    torch.testing.assert_close(weight[0], start[0])
