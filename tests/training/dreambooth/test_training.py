"""DreamBooth training on real pipelines of tiny size, in this process and through the script."""

import json
import os
import random
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file

from comcat_hf.customization.pipelines import load_comcat_weights
from comcat_hf.errors import CheckpointError, InvalidValueError, UnsupportedModuleError
from comcat_hf.reporting.plots import plot_image_grid
from comcat_hf.training.dreambooth.__main__ import main
from comcat_hf.training.dreambooth.loop import customize
from comcat_hf.training.dreambooth.losses import DiffusionLoss
from comcat_hf.training.dreambooth.sampling import BEFORE_AFTER, generate
from comcat_hf.training.dreambooth.settings import CustomizeSettings, parse_customize_settings
from comcat_hf.training.locks import locked
from comcat_hf.training.recipes import recipe_names
from comcat_hf.training.seeds import choose_seed, seeded
from tests.customization.pipelines import ddpm, tiny_sd, tiny_sdxl, write_digits
from tests.processes import forked, in_processes, until
from tests.training.conftest import Recorder


TEST = {"resolution": 16, "train_batch_size": 2, "num_inference_steps": 2, "seed": 7, "instance_prompt": "a sks 3"}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a 3", "num_class_images": 3}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of an SD 1.x, an SD 2.x and an SDXL pipeline, and of images."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_sd(folder / "sd")
    tiny_sd(folder / "sd2", "v_prediction")
    tiny_sdxl(folder / "sdxl")
    write_digits(folder / "three")
    return folder


def settings(bases, output_dir, base="sd", **changes):
    given = {"pretrained_model_name_or_path": str(bases / base), "instance_data_dir": str(bases / "three")}
    return CustomizeSettings(**(TEST | given | {"output_dir": str(output_dir), "max_train_steps": 2} | changes))


def flags(given):
    """The command line of some settings."""
    chosen = {n: v for n, v in vars(given).items() if v != CustomizeSettings.__dataclass_fields__[n].default}
    return [f"--{name}={value}" for name, value in chosen.items() if str(value) != "2" or "rank" not in name]


def train_in_group(arguments, folder):
    """The program, as one process of a group or alone; what it says goes into a file."""
    sys.argv = ["program", *arguments]
    place = folder / f"{os.environ.get('RANK', '0')}.txt"
    with place.open("w") as said, redirect_stdout(said), redirect_stderr(said):
        assert main() == 0


def weights(folder):
    """All adapter weights in a folder by part and name."""
    files = sorted(Path(folder).glob("*/adapter_model.safetensors"))
    return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}


def same(ours, theirs):
    ours, theirs = weights(ours), weights(theirs)
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


# Training


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("sd", {"save_precision": "bf16"}),
        ("sd2", {"snr_gamma": 5.0, "qk_rank": "none", "lr_scheduler": "cosine", "lr_warmup_steps": 1}),
        ("sdxl", {"train_text_encoder": True, "gradient_checkpointing": True, "core": True, "gains": True}),
        (
            "sdxl",
            {"cache_latents": True, "random_flip": True, "mixed_precision": "bf16", "vo_rank": 0}
            | {"save_precision": "bf16"},
        ),
    ],
    ids=["sd", "sd2", "sdxl-text", "sdxl-cached"],
)
def test_pipelines_learn_and_load_again(bases, tmp_path, base, changes):
    output = tmp_path / "out"
    result = customize(settings(bases, output, base, learning_rate=0.05, **changes))
    assert result.step == 2 and result.interrupted is None and 0 < result.loss < 100
    learned = weights(output)
    assert sum(value.numel() for value in learned.values()) == sum(result.plan.parameters.values())
    saved = torch.bfloat16 if "save_precision" in changes else torch.float32
    assert {value.dtype for value in learned.values()} == {saved}
    assert any(("query" in name or "qk" in name) for name in learned) == (result.plan.settings.qk_rank is not None)
    pipe = DiffusionPipeline.from_pretrained(bases / base)

    def draw():
        made = pipe("a sks 3", num_inference_steps=2, generator=torch.manual_seed(0), output_type="np")
        return torch.from_numpy(made.images)

    before = draw()
    load_comcat_weights(pipe, output, "default")
    assert (draw() - before).abs().max() > 1e-3
    pipe.unet.disable_adapters()
    if changes.get("train_text_encoder"):
        pipe.text_encoder.disable_adapters()
        pipe.text_encoder_2.disable_adapters()
    assert torch.equal(draw(), before)


def test_the_text_encoder_learns(bases, tmp_path):
    given = {"train_text_encoder": True, "learning_rate": 0.01, "checkpointing_steps": 1}
    customize(settings(bases, tmp_path, **given, gradient_accumulation_steps=2))
    first, last = weights(tmp_path / "checkpoint-1"), weights(tmp_path)
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    text = {name for name in last if name.startswith("text_encoder.")}
    assert text and text <= changed and {name for name in last if name.startswith("unet.")} <= changed


def test_the_loss_falls(bases, tmp_path):
    """Against a training that does not move, on the same images with the same noise."""
    losses = {}
    for rate in (1e-12, 1e-2):
        tracker = Recorder()
        accelerator = Accelerator(cpu=True, log_with=[tracker])
        given = {"learning_rate": rate, "cache_latents": True, "lr_scheduler": "constant", "max_train_steps": 25}
        customize(settings(bases, tmp_path / str(rate), **given), accelerator=accelerator)
        losses[rate] = torch.tensor([values["loss"] for values, _ in tracker.logged])
    still, moving = losses.values()
    assert still[0] == moving[0]
    assert (moving[-10:] < still[-10:]).sum() >= 9 and moving[-10:].sum() < 0.99 * still[-10:].sum()


def test_validation_images_go_to_disk_and_to_the_tracker(bases, tmp_path):
    tracker = Recorder()
    given = {"validation_prompt": "sks", "validation_steps": 2, "num_validation_images": 3, "cache_latents": True}
    wanted = settings(bases, tmp_path / "seen", max_train_steps=3, hub_token="secret", **given)
    customize(wanted, accelerator=Accelerator(cpu=True, log_with=[tracker]))
    grids = sorted((tmp_path / "seen" / "validation").iterdir())
    assert [path.name for path in grids] == ["step-000002.png", "step-000003.png"]
    assert Image.open(grids[0]).size == (32, 32)
    assert [(len(values["validation"]), step) for values, step in tracker.images] == [(3, 2), (3, 3)]
    assert [step for _, step in tracker.logged] == [1, 2, 3] and "secret" not in str(tracker.config)


def test_class_images_are_generated_once(bases, tmp_path):
    folder = tmp_path / "class"
    write_digits(folder, count=1)
    (folder / ".DS_Store").write_bytes(b"junk")
    given = PRIOR | {"class_data_dir": str(folder), "sample_batch_size": 1}
    said = []
    customize(settings(bases, tmp_path / "one", **given), report=said.append)
    found = everything_in(folder)
    assert len(found) == 4 and "1 of the class, 2 more are generated" in said[0]
    assert all(Image.open(folder / name).size == (16, 16) for name in found if name.startswith("class-"))
    customize(settings(bases, tmp_path / "two", **given))
    assert everything_in(folder) == found
    assert same(tmp_path / "one", tmp_path / "two")
    customize(settings(bases, tmp_path / "three", **given, prior_loss_weight=0.1))
    assert not same(tmp_path / "one", tmp_path / "three")
    with pytest.raises(InvalidValueError, match=r"expected an image of --class_prompt 'a 5', found one .* for 'a 3'"):
        customize(settings(bases, tmp_path / "four", **given | {"class_prompt": "a 5"}))
    assert everything_in(folder) == found


def test_what_is_uploaded(bases, tmp_path, monkeypatch):
    """The adapter, its card and the grids; no checkpoints, no junk."""
    sent = []

    def push(source, repo_id, **given):
        files = [name for name in everything_in(source) if (source / name).is_file()]
        sent.append(
            (repo_id, given["token"], list(filter_repo_objects(files, allow_patterns=given["allow_patterns"])))
        )
        return "the commit"

    monkeypatch.setattr("comcat_hf.training.settings.push_folder", push)
    given = {"validation_prompt": "sks", "num_validation_images": 1, "checkpointing_steps": 1, "train_batch_size": 1}
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "junk.txt").write_text("junk")
    result = customize(settings(bases, tmp_path / "dog", push_to_hub=True, hub_token="secret", **given))
    assert result.commit == "the commit"
    (repository, token, files) = sent[0]
    assert (repository, token) == ("dog", "secret")
    assert files == [
        "README.md",
        "before_after.png",
        "comcat_adapter.json",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
        "validation/step-000002.png",
    ]
    card = (tmp_path / "dog" / "README.md").read_text()
    assert "a sks 3" in card and "secret" not in card
    assert "](before_after.png)" in card


def test_before_is_what_the_base_draws_and_after_what_was_validated(bases, tmp_path, monkeypatch):
    seen = {}

    def draw(rows, path, **given):
        seen.update(rows)
        return plot_image_grid(rows, path, **given)

    monkeypatch.setattr("comcat_hf.training.dreambooth.sampling.plot_image_grid", draw)
    given = {"validation_prompt": "a sks 3", "num_validation_images": 2, "seed": 3, "learning_rate": 0.1}
    wanted = settings(bases, tmp_path / "dog", **given)
    customize(wanted)
    Image.open(tmp_path / "dog" / "before_after.png").verify()
    assert list(seen) == ["before", "after"] and seen["after"].shape == (2, 3, 16, 16)
    (grid,) = (tmp_path / "dog" / "validation").glob("*.png")
    first = torch.frombuffer(bytearray(Image.open(grid).tobytes()), dtype=torch.uint8).view(16, 32, 3)[:, :16]
    assert torch.equal((seen["after"][0] * 255).round().byte(), first.permute(2, 0, 1))
    base = DiffusionPipeline.from_pretrained(wanted.pretrained_model_name_or_path)
    generators = [seeded(3, "validation", number) for number in range(2)]
    drawn = generate(base, ["a sks 3"] * 2, generators, wanted)
    plain = torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) for image in drawn])
    assert torch.equal((seen["before"] * 255).round().byte(), plain)
    assert not torch.equal(seen["before"], seen["after"])


# Resuming


def test_a_training_with_gains_that_an_earlier_version_began_goes_on_at_one_rate(bases, tmp_path):
    changes = {"gains": True, "core": True, "checkpointing_steps": 1, "max_train_steps": 2}
    whole, rest, other = (tmp_path / name for name in ("whole", "rest", "other"))
    customize(settings(bases, whole, **changes, gains_lr_ratio=1.0))
    shutil.copytree(whole / "checkpoint-1", rest / "checkpoint-1")
    state = rest / "checkpoint-1" / "training_state.json"
    content = json.loads(state.read_text())
    del content["facts"]["gains_lr_ratio"], content["digest"]
    state.write_text(json.dumps(content))
    customize(settings(bases, rest, **changes, resume_from_checkpoint="latest"))
    assert same(whole, rest)
    customize(settings(bases, other, **changes))
    assert not same(whole, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_text_encoder": True, "random_flip": True, "gradient_accumulation_steps": 2, "snr_gamma": 5.0, **PRIOR},
        {"cache_latents": True, "core": True, "seed": None, "dataloader_num_workers": 1},
    ],
    ids=["prior-text", "cached-core"],
)
def test_a_resumed_training_ends_with_the_same_bits(bases, tmp_path, changes):
    """As after SIGKILL: steps after the last whole checkpoint are lost, and one was cut short while being written."""
    changes = {"class_data_dir": str(tmp_path / "class"), "checkpointing_steps": 2, "max_train_steps": 5} | changes
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    customize(settings(bases, whole, **changes))
    shutil.copytree(whole / "checkpoint-2", killed / "checkpoint-2")
    # Left by an earlier version, and by this one.
    for name in (".checkpoint-4.tmp", "checkpoint-4"):
        (killed / name / "unet").mkdir(parents=True)
    random.seed(99), numpy.random.seed(99), torch.manual_seed(99)
    result = customize(settings(bases, killed, **changes, resume_from_checkpoint="latest"))
    assert (result.plan.first_step, result.step) == (2, 5)
    assert same(whole, killed) and same(whole / "checkpoint-4", killed / "checkpoint-4")
    assert not same(whole / "checkpoint-2", whole / "checkpoint-4")
    assert not list(killed.glob(".*"))
    # What is random beside the data, such as dropout, goes on where it was as well.
    ours, theirs = (torch.load(f / "checkpoint-4" / "random_states_0.pt", weights_only=True) for f in (whole, killed))
    assert ours["python"] == theirs["python"] and torch.equal(ours["torch"], theirs["torch"])


def test_sigterm_saves_and_the_rest_gives_the_same_bits(bases, tmp_path):
    given = {"max_train_steps": 24, "checkpointing_steps": 1000}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = [*flags(settings(bases, stopped, **given)), "--report_to=none", "--checkpointing_steps=5"]
    with forked(train_in_group, arguments, tmp_path) as process:
        until((stopped / "checkpoint-5").exists, process)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
    said = (tmp_path / "0.txt").read_text()
    assert process.exitcode == 0, said
    saved = sorted(int(path.name.split("-")[1]) for path in stopped.glob("checkpoint-*"))
    told = f"Stopped by SIGTERM after step {saved[-1]} and saved in {stopped / f'checkpoint-{saved[-1]}'}"
    assert told in said and "Traceback" not in said and saved[-1] < 24 and not (stopped / "unet").exists()
    result = customize(settings(bases, stopped, **given, resume_from_checkpoint=f"checkpoint-{saved[-1]}"))
    assert result.plan.first_step == saved[-1]
    customize(settings(bases, whole, **given))
    assert same(stopped, whole)


class _Signal:
    """Sends a signal to this process at some forward pass of a kind of module."""

    def __init__(self, kind, passes, number):
        self.kind, self.passes, self.number, self.after = kind, passes, number, 0

    def __call__(self, module, inputs):
        if type(module).__name__ == self.kind:
            self.passes -= 1
            self.after += self.passes < 0
            if self.passes == 0:
                os.kill(os.getpid(), self.number)


def test_a_signal_ends_whatever_is_done_and_what_is_done_is_kept(bases, tmp_path):
    given = PRIOR | {"class_data_dir": str(tmp_path / "class"), "sample_batch_size": 1, "cache_latents": True}
    given |= {"max_train_steps": 3, "validation_prompt": "sks", "num_validation_images": 2}
    customize(settings(bases, tmp_path / "whole", **given))
    shutil.rmtree(tmp_path / "class")
    out = tmp_path / "out"
    given |= {"resume_from_checkpoint": "latest", "validation_steps": 1}
    # In the class images (this one is finished), the latents, the validation of step 1 and of step 3, the last.
    for kind, passes, after, images, step, number in (
        ("UNet2DConditionModel", 1, 2, 1, 0, signal.SIGTERM),
        ("Encoder", 2, 0, 3, 0, signal.SIGINT),
        ("UNet2DConditionModel", 4, 0, 3, 1, signal.SIGTERM),
        ("UNet2DConditionModel", 8, 0, 3, 3, signal.SIGINT),
    ):
        sent = _Signal(kind, passes, number)
        hook = torch.nn.modules.module.register_module_forward_pre_hook(sent)
        try:
            changes = {"validation_steps": 100} if step == 3 else {}
            result = customize(settings(bases, out, **given | changes))
        finally:
            hook.remove()
        assert (kind, result.interrupted, result.step, sent.after) == (kind, number.name, step, after)
        assert len(list((tmp_path / "class").iterdir())) == images
        assert result.checkpoint == (out / f"checkpoint-{step}" if step else None)
        assert out.exists() == (step > 0) and not list(tmp_path.rglob(".*"))
    assert customize(settings(bases, out, **given)).step == 3
    assert same(out, tmp_path / "whole")


def test_two_runs_in_one_folder(bases, tmp_path):
    given = PRIOR | {"class_data_dir": str(tmp_path / "class")}
    for folder, flag in ((tmp_path / "out", "output_dir"), (tmp_path / "class", "class_data_dir")):
        with locked(folder, flag):
            before = everything_in(tmp_path)
            with pytest.raises(InvalidValueError, match=rf"--{flag} .* no other run .* process {os.getpid()} on "):
                customize(settings(bases, tmp_path / "out", **given, overwrite_output_dir=True))
            assert everything_in(tmp_path) == before
    assert everything_in(tmp_path) == []


def test_checkpoints_hold_adapters_only_and_old_ones_go(bases, tmp_path):
    given = {"checkpointing_steps": 1, "max_train_steps": 4, "checkpoints_total_limit": 2}
    customize(settings(bases, tmp_path, **given))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert everything_in(tmp_path / "checkpoint-4") == [
        "comcat_adapter.json",
        "optimizer.pt",
        "random_states_0.pt",
        "training_state.json",
        "unet",
        "unet/adapter_config.json",
        "unet/adapter_model.safetensors",
    ]
    assert sum(path.stat().st_size for path in (tmp_path / "checkpoint-4").rglob("*")) < 400_000
    pipe = DiffusionPipeline.from_pretrained(bases / "sd")
    load_comcat_weights(pipe, tmp_path / "checkpoint-3", "three")
    # A finished training that is resumed has nothing to do.
    assert customize(settings(bases, tmp_path, **given, resume_from_checkpoint="latest")).step == 4
    with pytest.raises(InvalidValueError, match="expected no checkpoints, found checkpoint-4 of an earlier"):
        customize(settings(bases, tmp_path))
    customize(settings(bases, tmp_path, overwrite_output_dir=True, checkpointing_steps=2))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_training_that_goes_back_leaves_the_other_behind(bases, tmp_path):
    customize(settings(bases, tmp_path, checkpointing_steps=1, max_train_steps=4))
    given = {"checkpointing_steps": 1, "max_train_steps": 2, "checkpoints_total_limit": 2}
    customize(settings(bases, tmp_path, resume_from_checkpoint="checkpoint-1", **given))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert customize(settings(bases, tmp_path, resume_from_checkpoint="latest", **given)).step == 2
    # Those of another folder are not of the training that was left.
    shutil.copytree(tmp_path, tmp_path / "other")
    (tmp_path / "other" / "checkpoint-2").rename(tmp_path / "other" / "checkpoint-9")
    start = str(tmp_path / "checkpoint-1")
    customize(
        settings(bases, tmp_path / "other", resume_from_checkpoint=start, **given | {"checkpoints_total_limit": 9})
    )
    assert (tmp_path / "other" / "checkpoint-9" / "training_state.json").is_file()


def test_an_epoch_of_buckets_takes_every_image(bases, tmp_path):
    """Three, five and two images of a shape, in batches of four."""
    for index, shape in enumerate([(24, 16)] * 3 + [(16, 24)] * 5 + [(16, 16)] * 2):
        Image.effect_noise(shape, 50).convert("RGB").save(tmp_path / f"{index}.png")
    given = {"instance_data_dir": str(tmp_path), "train_batch_size": 4, "max_train_steps": None, "dry_run": True}
    given |= {"num_train_epochs": 2}
    buckets = {"aspect_ratio_buckets": "16,16;16,24;24,16"}
    assert customize(settings(bases, tmp_path / "out", **given)).plan.steps == 2 * 3
    assert customize(settings(bases, tmp_path / "out", **given, **buckets)).plan.steps == 2 * 4
    accumulated = {"gradient_accumulation_steps": 2}
    assert customize(settings(bases, tmp_path / "out", **given, **buckets, **accumulated)).plan.steps == 2 * 2


def test_pictures_of_an_earlier_training_are_not_shown(bases, tmp_path):
    shown = {"validation_prompt": "a 3", "num_validation_images": 1, "validation_steps": 1, "num_inference_steps": 1}
    customize(settings(bases, tmp_path, max_train_steps=2, **shown))
    (tmp_path / "validation" / "mine.png").write_bytes(b"kept")
    assert (tmp_path / BEFORE_AFTER).is_file() and (tmp_path / "validation" / "step-000002.png").is_file()
    customize(settings(bases, tmp_path, max_train_steps=1, **shown))
    assert {path.name for path in (tmp_path / "validation").iterdir()} == {"mine.png", "step-000001.png"}
    assert "step-000001.png" in (tmp_path / "README.md").read_text()
    customize(settings(bases, tmp_path, max_train_steps=1))
    assert not (tmp_path / BEFORE_AFTER).exists() and "step-0" not in (tmp_path / "README.md").read_text()


def test_resuming_what_does_not_fit(bases, tmp_path, caplog):
    customize(settings(bases, tmp_path, checkpointing_steps=1))
    resumed = {"resume_from_checkpoint": "checkpoint-1"}
    # Also where nothing is left to train.
    for changes in (resumed | {"vo_rank": 3}, {"adam_beta1": 0.5}, {"lr_power": 2.0}, {"snr_gamma": 5.0}):
        *_, (name, value) = changes.items()
        with pytest.raises(InvalidValueError, match=f"expected a training with --{name} {value}, found one with"):
            customize(settings(bases, tmp_path, **{"resume_from_checkpoint": "latest"} | changes))
    with pytest.raises(CheckpointError, match=r"checkpoint-9: expected a checkpoint.*checkpoint-1, checkpoint-2"):
        customize(settings(bases, tmp_path, resume_from_checkpoint="checkpoint-9"))
    customize(settings(bases, tmp_path, max_train_steps=3, **resumed))
    assert "checkpoint-2 are of the training that is left here" in caplog.text
    assert "max_train_steps was 2 and is 3 now" in caplog.text
    state = tmp_path / "checkpoint-1" / "training_state.json"
    whole = state.read_text()
    for step in (999, -1, 3.7):
        state.write_text(whole.replace('"step": 1,', f'"step": {step},'))
        with pytest.raises(CheckpointError, match=r"training_state\.json.*(step|digest)"):
            customize(settings(bases, tmp_path, **resumed))
    state.write_text(whole)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "kept")
    for name in ("optimizer.pt", "random_states_0.pt", "unet/adapter_model.safetensors", "comcat_adapter.json"):
        shutil.copy(tmp_path / "checkpoint-2" / name, tmp_path / "checkpoint-1" / name)
        # The generators of a process draw nothing here, so that their states are the same.
        if name.endswith(("0.pt", ".json")):
            (tmp_path / "checkpoint-1" / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name}: expected the file that was written with this checkpoint"):
            customize(settings(bases, tmp_path, **resumed))
        shutil.copy(tmp_path / "kept" / name, tmp_path / "checkpoint-1" / name)
    customize(settings(bases, tmp_path, **resumed))


# Without training


def test_a_dry_run_writes_nothing(bases, tmp_path):
    said, before = [], everything_in(bases)
    given = PRIOR | {"class_data_dir": str(tmp_path / "class"), "scale_lr": True, "max_train_steps": None}
    wanted = settings(bases, tmp_path / "out", dry_run=True, num_train_epochs=3, report_to="none", **given)
    result = customize(wanted, report=said.append)
    assert result.step == 0 and result.plan.steps == 6 and result.plan.learning_rate == 2 * 2.5e-3
    size = 4 * sum(result.plan.parameters.values())
    text = "\n".join(said)
    for words in (f"{size:,} (", "3 more are generated", "Steps:      6 of 2 images", "unet"):
        assert words in text
    assert everything_in(tmp_path) == [] and everything_in(bases) == before


BAD = {
    "no model": ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is needed"),
    "model gone": ({"pretrained_model_name_or_path": "./gone"}, "expected a folder or Hub id of a diffusers pipeline"),
    "no prompt": ({"instance_prompt": " "}, "--instance_prompt is needed"),
    "no images": ({"instance_data_dir": None}, "Give one of --instance_data_dir and --dataset_name, got neither"),
    "empty folder": ({"instance_data_dir": "."}, "found an empty folder"),
    "folder gone": ({"instance_data_dir": "gone"}, "--instance_data_dir gone: expected a folder with images"),
    "no rank": ({"qk_rank": 0, "vo_rank": "none"}, "leaves nothing to train"),
    "rank": ({"qk_rank": 99}, "99"),
    "rank text": ({"vo_rank": "two"}, "--vo_rank must be a whole number"),
    "token": ({"instance_token": "zwx"}, "--instance_prompt: expected the instance token 'zwx'"),
    "token in validation": (
        {"instance_token": "sks", "validation_prompt": "a 3"},
        "--validation_prompt: expected the",
    ),
    "no token": (PRIOR | {"class_data_dir": "c", "instance_prompt": "a 3"}, "expected an instance token"),
    "token in class": (
        PRIOR | {"class_data_dir": "c", "instance_token": "sks", "class_prompt": "a sks 3"},
        "expected a prompt without the instance token",
    ),
    "no class folder": (PRIOR, "--with_prior_preservation needs --class_data_dir, found none"),
    "class prompt": (PRIOR | {"class_data_dir": "c", "class_prompt": None}, "needs --class_prompt"),
    "resolution": ({"resolution": 17}, "--resolution must be a multiple of 2 for this pipeline, got 17"),
    "batch": ({"train_batch_size": 0}, "--train_batch_size must be a whole number from 1, got 0"),
    "rate": ({"learning_rate": float("nan")}, "--learning_rate must be a number above 0"),
    "levels": ({"logit_mean": float("nan")}, "--logit_mean must be a finite number, got nan"),
    "denoising": ({"num_inference_steps": 0}, "--num_inference_steps must be a whole number from 1, got 0"),
    "8 bit": ({"use_8bit_adam": True}, "pip install bitsandbytes"),
    "tracker": ({"report_to": "paper"}, "--report_to must be one of"),
    "precision": ({"mixed_precision": "fp16"}, "--mixed_precision fp16: expected a precision that this machine has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_before_anything_is_written(bases, tmp_path, case, monkeypatch):
    changes, says = BAD[case]
    monkeypatch.chdir(tmp_path)
    if case == "8 bit":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if case == "precision" and torch.accelerator.is_available():
        pytest.skip("this machine has half precision")
    with pytest.raises((InvalidValueError, CheckpointError)) as caught:
        customize(settings(bases, "out", **changes))
    assert says in str(caught.value)
    assert everything_in(tmp_path) == []


def test_a_pipeline_of_another_kind_is_refused(bases, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(bases / "sd", folder)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"))
    with pytest.raises(UnsupportedModuleError, match="found StableDiffusionInpaintPipeline, whose training is not"):
        customize(settings(tmp_path, tmp_path / "out", "other", instance_data_dir=str(bases / "three")))


# Flags and recipes


def test_flags_go_over_recipes(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("qk_rank: null\nlearning_rate: 1e-2\ncore: true\ncenter_crop: false\nmax_train_steps: 7\n")
    for arguments in ([str(recipe), "--max_train_steps", "9"], ["--max_train_steps=9", "--config", str(recipe)]):
        found = parse_customize_settings(arguments)
        assert (found.qk_rank, found.vo_rank, found.learning_rate, found.core) == (None, 2, 0.01, True)
        assert (found.max_train_steps, found.center_crop) == (9, False)
    assert parse_customize_settings([str(recipe), "--core", "false", "--qk_rank", "3"]).qk_rank == 3
    recipe.write_text("learnin_rate: 1\n")
    with pytest.raises(InvalidValueError, match=r"found 'learnin_rate' \(did you mean learning_rate"):
        parse_customize_settings([str(recipe)])
    recipe.write_text("max_train_steps: many\n")
    with pytest.raises(InvalidValueError, match=r"max_train_steps.*many"):
        parse_customize_settings([str(recipe)])
    with pytest.raises(InvalidValueError, match=r"nowhere.yaml: expected a recipe.*sd15_dreambooth"):
        parse_customize_settings(["nowhere.yaml"])
    with pytest.raises(InvalidValueError, match=r"unrecognized arguments: --resolutoin \(did you mean resolution"):
        parse_customize_settings(["--resolutoin", "512"])


@pytest.mark.parametrize(
    ("recipe", "arguments", "ranks"),
    [
        ("", ["--rank", "4"], (4, 4)),
        ("", ["--rank=none"], (None, None)),
        ("", ["--rank", "4", "--qk-rank", "4"], (4, 4)),
        ("rank: 4", [], (4, 4)),
        ("qk_rank: 2\nvo_rank: 3", ["--rank", "4"], (4, 4)),
        ("rank: 4", ["--vo_rank", "0"], (4, None)),
    ],
)
def test_rank_means_both_ranks(tmp_path, recipe, arguments, ranks):
    (tmp_path / "mine.yaml").write_text(f"seed: 1\n{recipe}\n")
    found = parse_customize_settings([str(tmp_path / "mine.yaml"), *arguments])
    assert (found.qk_rank, found.vo_rank) == ranks


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "4", "--qk_rank", "2"], "--rank sets --qk_rank, found --rank 4 and --qk_rank 2"),
        (["--vo-rank=2", "--rank=4"], "found --rank 4 and --vo_rank 2"),
        (["--rank", "two"], "_rank must be a whole number"),
        (["--rank"], "expected one argument"),
        (["--ran", "4"], r"--ran \(did you mean rank"),
    ],
)
def test_a_rank_that_is_not_clear_is_an_error(arguments, says):
    with pytest.raises(InvalidValueError, match=says):
        parse_customize_settings(arguments)


def test_the_seed_is_42_where_nothing_else_is_said(bases, tmp_path):
    assert customize(settings(bases, tmp_path, seed=None, dry_run=True)).plan.seed == 42
    assert [choose_seed(*given) for given in ((None, 7), (3, 7), (0, None))] == [7, 3, 0]


def test_the_recipe_of_the_paper():
    assert "sd15_dreambooth" in recipe_names("customize")
    found = parse_customize_settings(
        ["sd15_dreambooth", "--instance_data_dir", "x", "--instance_prompt", "a photo of sks dog"]
    )
    found.check()
    assert (found.max_train_steps, found.train_batch_size, found.learning_rate) == (500, 1, 2.5e-3)
    assert (found.lr_scheduler, found.qk_rank, found.vo_rank, found.core) == ("linear", 2, 2, False)


# Through the script


def test_two_processes_train_together(bases, tmp_path):
    given = PRIOR | {"class_data_dir": str(tmp_path / "class"), "train_batch_size": 1, "checkpointing_steps": 2}
    wanted = settings(bases, tmp_path / "two", "sdxl", train_text_encoder=True, **given)
    in_processes(train_in_group, flags(wanted), tmp_path)
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert "1 images x 2 processes" in said and said.count("The adapter is in") == 1
    assert said.count("Training:   0%") == 1 and len(list((tmp_path / "class").iterdir())) == 3
    assert len(list((tmp_path / "two" / "checkpoint-2").glob("random_states_*.pt"))) == 2
    assert {name.split(".")[0] for name in weights(tmp_path / "two")} == {"unet", "text_encoder", "text_encoder_2"}
    assert same(tmp_path / "two", tmp_path / "two" / "checkpoint-2")


# The loss


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_count_the_same_error_alike(gamma):
    """However a prediction is written down: an error of the clean latents counts min(snr, gamma)."""
    torch.manual_seed(0)
    latents, noise, off = (torch.randn(6, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    steps = torch.tensor([0, 100, 300, 500, 800, 999])
    kept = ddpm().alphas_cumprod.double()[steps].view(-1, 1, 1, 1)
    clean, signal, rest = latents + off, kept.sqrt(), (1 - kept).sqrt()
    noisy = signal * latents + rest * noise
    seen_noise = (noisy - signal * clean) / rest
    predictions = {"epsilon": seen_noise, "v_prediction": signal * seen_noise - rest * clean, "sample": clean}
    snr = (kept / (1 - kept)).flatten()
    wanted = (off.square().mean(dim=(1, 2, 3)) * snr.clamp(max=gamma)).mean().float()
    for kind, predicted in predictions.items():
        found = DiffusionLoss(ddpm(kind), snr_gamma=gamma)(predicted, latents, noise, steps)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_class_images_have_a_weight_of_their_own():
    predicted = torch.zeros(4, 1, 1, 1)
    noise = torch.tensor([1.0, 1.0, 2.0, 2.0]).view(4, 1, 1, 1)
    loss = DiffusionLoss(ddpm(), prior_weight=0.25)(predicted, noise, noise, torch.zeros(4, dtype=torch.long))
    assert loss.item() == 1 + 0.25 * 4
