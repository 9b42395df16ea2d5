"""What adapters of diffusion transformers learn: a small SD3 and a small FLUX.2 are taught the digit that they lack.

The demo of customizing with a rectified-flow transformer in place of the UNet. A base is trained from scratch on
scikit-learn's digits without the four; adapters of comparable size then learn it from 16 images under a new name,
beside images that the base drew of the old digits. A classifier that saw other images reads what is drawn. Each method
takes the best of three learning rates on a validation seed; the shares of right digits, new and old, are means over
further seeds, bases included, with their standard errors. Nothing is claimed; whatever comes out is reported.

    python benchmarks/transformers_digits.py --seeds 5
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _report
import diffusers
import torch
from peft import LoKrConfig, LoraConfig, OFTConfig
from torch import Tensor, nn
from torch.nn import functional as F

from comcat_hf import ComCATConfig
from comcat_hf.demos.compress import load_digits
from comcat_hf.demos.customize.base import (
    HELD_OUT,
    NEW,
    OLD,
    WIDTH,
    build_pipeline,
    embed,
    encode,
    old_digits,
    train_vae,
    upsample,
)
from comcat_hf.demos.customize.judge import Judge, train_judge


HEADS, HEAD = 4, 16
BATCH, BASE_RATE, DROPPED = 64, 2e-3, 0.1
IMAGES, PRIOR = 16, 8
SAMPLES, CAPTION_SAMPLES, SAMPLING_STEPS, GUIDANCE = 100, 10, 20, 2.0
_OLD_DIGITS = tuple(digit for digit in range(10) if digit != HELD_OUT)


class SD3(nn.Module):
    """A small SD3: velocities of latents `(n, 4, 4, 4)` at times 0 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.model = diffusers.SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            joint_attention_dim=WIDTH,
            caption_projection_dim=HEADS * HEAD,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=4,
        )

    def forward(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        pooled = text.mean(dim=1)
        return self.model(noisy, text, pooled, times * 1000, return_dict=False)[0]


class Flux2(nn.Module):
    """A small FLUX.2, double and single blocks; arguments as of [`SD3`]."""

    def __init__(self) -> None:
        super().__init__()
        self.model = diffusers.Flux2Transformer2DModel(
            in_channels=4,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD,
            joint_attention_dim=WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )

    def forward(self, noisy: Tensor, times: Tensor, text: Tensor) -> Tensor:
        side, words, one = noisy.shape[-1], text.shape[1], torch.arange(1)
        places = torch.cartesian_prod(one, torch.arange(side), torch.arange(side), one)
        tokens = torch.cartesian_prod(one, one, one, torch.arange(words))
        found = self.model(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=times,
            img_ids=places.expand(len(noisy), -1, -1),
            txt_ids=tokens.expand(len(noisy), -1, -1),
            return_dict=False,
        )[0]
        return found.transpose(1, 2).unflatten(2, (side, side))


MODELS: Mapping[str, Callable[[], nn.Module]] = {"SD3": SD3, "FLUX.2": Flux2}


def _projections(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".attn." in name]


def _customize(**ranks: Any) -> Callable[[nn.Module], Any]:
    return lambda model: ComCATConfig(mode="customize", **ranks)


# By name: what is attached, and the rates that are tried.
METHODS: Mapping[str, tuple[Callable[[nn.Module], Any], tuple[float, ...]]] = {
    "ComCAT, full 1": (_customize(qk_rank=1, vo_rank=1), (1e-2, 3e-2, 1e-1)),
    "ComCAT, core 8": (_customize(qk_rank=8, vo_rank=8, core=True), (3e-2, 1e-1, 3e-1)),
    "LoRA 1": (lambda m: LoraConfig(r=1, lora_alpha=1, target_modules=_projections(m)), (3e-3, 1e-2, 3e-2)),
    "LoKr": (lambda m: LoKrConfig(r=4, alpha=4, target_modules=_projections(m)), (3e-3, 1e-2, 3e-2)),
    "OFT": (lambda m: OFTConfig(oft_block_size=8, target_modules=_projections(m)), (3e-3, 1e-2, 3e-2)),
}


class Studio:
    """A base that was trained with one seed, and what it is taught and judged with."""

    def __init__(self, kind: str, seed: int, data: Any, judge: Judge, steps: Mapping[str, int]) -> None:
        torch.manual_seed(seed)
        self.judge, self.seed, self.steps = judge, seed, steps
        self.pipeline = build_pipeline()
        images, captions = old_digits(data)
        train_vae(self.pipeline.vae, images, steps["vae"], _plain)
        self.base = MODELS[kind]()
        self._train_base(encode(self.pipeline, images), captions)
        with torch.no_grad():
            self.told = embed(self.pipeline, [*OLD, NEW, ""])
        self.lesson = encode(self.pipeline, upsample(data.train_images[data.train_labels == HELD_OUT][:IMAGES]))
        self.prior_told = [i for i in range(len(OLD)) for _ in range(PRIOR)]
        self.prior = self.draw(self.base, self.prior_told, 3)

    def _train_base(self, latents: Tensor, captions: Tensor) -> None:
        parts = nn.ModuleList([self.base, self.pipeline.text_encoder]).train()
        optimizer = torch.optim.AdamW(parts.parameters(), lr=BASE_RATE, weight_decay=1e-4, fused=True)
        steps = self.steps["base"]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, BASE_RATE, total_steps=steps, pct_start=0.1)
        mean = diffusers.training_utils.EMAModel(parts.parameters(), decay=0.995)
        for _ in range(steps):
            picks = torch.randint(len(latents), (BATCH,))
            told = captions[picks].where(torch.rand(BATCH) >= DROPPED, len(OLD))
            text = embed(self.pipeline, [*OLD, ""])[told]
            loss = _loss(self.base, latents[picks], text, torch.randn_like(latents[picks]), torch.rand(BATCH))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean.step(parts.parameters())
        mean.copy_to(parts.parameters())
        parts.eval().requires_grad_(False)

    def teach(self, name: str, rate: float) -> tuple[nn.Module, int, float]:
        """An adapted copy of the base after its lesson, its trained parameters, and milliseconds per step."""
        torch.manual_seed(self.seed)
        taught = copy.deepcopy(self.base)
        taught.model.add_adapter(METHODS[name][0](taught.model), adapter_name="digit")
        trained = [p for p in taught.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps["adapter"])
        drawn, started = torch.Generator().manual_seed(self.seed), time.process_time()
        taught.train()
        for _ in range(self.steps["adapter"]):
            old = torch.randperm(len(self.prior), generator=drawn)[:IMAGES]
            clean = torch.cat([self.lesson, self.prior[old]])
            told = self.told[[len(OLD)] * IMAGES + [self.prior_told[i] for i in old.tolist()]]
            noise = torch.randn(clean.shape, generator=drawn)
            loss = _loss(taught, clean, told, noise, torch.rand(len(clean), generator=drawn))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        spent = 1000 * (time.process_time() - started) / self.steps["adapter"]
        return taught.eval(), sum(p.numel() for p in trained), spent

    @torch.no_grad()
    def draw(self, model: nn.Module, captions: list[int], purpose: int) -> Tensor:
        """Latents of captions by Euler's method with guidance; the same noise for every method."""
        told = self.told[captions]
        none = self.told[-1:].expand_as(told)
        latents = torch.randn(len(captions), 4, 4, 4, generator=torch.Generator().manual_seed(8 * self.seed + purpose))
        for step in range(SAMPLING_STEPS):
            times = torch.full((2 * len(captions),), 1 - step / SAMPLING_STEPS)
            found, free = model(torch.cat([latents, latents]), times, torch.cat([told, none])).chunk(2)
            latents = latents - (free + GUIDANCE * (found - free)) / SAMPLING_STEPS
        return latents

    def judged(self, model: nn.Module, purpose: int) -> tuple[float, float]:
        """Shares of new and of old digits that the judge reads as meant."""
        captions = [len(OLD)] * SAMPLES + [i for i in range(len(OLD)) for _ in range(CAPTION_SAMPLES)]
        wanted = [HELD_OUT] * SAMPLES + [digit for digit in _OLD_DIGITS for _ in range(CAPTION_SAMPLES)]
        vae = self.pipeline.vae
        with torch.no_grad():
            images = vae.decode(self.draw(model, captions, purpose) / vae.config.scaling_factor).sample
        right = (self.judge.read(images.clamp(-1, 1)) == torch.tensor(wanted)).float()
        return right[:SAMPLES].mean().item(), right[SAMPLES:].mean().item()


def _loss(model: nn.Module, clean: Tensor, text: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    share = times.view(-1, 1, 1, 1)
    return F.mse_loss(model((1 - share) * clean + share * noise, times, text), noise - clean)


def _plain(total: int, name: str) -> Any:
    return iter(range(total))


def compare(kind: str, seeds: int, steps: Mapping[str, int], data: Any, judge: Judge) -> list[dict[str, Any]]:
    """The table of one model."""
    first = Studio(kind, 100, data, judge, steps)
    rates = {}
    for name, (_, tried) in METHODS.items():
        scores = {rate: sum(first.judged(first.teach(name, rate)[0], 1)) for rate in tried}
        rates[name] = max(scores, key=scores.get)
        print(
            f"{kind}, {name}: " + ", ".join(f"{rate:g} {score / 2:.3f}" for rate, score in scores.items()), flush=True
        )
    found: dict[str, list[tuple[float, ...]]] = {"base": [], **{name: [] for name in METHODS}}
    for seed in range(seeds):
        studio = Studio(kind, seed, data, judge, steps)
        found["base"].append((*studio.judged(studio.base, 2), 0, 0.0))
        for name, rate in rates.items():
            taught, count, spent = studio.teach(name, rate)
            found[name].append((*studio.judged(taught, 2), count, spent))
            print(
                f"{kind}, seed {seed}, {name}: new {found[name][-1][0]:.3f}, old {found[name][-1][1]:.3f}", flush=True
            )
    return [_row(kind, name, rates.get(name), runs) for name, runs in found.items()]


def _row(kind: str, name: str, rate: float | None, runs: list[tuple[float, ...]]) -> dict[str, Any]:
    def of(place: int) -> tuple[float, float]:
        values = [run[place] for run in runs]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return statistics.mean(values), error

    (new, new_error), (old, old_error) = of(0), of(1)
    shares = {"new": new, "new_error": new_error, "old": old, "old_error": old_error}
    spent = statistics.median(run[3] for run in runs)
    return {"model": kind, "method": name, "parameters": int(runs[0][2]), "rate": rate, **shares, "ms_per_step": spent}


def main() -> None:
    """Run the comparison, print its table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--base_steps", type=int, default=600)
    parser.add_argument("--adapter_steps", type=int, default=40)
    parser.add_argument("--vae_steps", type=int, default=400)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = load_digits()
    judge = train_judge(data, 40, _plain)
    steps = {"base": given.base_steps, "adapter": given.adapter_steps, "vae": given.vae_steps}
    rows = [row for kind in given.models for row in compare(kind, given.seeds, steps, data, judge)]
    head = ["model", "method", "parameters", "new digit right", "old digits right", "rate", "ms per step"]
    _report.print_table([_line(row) for row in rows], head)
    if given.json:
        ran = {"seeds": given.seeds, "steps": steps, "judge": judge.accuracy, "environment": _report.environment()}
        _report.write_json(given.json, {"rows": rows, **ran})


def _line(row: Mapping[str, Any]) -> list[object]:
    shares = [f"{row[name]:.3f} ± {row[f'{name}_error']:.3f}" for name in ("new", "old")]
    rate = "" if row["rate"] is None else f"{row['rate']:g}"
    return [row["model"], row["method"], f"{row['parameters']:,}", *shares, rate, f"{row['ms_per_step']:.0f}"]


if __name__ == "__main__":
    main()
