"""The attention classes of diffusers that we know, the processors that compute plain attention, and refusals."""

from torch import nn

from ...errors import UnsupportedModuleError
from ..families import AttentionFamily


# Processors that compute plain attention on to_q, to_k, to_v and to_out. These give their kernel the module's scale;
_BY_SCALE = frozenset({"AttnProcessor", "SlicedAttnProcessor", "XFormersAttnProcessor"})
# and with these it takes the root of the width of the heads.
_BY_WIDTH = frozenset({"AttnProcessor2_0", "FusedAttnProcessor2_0", "AttnProcessorNPU", "XLAFlashAttnProcessor2_0"})


def _refuse(module: nn.Module) -> str | None:
    if module.added_kv_proj_dim is not None:
        return "it attends to two inputs with projections of their own (added_kv_proj_dim)"
    if module.to_k is None or module.to_out is None:
        return "it has no key, value or output projection of its own"
    if module.inner_kv_dim != module.inner_dim:
        return "its keys and values have fewer heads than its queries"
    return None


def _refuse_qk(module: nn.Module) -> str | None:
    if module.norm_q is not None or module.norm_k is not None:
        return "it normalises queries and keys after their projections (qk_norm)"
    return None


def _scale(module: nn.Module) -> float:
    name = type(module.processor).__name__
    if name in _BY_SCALE:
        return module.scale
    if name in _BY_WIDTH:
        return (module.to_q.out_features // module.heads) ** -0.5
    known = ", ".join(sorted(_BY_SCALE | _BY_WIDTH))
    raise UnsupportedModuleError(
        f"The attention processor {name} does not compute plain attention, so neither ComCAT adapters nor compressed "
        f"attention can run with it. Expected one of {known}: call set_default_attn_processor() on the model (for "
        "IP-Adapters unload_ip_adapter() on the pipeline), or take the adapter away."
    )


FAMILIES: tuple[AttentionFamily, ...] = (
    AttentionFamily(
        "diffusers.models.attention_processor.Attention",
        query="to_q",
        key="to_k",
        value="to_v",
        output="to_out.0",
        num_heads="heads",
        head_dim=None,
        scaling="scale",
        dropout=None,
        refuse=_refuse,
        refuse_qk=_refuse_qk,
        scale_of=_scale,
    ),
)

_JOINT = "it attends to text and image in one sequence and rotates queries and keys by their positions"

REFUSED: tuple[tuple[str, str], ...] = (
    ("diffusers.models.transformers.transformer_flux.FluxAttention", _JOINT),
    ("diffusers.models.transformers.transformer_flux2.Flux2Attention", _JOINT),
    ("diffusers.models.transformers.transformer_wan.WanAttention", "it rotates queries and keys by their positions"),
)
