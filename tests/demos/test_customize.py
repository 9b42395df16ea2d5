"""The demo of customizing with the smallest of budgets, from end to end, and its parts."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import comcat_hf
from comcat_hf.cli.demo import show_customize
from comcat_hf.demos.compress import load_digits
from comcat_hf.demos.customize import CustomizeDemoSettings, base, judge, methods, run, run_customize_demo
from comcat_hf.errors import ComCATError, InvalidValueError
from comcat_hf.hub import readable_size


TINY = CustomizeDemoSettings(
    steps=2,
    base_steps=2,
    vae_steps=2,
    judge_epochs=1,
    images=4,
    prior=1,
    samples=6,
    caption_samples=1,
    sampling_steps=2,
    threads=1,
)
ROWS = ("base, untouched", "ComCAT, full", "ComCAT, core", "LoRA", "full fine-tuning")
BASE_FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
COMCAT_FILES = ("comcat_adapter.json", "unet/adapter_config.json", "unet/adapter_model.safetensors")


def plain_bar(total, name):
    return iter(range(total))


@pytest.fixture(scope="module", autouse=True)
def few_rates():
    """Two learning rates for one method and one for the others."""
    few = tuple(
        dataclasses.replace(method, rates=method.rates[: 1 + (place == 0)])
        for place, method in enumerate(methods.METHODS)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "METHODS", few)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a run returned, the folder it wrote to, and what it told; the global random state is checked too."""
    folder, told = tmp_path_factory.mktemp("demo") / "out", []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    result = run_customize_demo(folder, TINY, report=told.append, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    return result, folder, told


@pytest.fixture(scope="module")
def data():
    return load_digits()


def opened(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a photo of a V*", num_inference_steps=2, generator=generator, output_type="latent").images


def test_the_table_has_a_row_for_each_method(finished):
    result, _, told = finished
    assert tuple(row.name for row in result.rows) == ROWS
    untouched, full, core, lora, everything = result.rows
    assert (untouched.size, untouched.parameters, untouched.steps, untouched.rate) == (0, 0, 0, None)
    for row in (full, core, lora, everything):
        assert row.steps == TINY.steps and row.seconds > 0
        assert 0 <= row.new <= 1 and 0 <= row.old <= 1
    assert core.parameters < lora.parameters < full.parameters < everything.parameters
    assert core.size < full.size < everything.size
    assert list(full.tried) == ["0.01", "0.03"] and list(lora.tried) == [f"{lora.rate:g}"]
    assert [line.split(",")[0] for line in told[2:]] == [
        f"Teaching 'a photo of a V*' by {name}" for name in ("ComCAT", "ComCAT", "LoRA", "full fine-tuning")
    ]


def test_the_printed_table_has_these_columns(finished, capsys):
    result, folder, _ = finished
    show_customize(result)
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if line.startswith("method ")))
    columns = [column for column in lines[start].split("  ") if column]
    assert [column.strip() for column in columns] == [
        *("method", "size", "trained", "steps", "rate", "seconds", "V* right", "old right")
    ]
    assert tuple(line[:16].strip() for line in lines[start + 2 : start + 7]) == ROWS
    assert readable_size(result.rows[1].size) in lines[start + 3]
    assert any(f'load_comcat_weights(pipe, "{folder}/comcat-full")' in line for line in lines)


def test_the_files_are_there(finished):
    result, folder, _ = finished
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        *(f"base/{name}" for name in BASE_FILES),
        *(f"comcat-{kind}/{name}" for kind in ("full", "core") for name in COMCAT_FILES),
        "lora/pytorch_lora_weights.safetensors",
        *("full-fine-tuning/config.json", "full-fine-tuning/diffusion_pytorch_model.safetensors"),
        *("results.json", "samples.png"),
    }
    assert result.image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_sizes_and_parameters_are_those_of_the_files(finished):
    result, folder, _ = finished
    for row in result.rows[1:]:
        own = folder / row.name.replace(",", "").replace(" ", "-").lower()
        files = [path for path in own.rglob("*") if path.is_file()]
        assert row.size == sum(path.stat().st_size for path in files)
        (weights,) = (path for path in files if path.suffix == ".safetensors")
        assert row.parameters == sum(tensor.numel() for tensor in load_file(weights).values())


def test_the_base_is_a_real_pipeline_that_loads(finished):
    _, folder, _ = finished
    pipeline = opened(folder)
    assert type(pipeline.unet) is UNet2DConditionModel
    assert type(pipeline.scheduler) is DDIMScheduler
    assert pipeline("a photo of a two", num_inference_steps=2).images[0].size == (16, 16)


@pytest.mark.parametrize("kind", ["full", "core"])
def test_a_comcat_adapter_loads_from_its_folder_and_goes_again(finished, kind):
    _, folder, _ = finished
    pipeline = opened(folder)
    before = drawn(pipeline)
    comcat_hf.load_comcat_weights(pipeline, folder / f"comcat-{kind}")
    assert pipeline.unet.peft_config["default"].core is (kind == "core")
    assert not torch.equal(drawn(pipeline), before)
    comcat_hf.unload_comcat_weights(pipeline)
    assert torch.equal(drawn(pipeline), before)


def test_the_others_load_from_their_folders(finished):
    _, folder, _ = finished
    pipeline = opened(folder)
    before = drawn(pipeline)
    pipeline.load_lora_weights(folder / "lora")
    assert not torch.equal(drawn(pipeline), before)
    pipeline.unload_lora_weights()
    pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "full-fine-tuning")
    assert not torch.equal(drawn(pipeline), before)


def test_a_seed_decides_everything(finished, tmp_path):
    result, folder, _ = finished
    again = run_customize_demo(tmp_path, TINY, progress=False)

    def without_time(rows):
        return [dataclasses.replace(row, seconds=0.0) for row in rows]

    assert without_time(again.rows) == without_time(result.rows)
    assert again.image.read_bytes() == result.image.read_bytes()
    names = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(names) == 7
    for name in names:
        one, two = load_file(folder / name), load_file(tmp_path / name)
        assert all(torch.equal(one[key], two[key]) for key in one.keys() | two.keys())


def test_the_record_repeats_the_table(finished):
    result, folder, _ = finished
    record = json.loads((folder / "results.json").read_text())
    assert [row["name"] for row in record["rows"]] == list(ROWS)
    assert [row["new"] for row in record["rows"]] == [row.new for row in result.rows]
    assert record["settings"] == dataclasses.asdict(TINY)
    assert record["judge"]["accuracy"] == result.accuracy
    assert record["judge"]["recall"][base.HELD_OUT] == result.recall


def test_every_word_is_one_token_and_no_caption_has_the_new_ones():
    tokenizer = base.build_tokenizer()
    for text in base.OLD:
        assert len(tokenizer(text).input_ids) == 2 + len(text.split())
        assert not {"v</w>", "*</w>"} & set(tokenizer.tokenize(text))
    assert tokenizer.tokenize(base.NEW)[-2:] == ["v</w>", "*</w>"]
    assert len(tokenizer(base.NEW).input_ids) == base.TOKENS
    assert tokenizer.unk_token_id not in tokenizer(base.NEW).input_ids[:-1]


def test_the_base_never_sees_the_digit_that_is_held_out(data):
    images, captions = base.old_digits(data)
    labels = data.train_labels[data.train_labels != base.HELD_OUT]
    assert images.shape == (len(labels), 3, 16, 16)
    assert [base.OLD[i].split()[-1] for i in captions] == [base.NAMES[digit] for digit in labels]
    assert base.NAMES[base.HELD_OUT] not in {text.split()[-1] for text in base.OLD}


def test_the_judge_reads_digits_that_it_was_not_trained_on(data):
    trained = judge.train_judge(data, 6, plain_bar)
    read = trained.read(base.upsample(data.train_images))
    assert trained.accuracy == (read == data.train_labels).float().mean().item() > 0.85
    new = data.train_labels == base.HELD_OUT
    assert trained.recall[base.HELD_OUT] == pytest.approx((read[new] == base.HELD_OUT).float().mean().item())


@pytest.fixture(scope="module")
def lesson():
    torch.manual_seed(0)
    told = torch.randn(2, base.TOKENS, base.WIDTH)
    return methods.Lesson(
        latents=torch.ones(4, 4, 4, 4),
        told=told[:1].repeat(4, 1, 1),
        prior_latents=-torch.ones(6, 4, 4, 4),
        prior_told=told[1:].repeat(6, 1, 1),
        steps=3,
        batch=4,
        loss=base.noise_loss(base.build_pipeline().scheduler),
        seed=0,
    )


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: method.name)
def test_a_method_trains_what_is_its_own_on_the_same_batches(lesson, method):
    torch.manual_seed(0)
    unet = base.build_pipeline().unet.requires_grad_(False)
    dense = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    seen = []
    method.attach(unet)
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    unet.register_forward_pre_hook(lambda module, given: seen.append(given))
    methods.teach(unet, lesson, method.rates[0], plain_bar, method.name)
    assert not unet.training
    kinds = {"ComCAT, full": "comcat_", "ComCAT, core": "comcat_", "LoRA": "lora_", "full fine-tuning": ""}
    assert trained and all(kinds[method.name] in name for name in trained)
    changed = any(not torch.equal(dense[name], value) for name, value in unet.state_dict().items() if name in dense)
    assert changed is (method.name == "full fine-tuning")

    reference = torch.Generator().manual_seed(lesson.seed)
    assert len(seen) == lesson.steps
    torch.randperm(4, generator=reference), torch.randperm(6, generator=reference)
    clean = torch.cat([lesson.latents, lesson.prior_latents[:4]])
    noise = torch.randn(clean.shape, generator=reference)
    times = torch.randint(1000, (8,), generator=reference)
    noisy, at, told = seen[0]
    scheduler = base.build_pipeline().scheduler
    assert torch.equal(at, times) and torch.equal(noisy, scheduler.add_noise(clean, noise, times))
    assert torch.equal(told, torch.cat([lesson.told, lesson.prior_told[:4]]))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"base_steps": 1}, {"samples": 5}, {"threads": 0}, {"seed": -1}, {"guidance": 1.0}]
)
def test_settings_out_of_range_are_named(tmp_path, wrong):
    with pytest.raises(InvalidValueError, match=next(iter(wrong))):
        run_customize_demo(tmp_path / "out", CustomizeDemoSettings(**wrong))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["diffusers", "matplotlib"])
def test_a_missing_package_is_said_before_anything_is_trained(tmp_path, monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest)
    )
    with pytest.raises(ComCATError, match=rf"needs {missing}, .*comcat_hf\[demo,diffusers\]"):
        run_customize_demo(tmp_path / "out", TINY)
