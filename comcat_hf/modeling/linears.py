"""Linear layers that replace dense ones: low-rank factors, and layers of a narrowed MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .weights import compute_dtype


__all__ = ["LowRankLinear", "NarrowLinear", "empty_linear"]


class NarrowLinear(nn.Linear):
    """A layer of an MLP that has lost hidden units: fewer outputs before the activation, or fewer inputs behind it.

    It computes what `nn.Linear` does; the class says that its size is a choice and not the configuration's.
    """

    is_narrow = True


def empty_linear(
    linear: nn.Linear, out_features: int, in_features: int, bias: bool, cls: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """An empty linear layer of other sizes, on the device and in the dtype of the one given."""
    weight = linear.weight
    return nn.utils.skip_init(
        cls, in_features, out_features, bias=bias, device=weight.device, dtype=compute_dtype(linear)
    ).train(linear.training)


class LowRankLinear(nn.Module):
    """`y = (x first_factor^T) weight^T + bias` with an inner width of `rank`.

    Attributes:
        first_factor: projection to the rank, weight of shape `(rank, in_features)`.
        weight: `(out_features, rank)`.
        bias: `(out_features,)` or `None`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.first_factor = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.first_factor.reset_parameters()
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.first_factor(input), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )
