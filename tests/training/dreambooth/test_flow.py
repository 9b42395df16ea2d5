"""Training adapters of rectified-flow transformers: SD3, FLUX.1, FLUX.2, Qwen-Image."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.nn import functional as F

from comcat_hf import load_comcat_weights
from comcat_hf.errors import InvalidValueError
from comcat_hf.training.dreambooth.families import family_of
from comcat_hf.training.dreambooth.loop import customize
from comcat_hf.training.dreambooth.losses import FlowLoss
from comcat_hf.training.dreambooth.sources import to_latents
from tests.customization.flow_pipelines import FLOWS
from tests.customization.pipelines import write_digits
from tests.processes import in_processes
from tests.training.dreambooth.test_training import same, settings, weights


PROMPTS = ["a sks 3", "a 7"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flows")
    for name, build in FLOWS.items():
        build(folder / name)
    write_digits(folder / "three")
    return folder


def load(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spread(latents, height=4, width=4):
    """Tokens as images; latents of SD3 are images."""
    if latents.ndim == 4:
        return latents
    found = latents.transpose(1, 2).unflatten(2, (height, width))
    return found


def unpacked(latents, name):
    found = spread(latents)
    return F.pixel_shuffle(found, 2) if name in ("flux", "qwen") else found


@pytest.mark.parametrize("name", list(FLOWS))
def test_the_transformer_is_called_as_by_its_pipeline(bases, name):
    pipe, calls = load(bases / name), []
    family = family_of(type(pipe).__name__, "here")
    inner = pipe.transformer.forward

    def record(*args, **kwargs):
        found = inner(*args, **kwargs)
        calls.append((kwargs, found[0]))
        return found

    pipe.transformer.forward = record
    # Without guidance by a second call.
    off = {"true_cfg_scale": 1.0} if name == "qwen" else {"guidance_scale": 3.5 if name == "flux" else 1.0}
    pipe(prompt=PROMPTS, height=16, width=16, num_inference_steps=2, output_type="latent", **off)
    pipe.transformer.forward = inner
    text = family.texts(pipe, PROMPTS, torch.device("cpu"))
    for kwargs, expected in calls:
        noisy = unpacked(kwargs["hidden_states"], name)
        steps = kwargs["timestep"] * (1 if name == "sd3" else 1000)
        with torch.no_grad():
            found = family.predict(pipe.transformer, noisy, steps, text, 3.5)
        torch.testing.assert_close(found, unpacked(expected, name), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", list(FLOWS))
def test_latents_are_those_that_the_pipeline_decodes(bases, name, monkeypatch):
    pipe, seen = load(bases / name), {}
    decode = pipe.vae.decode

    def record(encoded, *args, **kwargs):
        seen["encoded"] = encoded
        return decode(encoded, *args, **kwargs)

    def note(pipe, step, timestep, given):
        seen["latents"] = given["latents"]
        return given

    monkeypatch.setattr(pipe.vae, "decode", record)
    pipe(prompt=PROMPTS, height=16, width=16, num_inference_steps=1, callback_on_step_end=note)
    encoded = seen["encoded"][:, :, 0] if seen["encoded"].ndim == 5 else seen["encoded"]
    torch.testing.assert_close(to_latents(pipe.vae, encoded), unpacked(seen["latents"], name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sd3", {"cache_latents": True, "aspect_ratio_buckets": "16,16;24,16"}),
        ("flux", {"core": True, "gradient_checkpointing": True}),
        ("flux2", {"mixed_precision": "bf16", "random_flip": True}),
        ("qwen", {"cache_latents": True, "caption_dropout": 0.5, "weighting_scheme": "sigma_sqrt"}),
    ],
)
def test_adapters_learn_and_load_again(bases, tmp_path, name, changes):
    output = tmp_path / "out"
    result = customize(settings(bases, output, name, learning_rate=0.05, validation_prompt="a sks 3", **changes))
    assert result.step == 2 and 0 < result.loss < 100
    learned = weights(output)
    assert learned and all(key.startswith("transformer.") for key in learned)
    assert sum(value.numel() for value in learned.values()) == result.plan.parameters["transformer"]
    assert (output / "validation" / "step-000002.png").is_file()
    pipe = load(bases / name)

    def draw():
        draws = torch.Generator().manual_seed(0)
        return pipe(
            prompt=["a sks 3"], height=16, width=16, num_inference_steps=2, generator=draws, output_type="latent"
        ).images

    before = draw()
    load_comcat_weights(pipe, output)
    assert (draw() - before).abs().max() > 1e-3
    pipe.transformer.disable_adapters()
    assert torch.equal(draw(), before)


def test_a_resumed_training_ends_with_the_same_bits(bases, tmp_path):
    given = {"max_train_steps": 4, "checkpointing_steps": 2, "caption_dropout": 0.5, "learning_rate": 0.05}
    customize(settings(bases, tmp_path / "whole", "sd3", **given))
    customize(settings(bases, tmp_path / "parts", "sd3", **given | {"max_train_steps": 4}))
    for path in (tmp_path / "parts").glob("transformer/*"):
        path.unlink()
    customize(settings(bases, tmp_path / "parts", "sd3", **given, resume_from_checkpoint="checkpoint-2"))
    assert same(tmp_path / "whole", tmp_path / "parts")


def _train_together(folder, output):
    torch.set_num_threads(1)
    customize(settings(folder, output, "sd3", train_batch_size=1, learning_rate=0.05))


def test_two_processes_train_together(bases, tmp_path):
    # In the last block text is dropped, so that its factors get no gradient.
    in_processes(_train_together, bases, tmp_path / "two")
    customize(settings(bases, tmp_path / "one", "sd3", train_batch_size=2, learning_rate=0.05))
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    # The noise differs: every process draws its own.
    assert all(torch.isfinite(value).all() for value in two.values())
    assert any(not torch.equal(two[key], value) for key, value in one.items())


def test_prodigy_finds_a_rate(bases, tmp_path):
    # One rate for all, which it checks at the first step.
    how = {"optimizer": "prodigy", "learning_rate": 1.0, "max_train_steps": 4, "head_gains": True}
    with pytest.raises(InvalidValueError, match="--gains_lr_ratio: prodigy has one rate for all, got 3"):
        customize(settings(bases, tmp_path, "sd3", **how, gains_lr_ratio=3.0))
    customize(settings(bases, tmp_path, "sd3", **how))
    assert any(value.abs().max() > 0 for key, value in weights(tmp_path).items() if "key" in key or "output" in key)


def test_prodigy_that_is_missing_is_named(bases, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidValueError, match=r"--optimizer prodigy needs the package prodigyopt.*pip install"):
        customize(settings(bases, tmp_path / "out", "sd3", optimizer="prodigy"))


def test_the_loss_is_that_of_the_velocity():
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    loss = FlowLoss(schedule, "none")
    draws = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(8, 4, 2, 2, generator=draws), torch.randn(8, 4, 2, 2, generator=draws)
    levels = loss.levels(8, draws)
    noisy, steps = loss.noisy(latents, noise, levels)
    sigma = (steps / 1000).view(-1, 1, 1, 1)
    assert sigma.min() >= 0 and sigma.max() <= 1 and len(set(levels.tolist())) > 4
    torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise)
    assert loss(noise - latents, latents, noise, levels) == 0
    # The latents that a right velocity leads back to.
    torch.testing.assert_close(noisy - sigma * (noise - latents), latents, rtol=0, atol=1e-5)
    wrong = noise - latents + 1
    torch.testing.assert_close(loss(wrong, latents, noise, levels), torch.tensor(1.0))
    weighted = FlowLoss(schedule, "sigma_sqrt", prior_weight=0.5)
    weights = sigma.flatten() ** -2
    expected = weights[:4].mean() + 0.5 * weights[4:].mean()
    torch.testing.assert_close(weighted(wrong, latents, noise, levels), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_text_encoder": True},
            "--train_text_encoder: expected a pipeline with a UNet, found Stable",
        ),
        ({"snr_gamma": 5.0}, "--snr_gamma: expected a pipeline with a UNet.*--weighting_scheme"),
        ({"resolution": 18}, "--resolution must be a multiple of 4"),
        ({"aspect_ratio_buckets": "16,16;16,18"}, "--aspect_ratio_buckets: .* multiples of 4 .* 16,18"),
        ({"aspect_ratio_buckets": "16x16"}, "--aspect_ratio_buckets: expected heights and widths .* '16x16'"),
        ({"optimizer": "prodigy", "use_8bit_adam": True}, "--use_8bit_adam is for --optimizer adamw"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
    ],
)
def test_flags_that_mean_nothing_here_are_refused(bases, tmp_path, changes, message):
    with pytest.raises(InvalidValueError, match=message):
        customize(settings(bases, tmp_path / "out", "sd3", **changes))
    assert not (tmp_path / "out").exists()
