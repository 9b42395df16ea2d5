"""Enter PEFT's comparison of image generation (`method_comparison/image-gen`) with core adapters of FLUX.2-klein.

    python benchmarks/peft_image_gen/run.py PEFT_CHECKOUT                # a GPU of 16 GB, the weights, a main checkout
    python benchmarks/peft_image_gen/run.py --rehearse                   # a tiny random FLUX.2 on the CPU

The first copies `experiments/comcat/*` into the checkout and runs PEFT's own script for each, with comcat_hf imported.
Base, data, steps, rate and judge (similarity of DINOv2 features, drift) are those of the script; its results lie under
`method_comparison/image-gen/results` of the checkout. The second does the steps of the protocol that an adapter must
stand: gradient checkpointing before wrapping, float32 factors on a bfloat16 base, AdamW, `disable_adapter`, a saved
file that loads again.
"""

import argparse
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch.nn import functional as F

import comcat_hf  # noqa: F401


EXPERIMENTS = Path(__file__).parent / "experiments" / "comcat"
RATE, CLIP = 1e-4, 1.0


def main() -> None:
    """Run the comparison in a checkout of PEFT, or the rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, help="checkout of huggingface/peft")
    parser.add_argument("--rehearse", action="store_true", help="try the protocol on a tiny random model")
    parser.add_argument("--steps", type=int, default=20, help="of the rehearsal")
    given = parser.parse_args()
    if given.rehearse == (given.checkout is not None):
        parser.error("give a checkout of PEFT, or --rehearse")
    if not given.rehearse and not (given.checkout / "method_comparison" / "image-gen" / "run.py").is_file():
        parser.error(f"{given.checkout}: expected a checkout of huggingface/peft with method_comparison/image-gen")
    for experiment in sorted(EXPERIMENTS.iterdir()):
        if given.rehearse:
            found = rehearse(experiment, given.steps)
            print(f"{experiment.name}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
        else:
            compare(given.checkout / "method_comparison" / "image-gen", experiment)


def compare(folder: Path, experiment: Path) -> None:
    """Run one experiment by the script of a checkout."""
    target = folder / "experiments" / "comcat" / experiment.name
    shutil.copytree(experiment, target, dirs_exist_ok=True)
    before = sys.argv, Path.cwd()
    sys.argv = ["run.py", "-v", str(target.relative_to(folder))]
    sys.path.insert(0, str(folder))
    try:
        os.chdir(folder)
        runpy.run_path(str(folder / "run.py"), run_name="__main__")
    finally:
        sys.argv, place = before
        os.chdir(place)
        sys.path.remove(str(folder))


def rehearse(experiment: Path, steps: int) -> Mapping[str, Any]:
    """Train an adapter of a tiny random FLUX.2 as the script does; returns its sizes and what became of the loss."""
    torch.manual_seed(0)
    base = _tiny().to(torch.bfloat16)
    base.enable_gradient_checkpointing()
    model = get_peft_model(base, PeftConfig.from_pretrained(experiment), autocast_adapter_dtype=True).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    inputs, target = _batch()
    with torch.no_grad(), model.disable_adapter():
        dense = model(**inputs)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(**inputs)[0].float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        adapted = model(**inputs)[0]
        model.save_pretrained(folder)
        size = Path(folder, "adapter_model.safetensors").stat().st_size
        again = PeftModel.from_pretrained(_tiny().to(torch.bfloat16), folder).eval()
        assert torch.equal(again(**inputs)[0], adapted), "the saved adapter draws something else"
        with model.disable_adapter():
            assert torch.equal(model(**inputs)[0], dense), "the base changed"
    assert not torch.equal(adapted, dense), "the adapter did nothing"
    count = sum(p.numel() for p in trained.values())
    return {"parameters": count, "bytes": size, "first loss": round(losses[0], 6), "last loss": round(losses[-1], 6)}


def _tiny() -> Any:
    draws = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    torch.random.set_rng_state(draws)
    return model


def _batch() -> tuple[dict[str, Any], torch.Tensor]:
    side, words = 4, 6
    places = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1))
    texts = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(words))
    inputs = {
        "hidden_states": torch.randn(2, side * side, 16, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(2, words, 24, dtype=torch.bfloat16),
        "timestep": torch.tensor([0.3, 0.7], dtype=torch.bfloat16),
        "guidance": None,
        "img_ids": places.expand(2, -1, -1),
        "txt_ids": texts.expand(2, -1, -1),
        "return_dict": False,
    }
    return inputs, torch.randn(2, side * side, 16)


if __name__ == "__main__":
    main()
