import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comcat_hf.closed_forms.attention import AttentionMoments, factorize_qk, factorize_vo, qk_spectrum, vo_spectrum
from comcat_hf.closed_forms.linear import LinearMoments, factorize_linear, linear_spectrum
from comcat_hf.errors import ComCATError, InvalidValueError


F64 = torch.float64
SHAPES = [(2, 3, 4, 12, 12), (1, 2, 4, 3, 3), (1, 2, 6, 6, 9), (1, 1, 5, 16, 4), (1, 2, 1, 5, 5)]  # L, H, p, d, d'


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def attention_weights(*batch, p, d, d_key=None, seed=0, dtype=F64):
    """Query, key, value (each with a bias) and output weights in the layout of the module."""
    d_key = d_key or d
    shapes = {"wq": (p, d), "bq": (p,), "wk": (p, d_key), "bk": (p,), "wv": (p, d_key), "bv": (p,), "wo": (d, p)}
    weights = {name: normal(*batch, *shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    weights["bo"] = normal(*batch[:-1], d, seed=seed + 9)
    return {name: weight.to(dtype) for name, weight in weights.items()}


def inputs(images, tokens, d, seed):
    """Correlated inputs with a mean, some directions nearly absent."""
    samples = normal(images, tokens, d, seed=seed) * torch.logspace(0, -3, d, dtype=F64)
    return samples @ normal(d, d, seed=seed + 1) / d**0.5 + normal(d, seed=seed + 2)


def covariance(samples):
    centred = samples - samples.mean(-2, keepdim=True)
    return centred.mT @ centred / samples.shape[-2]


def moments_of(q, k, u):
    """Moments from samples: q (H, n, p), k (H, images, tokens, p), u (H, n, p)."""
    k = (k - k.mean(-2, keepdim=True)).flatten(1, 2)
    return AttentionMoments(q.mT @ q / q.shape[-2], k.mT @ k / k.shape[-2], covariance(u), u.mean(-2))


def identity_moments(*heads, p):
    eye = torch.eye(p, dtype=F64).expand(*heads, p, p)
    return AttentionMoments(eye, eye, eye, torch.zeros(*heads, p, dtype=F64))


def attend(x, y, wq, bq, wk, bk, wv, bv, wo, bo, scale):
    q, k, v = (
        inp @ w.mT + (0 if b is None else b.unsqueeze(-2)) for inp, w, b in ((x, wq, bq), (y, wk, bk), (y, wv, bv))
    )
    return ((q @ k.mT * scale).softmax(-1) @ v @ wo.mT).sum(-3) + bo


# Weights only


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layers, heads, p, d, d_key", SHAPES)
def test_weights_only_qk_is_the_truncated_svd_of_the_dense_product(layers, heads, p, d, d_key, biased):
    w = attention_weights(layers, heads, p=p, d=d, d_key=d_key)
    left = torch.cat([w["wq"], w["bq"][..., None]], -1) if biased else w["wq"]
    product = left.mT @ w["wk"]
    for rank in range(1, p + 1):
        got = factorize_qk(w["wq"], w["bq"] if biased else None, w["wk"], rank)
        assert got.query_weight.shape == (layers, heads, rank, d) and got.key_weight.shape[-2:] == (rank, d_key)
        assert (got.query_bias is None) != biased
        rows = torch.cat([got.query_weight, got.query_bias[..., None]], -1) if biased else got.query_weight
        torch.testing.assert_close(rows.mT @ got.key_weight, truncated(product, rank), rtol=0, atol=1e-6)
        values = torch.linalg.svdvals(product)[..., :p]
        assert got.spectrum.dtype == F64 and got.spectrum.shape == (layers, heads, p)
        torch.testing.assert_close(got.spectrum[..., : values.shape[-1]], values)
        assert (got.spectrum[..., values.shape[-1] :] == 0).all()
        if rank < p:  # balanced
            torch.testing.assert_close(rows @ rows.mT, got.key_weight @ got.key_weight.mT)


@pytest.mark.parametrize("layers, heads, p, d, d_in", SHAPES)
def test_weights_only_vo_is_the_truncated_svd_of_the_dense_product(layers, heads, p, d, d_in):
    w = attention_weights(layers, heads, p=p, d=d, d_key=d_in)
    product = w["wo"] @ w["wv"]
    for rank in range(1, p + 1):
        got = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], rank)
        assert got.value_weight.shape == (layers, heads, rank, d_in)
        assert got.output_weight.shape == (layers, heads, d, rank)
        torch.testing.assert_close(got.output_weight @ got.value_weight, truncated(product, rank), rtol=0, atol=1e-6)
        folded = w["bo"] + torch.einsum("lhdp,lhp->ld", w["wo"], w["bv"])
        torch.testing.assert_close(got.output_bias, folded)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 3, 6, 4)])
def test_weights_only_linear_is_the_truncated_svd(shape):
    weight, bias = normal(*shape), normal(*shape[:-1], seed=1)
    for rank in range(1, min(shape[-2:]) + 1):
        got = factorize_linear(weight, bias, rank)
        torch.testing.assert_close(got.second_weight @ got.first_weight, truncated(weight, rank))
        assert torch.equal(got.bias, bias)
        assert factorize_linear(weight, None, rank).bias is None
        torch.testing.assert_close(got.spectrum, torch.linalg.svdvals(weight))


@pytest.mark.parametrize("rank_lost", [1e-9, 0.0])
def test_weights_only_is_accurate_for_nearly_singular_heads(rank_lost):
    """Gram matrices would lose every direction below 1e-8 of the largest."""
    scale = torch.tensor([1.0, 1e-3, 1e-9, rank_lost], dtype=F64)[:, None]
    wq, wk = normal(1, 4, 10) * scale, normal(1, 4, 10, seed=1)
    product = wq.mT @ wk
    got = factorize_qk(wq, None, wk, 3)
    assert (got.query_weight.mT @ got.key_weight - product).abs().max() < 1e-8 * (1 if rank_lost else 1e-5)


# Full rank


@pytest.mark.parametrize("with_moments", [False, True])
def test_full_rank_changes_no_weight_and_shares_no_memory(with_moments):
    w = attention_weights(2, 3, p=4, d=8)
    moments = AttentionMoments(*(normal(2, 3, 4, 6, seed=i) for i in range(3)), normal(2, 3, 4))
    moments = replace(
        moments, **{n: getattr(moments, n) @ getattr(moments, n).mT for n in ("query", "key", "attended")}
    )
    moments = moments if with_moments else None
    qk = factorize_qk(w["wq"], w["bq"], w["wk"], 4, moments=moments)
    vo = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], 4, moments=moments)
    pairs = [(qk.query_weight, "wq"), (qk.query_bias, "bq"), (qk.key_weight, "wk")]
    for tensor, name in [*pairs, (vo.value_weight, "wv"), (vo.output_weight, "wo")]:
        assert torch.equal(tensor, w[name]) and tensor.data_ptr() != w[name].data_ptr()
    torch.testing.assert_close(vo.output_bias, w["bo"] + torch.einsum("lhdp,lhp->ld", w["wo"], w["bv"]))
    for shape in ((7, 4), (4, 7), (5, 5)):
        weight = normal(*shape)
        linear_moments = LinearMoments(torch.eye(shape[1], dtype=F64), normal(shape[1]), "input")
        got = factorize_linear(weight, None, min(shape), moments=linear_moments if with_moments else None)
        assert torch.equal(got.second_weight @ got.first_weight, weight)
        assert got.bias is None or not got.bias.any()
        assert weight.data_ptr() not in (got.first_weight.data_ptr(), got.second_weight.data_ptr())
        assert got.first_weight.is_contiguous() and got.second_weight.is_contiguous()


def test_full_rank_attention_is_the_original_to_rounding():
    w = attention_weights(3, p=4, d=8, d_key=6)
    x, y = normal(2, 1, 5, 8, seed=20), normal(2, 1, 7, 6, seed=21)
    expected = attend(x, y, **w, scale=0.5)
    qk = factorize_qk(w["wq"], w["bq"], w["wk"], 4)
    vo = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], 4)
    low = {"wq": qk.query_weight, "bq": qk.query_bias, "wk": qk.key_weight, "bk": None, "wv": vo.value_weight}
    got = attend(x, y, **low, bv=None, wo=vo.output_weight, bo=vo.output_bias, scale=0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    no_bias = factorize_vo(w["wv"], None, w["wo"], None, 4)
    assert no_bias.output_bias.shape == (8,) and not no_bias.output_bias.any()


# With statistics


@st.composite
def problems(draw):
    p = draw(st.integers(2, 6))
    return {
        "heads": draw(st.integers(1, 3)),
        "p": p,
        "d": draw(st.integers(2, 10)),
        "rank": draw(st.integers(1, p - 1)),
        "images": draw(st.integers(1, 4)),
        "tokens": draw(st.integers(2, 8)),
        "ridge": draw(st.sampled_from([0.0, 1e-6, 1e-2])),
        "seed": draw(st.integers(0, 10**6)),
    }


def head_map(rows, factor):
    """G with `rows G = factor`, for a factor in the column space of `rows`."""
    return torch.linalg.pinv(rows) @ factor


@settings(max_examples=40, deadline=None)
@given(problems())
def test_pooled_score_error_is_never_above_the_weights_only_one(problem):
    heads, p, d, seed, ridge = (problem[name] for name in ("heads", "p", "d", "seed", "ridge"))
    w = attention_weights(heads, p=p, d=d, seed=seed)
    x = inputs(problem["images"], problem["tokens"], d, seed)
    y = inputs(problem["images"], problem["tokens"], d, seed + 5)
    q = x.flatten(0, 1) @ w["wq"].mT + w["bq"][:, None]
    k = y @ w["wk"].mT[:, None] + w["bk"][:, None, None]
    moments = moments_of(q, k, q)
    centred = (y - y.mean(-2, keepdim=True)).flatten(0, 1)

    def errors(factors):
        """Mean over all pairs of a query and a centred key, per head, of the squared change of the score."""
        low_q = x.flatten(0, 1) @ factors.query_weight.mT + factors.query_bias[:, None]
        exact = q @ (centred @ w["wk"].mT).mT
        return (exact - low_q @ (centred @ factors.key_weight.mT).mT).square().mean((-1, -2))

    plain = factorize_qk(w["wq"], w["bq"], w["wk"], problem["rank"])
    ours = factorize_qk(w["wq"], w["bq"], w["wk"], problem["rank"], moments=moments, ridge=ridge)
    left = torch.cat([w["wq"], w["bq"][..., None]], -1).mT
    plain_left = torch.cat([plain.query_weight, plain.query_bias[..., None]], -1).mT
    lost = torch.eye(p) - head_map(left, plain_left) @ head_map(w["wk"].mT, plain.key_weight.mT).mT

    # ours is the minimiser of the regularised error, so J_0(ours) <= J_ridge(ours) <= J_ridge(plain)
    white = [ridge * m.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] for m in (moments.query, moments.key)]
    eye = torch.eye(p, dtype=F64)
    regularised = [m + share * eye for m, share in zip((moments.query, moments.key), white, strict=True)]

    def pooled(query, key):
        return (lost.mT @ query @ lost @ key).diagonal(dim1=-2, dim2=-1).sum(-1)

    total = [m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (moments.query, moments.key)]
    rounding = 1e-11 * total[0] * total[1]
    assert ((errors(plain) - pooled(moments.query, moments.key)).abs() <= rounding).all()
    ridge_terms = pooled(*regularised) - pooled(moments.query, moments.key)
    assert (errors(ours) <= errors(plain) + ridge_terms + rounding).all()
    if ridge == 0:
        tail = ours.spectrum[..., problem["rank"] :].square().sum(-1)
        assert ((errors(ours) - tail).abs() <= rounding).all()
    assert all(torch.isfinite(tensor).all() for tensor in ours)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_each_heads_output_error_is_never_above_the_weights_only_one_and_has_no_mean(problem):
    heads, p, d, seed, ridge = (problem[name] for name in ("heads", "p", "d", "seed", "ridge"))
    w = attention_weights(heads, p=p, d=d, seed=seed)
    rows = inputs(heads, problem["images"] * problem["tokens"], d, seed)  # attended inputs differ between heads
    u = rows @ w["wv"].mT + w["bv"][:, None]
    moments = moments_of(u, u[:, None], u)
    joint = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], problem["rank"], moments=moments, ridge=ridge)
    biases = []
    for h in range(heads):
        one = {name: w[name][h : h + 1] for name in ("wv", "bv", "wo")}
        head = AttentionMoments(
            *(getattr(moments, n)[h : h + 1] for n in ("query", "key", "attended", "attended_mean"))
        )
        plain = factorize_vo(one["wv"], one["bv"], one["wo"], None, problem["rank"])
        ours = factorize_vo(one["wv"], one["bv"], one["wo"], None, problem["rank"], moments=head, ridge=ridge)
        biases.append(ours.output_bias)
        plain_error, ours_error = (
            u[h] @ w["wo"][h].mT - (rows[h] @ f.value_weight[0].mT @ f.output_weight[0].mT + f.output_bias)
            for f in (plain, ours)
        )
        power = (u[h] @ w["wo"][h].mT).square().sum(-1).mean() + w["wo"][h].square().sum() * u[h].square().mean()
        lost = w["wo"][h].mT - head_map(w["wv"][h].mT, plain.value_weight[0].mT) @ plain.output_weight[0].mT
        ridge_term = ridge * moments.attended[h].diagonal().mean() * lost.square().sum()
        means = [e.square().sum(-1).mean() for e in (ours_error, plain_error)]
        assert means[0] <= means[1] + ridge_term + 1e-11 * power
        assert ours_error.mean(-2).abs().max() <= 1e-9 * power.sqrt()
        torch.testing.assert_close(
            joint.output_weight[h] @ joint.value_weight[h], (ours.output_weight @ ours.value_weight)[0]
        )
        if ridge == 0:
            assert (means[0] - ours.spectrum[0, problem["rank"] :].square().sum()).abs() <= 1e-11 * power
    torch.testing.assert_close(joint.output_bias, w["bo"] + sum(biases))


@pytest.mark.parametrize("value_bias", [True, False])
def test_the_mean_output_error_is_zero_on_calibration_data(value_bias):
    w = attention_weights(2, 3, p=4, d=8)
    bias = w["bv"] if value_bias else None
    rows = normal(2, 3, 50, 8, seed=3) + normal(2, 3, 1, 8, seed=4)
    u = rows @ w["wv"].mT + (w["bv"].unsqueeze(-2) if value_bias else 0)
    moments = AttentionMoments(covariance(u), covariance(u), covariance(u), u.mean(-2))
    exact = (u @ w["wo"].mT).sum(1) + w["bo"][:, None]
    for rank in (1, 2, 3, 4):
        got = factorize_vo(w["wv"], bias, w["wo"], w["bo"], rank, moments=moments)
        low = (rows @ got.value_weight.mT @ got.output_weight.mT).sum(1) + got.output_bias[:, None]
        torch.testing.assert_close(low.mean(1), exact.mean(1), rtol=0, atol=1e-10)


def test_statistics_beat_weights_only_where_inputs_are_anisotropic():
    w = attention_weights(2, p=6, d=12)
    y = inputs(8, 16, 12, seed=1)
    q, k = y.flatten(0, 1) @ w["wq"].mT + w["bq"][:, None], y @ w["wk"].mT[:, None]
    moments = moments_of(q, k, q)

    def error(factors):
        low = y.flatten(0, 1) @ factors.query_weight.mT + factors.query_bias[:, None]
        flat = (y - y.mean(1, keepdim=True)).flatten(0, 1)
        return (q @ (flat @ w["wk"].mT).mT - low @ (flat @ factors.key_weight.mT).mT).square().mean()

    plain = factorize_qk(w["wq"], w["bq"], w["wk"], 2)
    assert error(factorize_qk(w["wq"], w["bq"], w["wk"], 2, moments=moments)) < 0.5 * error(plain)


@pytest.mark.parametrize("with_moments", [True, False])
def test_spectra_alone_are_those_of_the_factors(with_moments):
    w = attention_weights(2, 3, p=4, d=8)
    moments = identity_moments(2, 3, p=4) if with_moments else None
    weight, square = normal(6, 4), normal(4, 4, seed=2)
    linear = LinearMoments(square @ square.mT, normal(4), "input") if with_moments else None
    pairs = [
        (qk_spectrum, factorize_qk, (w["wq"], w["bq"], w["wk"]), moments),
        (vo_spectrum, factorize_vo, (w["wv"], w["bv"], w["wo"], w["bo"]), moments),
        (linear_spectrum, factorize_linear, (weight, None), linear),
    ]
    for spectrum, factorize, arguments, given_moments in pairs:
        found = spectrum(*arguments, moments=given_moments, ridge=1e-3)
        assert (found[..., :-1] >= found[..., 1:]).all()
        torch.testing.assert_close(found, factorize(*arguments, 2, moments=given_moments, ridge=1e-3).spectrum)


# Linear layers


def linear_problem(d_out, d_in, samples=64, seed=0):
    weight, bias = normal(d_out, d_in, seed=seed), normal(d_out, seed=seed + 1)
    x = inputs(1, samples, d_in, seed=seed + 2)[0]
    y = x @ weight.mT
    sides = [LinearMoments(covariance(x), x.mean(0), "input"), LinearMoments(covariance(y), x.mean(0), "output")]
    return weight, bias, x, sides


@pytest.mark.parametrize("d_out, d_in, samples", [(5, 9, 64), (9, 5, 64), (6, 6, 64), (9, 5, 4), (5, 9, 4)])
def test_linear_sides_agree(d_out, d_in, samples):
    weight, bias, _, sides = linear_problem(d_out, d_in, samples)
    for rank in range(1, 6):
        first, second = (factorize_linear(weight, bias, rank, moments=side, ridge=1e-4) for side in sides)
        products = [f.second_weight @ f.first_weight for f in (first, second)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-7)
        torch.testing.assert_close(first.bias, second.bias, rtol=0, atol=1e-7)
        torch.testing.assert_close(first.spectrum, second.spectrum, rtol=0, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(2, 20), st.data(), st.sampled_from(["input", "output"]),
    st.sampled_from([0.0, 1e-6, 1e-2]), st.integers(0, 10**6),
)  # fmt: skip
def test_linear_is_optimal_on_calibration_data(d_out, d_in, samples, data, side, ridge, seed):
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    weight, bias, x, sides = linear_problem(d_out, d_in, samples, seed)
    moments = sides[side == "output"]
    exact = x @ weight.mT + bias

    def error(first, second, low_bias):
        return (exact - (x @ first.mT @ second.mT + low_bias)).square().sum(-1).mean()

    def centred_error(first, second):
        """With the best bias for these two."""
        return error(first, second, (exact - x @ first.mT @ second.mT).mean(0))

    ours = factorize_linear(weight, bias, rank, moments=moments, ridge=ridge)
    found = error(*ours[:3])
    energy = covariance(x @ weight.mT).diagonal().sum()
    rounding = 1e-11 * (exact.square().sum(-1).mean() + weight.square().sum() * x.square().mean())
    share = ridge * energy / weight.square().sum()
    plain = factorize_linear(weight, bias, rank)
    rivals = [plain[:2]]
    for step in (1e-3, 1e-1):
        moved = normal(*ours.first_weight.shape, seed=seed + 7), normal(*ours.second_weight.shape, seed=seed + 8)
        rivals.append((ours.first_weight + step * moved[0], ours.second_weight + step * moved[1]))
    for first, second in rivals:
        ridge_term = share * (weight - second @ first).square().sum()
        assert found <= centred_error(first, second) + ridge_term + rounding
    assert found <= error(*plain[:3]) + share * (weight - plain[1] @ plain[0]).square().sum() + rounding
    mean_error = (exact - (x @ ours.first_weight.mT @ ours.second_weight.mT + ours.bias)).mean(0)
    assert mean_error.abs().max() <= 1e-9 * (1 + exact.abs().max())
    norms = ours.first_weight.norm(dim=1), ours.second_weight.norm(dim=0)
    if rank < min(d_out, d_in) and ours.spectrum[rank - 1] > 1e-6 * ours.spectrum[0]:
        torch.testing.assert_close(*norms)


def test_linear_takes_layers_at_once_and_makes_a_bias_when_there_is_a_mean():
    weights = normal(3, 5, 8)
    x = inputs(3, 30, 8, seed=4)
    moments = LinearMoments(covariance(x), x.mean(1), "input")
    together = factorize_linear(weights, None, 2, moments=moments)
    assert together.bias.shape == (3, 5)
    for i in range(3):
        one = factorize_linear(weights[i], None, 2, moments=LinearMoments(covariance(x[i]), x[i].mean(0), "input"))
        torch.testing.assert_close(together.second_weight[i] @ together.first_weight[i], one[1] @ one[0])
        torch.testing.assert_close(together.bias[i], one.bias)


# Kinds of numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moment_dtype", [torch.float32, None])
def test_results_have_the_dtype_of_the_weights(dtype, moment_dtype):
    w = attention_weights(2, p=8, d=16, dtype=dtype)
    moments = linear = None
    if moment_dtype:
        # few samples in float32: singular, and slightly indefinite
        samples = normal(2, 5, 8, dtype=moment_dtype)
        moments = AttentionMoments(*(samples.mT @ samples,) * 3, samples.mean(-2))
        x = normal(3, 8, dtype=moment_dtype)
        linear = LinearMoments(covariance(x), x.mean(0), "input")
    for rank in (1, 5, 8):
        qk = factorize_qk(w["wq"], w["bq"], w["wk"], rank, moments=moments)
        vo = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], rank, moments=moments)
        lin = factorize_linear(w["wo"][0], w["bo"], rank, moments=linear)
        for *tensors, spectrum in (qk, vo, lin):
            assert spectrum.dtype == F64 and torch.isfinite(spectrum).all()
            assert all(t.dtype == dtype and torch.isfinite(t).all() and not t.requires_grad for t in tensors)
            assert all(t.is_contiguous() for t in tensors)


def test_parameters_and_autocast_do_not_change_the_result():
    w = attention_weights(2, p=4, d=8, dtype=torch.float32)
    plain = factorize_qk(w["wq"], w["bq"], w["wk"], 2)
    parameters = [torch.nn.Parameter(w[name]) for name in ("wq", "bq", "wk")]
    with torch.autocast("cpu", torch.bfloat16):
        again = factorize_qk(*parameters, 2)
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(plain, again, strict=True))
    assert not any(tensor.requires_grad for tensor in factorize_qk(*parameters, 4))


@pytest.mark.gpu
def test_results_stay_on_the_device_and_agree_with_the_cpu():
    w = attention_weights(2, p=4, d=8)
    gpu = {name: weight.cuda() for name, weight in w.items()}
    moments = identity_moments(2, p=4)
    for arguments in ({}, {"moments": moments}):
        got = factorize_vo(gpu["wv"], gpu["bv"], gpu["wo"], gpu["bo"], 2, **arguments)
        want = factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], 2, **arguments)
        assert all(tensor.is_cuda for tensor in got)
        torch.testing.assert_close((got[1] @ got[0]).cpu(), want[1] @ want[0])
        torch.testing.assert_close(got.output_bias.cpu(), want.output_bias)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_dead_heads_and_features_give_finite_factors(ridge):
    w = attention_weights(3, p=4, d=8)
    for name in ("wq", "bq", "wk", "wv", "bv", "wo"):
        w[name][0] = 0
    w["wq"][1, 2], w["bq"][1, 2], w["wv"][1, 2], w["bv"][1, 2] = 0, 0, 0, 0
    x = inputs(2, 3, 8, seed=1)
    q = x.flatten(0, 1) @ w["wq"].mT + w["bq"][:, None]
    u = x.flatten(0, 1) @ w["wv"].mT + w["bv"][:, None]
    live = moments_of(q, x @ w["wk"].mT[:, None], u)
    zero = AttentionMoments(
        *(torch.zeros_like(getattr(live, n)) for n in ("query", "key", "attended", "attended_mean"))
    )
    for moments in (None, live, zero):
        for rank in (1, 3, 4):
            qk = factorize_qk(w["wq"], w["bq"], w["wk"], rank, moments=moments, ridge=ridge)
            vo = factorize_vo(w["wv"], w["bv"], w["wo"], None, rank, moments=moments, ridge=ridge)
            assert all(torch.isfinite(tensor).all() for tensor in (*qk, *vo))
    weight = normal(6, 4)
    for dead in (weight, torch.zeros_like(weight)):
        for side, size in (("input", 4), ("output", 6)):
            moments = LinearMoments(torch.zeros(size, size, dtype=F64), torch.zeros(4, dtype=F64), side)
            for tensor in factorize_linear(dead, None, 2, moments=moments, ridge=ridge):
                assert torch.isfinite(tensor).all()
        # without any signal the weights alone decide
        got = factorize_linear(dead, None, 2, moments=moments, ridge=ridge)
        torch.testing.assert_close(got[1] @ got[0], truncated(dead, 2))


def test_a_dead_head_leaves_the_others_alone():
    w = attention_weights(2, p=4, d=8)
    moments = identity_moments(2, p=4)
    alone = factorize_qk(w["wq"], w["bq"], w["wk"], 2, moments=moments)
    query = moments.query.clone()
    query[0] = 0
    beside = factorize_qk(w["wq"], w["bq"], w["wk"], 2, moments=replace(moments, query=query))
    assert torch.equal(alone.query_weight[1], beside.query_weight[1])


# Errors


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, True, None, "2"])
def test_bad_ranks(rank):
    w = attention_weights(2, p=4, d=8)
    calls = [
        lambda: factorize_qk(w["wq"], w["bq"], w["wk"], rank),
        lambda: factorize_vo(w["wv"], w["bv"], w["wo"], w["bo"], rank),
        lambda: factorize_linear(w["wo"][0], w["bo"], rank),
    ]
    for call in calls:
        with pytest.raises(
            InvalidValueError, match=r"`rank`: expected an int from 1 to 4 .*found " + repr(rank)
        ) as info:
            call()
        assert isinstance(info.value, ValueError) and isinstance(info.value, ComCATError)


@pytest.mark.parametrize("ridge", [-1e-9, math.nan, math.inf, "1", None])
def test_bad_ridges(ridge):
    w = attention_weights(2, p=4, d=8)
    for call in (
        lambda: factorize_qk(w["wq"], w["bq"], w["wk"], 2, ridge=ridge),
        lambda: vo_spectrum(w["wv"], w["bv"], w["wo"], w["bo"], ridge=ridge),
        lambda: factorize_linear(w["wo"][0], w["bo"], 2, ridge=ridge),
    ):
        with pytest.raises(InvalidValueError, match="`ridge`"):
            call()


def spoilt(tensor, kind):
    if kind == "shape":
        return torch.cat([tensor, tensor], -2 if tensor.ndim > 1 else -1)
    if kind == "int":
        return tensor.to(torch.int64)
    if kind == "meta":
        return tensor.to("meta")
    tensor = tensor.clone()
    tensor.view(-1)[-1] = kind
    return tensor


@pytest.mark.parametrize("kind", [math.nan, math.inf, "shape", "int", "meta"])
@pytest.mark.parametrize("spectrum", [False, True])
def test_bad_tensors_are_named(kind, spectrum):
    w = attention_weights(2, p=4, d=8)
    moments = identity_moments(2, p=4)
    qk = {"query_weight": w["wq"], "query_bias": w["bq"], "key_weight": w["wk"]}
    vo = {"value_weight": w["wv"], "value_bias": w["bv"], "output_weight": w["wo"], "output_bias": w["bo"]}
    linear = {"weight": normal(5, 3), "bias": normal(5)}
    linear_moments = LinearMoments(torch.eye(3, dtype=F64), torch.zeros(3, dtype=F64), "input")
    cases = [
        (factorize_qk, qk_spectrum, qk, moments, ("query", "key")),
        (factorize_vo, vo_spectrum, vo, moments, ("attended", "attended_mean")),
        (factorize_linear, linear_spectrum, linear, linear_moments, ("covariance", "mean")),
    ]
    for factorize, alone, arguments, given_moments, fields in cases:
        call = alone if spectrum else factorize
        rank = {} if spectrum else {"rank": 2}
        call(**arguments, **rank, moments=given_moments)
        for name, tensor in arguments.items():
            # a taller first weight or d_out is itself valid: the next argument no longer fits
            named = name if kind != "shape" or name not in ("query_weight", "value_weight", "weight") else r"\w+"
            if kind == "shape" and name == "output_weight":
                named = "output_bias"
            with pytest.raises(InvalidValueError, match=f"`{named}`: expected .*found .*; "):
                call(**{**arguments, name: spoilt(tensor, kind)}, **rank, moments=given_moments)
        for field in fields:
            bad = replace(given_moments, **{field: spoilt(getattr(given_moments, field), kind)})
            with pytest.raises(InvalidValueError, match=rf"`moments\.{field}`: expected .*found .*; "):
                call(**arguments, **rank, moments=bad)


def test_unsplit_weights_and_unknown_sides():
    with pytest.raises(InvalidValueError, match=r"`query_weight`: expected a non-empty .*H, p, d_q"):
        factorize_qk(normal(8, 8), None, normal(8, 8), 2)
    with pytest.raises(InvalidValueError, match="`weight`: expected a non-empty"):
        factorize_linear(normal(8), None, 2)
    with pytest.raises(InvalidValueError, match="`weight`: expected a non-empty"):
        factorize_linear(torch.zeros(0, 4), None, 2)
    with pytest.raises(InvalidValueError, match=r"`LinearMoments\.side`: expected 'input' or 'output', found 'both'"):
        LinearMoments(torch.eye(2), torch.zeros(2), "both")
