"""Compressed models as ordinary checkpoints."""

import copy
import json
import pickle
import re
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from comcat_hf import RankPlan, compress, plan_of
from comcat_hf.errors import CheckpointError, InvalidValueError, RankPlanError
from comcat_hf.modeling import LowRankAttention, LowRankLinear, NarrowLinear, apply_ranks, find_sites, read_ranks
from comcat_hf.native import attach_plan
from tests.helpers import MODELS, images, outputs, small_vit


FILES = {"config.json", "model.safetensors", "comcat_ranks.json"}
CLASSES = {
    "vit": AutoModelForImageClassification,
    "dinov2": AutoModelForImageClassification,
    "videomae": AutoModelForVideoClassification,
    "bert": AutoModelForSequenceClassification,
    "clip": AutoModel,
    "siglip": AutoModel,
}


def small(family="vit", reduction=0.5, **settings):
    model, inputs = MODELS[family](**settings)
    return compress(model, reduction), inputs


def narrowed(family="vit", **settings):
    """Widths in the first MLP of every tower, ranks in the layers of the others."""
    model, inputs = MODELS[family](**settings)
    sites = find_sites(model, "mlp", width=True)
    plan = {}
    for name, site in sites.items():
        if site.kind == "mlp":
            first = re.search(r"\.0(\.|$)", name)
            plan |= {name: {"width": 21}} if first else dict.fromkeys(site.dense_modules(), 6)
    assert {type(entry) for entry in plan.values()} == {dict, int}
    apply_ranks(model, plan)
    return attach_plan(model), inputs


def loader_of(family, model):
    return CLASSES.get(family, type(model))


def assert_identical(model, other, inputs):
    assert type(model) is type(other)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), outputs(other, inputs), strict=True))


@pytest.fixture
def saved(tmp_path):
    """A compressed ViT, whose classifier is low-rank too, its folder and inputs."""
    model, inputs = small_vit(num_labels=20)
    model = compress(model, 0.5)
    assert {"classifier", "vit.layers.0.attention", "vit.layers.0.mlp.fc1"} <= set(plan_of(model).ranks)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved", inputs


def load(folder, **options):
    return AutoModelForImageClassification.from_pretrained(folder, **options)


@pytest.mark.parametrize(
    ("build", "family"),
    [
        *((small, family) for family in MODELS),
        # Their MLPs differ, and the names that these have in files.
        *((narrowed, family) for family in ("vit", "bert", "clip", "dinov2_swiglu", "siglip", "videomae", "vit_mae")),
    ],
)
def test_round_trip_is_exact_also_the_second_time(build, family, tmp_path):
    model, inputs = build(family)
    model.save_pretrained(tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} >= FILES
    loaded = loader_of(family, model).from_pretrained(tmp_path / "one")
    assert_identical(model, loaded, inputs)
    assert plan_of(loaded) == plan_of(model) == RankPlan.from_pretrained(tmp_path / "one")
    assert dict(RankPlan.from_pretrained(tmp_path / "one").ranks) == read_ranks(loaded)
    loaded.save_pretrained(tmp_path / "two")
    again = loader_of(family, model).from_pretrained(tmp_path / "two")
    assert_identical(model, again, inputs)
    for name in ("model.safetensors", "comcat_ranks.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_swiglu_halves_of_unequal_ranks(tmp_path):
    # Its checkpoints hold both halves as one tensor, which cannot be taken apart by rank.
    model, inputs = MODELS["dinov2_swiglu"]()
    mlp = "dinov2.encoder.layer.0.mlp"
    model = compress(model, plan=RankPlan({f"{mlp}.gate_proj": 3, f"{mlp}.up_proj": 5}))
    model.save_pretrained(tmp_path)
    assert_identical(model, AutoModelForImageClassification.from_pretrained(tmp_path), inputs)


def test_loading_options(saved, tmp_path):
    model, folder, inputs = saved
    for options in ({"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"attn_implementation": "sdpa"}):
        assert_identical(model, load(folder, **options), inputs)
    half = {"pixel_values": inputs["pixel_values"].bfloat16()}
    for options in ({}, {"device_map": "auto"}):
        loaded = load(folder, dtype=torch.bfloat16, **options)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert_identical(copy.deepcopy(model).bfloat16(), loaded, half)
    loaded.save_pretrained(tmp_path / "half")
    assert_identical(loaded, load(tmp_path / "half", dtype="auto"), half)


def test_parts_on_disk(saved, tmp_path):
    model, folder, inputs = saved
    places = dict.fromkeys(["vit.embeddings", "vit.layers.0", "vit.layernorm", "classifier"], "cpu")
    options = {"device_map": {**places, "vit.layers.1": "disk"}, "offload_folder": tmp_path / "offload"}
    assert_identical(model, load(folder, **options), inputs)
    edit_tensors(folder, lambda tensors: tensors.pop("vit.encoder.layer.1.output.dense.first_factor.weight"))
    with pytest.raises(CheckpointError, match=r"vit\.layers\.1\.mlp\.fc2\.first_factor\.weight"):
        load(folder, **options)


def test_casts_are_allowed_after_loading(saved):
    _, folder, _ = saved
    loaded = load(folder)
    assert not getattr(loaded, "is_quantized", False)
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    assert load(folder).to(torch.float64).dtype == torch.float64
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_shards(saved, tmp_path):
    model, _, inputs = saved
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for options in ({}, {"device_map": "auto"}):
        assert_identical(model, load(tmp_path / "shards", **options), inputs)
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        load(tmp_path / "shards")


def test_trainer_step_and_reload(saved, tmp_path):
    _, folder, inputs = saved
    data = [{"pixel_values": pixels, "labels": i % 20} for i, pixels in enumerate(images(8))]

    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        return Trainer(model=model, args=arguments, train_dataset=data)

    first = trainer(load(folder), 2)
    before = outputs(first.model, inputs)[0]
    first.train()
    first.model.eval()
    assert not torch.equal(before, outputs(first.model, inputs)[0])
    first.save_model(str(tmp_path / "trained"))
    assert_identical(first.model, load(tmp_path / "trained"), inputs)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= FILES
    resumed = trainer(load(folder), 3)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 3


def test_pipeline(saved):
    model, folder, _ = saved
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.new("RGB", (40, 50), (200, 30, 90))
    classify = pipeline("image-classification", model=load(folder), image_processor=processor)
    found = classify(image, top_k=20)
    logits = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    assert [round(item["score"], 5) for item in found] == [round(p, 5) for p in sorted(logits.tolist(), reverse=True)]
    processor.save_pretrained(folder)
    assert pipeline("image-classification", model=str(folder), image_processor=processor)(image, top_k=20) == found


def test_bare_backbone_and_back(saved, tmp_path):
    model, folder, inputs = saved
    bare = AutoModel.from_pretrained(folder)
    pixels = inputs["pixel_values"]
    assert torch.equal(bare(pixels).last_hidden_state, model.vit(pixels).last_hidden_state)
    assert set(plan_of(bare).ranks) == {n.removeprefix("vit.") for n in plan_of(model).ranks if n != "classifier"}
    bare.save_pretrained(tmp_path / "bare")
    headed = load(tmp_path / "bare", num_labels=3)
    assert torch.equal(headed.vit(pixels).last_hidden_state, bare(pixels).last_hidden_state)
    assert type(headed.classifier) is nn.Linear
    # The backbone of a loaded model, saved for itself, as users do.
    model.vit.save_pretrained(tmp_path / "part")
    part = AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(part(pixels).last_hidden_state, model.vit(pixels).last_hidden_state)


@pytest.mark.parametrize(
    ("family", "auto"), [("vit", load), ("bert", AutoModelForSequenceClassification.from_pretrained)]
)
def test_a_narrowed_backbone_and_back(family, auto, tmp_path):
    model, inputs = narrowed(family)
    model.save_pretrained(tmp_path / "model")
    bare = AutoModel.from_pretrained(tmp_path / "model")
    assert dict(plan_of(bare).ranks) == {
        n.removeprefix(f"{family}."): entry for n, entry in plan_of(model).ranks.items()
    }
    hidden = model.base_model(**inputs).last_hidden_state
    assert torch.equal(bare(**inputs).last_hidden_state, hidden)
    bare.save_pretrained(tmp_path / "bare")
    headed = auto(tmp_path / "bare", num_labels=3)
    assert torch.equal(headed.base_model(**inputs).last_hidden_state, hidden)
    assert plan_of(headed).ranks == plan_of(model).ranks


@pytest.mark.parametrize(
    ("build", "family", "options", "step"),
    [
        (narrowed, "vit", {"device_map": "auto"}, 1),
        (narrowed, "dinov2_swiglu", {"dtype": torch.bfloat16}, 1),
        (narrowed, "bert", {"device_map": "auto"}, 1),
        (small, "vit", {}, 1),
        (small, "vit", {"device_map": "auto"}, 5),
        (small, "vit", {"dtype": torch.bfloat16}, 5),
        (small, "vit", {"ignore_mismatched_sizes": True}, 5),
    ],
)
def test_every_missing_or_misshapen_factor_is_an_error_that_names_it(build, family, options, step, tmp_path):
    settings = {"num_labels": 20}
    # Joined tensors cannot be taken apart by rank.
    MODELS[family](**settings)[0].save_pretrained(tmp_path / "dense", save_original_format="swiglu" not in family)
    model, _ = build(family, **settings)
    model.save_pretrained(tmp_path / "whole")
    names = [n for n, m in model.named_modules() if isinstance(m, LowRankAttention | LowRankLinear | NarrowLinear)]
    dense, whole = (load_file(tmp_path / folder / "model.safetensors") for folder in ("dense", "whole"))
    # Not by name, since files may have the names of older versions.
    changed = {key.rpartition(".")[0] for key in whole if key not in dense or whole[key].shape != dense[key].shape}
    factors = [key for key in whole if key.rpartition(".")[0] in changed]
    assert len(factors) >= 2 * len(names)
    for number, key in enumerate(factors[::step]):
        for change, says in ((lambda t, k=key: t.pop(k), "found none"), (lambda t, k=key: _cut(t, k), "found")):
            broken = tmp_path / f"{number}{says}"
            shutil.copytree(tmp_path / "whole", broken)
            edit_tensors(broken, change)
            with pytest.raises(CheckpointError, match=says) as caught:
                type(model).from_pretrained(broken, **options)
            assert any(f"expected {name}." in str(caught.value) for name in names)


def _cut(tensors, key):
    tensors[key] = tensors[key][:-1]


def test_only_the_head_compressed(tmp_path):
    model, inputs = small_vit(num_labels=20)
    model = compress(model, plan=RankPlan({"classifier": 4}))
    model.save_pretrained(tmp_path / "head")
    assert_identical(model, load(tmp_path / "head"), inputs)
    bare = AutoModel.from_pretrained(tmp_path / "head")
    bare.save_pretrained(tmp_path / "bare")
    assert {path.name for path in (tmp_path / "bare").iterdir()} == FILES - {"comcat_ranks.json"}
    assert "quantization_config" not in json.loads((tmp_path / "bare" / "config.json").read_text())
    assert AutoModel.from_pretrained(tmp_path / "bare")(**inputs).last_hidden_state.isfinite().all()


def test_another_task_leaves_the_head_behind(saved):
    model, folder, inputs = saved
    other = AutoModelForMaskedImageModeling.from_pretrained(folder)
    pixels = inputs["pixel_values"]
    assert torch.equal(other.vit(pixels).last_hidden_state, model.vit(pixels).last_hidden_state)


@pytest.mark.parametrize("labels", [3, 15])
def test_new_labels_as_in_any_fine_tuning(saved, labels, tmp_path):
    model, folder, inputs = saved
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder, num_labels=labels)
    tuned = load(folder, num_labels=labels, ignore_mismatched_sizes=True)
    pixels = inputs["pixel_values"]
    assert tuned(pixels).logits.shape == (2, labels)
    assert type(tuned.classifier) is nn.Linear
    assert 0.5 < tuned.classifier.weight.std() / model.config.initializer_range < 2
    assert tuned.classifier.bias.eq(0).all()
    assert torch.equal(tuned.vit(pixels).last_hidden_state, model.vit(pixels).last_hidden_state)
    tuned.save_pretrained(tmp_path / "tuned")
    assert_identical(tuned, load(tmp_path / "tuned"), inputs)


def test_a_replaced_module_is_saved_as_it_is(saved, tmp_path):
    model, _, inputs = saved
    model.classifier = nn.Linear(48, 20)
    model.save_pretrained(tmp_path / "head")
    assert "classifier" not in RankPlan.from_pretrained(tmp_path / "head").ranks
    assert_identical(model, load(tmp_path / "head"), inputs)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_saves_itself(saved, clone, tmp_path):
    model, _, inputs = saved
    twin = clone(model)
    assert_identical(model, twin, inputs)
    with torch.no_grad():
        twin.classifier.bias += 1
    twin.save_pretrained(tmp_path / "twin")
    assert_identical(twin, load(tmp_path / "twin"), inputs)
    assert not torch.equal(outputs(model, inputs)[0], outputs(twin, inputs)[0])
    model.save_pretrained(tmp_path / "model")
    assert_identical(model, load(tmp_path / "model"), inputs)


def test_adapters_on_top_are_saved_alone(saved, tmp_path):
    from peft import LoraConfig

    model, _, _ = saved
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "adapter" / "comcat_ranks.json").exists()


def test_other_processes_than_the_first_write_nothing(saved, tmp_path):
    saved[0].save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert list((tmp_path / "rank1").iterdir()) == []


def test_from_config_is_dense_and_random_and_its_checkpoint_does_not_pass_for_compressed(saved, tmp_path):
    model, folder, _ = saved
    fresh = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
    assert read_ranks(fresh) == {}
    assert fresh.num_parameters() > model.num_parameters()
    fresh.save_pretrained(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match=r"mlp\.fc1\.first_factor\.weight, found none"):
        load(tmp_path / "fresh")


def test_a_dense_checkpoint_cannot_be_loaded_with_our_config(tmp_path):
    model, _ = small_vit()
    model.save_pretrained(tmp_path)
    config = compress(model, 0.5).config.quantization_config
    with pytest.raises(InvalidValueError, match="compress"):
        load(tmp_path, quantization_config=config)


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def edit_plan(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_the_name_of_earlier_versions_is_read(saved, tmp_path):
    model, folder, inputs = saved
    edit_plan(folder, lambda plan: plan.update(quant_method="comcat"))
    loaded = load(folder)
    assert_identical(model, loaded, inputs)
    loaded.save_pretrained(tmp_path / "new")
    assert (
        json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "comcat_hf"
    )


def test_truncated_weights(saved):
    _, folder, _ = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for keep in (0, 7, 100, -1, -1000):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)


def test_a_head_of_another_rank_is_no_new_head(saved):
    _, folder, _ = saved
    edit_tensors(folder, lambda tensors: tensors.update({"classifier.weight": tensors["classifier.weight"][:, :-1]}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight of shape \(20, \d+\), found"):
        load(folder, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("ranks", "error", "says"),
    [
        ({"vit.layers.0.mlp.fc1": 3}, CheckpointError, r"vit\.layers\.0\.mlp\.fc1\.weight of shape \(80, 3\), found"),
        ({"vit.layers.0.attention": {"qk": 3}}, CheckpointError, r"vit\.layers\.0\.attention\.\w+_proj"),
        ({"vit.layers.0.mlp.fc1": 0}, RankPlanError, r"config\.json.*vit\.layers\.0\.mlp\.fc1.*got 0"),
        ({"vit.layers.0.mlp.fc1": "7"}, RankPlanError, r"config\.json.*vit\.layers\.0\.mlp\.fc1.*got '7'"),
        ({"vit.layers.0.mlp.fc1": 999}, RankPlanError, r"vit\.layers\.0\.mlp\.fc1.*1 to 48.*got 999"),
        (
            {"vit.layers.0.mlp": {"width": 9}},
            RankPlanError,
            r"fc1 has the entry \d+ and vit\.layers\.0\.mlp the entry",
        ),
        ({"vit.layers.0.mlp.fc9": 4}, RankPlanError, r"vit\.layers\.0\.mlp\.fc9.*ViTForImageClassification"),
        ({"bert.encoder.layer.0.attention.self": {"qk": 4}}, RankPlanError, r"bert\.encoder"),
    ],
)
def test_edited_ranks(saved, ranks, error, says):
    _, folder, _ = saved
    edit_plan(folder, lambda plan: plan["ranks"].update(ranks))
    with pytest.raises(error, match=says):
        load(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan.update(ranks=[]), "ranks"),
        (lambda plan: plan.pop("ranks"), "found no ranks"),
        (lambda plan: plan.update(format_version=9), "format_version 9"),
        (lambda plan: plan.update(colour="red"), "unknown 'colour'"),
        (lambda plan: plan.update(reached="x"), "reached: expected a finite number"),
        (lambda plan: plan.update(architecture="BertModel"), "for ViTForImageClassification, found one for BertModel"),
    ],
)
def test_edited_plans(saved, change, says):
    _, folder, _ = saved
    edit_plan(folder, change)
    with pytest.raises(RankPlanError, match=rf"config\.json.*{says}"):
        load(folder)


def test_a_module_struck_from_the_plan_is_an_error(saved):
    _, folder, _ = saved
    config = (folder / "config.json").read_text()
    for gone in ("vit.layers.0.mlp.fc1", "vit.layers.1.attention", "classifier"):
        edit_plan(folder, lambda plan, gone=gone: plan["ranks"].pop(gone))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            load(folder)
        (folder / "config.json").write_text(config)


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(saved, tmp_path):
    model, _, _ = saved
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for target in (blocked, blocked / "below"):
        with pytest.raises(OSError, match="file"):
            model.save_pretrained(target)
    assert blocked.read_text() == "in the way"


def test_no_rank_file_without_the_weights(saved, tmp_path, monkeypatch):
    model, _, _ = saved

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "full")
    assert not [p for p in (tmp_path / "full").iterdir() if p.name == "comcat_ranks.json" or p.suffix == ".tmp"]


def test_plan_of_needs_a_compressed_model():
    model, _ = small_vit()
    with pytest.raises(InvalidValueError, match="ViTForImageClassification has no low-rank modules"):
        plan_of(model)
    assert attach_plan(model) is model
    assert "save_pretrained" not in vars(model)
