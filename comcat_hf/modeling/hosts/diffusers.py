"""The attention classes of diffusers that we know, the form of each of their processors, and refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ...errors import UnsupportedModuleError
from ..families import AttentionFamily, Form, MLPFamily, Stream


# Text with projections of its own, beside an image.
_TEXT = Stream("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k")

_GROUPS = "compression is not built for keys and values that several heads of queries share"
# These give their kernel the module's scale, and pass norms of queries and keys over;
_given = Form(scale="given", norms=False)
# and with these it takes the root of the width of the heads.
_width = Form(scale="width", heads_first=True)
_own = partial(Form, scale="width")
_joint = partial(_own, (_TEXT,), "image_rotary_emb")
_LINEAR = "its attention is linear: it takes queries and keys apart, so there are no scores to add to"

# Those of the class that UNets and the older transformers share.
PROCESSORS: dict[str, Form] = {
    **dict.fromkeys(("AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor"), _given),
    **dict.fromkeys(("AttnProcessor2_0", "FusedAttnProcessor2_0", "AttnProcessorNPU"), _width),
    "XLAFlashAttnProcessor2_0": _width,
    "SanaAttnProcessor2_0": Form(scale="width"),
    **dict.fromkeys(("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0"), _own((_TEXT,), heads_first=True)),
    "QwenDoubleStreamAttnProcessor2_0": _joint(),
    "HunyuanVideoAttnProcessor2_0": _joint(),
    "HunyuanImageAttnProcessor": _joint(),
    "BriaAttnProcessor": _joint(),
    **dict.fromkeys(("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0"), _own((_TEXT,), scale="given")),
    "ZSingleStreamAttnProcessor": _own(rotary="freqs_cis"),
    "Lumina2AttnProcessor2_0": _own(rotary="image_rotary_emb", scale="given", compress=_GROUPS),
    **dict.fromkeys(
        ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0", "HunyuanAttnProcessor2_0"),
        _own(rotary="image_rotary_emb", heads_first=True),
    ),
    "CogView4AttnProcessor": _own(rotary="image_rotary_emb", layout="halves", heads_first=True),
    "SanaLinearAttnProcessor2_0": _own(refuse_qk=_LINEAR),
}
# What its kernel computes with fewer heads of keys.
_GROUPED = frozenset({"Lumina2AttnProcessor2_0"})

# Of processors that are refused, by a part of their names: what they do, and what to do about it.
_TWICE = (
    "calls its kernel a second time with the same queries, for an image prompt",
    "Unload the IP-Adapter first (pipe.unload_ip_adapter())",
)
_CACHE = (
    "keeps keys and values of earlier calls, which may have had other adapters",
    "Use the model with its processor that has no cache",
)
_REASONS = {"IPAdapter": _TWICE, "KV": _CACHE, "Causal": _CACHE, "QwenImage21": _CACHE}
_PLAIN = ("does not compute plain attention", "Call set_default_attn_processor() on the model")


def _refuse(module: nn.Module) -> str | None:
    name = type(module.processor).__name__
    if module.added_kv_proj_dim is not None and name in PROCESSORS and not PROCESSORS[name].further:
        return "it attends to two inputs with projections of their own (added_kv_proj_dim)"
    if module.to_k is None or (module.to_out is None and not module.pre_only):
        return "it has no key, value or output projection of its own"
    if module.inner_kv_dim != module.inner_dim and name not in _GROUPED:
        return "its keys and values have fewer heads than its queries"
    return None


def _refuse_qk(module: nn.Module) -> str | None:
    if module.norm_q is not None or module.norm_k is not None:
        return "it normalises queries and keys after their projections (qk_norm)"
    return None


def _refuse_second_image(module: nn.Module) -> str | None:
    if module.add_k_proj is not None:
        return (
            "it attends to an image in a second call of its kernel with the same queries (image-to-video); adapters "
            "are built for one call"
        )
    return None


@dataclass(frozen=True)
class _Scale:
    """Gives the factor on the scores of a module, or refuses its processor by name."""

    processors: Mapping[str, Form] = field(hash=False)

    def __call__(self, module: nn.Module) -> float:
        form = self.processors.get(type(module.processor).__name__)
        if form is None:
            raise _unknown(type(module.processor).__name__, self.processors)
        if form.scale == "given":
            return module.scale
        width = getattr(module, "head_dim", None) or module.to_q.out_features // module.heads
        return width**-0.5


def _unknown(name: str, processors: Mapping[str, Form]) -> UnsupportedModuleError:
    why, fix = next((reason for part, reason in _REASONS.items() if part in name), _PLAIN)
    return UnsupportedModuleError(
        f"The attention processor {name} {why}, so neither ComCAT adapters nor compressed attention can run with it. "
        f"Expected one of {', '.join(sorted(processors))}. {fix}, or take the adapter away."
    )


def _family(path: str, processors: Mapping[str, Form], **settings: Any) -> AttentionFamily:
    names = {"query": "to_q", "key": "to_k", "value": "to_v", "output": "to_out.0", "num_heads": "heads"}
    given: dict[str, Any] = {
        "head_dim": "head_dim",
        "scaling": "scale",
        "dropout": None,
        "norms": ("norm_q", "norm_k"),
    }
    given |= {"sizes": (("inner_dim",), ("inner_kv_dim",)), "scale_of": _Scale(processors)}
    return AttentionFamily(f"diffusers.models.{path}", processors=processors, **(names | given | settings))


def _flux(path: str, cls: str, *processors: str, **form: Any) -> AttentionFamily:
    """A class that was copied from Flux's, with what it names otherwise."""
    given = {"rotary": "image_rotary_emb", **form}
    rows = dict.fromkeys(processors, _own((_TEXT,), **given))
    return _family(f"transformers.{path}.{cls}", rows, sibling="proj_out")


def _wan(path: str) -> AttentionFamily:
    return _family(
        f"transformers.{path}Attention",
        {f"{path.rpartition('.')[2]}AttnProcessor": _own(rotary="rotary_emb")},
        head_dim=None,
        sizes=(("inner_dim",), ("kv_inner_dim",)),
        refuse=_refuse_second_image,
    )


FAMILIES: tuple[AttentionFamily, ...] = (
    _family(
        "attention_processor.Attention",
        PROCESSORS,
        head_dim=None,
        refuse=_refuse,
        refuse_qk=_refuse_qk,
        sibling="proj_out",
    ),
    _flux("transformer_flux", "FluxAttention", "FluxAttnProcessor"),
    _flux("transformer_flux2", "Flux2Attention", "Flux2AttnProcessor"),
    _family(
        "transformers.transformer_flux2.Flux2ParallelSelfAttention",
        {"Flux2ParallelSelfAttnProcessor": _own(rotary="image_rotary_emb")},
        **dict.fromkeys(("query", "key", "value"), "to_qkv_mlp_proj"),
        output="to_out",
    ),
    _flux("transformer_flux3", "Flux3Attention", "Flux3AttnProcessor"),
    _flux("transformer_bria", "BriaAttention", "BriaAttnProcessor"),
    _flux("transformer_bria_fibo", "BriaFiboAttention", "BriaFiboAttnProcessor"),
    _flux("transformer_ovis_image", "OvisImageAttention", "OvisImageAttnProcessor"),
    _flux("transformer_longcat_image", "LongCatImageAttention", "LongCatImageAttnProcessor"),
    _family(
        "transformers.transformer_ltx.LTXAttention",
        {"LTXVideoAttnProcessor": _own(rotary="image_rotary_emb")},
        head_dim=None,
    ),
    _wan("transformer_wan.Wan"),
    _wan("transformer_chronoedit.Wan"),
    _wan("transformer_skyreels_v2.SkyReelsV2"),
)

# Gated ones have gate and value in one layer, twice as wide as the second takes: they keep their width.
MLPS: tuple[MLPFamily, ...] = (
    MLPFamily("diffusers.models.attention.FeedForward", first=("net.0.proj",), second="net.2"),
)

_joined = partial(MLPFamily, first=("linear_in",), second="linear_out")
_gated = partial(MLPFamily, first=("w1", "w3"), second="w2")

# Those that adapters put gains beside and that keep their width.
FEED_FORWARDS: tuple[MLPFamily, ...] = (
    MLPFamily("diffusers.models.attention.LuminaFeedForward", first=("linear_1", "linear_3"), second="linear_2"),
    *(
        build(f"diffusers.models.transformers.{path}")
        for build, paths in {
            _joined: ("transformer_flux2.Flux2FeedForward", "transformer_flux3.Flux3FeedForward"),
            _gated: (
                "transformer_z_image.FeedForward",
                "transformer_bria_fibo2.FeedForward",
                "transformer_hidream_image.HiDreamImageFeedForwardSwiGLU",
                "transformer_ideogram4.Ideogram4MLP",
            ),
            partial(MLPFamily, first=("linear_1", "linear_2"), second="out_projection"): (
                "auraflow_transformer_2d.AuraFlowFeedForward",
            ),
            partial(MLPFamily, first=("gate_up_proj",), second="down_proj"): (
                "transformer_omnigen.OmniGenFeedForward",
            ),
            partial(MLPFamily, first=("gate_proj", "up_proj"), second="linear_fc2"): (
                "transformer_ernie_image.ErnieImageFeedForward",
            ),
            partial(MLPFamily, first=("in_layer",), second="out_layer"): (
                "transformer_kandinsky.Kandinsky5FeedForward",
            ),
            partial(MLPFamily, first=("gate_layer", "proj"), second="out"): (
                "transformer_qwenimage21.QwenImage21SwiGLUFeedForward",
            ),
        }.items()
        for path in paths
    ),
)
