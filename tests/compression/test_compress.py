"""One call from a dense model to a compressed one."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Swinv2Config, Swinv2ForImageClassification

from comcat_hf import RankPlan, allocate_ranks, collect_statistics, compress, count_parameters, plan_of
from comcat_hf.errors import BudgetError, InvalidValueError, RankPlanError, UnsupportedModuleError
from comcat_hf.modeling import LowRankAttention, LowRankLinear
from tests.helpers import (
    MODELS,
    assert_close,
    assert_unchanged,
    classes_of,
    images,
    outputs,
    small_bert,
    small_vit,
    state_of,
)


def swinv2():
    config = Swinv2Config(embed_dim=32, depths=[2, 2], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4)
    return Swinv2ForImageClassification(config).eval()


def test_the_input_is_left_as_it_was():
    model, inputs = small_vit()
    state, classes, config = state_of(model), classes_of(model), model.config.to_dict()
    gradients = [p.requires_grad for p in model.parameters()]
    before = outputs(model, inputs)
    small = compress(model, 0.4, batches=[inputs])
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert_unchanged(model, state, classes)
    assert model.config.to_dict() == config
    assert not hasattr(model.config, "quantization_config")
    assert "save_pretrained" not in vars(model)
    assert gradients == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), before, strict=True))


@pytest.mark.parametrize(
    ("strategy", "passes"), [("curvature", n) for n in (3, 60, 150, 400)] + [("sensitivity", 1300)]
)
def test_ctrl_c_leaves_the_model_as_it_was(strategy, passes):
    """In the statistics, the curvature, the sensitivities and the compensation."""
    model, inputs = small_vit()
    state, classes = state_of(model), classes_of(model)
    kept = [(module.training, len(module._forward_hooks), "forward" in vars(module)) for module in model.modules()]
    left = itertools.count(-passes)

    def stop(module, args):
        if next(left) == 0:
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(model, 0.4, batches=[inputs] * 2, strategy=strategy)
    finally:
        hook.remove()
    assert_unchanged(model, state, classes)
    assert kept == [(m.training, len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()]


def test_the_result_is_of_the_same_class_and_smaller():
    model, inputs = small_vit()
    small = compress(model, 0.4)
    assert type(small) is type(model)
    assert 0.4 <= 1 - count_parameters(small) / count_parameters(model) <= 0.405
    plan = plan_of(small)
    assert plan.reduction == 0.4
    assert plan.architecture == "ViTForImageClassification"
    assert {type(small.get_submodule(name)).__mro__[1] is LowRankAttention for name in plan.ranks} == {True, False}
    assert outputs(small, inputs)[0].shape == outputs(model, inputs)[0].shape


def test_higher_ranks_are_closer_and_full_rank_is_exact():
    model, inputs = small_vit()
    exact = outputs(model, inputs)
    full = {f"vit.layers.{i}.attention": {"qk": 16, "vo": 16} for i in range(2)}
    assert_close(outputs(compress(model, plan=RankPlan(full)), inputs), exact)
    errors = [(outputs(compress(model, share), inputs)[0] - exact[0]).norm() for share in (0.1, 0.4, 0.7)]
    assert 0 < errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "ViTModel", None])
def test_a_plan_of_the_same_family_is_taken(architecture):
    small = compress(small_vit()[0], plan=RankPlan({"vit.layers.0.attention": {"qk": 4}}, architecture=architecture))
    assert plan_of(small).architecture == "ViTForImageClassification"


@pytest.mark.parametrize("architecture", ["BertModel", "Tensor", "x"])
def test_a_plan_of_another_architecture_is_refused(architecture):
    plan = RankPlan({"vit.layers.0.attention": {"qk": 4}}, architecture=architecture)
    with pytest.raises(RankPlanError, match=f"for ViTForImageClassification, found one for {architecture}"):
        compress(small_vit()[0], plan=plan)


def correlated_images(count, seed):
    """Images of eight patterns: inputs far from white, as real ones are."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(8, 3 * 32 * 32, generator=generator)
    mix = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [4.0, 2, 1, 1, 1, 1, 1, 1]
    )
    return (mix @ patterns / 4).reshape(count, 3, 32, 32)


@pytest.mark.parametrize(
    ("scope", "mlp"), [("model", "rank"), ("model", "width"), ("attention", "rank"), ("mlp", "rank"), ("mlp", "width")]
)
@pytest.mark.parametrize("family", ["vit", "dinov2", "clip_vision"])
def test_batches_lower_the_error_also_on_other_images(family, scope, mlp):
    model, _ = MODELS[family]()
    seen, unseen = correlated_images(32, 1), correlated_images(32, 2)
    options = {"scope": scope, "mlp": mlp, "strategy": "uniform", "compensate": False}
    blind = compress(model, 0.4, **options)
    fitted = compress(model, 0.4, batches=seen.split(8), **options)

    def error(small, pixels):
        return (outputs(small, {"pixel_values": pixels})[0] - outputs(model, {"pixel_values": pixels})[0]).norm()

    assert plan_of(blind).ranks == plan_of(fitted).ranks
    assert error(fitted, seen) < 0.98 * error(blind, seen)
    assert error(fitted, unseen) < 0.98 * error(blind, unseen)


def test_with_batches_sizes_are_measured_and_outputs_compensated():
    model, _ = small_vit()
    seen, unseen = correlated_images(32, 1).split(8), {"pixel_values": correlated_images(32, 2)}
    small = compress(model, 0.4, batches=seen)
    plan = allocate_ranks(model, 0.4, strategy="curvature", batches=seen)
    assert plan_of(small).ranks == plan.ranks
    assert any("width" in entry for entry in plan.ranks.values() if isinstance(entry, dict))
    same = compress(model, plan=plan, batches=seen, compensate=True)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))
    exact = outputs(model, unseen)[0]
    plain = compress(model, 0.4, batches=seen, strategy="uniform", compensate=False)
    errors = [(outputs(one, unseen)[0] - exact).norm() for one in (small, plain)]
    assert errors[0] < errors[1]


def test_batches_are_read_once_and_equal_statistics():
    model, inputs = small_vit()
    options = {"strategy": "uniform", "compensate": False}
    reads = []

    def once():
        reads.append(True)
        yield inputs

    stream = once()
    small = compress(model, 0.4, batches=stream, **options)
    assert next(stream, None) is None
    assert len(reads) == 1
    statistics = collect_statistics(model, [inputs])
    same = compress(model, 0.4, statistics=statistics)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))


def test_a_plan_is_followed():
    model, inputs = small_vit()
    plan = RankPlan({"vit.layers.0.attention": {"qk": 5}, "vit.layers.1.mlp.fc2": 7, "classifier": 2})
    small = compress(model, plan=plan, batches=[inputs])
    assert plan_of(small).ranks == plan.ranks
    assert isinstance(small.vit.layers[1].mlp.fc2, LowRankLinear)
    assert small.vit.layers[0].attention.qk_rank == 5
    assert small.vit.layers[0].attention.vo_rank is None
    assert type(small.vit.layers[1].attention) is type(model.vit.layers[1].attention)


def test_a_plan_for_another_model_is_refused():
    model, _ = small_vit()
    for plan in (plan_of(compress(small_bert()[0], 0.3)), RankPlan({"vit.layers.7.attention": {"qk": 2}})):
        with pytest.raises(RankPlanError, match="ViTForImageClassification"):
            compress(model, plan=plan)
    with pytest.raises(RankPlanError, match=r"vit\.layers\.0\.attention.*1 to 16.*got 17"):
        compress(model, plan=RankPlan({"vit.layers.0.attention": {"qk": 17}}))


def test_arguments_that_do_not_go_together_are_refused():
    model, inputs = small_vit()
    plan = RankPlan({"classifier": 2})
    with pytest.raises(InvalidValueError, match="either reduction or plan"):
        compress(model)
    with pytest.raises(InvalidValueError, match="either reduction or plan"):
        compress(model, 0.5, plan=plan)
    with pytest.raises(InvalidValueError, match="give batches"):
        compress(model, 0.5, statistics=collect_statistics(model, [inputs]), compensate=True)
    with pytest.raises(TypeError, match="redaction"):
        compress(model, 0.5, redaction=0.5)
    with pytest.raises(InvalidValueError, match="empty"):
        compress(model, 0.4, batches=[])
    with pytest.raises(BudgetError):
        compress(model, 0.95)


def test_adapters_are_refused_with_the_way_out():
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(InvalidValueError, match="merge_and_unload"):
        compress(get_peft_model(small_vit()[0], lora), 0.4)
    model, _ = small_vit()
    model.add_adapter(lora, adapter_name="cat")
    with pytest.raises(InvalidValueError, match=r"adapters cat.*load the model again"):
        compress(model, 0.4)
    merged = get_peft_model(small_vit()[0], lora).merge_and_unload()
    assert compress(merged, 0.4)


@pytest.mark.parametrize("where", ["vit.layers.1.attention.v_proj", "vit.layers.0.mlp.fc1"])
def test_weights_that_are_not_finite_are_named(where):
    model, inputs = small_vit()
    with torch.no_grad():
        model.get_submodule(where).weight[0, 0] = float("nan")
    classes = classes_of(model)
    for options in ({}, {"batches": [inputs]}):
        with pytest.raises(InvalidValueError, match=where.rpartition(".")[0].replace(".", r"\.")):
            compress(model, 0.4, **options)
    assert classes_of(model) == classes


def test_modes_and_gradients_are_those_of_the_input():
    model, _ = small_vit()
    assert not any(module.training for module in compress(model, 0.4).modules())
    model.train()
    model.vit.layers[0].requires_grad_(False)
    small = compress(model, 0.4)
    assert all(module.training for module in small.modules())
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == (not name.startswith("vit.layers.0.")), name
        assert parameter.is_leaf


@pytest.mark.parametrize("family", ["vit", "bert", "clip_classifier"])
def test_trains_afterwards(family):
    model, inputs = MODELS[family]()
    small = compress(model, 0.5).train()
    before = state_of(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.05)
    small(**inputs, labels=torch.tensor([0, 1])).loss.backward()
    factors = [n for n, m in small.named_modules() if isinstance(m, (LowRankAttention, LowRankLinear))]
    for name, parameter in small.named_parameters():
        if any(name.startswith(f"{factor}.") for factor in factors):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all()
    optimizer.step()
    changed = [name for name, tensor in small.state_dict().items() if not torch.equal(tensor, before[name])]
    assert all(any(name.startswith(f"{factor}.") for name in changed) for factor in factors)


def test_bfloat16_stays_bfloat16():
    model, inputs = small_vit()
    exact = outputs(compress(model, 0.3, batches=[inputs]), inputs)[0]
    half = {k: v.bfloat16() for k, v in inputs.items()}
    small = compress(copy.deepcopy(model).bfloat16(), 0.3, batches=[half])
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    found = outputs(small, half)[0].float()
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_the_mlp_of_unknown_attention_can_be_compressed():
    model = swinv2()
    for options in ({}, {"batches": [images()]}, {"metric": "macs"}):
        small = compress(model, 0.25, scope="mlp", **options)
        assert 0.25 <= plan_of(small).reached <= 0.255
        assert all(isinstance(rank, int) for rank in plan_of(small).ranks.values())
        assert small(pixel_values=images()).logits.isfinite().all()
    for scope in ("model", "attention"):
        with pytest.raises(UnsupportedModuleError, match=r"layers\.0.*Swinv2Attention.*scope='mlp'"):
            compress(model, 0.25, scope=scope)


def test_what_is_left_can_be_compressed_later():
    model, inputs = small_vit()
    once = compress(model, 0.3, scope="attention", batches=[inputs])
    twice = compress(once, 0.3, scope="mlp", batches=[inputs])
    assert set(plan_of(twice).ranks) > set(plan_of(once).ranks)
    assert all(plan_of(twice).ranks[name] == ranks for name, ranks in plan_of(once).ranks.items())
