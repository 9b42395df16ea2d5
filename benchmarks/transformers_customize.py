"""Customize adapters on diffusion transformers: time of a FLUX.1 double block, and sizes for real configurations.

The claims, for heads of 64 and of 128 columns, 1,024 tokens of image and 128 of text, at equal numbers of parameters:

- `block`: a forward and backward pass with a full adapter takes at most 1.15 times that with a PEFT LoRA on the same
  projections; a forward pass at most 1.15 times that of the base, 1.08 merged, and 1.01 with a core adapter merged.
- `sizes`: the numbers that adapters train in models of real sizes, built from their configurations on the meta device,
  beside PEFT's LoRA, LoKr and PSOFT on the same projections. Nothing is claimed; the table is for choosing.

Times are those that the process has of its processor, and not the clock's, since machines are shared. All sides take
turns in one run; a side's time in a round is its fastest of three, and a ratio is the median over rounds.
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import _report
import diffusers
import torch
from _measuring import interleave, ratio, seconds_of
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from peft import LoKrConfig, LoraConfig, PsoftConfig, inject_adapter_in_model
from torch import Tensor, nn

from comcat_hf import ComCATConfig
from comcat_hf.modeling import attention_views
from comcat_hf.tuners import ComCATLayer


ALLOWED = {"full": 1.15, "full, merged": 1.08, "core, merged": 1.01, "full, training": 1.15}
PROJECTIONS = [f"to_{name}" for name in ("q", "k", "v", "out.0", "add_out")] + [f"add_{n}_proj" for n in "qkv"]
# What models of diffusers differ in from the defaults of their classes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD3-medium": ("SD3Transformer2DModel", {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 192}),
    "SD3.5-large": (
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192, "qk_norm": "rms_norm"},
    ),
    "FLUX.1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2-klein 4B": (
        "Flux2Transformer2DModel",
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
    "FLUX.2": ("Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "AuraFlow": ("AuraFlowTransformer2DModel", {}),
    "Sana 1.6B": ("SanaTransformer2DModel", {}),
    "PixArt": ("PixArtTransformer2DModel", {"caption_channels": 4096}),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
    "CogView4": ("CogView4Transformer2DModel", {"attention_head_dim": 128, "num_attention_heads": 32}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "LTX-Video": ("LTXVideoTransformer3DModel", {}),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "Wan 2.1 14B": ("WanTransformer3DModel", {}),
}


def block(args: argparse.Namespace) -> dict[str, Any]:
    """A FLUX.1 double block with full factors, with cores, with a LoRA, and with nothing."""
    rows = []
    for width in (64, 128):
        sides, counts = block_sides(width, args)
        clock = time.process_time if torch.device(args.device).type == "cpu" else time.perf_counter
        rounds = interleave(sides, args, clock)
        for name in sides:
            beside = "lora, training" if "training" in name else "base"
            row = {"width": width, "side": name, "parameters": counts.get(name.partition(",")[0])}
            row |= {"seconds": seconds_of(rounds, name), "beside": beside, "ratio": ratio(rounds, name, beside)}
            if name in ALLOWED:
                row |= {"allowed": ALLOWED[name], "holds": row["ratio"] <= ALLOWED[name]}
            rows.append(row)
    _report.print_table(
        [[r["width"], r["side"], r["parameters"] or "", r["seconds"], r["ratio"], r.get("holds", "")] for r in rows],
        ["head", "side", "parameters", "seconds", "ratio", "holds"],
    )
    return {"rows": rows}


def block_sides(width: int, args: argparse.Namespace) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """What to call by side, and the numbers that each adapter trains."""
    dim, image, text = args.dim, args.image_tokens, args.text_tokens
    heads = dim // width
    torch.manual_seed(0)
    with torch.device(args.device):
        base = FluxTransformerBlock(dim, heads, width).requires_grad_(False).to(args.dtype)
    inputs = {
        "hidden_states": torch.randn(1, image, dim),
        "encoder_hidden_states": torch.randn(1, text, dim),
        "temb": torch.randn(1, dim),
    }
    inputs = {name: tensor.to(args.device, args.dtype) for name, tensor in inputs.items()}
    tables = get_1d_rotary_pos_embed(width, torch.arange(image + text), use_real=True, repeat_interleave_real=True)
    inputs["image_rotary_emb"] = tuple(table.to(args.device) for table in tables)
    full = ComCATConfig(mode="customize", qk_rank=args.rank, vo_rank=args.rank, init_weights=False)
    core = ComCATConfig(mode="customize", vo_rank=8, core=True, init_weights=False)
    # Per stream four projections: LoRA trains 8 d R numbers in them, full factors 4 d H r.
    lora = LoraConfig(r=heads * args.rank // 2, target_modules=PROJECTIONS, init_lora_weights=False)
    made = {
        name: inject_adapter_in_model(config, copy.deepcopy(base)).to(args.device, args.dtype)
        for name, config in {"full": full, "core": core, "lora": lora}.items()
    }
    counts = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in made.items()}
    merged = {name: copy.deepcopy(made[name]) for name in ("full", "core")}
    for model in merged.values():
        for layer in model.modules():
            if isinstance(layer, ComCATLayer):
                layer.merge()
    # A copy of the base says how far apart equal work is measured.
    models = {
        "base": base,
        "base, copied": copy.deepcopy(base),
        **made,
        **{f"{name}, merged": model for name, model in merged.items()},
    }
    sides = {name: lambda model=model: infer(model, inputs) for name, model in models.items()}
    sides |= {f"{name}, training": lambda model=made[name]: train(model, inputs) for name in ("full", "lora")}
    return sides, counts


@torch.no_grad()
def infer(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    model(**inputs)


def train(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    # As in the middle of a model: what enters needs gradients too.
    states = {name: value.requires_grad_() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    sum(part.sum() for part in model(**states)).backward()


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers that adapters of several methods train in models of real sizes."""
    rows = []
    for name, (cls, settings) in MODELS.items():
        with torch.device("meta"):
            model = getattr(diffusers, cls)(**settings)
        views = attention_views(model, whole=False, refuse=lambda path: False)
        targets = sorted({path for view in views.values() for path in view.projections()})
        # Linear attention has no scores.
        linear = {path: {"vo": 1} for path, view in views.items() if view.form.refuse_qk is not None}
        adapters = {
            "core 8": ComCATConfig(mode="customize", vo_rank=8, core=True),
            "core 12": ComCATConfig(mode="customize", vo_rank=12, core=True),
            "full 1": ComCATConfig(mode="customize", qk_rank=1, vo_rank=1, rank_pattern=linear),
            "LoRA 4": LoraConfig(r=4, target_modules=targets),
            "LoRA 16": LoraConfig(r=16, target_modules=targets),
            "LoKr 8": LoKrConfig(r=8, alpha=8, target_modules=targets),
            "PSOFT 32": PsoftConfig(r=32, target_modules=targets),
        }
        found = {adapter: trained(model, config) for adapter, config in adapters.items()}
        rows.append({"model": name, "attention modules": len(views), **found})
    _report.print_table(
        [[row["model"], *(f"{value / 1e6:.2f}" for value in list(row.values())[2:])] for row in rows],
        ["millions trained in", *list(rows[0])[2:]],
    )
    return {"rows": rows}


def trained(model: nn.Module, config: Any) -> int:
    """How many numbers an adapter trains in a copy of a model without weights."""
    adapted = inject_adapter_in_model(config, copy.deepcopy(model), low_cpu_mem_usage=True)
    return sum(p.numel() for name, p in adapted.named_parameters() if p.requires_grad)


PARTS = {"block": block, "sizes": sizes}


def main() -> None:
    shared = {"device": "cpu", "dtype": torch.float32, "threads": 1, "warmup": 1, "repeats": 7, "runs": 3}
    parser = _report.parser(__doc__, **shared)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rank", type=int, default=4, help="of full adapters, per head")
    parser.add_argument("--dim", type=int, default=768, help="of the block; FLUX.1 has 3072")
    parser.add_argument("--image-tokens", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _report.write(args, {name: PARTS[name](args) for name in args.parts}, hidden=("parts",))


if __name__ == "__main__":
    main()
