"""ComCAT adapters as LoRA files, which diffusers loads without this package."""

import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from comcat_hf import ComCATConfig, cli, convert_to_lora, save_as_lora, save_comcat_weights
from comcat_hf.customization.lora import LORA_NAME
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from tests.customization.flow_pipelines import FLOWS
from tests.customization.pipelines import tiny_sd, tiny_sdxl
from tests.customization.test_export import adapted, load
from tests.helpers import WITHOUT_PACKAGE


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd")


WITHOUT = (
    WITHOUT_PACKAGE
    + """
import torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.load_lora_weights(sys.argv[2])
expected = torch.load(sys.argv[3], weights_only=True)
how = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
found = pipeline("a dog", generator=torch.Generator().manual_seed(0), **how).images
assert (found - expected).abs().max() <= 1e-4, (found - expected).abs().max()
"""
)


def latents(pipeline) -> torch.Tensor:
    how = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipeline("a dog", generator=torch.Generator().manual_seed(0), **how).images


@pytest.mark.processes
def test_a_core_is_exact_without_this_package(base, tmp_path):
    pipeline = adapted(base, core=True)
    pipeline.set_adapters(["dog"], [0.7])
    lost = save_as_lora(pipeline, tmp_path)
    assert max(share for shares in lost.values() for share in shares.values()) < 1e-5
    assert not torch.allclose(latents(pipeline), latents(load(base)), atol=1e-2)
    torch.save(latents(pipeline), tmp_path / "latents.pt")
    command = [sys.executable, "-c", WITHOUT, *map(str, (base, tmp_path / LORA_NAME, tmp_path / "latents.pt"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_several_adapters_and_names_of_other_tools(base, tmp_path):
    pipeline = adapted(base, "dog", "style", core=True)
    assert load_into(base, save(pipeline, tmp_path / "both")) == pytest.approx(0, abs=1e-4)
    # Tools that know no biases lose those of text encoders; of the UNet nothing.
    lost = save_as_lora(pipeline, tmp_path / "kohya", kohya=True)
    assert all(max(shares.values()) < 1e-5 for name, shares in lost.items() if name.startswith("unet"))
    assert all(0 < shares["qk"] < 1 for name, shares in lost.items() if name.startswith("text_encoder"))
    tensors = load_file(tmp_path / "kohya" / LORA_NAME)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj") for key in tensors)
    other = load(base)
    other.load_lora_weights(tmp_path / "kohya")
    for part, loras in convert_to_lora(pipeline, biases=False)[0].items():
        for path, lora in loras.items():
            read = getattr(other, part).get_submodule(path)
            assert torch.allclose(read.lora_B["default_0"].weight * read.scaling["default_0"], lora.up)


def save(pipeline, folder, **how):
    save_as_lora(pipeline, folder, **how)
    return folder


def load_into(base, folder) -> float:
    """How far a pipeline with a LoRA draws from the pipeline that it was made of; set by [`save`]'s caller."""
    plain = load(base)
    plain.load_lora_weights(folder)
    adapter = adapted(base, "dog", "style", core=True)
    return (latents(plain) - latents(adapter)).abs().max().item()


@pytest.mark.parametrize("gains", [False, True])
def test_full_factors_lose_what_is_said_and_no_more_than_an_export(base, tmp_path, gains):
    from comcat_hf import export_pipeline

    pipeline, whole = adapted(base, head_gains=gains), 64 if gains else None
    lost = save_as_lora(pipeline, tmp_path / "lora", rank=whole)
    exported = export_pipeline(pipeline, tmp_path / "cut", truncate=True)
    for name, shares in lost.items():
        assert shares == pytest.approx(exported[name], rel=1e-3)
    plain, cut = load(base), load(tmp_path / "cut")
    plain.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(latents(plain), latents(cut), atol=1e-3)
    if gains:
        return
    loras, _ = convert_to_lora(pipeline)
    view = next(m for m in pipeline.unet.modules() if type(m).__name__ == "CustomizeLayer").view
    assert {len(lora.down) for path, lora in loras["unet"].items() if path.startswith(f"{view.name}.")} == {
        2 * view.num_heads,
        view.num_heads,
    }


def test_a_lower_rank_loses_more(base):
    pipeline = adapted(base, core=True)
    means = []
    for rank in (1, 3, 100):
        loras, lost = convert_to_lora(pipeline, rank=rank)
        assert all(len(lora.down) <= rank for part in loras.values() for lora in part.values())
        means.append(sum(sum(shares.values()) for shares in lost.values()))
    assert means[0] > means[1] > 0.1 and means[2] < 1e-3


def test_gains_need_a_rank_and_lose_what_is_said(base, tmp_path):
    pipeline = adapted(base, core=True, gains=True)
    with pytest.raises(InvalidValueError, match=r"mlp\.fc2: .*here 32 at most.*--rank"):
        save_as_lora(pipeline, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    lost = save_as_lora(pipeline, tmp_path / "whole", rank=32)
    assert max(share for shares in lost.values() for share in shares.values()) < 1e-5
    plain = load(base)
    plain.load_lora_weights(tmp_path / "whole")
    assert torch.allclose(latents(plain), latents(pipeline), atol=1e-4)
    loras, lost = convert_to_lora(pipeline, rank=3)
    path = "mid_block.attentions.0.transformer_blocks.0.ff"
    layer, lora = pipeline.unet.get_submodule(path), loras["unet"][f"{path}.net.2"]
    change = layer.view.output.weight * layer.comcat_factors["dog"].weight
    left = (change - lora.up @ lora.down).norm() / change.norm()
    assert lost[f"unet.{path}"] == {"gains": pytest.approx(left.item(), rel=1e-3)} and 0.1 < left < 1


def test_gains_of_keys_and_values_too(base, tmp_path):
    pipeline = adapted(base, core=True, head_gains=True)
    with pytest.raises(InvalidValueError, match=r"k_proj: gains .*--rank"):
        save_as_lora(pipeline, tmp_path / "none")
    lost = save_as_lora(pipeline, tmp_path / "whole", rank=64)
    assert max(share for shares in lost.values() for share in shares.values()) < 1e-5
    plain = load(base)
    plain.load_lora_weights(tmp_path / "whole")
    assert torch.allclose(latents(plain), latents(pipeline), atol=1e-4)
    lost = convert_to_lora(pipeline, rank=2)[1]
    assert all(0.1 < share < 1 for shares in lost.values() for share in shares.values())


def test_two_text_encoders_have_names_of_their_own(tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl(tmp_path / "xl"))
    from comcat_hf import ComCATConfig

    for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        part.add_adapter(ComCATConfig(mode="customize", qk_rank=1, vo_rank=1, core=True, init_weights=False), "dog")
    save_as_lora(pipeline, tmp_path / "kohya", kohya=True)
    save_as_lora(pipeline, tmp_path / "lora")
    keys = load_file(tmp_path / "kohya" / LORA_NAME)
    assert {key[:9] for key in keys} == {"lora_unet", "lora_te1_", "lora_te2_"}
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
    plain.load_lora_weights(tmp_path / "lora")
    assert torch.allclose(latents(plain), latents(pipeline), atol=1e-4)


def test_from_the_shell(base, tmp_path):
    save_comcat_weights(adapted(base, core=True, gains=True), tmp_path / "adapter", "dog")
    command = ["convert", "lora", *map(str, (tmp_path / "adapter", tmp_path / "out")), "--base", str(base)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1 and "--rank" in result.output and not (tmp_path / "out").exists()
    result = CliRunner().invoke(cli.app, [*command, "--rank", "32"])
    assert result.exit_code == 0, result.output
    assert "gains" in result.stdout and "0.0%" in result.stdout and (tmp_path / "out" / LORA_NAME).is_file()
    assert "vo_rank 1, core, gains" in CliRunner().invoke(cli.app, ["info", str(tmp_path / "adapter")]).stdout
    result = CliRunner().invoke(cli.app, command[:4])
    assert result.exit_code == 1 and "Give --base" in result.output


def with_value_biases(base, folder):
    pipeline = load(base)
    torch.manual_seed(3)
    for name, parameter in pipeline.text_encoder.named_parameters():
        if name.endswith("v_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    pipeline.save_pretrained(folder)
    return folder


def with_adapted_text(base, **ranks):
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    config = ComCATConfig(mode="customize", init_weights=False, **ranks)
    pipeline.text_encoder.add_adapter(config, adapter_name="dog")
    return pipeline


def test_what_value_biases_add_is_counted_where_it_is_lost(base, tmp_path):
    base = with_value_biases(base, tmp_path / "base")
    pipeline = with_adapted_text(base, vo_rank=1)
    loras, written = convert_to_lora(pipeline)
    path = "text_model.encoder.layers.0.self_attn"
    path = path if f"{path}.out_proj" in loras["text_encoder"] else path.removeprefix("text_model.")
    shift = loras["text_encoder"][f"{path}.out_proj"].bias.norm().item()
    _, without = convert_to_lora(pipeline, biases=False)
    name = f"text_encoder.{path}"
    assert shift > 0 and without[name]["vo"] > written[name]["vo"] * 1.05


def test_queries_and_keys_of_a_text_encoder_alone(base, tmp_path):
    base = with_value_biases(base, tmp_path / "base")
    pipeline = with_adapted_text(base, qk_rank=2)
    lost = save_as_lora(pipeline, tmp_path / "lora")
    assert all(shares["vo"] == 0 < shares["qk"] < 1 for shares in lost.values())
    other = load(base)
    other.load_lora_weights(tmp_path / "lora")
    kept = (latents(other) - latents(pipeline)).norm()
    assert kept < (latents(load(base)) - latents(pipeline)).norm()


@pytest.mark.parametrize("how", ["untrained", "scale 0"])
def test_adapters_that_change_nothing(base, tmp_path, how):
    pipeline = adapted(base, core=True) if how == "scale 0" else load(base)
    if how == "scale 0":
        pipeline.set_adapters(["dog"], [0.0])
    else:
        pipeline.unet.add_adapter(ComCATConfig(mode="customize", vo_rank=1), adapter_name="dog")
    with pytest.raises(InvalidValueError, match="expected an adapter that changes something"):
        save_as_lora(pipeline, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_names_of_other_tools_are_those_of_the_pipeline(tmp_path):
    base = tiny_sdxl(tmp_path / "base")
    pipeline = with_adapted_text(base, vo_rank=1, core=True)
    save_as_lora(pipeline, tmp_path / "kohya", kohya=True)
    assert all(key.startswith("lora_te1_") for key in load_file(tmp_path / "kohya" / LORA_NAME))


def test_what_is_refused(base, tmp_path):
    with pytest.raises(InvalidValueError, match="no ComCAT adapter at all"):
        save_as_lora(load(base), tmp_path / "none")
    for rank in (0, -1, 1.5, True):
        with pytest.raises(InvalidValueError, match="rank: expected a whole number from 1"):
            convert_to_lora(adapted(base, core=True), rank=rank)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_of_two_streams(kind, tmp_path):
    base = FLOWS[kind](tmp_path / "base")

    def opened():
        pipe = DiffusionPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(pipe):
        draws = torch.Generator().manual_seed(0)
        how = {"num_inference_steps": 2, "generator": draws, "output_type": "latent"}
        return pipe(prompt=["a cat"], height=16, width=16, **how).images

    pipe = opened()
    before = sample(pipe)
    options = {"mode": "customize", "vo_rank": 3, "init_weights": False}
    pipe.transformer.add_adapter(ComCATConfig(core=True, **options), adapter_name="core")
    expected = sample(pipe)
    save_as_lora(pipe, tmp_path / "lora")
    other = opened()
    other.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(sample(other), expected, rtol=0, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    with pytest.raises(UnsupportedModuleError, match="transformer: kohya's scripts have names for UNets"):
        save_as_lora(pipe, tmp_path / "refused", kohya=True)
    full = opened()
    full.transformer.add_adapter(ComCATConfig(**options), adapter_name="full")
    with pytest.raises(UnsupportedModuleError, match=r"a second stream, so full factors have no form.*core=True"):
        save_as_lora(full, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
