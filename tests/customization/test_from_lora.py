"""LoRAs read as ComCAT adapters: exact at a high rank, the best change below, and what has no such form is refused."""

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from comcat_hf import adapter_from_lora, cli, load_comcat_weights, save_as_lora, save_comcat_weights
from comcat_hf.customization.lora import LORA_NAME
from comcat_hf.errors import CheckpointError, InvalidValueError, UnsupportedModuleError
from tests.customization.flow_pipelines import FLOWS
from tests.customization.pipelines import tiny_sd
from tests.customization.test_export import load
from tests.customization.test_lora import latents, with_value_biases


PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("base"))


def write_lora(base, folder, *, text=False, targets=PROJECTIONS, part="unet", rank=2, **how):
    """A LoRA of random weights, as diffusers writes it; returns the pipeline that has it."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    chosen = {part: targets} | ({"text_encoder": ["q_proj", "v_proj", "out_proj"]} if text else {})
    torch.manual_seed(0)
    states = {}
    for name, layers in chosen.items():
        model = getattr(pipeline, name)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, init_lora_weights=False, **how)
        model.add_adapter(config, "default")
        states[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
    pipeline.save_lora_weights(
        folder,
        **states,
        **{
            f"{name}_lora_adapter_metadata": getattr(pipeline, name).peft_config["default"].to_dict()
            for name in chosen
        },
    )
    return pipeline


def test_a_high_rank_draws_what_the_lora_draws(base, tmp_path):
    other = write_lora(base, tmp_path / "lora")
    pipeline = load(base)
    lost = adapter_from_lora(pipeline, tmp_path / "lora", 4, "dog")
    assert all(share < 1e-5 for shares in lost.values() for share in shares.values())
    assert {pair for shares in lost.values() for pair in shares} == {"qk", "vo"}
    expected = latents(other)
    assert (latents(load(base)) - expected).abs().max() > 1e-2
    torch.testing.assert_close(latents(pipeline), expected, rtol=0, atol=1e-4)
    save_comcat_weights(pipeline, tmp_path / "adapter", "dog")
    again = load(base)
    load_comcat_weights(again, tmp_path / "adapter")
    torch.testing.assert_close(latents(again), expected, rtol=0, atol=1e-4)


def test_a_lower_rank_loses_what_is_said_and_the_least(base, tmp_path):
    other = write_lora(base, tmp_path / "lora", targets=["to_v", "to_out.0"])
    pipeline = load(base)
    lost = adapter_from_lora(pipeline, tmp_path / "lora", 1, "dog", most_lost=1)
    name, shares = next(iter(lost.items()))
    assert shares.keys() == {"vo"} and 0 < shares["vo"] < 1
    layer = pipeline.unet.get_submodule(name.removeprefix("unet."))
    found, dense = layer.comcat_factors["dog"], other.unet.get_submodule(name.removeprefix("unet."))
    heads = layer.view.num_heads

    def products(value, output):
        return value.unflatten(0, (heads, -1)).mT @ output.T.unflatten(0, (heads, -1))

    value, output = dense.to_v, dense.to_out[0]
    changed = products(
        value.base_layer.weight + value.get_delta_weight("default"),
        output.base_layer.weight + output.get_delta_weight("default"),
    )
    change = changed - products(value.base_layer.weight, output.base_layer.weight)
    best = torch.linalg.svdvals(change)[:, 1:].norm() / change.norm()
    assert found.query is None and found.value.weight.shape[0] == heads
    error = (change - products(found.value.weight, found.output.weight)).norm() / change.norm()
    assert shares["vo"] == pytest.approx(error.item(), rel=1e-3) == pytest.approx(best.item(), rel=1e-3)


def test_text_encoders_and_names_of_other_tools(base, tmp_path):
    other = write_lora(base, tmp_path / "lora", text=True)
    pipeline = load(base)
    lost = adapter_from_lora(pipeline, tmp_path / "lora", 4, "dog")
    # Queries of a text encoder have biases, which factors have not.
    assert any(name.startswith("text_encoder.") for name in lost)
    assert max(share for shares in lost.values() for share in shares.values()) < 0.2
    assert (latents(pipeline) - latents(other)).norm() < 0.1 * (latents(load(base)) - latents(other)).norm()
    # There and back again.
    save_as_lora(pipeline, tmp_path / "kohya", ["dog"], kohya=True)
    again = load(base)
    assert adapter_from_lora(again, tmp_path / "kohya" / LORA_NAME, 4, "dog").keys() == lost.keys()


def test_what_value_biases_and_biases_of_a_lora_add_is_counted_as_lost(base, tmp_path):
    pipeline = load(with_value_biases(base, tmp_path / "base"))
    other = write_lora(tmp_path / "base", tmp_path / "lora", part="text_encoder", targets=["out_proj"])
    lost = adapter_from_lora(pipeline, tmp_path / "lora", 4, most_lost=1)
    path, shares = next(iter(lost.items()))
    layer = other.text_encoder.get_submodule(path.removeprefix("text_encoder."))
    change = layer.out_proj.get_delta_weight("default")
    constant = change @ layer.v_proj.bias
    heads = layer.num_heads
    rows = change.T.unflatten(0, (heads, -1)), layer.v_proj.weight.unflatten(0, (heads, -1))
    products = rows[1].mT @ rows[0]
    expected = constant.norm() / torch.hypot(constant.norm(), products.norm())
    assert shares["vo"] == pytest.approx(expected.item(), rel=1e-4) and expected > 0.01
    write_lora(base, tmp_path / "biased", part="text_encoder", targets=["out_proj"], lora_bias=True)
    lost = adapter_from_lora(load(base), tmp_path / "biased", 4, most_lost=1)
    assert all(shares["vo"] > 0.01 for shares in lost.values())


def zeroed(file, word):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: value * (word not in name) for name, value in load_file(file).items()}, file, metadata)


@pytest.mark.parametrize("word", ["unet.", "text_encoder."])
def test_a_part_that_a_lora_leaves_as_it_is(base, tmp_path, word):
    write_lora(base, tmp_path / "lora", text=True)
    zeroed(tmp_path / "lora" / LORA_NAME, word)
    pipeline = load(base)
    lost = adapter_from_lora(pipeline, tmp_path / "lora", 4)
    assert lost and not any(name.startswith(word) for name in lost)
    zeroed(tmp_path / "lora" / LORA_NAME, "")
    with pytest.raises(CheckpointError, match="found nothing that changes it"):
        adapter_from_lora(load(base), tmp_path / "lora", 4)


def test_from_the_shell(base, tmp_path):
    write_lora(base, tmp_path / "lora")
    command = ["convert", "adapter", str(tmp_path / "lora" / LORA_NAME), str(tmp_path / "out"), "--base", str(base)]
    result = CliRunner().invoke(cli.app, [*command, "--rank", "4"])
    assert result.exit_code == 0, result.output
    assert "0.0%" in result.stdout and (tmp_path / "out" / "unet" / "adapter_model.safetensors").is_file()
    result = CliRunner().invoke(cli.app, [*command[:3], str(tmp_path / "less"), *command[4:], "--rank", "1"])
    assert result.exit_code == 1 and "would be lost" in result.output and "--most-lost" in result.output
    assert not (tmp_path / "less").exists()
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1 and "--rank" in result.output
    for said in ("--alpha", "--base"):
        wrong = [*command[:-1], "gone", "--rank", "4"] if said == "--base" else [*command, said, "2", "--rank", "4"]
        result = CliRunner().invoke(cli.app, wrong)
        assert result.exit_code == 1 and said in result.output and not (tmp_path / "less").exists()
    for option in ("--rank", "--most-lost"):
        result = CliRunner().invoke(cli.app, [*command[:2], "x.pt", str(tmp_path / "less"), *command[4:], option, "1"])
        assert result.exit_code == 1 and f"{option} is for a LoRA" in result.output


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"targets": ["to_q", "ff.net.2"]}, UnsupportedModuleError, r"attention alone, found one on \d+ other layers"),
        ({"use_dora": True}, CheckpointError, "found a DoRA"),
    ],
)
def test_what_has_no_such_form(base, tmp_path, how, error, said):
    write_lora(base, tmp_path / "lora", **how)
    pipeline = load(base)
    with pytest.raises(error, match=said):
        adapter_from_lora(pipeline, tmp_path / "lora", 4)
    assert not getattr(pipeline.unet, "peft_config", {})
    torch.testing.assert_close(latents(pipeline), latents(load(base)), rtol=0, atol=0)


def test_norms_before_the_scores(tmp_path):
    base = FLOWS["flux"](tmp_path / "base")
    write_lora(base, tmp_path / "lora", part="transformer", targets=["to_q", "to_v"])
    with pytest.raises(UnsupportedModuleError, match=r"transformer_blocks.0.attn: expected attention whose"):
        adapter_from_lora(DiffusionPipeline.from_pretrained(base), tmp_path / "lora", 4)


def test_files_that_are_no_lora_of_this_base(base, tmp_path):
    pipeline = load(base)
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    pipeline.unet.add_adapter(LoKrConfig(r=2, target_modules=PROJECTIONS), "lokr")
    state = get_peft_model_state_dict(pipeline.unet, adapter_name="lokr")
    save_file({f"unet.{key}": value.contiguous() for key, value in state.items()}, tmp_path / "lokr.safetensors")
    with pytest.raises(InvalidValueError, match="unet: expected a pipeline without adapters"):
        adapter_from_lora(pipeline, tmp_path / "other.safetensors", 1)
    pipeline = load(base)
    for name, said in {"other": "tensors like weight", "text": "expected a safetensors", "lokr": "a LoKr"}.items():
        with pytest.raises(CheckpointError, match=said):
            adapter_from_lora(pipeline, tmp_path / f"{name}.safetensors", 1)
    write_lora(base, tmp_path / "lora")
    wrong = {key: torch.cat([value, value], dim=1) for key, value in load_file(tmp_path / "lora" / LORA_NAME).items()}
    save_file(wrong, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"wide.safetensors: expected a LoRA of this StableDiffusionPipeline"):
        adapter_from_lora(pipeline, tmp_path / "wide.safetensors", 1)
    for rank in (0, 1.5):
        with pytest.raises(InvalidValueError, match="rank"):
            adapter_from_lora(pipeline, tmp_path / "lora", rank)
    assert not getattr(pipeline.unet, "peft_config", {})
