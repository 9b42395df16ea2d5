"""The formula of a customize adapter written out at the kernel of the dense module, whatever stands before it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comcat_hf.modeling.families import at_path
from comcat_hf.tuners.residual.layer import CustomizeLayer
from tests.helpers import assert_close, tensors_of
from tests.tuners.cases import layers_of


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return tensors_of(model(**inputs, return_dict=False))


def _heads(states: Tensor, count: int) -> Tensor:
    return states.unflatten(-1, (count, -1)).transpose(1, 2)


@torch.no_grad()
def record(model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple]:
    """Of each layer arguments, keyword arguments and output in a run; of a sibling its input and output."""
    seen: dict[str, tuple] = {}
    for path, layer in layers_of(model).items():
        layer.register_forward_hook(
            lambda module, args, kwargs, output, path=path: seen.update({path: (args, kwargs, output)}),
            with_kwargs=True,
        )
        if layer.view.sibling is not None:
            layer.view.sibling.register_forward_hook(
                lambda module, args, output, path=path: seen.update({path: (*seen[path], args[0], output)})
            )
    run(model, inputs)
    return seen


class WrittenOut:
    """The formula at the kernel of a dense module: `softmax(s (q k^T + sum t q' k'^T)) v`, and what goes beside it."""

    def __init__(self, layer: CustomizeLayer) -> None:
        self.layer, self.view = layer, layer.view
        self.states: dict[tuple[int, str], Tensor] = {}
        self.added: dict[int, Tensor] = {}

    def __call__(self, monkeypatch: pytest.MonkeyPatch, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
        """What the module gives, or its sibling for the input that it got."""
        handles = []
        for index, stream in enumerate(self.view.streams):
            for role in ("query", "key", "value"):
                linear = getattr(self.layer.base_layer, getattr(stream, role))
                handles.append(linear.register_forward_pre_hook(self._keep(index, role)))
            if stream.output is not None and self.view.projection("output", stream) is not None:
                output = at_path(self.layer.base_layer, stream.output) if self.view.sibling is None else None
                if output is not None:
                    handles.append(output.register_forward_hook(self._add(index)))
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(F, "scaled_dot_product_attention", self._kernel)
            result = self.layer.base_layer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return tensors_of(result)

    def _keep(self, index: int, role: str):
        return lambda module, args: self.states.update({(index, role): args[0]})

    def _add(self, index: int):
        return lambda module, args, output: output + self.added[index]

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, scale=None, **_: Any) -> Tensor:
        heads, p = self.view.num_heads, query.shape[-1]
        assert query.shape[1] == key.shape[1] == heads and p == self.view.head_dim
        order = list(range(len(self.view.streams)))
        dense = self.view.value
        first = _heads(F.linear(self.states[0, "value"], dense.weight, dense.bias), self.view.num_kv_heads)
        if len(order) > 1 and not torch.equal(first[:, 0], value[:, 0, : first.shape[2]]):
            order.reverse()

        def further(residual: nn.Module, role: str) -> Tensor | None:
            if getattr(residual, "output" if role == "value" else role) is None:
                return None
            count, parts = heads if role == "query" else self.view.num_kv_heads, []
            for index in order:
                linear, states = getattr(residual.streams[index], role), self.states[index, role]
                width = getattr(residual, role).out_features
                part = states.new_zeros(*states.shape[:2], width) if linear is None else linear(states)
                parts.append(_heads(part, count))
            return torch.cat(parts, dim=2).repeat_interleave(heads // count, dim=1)

        scores = query @ key.mT
        residuals = [(self.layer.comcat_factors[n], self.layer.scaling[n]) for n in self.layer.active_adapters]
        for residual, t in residuals:
            if (moved := further(residual, "query")) is not None:
                scores = scores + t * moved @ further(residual, "key").mT
        scores = scores * (p**-0.5 if scale is None else scale)
        if attn_mask is not None:
            mask = attn_mask
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        # Rows that see nothing are zero, as in the kernel.
        attention = scores.softmax(-1).nan_to_num()
        lengths = [self.states[index, "query"].shape[1] for index in order]
        for residual, t in residuals:
            if (values := further(residual, "value")) is not None:
                rows = (attention @ values).transpose(1, 2).flatten(2).split(lengths, dim=1)
                for index, part in zip(order, rows, strict=True):
                    if (output := residual.streams[index].output) is not None:
                        self.added[index] = self.added.get(index, 0) + t * output(part)
        return attention @ value


def check_formula(model: nn.Module, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer gives what the formula gives for what the layer gets in a run, to 1e-5."""
    seen = record(model, inputs)
    assert seen.keys() == layers_of(model).keys()
    for path, (args, kwargs, output, *projected) in seen.items():
        layer = layers_of(model)[path]
        reference = WrittenOut(layer)
        expected = reference(monkeypatch, args, kwargs)
        # What a last block finds for the text is dropped.
        count = 1 if getattr(layer.base_layer, "context_pre_only", False) else len(expected)
        assert_close(tensors_of(output)[:count], expected[:count], 1e-5)
        if projected:
            states, found = projected
            dense, p = layer.view.sibling, expected[0].shape[-1]
            attended = torch.cat([torch.cat(expected, dim=1), states[..., p:]], dim=-1)
            assert_close([found], [F.linear(attended, dense.weight, dense.bias) + reference.added[0]], 1e-5)
