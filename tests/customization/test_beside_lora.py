"""A ComCAT adapter and a LoRA in one pipeline: what they do together, and what is refused."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file

from comcat_hf import ComCATConfig, load_comcat_weights, save_comcat_weights, unload_comcat_weights
from comcat_hf.errors import UnsupportedModuleError
from tests.customization.pipelines import tiny_sd


OURS = "dog/unet/adapter_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline, a ComCAT adapter and two LoRAs: of attention and what stands beside it, and of attention alone."""
    folder = tmp_path_factory.mktemp("beside")
    tiny_sd(folder / "sd")
    for name, targets in {"style": ["to_q", "to_v", "to_out.0", "ff.net.2"], "narrow": ["to_q", "to_v"]}.items():
        unet = pipeline(folder).unet
        unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), name)
        StableDiffusionPipeline.save_lora_weights(folder / name, get_peft_model_state_dict(unet, adapter_name=name))
    pipe = pipeline(folder)
    pipe.unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2, init_weights=False), "dog")
    save_comcat_weights(pipe, folder / "dog", "dog")
    return folder


def pipeline(folder, *adapters):
    """The pipeline with these adapters, in this order, each at half its weight."""
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd")
    pipe.set_progress_bar_config(disable=True)
    for name in adapters:
        if name == "dog":
            load_comcat_weights(pipe, folder / name, name)
        else:
            pipe.load_lora_weights(folder / name, adapter_name=name)
    if adapters:
        pipe.set_adapters(list(adapters), [0.5] * len(adapters))
    return pipe


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 1, "height": 16, "width": 16, "output_type": "np", "generator": generator}
    return torch.tensor(pipe("a dog", **settings).images)


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def assert_equal_files(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def differ(one, other):
    return (one - other).abs().max() > 1e-3


@pytest.fixture(scope="module")
def alone(folder):
    return {
        name: draw(pipeline(folder, *names)) for name, names in {"": (), "style": ("style",), "dog": ("dog",)}.items()
    }


def test_both_work_together_and_each_by_itself(folder, alone):
    pipe = pipeline(folder, "style", "dog")
    both = draw(pipe)
    assert all(differ(both, one) for one in alone.values())
    pipe.set_adapters(["style"], [0.5])
    assert_same(draw(pipe), alone["style"])
    pipe.set_adapters(["dog"], [0.5])
    assert_same(draw(pipe), alone["dog"])
    pipe.disable_lora()
    assert_same(draw(pipe), alone[""])
    pipe.enable_lora()
    pipe.set_adapters(["style", "dog"], [0.5, 0.5])
    assert_same(draw(pipe), both)


@pytest.mark.parametrize(("gone", "left"), [("dog", "style"), ("style", "dog")])
def test_one_is_deleted(folder, alone, gone, left):
    pipe = pipeline(folder, "style", "dog")
    pipe.delete_adapters(gone)
    assert_same(draw(pipe), alone[left])


@pytest.mark.parametrize("names", [None, ["style"], ["style", "dog"]])
def test_fused_and_unfused(folder, names):
    pipe = pipeline(folder, "style", "dog")
    both = draw(pipe)
    pipe.fuse_lora(adapter_names=names)
    assert_same(draw(pipe), both)
    pipe.unfuse_lora()
    assert_same(draw(pipe), both)


def test_ours_alone_is_not_fused_beside_an_active_lora(folder):
    pipe = pipeline(folder, "style", "dog")
    both = draw(pipe)
    with pytest.raises(UnsupportedModuleError, match=r"to_q carries the adapter style.*which is not merged"):
        pipe.fuse_lora(adapter_names=["dog"])
    assert not any(getattr(module, "merged_adapters", None) for module in pipe.unet.modules())
    assert_same(draw(pipe), both)


def test_each_is_saved_by_itself(folder, alone, tmp_path):
    pipe = pipeline(folder, "style", "dog")
    save_comcat_weights(pipe, tmp_path / "dog", "dog")
    assert_equal_files(tmp_path / OURS, folder / OURS)
    # With ours in the UNet a LoRA's names would have `base_layer` in them.
    unload_comcat_weights(pipe)
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    assert_equal_files(tmp_path / LORA, folder / "style" / LORA)
    assert_same(draw(pipe), alone["style"])
    pipe.unload_lora_weights()
    assert_same(draw(pipe), alone[""])


@pytest.mark.parametrize("deleted", [False, True])
def test_a_lora_that_comes_second_is_refused(folder, alone, deleted):
    pipe = pipeline(folder, "dog")
    if deleted:
        pipe.delete_adapters("dog")
    before = draw(pipe)
    with pytest.raises(UnsupportedModuleError, match=r"attn1 to be a CustomizeLayer.*unload_comcat_weights\(pipe\)"):
        pipe.load_lora_weights(folder / "style", adapter_name="style")
    # PEFT's own: it finds no module at all.
    with pytest.raises(ValueError, match="not found in the base model"):
        pipe.load_lora_weights(folder / "narrow", adapter_name="narrow")
    if not deleted:
        pipe.set_adapters(["dog"], [0.5])
    assert_same(draw(pipe), before)
    unload_comcat_weights(pipe)
    assert not any(hasattr(module, "comcat_factors") for module in pipe.unet.modules())


def test_in_the_other_order_after_unloading(folder, alone):
    pipe = pipeline(folder, "dog")
    pipe.delete_adapters("dog")
    unload_comcat_weights(pipe)
    pipe.load_lora_weights(folder / "style", adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    assert_same(draw(pipe), alone["style"])


def test_what_was_fused_before_a_refusal_is_taken_back(folder):
    pipe = pipeline(folder)
    config = LoraConfig(r=2, target_modules=r".*mid_block.*attn1\.to_q", init_lora_weights=False)
    pipe.unet.add_adapter(config, "style")
    load_comcat_weights(pipe, folder / "dog", "dog")
    pipe.set_adapters(["style", "dog"])
    both = draw(pipe)
    with pytest.raises(UnsupportedModuleError, match=r"mid_block\..*to_q carries the adapter style"):
        pipe.fuse_lora(adapter_names=["dog"])
    pipe.unfuse_lora()
    assert_same(draw(pipe), both)
    assert not any(getattr(module, "merged_adapters", None) for module in pipe.unet.modules())
