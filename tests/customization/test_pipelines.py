"""Adapters of whole pipelines: saved, loaded, swapped and taken away; errors leave the pipeline as it was."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import comcat_hf.customization.parts as parts
import comcat_hf.customization.pipelines as pipelines
from comcat_hf import ComCATConfig, load_comcat_weights, save_comcat_weights, unload_comcat_weights
from comcat_hf.errors import CheckpointError, ComCATError, InvalidValueError
from comcat_hf.tuners import ComCATLayer
from tests.customization.pipelines import tiny_sd, tiny_sdxl


FULL = {"qk_rank": 2, "vo_rank": 1}
CORE = {"qk_rank": 2, "vo_rank": 2, "core": True}
KINDS = {"sd": tiny_sd, "sd2": lambda folder: tiny_sd(folder, "v_prediction"), "sdxl": tiny_sdxl}
TEXT = {"sd": ("text_encoder",), "sd2": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}
WEIGHTS, CONFIG, INDEX = "adapter_model.safetensors", "adapter_config.json", "comcat_adapter.json"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("ignore:Adapter name 'cat' should not be contained"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind) / "base") for kind, make in KINDS.items()}


@pytest.fixture(scope="module")
def dense(folders) -> dict[str, DiffusionPipeline]:
    classes = {"sdxl": StableDiffusionXLPipeline}
    found = {}
    for kind, folder in folders.items():
        found[kind] = classes.get(kind, StableDiffusionPipeline).from_pretrained(folder)
        found[kind].set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def build(dense):
    """A pipeline of its own for each call."""

    def build(kind: str = "sd") -> DiffusionPipeline:
        parts = dense[kind].components
        models = {name: copy.deepcopy(part) for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        pipe = type(dense[kind])(**{**parts, **models}, **_options(kind))
        pipe.register_to_config(_name_or_path=dense[kind].config._name_or_path)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


def _options(kind: str) -> dict:
    return {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False}


@torch.no_grad()
def draw(pipe: DiffusionPipeline, steps: int = 1, **kwargs) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a cat", num_inference_steps=steps, generator=generator, height=16, width=16, output_type="latent", **kwargs
    ).images


def adapt(pipe: DiffusionPipeline, name: str = "dog", parts=("unet",), seed: int = 3, **adapter) -> None:
    """Add an adapter with random factors."""
    torch.manual_seed(seed)
    for part in parts:
        settings = ComCATConfig(mode="customize", init_weights=False, **(adapter or FULL))
        getattr(pipe, part).add_adapter(settings, adapter_name=name)


def active(pipe: DiffusionPipeline) -> dict[str, list]:
    return {
        name: [list(m.active_adapters) for m in model.modules() if hasattr(m, "active_adapters") and hasattr(m, "r")]
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
    }


class Unchanged:
    """Remembers a pipeline; `check` sees whether it is the same, to the bit."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.before = self._look()
        self.image = draw(pipe)

    def _look(self):
        models = {n: m for n, m in self.pipe.components.items() if isinstance(m, torch.nn.Module)}
        return (
            active(self.pipe),
            {n: list(getattr(m, "peft_config", ())) for n, m in models.items()},
            {n: getattr(m, "_hf_peft_config_loaded", False) for n, m in models.items()},
            {f"{n}.{k}": p.requires_grad for n, m in models.items() for k, p in m.named_parameters()},
            {f"{n}.{k}": type(c) for n, m in models.items() for k, c in m.named_modules()},
        )

    def check(self) -> None:
        assert self._look() == self.before
        assert torch.equal(draw(self.pipe), self.image)


@pytest.fixture(scope="module")
def written(build, tmp_path_factory) -> Path:
    pipe = build()
    adapt(pipe, parts=("unet", "text_encoder"))
    return save_comcat_weights(pipe, tmp_path_factory.mktemp("written"), "dog")


@pytest.fixture
def saved(written, tmp_path) -> Path:
    """An adapter of the UNet and the text encoder, of which a test may do what it likes."""
    return Path(shutil.copytree(written, tmp_path / "dog"))


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("kind", "text", "adapter"),
        [("sd", False, FULL), ("sd", True, CORE), ("sd2", True, FULL), ("sdxl", False, CORE), ("sdxl", True, FULL)],
    )
    def test_saved_loaded_unloaded(self, build, tmp_path, kind, text, adapter):
        parts = ("unet", *(TEXT[kind] if text else ()))
        adapter = {**adapter, "scale": 0.5}
        pipe = build(kind)
        plain = draw(pipe)
        adapt(pipe, parts=parts, **adapter)
        expected = draw(pipe)
        assert not torch.equal(expected, plain)
        folder = save_comcat_weights(pipe, tmp_path / "dog", "dog")
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(
            [INDEX, *(f"{part}/{file}" for part in parts for file in (CONFIG, WEIGHTS))]
        )
        other = build(kind)
        before = Unchanged(other)
        load_comcat_weights(other, folder, "cat")
        assert torch.equal(draw(other), expected)
        assert other.get_active_adapters() == ["cat"]
        assert dict(other.get_list_adapters()) == {part: ["cat"] for part in parts}
        grads = [p for part in parts for n, p in getattr(other, part).named_parameters() if "comcat_" not in n]
        assert not any(p.requires_grad for p in grads)
        other.set_adapters(["cat"], [0.0])
        assert (draw(other) - plain).abs().max() <= 1e-4 * plain.abs().max()
        unload_comcat_weights(other)
        assert torch.equal(draw(other), plain)
        assert not any(isinstance(m, ComCATLayer) for part in parts for m in getattr(other, part).modules())
        assert before._look()[1:3] == before.before[1:3]
        load_comcat_weights(other, str(folder), "dog")
        assert torch.equal(draw(other), expected)

    def test_what_is_recorded(self, build, tmp_path):
        pipe = build()
        adapt(pipe, scale=0.5, **FULL)
        folder = save_comcat_weights(pipe, tmp_path, "dog", base_model_name_or_path="user/base", revision="abc")
        index, config = (json.loads((folder / name).read_text()) for name in (INDEX, f"unet/{CONFIG}"))
        assert (index["base_model_name_or_path"], index["revision"]) == ("user/base", "abc")
        assert (config["base_model_name_or_path"], config["revision"]) == ("user/base", "abc")
        assert index["parts"]["unet"]["class"] == "UNet2DConditionModel"
        with safe_open(folder / "unet" / WEIGHTS, "pt") as file:
            assert json.loads(file.metadata()["comcat_config"]) == config
        assert (config["mode"], config["qk_rank"], config["scale"]) == ("customize", 2, 0.5)
        state = load_file(folder / "unet" / WEIGHTS)
        assert all("comcat_" in key and "dog" not in key for key in state)
        # A folder of this machine is nobody's business.
        folder = save_comcat_weights(pipe, tmp_path / "2", "dog", revision="abc")
        files = [folder / INDEX, folder / "unet" / CONFIG, folder / "unet" / WEIGHTS]
        assert not [path for path in files if str(pipe.config._name_or_path).encode() in path.read_bytes()]
        assert json.loads((folder / INDEX).read_text())["revision"] is None

    @pytest.mark.parametrize(("value", "dtype"), [(1e6, torch.float16), (math.nan, None)])
    def test_weights_that_are_not_finite_in_the_file_are_refused(self, build, saved, value, dtype):
        pipe = build()
        adapt(pipe)
        before = (saved / "unet" / WEIGHTS).read_bytes()
        weight = next(p for name, p in pipe.unet.named_parameters() if "comcat" in name)
        with torch.no_grad():
            weight.view(-1)[0] = value
        with pytest.raises(InvalidValueError, match=r"unet\.\S+: expected finite weights.*(bfloat16|lower rate)"):
            save_comcat_weights(pipe, saved, "dog", dtype=dtype)
        assert (saved / "unet" / WEIGHTS).read_bytes() == before
        load_comcat_weights(build(), saved)

    def test_dtypes_of_files_and_of_bases(self, build, saved, tmp_path):
        pipe = build()
        adapt(pipe)
        expected = draw(pipe)
        for dtype in (torch.float16, torch.bfloat16):
            folder = save_comcat_weights(pipe, tmp_path / str(dtype), "dog", dtype=dtype)
            state = load_file(folder / "unet" / WEIGHTS)
            assert {t.dtype for t in state.values()} == {dtype}
            other = build()
            load_comcat_weights(other, folder)
            assert {p.dtype for p in other.unet.parameters()} == {torch.float32}
            assert (draw(other) - expected).norm() <= 3e-2 * expected.norm()
            assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
        pipe = build().to(torch.bfloat16)
        load_comcat_weights(pipe, saved)
        assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}
        assert draw(pipe).dtype == torch.bfloat16

    def test_parts_by_name(self, build, saved):
        pipe = build()
        load_comcat_weights({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, saved, "dog")
        expected = draw(pipe)
        unload_comcat_weights({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        load_comcat_weights(pipe, saved.parent, "dog", subfolder=saved.name)
        assert torch.equal(draw(pipe), expected)

    def test_saving_again_over_another(self, build, saved):
        pipe = build()
        adapt(pipe, seed=8, **CORE)
        expected = draw(pipe)
        save_comcat_weights(pipe, saved, "dog")
        other = build()
        load_comcat_weights(other, saved)
        assert torch.equal(draw(other), expected) and "text_encoder" not in other.get_list_adapters()

    def test_saving_that_stops_half_way_leaves_nothing_that_loads(self, build, saved, monkeypatch):
        pipe = build()
        adapt(pipe, parts=("unet", "text_encoder"), seed=8)
        write, written = pipelines.write_safetensors, []

        def stop(path, *content):
            if written:
                raise OSError("No space left on device")
            written.append(write(path, *content) or path)

        monkeypatch.setattr(pipelines, "write_safetensors", stop)
        with pytest.raises(OSError, match="No space"):
            save_comcat_weights(pipe, saved, "dog")
        monkeypatch.undo()
        assert not [p for p in saved.rglob("*") if p.name.endswith(".tmp")]
        # One part of it is the new one by now, the other still the old.
        with pytest.raises(CheckpointError, match=INDEX):
            load_comcat_weights(build(), saved)

    def test_only_what_is_there_can_be_saved(self, build, tmp_path):
        pipe = build()
        with pytest.raises(InvalidValueError, match=r"no ComCAT adapter 'dog'.*add_adapter"):
            save_comcat_weights(pipe, tmp_path / "out", "dog")
        adapt(pipe)
        with pytest.raises(InvalidValueError, match=r"no ComCAT adapter 'x'.*it has dog"):
            save_comcat_weights(pipe, tmp_path / "out", "x")
        with pytest.raises(InvalidValueError, match=r"Expected a diffusers pipeline.*UNet2DConditionModel"):
            save_comcat_weights(pipe.unet, tmp_path / "out", "dog")
        assert not (tmp_path / "out").exists()


class TestUsing:
    def test_several_with_weights(self, build, saved):
        pipe = build()
        load_comcat_weights(pipe, saved, "dog")
        dog = draw(pipe)
        adapt(pipe, "style", seed=9, **CORE)
        pipe.set_adapters(["dog", "style"], [1.0, 0.0])
        assert (draw(pipe) - dog).abs().max() <= 1e-4 * dog.abs().max()
        pipe.set_adapters(["dog", "style"], [0.8, 0.5])
        both = draw(pipe)
        half = {"down": {"block_0": [0.2], "block_1": 0.7}, "mid": 1.0, "up": 0.3}
        pipe.set_adapters(["dog"], [{"unet": half, "text_encoder": 0.5}])
        scales = {n: m.scaling["dog"] for n, m in pipe.unet.named_modules() if isinstance(m, ComCATLayer)}
        for start, value in (("down_blocks.0", 0.2), ("down_blocks.1", 0.7), ("mid", 1.0), ("up", 0.3)):
            assert {s for n, s in scales.items() if n.startswith(start)} == {value}
        text = [m.scaling["dog"] for m in pipe.text_encoder.modules() if isinstance(m, ComCATLayer)]
        assert set(text) == {0.5}
        pipe.set_adapters(["dog", "style"], [0.8, 0.5])
        assert torch.equal(draw(pipe), both)
        pipe.delete_adapters("style")
        pipe.set_adapters(["dog"], [1.0])
        assert torch.equal(draw(pipe), dog)

    def test_the_scale_of_a_call_and_fused_into_the_whole_pipeline(self, build, saved):
        pipe = build()
        plain = draw(pipe)
        load_comcat_weights(pipe, saved, "dog")
        expected = draw(pipe)
        zero = draw(pipe, cross_attention_kwargs={"scale": 0.0})
        assert (zero - plain).abs().max() <= 1e-4 * plain.abs().max()
        assert torch.equal(draw(pipe), expected)
        pipe.fuse_lora(components=["unet", "text_encoder"])
        assert (draw(pipe) - expected).abs().max() <= 1e-4 * expected.abs().max()
        fused = Unchanged(pipe)
        with pytest.raises(InvalidValueError, match=r"dog are fused into (unet|text_encoder).*unfuse_lora"):
            unload_comcat_weights(pipe)
        with pytest.raises(InvalidValueError, match=r"dog is fused into (unet|text_encoder).*unfuse_lora"):
            load_comcat_weights(pipe, saved, "dog", hotswap=True)
        fused.check()
        pipe.unfuse_lora(components=["unet", "text_encoder"])
        assert torch.equal(draw(pipe), expected)
        unload_comcat_weights(pipe)
        assert torch.equal(draw(pipe), plain)

    def test_a_lora_stays(self, build, saved):
        pipe = build()
        torch.manual_seed(1)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False), "lora")
        expected = draw(pipe)
        load_comcat_weights(pipe, saved, "dog")
        pipe.set_adapters(["lora", "dog"])
        assert not torch.equal(draw(pipe), expected)
        pipe.set_adapters(["lora"])
        assert torch.equal(draw(pipe), expected)
        unload_comcat_weights(pipe)
        assert torch.equal(draw(pipe), expected)
        assert list(pipe.unet.peft_config) == ["lora"] and not hasattr(pipe.text_encoder, "peft_config")
        pipe.set_adapters(["lora"], [0.0])
        assert not torch.equal(draw(pipe), expected)

    def test_unloading_nothing(self, build):
        pipe = build()
        before = Unchanged(pipe)
        unload_comcat_weights(pipe)
        before.check()


class TestSwapping:
    def _other(self, build, folder: Path, **adapter) -> tuple[Path, Tensor]:
        pipe = build()
        adapt(pipe, parts=("unet", "text_encoder"), seed=11, **(adapter or FULL))
        return save_comcat_weights(pipe, folder, "dog"), draw(pipe)

    def test_values_are_swapped_in_place_and_the_scale_of_the_other_counts(self, build, saved, tmp_path):
        other, expected = self._other(build, tmp_path / "other", **FULL, scale=0.3)
        pipe = build()
        load_comcat_weights(pipe, saved, "dog")
        own = dict(pipe.unet.named_parameters())
        load_comcat_weights(pipe, other, "dog", hotswap=True)
        assert torch.equal(draw(pipe), expected)
        assert all(p is own[n] for n, p in pipe.unet.named_parameters())
        assert pipe.unet.peft_config["dog"].scale == 0.3
        again = save_comcat_weights(pipe, tmp_path / "again", "dog")
        fresh = build()
        load_comcat_weights(fresh, again, "dog")
        assert torch.equal(draw(fresh), expected)

    def test_what_does_not_fit_is_refused(self, build, saved, tmp_path):
        pipe = build()
        load_comcat_weights(pipe, saved, "dog")
        before = Unchanged(pipe)
        for number, adapter in enumerate(({"qk_rank": 1, "vo_rank": 1}, CORE, {"qk_rank": 2})):
            other, _ = self._other(build, tmp_path / str(number), **adapter)
            with pytest.raises(CheckpointError, match="other ranks"):
                load_comcat_weights(pipe, other, "dog", hotswap=True)
            before.check()
        part = build()
        adapt(part, seed=11)
        other = save_comcat_weights(part, tmp_path / "part", "dog")
        with pytest.raises(InvalidValueError, match="text_encoder"):
            load_comcat_weights(pipe, other, "dog", hotswap=True)
        before.check()
        with pytest.raises(InvalidValueError, match=r"no ComCAT adapter 'cat'.*without hotswap"):
            load_comcat_weights(pipe, saved, "cat", hotswap=True)
        before.check()

    def test_nothing_is_compiled_again(self, build, saved, tmp_path):
        other, _ = self._other(build, tmp_path / "other")
        pipe = build()
        load_comcat_weights(pipe, saved, "dog")
        torch._dynamo.reset()
        counter = CompileCounter()
        block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
        compiled = torch.compile(block, backend=counter, fullgraph=True)
        x, text = torch.randn(1, 4, 32), torch.randn(1, 5, 16)
        first = compiled(x, encoder_hidden_states=text)
        load_comcat_weights(pipe, other, "dog", hotswap=True)
        pipe.set_adapters(["dog"], [0.6])
        second = compiled(x, encoder_hidden_states=text)
        assert torch.allclose(second, block(x, encoder_hidden_states=text), atol=1e-5)
        assert not torch.allclose(first, second, atol=1e-3)
        assert counter.frame_count == 1
        torch._dynamo.reset()


def _cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def _change(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _edit_weights(path: Path, edit) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata)


# What is done to a saved folder, and the words of the error.
PART = {"class": "UNet2DConditionModel", "base_sizes": {}}
NO_SIZES = PART | {"base_sizes": None}
_DAMAGE = {
    "cut_weights": (lambda f: _cut(f / "unet" / WEIGHTS), f"{WEIGHTS}.*cut short"),
    "cut_header": (lambda f: _cut(f / "text_encoder" / WEIGHTS, 0.01), f"{WEIGHTS}.*cut short"),
    "empty_weights": (lambda f: (f / "unet" / WEIGHTS).write_bytes(b""), f"{WEIGHTS}.*cut short"),
    "cut_config": (lambda f: _cut(f / "unet" / CONFIG), f"{CONFIG}.*expected JSON"),
    "cut_index": (lambda f: _cut(f / INDEX), f"{INDEX}.*expected JSON"),
    "no_index": (lambda f: (f / INDEX).unlink(), INDEX),
    "no_weights": (lambda f: (f / "unet" / WEIGHTS).unlink(), WEIGHTS),
    "no_config": (lambda f: (f / "text_encoder" / CONFIG).unlink(), CONFIG),
    "other_format": (lambda f: _change(f / INDEX, format="x"), "expected format 'comcat_adapter'"),
    "later_version": (lambda f: _change(f / INDEX, format_version=9), "format_version 1, found .* 9"),
    "parts_are_no_mapping": (lambda f: _change(f / INDEX, parts=["unet"]), "parts: expected a mapping"),
    "a_part_is_no_mapping": (lambda f: _change(f / INDEX, parts={"unet": None}), INDEX),
    "unknown_part": (lambda f: _change(f / INDEX, parts={"prior": PART}, digest=None), "'prior'.*does not have"),
    "changed_index": (lambda f: _change(f / INDEX, revision="x"), "found it changed"),
    "no_sizes": (lambda f: _change(f / INDEX, parts={"unet": NO_SIZES}, digest=None), "base_sizes: expected"),
    "hostile_part": (lambda f: _change(f / INDEX, parts={"../x": PART}, digest=None), "'parts' by their names"),
    "mixed_ranks": (lambda f: _change(f / "unet" / CONFIG, qk_rank=1), "qk_rank=2.*says 1"),
    "mixed_bases": (lambda f: _change(f / "unet" / CONFIG, base_model_name_or_path="x"), "base_model_name_or_path"),
    "mixed_core": (lambda f: _change(f / "unet" / CONFIG, core=True), "core=False.*says True"),
    "mixed_scale": (lambda f: _change(f / "unet" / CONFIG, scale=4.0), "scale=1.0.*says 4.0"),
    "mixed_targets": (lambda f: _change(f / "unet" / CONFIG, target_modules=["attn1"]), "target_modules"),
    "no_rank": (lambda f: _change(f / "unet" / CONFIG, qk_rank=0), "qk_rank"),
    "a_lora": (lambda f: _change(f / "unet" / CONFIG, peft_type="LORA"), "found peft_type 'LORA'"),
    "compress": (lambda f: _change(f / "unet" / CONFIG, mode="compress"), "mode 'compress'"),
    "missing_key": (lambda f: _edit_weights(f / "unet" / WEIGHTS, lambda s: s.pop(min(s))), "found None"),
    "further_key": (
        lambda f: _edit_weights(f / "text_encoder" / WEIGHTS, lambda s: s.update(more=torch.zeros(1))),
        "more of shape None",
    ),
    "other_shape": (
        lambda f: _edit_weights(f / "text_encoder" / WEIGHTS, lambda s: s.update({min(s): torch.zeros(1)})),
        r"found \(1,\)",
    ),
}


class TestBadInput:
    @pytest.fixture(scope="class")
    def kept(self, build):
        """One pipeline for many errors: none changes it."""
        pipe = build()
        adapt(pipe, "other", seed=6, **CORE)
        return Unchanged(pipe)

    @pytest.mark.parametrize("damage", list(_DAMAGE))
    def test_a_damaged_folder(self, kept, saved, damage):
        harm, words = _DAMAGE[damage]
        harm(saved)
        with pytest.raises(ComCATError, match=words):
            load_comcat_weights(kept.pipe, saved, "dog")
        kept.check()

    def test_ranks_that_differ_without_a_header(self, build, saved):
        file = saved / "unet" / WEIGHTS
        save_file(load_file(file), file)
        load_comcat_weights(build(), saved, "dog")
        _change(saved / "unet" / CONFIG, qk_rank=1)
        pipe = build()
        before = Unchanged(pipe)
        with pytest.raises(CheckpointError, match="other ranks"):
            load_comcat_weights(pipe, saved, "dog")
        before.check()

    def test_a_lora_folder(self, build, tmp_path):
        pipe = build()
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
        StableDiffusionPipeline.save_lora_weights(tmp_path, pipe.unet.state_dict())
        before = Unchanged(pipe)
        with pytest.raises(
            CheckpointError, match=f"{INDEX}, found LoRA weights of diffusers; load it with pipe.load_lora_weights"
        ):
            load_comcat_weights(pipe, tmp_path, "dog")
        with pytest.raises(CheckpointError, match="no such"):
            load_comcat_weights(pipe, tmp_path / "nowhere", "dog")
        before.check()

    def test_a_base_of_other_shapes(self, build, tmp_path):
        pipe = build("sdxl")
        adapt(pipe)
        folder = save_comcat_weights(pipe, tmp_path, "dog")
        pipe = build("sd")
        before = Unchanged(pipe)
        with pytest.raises(InvalidValueError, match="other attention modules"):
            load_comcat_weights(pipe, folder, "dog")
        before.check()
        with pytest.raises(ComCATError, match="shape"):
            load_comcat_weights(pipe, folder, "dog", check_base=False)
        before.check()

    @pytest.mark.parametrize("adapter", [FULL, CORE], ids=["full", "core"])
    def test_a_base_of_other_weights(self, build, tmp_path, adapter):
        pipe = build()
        adapt(pipe, **adapter)
        folder = save_comcat_weights(pipe, tmp_path, "dog")
        other = build()
        with torch.no_grad():
            for name, parameter in other.unet.named_parameters():
                if "to_q" in name:
                    parameter.mul_(1.2)
        before = Unchanged(other)
        with pytest.raises(InvalidValueError, match=r"other weights.*to_q|other weights.*queries.*check_base=False"):
            load_comcat_weights(other, folder, "dog")
        before.check()
        load_comcat_weights(other, folder, "dog", check_base=False)
        assert not torch.equal(draw(other), before.image)

    def test_a_base_that_was_tuned_a_little_passes(self, build, saved):
        pipe = build()
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.add_(0.01 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
        load_comcat_weights(pipe, saved, "dog")

    def test_a_name_that_is_taken_or_cannot_be(self, build, saved):
        pipe = build()
        adapt(pipe, "dog", seed=6)
        pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "lora")
        before = Unchanged(pipe)
        for name in ("dog", "lora"):
            with pytest.raises(InvalidValueError, match=f"an adapter '{name}' already.*hotswap"):
                load_comcat_weights(pipe, saved, name)
            before.check()
        for name in ("to_q", "attn1", "a.b", "weight", ""):
            with pytest.raises(InvalidValueError, match="cannot be named"):
                load_comcat_weights(pipe, saved, name)
        before.check()

    @pytest.mark.parametrize(
        ("where", "error", "beside"),
        [
            ("inject_adapter_in_model", RuntimeError, False),
            ("inject_adapter_in_model", KeyboardInterrupt, True),
            ("set_peft_model_state_dict", RuntimeError, True),
            ("set_peft_model_state_dict", KeyboardInterrupt, False),
        ],
    )
    def test_a_failure_in_the_second_part_restores_the_first(self, build, saved, monkeypatch, where, error, beside):
        pipe = build()
        if beside:
            adapt(pipe, "other", parts=("unet", "text_encoder"), seed=6, **CORE)
        before = Unchanged(pipe)
        run, calls = getattr(parts, where), []

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) == 2:
                raise error("half way")
            return run(*args, **kwargs)

        monkeypatch.setattr(parts, where, fail)
        with pytest.raises(error, match="half way"):
            load_comcat_weights(pipe, saved, "dog")
        monkeypatch.undo()
        before.check()
        load_comcat_weights(pipe, saved, "dog")


def test_nothing_is_made_twice(build, saved, monkeypatch):
    """The factors are empty until those of the file take their place."""
    made = []
    start = parts.inject_adapter_in_model

    def inject(config, model, name, **kwargs):
        start(config, model, name, **kwargs)
        made.extend(p for n, p in model.named_parameters() if f".{name}." in n)

    monkeypatch.setattr(parts, "inject_adapter_in_model", inject)
    pipe = build()
    load_comcat_weights(pipe, saved, "dog")
    assert made and all(p.is_meta for p in made)
    assert not any(p.is_meta for p in pipe.unet.parameters())
