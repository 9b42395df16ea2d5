"""Converts `checkpoint.pth` and `ranks.txt` of the original release to and from a compressed ViT of transformers."""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from ..configs import RankPlan
from ..errors import CheckpointError, InvalidValueError
from ..modeling.surgery import apply_ranks
from ..native import attach_plan, plan_of
from ..tensor_files import write_saved
from .files import check_sizes, read_pickle, take_tensor
from .ranks import read_original_ranks, write_original_ranks


__all__ = ["read_original_vit", "write_original_vit"]

CHECKPOINT, RANKS = "checkpoint.pth", "ranks.txt"
_HEAD_WIDTH = 64  # of every DeiT
_LOW_RANK = "selected_rank_layer."
_PATCHES = "embeddings.patch_embeddings.projection"
_BUILT_IN = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}


@dataclass(frozen=True)
class _Kind:
    """A class of transformers, and its names for the parts of timm's DeiT."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    prefix: str
    tokens: dict[str, str]
    heads: dict[str, str]


_PLAIN = _Kind(ViTForImageClassification, ViTConfig, "vit", {"cls_token": "cls_token"}, {"head": "classifier"})
_DISTILLED = _Kind(
    DeiTForImageClassificationWithTeacher,
    DeiTConfig,
    "deit",
    {"cls_token": "cls_token", "dist_token": "distillation_token"},
    {"head": "cls_classifier", "head_dist": "distillation_classifier"},
)


def read_original_vit(
    folder: str | Path, *, heads: int | None = None
) -> ViTForImageClassification | DeiTForImageClassificationWithTeacher:
    """Make a compressed ViT from the files of the original release's training, with the same outputs.

    Factors keep their values. Key biases are dropped, since the softmax removes them. The biases of values and of
    first factors are folded into the following bias.

    Args:
        folder: folder with `checkpoint.pth` and `ranks.txt`. Image and patch size come from the shapes.
        heads: attention heads of a block; default: width / 64.

    Returns:
        the model in eval mode, in float32, with its plan (`comcat_hf.plan_of`). A file with a distillation token gives
        a model that averages the logits of both heads, as timm does.

    Raises:
        CheckpointError: files that are missing, damaged, of another model or not safe to read.
        InvalidValueError: a number of heads that does not divide the width.
    """
    folder = Path(folder).expanduser()
    source = str(folder / CHECKPOINT)
    content = read_pickle(source)
    tensors = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"{source}: expected the weights under the key 'model', found none; check the file")
    if not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"{source}: expected tensors by their names, found other keys; check the file")
    check_sizes(tensors.values(), source)
    reader = _Reader(dict(tensors), source)
    config = reader.config(heads)
    state, ranks = reader.state(config)
    reader.check_ranks(read_original_ranks(folder / RANKS, config.num_hidden_layers))
    if reader.rest:
        shown = ", ".join(name[:80] for name in reader.rest[:6])
        raise CheckpointError(
            f"{source}: expected the names of a DeiT with low-rank layers, found besides {shown}"
            f"{' and more' if len(reader.rest) > 6 else ''}; the file is of another model"
        )
    model = reader.kind.model(config).eval()
    apply_ranks(model, ranks, initialize=False)
    model.load_state_dict(state)
    return attach_plan(model, RankPlan(architecture=type(model).__name__, ranks=ranks))


class _Reader:
    """Takes tensors out of a checkpoint by name and shape; tensors left at the end are unknown."""

    def __init__(self, tensors: dict[str, Any], source: str) -> None:
        self.tensors, self.source = tensors, source
        self.kind = _DISTILLED if "dist_token" in tensors else _PLAIN
        self.found: list[int | None] = []

    @property
    def rest(self) -> list[str]:
        return sorted(self.tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        value = take_tensor(self.tensors, name, shape, self.source)
        del self.tensors[name]
        return value

    def config(self, heads: int | None) -> PreTrainedConfig:
        position = take_tensor(self.tensors, "pos_embed", (1, None, None), self.source)
        patches, width = position.shape[1] - len(self.kind.tokens), position.shape[2]
        kernel = take_tensor(self.tensors, "patch_embed.proj.weight", (width, None, None, None), self.source)
        side = math.isqrt(max(patches, 0))
        layers = {int(match[1]) for name in self.tensors if (match := re.match(r"blocks\.([0-9]{1,4})\.", name))}
        square = side * side == patches and kernel.shape[2] == kernel.shape[3]
        if not square or min(patches, *kernel.shape[1:]) < 1 or layers != set(range(len(layers))):
            raise CheckpointError(
                f"{self.source}: expected square patches of a square image and blocks numbered from 0, found "
                f"{patches} patches of {kernel.shape[2]} × {kernel.shape[3]} and the blocks {sorted(layers)}"
            )
        heads = width // _HEAD_WIDTH if heads is None else heads
        if heads < 1 or width % heads:
            raise InvalidValueError(
                f"heads: expected a divisor of the width {width}, found {heads}; give the number of attention heads"
            )
        inner, classes = (
            take_tensor(self.tensors, self.last(name, ".bias"), (None,), self.source).shape[0]
            for name in ("blocks.0.mlp.fc1", "head")
        )
        return self.kind.config(
            hidden_size=width,
            num_hidden_layers=len(layers),
            num_attention_heads=heads,
            intermediate_size=inner,
            image_size=side * kernel.shape[2],
            patch_size=kernel.shape[2],
            num_channels=kernel.shape[1],
            num_labels=classes,
            layer_norm_eps=1e-6,
        )

    def last(self, name: str, end: str) -> str:
        """The name of a layer's weight or bias; for a low-rank layer, that of its last factor."""
        low = f"{name}.{_LOW_RANK}last_factor{end}"
        return low if low in self.tensors else f"{name}{end}"

    def state(self, config: PreTrainedConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state dict and the ranks of the model."""
        width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
        prefix = self.kind.prefix
        state = {
            f"{prefix}.embeddings.{here}": self.take(there, 1, 1, width) for there, here in self.kind.tokens.items()
        }
        state[f"{prefix}.embeddings.position_embeddings"] = self.take("pos_embed", 1, None, width)
        kernel = (width, config.num_channels, patch, patch)
        state |= self.pair(f"{prefix}.{_PATCHES}", "patch_embed.proj", kernel)
        ranks: dict[str, Any] = {}
        for layer in range(config.num_hidden_layers):
            there, here = f"blocks.{layer}", f"{prefix}.layers.{layer}"
            for old, new in _NORMS.items():
                state |= self.pair(f"{here}.{new}", f"{there}.{old}", (width,))
            self.attention(f"{here}.attention", f"{there}.attn", config, state, ranks)
            self.linear(f"{here}.mlp.fc1", f"{there}.mlp.fc1", (inner, width), state, ranks)
            self.linear(f"{here}.mlp.fc2", f"{there}.mlp.fc2", (width, inner), state, ranks)
        state |= self.pair(f"{prefix}.layernorm", "norm", (width,))
        for there, here in self.kind.heads.items():
            self.linear(here, there, (config.num_labels, width), state, ranks)
        return state, ranks

    def pair(self, here: str, there: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        weight, bias = self.take(f"{there}.weight", *shape), self.take(f"{there}.bias", shape[0])
        return {f"{here}.weight": weight, f"{here}.bias": bias}

    def bias(self, name: str, size: int) -> Tensor:
        """A bias, or zeros if the file has none."""
        return self.take(name, size) if name in self.tensors else torch.zeros(size)

    def attention(
        self, here: str, there: str, config: PreTrainedConfig, state: dict[str, Tensor], ranks: dict[str, Any]
    ) -> None:
        width, heads = config.hidden_size, config.num_attention_heads
        low = f"{there}.{_LOW_RANK}"
        if f"{low}w_qs.weight" not in self.tensors:
            self.found += [None, None]
            weight, bias = (
                self.take(f"{there}.qkv.weight", 3 * width, width),
                self.bias(f"{there}.qkv.bias", 3 * width),
            )
            for name, rows, part in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
                state[f"{here}.{name}_proj.weight"], state[f"{here}.{name}_proj.bias"] = rows.clone(), part.clone()
            state[f"{here}.o_proj.weight"] = self.take(f"{there}.proj.weight", width, width)
            state[f"{here}.o_proj.bias"] = self.bias(f"{there}.proj.bias", width)
            return
        query = self.take(f"{low}w_qs.weight", None, width)
        value = self.take(f"{low}w_vs.weight", None, width)
        qk, vo = query.shape[0], value.shape[0]
        if qk % heads or vo % heads:
            raise CheckpointError(
                f"{self.source}: expected {low}w_qs and w_vs to have the same rows for each of {heads} heads, found "
                f"{qk} and {vo}; give the number of heads"
            )
        self.found += [qk, vo]
        output = self.take(f"{low}proj.weight", width, vo)
        self.bias(f"{low}w_ks.bias", qk)
        state |= {
            f"{here}.q_proj.weight": query,
            f"{here}.q_proj.bias": self.bias(f"{low}w_qs.bias", qk),
            f"{here}.k_proj.weight": self.take(f"{low}w_ks.weight", qk, width),
            f"{here}.v_proj.weight": value,
            f"{here}.o_proj.weight": output,
            f"{here}.o_proj.bias": self.bias(f"{low}proj.bias", width) + output @ self.bias(f"{low}w_vs.bias", vo),
        }
        ranks[here] = {"qk": qk // heads, "vo": vo // heads}

    def linear(
        self, here: str, there: str, shape: tuple[int, int], state: dict[str, Tensor], ranks: dict[str, Any]
    ) -> None:
        rows, columns = shape
        low = f"{there}.{_LOW_RANK}"
        if f"{low}first_factor.weight" not in self.tensors:
            self.found.append(None)
            state[f"{here}.weight"] = self.take(f"{there}.weight", *shape)
            state[f"{here}.bias"] = self.bias(f"{there}.bias", rows)
            return
        first = self.take(f"{low}first_factor.weight", None, columns)
        rank = first.shape[0]
        last = self.take(f"{low}last_factor.weight", rows, rank)
        bias = self.bias(f"{low}last_factor.bias", rows) + last @ self.bias(f"{low}first_factor.bias", rank)
        state |= {f"{here}.first_factor.weight": first, f"{here}.weight": last, f"{here}.bias": bias}
        ranks[here] = rank
        self.found.append(rank)

    def check_ranks(self, given: list[int]) -> None:
        # The file has no rank for a distillation head, whose rank is the last in `found`.
        for position, (said, there) in enumerate(zip(given, self.found[: len(given)], strict=True)):
            if there not in (None, said):
                block, place = divmod(position, 4)
                last = position == len(given) - 1
                where = "the head" if last else f"block {block}, {('QK', 'VO', 'fc1', 'fc2')[place]}"
                raise CheckpointError(
                    f"{self.source}: expected in {where} the rank {said} "
                    f"of {RANKS}, found {there}; the two files belong to different models"
                )


def write_original_vit(
    model: ViTForImageClassification | DeiTForImageClassificationWithTeacher, folder: str | Path
) -> Path:
    """Write a compressed ViT as `checkpoint.pth` and `ranks.txt` of the original release.

    The files do not record the number of heads: the release reads DeiTs, whose heads are 64 wide.

    Args:
        model: model whose plan names attention, fc1 and fc2 of every block and the classifier.
        folder: folder to write to.

    Returns:
        the folder.

    Raises:
        RankPlanError: a plan that the format cannot hold; see [`write_original_ranks`].
        InvalidValueError: another class of model, or settings that the release does not have.
    """
    kind = next((kind for kind in (_PLAIN, _DISTILLED) if isinstance(model, kind.model)), None)
    if kind is None:
        raise InvalidValueError(
            f"model: expected a ViTForImageClassification or a DeiTForImageClassificationWithTeacher, found "
            f"{type(model).__name__}; the original format has no place for other models"
        )
    folder = Path(folder).expanduser()
    for name, built_in in _BUILT_IN.items():
        if (found := getattr(model.config, name)) != built_in:
            raise InvalidValueError(
                f"{name}: expected {built_in}, which the original release has built in, found {found}; the original "
                "format has no place for it"
            )
    write_original_ranks(plan_of(model), folder / RANKS, heads=model.config.num_attention_heads)
    args = argparse.Namespace(model=model.config.model_type)
    write_saved(folder / CHECKPOINT, {"model": _tensors_of(model, kind), "args": args})
    return folder


def _tensors_of(model: PreTrainedModel, kind: _Kind) -> dict[str, Tensor]:
    """A model's weights under the names of the release."""
    state = {key: value.detach().float().cpu() for key, value in model.state_dict().items()}
    prefix = kind.prefix
    tensors = {there: state[f"{prefix}.embeddings.{here}"] for there, here in kind.tokens.items()}
    tensors["pos_embed"] = state[f"{prefix}.embeddings.position_embeddings"]
    names = {"patch_embed.proj": f"{prefix}.{_PATCHES}", "norm": f"{prefix}.layernorm"}
    linear = dict(kind.heads)
    for layer in range(model.config.num_hidden_layers):
        there, here = f"blocks.{layer}", f"{prefix}.layers.{layer}"
        names |= {f"{there}.{old}": f"{here}.{new}" for old, new in _NORMS.items()}
        linear |= {f"{there}.mlp.{name}": f"{here}.mlp.{name}" for name in ("fc1", "fc2")}
        low = f"{there}.attn.{_LOW_RANK}"
        for old, new in {"w_qs": "q_proj", "w_ks": "k_proj", "w_vs": "v_proj", "proj": "o_proj"}.items():
            weight = state[f"{here}.attention.{new}.weight"]
            # Zeros for a missing bias, so that the release's flag for biases fits all four layers.
            bias = state.get(f"{here}.attention.{new}.bias", torch.zeros(weight.shape[0]))
            tensors |= {f"{low}{old}.weight": weight, f"{low}{old}.bias": bias}
    for there, here in linear.items():
        first = state.get(f"{here}.first_factor.weight")
        if first is None:
            # Only the distillation head, which has no rank in ranks.txt.
            names[there] = here
            continue
        tensors[f"{there}.{_LOW_RANK}first_factor.weight"] = first
        tensors |= {f"{there}.{_LOW_RANK}last_factor.{end}": state[f"{here}.{end}"] for end in ("weight", "bias")}
    for there, here in names.items():
        tensors |= {f"{there}.{end}": state[f"{here}.{end}"] for end in ("weight", "bias")}
    return tensors
