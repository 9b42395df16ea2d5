"""Compressed attention of two streams: one inner space for image and text, with the biases of both as rows."""

import copy

import diffusers
import pytest
import torch

from comcat_hf import collect_statistics, compress, plan_of
from comcat_hf.compression.calibration.curvature import movements
from comcat_hf.compression.calibration.outputs import Movement, main_output
from comcat_hf.errors import RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import apply_ranks, find_sites, read_ranks
from comcat_hf.modeling.sites.joint import fill_inputs, stacked
from tests.helpers import assert_close, outputs, randomize
from tests.tuners.diffusion import _ROWS


every = pytest.mark.parametrize("name", ["sd3", "sd3.5", "qwen"])


def model_of(name):
    cls, settings, inputs = _ROWS[name]
    return randomize(getattr(diffusers, cls)(**settings)).eval(), inputs


@every
@pytest.mark.parametrize("ranks", [None, {"qk": 5, "vo": 11}, {"qk": 4, "vo": 3}])
@torch.no_grad()
def test_what_loses_nothing_is_exact(name, ranks):
    model, inputs = model_of(name)
    sites = find_sites(model, "attention")
    chosen = {n: {pair: (ranks or s.choices)[pair] for pair in s.choices} for n, s in sites.items()}
    for path, site in sites.items():
        for pair, role in (("qk", "key"), ("vo", "value")):
            if pair in site.choices:
                u, s, v = torch.linalg.svd(stacked(site.view, role), full_matrices=False)
                s[:, chosen[path][pair] :] = 0
                fill_inputs(site.view, site.view.module, role, u * s.unsqueeze(1) @ v)
    expected, before = outputs(model, inputs), sum(p.numel() for p in model.parameters())
    saved = sum(site.saved_parameters(pair, chosen[n][pair]) for n, site in sites.items() for pair in site.choices)
    apply_ranks(model, chosen)
    assert read_ranks(model) == chosen
    assert before - sum(p.numel() for p in model.parameters()) == saved
    assert_close(outputs(model, inputs), expected)


@every
def test_is_compressed_saved_and_loaded(name, tmp_path):
    model, inputs = model_of(name)
    for how in ({}, {"batches": [inputs]}):
        small = compress(model, 0.061, scope="attention", **how)
        assert 0.061 <= plan_of(small).reached <= 0.066
        small.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert all(map(torch.equal, outputs(loaded, inputs), outputs(small, inputs)))


def test_the_key_bias_of_two_streams_does_not_drop_out():
    model, inputs = model_of("sd3")
    expected = outputs(model, inputs)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn.to_k.bias.zero_()
            block.attn.add_k_proj.bias.zero_()
    with pytest.raises(AssertionError, match="off by"):
        assert_close(outputs(model, inputs), expected, 1e-3)


@every
def test_curvature_tells_how_the_output_moves(name):
    """Of each choice at each of a few ranks, in the order in which truncating it alone moves the output."""
    model, inputs = model_of(name)
    found = collect_statistics(model, [inputs], scope="attention", curvature=True)
    moments = collect_statistics(model, [inputs], scope="attention")
    pairs = []
    for path, site in find_sites(model, "attention").items():
        for choice in site.choices:
            for rank in (4, 8, 12):
                small = copy.deepcopy(model)
                apply_ranks(small, {path: {choice: rank}}, statistics=moments)
                moved = Movement(model)
                with torch.no_grad():
                    moved.add(main_output(model(**inputs)), main_output(small(**inputs)))
                pairs.append((movements(found, site, choice)[rank], moved.total()))
    logs = torch.tensor(pairs).clamp(min=1e-12).log()
    assert torch.corrcoef(logs.T)[0, 1] > 0.8


def test_what_is_refused():
    model, _ = model_of("qwen")
    path = next(iter(find_sites(model, "attention")))
    with pytest.raises(RankPlanError, match=rf"^{path} is a .*rotates queries and keys"):
        apply_ranks(model, {path: {"qk": 2}})
    model, _ = model_of("flux")
    with pytest.raises(UnsupportedModuleError, match="built for Stable Diffusion 3 and Qwen-Image alone"):
        find_sites(model, "attention")
