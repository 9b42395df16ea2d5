"""Images in, batches out: which files count, which captions they get, and that every position is known beforehand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.dreambooth.data import Example, class_examples, find_images, instance_examples, prepare_image
from comcat_hf.training.dreambooth.settings import CustomizeSettings
from comcat_hf.training.dreambooth.stream import ExampleStream
from tests.customization.pipelines import write_digits


PROMPT = "a photo of sks 3"


def settings(folder=None, **changes):
    given = {"instance_data_dir": folder and str(folder), "instance_prompt": PROMPT, "resolution": 16}
    return CustomizeSettings(**(given | changes))


@pytest.fixture
def folder(tmp_path):
    return write_digits(tmp_path / "three")


def add_junk(folder):
    (folder / ".DS_Store").write_bytes(b"junk")
    (folder / "._3-0.png").write_bytes(b"junk")
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "Thumbs.db").write_bytes(b"junk")
    (folder / "more.png").mkdir()


def stream(examples, classes=(), **changes):
    own = {"seed": 5, "together": 3} | {name: changes.pop(name) for name in ("seed", "together") if name in changes}
    how = settings(**{"random_flip": True, "train_batch_size": 3} | changes)
    return ExampleStream(tuple(examples), tuple(classes), settings=how, **own)


def test_files_that_are_no_images_are_passed_over(folder):
    add_junk(folder)
    assert [path.name for path in find_images(folder)] == [f"3-{index}.png" for index in range(4)]
    assert {example.prompt for example in instance_examples(settings(folder))} == {PROMPT}


def test_captions_stand_beside_the_images_or_in_metadata(folder):
    (folder / "3-0.txt").write_text("a drawing\nof sks 3 \n")
    (folder / "3-1.txt").write_text("  ")
    lines = [
        {"file_name": "3-0.png", "text": "sks, first", "long": "the long one"},
        {"file_name": "3-2.png", "text": "sks"},
    ]
    prompts = [example.prompt for example in instance_examples(settings(folder))]
    assert prompts == ["a drawing of sks 3", PROMPT, PROMPT, PROMPT]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    prompts = [example.prompt for example in instance_examples(settings(folder))]
    assert prompts == ["sks, first", PROMPT, "sks", PROMPT]
    with pytest.raises(InvalidValueError, match=r"metadata.jsonl.*'long' in line 2, found file_name, text"):
        instance_examples(settings(folder, caption_column="long"))


def test_images_of_a_data_set(folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in find_images(folder)]
    rows = datasets.Dataset.from_dict({"picture": files, "says": ["sks a", None, "sks b", ""]})
    rows.cast_column("picture", datasets.Image()).to_parquet(tmp_path / "set" / "train.parquet")
    given = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache"), "image_column": "picture"}
    examples = instance_examples(settings(**given, caption_column="says"))
    assert [example.prompt for example in examples] == ["sks a", PROMPT, "sks b", PROMPT]
    assert [e.open().tobytes() for e in examples] == [e.open().tobytes() for e in instance_examples(settings(folder))]
    with pytest.raises(InvalidValueError, match=r"expected the --image_column 'image', found picture, says"):
        instance_examples(settings(**given | {"image_column": "image"}))
    with pytest.raises(InvalidValueError, match="expected images in --image_column 'says'"):
        instance_examples(settings(**given | {"image_column": "says"}))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "found an empty folder"),
        ({".DS_Store": b"x"}, "found an empty folder"),
        ({"notes.txt": b"x"}, "found notes.txt"),
        ({"bad.png": b"no image"}, "bad.png: expected an image, found one that cannot be read"),
        ({"empty.jpg": b""}, "empty.jpg: expected an image"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, content, says):
    for name, payload in content.items():
        (tmp_path / name).write_bytes(payload)
    with pytest.raises(InvalidValueError, match=says):
        instance_examples(settings(tmp_path))


def test_an_image_that_was_cut_short_is_found_before_the_training(folder):
    path = folder / "3-1.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(InvalidValueError, match=r"3-1.png: expected an image.*truncated.*Replace or remove it"):
        instance_examples(settings(folder))


def test_a_caption_without_the_instance_token_is_named(folder):
    (folder / "3-2.txt").write_text("a photo of asksa")
    with pytest.raises(InvalidValueError, match=r"3-2.png: expected the instance token 'sks'.*'a photo of asksa'"):
        instance_examples(settings(folder, instance_token="sks"))
    (folder / "3-2.txt").write_text("a photo of SKS, again")
    assert len(instance_examples(settings(folder, instance_token="sks"))) == 4


def test_class_images_are_as_many_as_are_asked_for(folder):
    given = {"class_data_dir": str(folder), "class_prompt": "a 3", "with_prior_preservation": True}
    assert len(class_examples(settings(folder, **given, num_class_images=3))) == 3
    assert class_examples(settings(folder, **given | {"class_data_dir": str(folder / "none")})) == []


def test_images_are_cropped_and_mirrored():
    image = Image.new("RGB", (40, 20))
    image.putpixel((0, 0), (255, 255, 255))
    found = prepare_image(image, 20, center_crop=True, flip=False)
    assert found.pixels.shape == (3, 20, 20) and found.time_ids == (20, 40, 0, 10, 20, 20)
    assert found.pixels.min() == found.pixels.max() == -1
    square = image.crop((0, 0, 20, 20))
    plain, mirrored = (prepare_image(square, 20, True, flip).pixels for flip in (False, True))
    assert plain[0, 0, 0] == 1 and torch.equal(mirrored, plain.flip(-1))
    # Upright as the camera held it.
    lefts = {prepare_image(image, 20, False, False, torch.Generator().manual_seed(s)).time_ids[3] for s in range(9)}
    assert len(lefts) > 3 and max(lefts) <= 20


def test_of_an_elongated_image_only_the_crop_is_enlarged():
    image = Image.linear_gradient("L").resize((1, 100_000)).convert("RGB")
    found = prepare_image(image, 512, center_crop=True, flip=False)
    assert found.pixels.shape == (3, 512, 512) and found.time_ids == (100_000, 1, 25_599_744, 0, 512, 512)
    assert found.pixels.abs().max() < 0.01
    plain = Image.effect_noise((61, 90), 90).convert("RGB")
    whole = np.asarray(plain.resize((32, 47), Image.Resampling.LANCZOS))[7:39].astype(np.float32) / 127.5 - 1
    ours = prepare_image(plain, 32, center_crop=True, flip=False).pixels.permute(1, 2, 0).numpy()
    assert np.abs(ours - whole).max() <= 1.01 / 127.5


def test_photographs_are_turned_upright(tmp_path):
    image, exif = Image.new("RGB", (30, 20)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert instance_examples(settings(tmp_path))[0].open().size == (20, 30)


def test_wide_grey_values_are_scaled_in_folders_and_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    grey = Image.linear_gradient("L").resize((16, 16))
    (tmp_path / "grey").mkdir()
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "grey" / "16.png")
    Image.fromarray(np.asarray(grey).astype(np.float32) / 255).save(tmp_path / "grey" / "32.tif")
    files = [str(path) for path in find_images(tmp_path / "grey")]
    rows = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    named = settings(dataset_name=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    examples = instance_examples(settings(tmp_path / "grey")) + instance_examples(named)
    assert [example.open().tobytes() for example in examples] == [grey.convert("RGB").tobytes()] * 4


def test_images_that_are_too_large_end_the_run_before_it_starts(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (50, 50)).save(folder / "3-0.png")
    with pytest.raises(InvalidValueError, match=r"3-0.png: expected an image, .*2,500 pixels, more than .* 100"):
        instance_examples(settings(folder))


def test_a_position_says_everything(folder):
    """Batches from the middle are those of a run from the start, whatever was drawn before, also with workers."""
    examples = instance_examples(settings(folder))
    classes = examples[:3]
    whole = list(stream(examples, classes).loader(0, 6, 0))
    torch.rand(7)
    for workers in (0, 1):
        rest = list(stream(examples, classes, dataloader_num_workers=workers).loader(4, 2, 0))
        for ours, theirs in zip(rest, whole[4:], strict=True):
            assert [item["kind"] for item in ours] == ["instance"] * 3 + ["class"] * 3
            for one, other in zip(ours, theirs, strict=True):
                assert (one["index"], one["flip"]) == (other["index"], other["flip"])
                assert torch.equal(one["image"].pixels, other["image"].pixels)
    assert {item["flip"] for batch in whole for item in batch} == {False, True}
    other = list(stream(examples, classes, seed=6).loader(0, 6, 0))
    assert [i["index"] for b in other for i in b] != [i["index"] for b in whole for i in b]


def test_epochs_hold_every_image_and_processes_share_them(folder):
    """Six positions per step of two processes; together they are what one process with batches of six gets."""
    examples = instance_examples(settings(folder))
    source = stream(examples, cache_latents=True, together=6)
    seen = [item["index"] for position in range(12) for item in source[position]]
    assert all(sorted(seen[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8))
    assert len({tuple(seen[start : start + 4]) for start in (0, 4, 8)}) > 1
    shares = [list(source.loader(0, 2, process)) for process in (0, 1)]
    together = [[*first, *second] for first, second in zip(*shares, strict=True)]
    assert together == list(stream(examples, cache_latents=True, train_batch_size=6, together=6).loader(0, 2, 0))


def test_buckets_fill_every_batch_with_images_of_one_shape(tmp_path):
    shapes = [(30, 20)] * 3 + [(20, 30)] * 5 + [(20, 20)] * 2
    for index, (width, height) in enumerate(shapes):
        Image.effect_noise((width, height), 50).convert("RGB").save(tmp_path / f"{index}.png")
    examples = [Example(str(path), "a sks", path) for path in find_images(tmp_path)]
    source = stream(examples, (), aspect_ratio_buckets="20,20;16,24;24,16", together=4, train_batch_size=2)
    # Three, five and two images in fours.
    assert len(source) == 4 + 8 + 4
    seen = []
    for batch in source.loader(0, 16, 0):
        shapes = {tuple(item["image"].pixels.shape[1:]) for item in batch}
        assert len(shapes) == 1
        seen.append(shapes.pop())
    assert set(seen) == {(20, 20), (16, 24), (24, 16)}
    for epoch in (0, 1):
        indices = [source[epoch * 16 + place][0]["index"] for place in range(16)]
        assert set(indices) == set(range(10))
    assert source[3][0]["image"].time_ids[4:] in source.settings.buckets
    other = [list(source.loader(0, 8, process)) for process in (0, 1)]
    pairs = zip(*other, strict=True)
    assert all(a[0]["image"].pixels.shape == b[0]["image"].pixels.shape for a, b in pairs)
