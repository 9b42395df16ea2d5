"""A pipeline and its adapters: what is drawn is what the pipeline itself draws, and errors change nothing."""

import copy
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from peft import LoraConfig

import comcat_hf
from comcat_hf import ComCATConfig
from comcat_hf.app import DrawSettings, Studio
from comcat_hf.app.pipelines import adapter_name
from comcat_hf.app.sources import prompts_of
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from tests.customization.flow_pipelines import FLOWS
from tests.customization.pipelines import tiny_sd


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
SETTINGS = DrawSettings("a cat", seed=3, steps=2, guidance=4.0)


@pytest.fixture
def studio(base) -> Studio:
    studio = Studio()
    studio.load(str(base))
    return studio


def draw(base, adapters=(), scales=(), **changes):
    """What the pipeline draws without the app, at its native size."""
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for folder in adapters:
        comcat_hf.load_comcat_weights(pipe, folder, folder.name)
    if adapters:
        pipe.set_adapters([folder.name for folder in adapters], list(scales))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, **changes}
    return pipe("a cat", generator=torch.Generator().manual_seed(3), **settings).images[0]


def test_before_and_after_are_what_the_pipeline_draws(base, adapters, studio):
    plain = draw(base)
    assert plain.size == (16, 16)
    drawing = studio.draw(SETTINGS)
    assert drawing.before == drawing.after == plain
    assert studio.add("dog", str(adapters["dog"])) == "dog"
    one = studio.draw(SETTINGS)
    assert one.before == plain
    assert one.after == draw(base, [adapters["dog"]], [1.0]) != plain
    assert studio.draw(SETTINGS, {"dog": 0}).after == plain
    assert studio.add("", f" {adapters['style']} ") == "style"
    both = studio.draw(SETTINGS, {"dog": 0.5, "style": 1.5})
    assert both.before == plain
    assert both.after == draw(base, [adapters["dog"], adapters["style"]], [0.5, 1.5])
    assert studio.draw(SETTINGS, {"style": 0}).after == one.after
    assert min(both.seconds_before, both.seconds_after) > 0


@pytest.mark.parametrize("name", list(FLOWS))
def test_rectified_flow_transformers_are_drawn_by(name, tmp_path):
    base = FLOWS[name](tmp_path / "base")
    pipe = DiffusionPipeline.from_pretrained(base)
    pipe.transformer.add_adapter(ComCATConfig(mode="customize", vo_rank=2, init_weights=False), "dog")
    comcat_hf.save_comcat_weights(pipe, tmp_path / "dog", "dog")
    studio = Studio()
    studio.load(str(base))
    assert studio.native_size() == ((16, 16) if name == "sd3" else (256, 256))
    studio.add("dog", str(tmp_path / "dog"))
    small = replace(SETTINGS, width=16, height=16)
    found = studio.draw(small, {"dog": 0.5})
    assert found.before != found.after and studio.draw(small, {"dog": 0}).after == found.before
    pipe.set_adapters("dog", 0.5)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(
        prompt="a cat",
        height=16,
        width=16,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
    )
    assert found.after == drawn.images[0]


def test_removed_adapters_leave_no_trace(base, adapters, studio):
    for name, folder in adapters.items():
        studio.add(name, str(folder))
    studio.remove("style")
    assert studio.adapters == ("dog",)
    assert studio.draw(SETTINGS).after == draw(base, [adapters["dog"]], [1.0])
    studio.add("style", str(adapters["style"]))
    studio.remove("dog")
    assert studio.draw(SETTINGS).after == draw(base, [adapters["style"]], [1.0])
    studio.remove("style")
    fresh = DiffusionPipeline.from_pretrained(base)
    for part in ("unet", "text_encoder"):
        modules = [type(module) for module in studio._pipeline.components[part].modules()]
        assert modules == [type(module) for module in getattr(fresh, part).modules()]
    studio.add("dog", str(adapters["dog"]))
    assert studio.draw(SETTINGS).after == draw(base, [adapters["dog"]], [1.0])


def test_another_pipeline_takes_the_place_of_the_first(base, adapters, studio, tmp_path):
    studio.add("dog", str(adapters["dog"]))
    other = tiny_sd(tmp_path / "other", "v_prediction")
    studio.load(str(other))
    assert (studio.source, studio.adapters) == (str(other), ())
    assert studio.draw(SETTINGS).after == draw(other)


def test_a_copy_shares_weights_and_nothing_else(base, adapters, studio):
    other = copy.deepcopy(studio)
    for part in ("unet", "vae", "text_encoder"):
        pairs = zip(*(s._pipeline.components[part].parameters() for s in (studio, other)), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)
    assert other._pipeline.unet is not studio._pipeline.unet
    assert other._pipeline.scheduler is not studio._pipeline.scheduler
    other.add("dog", str(adapters["dog"]))
    assert (studio.adapters, other.adapters) == ((), ("dog",))
    assert studio.draw(SETTINGS).after == draw(base)
    third = copy.deepcopy(other)
    third.remove("dog")
    assert other.draw(SETTINGS).after == draw(base, [adapters["dog"]], [1.0])
    assert copy.deepcopy(Studio()).adapters == ()


def test_sizes_steps_and_progress(base, adapters, studio):
    settings = DrawSettings("a cat", 3, 2, 4.0, height=16, width=32)
    assert studio.draw(settings).after == draw(base, height=16, width=32)
    studio.add("dog", str(adapters["dog"]))
    told = []
    studio.draw(SETTINGS, report=told.append)
    assert told == sorted(told)
    assert {0.25, 0.5, 0.75, 1.0} <= set(told)
    assert "16 × 16" in studio.describe()


def test_settings_and_scales_that_cannot_be_used(studio, adapters):
    for changes, message in (
        ({"steps": 0}, "steps.*from 1 to 1000, found 0"),
        ({"steps": 2.5}, "steps.*found 2.5"),
        ({"seed": -1}, "seed.*found -1"),
        ({"seed": None}, "seed.*found None"),
        ({"height": 20}, "height: expected a multiple of 8, found 20"),
        ({"width": 4096}, "width.*found 4096"),
        ({"guidance": float("nan")}, "guidance.*found nan"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            studio.draw(DrawSettings("a cat", **changes))
    studio.add("dog", str(adapters["dog"]))
    for scale in (float("inf"), True, "much", None):
        with pytest.raises(InvalidValueError, match="dog: expected a number as its scale"):
            studio.draw(SETTINGS, {"dog": scale})
    with pytest.raises(InvalidValueError, match=r"cat: expected the name of an adapter.*has dog"):
        studio.draw(SETTINGS, {"cat": 1.0})


def test_pipelines_that_do_not_load(base, adapters, studio, tmp_path):
    studio.add("dog", str(adapters["dog"]))
    before = studio.draw(SETTINGS)
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "model_index.json").write_text("{")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "model_index.json").write_text('{"_class_name": "PipelineOfTomorrow"}')
    unreadable = [damaged, tmp_path / "text", tmp_path / "later"]
    for source in (tmp_path / "none", tmp_path, *unreadable, "user/nowhere", "a b:c"):
        with pytest.raises(CheckpointError, match="expected a folder or Hub id of a pipeline"):
            studio.load(str(source))
    unet = UNet2DModel(8, block_out_channels=(4, 4), norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(InvalidValueError, match=r"draws from text, found DDPMPipeline.*prompt"):
        studio.load(str(tmp_path / "ddpm"))
    with pytest.raises(InvalidValueError, match="found nothing"):
        studio.load("  ")
    assert (studio.source, studio.adapters) == (str(base), ("dog",))
    assert studio.draw(SETTINGS).after == before.after


def test_adapters_that_do_not_fit(base, adapters, studio, tmp_path):
    studio.add("dog", str(adapters["dog"]))
    before = studio.draw(SETTINGS)
    lora = DiffusionPipeline.from_pretrained(base)
    lora.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", lora.unet.state_dict())
    other = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        other.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(2)
    other.unet.add_adapter(comcat_hf.ComCATConfig(mode="customize", qk_rank=2), adapter_name="x")
    comcat_hf.save_comcat_weights(other, tmp_path / "other", "x")
    for name, source, message in (
        ("lora", tmp_path / "lora", "comcat_adapter.json, found LoRA weights of diffusers"),
        ("other", tmp_path / "other", "made for .*other weights"),
        ("dog", adapters["style"], "dog: expected a name of its own"),
        ("none", tmp_path / "none", "no such"),
        ("a.b", adapters["style"], "cannot be named"),
        ("none", "", "found nothing"),
    ):
        with pytest.raises(ComCATError, match=message):
            studio.add(name, str(source))
        assert studio.adapters == ("dog",)
    with pytest.raises(InvalidValueError, match="cat: expected the name"):
        studio.remove("cat")
    after = studio.draw(SETTINGS)
    assert (after.before, after.after) == (before.before, before.after)


def test_nothing_is_loaded(adapters):
    studio = Studio()
    assert (studio.source, studio.adapters, studio.describe()) == ("", (), "No pipeline is loaded.")
    assert studio.native_size() == (512, 512)
    for call in (lambda: studio.draw(SETTINGS), lambda: studio.add("dog", str(adapters["dog"]))):
        with pytest.raises(InvalidValueError, match="load one first"):
            call()


def test_an_error_while_drawing_keeps_the_adapters(studio, adapters, monkeypatch):
    studio.add("dog", str(adapters["dog"]))
    after = studio.draw(SETTINGS).after

    def fail(*args, **kwargs):
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(studio._pipeline.unet, "forward", fail)
        with pytest.raises(ComCATError, match=r"draw 16 × 16 in 2 steps.*half way"):
            studio.draw(SETTINGS)
        patch.setattr(
            studio._pipeline.unet, "forward", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError())
        )
        with pytest.raises(ComCATError, match="too little memory"):
            studio.draw(SETTINGS)
    assert studio.draw(SETTINGS).after == after


def test_diffusers_is_named_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ComCATError, match=r"pip install 'comcat_hf\[app\]'"):
        Studio().load("somewhere")


@pytest.mark.parametrize(
    ("source", "name"), [("user/my-dog", "my-dog"), ("folder/v1.5/", "v1_5"), ("~/a b", "a_b"), ("/", "adapter")]
)
def test_names_from_sources(source, name):
    assert adapter_name(source) == name


def test_prompts_are_those_of_the_adapters_cards(base, adapters, tmp_path):
    studio = Studio()
    studio.load(str(base))
    assert studio.prompts == ()
    studio.add("dog", str(adapters["dog"]))
    studio.add("style", str(adapters["style"]))
    assert studio.prompts == copy.deepcopy(studio).prompts == ("a sks dog on a beach", "a sks dog")
    studio.remove("dog")
    assert studio.prompts == ()
    for text in ("---\nwidget: 3\n---", "---\n: [\n---", "no card", "---\ninstance_prompt: [a]\n---"):
        (tmp_path / "README.md").write_text(text)
        assert prompts_of(str(tmp_path)) == ()
