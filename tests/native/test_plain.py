"""The plain layout: what is saved is an ordinary model, which loads where comcat_hf is not there."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers

from comcat_hf import RankPlan, allocate_ranks, compress, plan_of, refine
from comcat_hf.errors import BudgetError, InvalidValueError, RankPlanError, UnsupportedModuleError
from comcat_hf.modeling.hosts import transformers as hosts
from comcat_hf.modeling.layout import find_alike
from comcat_hf.modeling.surgery import known_sites
from tests.architectures import ARCHITECTURES
from tests.helpers import (
    MODELS,
    WITHOUT_PACKAGE,
    assert_close,
    images,
    outputs,
    small_bert,
    small_clip,
    small_dinov2,
    small_vit,
)


BUILDS = MODELS | {name: ARCHITECTURES[name] for name in ("beit", "vivit", "radio", "tipsv2_vision")}


def shrunk(name: str):
    """A plain model of a family, its dense model and inputs; heads of 8, and MLPs of the widest that is narrower."""
    dense, inputs = BUILDS[name]()
    ranks = {}
    for group in find_alike(dense, known_sites(dense, width=True))[0]:
        entry = {"qk": 8, "vo": 8} if group.field == "head_dim" else {"width": max(group.values)}
        ranks |= dict.fromkeys((site.name for site in group.sites), entry)
    return compress(dense, plan=RankPlan(ranks), layout="plain"), dense, inputs


@pytest.mark.parametrize("name", BUILDS)
def test_computes_what_the_low_rank_model_does_and_is_an_ordinary_model(name, tmp_path):
    plain, dense, inputs = shrunk(name)
    free = compress(dense, plan=replace(plan_of(plain), layout="free"))
    assert_close(outputs(plain, inputs), outputs(free, inputs))
    assert {type(module) for module in plain.modules()} <= {type(module) for module in dense.modules()}
    plain.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    assert "comcat" not in (tmp_path / "config.json").read_text()
    again = type(dense).from_pretrained(tmp_path).eval()
    assert_close(outputs(again, inputs), outputs(plain, inputs))


WITHOUT = (
    WITHOUT_PACKAGE
    + """
import json
import torch, transformers
torch.set_num_threads(1)
root = sys.argv[1]
for name, kind in json.load(open(f"{root}/classes.json")).items():
    model = getattr(transformers, kind).from_pretrained(f"{root}/{name}").eval()
    inputs, expected = torch.load(f"{root}/{name}.pt", weights_only=True)
    with torch.no_grad():
        found = model(**inputs)
    for part, tensor in expected.items():
        span = tensor.max() - tensor.min() if tensor.numel() > 1 else tensor.abs()
        assert (found[part] - tensor).abs().max() <= 1e-5 * span, (name, part)

folder, (inputs, _) = f"{root}/vit", torch.load(f"{root}/vit.pt", weights_only=True)
model, pixels = transformers.ViTForImageClassification.from_pretrained(folder).eval(), inputs["pixel_values"]
with torch.no_grad():
    expected = model(pixels).logits
    exported = torch.export.export(model, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    assert torch.allclose(exported.module()(pixels[:1]).logits, expected[:1], atol=1e-5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(pixels).logits, expected, atol=1e-5)
    program = torch.onnx.export(model, (pixels,), dynamo=True, verbose=False)
import onnxruntime
session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
drawn = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0]
assert torch.allclose(torch.from_numpy(drawn), expected, atol=1e-4)
from PIL import Image
classify = transformers.pipeline("image-classification", folder)
assert len(classify(Image.new("RGB", (32, 32)))) == 5
data = [{"pixel_values": pixels[0], "labels": torch.tensor(1)}] * 4
arguments = transformers.TrainingArguments(f"{root}/trained", max_steps=1, report_to="none", use_cpu=True)
trainer = transformers.Trainer(model, arguments, train_dataset=data)
trainer.train()
trainer.save_model()
trained = transformers.AutoModelForImageClassification.from_pretrained(f"{root}/trained")
assert torch.equal(trained.vit.layers[0].attention.q_proj.weight, model.vit.layers[0].attention.q_proj.weight)
assert not any(name.startswith("comcat") for name in sys.modules)
"""
)


@pytest.mark.processes
def test_loads_runs_exports_and_trains_without_this_package(tmp_path):
    classes = {}
    pictures = "vit deit dinov2 dinov2_with_registers ijepa vit_mae vit_msn beit tipsv2_vision"
    for name in (*pictures.split(), "bert", "clip", "siglip"):
        plain, dense, inputs = shrunk(name)
        plain.save_pretrained(tmp_path / name)
        with torch.no_grad():
            parts = {part: tensor for part, tensor in plain(**inputs).items() if isinstance(tensor, torch.Tensor)}
        assert parts
        torch.save((inputs, parts), tmp_path / f"{name}.pt")
        classes[name] = type(dense).__name__
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    done = subprocess.run([sys.executable, "-c", WITHOUT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", [{}, {"strategy": "spectrum"}, {"batches": 2}, {"batches": 2, "refine": 3}], ids=str)
def test_every_way_to_choose_widths_meets_the_budget(how):
    dense, _ = small_vit(intermediate_size=400)
    if "batches" in how:
        how = {**how, "batches": [images(8)] * how["batches"]}
    small = compress(dense, 0.4, layout="plain", **how)
    plan = plan_of(small)
    assert plan.reached == pytest.approx(1 - small.num_parameters() / dense.num_parameters())
    assert 0.4 <= plan.reached <= 0.405
    attention = {str(entry) for name, entry in plan.ranks.items() if name.endswith("attention")}
    assert len(attention) <= 1 and len({str(e) for n, e in plan.ranks.items() if n.endswith("mlp")}) <= 1
    assert RankPlan.from_dict(plan.to_dict()) == plan
    if "refine" in how:
        assert refine(small, dense, how["batches"], 3).after >= 0


def test_every_class_that_reads_its_head_width_from_the_configuration_gets_smaller_heads():
    reading = {host.host for host in hosts.FAMILIES if _reads(host.host)}
    found = set()
    for build in BUILDS.values():
        dense, _ = build()
        groups, _ = find_alike(dense, known_sites(dense, width=True))
        found |= {site.view.family.host for group in groups for site in group.sites if group.field == "head_dim"}
    assert found == reading


def _reads(host: str) -> bool:
    module, _, name = host.rpartition(".")
    __import__(module)
    import inspect

    return 'getattr(config, "head_dim"' in inspect.getsource(getattr(sys.modules[module], name))


@pytest.mark.parametrize(
    ("build", "how", "kind", "says"),
    [
        (small_bert, {"scope": "attention"}, UnsupportedModuleError, "hidden width"),
        (small_vit, {"mlp": "rank"}, InvalidValueError, "mlp='rank'"),
        (small_vit, {"target_modules": ["layers.0"]}, UnsupportedModuleError, "config.head_dim also decides"),
        (small_dinov2, {"scope": "attention", "reduction": 0.41}, BudgetError, "the nearest are 0.37"),
        (small_vit, {"reduction": 0.99}, BudgetError, "out of reach"),
        (small_vit, {"layout": "flat"}, InvalidValueError, "layout must be one of"),
    ],
)
def test_what_cannot_be_is_said(build, how, kind, says):
    dense, _ = build()
    with pytest.raises(kind, match=says):
        compress(dense, **{"reduction": 0.3, "layout": "plain", **how})


@pytest.mark.parametrize(
    "change", [{"qk": 8, "vo": 4}, {"qk": 8}, None, {"qk": 4, "vo": 4}], ids=["pairs", "one", "dense", "layers"]
)
def test_a_plan_with_unequal_widths_is_refused(change):
    dense, _ = small_vit()
    plan = allocate_ranks(dense, 0.3109, scope="attention", layout="plain")
    name = next(iter(plan.ranks))
    with pytest.raises(RankPlanError, match=r"layout='plain'.*head_dim"):
        compress(dense, plan=plan.with_ranks({name: change}))


def test_attention_that_no_configuration_sizes_stays_dense_and_is_named(caplog):
    dense, _ = small_clip()
    plan = allocate_ranks(dense, 0.1, layout="plain")
    assert all(set(entry) == {"width"} for entry in plan.ranks.values())
    assert "self_attn" in caplog.text and "stay dense" in caplog.text
