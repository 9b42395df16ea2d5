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


def test_one_is_deleted(folder, alone):
    for gone, left in (("dog", "style"), ("style", "dog")):
        pipe = pipeline(folder, "style", "dog")
        pipe.delete_adapters(gone)
        assert_same(draw(pipe), alone[left])


def test_fused_and_unfused_but_not_ours_alone_beside_an_active_lora(folder):
    pipe = pipeline(folder, "style", "dog")
    both = draw(pipe)
    for names in (None, ["style"], ["style", "dog"]):
        pipe.fuse_lora(adapter_names=names)
        assert_same(draw(pipe), both)
        pipe.unfuse_lora()
        assert_same(draw(pipe), both)
    with pytest.raises(UnsupportedModuleError, match=r"to_q carries the adapter style.*which is not merged"):
        pipe.fuse_lora(adapter_names=["dog"])
    assert not any(getattr(module, "merged_adapters", None) for module in pipe.unet.modules())
    assert_same(draw(pipe), both)


def test_each_is_saved_by_itself(folder, alone, tmp_path):
    pipe = pipeline(folder, "style", "dog")
    save_comcat_weights(pipe, tmp_path / "dog", "dog")
    assert_equal_files(tmp_path / OURS, folder / OURS)
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet, adapter_name="style"))
    assert_equal_files(tmp_path / LORA, folder / "style" / LORA)
    unload_comcat_weights(pipe)
    assert_same(draw(pipe), alone["style"])


def test_all_are_unloaded(folder, alone):
    pipe = pipeline(folder, "style", "dog")
    pipe.unload_lora_weights()
    assert not any(hasattr(module, "base_layer") for module in pipe.unet.modules())
    assert torch.equal(draw(pipe), alone[""])


@pytest.mark.parametrize("name", ["style", "narrow"])
def test_the_order_does_not_matter(folder, name):
    """A LoRA of attention and what stands beside it, and one of attention alone, loaded after ours."""
    expected, pipe = pipeline(folder, name, "dog"), pipeline(folder, "dog", name)
    both = draw(expected)
    assert_same(draw(pipe), both)
    pipe.fuse_lora()
    assert_same(draw(pipe), both)
    pipe.unfuse_lora()
    assert_same(draw(pipe), both)
    pipe.delete_adapters("dog")
    pipe.set_adapters([name], [0.5])
    assert_same(draw(pipe), draw(pipeline(folder, name)))
    pipe.unload_lora_weights()
    assert_same(draw(pipe), draw(pipeline(folder)))


def test_a_lora_acts_beside_ours_that_is_fused(folder):
    pipe = pipeline(folder, "dog")
    pipe.fuse_lora()
    pipe.load_lora_weights(folder / "style", adapter_name="style")
    pipe.set_adapters(["style"], [0.5])
    assert not any("merged_layer" in key for key in pipe.unet.state_dict())
    both = draw(pipeline(folder, "style", "dog"))
    assert_same(draw(pipe), both)
    pipe.fuse_lora(adapter_names=["style"])
    assert_same(draw(pipe), both)
    pipe.unload_lora_weights()
    assert_same(draw(pipe), both)


def test_between_and_with_a_text_encoder(folder, tmp_path):
    def text_lora(pipe):
        config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(config, "words")
        state = get_peft_model_state_dict(pipe.text_encoder, adapter_name="words")
        pipe.save_lora_weights(tmp_path / "words", text_encoder_lora_layers=state)

    text_lora(pipeline(folder))
    pipe = pipeline(folder)
    pipe.text_encoder.add_adapter(ComCATConfig(mode="customize", qk_rank=1, vo_rank=1, init_weights=False), "ours")
    save_comcat_weights(pipe, tmp_path / "ours", "ours")
    found = []
    for order in (("words", "ours"), ("ours", "words")):
        pipe = pipeline(folder)
        for name in order:
            if name == "ours":
                load_comcat_weights(pipe, tmp_path / name, name)
            else:
                pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        pipe.set_adapters(["words", "ours"], [0.5, 0.5])
        found.append(draw(pipe))
        pipe.set_adapters(["ours"], [0.5])
        assert differ(draw(pipe), found[-1])
    assert_same(*found)


def test_values_of_a_lora_are_swapped_beside_ours(folder):
    pipe = pipeline(folder, "dog", "narrow")
    state = get_peft_model_state_dict(pipe.unet, adapter_name="narrow")
    assert not any("base_layer" in key for key in state)
    other = {key: -tensor if "lora_B" in key else tensor.clone() for key, tensor in state.items()}
    before = draw(pipe)
    pipe.unet.load_lora_adapter(other, prefix=None, adapter_name="narrow", hotswap=True)
    assert differ(draw(pipe), before)
    swapped = pipeline(folder, "dog")
    swapped.unet.load_lora_adapter(other, prefix=None, adapter_name="narrow")
    swapped.set_adapters(["dog", "narrow"], [0.5, 1.0])
    pipe.set_adapters(["dog", "narrow"], [0.5, 1.0])
    assert_same(draw(pipe), draw(swapped))


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
