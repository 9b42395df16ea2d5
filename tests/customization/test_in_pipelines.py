"""What diffusers does to a pipeline with adapters in it: fusing and unloading, saving, casting, moving."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0
from safetensors.torch import load_file

from comcat_hf import ComCATConfig, load_comcat_weights, save_comcat_weights
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from tests.customization.pipelines import tiny_sd
from tests.customization.test_beside_lora import assert_same, differ, draw


KINDS = {"full": {"qk_rank": 2, "vo_rank": 2}, "core": {"qk_rank": 2, "vo_rank": 2, "core": True}}
STORED, COMPUTED = torch.float8_e4m3fn, torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline and two adapters of its UNet and text encoder."""
    folder = tmp_path_factory.mktemp("inside")
    tiny_sd(folder / "sd")
    for kind, ranks in KINDS.items():
        pipe = pipeline(folder)
        for part in (pipe.unet, pipe.text_encoder):
            part.add_adapter(ComCATConfig(mode="customize", init_weights=False, **ranks), kind)
        save_comcat_weights(pipe, folder / kind, kind)
    return folder


def pipeline(folder, *kinds, **kwargs):
    pipe = StableDiffusionPipeline.from_pretrained(folder / "sd", **kwargs)
    pipe.set_progress_bar_config(disable=True)
    for kind in kinds:
        load_comcat_weights(pipe, folder / kind, kind)
    if kinds:
        pipe.set_adapters(list(kinds), [0.7] * len(kinds))
    return pipe


@pytest.mark.parametrize("kinds", [["core"], ["full", "core"]])
def test_fused_unloaded_and_saved(folder, tmp_path, kinds):
    pipe = pipeline(folder, *kinds)
    expected = draw(pipe)
    assert differ(expected, draw(pipeline(folder)))
    pipe.fuse_lora()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not any(hasattr(module, "base_layer") for module in pipe.unet.modules())
    assert_same(draw(pipe), expected)
    pipe.unfuse_lora()
    assert_same(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    assert_same(draw(_loaded(tmp_path)), expected)


def _loaded(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("fused", [False, True])
def test_an_adapted_model_is_not_saved_as_a_dense_one(folder, tmp_path, fused):
    pipe = pipeline(folder, "core")
    if fused:
        pipe.fuse_lora()
    for save in (pipe.save_pretrained, pipe.unet.save_pretrained):
        with pytest.raises(InvalidValueError, match=r"found core.*export_pipeline\(pipe, folder\)"):
            save(tmp_path)
    assert not (tmp_path / "model_index.json").exists() and not (tmp_path / "unet").exists()
    pipe.unfuse_lora()
    pipe.delete_adapters("core")
    pipe.unet.save_pretrained(tmp_path / "unet")
    dense = pipeline(folder).unet.state_dict()
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == dense.keys() and all(torch.equal(saved[key], dense[key]) for key in dense)


def test_processors_have_the_names_of_the_dense_model(folder):
    pipe = pipeline(folder, "full")
    before = draw(pipe)
    names = pipeline(folder).unet.attn_processors.keys()
    assert pipe.unet.attn_processors.keys() == names
    pipe.unet.set_attn_processor({name: AttnProcessor() for name in names})
    assert all(type(found) is AttnProcessor for found in pipe.unet.attn_processors.values())
    assert_same(draw(pipe), before)


@pytest.mark.parametrize(("kind", "first"), [("full", "casting"), ("core", "casting"), ("core", "adapter")])
def test_layerwise_casting(folder, tmp_path, kind, first):
    def cast(pipe):
        pipe.unet.enable_layerwise_casting(storage_dtype=STORED, compute_dtype=COMPUTED)

    rounded = pipeline(folder)
    cast(rounded)
    expected = pipeline(folder)
    expected.unet.load_state_dict(rounded.unet.state_dict())
    load_comcat_weights(expected, folder / kind, kind)
    expected.set_adapters([kind], [0.7])

    pipe = pipeline(folder, *([kind] if first == "adapter" else []))
    cast(pipe)
    if first == "casting":
        load_comcat_weights(pipe, folder / kind, kind)
        pipe.set_adapters([kind], [0.7])
    factors = {n: p for n, p in pipe.unet.named_parameters() if "comcat_" in n}
    assert {p.dtype for p in factors.values()} == {COMPUTED}
    found = draw(pipe)
    # A core's bases come from the weights as they are when it is added.
    atol = 1e-4 if (first, kind) == ("adapter", "core") else 1e-5
    torch.testing.assert_close(found, draw(expected), rtol=0, atol=atol)
    save_comcat_weights(pipe, tmp_path, kind)
    file = "unet/adapter_model.safetensors"
    saved, given = load_file(tmp_path / file), load_file(folder / kind / file)
    assert all(torch.equal(saved[key], given[key].to(COMPUTED)) for key in given | saved)
    pipe.fuse_lora()
    assert_same(draw(pipe), found)


def test_set_lora_device(folder):
    pipe = pipeline(folder, "full", "core")
    before = draw(pipe)
    pipe.set_lora_device(["full", "core"], "cpu")
    assert_same(draw(pipe), before)
    pipe.set_lora_device(["full"], "meta")
    parameters = [*pipe.unet.named_parameters(), *pipe.text_encoder.named_parameters()]
    assert all(p.is_meta == (".full." in name) for name, p in parameters)
    pipe.set_adapters(["core"], [0.7])
    assert_same(draw(pipe), draw(pipeline(folder, "core")))


def test_only_what_is_targeted_is_checked(folder):
    unet = pipeline(folder).unet
    name, attention = next((n, m) for n, m in unet.named_modules() if n.endswith("attn2"))
    attention.set_processor(IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=16))
    with pytest.raises(UnsupportedModuleError, match=rf"{name}: .*IPAdapterAttnProcessor2_0.*unload_ip_adapter"):
        unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2), "dog")
    unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=2, target_modules=["attn1"]), "dog")
    assert all("attn1.comcat_factors" in key for key in unet.state_dict() if "comcat_" in key)
