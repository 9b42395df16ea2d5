"""Variations of calibration texts: similar tokens in the place of some."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...checks import check, finite, list_of, whole
from ...errors import InvalidValueError
from ...modeling import unwrapped
from .inputs import Batch, prepare_batch, read_batches


__all__ = ["vary_tokens"]

# Tokens whose similarities to all others are computed at once.
_ROWS = 256


@torch.no_grad()
def vary_tokens(
    model: nn.Module,
    batches: Iterable[Batch],
    special_ids: Collection[int],
    *,
    copies: int = 3,
    share: float = 0.3,
    neighbours: int = 10,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Augment calibration texts with copies in which similar tokens replace some.

    A few thousand sentences hold a fraction of a vocabulary. The statistics of their variations hold more of it, so
    that ranks and factors fit other texts better. For `compress` and `collect_statistics`. Call `refine` afterwards,
    with the texts as they are: it keeps some apart, and these must be unlike those that it learns from.

    Args:
        model: a model of transformers that takes `input_ids`; the most similar tokens are those of the largest cosine
            between its input embeddings, once their mean is subtracted.
        batches: mappings with `"input_ids"` `(B, T)` and, where there is padding, `"attention_mask"` `(B, T)`.
        special_ids: tokens that stay and replace none, usually `tokenizer.all_special_ids`.
        copies: variations of each batch.
        share: the probability that a token is replaced.
        neighbours: how many of the most similar tokens it is drawn from, with equal probability.
        seed: of the draws.

    Returns:
        the batches on the model's device, without labels, and behind them their copies.

    Raises:
        InvalidValueError: an argument out of range, a model without input embeddings, batches without tokens or with
            tokens that the model does not have.
    """
    check(copies, whole(1), "copies")
    check(share, finite(0, 1), "share")
    model = unwrapped(model)
    weight = _embeddings(model)
    check(special_ids, list_of(whole(0, len(weight) - 1)), "special_ids")
    check(neighbours, whole(1, len(weight) - len(set(special_ids)) - 1), "neighbours")
    given = [prepare_batch(model, batch, index, weight.device) for index, batch in enumerate(read_batches(batches))]
    for index, batch in enumerate(given):
        _check_tokens(model, batch, index, len(weight))
    special = torch.tensor(sorted(special_ids), dtype=torch.int64, device=weight.device)
    present = torch.cat([batch["input_ids"].flatten() for batch in given]).unique()
    similar = _similar(weight, present, special, neighbours)
    generator = torch.Generator().manual_seed(seed)

    def varied(batch: dict[str, Any]) -> dict[str, Any]:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        replaced = (torch.rand(ids.shape, generator=generator) < share).to(ids.device) & ~torch.isin(ids, special)
        if mask is not None:
            replaced &= mask.bool()
        drawn = torch.randint(neighbours, (*ids.shape, 1), generator=generator).to(ids.device)
        candidates = similar[torch.searchsorted(present, ids)]
        return batch | {"input_ids": torch.where(replaced, candidates.gather(-1, drawn)[..., 0].to(ids), ids)}

    return given + [varied(batch) for _ in range(copies) for batch in given]


def _embeddings(model: nn.Module) -> Tensor:
    """The rows of the model's token embeddings, `(V, D)`."""
    try:
        layer = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        layer = None
    if not isinstance(layer, nn.Embedding):
        raise InvalidValueError(
            f"model: expected one with token embeddings, found {type(model).__name__}. Pass the text model within it, "
            "such as clip.text_model; augment images in their loader."
        )
    return layer.weight


def _check_tokens(model: nn.Module, batch: dict[str, Any], index: int, count: int) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise InvalidValueError(f"Batch {index}: expected whole numbers 'input_ids', found {sorted(batch)}.")
    if ids.min() < 0 or ids.max() >= count:
        raise InvalidValueError(
            f"Batch {index}: expected 'input_ids' from 0 to {count - 1}, the tokens of {type(model).__name__}, found "
            f"{ids.min()} to {ids.max()}. Use the model's own tokenizer."
        )
    if mask is not None and mask.shape != ids.shape:
        raise InvalidValueError(
            f"Batch {index}: expected an 'attention_mask' of the shape {tuple(ids.shape)} of 'input_ids', found "
            f"{tuple(mask.shape)}."
        )


def _similar(weight: Tensor, present: Tensor, special: Tensor, count: int) -> Tensor:
    """For each token that is present the most similar others, `(present, count)`."""
    weight = weight.float()
    rows = normalize(weight - weight.mean(0), dim=-1)
    nearest = []
    for part in present.split(_ROWS):
        cosines = rows[part] @ rows.T
        cosines[:, special] = -torch.inf
        cosines[torch.arange(len(part), device=part.device), part] = -torch.inf
        nearest.append(cosines.topk(count).indices)
    return torch.cat(nearest)
