"""Moments against plain loops over captured activations, and what may go wrong with batches."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding, BatchFeature

import comcat_hf
from comcat_hf import collect_statistics, compress, measure_sensitivities
from comcat_hf.compression.calibration.inputs import cut_batch
from comcat_hf.errors import InvalidValueError
from comcat_hf.modeling import AttentionSite, find_sites
from tests.helpers import MODELS, assert_unchanged, classes_of, images, small_bert, small_clip, small_vit, state_of


FIELDS = {"AttentionMoments": ("query", "key", "attended", "attended_mean"), "LinearMoments": ("covariance", "mean")}


def doubled(inputs):
    floating = {k: v.double() for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**inputs, **floating}


def fields(moments):
    return {name: getattr(moments, name) for name in FIELDS[type(moments).__name__]}


def assert_same(one, other, tolerance=1e-10):
    assert list(one) == list(other)
    for name in one:
        for field, value in fields(one[name]).items():
            expected = fields(other[name])[field]
            error = (value - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error <= tolerance, f"{name}.{field} is off by {error:.2e}"


def capture(model, inputs):
    """Per site what went in and came out: {name: {"q", "k", "u"} or {"x", "y"}}."""
    seen, handles = {}, []

    def keep(name, key, pick):
        def hook(module, args, output):
            seen.setdefault(name, {})[key] = (args[0] if pick == "in" else output).detach().double()

        return hook

    for name, site in find_sites(model).items():
        if isinstance(site, AttentionSite):
            spots = [("q", site.view.query, "out"), ("k", site.view.key, "out"), ("u", site.view.output, "in")]
        else:
            spots = [("x", site.linear, "in"), ("y", site.linear, "out")]
        handles += [module.register_forward_hook(keep(name, key, pick)) for key, module, pick in spots]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def brute_force(site, seen, mask, hidden):
    """The moments by loops over samples, tokens that count, and heads."""

    def rows(states):
        if states.ndim == 2:
            return [row[None] for row in states]
        if mask is None or mask.shape != states.shape[:2]:
            return list(states)
        return [sample[keep.bool()] for sample, keep in zip(states, mask, strict=True)]

    if not isinstance(site, AttentionSite):
        x, y = torch.cat(rows(seen["x"])), torch.cat(rows(seen["y"]))
        narrows = site.linear.out_features < site.linear.in_features
        inner = y if narrows and site.name not in hidden else x
        return {"covariance": torch.cov(inner.T, correction=0), "mean": x.mean(0)}
    heads, width = site.view.num_heads, site.view.head_dim
    found = {"query": [], "key": [], "attended": [], "attended_mean": []}
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        q = torch.cat([sample[:, own] for sample in rows(seen["q"])])
        k = torch.cat([sample[:, own] - sample[:, own].mean(0) for sample in rows(seen["k"])])
        u = torch.cat([sample[:, own] for sample in rows(seen["u"])])
        found["query"].append(q.T @ q / len(q))
        found["key"].append(k.T @ k / len(k))
        found["attended"].append(torch.cov(u.T, correction=0))
        found["attended_mean"].append(u.mean(0))
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_swiglu", "bert", "clip_text", "videomae", "dpt"])
def test_equal_plain_loops_over_activations(family):
    model, inputs = MODELS[family]()
    model, inputs = model.double(), doubled(inputs)
    statistics = collect_statistics(model, [inputs])
    seen, mask = capture(model, inputs), inputs.get("attention_mask")
    assert set(statistics) == set(find_sites(model)) == set(seen)
    # Whatever reads hidden units has the covariance of all of them, which serves the MLP's width too.
    hidden = {site.moments_path for site in find_sites(model, width=True).values() if site.kind == "mlp"}
    assert len(hidden) == sum(site.kind == "attention" for site in find_sites(model).values())
    for name, site in find_sites(model).items():
        for field, expected in brute_force(site, seen[name], mask, hidden).items():
            found = fields(statistics[name])[field]
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11, msg=f"{name}.{field}")


@pytest.mark.parametrize("family", ["bert", "clip_text"])
def test_padded_batch_counts_as_its_samples_without_padding(family):
    model, inputs = MODELS[family]()
    model = model.double()
    lengths = inputs["attention_mask"].sum(1)
    alone = [{"input_ids": inputs["input_ids"][i : i + 1, :n]} for i, n in enumerate(lengths)]
    assert_same(collect_statistics(model, [inputs]), collect_statistics(model, alone))


def test_keys_that_a_full_mask_does_not_admit_carry_no_weight():
    model, inputs = small_bert()
    model = model.double()
    whole = inputs["attention_mask"].bool()[:, None, None, :]
    full = {**inputs, "attention_mask": whole.expand(-1, 1, whole.shape[-1], -1)}
    expected, found = (collect_statistics(model, [batch], scope="attention") for batch in (inputs, full))
    assert_same(found, expected)


def test_mask_of_the_text_tower_is_not_applied_to_images():
    model, inputs = small_clip(text_config={**small_clip()[0].config.text_config.to_dict(), "bos_token_id": 0})
    tokens = 17
    text = model.config.text_config
    ids = torch.full((2, tokens), 5)
    ids[:, -1] = text.eos_token_id
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    model.text_model.embeddings.position_embedding = torch.nn.Embedding(tokens, text.hidden_size)
    model.text_model.embeddings.position_ids = torch.arange(tokens)[None]
    both = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    statistics = collect_statistics(model, [both])
    unmasked = collect_statistics(model, [{**both, "attention_mask": torch.ones_like(ids)}])
    vision = [name for name in statistics if name.startswith("vision_model")]
    text = [name for name in statistics if name.startswith("text_model")]
    assert vision and text
    for name in vision:
        assert all(torch.equal(v, fields(unmasked[name])[f]) for f, v in fields(statistics[name]).items()), name
    assert not torch.allclose(statistics[text[0]].query, unmasked[text[0]].query)


def test_do_not_depend_on_how_batches_are_cut():
    model, _ = small_vit()
    model, pixels = model.double(), images(5).double()
    whole = collect_statistics(model, [pixels])
    assert whole.samples == 5
    assert_same(whole, collect_statistics(model, pixels.split([1, 3, 1])))
    assert_same(whole, collect_statistics(model, pixels.split(1)))
    assert_same(whole, collect_statistics(model, (batch for batch in pixels.split(2))))


def test_bfloat16_is_close_to_float32():
    model, _ = small_vit()
    exact = collect_statistics(model, [images(16)])
    half = collect_statistics(model.bfloat16(), [images(16).bfloat16()])
    assert_same(half, exact, tolerance=0.01)
    assert all(value.isfinite().all() for name in half for value in fields(half[name]).values())


def test_batches_come_in_many_forms():
    model, _ = small_vit()
    pixels, labels = images(4), torch.zeros(4, dtype=torch.long)
    expected = collect_statistics(model, [pixels])
    forms = {
        "mapping with labels": [{"pixel_values": pixels, "labels": labels}],
        "tuple": [(pixels, labels)],
        "list": [[pixels, labels]],
        "loader": DataLoader(TensorDataset(pixels, labels), batch_size=4),
        "features": [BatchFeature({"pixel_values": pixels})],
        "encoding": [BatchEncoding({"pixel_values": pixels})],
    }
    for form, batches in forms.items():
        assert_same(collect_statistics(model, batches), expected), form


def test_a_tuple_that_may_hold_a_mask_is_not_read_without_it():
    model, inputs = small_bert()
    texts = DataLoader(TensorDataset(inputs["input_ids"], inputs["attention_mask"]), batch_size=2)
    with pytest.raises(InvalidValueError, match=r"Batch 0: .*may be the attention mask\. Give mappings"):
        collect_statistics(model, texts)
    labels = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
    for given in (labels, inputs["input_ids"].roll(1)):
        collect_statistics(model, DataLoader(TensorDataset(inputs["input_ids"], given), batch_size=2))


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "empty"),
        ([{"images": images()}], "pixel_values"),
        ([{"pixel_values": [1, 2]}], "pixel_values"),
        (["pixels"], "pixel_values"),
        ([torch.zeros(3)], "batch dimension"),
        ([torch.zeros(0, 3, 32, 32)], "samples"),
        ([torch.zeros(2, 3, 16, 16)], "Calibration batch 0"),
        ([images(), torch.zeros(2, 1, 32, 32)], "Calibration batch 1"),
        ([images() * float("nan")], "not finite"),
        ([{"pixel_values": images(), "attention_mask": torch.zeros(2, 17, dtype=torch.long)}], "carries weight"),
    ],
)
def test_refuses_batches_that_do_not_fit_and_leaves_no_trace(batches, says):
    model, _ = small_vit()
    model.train()
    model.vit.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state, classes = state_of(model), classes_of(model)
    with pytest.raises(InvalidValueError, match=says):
        collect_statistics(model, batches)
    assert_unchanged(model, state, classes)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not hooks_of(model)


def hooks_of(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_run_in_eval_mode_and_restore_every_mode():
    model, inputs = small_vit(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    expected = collect_statistics(model, [inputs])
    model.train()
    model.vit.layers[1].mlp.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert_same(collect_statistics(model, [inputs]), expected)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not hooks_of(model)
    assert all(p.grad is None for p in model.parameters())


def test_errors_of_the_callers_own_iterable_pass_through():
    model, inputs = small_vit()

    def broken():
        yield inputs
        raise ConnectionError("the data set went away")

    with pytest.raises(ConnectionError):
        collect_statistics(model, broken())
    assert not hooks_of(model)


def test_a_site_that_is_not_reached_is_named():
    model, inputs = small_clip()
    with pytest.raises(InvalidValueError, match="does not fit CLIPModel"):
        collect_statistics(model, [{"input_ids": inputs["input_ids"]}])


def test_scope_limits_what_is_gathered():
    model, inputs = small_vit()
    assert set(collect_statistics(model, [inputs], scope="attention")) == set(find_sites(model, "attention"))
    assert set(collect_statistics(model, [inputs], scope="mlp")) == set(find_sites(model, "mlp"))
    with pytest.raises(InvalidValueError, match="scope"):
        collect_statistics(model, [inputs], scope="everything")


def test_statistics_of_another_model_are_refused():
    model, inputs = small_vit()
    statistics = collect_statistics(model, [inputs])
    wider, _ = small_vit(hidden_size=96)
    deeper, _ = small_vit(num_hidden_layers=3)
    shallower, _ = small_vit(num_hidden_layers=1)
    for other, says in ((small_bert()[0], "Bert"), (wider, "shape"), (shallower, "no such module")):
        with pytest.raises(InvalidValueError, match=says):
            comcat_hf.compress(other, 0.3, statistics=statistics)
    with pytest.raises(InvalidValueError, match=r"lack vit\.layers\.2"):
        comcat_hf.compress(deeper, 0.3, statistics=statistics)
    attention = collect_statistics(model, [inputs], scope="attention")
    plan = comcat_hf.allocate_ranks(model, 0.3)
    for how in ({"reduction": 0.3}, {"plan": plan}):
        with pytest.raises(InvalidValueError, match="scope='attention', lack"):
            comcat_hf.compress(model, **how, batches=[inputs], statistics=attention)
    with pytest.raises(InvalidValueError, match="scope='attention'"):
        comcat_hf.compress(model, 0.3, statistics=attention)
    assert comcat_hf.compress(model, 0.3, scope="attention", statistics=statistics)


@pytest.mark.parametrize("use", [collect_statistics, partial(compress, reduction=0.3), measure_sensitivities])
@pytest.mark.parametrize("batch", [images(), {"pixel_values": images()}], ids=["tensor", "mapping"])
def test_one_batch_in_place_of_several_is_refused(use, batch):
    with pytest.raises(InvalidValueError, match=r"^batches: expected several, such as a DataLoader or \[batch\]"):
        use(small_vit()[0], batches=batch)


@pytest.mark.parametrize(
    ("others", "rows"),
    [
        ({}, [2, 2, 1]),
        ({"mask": torch.ones(5, 3), "kind": "text"}, [2, 2, 1]),
        ({"shared": torch.ones(1, 3), "scale": torch.tensor(2.0)}, [2, 2, 1]),
        ({"texts": torch.ones(4, 3)}, [5]),
    ],
)
def test_batches_are_cut_where_their_tensors_agree(others, rows):
    states = torch.arange(10.0).view(5, 2)
    parts = cut_batch({"states": states, **others}, "states", 3)
    assert [len(part["states"]) for part in parts] == rows
    assert all(part.keys() == {"states", *others} for part in parts)
    assert torch.equal(torch.cat([part["states"] for part in parts]), states)
    assert all(len(part["mask"]) == len(part["states"]) for part in parts if "mask" in part)
    assert all(part["shared"].shape == (1, 3) for part in parts if "shared" in part)
