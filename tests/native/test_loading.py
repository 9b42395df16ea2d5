"""Models and pipelines that lack weights: an error names them, where the libraries make up random ones."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comcat_hf.app import Studio
from comcat_hf.errors import CheckpointError
from comcat_hf.native import load_model, load_pipeline
from comcat_hf.training.dreambooth import families
from comcat_hf.training.dreambooth.settings import CustomizeSettings
from tests.customization.pipelines import tiny_sd
from tests.helpers import small_bert_mlm


FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def drop(file, word):
    """Take a tensor away from a file of weights; returns its name."""
    weights = load_file(file)
    name = next(name for name in sorted(weights) if word in name)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    return name


def train(folder):
    where = {"instance_data_dir": "x", "instance_prompt": "y", "output_dir": "z", "resolution": 16}
    families.load_pipeline(CustomizeSettings(pretrained_model_name_or_path=str(folder), **where), torch.float32)


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("use", [train, lambda folder: Studio().load(str(folder))], ids=["training", "app"])
def test_a_pipeline(part, use, tmp_path):
    use(tiny_sd(tmp_path))
    name = drop(tmp_path / part / f"{FILES[part]}.safetensors", "weight")
    with pytest.raises(CheckpointError, match=rf"{part}: expected all weights of .*{name} \(found none\)"):
        use(tmp_path)


def test_a_model(tmp_path):
    small_bert_mlm()[0].save_pretrained(tmp_path)
    load_model(tmp_path)
    name = drop(tmp_path / "model.safetensors", "query.weight")
    with pytest.raises(CheckpointError, match=rf"expected all weights of BertForMaskedLM, .*{name} \(found none\)"):
        load_model(tmp_path)


def test_a_variant_and_parts_of_ones_own(tmp_path):
    pipe = load_pipeline(tiny_sd(tmp_path), dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    pipe.unet.save_pretrained(tmp_path / "unet", variant="fp16")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    drop(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", "weight")
    again = load_pipeline(tmp_path, dtype=torch.float32, variant="fp16", vae=pipe.vae)
    assert again.vae is pipe.vae and torch.equal(again.unet.conv_in.weight, pipe.unet.conv_in.weight.float())
