"""Refinement: factors are trained on the dense model's hidden states, without labels."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTForImageClassification

from comcat_hf import compress, refine
from comcat_hf.compression.fitting import refinement
from comcat_hf.compression.fitting.descent import Descent
from comcat_hf.errors import ComCATError, InvalidValueError
from tests.compression.test_compensation import error
from tests.helpers import MODELS, small_bert, state_of


TARGETS = {"clip": {"target_modules": ["vision_model"]}}


def batches_of(name, count, seed, size=16):
    """Images of a few patterns, and texts of unlike lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(6, 3 * 32 * 32, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        batch = {}
        if name != "bert":
            batch["pixel_values"] = (torch.randn(size, 6, generator=generator) @ patterns).view(size, 3, 32, 32)
        if name != "vit":
            lengths = torch.randint(4, 11, (size, 1), generator=generator)
            batch["attention_mask"] = (torch.arange(10) < lengths).long()
            ids = torch.randint(3, 9, (size, 10), generator=generator)
            # CLIP reads its text off the end token.
            batch["input_ids"] = torch.where(torch.arange(10) < lengths - 1, ids, 2)
        yield batch


def compressed(name, dtype=torch.float32, **how):
    torch.manual_seed(0)
    dense = MODELS[name]()[0].to(dtype)
    batches = [
        {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
        for batch in batches_of(name, 6, seed=1)
    ]
    # Of the weights alone, so that there is much to gain.
    return dense, compress(dense, 0.4, mlp="width", progress=False, **TARGETS.get(name, {}), **how), batches


def changed(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def surroundings(model):
    return [
        (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ] + [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]


@pytest.fixture(scope="module")
def vit():
    return compressed("vit")


@pytest.fixture
def small(vit):
    return copy.deepcopy(vit[1])


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("name", ["vit", "bert", "clip"])
def test_factors_alone_change_and_drift_less(name, by_block):
    dense, small, batches = compressed(name)
    small.train()
    dense_before, before, around = state_of(dense), state_of(small), [surroundings(m) for m in (dense, small)]
    start = copy.deepcopy(small).eval()
    found = refine(small, dense, iter(batches), 60, by_block=by_block, progress=False)
    assert found.after < found.before * 0.9
    factors = {n for n, p in small.named_parameters() if n not in dense_before or dense_before[n].shape != p.shape}
    owners = {n.rpartition(".")[0] for n in factors}
    new = changed(small, before)
    assert new
    assert {n.rpartition(".")[0] for n in new} <= owners
    assert by_block or factors <= new
    assert not changed(dense, dense_before)
    assert around == [surroundings(m) for m in (dense, small)]
    small.eval()
    if name != "clip":
        held = [{**batch} for batch in batches_of(name, 4, seed=2)]
        assert error(small, dense, held) < error(start, dense, held)


def test_compress_refines_at_the_end(vit):
    dense, _, batches = vit
    how = {"strategy": "uniform", "compensate": False, "progress": False}
    start, at_once = (compress(dense, 0.4, batches=iter(batches), refine=steps, **how) for steps in (0, 6))
    first, again, other = (copy.deepcopy(start) for _ in range(3))
    for small, seed in ((first, 0), (again, 0), (other, 1)):
        refine(small, dense, batches, 6, seed=seed, progress=False)
    assert changed(first, state_of(start))
    assert not changed(first, state_of(again))
    assert not changed(first, state_of(at_once))
    assert changed(first, state_of(other))


@pytest.mark.parametrize("by_block", [False, True])
def test_never_worse_than_before_and_says_that_nothing_was_gained(vit, small, by_block, caplog):
    dense, before, batches = vit
    found = refine(small, dense, batches, 10, by_block=by_block, learning_rate=10.0, progress=False)
    assert "gained nothing" in caplog.text and "learning_rate below 10" in caplog.text
    assert found.after == found.before
    assert not changed(small, state_of(before))


@pytest.mark.parametrize(("steps", "rate"), [(100, 0.0075), (1600, 0.03), (10_000, 0.03)])
def test_the_usual_learning_rate_rises_with_the_steps_up_to_a_limit(vit, small, steps, rate, monkeypatch):
    dense, _, batches = vit
    rates = []
    monkeypatch.setattr(Descent, "run", lambda self, *_: rates.append(self.learning_rate))
    refine(small, dense, batches, steps, progress=False)
    assert rates == [pytest.approx(rate)]


@pytest.mark.parametrize("by_block", [False, True])
def test_weights_that_overflow_leave_the_model_as_it_was(vit, small, by_block):
    dense, before, batches = vit
    with pytest.raises(ComCATError, match="not finite, so the model was left as it was"):
        refine(small, dense, batches, 10, by_block=by_block, learning_rate=1e30, progress=False)
    assert not changed(small, state_of(before))


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("passes", [3, 400])
def test_ctrl_c_keeps_the_best_so_far(vit, small, passes, by_block):
    dense, before, batches = vit
    around = [surroundings(m) for m in (dense, small)]
    left = itertools.count(-passes)

    def stop(module, args):
        if isinstance(module, nn.GELU | nn.LayerNorm) and next(left) == 0:
            raise KeyboardInterrupt

    hook = nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            refine(small, dense, batches, 100, by_block=by_block, progress=False)
    finally:
        hook.remove()
    assert around == [surroundings(m) for m in (dense, small)]
    assert bool(changed(small, state_of(before))) == (passes == 400)
    assert error(small, dense, batches) <= error(before, dense, batches)


@pytest.mark.parametrize("by_block", [False, True])
def test_half_precision_is_trained_in_full(by_block):
    dense, small, batches = compressed("vit", torch.bfloat16)
    before = state_of(small)
    found = refine(small, dense, batches, 40, by_block=by_block, progress=False)
    assert found.after < found.before
    assert changed(small, before)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("by_block", [False, True])
def test_callers_without_gradients(mode, by_block):
    with mode():
        dense, small, batches = compressed("bert")
        found = refine(small, dense, batches, 40, by_block=by_block, progress=False)
        assert not torch.is_grad_enabled()
    assert found.after < found.before


def test_states_that_are_not_kept_are_computed_again(vit, small, monkeypatch):
    dense, before, batches = vit
    other = copy.deepcopy(before)
    refine(small, dense, batches, 10, progress=False)
    monkeypatch.setattr(refinement, "_KEPT", 0)
    refine(other, dense, batches, 10, progress=False)
    assert not changed(small, state_of(other))


@pytest.mark.parametrize("by_block", [False, True])
def test_what_no_step_comes_to_is_not_run(vit, small, by_block):
    dense, _, batches = vit
    # The first block runs once a mini-batch of four: of 24, three are kept apart and five learned.
    parts = {"batch_size": 4, "steps": 5, "by_block": by_block, "progress": False}
    seen = []
    hook = dense.get_submodule("vit.layers.0").register_forward_pre_hook(lambda block, args: seen.append(len(args[0])))
    try:
        refine(small, dense, batches, **parts)
    finally:
        hook.remove()
    assert set(seen) == {4}
    assert len(seen) <= 2 * 8


def test_both_models_draw_the_same_random_numbers():
    dense, _ = MODELS["vit_mae"]()
    images = torch.cat([batch["pixel_values"] for batch in batches_of("vit", 2, seed=1)])
    small = compress(dense, 0.01, batches=[images], strategy="uniform", compensate=False, progress=False)
    state = torch.get_rng_state()
    # Without noise of ours: it decides which patches are masked.
    assert refine(small, dense, [images], 2, progress=False).before < 0.2
    assert torch.equal(state, torch.get_rng_state())


class Silent(ViTForImageClassification):
    @torch.no_grad()
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1, found 0"),
        ({"steps": True}, "steps: expected a whole number"),
        ({"batch_size": 0}, "batch_size: expected a whole number from 1"),
        ({"learning_rate": float("nan")}, "learning_rate: expected a finite number above 0"),
        ({"batches": []}, "calibration batches are empty"),
        ({"batches": torch.zeros(4, 3, 32, 32)}, "expected several"),
        ({"batches": [torch.zeros(1, 3, 32, 32)]}, "expected at least two samples.*found one"),
        ({"batches": [{"pixel_values": torch.zeros(4, 3, 32, 32), "other": torch.zeros(3)}]}, "disagree on how many"),
        ({"batches": [torch.full((4, 3, 32, 32), torch.nan)]}, "dense model's hidden states are not finite"),
        ({"batches": [torch.zeros(4, 1, 32, 32)]}, "batch 0 does not fit"),
        ({"dense": small_bert()[0]}, "expected the ViTForImageClassification .* found BertForSequenceClassification"),
        ({"model": "dense"}, "expected compressed layers, found none in ViTForImageClassification"),
        ({"model": None}, "expected a torch.nn.Module"),
    ],
)
def test_what_cannot_be_refined(vit, small, given, message):
    dense, before, batches = vit
    given = {"model": small, "dense": dense, "batches": batches, "steps": 4, "progress": False} | given
    if given["model"] == "dense":
        given["model"] = copy.deepcopy(dense)
    with pytest.raises(InvalidValueError, match=message):
        refine(**given)
    assert not changed(small, state_of(before))


@pytest.mark.parametrize("by_block", [False, True])
def test_dense_states_that_are_not_finite_on_a_batch_to_learn_from(vit, small, by_block):
    dense, before, batches = vit
    # The first batches are also measured on.
    batches = [*batches[:-1], {"pixel_values": torch.full_like(batches[-1]["pixel_values"], torch.nan)}]
    around = [surroundings(m) for m in (dense, small)]
    with pytest.raises(InvalidValueError, match="dense model's hidden states are not finite"):
        refine(small, dense, batches, 40, by_block=by_block, progress=False)
    assert not changed(small, state_of(before))
    assert [surroundings(m) for m in (dense, small)] == around


def test_a_model_without_gradients_is_named(vit, small):
    dense, before, batches = copy.deepcopy(vit)
    dense.__class__ = small.__class__ = Silent
    with pytest.raises(ComCATError, match=r"gives no gradients \(.*\), so it was left as it was"):
        refine(small, dense, batches, 4, progress=False)
    assert not changed(small, state_of(before))


def test_adapters_are_merged_first(vit, small):
    dense, _, batches = vit
    adapted = get_peft_model(small, LoraConfig(target_modules=["fc1"]))
    with pytest.raises(InvalidValueError, match="carries the adapters default"):
        refine(adapted, dense, batches, 4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"refine": 10}, "refine=10 trains the factors on real inputs: give batches"),
        ({"refine": -1, "batches": True}, "refine: expected a whole number from 0, found -1"),
        ({"refine": True, "batches": True}, "refine: expected a whole number"),
    ],
)
def test_what_compress_cannot_refine(vit, how, message):
    dense, _, batches = vit
    with pytest.raises(InvalidValueError, match=message):
        compress(dense, 0.4, **how | ({"batches": batches} if "batches" in how else {}))
