"""Customize adapters on Stable Diffusion 1.5 shapes: speed, memory and bytes, both sides in turns in one run.

The claims, at 64×64 latents:

- `attention`: a training step (forward and backward to the factors) of the attention modules is at least twice as fast
  as with the scores written out, and what it keeps for the backward pass is at most a third. Written out, as the
  original release does: `q k^T` and `t q' k'^T` as two score matrices, one softmax, two products with it.
- `inference`: a step of the whole UNet costs at most 15 % more with a full adapter than without, 5 % merged, and 1 %
  with a core adapter merged.
- `training`: a training step of the whole UNet is no slower than with a PEFT LoRA on to_q, to_k, to_v and to_out.0 of
  at least as many parameters.
- `bytes`: a full adapter of rank 1 takes at most 1.7 MB for SD 1.5 and a core adapter of rank 8 at most 100 KB, as
  float16 files. UNets are built from their configurations; SDXL's on the meta device.

Weights are random: neither times nor bytes depend on their values. Memory is counted, not sampled: the bytes of all
tensors that autograd keeps, each storage once, less parameters. On a GPU (`--device cuda`) what a step allocates there
at its peak is measured too, and `--graph` replays the inference as a CUDA graph as well, which leaves launching out.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _report
import torch
from _measuring import Kept, captured, interleave, peak_bytes, ratio, seconds_of
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

import comcat_hf
from comcat_hf import ComCATConfig
from comcat_hf.tuners import ComCATLayer


FASTER, SMALLER = 2.0, 1 / 3
OVERHEAD = {"full": 0.15, "full, merged": 0.05, "core, merged": 0.01}
BYTES = {("sd15", "full, rank 1"): 1_700_000, ("sd15", "core, rank 8"): 100_000}

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# For a dry run.
TINY = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
UNETS = {"sd15": SD15, "tiny": TINY}
# Tokens and width of SD 1.5's attention at 64×64 latents, and how many transformer blocks have it.
SHAPES = ((4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1))
HEADS, TEXT_TOKENS, TEXT_WIDTH = 8, 77, 768
LORA = ["to_q", "to_k", "to_v", "to_out.0"]


class WrittenOut(nn.Module):
    """The residual attention as the original release computes it, on the projections and factors of a ComCAT layer."""

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.dense, self.factors, self.scale = layer.base_layer, layer.comcat_factors["default"], scale

    def forward(self, states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        dense, factors = self.dense, self.factors
        other = states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            self._heads(dense.to_q(states)),
            self._heads(dense.to_k(other)),
            self._heads(dense.to_v(other)),
        )
        added_query, added_key = self._heads(factors.query(states)), self._heads(factors.key(other))
        scores = dense.scale * (query @ key.mT) + self.scale * dense.scale * (added_query @ added_key.mT)
        attention = scores.softmax(-1)
        output = dense.to_out[0](self._flat(attention @ value))
        return output + self.scale * factors.output(self._flat(attention @ self._heads(factors.value(other))))

    def _heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def _flat(self, states: Tensor) -> Tensor:
        return states.transpose(1, 2).flatten(2)


def attention(args: argparse.Namespace) -> dict[str, Any]:
    """Training steps of attention modules, fused against written out; the sums weigh shapes as the UNet has them."""
    rows = []
    for tokens, width, count in SHAPES:
        for cross in (False, True):
            torch.manual_seed(0)
            host = nn.ModuleDict(
                {"attn": Attention(width, TEXT_WIDTH if cross else None, heads=HEADS, dim_head=width // HEADS)}
            )
            config = ComCATConfig(mode="customize", qk_rank=args.rank, vo_rank=args.rank, init_weights=False)
            host = inject_adapter_in_model(config, host).to(args.device, args.dtype)
            fused = host["attn"]
            states = torch.randn(args.batch_size, tokens, width).to(args.device, args.dtype).requires_grad_()
            text = torch.randn(args.batch_size, TEXT_TOKENS, TEXT_WIDTH).to(args.device, args.dtype) if cross else None
            sides = {"fused": fused, "written out": WrittenOut(fused, 1.0)}
            kept = {}
            outputs = {}
            for name, side in sides.items():
                with Kept(host) as found:
                    outputs[name] = side(states, encoder_hidden_states=text)
                kept[name] = found.bytes
            difference = (outputs["fused"] - outputs["written out"]).abs().max().item()

            def step(side: nn.Module, states: Tensor = states, text: Tensor | None = text) -> None:
                side(states, encoder_hidden_states=text).sum().backward()

            calls = {name: lambda side=side: step(side) for name, side in sides.items()}
            rounds = interleave(calls, args)
            seconds = {name: seconds_of(rounds, name) for name in sides}
            kind = f"{tokens} tokens, {width} wide, {'cross' if cross else 'self'}"
            rows.append(
                {"shape": kind, "count": count, "seconds": seconds, "kept_bytes": kept, "difference": difference}
                | peaks(calls, args)
            )
            print(kind, f"{seconds['written out'] / seconds['fused']:.2f}x", flush=True)
    total = {
        key: {side: sum(row["count"] * row[key][side] for row in rows) for side in ("fused", "written out")}
        for key in ("seconds", "kept_bytes")
    }
    faster = total["seconds"]["written out"] / total["seconds"]["fused"]
    smaller = total["kept_bytes"]["fused"] / total["kept_bytes"]["written out"]
    _report.print_table(
        [
            [
                row["shape"],
                1000 * row["seconds"]["written out"],
                1000 * row["seconds"]["fused"],
                row["seconds"]["written out"] / row["seconds"]["fused"],
                row["kept_bytes"]["written out"] / 2**20,
                row["kept_bytes"]["fused"] / 2**20,
            ]
            for row in rows
        ],
        ["attention", "written out ms", "fused ms", "faster", "kept MiB written out", "kept MiB fused"],
    )
    holds = {f">= {FASTER} times faster": faster >= FASTER, "<= 1/3 of the memory": smaller <= SMALLER}
    print(f"All of the UNet's: {faster:.2f} times faster, {smaller:.3f} of the memory. {holds}\n")
    return {"rows": rows, "faster": faster, "memory_ratio": smaller, "holds": holds}


def inference(args: argparse.Namespace) -> dict[str, Any]:
    """One denoising step of the whole UNet: without an adapter, with one, and merged."""
    unet, inputs = build(args), unet_inputs(args)
    full = ComCATConfig(mode="customize", qk_rank=args.rank, vo_rank=args.rank, init_weights=False)
    core = ComCATConfig(mode="customize", qk_rank=8, vo_rank=8, core=True, init_weights=False)
    unet.add_adapter(full, adapter_name="full")
    unet.add_adapter(core, adapter_name="core")

    rows = []
    for way in ("launched", "graph") if args.graph else ("launched",):
        sides = {
            "base": Variant(unet, inputs, way),
            "full": Variant(unet, inputs, way, "full"),
            "core": Variant(unet, inputs, way, "core"),
            "full, merged": Variant(unet, inputs, way, "full", merged=True),
            "core, merged": Variant(unet, inputs, way, "core", merged=True),
        }
        rounds = interleave(sides, args)
        for name in sides:
            overhead = ratio(rounds, name, "base") - 1
            row = {"way": way, "side": name, "seconds": seconds_of(rounds, name), "overhead": overhead}
            rows.append(row | ({"holds": overhead <= OVERHEAD[name]} if name in OVERHEAD else {}))
    _report.print_table(
        [[row["way"], row["side"], row["seconds"], f"{row['overhead']:+.1%}", row.get("holds", "")] for row in rows],
        ["way", "inference", "seconds", "overhead", "holds"],
    )
    return {"rows": rows}


class Variant:
    """The UNet with one adapter or none, merged or not, launched kernel by kernel or as a graph."""

    def __init__(
        self, unet: nn.Module, inputs: Mapping[str, Tensor], way: str, name: str | None = None, merged: bool = False
    ) -> None:
        self._unet, self._inputs, self._way, self._name, self._merged = unet, inputs, way, name, merged

    def prepare(self) -> None:
        unet = self._unet
        # A graph holds on to the memory of what it computes with.
        self._call = None
        unet.unfuse_lora()
        unet.disable_adapters() if self._name is None else unet.enable_adapters()
        if self._name is not None:
            unet.set_adapter(self._name)
        if self._merged:
            unet.fuse_lora()
        # Weights that were just written are slower to read, once.
        self._run()
        with torch.inference_mode():
            self._call = self._run if self._way == "launched" else captured(self._run)

    def __call__(self) -> None:
        self._call()

    def _run(self) -> None:
        with torch.inference_mode():
            self._unet(**self._inputs)


def training(args: argparse.Namespace) -> dict[str, Any]:
    """One training step of the whole UNet: ComCAT against LoRA, with at least as many parameters on LoRA's side."""
    inputs = unet_inputs(args)
    sides, counts = {}, {}
    for name in ("comcat", "lora"):
        torch.manual_seed(0)
        unet = build(args).requires_grad_(False)
        if name == "comcat":
            unet.add_adapter(ComCATConfig(mode="customize", qk_rank=args.rank, vo_rank=args.rank))
        else:
            rank = 1
            while True:
                unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA))
                if trainable(unet) >= counts["comcat"]:
                    break
                unet.unload_lora()
                rank += 1
        counts[name] = trainable(unet)

        def step(unet: nn.Module = unet) -> None:
            unet(**inputs).sample.square().mean().backward()

        sides[name] = step
    rounds = interleave(sides, args)
    beside_lora = ratio(rounds, "comcat", "lora")
    seconds = {name: seconds_of(rounds, name) for name in sides}
    _report.print_table(
        [[name, counts[name], seconds[name]] for name in sides], ["training step", "parameters", "seconds"]
    )
    holds = beside_lora <= 1
    print(f"ComCAT / LoRA: {beside_lora:.3f} (LoRA rank {rank}); no slower: {holds}\n")
    found = {"parameters": counts, "seconds": seconds, "ratio": beside_lora, "lora_rank": rank, "holds": holds}
    return found | peaks(sides, args)


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes on disk by method, in float16."""
    adapters: Mapping[str, Any] = {
        "core, rank 8": ComCATConfig(mode="customize", qk_rank=8, vo_rank=8, core=True),
        "full, rank 1": ComCATConfig(mode="customize", qk_rank=1, vo_rank=1),
        "full, rank 2": ComCATConfig(mode="customize", qk_rank=2, vo_rank=2),
        "LoRA, rank 4": LoraConfig(r=4, target_modules=LORA),
        "LoRA, rank 8": LoraConfig(r=8, target_modules=LORA),
    }
    rows = []
    for model, config in {"sd15": SD15, "sdxl": SDXL}.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        whole = sum(parameter.numel() for parameter in unet.parameters())
        for name, adapter in adapters.items():
            inject_adapter_in_model(adapter, unet, low_cpu_mem_usage=True)
            for module in unet.modules():
                if isinstance(module, (ComCATLayer, LoraLayer)):
                    for child_name in module.adapter_layer_names:
                        getattr(module, child_name).to_empty(device="cpu").to(torch.float16)
            with tempfile.TemporaryDirectory() as folder:
                if isinstance(adapter, ComCATConfig):
                    comcat_hf.save_comcat_weights({"unet": unet}, folder)
                    file = Path(folder) / "unet" / "adapter_model.safetensors"
                else:
                    file = Path(folder) / "adapter_model.safetensors"
                    save_file(get_peft_model_state_dict(unet, save_embedding_layers=False), file)
                taken = file.stat().st_size
            allowed = BYTES.get((model, name))
            rows.append(
                {
                    "model": model,
                    "adapter": name,
                    "bytes": taken,
                    "holds": None if allowed is None else taken <= allowed,
                }
            )
            unet.unload_lora()
        rows.append({"model": model, "adapter": "full fine-tuning", "bytes": 2 * whole, "holds": None})
    _report.print_table(
        [
            [row["model"], row["adapter"], f"{row['bytes'] / 1e3:,.0f}", "" if row["holds"] is None else row["holds"]]
            for row in rows
        ],
        ["UNet", "adapter", "kB (float16)", "holds"],
    )
    return {"rows": rows}


def build(args: argparse.Namespace) -> UNet2DConditionModel:
    torch.manual_seed(0)
    with torch.device(args.device):
        return UNet2DConditionModel(**UNETS[args.unet]).to(args.dtype).eval()


def unet_inputs(args: argparse.Namespace) -> dict[str, Tensor]:
    torch.manual_seed(1)
    side = UNETS[args.unet]["sample_size"]
    return {
        "sample": torch.randn(args.batch_size, 4, side, side).to(args.device, args.dtype),
        "timestep": torch.full((args.batch_size,), 500, device=args.device),
        "encoder_hidden_states": torch.randn(args.batch_size, TEXT_TOKENS, TEXT_WIDTH).to(args.device, args.dtype),
    }


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def peaks(sides: Mapping[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """What each side allocates on a GPU at its peak; nothing on a CPU."""
    if torch.device(args.device).type != "cuda":
        return {}
    return {"peak_bytes": {name: peak_bytes(side) for name, side in sides.items()}}


PARTS = {"attention": attention, "inference": inference, "training": training, "bytes": sizes}


def main() -> None:
    shared = {"device": "cpu", "dtype": torch.float32, "threads": 2, "batch_size": 1}
    parser = _report.parser(__doc__, **shared, warmup=1, repeats=5, runs=1)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--unet", choices=UNETS, default="sd15", help="of inference and training")
    parser.add_argument("--rank", type=int, default=2, help="of full adapters, per head")
    parser.add_argument("--graph", action="store_true", help="inference as CUDA graphs, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _report.write(args, {name: PARTS[name](args) for name in args.parts}, hidden=("parts",))


if __name__ == "__main__":
    main()
