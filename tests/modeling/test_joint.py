"""Compressed attention of diffusion transformers.

Of two streams one inner space serves image and text, with the biases of both as rows; where heads are normalised or
rotated the value/output product alone shrinks, also where a sibling reads an MLP's units behind the heads' outputs.
"""

import copy

import pytest
import torch

from comcat_hf import collect_statistics, compress, measure_latency, plan_of
from comcat_hf.compression.calibration.curvature import movements
from comcat_hf.errors import RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites, known_sites, read_ranks
from comcat_hf.modeling.hosts.diffusers import FAMILIES
from comcat_hf.modeling.sites.joint import fill_inputs, stacked
from comcat_hf.modeling.weights import class_path
from tests.compression.test_strategies import movement
from tests.helpers import assert_close, outputs
from tests.tuners.diffusion import TRANSFORMERS, build


# Those whose rows are not compressed.
REFUSED = {"lumina2": "several heads of queries share"}
# Few layers leave few choices.
SHARES = {"cogvideox": 0.067, "cogview4": 0.068, "dit": 0.068}
every = pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in REFUSED])


def test_every_class_is_among_the_models():
    found = {class_path(type(m)) for name in TRANSFORMERS for m in build(name)[0].modules()}
    assert {row.host for row in FAMILIES} <= found


@every
@pytest.mark.parametrize("ranks", [None, {"qk": 5, "vo": 11}, {"qk": 4, "vo": 3}])
@torch.no_grad()
def test_what_loses_nothing_is_exact(name, ranks):
    model, inputs = build(name)
    sites = find_sites(model, "attention")
    chosen = {n: {pair: (ranks or s.choices)[pair] for pair in s.choices} for n, s in sites.items()}
    for path, site in sites.items():
        for pair, role in (("qk", "key"), ("vo", "value")):
            if pair in site.choices:
                u, s, v = torch.linalg.svd(stacked(site.view, role), full_matrices=False)
                s[:, chosen[path][pair] :] = 0
                low = u * s.unsqueeze(1) @ v
                if site.view.family.fused:
                    site.view.projection(role, site.view.streams[0]).weight.copy_(low[..., :-1].flatten(0, 1))
                else:
                    fill_inputs(site.view, site.view.module, role, low)
    expected, before = outputs(model, inputs), sum(p.numel() for p in model.parameters())
    saved = sum(site.saved_parameters(pair, chosen[n][pair]) for n, site in sites.items() for pair in site.choices)
    apply_ranks(model, chosen)
    assert read_ranks(model) == chosen
    assert before - sum(p.numel() for p in model.parameters()) == saved
    assert_close(outputs(model, inputs), expected)


@every
def test_is_compressed_saved_and_loaded(name, tmp_path):
    model, inputs = build(name)
    # A list of images of several sizes is no batch of samples.
    for how in ({}, {"batches": [inputs]})[: 1 if name == "z-image" else 2]:
        share = SHARES.get(name, 0.061)
        small = compress(model, share, scope="attention", **how)
        assert share <= plan_of(small).reached <= share + 0.005
        small.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert all(map(torch.equal, outputs(loaded, inputs), outputs(small, inputs)))


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_a_whole_model_is_compressed_with_the_widths_of_its_mlps(name, tmp_path):
    model, inputs = build(name)
    small = compress(model, 0.3, batches=[inputs])
    assert 0.3 <= plan_of(small).reached <= 0.305
    assert [site.kind for site in find_sites(model, width=True).values()].count("mlp") == 1
    small.save_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(type(model).from_pretrained(tmp_path), inputs), outputs(small, inputs)))


@pytest.mark.parametrize("name", ["flux", "hunyuan-video"])
def test_a_projection_of_heads_and_mlp_is_one_site(name, tmp_path):
    """It loses the columns of the heads alone, and is not given a rank as a layer of its own."""
    model, inputs = build(name)
    blocks = [path for path, module in model.named_modules() if hasattr(module, "proj_out") and path]
    projections = {f"{path}.proj_out": model.get_submodule(path).proj_out for path in blocks}
    assert projections and not projections.keys() & find_sites(model).keys()
    small = compress(model, 0.1)
    for path, dense in projections.items():
        rank = plan_of(small).ranks[path.replace("proj_out", "attn")]["vo"]
        heads = model.config.num_attention_heads
        narrow = small.get_submodule(path)
        assert narrow.in_features == dense.in_features - heads * (model.config.attention_head_dim - rank)
        assert torch.equal(narrow.weight[:, heads * rank :], dense.weight[:, dense.out_features :])
    small.save_pretrained(tmp_path)
    assert all(map(torch.equal, outputs(type(model).from_pretrained(tmp_path), inputs), outputs(small, inputs)))
    assert not projections.keys() & known_sites(small).keys()


def test_rows_and_columns_of_an_mlp_in_the_same_layers_stay():
    model, inputs = build("flux2")
    path = "single_transformer_blocks.0.attn"
    dense = model.get_submodule(path)
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    for how in ({}, {"batches": [inputs] * 4}):
        small = compress(model, 0.05, scope="attention", **how)
        rank, narrow = plan_of(small).ranks[path]["vo"], small.get_submodule(path)
        rows = heads * (2 * width + rank)
        assert torch.equal(narrow.to_qkv_mlp_proj.weight[rows:], dense.to_qkv_mlp_proj.weight[3 * heads * width :])
        assert narrow.to_qkv_mlp_proj.out_features == dense.to_qkv_mlp_proj.out_features - heads * (width - rank)
        columns, before = narrow.to_out.weight[:, heads * rank :], dense.to_out.weight[:, heads * width :]
        assert columns.shape == before.shape
        assert how or torch.equal(columns, before)


def test_linear_attention_has_no_scores_to_compress():
    model, _ = build("sana", qk_norm=None)
    site = find_sites(model, "attention")["transformer_blocks.0.attn1"]
    assert list(site.choices) == ["vo"]
    with pytest.raises(RankPlanError, match="its attention is linear"):
        apply_ranks(model, {site.name: {"qk": 4}})


def test_latency_of_two_streams_is_that_of_both():
    model, inputs = build("flux")
    table = measure_latency(model, inputs, repeats=1, progress=False)
    assert table.total > 0
    tokens = {shape.rpartition(", ")[2] for shape in table.shapes if shape.startswith("attention")}
    assert tokens == {"21 tokens"}


def test_the_key_bias_of_two_streams_does_not_drop_out():
    model, inputs = build("sd3")
    expected = outputs(model, inputs)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn.to_k.bias.zero_()
            block.attn.add_k_proj.bias.zero_()
    with pytest.raises(AssertionError, match="off by"):
        assert_close(outputs(model, inputs), expected, 1e-3)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name not in REFUSED and name != "z-image"])
def test_curvature_tells_how_the_output_moves(name):
    """Of each choice at each of a few ranks, in the order in which truncating it alone moves the output."""
    model, inputs = build(name)
    # Each time with other random signs.
    found = collect_statistics(model, [inputs] * 16, scope="attention", curvature=True)
    moments = collect_statistics(model, [inputs], scope="attention")
    pairs = []
    for path, site in find_sites(model, "attention").items():
        for choice in site.choices:
            for rank in (4, 8, 12):
                small = copy.deepcopy(model)
                apply_ranks(small, {path: {choice: rank}}, statistics=moments)
                pairs.append((movements(found, site, choice)[rank], movement(model, small, inputs)))
    logs = torch.tensor(pairs).clamp(min=1e-12).log()
    assert torch.corrcoef(logs.T)[0, 1] > 0.8


def test_what_is_refused():
    model, _ = build("qwen")
    path = next(iter(find_sites(model, "attention")))
    with pytest.raises(RankPlanError, match=rf"^{path} is a .*rotates queries and keys"):
        apply_ranks(model, {path: {"qk": 2}})
    for name, why in REFUSED.items():
        model, _ = build(name)
        with pytest.raises(UnsupportedModuleError, match=why):
            find_sites(model, "attention")
