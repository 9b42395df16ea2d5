"""The frozen bases of core adapters: orthonormal, and the same wherever they are computed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from comcat_hf.closed_forms.bases import head_basis
from comcat_hf.errors import InvalidValueError


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _random(heads: int = 2, width: int = 16, columns: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(heads, width, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def _with_spectrum(values: Tensor, columns: int = 24, heads: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = len(values)
    left = torch.linalg.qr(torch.randn(heads, width, width, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(heads, columns, width, generator=generator))[0]
    return left * values @ right.mT


def _rows() -> dict[str, Tensor]:
    """Heads whose eigenvectors are not determined, or barely."""
    first = torch.zeros(16)
    first[0] = 1
    pair = torch.linspace(1, 0.1, 16)
    pair[1] = pair[0]
    close = torch.ones(16) + 1e-6 * torch.arange(16)
    half = torch.ones(16)
    half[8:] = 0
    return {
        "random": _random(),
        "equal": _with_spectrum(torch.ones(16)),
        "close": _with_spectrum(close),
        "pair": _with_spectrum(pair),
        "rank_one": _with_spectrum(first),
        "half_rank": _with_spectrum(half),
        "decaying": _with_spectrum(0.7 ** torch.arange(16)),
        "zero_head": _random() * torch.tensor([0.0, 1.0])[:, None, None],
        "repeated_rows": _random()[:, :1].expand(-1, 16, -1),
        "few_columns": _random(columns=4),
    }


every_head = pytest.mark.parametrize("kind", list(_rows()))


def _product(first: Tensor, second: Tensor, seed: int = 3) -> Tensor:
    """`G1 M G2^T` with a fixed M: what a core adapter does to a head."""
    rank = first.shape[-1]
    middle = torch.randn(len(first), rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return first @ middle @ second.mT


@every_head
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_orthonormal(kind, rank):
    rows = _rows()[kind]
    basis = head_basis(rows, rank)
    assert basis.shape == (*rows.shape[:2], rank) and basis.dtype == torch.float64
    assert torch.allclose(basis.mT @ basis, torch.eye(rank, dtype=torch.float64).expand(len(rows), -1, -1), atol=1e-9)


@every_head
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_same_from_weights_of_every_dtype(kind, rank):
    rows, others = _rows()[kind], _random(seed=1)
    expected = _product(head_basis(rows, rank), head_basis(others, rank))
    for dtype in DTYPES[1:]:
        found = _product(head_basis(rows.to(dtype), rank), head_basis(others.to(dtype), rank))
        assert (found - expected).norm() <= 1e-2 * expected.norm()


@every_head
def test_the_same_with_other_threads_and_another_order_of_sums(kind):
    rows, threads = _rows()[kind], torch.get_num_threads()
    expected = head_basis(rows, 4)
    try:
        torch.set_num_threads(2)
        found = head_basis(rows, 4)
    finally:
        torch.set_num_threads(threads)
    assert (found - expected).abs().max() <= 1e-5
    # Another machine sums in another order, and rounds in float32 what it computed itself.
    shuffled = rows[..., torch.randperm(rows.shape[-1], generator=torch.Generator().manual_seed(0))]
    assert (head_basis(shuffled, 4) - expected).abs().max() <= 1e-5
    noise = 1 + 2**-24 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (head_basis(rows * noise, 4) - expected).abs().max() <= 1e-5


def test_heads_of_a_low_rank_at_the_size_of_real_ones():
    values = torch.zeros(64)
    values[:4] = 1
    rows = _with_spectrum(values, columns=320, heads=16, seed=4)
    for rank in (2, 4, 8):
        expected = head_basis(rows, rank)
        for dtype in DTYPES[1:]:
            error = (head_basis(rows.to(dtype), rank) - expected).norm(dim=(1, 2)) / rank**0.5
            assert error.max() <= 1e-2


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    decay=st.floats(0.6, 1.0),
    rank=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES[1:]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
)
def test_rounding_moves_it_little(seed, decay, rank, dtype, scale):
    rows = scale * _with_spectrum(decay ** torch.arange(16), columns=32, seed=seed)
    expected, found = head_basis(rows, rank), head_basis(rows.to(dtype), rank)
    error = _product(found, expected) - _product(expected, expected)
    assert error.norm() <= 2e-2 * _product(expected, expected).norm()


def test_the_size_of_the_weights_does_not_matter():
    rows = _random()
    for factor in (1e-12, 1e-3, 1e6):
        assert (head_basis(rows * factor, 4) - head_basis(rows, 4)).abs().max() < 1e-6


def test_heads_do_not_see_each_other():
    rows = _random(heads=3)
    together = head_basis(rows, 4)
    for index in range(3):
        assert torch.allclose(together[index], head_basis(rows[index : index + 1], 4)[0], atol=1e-10)


def test_it_leans_to_where_the_weights_are_large():
    values = torch.full((16,), 0.05)
    values[:3] = 1.0
    rows = _with_spectrum(values, heads=1)
    strong = torch.linalg.svd(rows[0].double())[0][:, :3]
    kept = (head_basis(rows, 3)[0].mT @ strong).square().sum() / 3
    plain = (head_basis(torch.zeros_like(rows), 3)[0].mT @ strong).square().sum() / 3
    assert kept > 0.8 > 0.6 > plain


def test_no_graph_is_kept():
    rows = _random().requires_grad_()
    assert not head_basis(rows, 2).requires_grad


@pytest.mark.parametrize("rank", [0, 17, -1])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(InvalidValueError, match=rf"1 to 16.*got {rank}"):
        head_basis(_random(), rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    rows = _random()
    rows[1, 2, 3] = value
    with pytest.raises(InvalidValueError, match="not finite"):
        head_basis(rows, 2)
