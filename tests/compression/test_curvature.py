"""Curvature: gradients against autograd on an inserted matrix, movements against formulas, plans, and bad input."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import comcat_hf
from comcat_hf import allocate_ranks, collect_statistics, compress, measure_sensitivities
from comcat_hf.closed_forms.width import narrow_mlp
from comcat_hf.compression.calibration import curvature
from comcat_hf.compression.calibration.curvature import movements
from comcat_hf.compression.calibration.outputs import main_output
from comcat_hf.compression.calibration.probes import Probe
from comcat_hf.compression.fitting.compensation import compress_in_order
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import AttentionSite, LinearSite, MLPSite, find_sites
from tests.architectures import ARCHITECTURES
from tests.compression.test_statistics import doubled
from tests.helpers import MODELS, assert_unchanged, classes_of, small_bert, small_clip, small_vit, state_of


def inserted(model, inputs):
    """Gradients per sample with respect to an identity in every pair, or a zero added to the output of a layer."""
    sites = find_sites(model, width=True)
    added, handles, hidden = {}, [], {}

    def matrices(site, mean=0.0):
        def insert(states):
            heads, size, values = site.view.num_heads, site.view.head_dim, isinstance(mean, torch.Tensor)
            states = site.view.attended(states) if values else states
            # Packed tokens are samples of their own.
            rows = states.flatten(1, -2) if states.ndim > 2 else states[:, None]
            one = torch.eye(size, dtype=dtype).expand(len(states), heads, size, size).clone().requires_grad_()
            added.setdefault((site.name, "vo" if values else "qk"), []).append(one)
            moved = torch.einsum("bnhi,bhij->bnhj", (rows - mean).unflatten(-1, (heads, size)), one).flatten(-2) + mean
            return site.view.attended(moved.reshape(states.shape)) if values else moved.reshape(states.shape)

        return insert

    def output(site):
        def insert(module, args, output):
            zero = torch.zeros_like(output).requires_grad_()
            added.setdefault((site.name, "output"), []).append(zero)
            hidden.setdefault(site.name, []).append((args[0].detach(), output.detach()))
            return output + zero

        return insert

    statistics, dtype = collect_statistics(model, [inputs]), next(model.parameters()).dtype
    for site in sites.values():
        if isinstance(site, AttentionSite):
            query, vo = matrices(site), matrices(site, statistics[site.name].attended_mean.to(dtype).flatten())
            hook = site.view.query.register_forward_hook(lambda m, a, o, f=query: f(o))
            handles.append(hook)
            handles.append(site.view.output.register_forward_pre_hook(lambda m, a, f=vo: (f(a[0]), *a[1:])))
        else:
            handles.append(site.output_layer[1].register_forward_hook(output(site)))
    found = main_output(model(**inputs))
    mask = inputs.get("attention_mask")
    scalar, weight = Probe(model)(found, mask if mask is not None and mask.ndim == 2 else None)
    scalar.backward()
    for handle in handles:
        handle.remove()
    samples = len(next(iter(found.values())))
    gradients = {
        (name, what): [t.grad if what == "output" else _by_sample(t.grad, samples) for t in tensors]
        for (name, what), tensors in added.items()
        if tensors[0].grad is not None
    }
    return sites, statistics, gradients, hidden, weight, samples


def _by_sample(gradients, samples):
    """Sums over the windows of one sample, or the tokens of one output."""
    return gradients.unflatten(0, (samples, -1)).sum(1) if len(gradients) > samples else gradients


def close(found, expected, tolerance=1e-5, where="", scale=None):
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    error = (found - expected).norm() / (expected.norm() if scale is None else scale).clamp(min=1e-12)
    assert error <= tolerance, f"{where} is off by {error:.1e}"


@pytest.mark.parametrize(
    "family", [n for n in {**MODELS, **ARCHITECTURES} if n not in ("vit_mae", "florence2_vision")]
)
def test_equal_autograd_on_what_is_inserted(family):
    """All sums of every site: of attention, of linear layers and of MLPs, with masks."""
    model, inputs = {**MODELS, **ARCHITECTURES}[family]()
    if family in (
        "altclip_text",
        "xclip_vision",
        "mllama_vision",
        "segformer",
        "sam",
        "hiera",
        "sam2_hiera",
    ):
        # In single precision some of these sums nearly cancel.
        model, inputs = model.double(), doubled(inputs)
    model.requires_grad_(False)
    sites, statistics, gradients, hidden, weight, samples = inserted(model, inputs)
    gathered = collect_statistics(model, [inputs], curvature=True, mlp="mixed")
    for name, site in sites.items():
        sums = gathered.sums[site.moments_path]
        close(sums.values["weight"], torch.tensor(weight))
        if isinstance(site, AttentionSite):
            for choice in site.choices:
                found = sum(gradients.get((name, choice), [torch.zeros(1, *site.moments_shape)])).double()
                close(sums.values[f"{choice}_left"], (found @ found.mT).sum(0))
                close(sums.values[f"{choice}_right"], (found.mT @ found).sum(0))
                left, right = site.maps(choice, statistics[name])
                for rank in (1, site.choices[choice] // 2):
                    error = left[:, :, :rank] @ right[:, :, :rank].mT - torch.eye(left.shape[1], dtype=torch.float64)
                    moved = (error * found).sum((1, 2, 3)).square().sum() / max(weight, 1e-300)
                    close(sums.moved(choice)[rank], moved, 1e-4, f"{name}, {choice} at {rank}")
                assert sums.moved(choice)[-1] <= 1e-6 * sums.moved(choice)[0] + 1e-20
        elif (name, "output") in gradients:
            rows = torch.cat([g.flatten(0, -2) for g in gradients[name, "output"]])
            close(sums.values["gradient"], rows.mT @ rows)
            choice = "width" if isinstance(site, MLPSite) else "rank"
            for rank in (next(iter(movements(gathered, site, choice))), max(site.full_ranks[choice] // 2, 1)):
                # With no more tokens than units kept the refit is exact, and what remains is its ridge.
                tokens = sum(entered[..., 0].numel() for entered, _ in hidden[name])
                if rank not in movements(gathered, site, choice) or (choice == "width" and tokens <= rank):
                    continue
                total = 0.0
                for (entered, left), gradient in zip(hidden[name], gradients[name, "output"], strict=True):
                    now = _at_rank(site, rank, statistics[site.moments_path], entered)
                    by_sample = ((now - left) * gradient).reshape(len(gradient), -1).double().sum(1)
                    total = total + _by_sample(by_sample, samples)
                # Not always that of rank 0, at which cuts of several directions may cancel.
                largest = sums.moved(choice).max()
                close(movements(gathered, site, choice)[rank], total.square().sum() / weight, 1e-4, name, largest)


def _at_rank(site, rank, moments, entered):
    """What the layer gives when its site alone is truncated, of what it gets in the dense model."""
    if isinstance(site, LinearSite):
        substitutes = site.substitutes({"rank": rank})
        site.initialize(substitutes, moments)
        return substitutes[site.name](entered)
    units = site.prepare(moments)
    factors = narrow_mlp(site.view.output.weight, site.view.output.bias, rank, units)
    return F.linear(entered[..., factors.units], factors.output_weight, factors.output_bias)


@pytest.mark.parametrize("build", [small_vit, small_bert, small_clip])
def test_tells_what_truncation_does_to_the_output(build):
    """Ranks of all sites in the order in which measuring them one by one puts them."""
    model, inputs = build()
    more = [{k: _shifted(v, i) for k, v in inputs.items()} for i in range(8)]
    gathered = collect_statistics(model, more, curvature=True)
    measured = measure_sensitivities(model, more, statistics=collect_statistics(model, more))
    sites = find_sites(model, width=True)
    pairs = [
        (movements(gathered, sites[name], choice)[rank], value)
        for (name, choice), values in measured.items()
        for rank, value in values.items()
        if choice != "width" and value > 1e-9
    ]
    logs = torch.tensor(pairs).log()
    assert len(pairs) > 8
    assert torch.corrcoef(logs.T)[0, 1] > 0.9


def _shifted(value, index):
    if value.is_floating_point():
        return value + 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(index))
    return value


def test_towers_may_see_different_numbers_of_samples():
    model, inputs = small_clip()
    apart = {
        name: torch.cat([value, value[:1]]) if name != "pixel_values" else value for name, value in inputs.items()
    }
    small = compress(model, 0.3, batches=[apart])
    alike = collect_statistics(model, [inputs], curvature=True)
    more = collect_statistics(model, [apart], curvature=True)
    seen = [name for name, sums in alike.sums.items() if name.startswith("vision") and sums.has_curvature]
    assert seen and all(more.sums[name].values.keys() == alike.sums[name].values.keys() for name in seen)
    assert comcat_hf.plan_of(small).strategy == "curvature"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_leaves_the_model_as_it_was(context):
    model, inputs = small_vit()
    model.train()
    model.classifier.weight.requires_grad_(False)
    state, classes = state_of(model), classes_of(model)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with context():
        batches = [{k: v * 1 for k, v in inputs.items()}]
        found = collect_statistics(model, batches, curvature=True)
        with pytest.raises(InvalidValueError, match="not finite"):
            collect_statistics(model, [{"pixel_values": inputs["pixel_values"] * float("nan")}], curvature=True)
    assert found.has_curvature
    assert_unchanged(model, state, classes)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )


def test_does_not_depend_on_how_batches_are_cut():
    """Of logits: classes are drawn in the order of the samples."""
    model, inputs = small_vit()
    one = collect_statistics(model, [inputs], curvature=True)
    two = collect_statistics(model, [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(2)], curvature=True)
    for name, sums in one.sums.items():
        for key, value in sums.values.items():
            close(two.sums[name].values[key], value)


def test_are_kept_in_files_and_add_up(tmp_path):
    model, inputs = small_vit()
    found = collect_statistics(model, [inputs], curvature=True)
    found.save_pretrained(tmp_path)
    again = comcat_hf.Statistics.from_pretrained(tmp_path)
    assert again.has_curvature
    plans = [allocate_ranks(model, 0.4, statistics=statistics) for statistics in (found, again, found + again)]
    assert plans[0].strategy == "curvature"
    assert plans[0].ranks == plans[1].ranks == plans[2].ranks
    assert not (found + collect_statistics(model, [inputs])).has_curvature


def test_factors_see_what_the_output_sees():
    """Both pairs of a layer, and nothing else of the same ranks."""
    model, inputs = small_vit()
    found = collect_statistics(model, [inputs], curvature=True)
    plain = collect_statistics(model, [inputs])
    plan = allocate_ranks(model, 0.5, strategy="uniform", mlp="width")
    weighted, unweighted = (compress(model, plan=plan, statistics=each) for each in (found, plain))
    differing = [n for n, p in weighted.named_parameters() if not torch.equal(p, unweighted.get_parameter(n))]
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name.split(".")[-2] for name in differing}


def test_covariances_are_not_held_where_only_the_curvature_is_read():
    model, inputs = small_vit()
    found = collect_statistics(model, [inputs], curvature=True)
    for site in find_sites(model, width=True).values():
        moments = found[site.moments_path]
        held = weakref.ref(moments)
        with curvature._metering(site, moments):
            del moments
            gc.collect()
            assert held() is None
    plan = allocate_ranks(model, 0.4, statistics=found)
    small = [copy.deepcopy(model) for _ in range(2)]
    for one, statistics in zip(small, (found, found.without_moments()), strict=True):
        compress_in_order(one, plan.ranks, [inputs], statistics=statistics)
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in small), strict=True))
    assert not any("second" in sums.values for sums in found.without_moments().sums.values())


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states):
        return states.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("this kernel has no backward")


class _Frozen(nn.Module):
    def forward(self, states):
        return _NoBackward.apply(states)


def test_what_has_no_gradients_is_refused_with_the_way_out():
    model, inputs = small_vit()
    with pytest.raises(InvalidValueError, match=r'float16, whose gradients underflow.*strategy="spectrum"'):
        collect_statistics(model.half(), [inputs["pixel_values"].half()], curvature=True)
    model, inputs = small_vit()
    model.vit.layernorm = nn.Sequential(model.vit.layernorm, _Frozen())
    with pytest.raises(InvalidValueError, match=r'no backward pass here.*strategy="spectrum"'):
        compress(model, 0.4, batches=[inputs])
    with torch.inference_mode():
        model, inputs = small_vit()
    with pytest.raises(InvalidValueError, match="made in inference mode"):
        compress(model, 0.4, batches=[inputs])
    model, inputs = small_vit()
    with pytest.raises(InvalidValueError, match="expected statistics with its curvature"):
        found = collect_statistics(model, [inputs], curvature=True)
        allocate_ranks(model, 0.4, mlp="rank", statistics=found, strategy="curvature")
