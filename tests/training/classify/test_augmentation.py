"""Images made ready: what augmentation does, that a generator says all of it, and that targets stay probabilities."""

import sys

import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.mobilevit.image_processing_pil_mobilevit import MobileViTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.augmentation import ImagePreparation, Mixing, _crop_box
from comcat_hf.training.classify.settings import CompressSettings


PLAIN = {"random_resized_crop_scale": 1.0, "horizontal_flip": 0.0}
SMALL = {"height": 16, "width": 24}
NEEDS_KORNIA = {"rand_augment_num_ops": 2, "color_jitter": 0.4, "random_erasing": 0.9}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def preparation(processor=None, **changes):
    processor = processor or ViTImageProcessorPil(size=SMALL)
    return ImagePreparation.of(CompressSettings(**(PLAIN | changes)), processor)


def picture(size=(40, 30)):
    """Noise whose left half is darker and whose channels differ."""
    bands = [Image.effect_noise(size, spread) for spread in (90, 60, 30)]
    image = Image.merge("RGB", bands)
    image.paste((10, 40, 90), (0, 0, size[0] // 2, size[1]))
    return image


PROCESSORS = {
    "squeezed": ViTImageProcessorPil(size=SMALL),
    "cut": DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    "shorter side": BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    "share": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    "channels": MobileViTImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    "unscaled": ViTImageProcessorPil(size=SMALL, do_rescale=False, do_normalize=False),
    "means": ViTImageProcessorPil(size=SMALL, image_mean=[0.1, 0.4, 0.7], image_std=[0.3, 0.2, 0.5]),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_inputs_are_those_of_the_processor(processor):
    """Also through the way that cropped or coloured images take."""
    image = picture((50, 38))
    plain = preparation(processor)
    expected = processor(image, return_tensors="pt")["pixel_values"][0].float()
    assert plain.evaluate(image).dtype == torch.float32 and plain.size == tuple(expected.shape[1:])
    assert torch.equal(plain.evaluate(image), expected)
    span = float(expected.max() - expected.min())
    pixels = plain.restore(expected)
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1
    assert torch.equal(plain.train(image, generator()), expected)
    again = pixels[list(plain.channels)] * plain.scale + plain.offset
    torch.testing.assert_close(again, expected, atol=1e-5 * span, rtol=0)
    # One colour stays that colour wherever it is cropped.
    height, width = plain.size
    colored = Image.new("RGB", (60, 60), (200, 100, 20))
    cropped = preparation(processor, random_resized_crop_scale=0.3).train(colored, generator())
    assert cropped.shape == (3, height, width) and cropped.dtype == torch.float32
    middle = plain.evaluate(colored)[:, height // 2, width // 2, None, None]
    torch.testing.assert_close(cropped, middle.expand_as(cropped), atol=1e-5 * span, rtol=0)


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False), r"one shape .* \(3, 32, 48\)"),
        (ViTImageProcessorPil(size=SMALL, image_std=[-1.0] * 3), "grow with the pixels in a straight line"),
    ],
)
def test_processors_that_cannot_be_used(processor, says):
    with pytest.raises(InvalidValueError, match=rf"ImageProcessorPil: expected inputs .*{says}"):
        preparation(processor)


@pytest.mark.parametrize(
    "changes",
    [
        {"random_resized_crop_scale": 0.1},
        {"horizontal_flip": 0.5},
        {"rand_augment_num_ops": 2},
        {"rand_augment_num_ops": 1, "rand_augment_magnitude": 0},
        {"rand_augment_num_ops": 3, "rand_augment_magnitude": 30},
        {"color_jitter": 0.4},
        {"color_jitter": 3.0},
        {"random_erasing": 0.9},
        {"random_resized_crop_scale": 0.1, "horizontal_flip": 0.5, **NEEDS_KORNIA},
    ],
)
def test_a_generator_says_everything(changes):
    if set(changes) & set(NEEDS_KORNIA):
        pytest.importorskip("kornia")
    image, prepared = picture(), preparation(**changes)
    before = torch.get_rng_state()
    first = [prepared.train(image, generator(seed)) for seed in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = [preparation(**changes).train(image, generator(seed)) for seed in reversed(range(12))][::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other) and one.shape == (3, 16, 24) and one.dtype == torch.float32
        assert one.isfinite().all() and one.is_contiguous() and -1.001 <= float(one.min()) <= float(one.max()) <= 1.001
    assert len({tuple(one.flatten().tolist()) for one in first}) > 1


def test_one_augmentation_does_not_change_the_draws_of_another():
    pytest.importorskip("kornia")
    image = picture()

    def mirrored(**changes):
        prepared = preparation(horizontal_flip=0.5, **changes)
        inputs = [prepared.train(image, generator(seed))[0] for seed in range(20)]
        return [float(one[:, :8].mean()) > float(one[:, -8:].mean()) for one in inputs]

    plain = mirrored()
    assert set(plain) == {True, False}
    assert plain == mirrored(color_jitter=0.2) == mirrored(random_resized_crop_scale=0.9)


def test_images_are_mirrored_as_often_as_asked():
    image = picture()
    plain = preparation().evaluate(image)
    always, half = preparation(horizontal_flip=1.0), preparation(horizontal_flip=0.5)
    assert torch.equal(always.train(image, generator()), plain.flip(-1))
    mirrored = sum(torch.equal(half.train(image, generator(seed)), plain.flip(-1)) for seed in range(200))
    assert 70 < mirrored < 130


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (3, 200), (500, 2), (64, 64)])
def test_crops_lie_in_the_image(size):
    shares, ratios = [], []
    for seed in range(100):
        left, top, right, bottom = _crop_box(size, 0.2, generator(seed))
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        shares.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    if size == (64, 64):
        assert 0.19 < min(shares) < 0.3 and 0.85 < max(shares) <= 1
        assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.4


def test_erasing_takes_a_rectangle_and_leaves_the_rest():
    pytest.importorskip("kornia")
    image = picture()
    plain = preparation().evaluate(image)
    erased = preparation(random_erasing=1.0)
    shares = []
    for seed in range(30):
        pixels = erased.train(image, generator(seed))
        changed = (pixels != plain).any(0)
        # A rectangle of the mean colour.
        assert (pixels[:, changed] == 0).all()
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int(changed.sum()) == int(box)
        shares.append(int(box) / changed.numel())
    assert min(shares) < 0.1 and 0.2 < max(shares) < 0.4
    kept = sum(torch.equal(preparation(random_erasing=0.3).train(image, generator(s)), plain) for s in range(60))
    assert 30 < kept < 55


def test_without_kornia_only_what_needs_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    prepared = preparation(random_resized_crop_scale=0.2, horizontal_flip=0.5)
    assert prepared.train(picture(), generator()).shape == (3, 16, 24)
    assert Mixing(CompressSettings(mixup_alpha=0.8), 3).mixes
    for name, value in NEEDS_KORNIA.items():
        with pytest.raises(InvalidValueError, match=rf"--{name} needs the package kornia.*comcat_hf\[train\]"):
            preparation(**{name: value})


def test_values_that_rand_augment_does_not_take():
    pytest.importorskip("kornia")
    with pytest.raises(InvalidValueError, match="--rand_augment_num_ops 99: kornia refuses it"):
        preparation(rand_augment_num_ops=99)


# Mixing

CLASSES = 4


def mixing(**changes):
    return Mixing(CompressSettings(**changes), CLASSES)


def batch(count=5):
    """Images of one value each, so that a share can be read off."""
    pixels = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, 32, 32).clone()
    return pixels, torch.arange(count) % CLASSES


def test_nothing_to_mix_leaves_the_labels():
    pixels, labels = batch()
    for off in (mixing(), mixing(mixup_alpha=1.0, cutmix_alpha=1.0, mixup_prob=0.0)):
        found, targets = off(pixels, labels)
        assert found is pixels and targets is labels and not off.mixes


def test_smoothing_is_that_of_the_loss():
    pixels, labels = batch()
    logits = torch.randn(5, CLASSES)
    found, targets = mixing(label_smoothing=0.1)(pixels, labels)
    assert found is pixels and targets.shape == (5, CLASSES)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}]
)
def test_targets_follow_the_pixels(alphas, smoothing):
    """The share of the partner in the pixels is its share in the targets, and targets sum to one."""
    mix = mixing(**alphas, label_smoothing=smoothing)
    pixels, labels = batch()
    shares, cuts = [], 0
    for seed in range(60):
        found, targets = mix(pixels, labels, generator(seed))
        torch.testing.assert_close(targets.sum(1), torch.ones(5))
        # The first image is 0 and its partner 4.
        share = float(found[0].mean()) / 4
        first, last = (torch.full((CLASSES,), smoothing / CLASSES) for _ in range(2))
        first[0] += 1 - smoothing
        last[4 % CLASSES] += 1 - smoothing
        second = (torch.full((CLASSES,), smoothing / CLASSES)).index_add_(
            0, torch.tensor([1, 3]), torch.tensor([1 - share_of(found[1]), share_of(found[1])]) * (1 - smoothing)
        )
        torch.testing.assert_close(targets[1], second, atol=1e-5, rtol=0)
        torch.testing.assert_close(targets[0], first.lerp(last, share), atol=1e-5, rtol=0)
        assert torch.equal(found[2], pixels[2])
        cut = set(found[0].unique().tolist()) <= {0.0, 4.0}
        cuts += cut
        shares.append(share)
    assert len({round(share, 4) for share in shares}) > 40 and min(shares) >= 0 and max(shares) <= 1
    assert (0.3 < sum(shares) / 60 < 0.7) if "cutmix_alpha" not in alphas else True
    expected = {("mixup_alpha",): (0, 3), ("cutmix_alpha",): (60, 60)}.get(tuple(alphas), (15, 45))
    assert expected[0] <= cuts <= expected[1]


def share_of(image):
    """The share of image 3 in what was image 1."""
    return (float(image.mean()) - 1) / 2


def test_batches_are_mixed_as_often_as_asked_and_by_the_generator_alone():
    mix = mixing(mixup_alpha=0.2, cutmix_alpha=0.5, mixup_prob=0.4)
    pixels, labels = batch()
    before = torch.get_rng_state()
    results = [mix(pixels, labels, generator(seed)) for seed in range(100)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    for seed, (found, targets) in enumerate(results):
        again = mix(pixels, labels, generator(seed))
        assert torch.equal(found, again[0]) and torch.equal(targets, again[1]) and targets.shape == (5, CLASSES)
    mixed = sum(not torch.equal(found, pixels) for found, _ in results)
    assert 20 < mixed < 60
    assert torch.equal(pixels, batch()[0])
