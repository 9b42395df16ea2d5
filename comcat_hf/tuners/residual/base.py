"""What the layers of mode "customize" have in common, around attention and around feed-forwards."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...modeling.wrappers import is_tuner_layer
from .names import NamedAsDense
from .scale import Scale


__all__ = ["ResidualLayer"]


class View(Protocol):
    """A dense module and the linear layers that adapters change."""

    @property
    def module(self) -> nn.Module: ...

    def projections(self) -> dict[str, nn.Module]: ...


class ResidualLayer(NamedAsDense):
    """A dense module with the residuals of any number of adapters.

    Attributes:
        view: the dense module.
        scales: by adapter name, what multiplies what the adapter adds.
    """

    mode = "customize"

    def __init__(self, view: View) -> None:
        super().__init__(view.module)
        self.view = view
        self.scales: dict[str, Scale] = {}
        self._merged_beside: list[list[str]] = []

    # Adapters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ResidualLayer":
        super()._apply(fn, recurse)
        self.settle()
        return self

    def settle(self) -> None:
        """Follow the device and the active adapters now: a forward that does is compiled a second time."""
        device = next(self.base_layer.parameters()).device
        if device.type == "meta":
            return
        with torch.inference_mode(False):
            for scale in self.scales.values():
                scale.tensor = scale.tensor.to(device)

    def update_layer(self, adapter_name: str, factors: nn.Module, scale: float = 1.0) -> None:
        """Add the factors of one adapter.

        Args:
            adapter_name: its name.
            factors: on the device of the dense module, or empty on the meta device.
            scale: what [`set_scale`] takes as 1.
        """
        super().update_layer(adapter_name, factors)
        self.scales[adapter_name] = Scale(scale)

    # Scales

    @property
    def scaling(self) -> dict[str, float]:
        """The value of each adapter's scale."""
        return {name: scale.value for name, scale in self.scales.items()}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale, relative to that of its configuration."""
        if adapter in self.scales:
            self.scales[adapter].set(scale)

    def set_initial_scale(self, adapter: str, scale: float) -> None:
        """Change what [`set_scale`] takes as 1; the scale in use changes with it."""
        if adapter in self.scales:
            self.scales[adapter].set_initial(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters."""
        for found in self._active_scales():
            found.push(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo [`scale_layer`] exactly; without a scale, go back to those of the configurations."""
        if scale is None:
            for found in self._active_scales():
                found.reset()
            return
        # Those that were active when they were scaled.
        pushed = [found for found in self.scales.values() if scale in found.factors]
        for found in pushed or self._active_scales():
            found.pop(scale)

    def _active_scales(self) -> list[Scale]:
        return [self.scales[name] for name in self.active_adapters if name in self.scales]

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._prepare()
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.merged_layer is not None and not self._others_act():
            self._check_merged(self.merged_layer)
            return self.merged_layer(*args, **kwargs)
        return self._run(*args, **kwargs) if self._in_use() else self.base_layer(*args, **kwargs)

    def _prepare(self) -> None:
        """What precedes every call."""
        self._take_in()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The dense module with the residuals of the adapters in use."""
        raise NotImplementedError

    def _check_merged(self, merged: nn.Module) -> None:
        """Raise where the merged module cannot run."""

    def _others_act(self) -> bool:
        """Whether an adapter of another method acts on a projection, which fused projections know nothing of."""
        found = [linear for linear in self.view.projections().values() if is_tuner_layer(linear)]
        return any(linear.active_adapters and not (linear.merged or linear.disable_adapters) for linear in found)

    def _in_use(self) -> list[str]:
        return [name for name in self.merged_adapters or self.active_adapters if name in self.comcat_factors]

    def active(self) -> list[tuple[Any, Tensor]]:
        """The factors of each adapter in use, and its scale."""
        found = []
        for name in self._in_use():
            scale = self.scales[name]
            tensor = scale.tensor if scale.fused is None else torch.full_like(scale.tensor, scale.fused)
            found.append((self.comcat_factors[name], tensor))
        return found

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute the projections with adapters merged in, and run these until [`unmerge`].

        Full factors give projections with wider heads, cores and gains ones of the dense shapes; all are exact. The
        dense module is kept.
        """
        names = [*self.merged_adapters, *self.to_merge(safe_merge, adapter_names)]
        # Those of other methods that are fused into the dense weights.
        beside = [linear.merged_adapters[:] for linear in self.view.projections().values() if is_tuner_layer(linear)]
        if not names or (names, beside) == (self.merged_adapters, self._merged_beside):
            return
        merged = self.merged_with(self.residuals(names, merged=True))
        if safe_merge and not all(p.isfinite().all() for p in merged.parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        self.merged_layer, self.comcat_factors.merged_adapters, self._merged_beside = merged, names, beside
        for name in names:
            self.scales[name].fused = self.scales[name].in_use

    def merged_with(self, residuals: list[tuple[Any, float]]) -> nn.Module:
        """The dense module with these factors, each at its scale, in its weights."""
        raise NotImplementedError

    def residuals(self, names: list[str], *, merged: bool = False) -> list[tuple[Any, float]]:
        """Factors and scale of each adapter named; with `merged` the scale that it is merged with, if it is."""
        scales = [self.scales[name] for name in names]
        values = [scale.in_use if merged else scale.value for scale in scales]
        return [(self.comcat_factors[name], value) for name, value in zip(names, values, strict=True)]

    def unmerge(self) -> None:
        """Undo [`merge`], to the bit."""
        self.merged_layer = None
        self.merged_adapters.clear()
        for scale in self.scales.values():
            scale.fused = None

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module that remains: with `merge` one that owns the merged projections, else the dense one."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.get_base_layer() if merge else self.released()

    def get_base_layer(self) -> nn.Module:
        """The module that diffusers leaves when it takes adapters away: with the fused ones in it, if any."""
        return self.base_layer if self.merged_layer is None else self.merged_layer
