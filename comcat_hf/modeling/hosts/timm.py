"""The attention and MLP classes of timm that we know; its models are also found within transformers' `TimmWrapper`."""

from functools import partial
from typing import Any

from torch import nn

from ..families import NORMALISED, ROTATED, AttentionFamily, MLPFamily


_LAYERS = {"query": "qkv", "key": "qkv", "value": "qkv", "output": "proj"}
_FUSED: dict[str, Any] = {**_LAYERS, "num_heads": "num_heads", "dropout": None}


def _is_there(module: nn.Module, name: str) -> bool:
    return not isinstance(getattr(module, name, None), (nn.Identity, type(None)))


def _refuse(module: nn.Module) -> str | None:
    between = [name for name in ("norm", "gate") if _is_there(module, name)]
    if between:
        return f"a {between[0]} stands between its values and its output, so their product is not one matrix"
    return None


def _refuse_qk(module: nn.Module) -> str | None:
    if _is_there(module, "q_norm") or _is_there(module, "k_norm"):
        return NORMALISED
    return None


def _refuse_one_layer(module: nn.Module) -> str | None:
    if module.q_proj is None:
        return "its queries, keys and values are one layer whose bias it holds apart; this is not built"
    return _refuse(module)


def _refuse_rotary(module: nn.Module) -> str | None:
    return ROTATED


def _scale(module: nn.Module) -> float:
    return module.scale


def _refuse_norm(module: nn.Module) -> bool:
    return _is_there(module, "norm")


FAMILIES: tuple[AttentionFamily, ...] = (
    *(
        AttentionFamily(
            f"timm.{path}.Attention", **_FUSED, refuse=_refuse, refuse_qk=_refuse_qk, hosted=True, fixed_width=True
        )
        # Earlier versions have it among the models.
        for path in ("layers.attention", "models.vision_transformer")
    ),
    AttentionFamily(
        "timm.models.swin_transformer.WindowAttention", **_FUSED, head_dim=None, scaling="scale", scale_of=_scale
    ),
    AttentionFamily(
        "timm.models.eva.EvaAttention",
        query="q_proj",
        key="k_proj",
        value="v_proj",
        output="proj",
        num_heads="num_heads",
        dropout=None,
        refuse=_refuse_one_layer,
        refuse_qk=_refuse_rotary,
        hosted=True,
        fixed_width=True,
    ),
)

_two = partial(MLPFamily, first=("fc1",), second="fc2", refuse=_refuse_norm)
_gated = partial(MLPFamily, first=("fc1_g", "fc1_x"), second="fc2", refuse=_refuse_norm)

MLPS: tuple[MLPFamily, ...] = (_two("timm.layers.mlp.Mlp"), _gated("timm.layers.mlp.SwiGLU"))
