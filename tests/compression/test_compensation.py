"""Compensation: layer by layer, on what the compressed layers before produce."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from comcat_hf import (
    ComCATConfig,
    allocate_ranks,
    collect_statistics,
    compress,
    count_parameters,
    initialize_comcat_weights,
)
from comcat_hf.closed_forms.attention import AttentionMoments
from comcat_hf.compression.fitting import compensation
from comcat_hf.compression.fitting.compensation import compress_in_order
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import apply_ranks, find_sites, read_ranks
from tests.helpers import MODELS, outputs


# Pre-norm, pre-norm with a scale on each layer's output, post-norm.
HOSTS = ("vit", "dinov2", "bert")


def batches_for(model, inputs, count=6):
    """Different inputs, correlated as those of images and texts are."""
    made = []
    for index in range(count):
        torch.manual_seed(index)
        batch = dict(inputs)
        if "pixel_values" in batch:
            shape = batch["pixel_values"].shape
            batch["pixel_values"] = torch.randn(shape).cumsum(-1).cumsum(-2) / 10
        else:
            batch["input_ids"] = torch.randint(0, model.config.vocab_size, batch["input_ids"].shape)
        made.append(batch)
    return made


def scaled(model):
    """Larger weights than at random initialisation, so that every layer matters."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.mul_(4)
        for name, parameter in module.named_parameters(recurse=False):
            if "lambda" in name:
                parameter.data.uniform_(0.2, 1.5)
    return model


@pytest.fixture(params=HOSTS)
def host(request):
    torch.manual_seed(0)
    model, inputs = MODELS[request.param]()
    return scaled(model), inputs


def states(model, batch):
    output = model(**batch)
    return output["last_hidden_state"] if "last_hidden_state" in output else output["logits"]


@torch.no_grad()
def error(model, dense, batches):
    pairs = [(states(model, batch), states(dense, batch)) for batch in batches]
    return sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)


def test_the_stream_is_found_in_every_block(host, monkeypatch):
    model, inputs = host
    found = {}
    find = compensation._find_residual
    monkeypatch.setattr(
        compensation, "_find_residual", lambda seen, name: found.setdefault(name, find(seen, name)) or found[name]
    )
    ranks = {n: s.entry(dict.fromkeys(s.choices, 4)) for n, s in find_sites(model).items() if "." in n}
    compress_in_order(copy.deepcopy(model), ranks, batches_for(model, inputs, 1))
    ends = [n for n in ranks if "attention" in n or n.endswith(("fc2", "weights_out"))]
    ends += [n for n in ranks if n.endswith("output.dense")]
    assert ends
    assert all(found[name] is not None for name in ends)
    assert all((residual.scale > 0).all() for residual in found.values() if residual is not None)


# The norm that takes the residual stream behind the first block's attention.
BEHIND_ATTENTION = {
    "ViTForImageClassification": "vit.layers.0.layernorm_after",
    "Dinov2ForImageClassification": "dinov2.encoder.layer.0.norm2",
    "BertForSequenceClassification": "bert.encoder.layer.0.attention.output.LayerNorm",
}


@torch.no_grad()
def streams(model, batches):
    seen = []
    norm = model.get_submodule(BEHIND_ATTENTION[type(model).__name__])
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    return seen


def test_the_stream_is_nearer_to_the_dense_one_than_without(host):
    model, inputs = host
    batches = [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches_for(model, inputs, 8)]
    plan = allocate_ranks(model, 0.5, scope="attention")
    plain = compress(model, plan=plan, statistics=collect_statistics(model, batches))
    small = copy.deepcopy(model)
    compress_in_order(small, plan.ranks, batches)
    assert read_ranks(small) == dict(plan.ranks)
    dense, without, fitted = (streams(m, batches) for m in (model, plain, small))
    before = sum((a - b).square().sum() for a, b in zip(without, dense, strict=True))
    after = sum((a - b).square().sum() for a, b in zip(fitted, dense, strict=True))
    # Least squares pulled toward the same factors can only be nearer, on the data it was fitted to.
    assert after < 0.98 * before


def test_compensation_needs_batches(host):
    model, _ = host
    with pytest.raises(InvalidValueError, match="batches"):
        compress(model, 0.3, compensate=True)


def test_a_whole_model_with_its_classifier(host):
    model, inputs = host
    batches = batches_for(model, inputs, 4)
    small = compress(model, 0.4, batches=batches, compensate=True)
    reached = 1 - count_parameters(small) / count_parameters(model)
    assert 0.4 <= reached <= 0.405
    assert all(value.isfinite().all() for value in outputs(small, inputs))


def test_full_rank_changes_nothing(host):
    model, inputs = host
    batches = batches_for(model, inputs, 8)
    ranks = {n: s.entry(dict(s.choices)) for n, s in find_sites(model, "attention").items()}
    small = copy.deepcopy(model)
    compress_in_order(small, ranks, batches)
    assert error(small, model, batches) < 1e-6


def test_hooks_are_gone_and_the_mode_is_as_it_was(host):
    model, inputs = host
    model.train()
    plan = allocate_ranks(model, 0.3)
    small = copy.deepcopy(model)
    compress_in_order(small, plan.ranks, batches_for(model, inputs, 2))
    assert all(module.training for module in small.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
    assert len(outputs(small.eval(), inputs)) == len(outputs(model.eval(), inputs))


def test_a_batch_that_does_not_fit_is_named(host):
    model, inputs = host
    name = model.main_input_name
    batch = {name: inputs[name][:, :1] if inputs[name].ndim > 2 else torch.full_like(inputs[name], 10**6)}
    with pytest.raises(InvalidValueError, match="batch 0 does not fit"):
        compress(model, 0.3, batches=[batch], compensate=True)


def test_the_drift_passes_through_a_block_that_stays_dense(monkeypatch):
    torch.manual_seed(0)
    model, inputs = MODELS["vit"](num_hidden_layers=3)
    scaled(model)
    drift = {}
    init = compensation._Block.__init__

    def watched(block, model, path, calls, *how):
        init(block, model, path, calls, *how)
        drift[path] = float((calls.small_in[0] - calls.dense_in[0]).abs().max())

    monkeypatch.setattr(compensation._Block, "__init__", watched)
    ranks = {f"vit.layers.{index}.attention": {"qk": 2, "vo": 2} for index in (0, 2)}
    compress_in_order(copy.deepcopy(model), ranks, batches_for(model, inputs, 2))
    assert drift["vit.layers.0"] == 0
    assert drift["vit.layers.2"] > 1e-3


def with_norms(value):
    """Layer norms that pass next to nothing on: every layer's input is its bias."""
    model, inputs = MODELS["vit"]()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.fill_(value)
            module.bias.data.zero_()
    return model, inputs["pixel_values"]


@pytest.mark.parametrize("value", [1e-10, 1e-30, 0])
@pytest.mark.parametrize(("mlp", "strategy"), [("width", "sensitivity"), ("rank", "uniform"), ("width", "spectrum")])
def test_inputs_that_hardly_vary_give_finite_weights(value, mlp, strategy):
    model, images = with_norms(value)
    for batches in ([images], [torch.zeros_like(images)], list(images.split(1))):
        small = compress(model, 0.4, batches=batches, mlp=mlp, strategy=strategy)
        assert all(parameter.isfinite().all() for parameter in small.parameters())
        assert error(small, model, [{"pixel_values": images}]) < 1


def test_moments_that_give_nothing_finite_are_left_out(caplog):
    model, _ = MODELS["vit"]()
    sites = find_sites(model, "attention")
    ranks = {name: {"qk": 3, "vo": 5} for name in sites}
    shape = (sites["vit.layers.0.attention"].view.num_heads, 16, 16)
    one = torch.eye(16, dtype=torch.float64).expand(shape)
    moments = AttentionMoments(one * 1e-290, one, one * 1e-290, one[:, 0])
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    apply_ranks(expected, ranks)
    apply_ranks(found, ranks, statistics=dict.fromkeys(ranks, moments))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert [r.getMessage().partition(" would")[0] for r in caplog.records] == [
        "Fitted to the calibration data, the weights of vit.layers.0.attention, vit.layers.1.attention"
    ]
    adapted = get_peft_model(copy.deepcopy(model), ComCATConfig(rank_pattern=ranks))
    caplog.clear()
    initialize_comcat_weights(adapted, dict.fromkeys(ranks, moments))
    assert "vit.layers.0.attention, vit.layers.1.attention would not be finite" in caplog.text
    assert all(
        torch.equal(a, b) for a, b in zip(adapted.merge_and_unload().parameters(), expected.parameters(), strict=True)
    )


def test_weights_that_overflow_by_themselves_are_refused():
    model, _ = MODELS["vit"]()
    attention = model.vit.layers[1].attention
    attention.v_proj.bias.data.fill_(6e4)
    with pytest.raises(InvalidValueError, match=r"vit\.layers\.1\.attention: expected finite factors.*torch\.float16"):
        compress(model.half(), 0.4)


def test_outputs_that_cannot_be_fitted_again_keep_the_closed_form(caplog):
    model, inputs = MODELS["vit"]()
    # Of hidden units as small as these any drift would take infinite weights.
    for parameter in model.vit.layers[1].mlp.fc1.parameters():
        parameter.data.mul_(1e-42)
    ranks = {name: site.entry(dict.fromkeys(site.choices, 8)) for name, site in find_sites(model, "mlp").items()}
    ranks |= {"vit.layers.0.attention": {"qk": 2, "vo": 2}}
    compress_in_order(model, ranks, [inputs])
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [r.getMessage().partition(" would")[0] for r in caplog.records] == [
        "Fitted to the calibration data, the weights of vit.layers.1.mlp.fc2"
    ]


@pytest.mark.parametrize("key", HOSTS)
def test_attention_that_is_run_once_gives_the_same_as_attention_that_is_run_again(key):
    torch.manual_seed(0)
    model, inputs = MODELS[key]()
    scaled(model)
    batches = batches_for(model, inputs, 3)
    plan = allocate_ranks(model, 0.3, strategy="uniform", mlp="width")
    found = []
    # Eager attention gives its scores too, so its outputs are not kept.
    for kernel in ("sdpa", "eager"):
        model.set_attn_implementation(kernel)
        found.append(compress(model, plan=plan, batches=batches).state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-3, rtol=1e-3, msg=name)
