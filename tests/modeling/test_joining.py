"""Frozen projections joined with what adapters add, against the same in two products."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comcat_hf.tuners.residual.joining import can_join, joined_input, joined_output
from tests.tuners.test_customize import FULL, HEADS, WIDTH, host, states


P, D = 4, 12
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def _linear(sizes: tuple[int, int], bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(*sizes, bias=bias, dtype=dtype).requires_grad_(False)


def _drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def _two_products(dense: nn.Linear, added: Tensor, width: int, factor: float, x: Tensor) -> Tensor:
    own = dense(x).unflatten(-1, (HEADS, P))
    further = torch.einsum("...d,hrd->...hr", x, added)
    return factor * F.pad(torch.cat([own, further], -1), (0, width - P - added.shape[1])).flatten(-2)


class TestProducts:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("width", [6, 8])
    def test_input(self, bias, width):
        dense, added, x = _linear((D, HEADS * P), bias), _drawn(HEADS, 2, D), _drawn(2, 9, D)
        expected = _two_products(dense, added, width, 0.7, x)
        torch.testing.assert_close(joined_input(dense, added, HEADS, width, 0.7, x), expected)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("width", [6, 8])
    def test_output(self, bias, width):
        dense, added, x = _linear((HEADS * P, D), bias), _drawn(HEADS, 2, D), _drawn(2, 9, HEADS * width)
        heads = x.unflatten(-1, (HEADS, width))
        expected = dense(heads[..., :P].flatten(-2)) + torch.einsum("...hr,hrd->...d", heads[..., P : P + 2], added)
        torch.testing.assert_close(joined_output(dense, added, HEADS, x), expected)

    @pytest.mark.parametrize("bias", [True, False])
    def test_gradients(self, bias):
        def input_of(x: Tensor, added: Tensor) -> Tensor:
            return joined_input(_linear((D, HEADS * P), bias), added, HEADS, 8, 0.7, x)

        def output_of(x: Tensor, added: Tensor) -> Tensor:
            return joined_output(_linear((HEADS * P, D), bias), added, HEADS, x)

        added = _drawn(HEADS, 2, D).requires_grad_()
        assert torch.autograd.gradcheck(input_of, (_drawn(2, 3, D).requires_grad_(), added))
        assert torch.autograd.gradcheck(output_of, (_drawn(2, 3, HEADS * 8).requires_grad_(), added))
        # The first layer's states need none.
        assert torch.autograd.gradcheck(input_of, (_drawn(2, 3, D), added))

    def test_of_rows_that_are_frozen(self):
        x = _drawn(2, 3, D).requires_grad_()
        joined_input(_linear((D, HEADS * P), True), _drawn(HEADS, 2, D), HEADS, 8, 1.0, x).sum().backward()
        assert x.grad.abs().sum() > 0

    @dtypes
    def test_dtypes(self, dtype):
        dense, added = _linear((D, HEADS * P), True, dtype), _drawn(HEADS, 2, D, dtype=torch.float32).requires_grad_()
        found = joined_input(dense, added, HEADS, 8, 1.0, _drawn(2, 9, D, dtype=dtype))
        found.sum().backward()
        assert found.dtype == dtype
        assert added.grad.dtype == torch.float32
        if dtype == torch.bfloat16:
            return
        with torch.autocast("cpu", torch.bfloat16):
            found = joined_input(dense, added, HEADS, 8, 1.0, _drawn(2, 9, D, dtype=dtype))
        assert found.dtype == torch.bfloat16
        found.sum().backward()


class TestWhen:
    def _can(self, dense: nn.Module, tokens: int = 12, *added: nn.Module) -> bool:
        return can_join(dense, added, _drawn(tokens, D))

    def test_it_pays(self):
        dense = _linear((D, HEADS * P), True)
        assert self._can(dense, 12)
        assert not self._can(dense, 11)

    def test_not_where_the_dense_weights_learn(self):
        dense = _linear((D, HEADS * P), True)
        dense.bias.requires_grad_(True)
        assert not self._can(dense)
        with torch.no_grad():
            assert self._can(dense)

    @pytest.mark.parametrize(
        "hook",
        [
            lambda linear: linear.register_forward_hook(print),
            lambda linear: linear.register_forward_pre_hook(print),
            lambda linear: linear.register_full_backward_hook(print),
            lambda linear: setattr(linear, "forward", print),
        ],
    )
    def test_not_where_something_hooks_on(self, hook):
        dense, further = _linear((D, HEADS * P), True), _linear((D, 6), False)
        assert self._can(dense, 12, further)
        hook(further)
        assert not self._can(dense, 12, further)

    def test_not_through_other_layers(self):
        assert not self._can(nn.Sequential(_linear((D, HEADS * P), True)))


class TestInTheLayer:
    """One sample with many tokens is joined, its parts are not."""

    @pytest.fixture
    def joined(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The calls of joined products; what is not joined adds none."""
        found: list[str] = []
        for name in ("joined_input", "joined_output"):
            original = globals()[name]

            def record(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Tensor:
                found.append(name)
                return original(*args, **kwargs)

            monkeypatch.setattr(f"comcat_hf.tuners.residual.projections.{name}", record)
        return found

    @pytest.mark.parametrize(
        "adapters", [[FULL], [FULL, {"qk_rank": 1}, FULL], [{"vo_rank": 2}], [FULL, {"qk_rank": 2, "core": True}]]
    )
    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_outputs_and_gradients(self, joined, adapters, scale, monkeypatch):
        model, x = host(*adapters, scale_qk=scale is None).double(), states(batch=1, tokens=WIDTH).double()
        model.attn.set_scale("a", 0.5)

        def run() -> list[Tensor]:
            given = x.clone().requires_grad_()
            parameters = [p for name, p in model.named_parameters() if "comcat_" in name]
            output = model(given)
            return [output, *torch.autograd.grad(output.square().sum(), [given, *parameters])]

        found = run()
        assert joined
        joined.clear()
        monkeypatch.setattr("comcat_hf.tuners.residual.projections.can_join", lambda *_: False)
        expected = run()
        assert not joined
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right)

    def test_what_a_core_changes_is_not_joined(self, joined):
        host(FULL, {"qk_rank": 2, "vo_rank": 2, "core": True})(states(batch=1, tokens=WIDTH))
        assert joined == ["joined_input", "joined_input"]  # keys and values

    def test_memory_holds_no_joined_weights(self):
        model, x = host(FULL), states(batch=1, tokens=64)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            model(x)
        assert not any(shape[-1] == WIDTH and shape[0] == HEADS * 16 for shape in kept if len(shape) == 2)

    def test_compiled(self, joined):
        torch._dynamo.reset()
        model, x = host(FULL), states(batch=1, tokens=WIDTH)
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        parameters = [p for name, p in model.named_parameters() if "comcat_" in name]
        expected = torch.autograd.grad(model(x).sum(), parameters)
        assert joined
        for left, right in zip(torch.autograd.grad(run(x).sum(), parameters), expected, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)
