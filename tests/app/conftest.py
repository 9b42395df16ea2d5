"""A tiny pipeline with adapters and a tiny classifier with a compressed copy, as folders."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCardData
from PIL import Image
from transformers import AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import comcat_hf
from comcat_hf import ComCATConfig
from tests.customization.pipelines import tiny_sd
from tests.helpers import small_vit


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A Stable Diffusion for images of 16 × 16."""
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture(scope="session")
def adapters(base, tmp_path_factory) -> dict[str, Path]:
    """Two ComCAT adapters of the base, the second also of its text encoder."""
    found = {}
    for seed, (name, parts) in enumerate({"dog": ("unet",), "style": ("unet", "text_encoder")}.items()):
        pipe = DiffusionPipeline.from_pretrained(base)
        torch.manual_seed(seed)
        for part in parts:
            config = ComCATConfig(mode="customize", qk_rank=2, vo_rank=2, init_weights=False)
            getattr(pipe, part).add_adapter(config, adapter_name=name)
        found[name] = comcat_hf.save_comcat_weights(pipe, tmp_path_factory.mktemp(name) / name, name)
    widget = [{"text": "a sks dog on a beach", "output": {"url": "0.png"}}, {"text": 3}, "none"]
    card = ModelCardData(widget=widget, instance_prompt="a sks dog")
    (found["dog"] / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n# dog\n")
    return found


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory) -> dict[str, Path]:
    """A ViT with five labels, two of one name, and what `compress` made of it."""
    folder = tmp_path_factory.mktemp("classifiers")
    model, _ = small_vit()
    model.config.id2label = {0: "crane", 1: "cat", 2: "dog", 3: "crane", 4: "newt"}
    model.save_pretrained(folder / "dense")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "dense")
    comcat_hf.compress(model, 0.4).save_pretrained(folder / "compressed")
    shutil.copy(folder / "dense" / "preprocessor_config.json", folder / "compressed")
    return {"dense": folder / "dense", "compressed": folder / "compressed"}


@pytest.fixture(scope="session")
def elastic(classifiers, tmp_path_factory) -> Path:
    """The dense classifier as an elastic model."""
    model = AutoModelForImageClassification.from_pretrained(classifiers["dense"])
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = comcat_hf.compress(model, batches=[{"pixel_values": pixels}], elastic=(0.2, 0.6), progress=False)
    made.save_pretrained(folder := tmp_path_factory.mktemp("elastic") / "elastic")
    shutil.copy(classifiers["dense"] / "preprocessor_config.json", folder)
    return folder


@pytest.fixture
def image() -> Image.Image:
    grey = torch.arange(40 * 30, dtype=torch.uint8).reshape(40, 30)
    return Image.fromarray(grey.numpy()).convert("RGBA")
