"""Compressed UNets: cross attention with two inputs, statistics, plans, processors, saving and loading."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, IPAdapterAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import comcat_hf
from comcat_hf.closed_forms.attention import AttentionMoments
from comcat_hf.compression.calibration.inputs import main_input
from comcat_hf.errors import CheckpointError, InvalidValueError, RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites, read_ranks
from tests.customization.pipelines import tiny_sd
from tests.helpers import assert_close


WIDTH, TEXT, HEADS = 32, 24, 4


def unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (WIDTH, 2 * WIDTH),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": HEADS,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**config | changes).eval()


def batch(samples: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(samples, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (samples,), generator=generator),
        "encoder_hidden_states": torch.randn(samples, 6, TEXT, generator=generator),
    }


@torch.no_grad()
def run(model, inputs) -> torch.Tensor:
    return model(**inputs).sample


def attention_ranks(model, **ranks) -> dict[str, dict[str, int]]:
    sites = find_sites(model, "attention")
    return {name: {pair: rank or site.view.head_dim for pair, rank in ranks.items()} for name, site in sites.items()}


class Host(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = Attention(WIDTH, heads=HEADS, dim_head=8, **options)

    def forward(self, states, other=None, mask=None):
        return self.attn(states, encoder_hidden_states=other, attention_mask=mask)


@settings(max_examples=25, deadline=None)
@given(
    qk=st.sampled_from([None, 1, 3, 8]),
    vo=st.sampled_from([None, 1, 2, 8]),
    cross=st.booleans(),
    bias=st.booleans(),
    masked=st.booleans(),
    processor=st.sampled_from([None, AttnProcessor]),
)
def test_it_computes_the_products_of_its_factors(qk, vo, cross, bias, masked, processor):
    if qk is None and vo is None:
        return
    torch.manual_seed(2)
    host = Host(cross_attention_dim=TEXT if cross else None, bias=bias, residual_connection=True).eval()
    states = torch.randn(2, 9, WIDTH)
    other = torch.randn(2, 5, TEXT) if cross else None
    keys = states if other is None else other
    mask = torch.zeros(2, 1, keys.shape[1]).masked_fill_(torch.rand(2, 1, keys.shape[1]) < 0.3, -10000.0)
    dense = copy.deepcopy(host.attn)
    apply_ranks(host, {"attn": {pair: rank for pair, rank in (("qk", qk), ("vo", vo)) if rank}})
    if processor is not None:
        host.attn.set_processor(processor())
    assert isinstance(host.attn, Attention)
    with torch.no_grad():
        found = host(states, other, mask if masked else None)
        low = host.attn
        widths = qk or 8, vo or 8
        query, key = (
            linear(x).unflatten(-1, (HEADS, widths[0])).transpose(1, 2)
            for linear, x in ((low.to_q, states), (low.to_k, keys))
        )
        value = low.to_v(keys).unflatten(-1, (HEADS, widths[1])).transpose(1, 2)
        scores = query @ key.mT * 8**-0.5 + (mask[:, None] if masked else 0)
        expected = low.to_out[0]((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)) + states
    assert torch.allclose(found, expected, atol=1e-5)
    if qk in (None, 8) and vo in (None, 8):
        with torch.no_grad():
            same = dense(states, encoder_hidden_states=other, attention_mask=mask if masked else None)
        assert torch.allclose(found, same, atol=1e-5)


def test_fused_projections_are_refused_and_left_as_they_are():
    model = unet()
    before = run(model, batch())
    model.fuse_qkv_projections()
    for call in (
        lambda: comcat_hf.compress(model, 0.2),
        lambda: comcat_hf.compress(model, 0.2, batches=[batch()], scope="attention"),
        lambda: comcat_hf.count_macs(model),
    ):
        with pytest.raises(UnsupportedModuleError, match=r"attn1 .*twice, once fused in to_qkv; load the model again"):
            call()
    assert_close([run(model, batch())], [before])
    # Its layers stay beside the others.
    model.unfuse_qkv_projections()
    with pytest.raises(UnsupportedModuleError, match="twice"):
        comcat_hf.compress(model, 0.2)
    assert comcat_hf.compress(model, 0.05, scope="mlp")


def test_full_rank_reproduces_the_unet():
    model, inputs = unet(), batch()
    expected = run(model, inputs)
    ranks = attention_ranks(model, qk=None, vo=None)
    assert {name.rpartition(".")[2] for name in ranks} == {"attn1", "attn2"}
    apply_ranks(model, ranks)
    assert read_ranks(model) == ranks
    assert torch.allclose(run(model, inputs), expected, atol=1e-5)
    assert torch.equal(run(copy.deepcopy(model), inputs), run(model, inputs))


def test_gradients_reach_the_factors():
    model = unet().requires_grad_(True)
    apply_ranks(model, attention_ranks(model, qk=2, vo=3))
    model(**batch()).sample.square().mean().backward()
    factors = [p for n, p in model.named_parameters() if ".to_" in n and n.endswith("weight")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in factors)


@pytest.mark.parametrize("scope", ["attention", "model"])
def test_counted_is_what_is_built(scope):
    model = unet()
    small = comcat_hf.compress(model, 0.1, scope=scope)
    plan = comcat_hf.plan_of(small)
    sites = find_sites(model, scope)
    paths = None if scope == "model" else tuple(p for site in sites.values() for p in site.dense_modules())
    dense, left = comcat_hf.count_parameters(model, paths), comcat_hf.count_parameters(small, paths)
    assert 1 - left / dense == pytest.approx(plan.reached, abs=1e-9)
    assert 0.1 <= plan.reached <= 0.105
    fewer = comcat_hf.compress(model, 0.1, scope=scope, metric="macs")
    assert comcat_hf.count_macs(fewer) < comcat_hf.count_macs(model)


def test_data_help_on_held_out_inputs():
    model = unet()
    calibration, held_out = batch(64, 5), batch(16, 105)
    expected = run(model, held_out)

    def error(**how) -> float:
        return (run(comcat_hf.compress(model, 0.4, scope="attention", **how), held_out) - expected).norm().item()

    fitted = comcat_hf.collect_statistics(model, [calibration])
    weights, statistics, compensated = (
        error(),
        error(statistics=fitted, strategy="uniform"),
        error(batches=[calibration]),
    )
    assert statistics < weights
    assert compensated < statistics


def test_moments_of_cross_attention_are_those_of_both_inputs():
    torch.manual_seed(3)
    model = unet()
    inputs = batch()
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 4:] = False
    seen: dict[str, torch.Tensor] = {}
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    attention = model.get_submodule(name)
    for role in ("to_q", "to_k"):
        getattr(attention, role).register_forward_hook(lambda m, a, out, role=role: seen.update({role: out}))
    found = comcat_hf.collect_statistics(model, [inputs | {"encoder_attention_mask": mask}])[name]
    query = seen["to_q"].double().unflatten(-1, (HEADS, -1))
    key = seen["to_k"].double().unflatten(-1, (HEADS, -1))[:, :4]
    key = key - key.mean(1, keepdim=True)
    assert isinstance(found, AttentionMoments)
    # Every query counts, also where a text token of the same place is masked.
    assert torch.allclose(found.query, torch.einsum("bnhi,bnhj->hij", query, query) / query[..., 0, 0].numel())
    assert torch.allclose(found.key, torch.einsum("bnhi,bnhj->hij", key, key) / key[..., 0, 0].numel())


def test_the_main_input_is_known_by_its_place():
    with pytest.raises(InvalidValueError, match="'sample', the main input of UNet2DConditionModel"):
        comcat_hf.collect_statistics(unet(), [{"pixel_values": torch.zeros(1, 4, 8, 8)}])
    assert main_input(unet()) == "sample"


def test_native_checkpoint(tmp_path):
    model, inputs = unet(), batch()
    small = comcat_hf.compress(model, 0.3, scope="attention")
    expected = run(small, inputs)
    small.save_pretrained(tmp_path / "small")
    assert (tmp_path / "small" / "comcat_ranks.json").is_file()
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "small")
    assert torch.equal(run(loaded, inputs), expected)
    assert comcat_hf.plan_of(loaded).ranks == comcat_hf.plan_of(small).ranks
    # Casting and training are allowed, and it saves itself again.
    loaded.half().float().train()
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "again", torch_dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["reduction"] == 0.3
    # Earlier versions named the method otherwise.
    file = tmp_path / "small" / "config.json"
    config = file.read_text()
    file.write_text(config.replace('"quant_method": "comcat_hf"', '"quant_method": "comcat"'))
    assert file.read_text() != config
    assert torch.equal(run(UNet2DConditionModel.from_pretrained(tmp_path / "small"), inputs), expected)
    assert not model.config.get("quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_a_pipeline_holds_a_compressed_unet(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd(tmp_path / "dense"))
    pipeline.unet = comcat_hf.compress(pipeline.unet, 0.2, scope="attention")
    pipeline.save_pretrained(tmp_path / "small")
    assert str(tmp_path / "dense") not in (tmp_path / "small" / "unet" / "config.json").read_text()
    assert pipeline.unet.config._name_or_path == str(tmp_path / "dense" / "unet")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "small")
    assert comcat_hf.plan_of(loaded.unet).ranks == comcat_hf.plan_of(pipeline.unet).ranks


def test_missing_factors_are_an_error(tmp_path):
    small = comcat_hf.compress(unet(), 0.3, scope="attention")
    small.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = f"{next(iter(comcat_hf.plan_of(small).ranks))}.to_q.weight"
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=gone.replace(".", r"\.")):
        UNet2DConditionModel.from_pretrained(tmp_path)


def test_as_an_adapter():
    model, inputs = unet(), batch()
    expected = run(model, inputs)
    plan = comcat_hf.allocate_ranks(model, 0.3, scope="attention")
    model.add_adapter(comcat_hf.ComCATConfig.from_plan(plan))
    small = run(model, inputs)
    assert not torch.allclose(small, expected, atol=1e-3)
    model.disable_adapters()
    assert torch.equal(run(model, inputs), expected)


def test_what_is_refused():
    model = unet()
    apply_ranks(model, attention_ranks(model, qk=2, vo=2))
    block = model.mid_block.attentions[0].transformer_blocks[0]
    block.attn2.set_processor(IPAdapterAttnProcessor2_0(2 * WIDTH, TEXT))
    with pytest.raises(UnsupportedModuleError, match="IPAdapterAttnProcessor2_0 calls its kernel a second time"):
        run(model, batch())
    with pytest.raises(RankPlanError, match="from 1 to 8"):
        apply_ranks(Host(), {"attn": {"qk": 9}})
    with pytest.raises(RankPlanError, match=r"query/key product cannot be compressed: .*qk_norm"):
        apply_ranks(Host(qk_norm="layer_norm"), {"attn": {"qk": 2}})
    with pytest.raises(UnsupportedModuleError, match="added_kv_proj_dim"):
        apply_ranks(Host(added_kv_proj_dim=8), {"attn": {"qk": 2}})
