"""Pipelines and models with adapters in their weights, as folders."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTModel

import comcat_hf
from comcat_hf import ComCATConfig, export_pipeline
from comcat_hf.errors import InvalidValueError, UnsupportedModuleError
from tests.customization.pipelines import tiny_sd


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("base") / "sd")


def load(folder) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline) -> torch.Tensor:
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return torch.tensor(pipeline("a dog", generator=torch.Generator().manual_seed(0), **settings).images)


def adapted(folder, *names: str, **kind: bool) -> StableDiffusionPipeline:
    pipeline = load(folder)
    torch.manual_seed(1)
    for name in names or ("dog",):
        for part in (pipeline.unet, pipeline.text_encoder):
            config = ComCATConfig(mode="customize", qk_rank=2, vo_rank=1, init_weights=False, **kind)
            part.add_adapter(config, adapter_name=name)
    for part in (pipeline.unet, pipeline.text_encoder):
        part.set_adapter(list(names) or ["dog"])
        for name, parameter in part.named_parameters():
            if "comcat_" in name:
                parameter.data *= 0.5
    return pipeline


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """By kind of export: the pipeline, what it draws, the folder, and what was lost."""
    found = {}
    for kind in ("full", "core", "gains", "truncated"):
        names = ("dog",) if kind == "truncated" else ("dog", "style")
        settings = {"core": kind in ("core", "gains"), "gains": kind in ("gains", "truncated")}
        settings["head_gains"] = kind == "gains"
        pipeline, folder = adapted(base, *names, **settings), tmp_path_factory.mktemp(kind)
        expected = draw(pipeline)
        lost = export_pipeline(pipeline, folder, truncate=kind == "truncated")
        assert torch.equal(draw(pipeline), expected)
        assert pipeline.get_active_adapters() == list(names)
        found[kind] = pipeline, expected, folder, lost
    return found


@pytest.mark.parametrize("kind", ["full", "core", "gains"])
def test_exact(base, exported, kind):
    pipeline, expected, folder, lost = exported[kind]
    before, loaded = draw(load(base)), load(folder)
    assert not [path for path in folder.rglob("*.json") if str(base) in path.read_text()]
    assert not torch.allclose(expected, before, atol=1e-2)
    assert torch.allclose(draw(loaded), expected, atol=1e-5)
    assert {part.partition(".")[0] for part in lost} == {"unet", "text_encoder"}
    assert not any(share for shares in lost.values() for share in shares.values())
    assert {part.rpartition(".")[2] for part, shares in lost.items() if "gains" in shares} == (
        {"ff", "mlp"} if kind == "gains" else set()
    )
    if kind == "full":
        for path, ranks in comcat_hf.plan_of(loaded.unet).ranks.items():
            head = pipeline.unet.get_submodule(path).view.head_dim
            assert ranks == {"qk": head + 4, "vo": head + 2}
    # The pipeline that was exported saves itself as what it is.
    assert "quantization_config" not in pipeline.unet.config


def test_truncated_loses_what_it_says(base, exported):
    pipeline, expected, folder, lost = exported["truncated"]
    before = draw(load(base))
    assert all(0 < share < 1 for shares in lost.values() for kind, share in shares.items() if kind != "gains")
    assert {shares["gains"] for shares in lost.values() if "gains" in shares} == {0.0}
    off = (draw(load(folder)) - expected).norm() / (before - expected).norm()
    assert 1e-3 < off < 1
    # Measured on the weights of one module, product by product.
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    layer, written = pipeline.unet.get_submodule(path), load(folder).unet.get_submodule(path)
    dense, factors = layer.base_layer, layer.comcat_factors["dog"]

    def product(first, second) -> torch.Tensor:
        return first.unflatten(0, (dense.heads, -1)).mT @ second.unflatten(0, (dense.heads, -1))

    kept = product(dense.to_q.weight, dense.to_k.weight)
    change = product(factors.query.weight, factors.key.weight)
    found = product(written.to_q.weight, written.to_k.weight)
    assert lost[f"unet.{path}"]["qk"] == pytest.approx(
        ((kept + change - found).norm() / change.norm()).item(), rel=1e-3
    )


def test_one_of_two_and_its_scale(base, tmp_path):
    pipeline = adapted(base, "dog", "style", core=True)
    pipeline.set_adapters(["dog", "style"], [0.5, 1.0])
    export_pipeline(pipeline, tmp_path, ["dog"])
    pipeline.set_adapters(["dog"], [0.5])
    assert torch.allclose(draw(load(tmp_path)), draw(pipeline), atol=1e-5)


def test_what_is_refused(base, tmp_path):
    with pytest.raises(InvalidValueError, match="no ComCAT adapter at all to export"):
        export_pipeline(load(base), tmp_path / "none")
    pipeline = adapted(base)
    with pytest.raises(InvalidValueError, match="no ComCAT adapter cat to export; it has dog"):
        export_pipeline(pipeline, tmp_path / "cat", ["cat"])
    pipeline = load(base)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="lora")
    pipeline.unet.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=1), adapter_name="dog")
    with pytest.raises(UnsupportedModuleError, match=r"unet carries an adapter of peft\.tuners\.lora"):
        export_pipeline(pipeline, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_pipeline_as_it_was(base, tmp_path):
    pipeline = adapted(base)
    expected = draw(pipeline)
    file = tmp_path / "file"
    file.write_text("in the way")
    with pytest.raises(OSError):
        export_pipeline(pipeline, file / "folder")
    assert torch.equal(draw(pipeline), expected)
    assert pipeline.text_encoder._hf_peft_config_loaded


@pytest.mark.parametrize("core", [False, True])
def test_a_customized_vision_transformer(tmp_path, core):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, 16, 16)
    config = ComCATConfig(mode="customize", qk_rank=2, vo_rank=3, core=core, init_weights=False)
    adapter = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = adapter(images).last_hidden_state
        merged = adapter.merge_and_unload()
        assert torch.allclose(merged(images).last_hidden_state, expected, atol=1e-5)
        merged.save_pretrained(tmp_path)
        loaded = ViTModel.from_pretrained(tmp_path).eval()
        assert torch.allclose(loaded(images).last_hidden_state, expected, atol=1e-5)
    recorded = json.loads((tmp_path / "config.json").read_text()).get("quantization_config")
    assert (recorded is None) is core
