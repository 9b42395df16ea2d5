"""Adapters of pipelines with a diffusion transformer and two or three text encoders, one of them a T5."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from comcat_hf import (
    ComCATConfig,
    export_pipeline,
    load_comcat_weights,
    save_comcat_weights,
    unload_comcat_weights,
)
from comcat_hf.errors import CheckpointError, InvalidValueError, UnsupportedModuleError
from tests.customization.flow_pipelines import tiny_flux, tiny_sd3


FULL = {"qk_rank": 2, "vo_rank": 1}
CORE = {"vo_rank": 2, "core": True}
PARTS = {
    "sd3": ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
    "flux": ("transformer", "text_encoder", "text_encoder_2"),
}
every_pipeline = pytest.mark.parametrize("kind", PARTS)
every_kind = pytest.mark.parametrize("adapter", [FULL, CORE], ids=["full", "core"])
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    made = {"sd3": tiny_sd3, "flux": tiny_flux}
    return {kind: make(tmp_path_factory.mktemp(kind) / "base") for kind, make in made.items()}


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def draw(pipe: DiffusionPipeline) -> Tensor:
    return pipe(
        "a cat",
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        height=16,
        width=16,
        max_sequence_length=8,
        output_type="latent",
    ).images


def adapt(pipe: DiffusionPipeline, parts: tuple[str, ...], adapter: dict, name: str = "dog", seed: int = 3) -> None:
    torch.manual_seed(seed)
    for part in parts:
        settings = ComCATConfig(mode="customize", init_weights=False, **adapter)
        getattr(pipe, part).add_adapter(settings, adapter_name=name)


@every_kind
@every_pipeline
def test_saved_loaded_swapped_and_unloaded(bases, kind, adapter, tmp_path):
    pipe = load(bases[kind])
    base = draw(pipe)
    adapt(pipe, PARTS[kind], adapter)
    expected = draw(pipe)
    assert not torch.equal(expected, base)
    save_comcat_weights(pipe, tmp_path / "dog", "dog")
    assert {path.parent.name for path in (tmp_path / "dog").rglob("*.safetensors")} == set(PARTS[kind])
    if "core" not in adapter:
        # The factors of the first stream lie under the names that those of a UNet have.
        names = load_file(tmp_path / "dog" / "transformer" / "adapter_model.safetensors")
        stem = "transformer_blocks.0.attn.comcat_factors."
        assert {f"{stem}query.weight", f"{stem}further.0.query.weight"} <= names.keys()

    other = load(bases[kind])
    load_comcat_weights(other, tmp_path / "dog", "dog")
    assert torch.equal(draw(other), expected)
    second = load(bases[kind])
    adapt(second, PARTS[kind], {**adapter, "scale": 0.4}, seed=5)
    swapped = draw(second)
    save_comcat_weights(second, tmp_path / "cat", "dog")
    load_comcat_weights(other, tmp_path / "cat", "dog", hotswap=True)
    assert torch.allclose(draw(other), swapped, atol=1e-6) and not torch.equal(swapped, expected)
    load_comcat_weights(other, tmp_path / "dog", "first")
    other.transformer.set_adapters(["dog", "first"], [1.0, 0.5])
    assert not torch.equal(draw(other), swapped)
    unload_comcat_weights(other)
    assert torch.equal(draw(other), base)
    for folder in bases.values():
        if folder != bases[kind]:
            with pytest.raises((CheckpointError, InvalidValueError), match=r"text_encoder_3|other attention modules"):
                load_comcat_weights(load(folder), tmp_path / "dog")


@every_pipeline
def test_exported(bases, kind, tmp_path):
    pipe = load(bases[kind])
    adapt(pipe, PARTS[kind], CORE)
    expected = draw(pipe)
    lost = export_pipeline(pipe, tmp_path / "plain")
    assert all(shares == {"qk": 0.0, "vo": 0.0} for shares in lost.values())
    assert torch.allclose(draw(load(tmp_path / "plain")), expected, atol=1e-5)
    assert torch.equal(draw(pipe), expected)

    full = load(bases[kind])
    adapt(full, ("transformer",), FULL)
    expected = draw(full)
    for truncate in (False, True):
        with pytest.raises(UnsupportedModuleError, match=r"stand norms, rotations, biases or.*core=True"):
            export_pipeline(full, tmp_path / "full", truncate=truncate)
    full.fuse_lora()
    assert torch.allclose(draw(full), expected, atol=1e-5)
    full.unload_lora_weights()
    assert torch.allclose(draw(full), expected, atol=1e-5)
    with pytest.raises(InvalidValueError, match=r"widened by full factors.*save_comcat_weights"):
        full.transformer.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()
