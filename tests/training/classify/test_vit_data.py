"""Labelled images from parquet files, folders and data sets; every batch is known by its position."""

import io
import logging
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.classify.augmentation import ImagePreparation, Mixing
from comcat_hf.training.classify.data import BrokenImages, open_splits
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.classify.stream import ImageReader
from comcat_hf.training.images import BrokenImageError
from tests.training.test_images import large


datasets = pytest.importorskip("datasets")

NAMES = ("ant", "bee", "cat")
COUNT = 23


def png(value, size=(6, 6)):
    """An image that can be told by its colour."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 7)).save(file, "png")
    return file.getvalue()


def cut_short():
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "jpeg")
    return file.getvalue()[:700]


def write_parquet(path, contents, labels=None, label=None):
    """Rows of images in bytes; the label of each is its number modulo three."""
    numbers = [index % len(NAMES) for index in range(len(contents))] if labels is None else labels
    feature = datasets.ClassLabel(names=list(NAMES)) if label is None else label
    features = datasets.Features({"image": datasets.Image(decode=False), "label": feature, "more": feature})
    images = [None if content is None else {"bytes": content, "path": None} for content in contents]
    rows = datasets.Dataset.from_dict({"image": images, "label": numbers, "more": numbers}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return path


def write_folders(root, names=NAMES, count=3):
    for place, name in enumerate(names):
        for index in range(count):
            file = root / name / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(10 * place + index))
    return root


@pytest.fixture
def train_file(tmp_path):
    return write_parquet(tmp_path / "data" / "train.parquet", [png(value) for value in range(COUNT)])


@pytest.fixture
def given(tmp_path, train_file):
    """Settings that read the parquet file and augment nothing, and what a test changes of them."""

    def make(**changes):
        fixed = {"train_file": str(train_file), "cache_dir": str(tmp_path / "cache"), "horizontal_flip": 0.0}
        fixed |= {"random_resized_crop_scale": 1.0, "per_device_train_batch_size": 4}
        return CompressSettings(model_name_or_path="model", reduction=0.5, **(fixed | changes))

    return make


def model_config(names=NAMES):
    return ViTConfig(id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)})


def train_of(settings):
    return open_splits(settings, model_config(), 0).train


def generic_config(count):
    return ViTConfig(num_labels=count)


def processor():
    return ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.0] * 3, image_std=[1.0] * 3)


def values(pixels):
    """Which images these are."""
    return (pixels[:, 0].mean((1, 2)) * 255).round().long().tolist()


def reader(split, settings, process=0, processes=1, seed=3, broken=None):
    preparation = ImagePreparation.of(settings, processor())
    return ImageReader(split, preparation, settings, broken or BrokenImages(0), seed, process, processes)


def run_batches(split, settings, start, count, *further, **how):
    return list(reader(split, settings, *further, **how).train(Mixing(settings, len(NAMES)), start, count))


def seen(batches):
    return [value for batch in batches for value in values(batch["pixel_values"])]


def evaluate(split, batch_size, processes=1, broken=None):
    settings = CompressSettings(per_device_eval_batch_size=batch_size)
    shares = [reader(split, settings, process, processes, broken=broken) for process in range(processes)]
    return [list(share.evaluate()) for share in shares]


# Sources


def test_parquet_files_are_read(given, train_file, tmp_path):
    write_parquet(tmp_path / "data" / "more.parquet", [png(100 + value) for value in range(4)])
    pattern = str(train_file.parent / "*.parquet")
    splits = open_splits(given(train_file=pattern, validation_file=str(train_file)), model_config(), 0)
    assert (splits.train.size, splits.validation.size, splits.search) == (COUNT + 4, COUNT, None)
    image, label = splits.validation.read(4)
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (6, 6), (4, 251, 7), 1)
    assert train_of(given(train_file=None, validation_file=pattern)) is None


def test_folders_are_read_and_junk_is_passed_over(given, tmp_path):
    root = write_folders(tmp_path / "train")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "0.png").write_bytes(png(1))
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "0.png").write_bytes(png(1))
    (root / "ant" / ".DS_Store").write_bytes(b"junk")
    (root / "ant" / "._0.png").write_bytes(b"junk")
    (root / "ant" / "notes.txt").write_text("nothing")
    (root / "README.md").write_text("nothing")
    deeper = root / "cat" / "more" / "9.JPG"
    deeper.parent.mkdir()
    Image.new("RGB", (9, 9)).save(deeper, "jpeg")
    # One class less: the numbers stay.
    validation = write_folders(tmp_path / "validation", ("bee", "cat"), 1)
    given_dirs = {"train_file": None, "train_dir": str(root), "validation_dir": str(validation)}
    for settings in (given(**given_dirs), given(**given_dirs, streaming=True)):
        splits = open_splits(settings, generic_config(3), 0)
        assert (splits.train.size, splits.validation.size) == (10, 2)
        assert [splits.train.read(index)[1] for index in range(10)] == [0] * 3 + [1] * 3 + [2] * 4
        assert [splits.validation.read(index)[1] for index in range(2)] == [1, 2]


def test_data_sets_are_read_by_name(given, tmp_path, train_file):
    folder = tmp_path / "set"
    write_parquet(folder / "data" / "train-00000.parquet", [png(value) for value in range(5)])
    write_parquet(folder / "data" / "test-00000.parquet", [png(value) for value in range(2)])
    named = {"train_file": None, "dataset_name": str(folder)}
    splits = open_splits(given(**named), model_config(), 0)
    assert (splits.train.size, splits.validation.size) == (5, 2)
    splits = open_splits(given(**named, validation_split_name="train"), model_config(), 0)
    assert splits.validation.size == 5
    for flag in ("train_split_name", "validation_split_name"):
        with pytest.raises(InvalidValueError, match=rf"expected the --{flag} 'dev', found t(rain|est), t"):
            open_splits(given(**named, **{flag: "dev"}), model_config(), 0)
    saved = datasets.Dataset.from_parquet(str(train_file), cache_dir=str(tmp_path / "cache"))
    datasets.DatasetDict(train=saved, validation=saved.select(range(3))).save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        named = {"train_file": None, "dataset_name": str(tmp_path / "saved"), "streaming": streaming}
        splits = open_splits(given(**named), model_config(), 0)
        assert sum(int(batch["valid"].sum()) for batch in evaluate(splits.validation, 2)[0]) == 3


@pytest.mark.parametrize("kind", ["binary", "struct"])
def test_images_in_plain_bytes(given, tmp_path, kind):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    contents = [png(value) for value in range(3)]
    images = contents if kind == "binary" else [{"bytes": content} for content in contents]
    file = tmp_path / "plain.parquet"
    parquet.write_table(arrow.table({"image": images, "label": list(NAMES)}), file)
    for streaming in (False, True):
        split = train_of(given(train_file=str(file), streaming=streaming))
        batches = evaluate(split, 3)[0]
        assert values(batches[0]["pixel_values"]) == [0, 1, 2] and batches[0]["labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"image_column_name": "picture"}, r"expected the --image_column_name 'picture', found image, label, more"),
        (
            {"image_column_name": "x", "label_column_name": "y"},
            "the --image_column_name 'x' and the --label_column_name 'y'",
        ),
        ({"image_column_name": "more"}, "expected images in --image_column_name 'more', found ClassLabel"),
        ({"label_column_name": "image"}, "expected two columns, found .* --label_column_name 'image'"),
        ({"train_file": "missing.parquet"}, r"--train_file missing.parquet: expected a data set, found none"),
        ({"train_file": None, "dataset_name": "missing/set"}, r"--dataset_name missing/set: expected a data set"),
        (
            {"train_file": None, "train_dir": "missing"},
            "--train_dir missing: expected a folder .* found nothing there",
        ),
    ],
)
def test_sources_that_cannot_be_used(given, streaming, changes, says):
    with pytest.raises(InvalidValueError, match=says):
        open_splits(given(**changes, streaming=streaming), model_config(), 0)


def test_folders_that_cannot_be_used(given, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    settings = given(train_file=None, train_dir=str(folder))
    with pytest.raises(InvalidValueError, match="found an empty folder and no images"):
        open_splits(settings, model_config(), 0)
    (folder / "0.png").write_bytes(png(0))
    with pytest.raises(InvalidValueError, match=r"found 0\.png and no images .* into a folder named as the class"):
        open_splits(settings, model_config(), 0)


def test_files_without_rows_are_named(given, tmp_path):
    file = write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(InvalidValueError, match=r"empty.parquet: expected a data set, .*no data"):
        open_splits(given(train_file=str(file)), model_config(), 0)


def test_datasets_that_is_not_installed_is_named(given, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InvalidValueError, match=r"pip install comcat_hf\[train\]"):
        open_splits(given(), model_config(), 0)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_of_other_kinds_are_read_alike(given, tmp_path):
    """Grey values of 16 bits are scaled; a range that cannot be told and too many pixels count as broken."""
    contents = [png(value) for value in range(4)]
    wide, unknown = np.full((6, 6), 200 * 257, np.uint16), np.full((6, 6), -3, np.int32)
    for index, (image, kind) in enumerate(((wide, "png"), (unknown, "tiff"))):
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind)
        contents[index] = file.getvalue()
    contents[2] = large(13_000)
    file = write_parquet(tmp_path / "kinds.parquet", contents)
    for streaming in (False, True):
        split = train_of(given(train_file=str(file), streaming=streaming))
        broken = BrokenImages(2)
        batches = evaluate(split, 4, broken=broken)[0]
        assert seen([{"pixel_values": batches[0]["pixel_values"][batches[0]["valid"]]}]) == [200, 3]
        assert [place.split("[")[1][0] for place in broken.places] == ["1", "2"]


# Labels


def labels_read(given, tmp_path, contents, labels, feature, config, streaming=False):
    file = write_parquet(tmp_path / "labels.parquet", contents, labels, feature)
    splits = open_splits(given(train_file=str(file), streaming=streaming), config, 0)
    return [label for batch in evaluate(splits.train, 2)[0] for label in batch["labels"][batch["valid"]].tolist()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("labels", "feature", "names", "expected"),
    [
        ([0, 1, 2], datasets.ClassLabel(names=list(NAMES)), ("cat", "ant", "bee", "dog"), [1, 2, 0]),
        ([0, 1], datasets.ClassLabel(names=["sea_lion", "Ant-Bear"]), ("ant bear", "Sea Lion"), [1, 0]),
        (["cat", "ant"], datasets.Value("string"), ("cat", "ant", "bee"), [0, 1]),
        ([2, 0], datasets.Value("int64"), NAMES, [2, 0]),
        ([1, 3], datasets.Value("uint8"), None, [1, 3]),
        ([1, 2, 3], datasets.ClassLabel(names=["0", "1", "10", "2"]), None, None),
        ([1, 0], datasets.ClassLabel(names=["LABEL_3", "LABEL_1"]), None, [1, 3]),
        ([3, 0], datasets.ClassLabel(names=["d", "b", "c", "a"]), None, [3, 0]),
    ],
)
def test_labels_are_matched(given, tmp_path, streaming, labels, feature, names, expected):
    config = generic_config(4) if names is None else model_config(names)
    contents = [png(value) for value in range(len(labels))]
    if expected is None:
        with pytest.raises(InvalidValueError, match="found 1 that it lacks: 10"):
            labels_read(given, tmp_path, contents, labels, feature, config, streaming)
    else:
        assert labels_read(given, tmp_path, contents, labels, feature, config, streaming) == expected


def test_names_that_occur_twice_are_told_by_their_place(given, tmp_path):
    """ImageNet's models have two labels called crane, which a data set cannot have."""
    names = [f"class {number}" for number in range(30)]
    model = [*names[:7], "crane", *names[8:20], "crane", *names[21:]]
    feature = datasets.ClassLabel(names=[*names[:7], "crane", *names[8:20], "crane bird", *names[21:]])
    found = labels_read(given, tmp_path, [png(0)] * 3, [7, 20, 3], feature, model_config(model))
    assert found == [7, 20, 3]
    few = datasets.ClassLabel(names=["crane", "crane bird", "ant"])
    with pytest.raises(InvalidValueError, match="2 that it lacks: crane, crane bird"):
        labels_read(given, tmp_path, [png(0)] * 2, [0, 1], few, model_config(("crane", "crane", "ant")))


IDS = ("n01440764", "n02123045", "n02124075", "n15075141")
IMAGENET = ("tench, Tinca tinca", "tabby, tabby cat", "Egyptian cat", "toilet tissue, toilet paper")


@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
def test_folders_of_imagenet_are_numbered_as_its_models_are(given, tmp_path, flag):
    """Such folders have WordNet ids for names, in the order of the model's labels, which are words."""
    write_folders(tmp_path / "images" / "train", reversed(IDS), count=1)
    folder = tmp_path / "images" / ("train" if flag == "train_dir" else "")
    splits = open_splits(given(train_file=None, **{flag: str(folder)}), model_config(IMAGENET), 0)
    (batch,) = evaluate(splits.train, 4)[0]
    assert dict(zip(values(batch["pixel_values"]), batch["labels"].tolist(), strict=True)) == {
        30: 0,
        20: 1,
        10: 2,
        0: 3,
    }


@pytest.mark.parametrize(
    ("ids", "names"), [(IDS[:3], IMAGENET), (IDS, tuple(reversed(IMAGENET))), (IDS, ("a", "b", "c", "d"))]
)
def test_wordnet_ids_are_not_numbered_by_guessing(given, tmp_path, ids, names):
    write_folders(tmp_path / "images", ids, count=1)
    settings = given(train_file=None, train_dir=str(tmp_path / "images"))
    with pytest.raises(InvalidValueError, match=r"lacks: n01440764.*WordNet ids.*all of ImageNet's classes"):
        open_splits(settings, model_config(names), 0)


def test_names_that_are_numbers_are_numbers(given, tmp_path):
    """Sorted as names they would be 0, 1, 10, 11, 2."""
    names = [str(number) for number in range(12)]
    contents = [png(value) for value in range(12)]
    assert labels_read(given, tmp_path, contents, names, datasets.Value("string"), generic_config(12)) == list(
        range(12)
    )
    feature = datasets.ClassLabel(names=sorted(names))
    assert labels_read(given, tmp_path, contents, names, feature, generic_config(12)) == list(range(12))


def test_names_are_taken_over_where_the_model_has_none(given, tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [png(1)] * 3, ["owl", "elk", "yak"], datasets.Value("string"))
    few = write_parquet(tmp_path / "y.parquet", [png(1)], ["yak"], datasets.Value("string"))
    splits = open_splits(given(train_file=str(file), validation_file=str(few)), generic_config(3), 0)
    assert [splits.train.read(index)[1] for index in range(3)] == [1, 0, 2]
    assert splits.validation.read(0)[1] == 2


@pytest.mark.parametrize(
    ("labels", "feature", "config", "says"),
    [
        ([0, 1, 2], None, model_config(("ant", "bee", "dog")), "of the model .3: ant, bee, dog.*1 that it lacks: cat"),
        ([0, 1, 2], None, generic_config(4), "expected 4 labels, as the model has, .* found 3: ant, bee, cat"),
        ([0, 7], datasets.Value("int64"), model_config(), "found 1 that it lacks: 7"),
        ([0, -1], datasets.Value("int64"), model_config(), "found 1 that it lacks: -1"),
        ([0, None], None, model_config(), "found 1 that it lacks: None"),
        (["ant", "eel"], datasets.Value("string"), model_config(), "found 1 that it lacks: eel"),
        (
            [0.5, 1],
            datasets.Value("float32"),
            model_config(),
            "expected class names or whole numbers in --label_column_name .*float32",
        ),
    ],
)
def test_labels_that_the_model_lacks_are_named(given, tmp_path, labels, feature, config, says):
    file = write_parquet(tmp_path / "x.parquet", [png(1)] * len(labels), labels, feature)
    with pytest.raises(InvalidValueError, match=says):
        open_splits(given(train_file=str(file)), config, 0)


def test_labels_of_a_stream_are_checked_while_reading(given, tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [png(1)] * 2, ["ant", "eel"], datasets.Value("string"))
    settings = given(train_file=str(file), streaming=True)
    with pytest.raises(InvalidValueError, match=r"expected labels of the model .* found 'eel'"):
        evaluate(train_of(settings), 2)
    with pytest.raises(InvalidValueError, match="Leave out --streaming"):
        open_splits(settings, generic_config(2), 0)


# Splits


def test_fewer_samples(given, train_file):
    settings = given(validation_file=str(train_file), max_train_samples=10, max_eval_samples=6)
    one, other, again = (open_splits(settings, model_config(), seed) for seed in (0, 1, 0))
    assert (one.train.size, one.validation.size) == (10, 6)
    chosen = [splits.train.indices.tolist() for splits in (one, other, again)]
    assert chosen[0] == chosen[2] != chosen[1] and len(set(chosen[0])) == 10 and max(chosen[0]) > 9
    assert one.validation.indices.tolist() == other.validation.indices.tolist()
    assert train_of(given(max_train_samples=99)).size == COUNT
    stream = train_of(given(max_train_samples=10, streaming=True))
    assert sorted(seen(evaluate(stream, 5)[0])) == list(range(10))
    batches = run_batches(stream, given(), 0, 5)
    assert sorted(seen(batches)[:10]) == sorted(seen(batches)[10:]) == list(range(10))


def test_the_search_split_is_cut_from_the_training_images(given, train_file, tmp_path):
    other = write_parquet(tmp_path / "other.parquet", [png(200 + value) for value in range(5)])
    settings = given(validation_file=str(other), strategy="search", search_share=0.3, max_train_samples=20)
    splits = open_splits(settings, model_config(), 0)
    train, search, validation = (
        seen(evaluate(part, 1)[0]) for part in (splits.train, splits.search, splits.validation)
    )
    assert (len(train), len(search), validation) == (14, 6, [200, 201, 202, 203, 204])
    assert not set(train) & set(search) and len({*train, *search}) == 20
    # A broken image is named by its row in the file.
    assert splits.search.raw(2).place.endswith(f"train.parquet[{search[2]}]")
    whole = {"train_file": str(train_file), "max_train_samples": None}
    assert open_splits(given(**whole, strategy="search", streaming=True), model_config(), 0).search is None
    with pytest.raises(InvalidValueError, match=r"--search_share 0.01 of the 23 images"):
        open_splits(given(**whole, strategy="search", search_share=0.01), model_config(), 0)


# Training batches


def test_epochs_hold_every_image(given):
    split = train_of(given())
    settings = given(per_device_train_batch_size=COUNT)
    batches = run_batches(split, settings, 0, 3)
    orders = [values(batch["pixel_values"]) for batch in batches]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(COUNT))
    for order, batch in zip(orders, batches, strict=True):
        assert batch["labels"].tolist() == [value % 3 for value in order]
    assert seen(run_batches(split, settings, 0, 1, seed=4)) != orders[0]
    assert reader(split, given()).batches_per_epoch == 6
    assert reader(split, given(repeated_augmentation=3), 0, 2).batches_per_epoch == 9


def test_repeated_images_stand_side_by_side_and_differ(given):
    settings = given(repeated_augmentation=3, random_resized_crop_scale=0.1, per_device_train_batch_size=9)
    split = train_of(given(train_file=None, train_dir=_noise(given)))
    (batch,) = run_batches(split, settings, 0, 1)
    assert batch["labels"].tolist() == [label for label in batch["labels"][::3].tolist() for _ in range(3)]
    first, second, third = batch["pixel_values"][:3]
    assert not torch.equal(first, second) and not torch.equal(second, third)


def _noise(given):
    root = given().cache_dir + "-noise"
    for name in NAMES:
        os.makedirs(f"{root}/{name}")
        Image.effect_noise((40, 30), 90).convert("RGB").save(f"{root}/{name}/0.png")
    return root


AUGMENTED = {"random_resized_crop_scale": 0.2, "horizontal_flip": 0.5, "mixup_alpha": 0.8, "label_smoothing": 0.1}


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_from_the_middle_are_those_of_a_whole_run(given, streaming):
    """Resumed in the second epoch, whatever was drawn before, also with workers; the global generator stays."""
    settings = given(streaming=streaming, repeated_augmentation=2, **AUGMENTED)
    split = train_of(settings)
    before = torch.get_rng_state()
    whole = run_batches(split, settings, 0, 26)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    for workers in (0, 2):
        changed = given(streaming=streaming, repeated_augmentation=2, dataloader_num_workers=workers, **AUGMENTED)
        for start, count in ((3, 4), (13, 13)):
            rest = run_batches(split, changed, start, count)
            for one, other in zip(rest, whole[start : start + count], strict=True):
                assert all(torch.equal(one[name], other[name]) for name in ("pixel_values", "labels"))


@pytest.mark.parametrize("streaming", [False, True])
def test_processes_share_the_positions(given, streaming):
    settings = given(streaming=streaming, random_resized_crop_scale=0.2, horizontal_flip=0.5)
    split = train_of(settings)
    shares = [run_batches(split, settings, 1, 6, process, 2) for process in (0, 1)]
    both = given(
        streaming=streaming, random_resized_crop_scale=0.2, per_device_train_batch_size=8, horizontal_flip=0.5
    )
    for first, second, together in zip(*shares, run_batches(split, both, 1, 6), strict=True):
        for name in ("pixel_values", "labels"):
            assert torch.equal(torch.cat([first[name], second[name]]), together[name])


def test_a_stream_holds_what_the_files_hold(given, train_file, tmp_path):
    """Files in random order, rows through a buffer; every epoch once through all."""
    write_parquet(train_file.parent / "more.parquet", [png(100 + value) for value in range(7)])
    settings = given(train_file=str(train_file.parent / "*.parquet"), streaming=True, per_device_train_batch_size=10)
    split = train_of(settings)
    assert split.size is None and reader(split, settings).batches_per_epoch is None
    expected = sorted([*range(COUNT), *range(100, 107)])
    orders = [seen(run_batches(split, settings, 3 * epoch, 3)) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == expected and orders[0] != orders[1]
    assert sorted(seen(evaluate(split, 4)[0])[:30]) == expected


def test_a_long_stream_is_shuffled_in_its_buffer(given, tmp_path):
    labels = [number % 3 for number in range(1500)]
    file = write_parquet(tmp_path / "long.parquet", [png(number % 250) for number in range(1500)], labels)
    split = train_of(given(train_file=str(file), streaming=True))
    rows = [raw.place for raw in split.stream(torch.Generator().manual_seed(1))]
    numbers = [int(place.rsplit("[")[-1][:-1]) for place in rows]
    assert sorted(numbers) == list(range(1500))
    moved = sum(abs(number - place) for place, number in enumerate(numbers)) / 1500
    assert moved > 200


def test_a_declared_length_spares_reading_the_epochs_before(given, tmp_path):
    """A data card may say how long a split is; where it says too much or too little, positions still hold."""
    folder = tmp_path / "set"
    write_parquet(folder / "data" / "train-0.parquet", [png(value) for value in range(COUNT)])
    for declared in (COUNT, COUNT - 3, COUNT + 3):
        card = f"dataset_info:\n  splits:\n  - name: train\n    num_examples: {declared}\n"
        (folder / "README.md").write_text(f"---\n{card}---\n")
        settings = given(train_file=None, dataset_name=str(folder), streaming=True)
        split = train_of(settings)
        assert split.size == declared
        whole = run_batches(split, settings, 0, 18)
        rest = run_batches(split, settings, 13, 5)
        assert seen(rest) == seen(whole[13:])
        assert len(seen(evaluate(split, COUNT)[0])) == COUNT


def test_signals_are_left_to_the_main_process(given):
    settings = given(dataloader_num_workers=1)
    split = train_of(settings)
    batches = reader(split, settings).train(Mixing(settings, 3), 0, 40)
    found = seen([next(batches)])
    import multiprocessing

    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    found += seen(batches)
    assert found == seen(run_batches(split, given(), 0, 40))


# Broken images


def break_rows(path, broken):
    contents = [broken.get(value, png(value)) for value in range(COUNT)]
    return write_parquet(path, contents)


@pytest.fixture
def broken_file(tmp_path):
    return break_rows(tmp_path / "broken.parquet", {5: b"no image", 6: b"", 11: cut_short(), 17: None})


def test_a_broken_image_says_where(given, broken_file, tmp_path):
    split = train_of(given(train_file=str(broken_file)))
    for index in (5, 6, 11, 17):
        with pytest.raises(BrokenImageError, match=rf"broken.parquet\[{index}\].*: expected an image.*Replace"):
            split.read(index)
    root = write_folders(tmp_path / "train")
    (root / "bee" / "1.png").write_bytes(cut_short())
    split = train_of(given(train_file=None, train_dir=str(root)))
    with pytest.raises(BrokenImageError, match=r"bee/1.png.*truncated"):
        split.read(4)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
def test_photographs_are_turned_upright(given, tmp_path, kind):
    image, exif, file = Image.new("RGB", (30, 20)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, kind, exif=exif)
    path = write_parquet(tmp_path / "turned.parquet", [file.getvalue()])
    assert train_of(given(train_file=str(path))).read(0)[0].size == (20, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_images_of_other_modes_become_rgb(given, tmp_path, mode):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(file, "tiff")
    path = write_parquet(tmp_path / "modes.parquet", [file.getvalue()])
    image, _ = train_of(given(train_file=str(path))).read(0)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_and_counted(given, broken_file, streaming, workers, caplog):
    settings = given(train_file=str(broken_file), streaming=streaming, dataloader_num_workers=workers)
    split = train_of(settings)
    counter = BrokenImages(4)
    with caplog.at_level(logging.WARNING):
        whole = run_batches(split, settings, 0, 6, broken=counter)
    assert counter.count == 4 and len(counter.places) == 4
    assert all("broken.parquet" in place for place in counter.places)
    assert sum("cannot be read and is left out" in record.message for record in caplog.records) == 4
    assert [len(batch["labels"]) for batch in whole] == [4] * 6
    assert not {5, 6, 11, 17} & set(seen(whole))
    # The others are where they were, and resuming or sharing does not change the replacements.
    rest = run_batches(split, settings, 2, 4, broken=BrokenImages(4))
    assert seen(rest) == seen(whole[2:])
    shares = [run_batches(split, settings, 0, 3, process, 2, broken=BrokenImages(4)) for process in (0, 1)]
    assert seen([batch for pair in zip(*shares, strict=True) for batch in pair]) == seen(whole)
    assert all(label == value % 3 for b in whole for label, value in zip(b["labels"], seen([b]), strict=True))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("limit", [0, 3, 0.1])
def test_too_many_broken_images_stop_the_run(given, broken_file, streaming, limit):
    settings = given(train_file=str(broken_file), streaming=streaming, max_broken_images=limit)
    split = train_of(settings)
    counter = BrokenImages.of(settings, split)
    if streaming and limit == 0.1:
        # Of a stream of unknown length a share is taken of a thousand at least.
        run_batches(split, settings, 0, 6, broken=counter)
        assert counter.count == 4
        return
    with pytest.raises(InvalidValueError, match=r"images cannot be read, among them .*broken.parquet\[.*--max_broken"):
        run_batches(split, settings, 0, 6, broken=counter)


def test_nothing_but_broken_images_stops_the_run(given, tmp_path):
    file = break_rows(tmp_path / "all.parquet", dict.fromkeys(range(COUNT), b"no image"))
    split = train_of(given(train_file=str(file)))
    with pytest.raises(InvalidValueError, match="found 9 one after the other that cannot be read"):
        run_batches(split, given(), 0, 6, broken=BrokenImages(100))
    with pytest.raises(InvalidValueError, match="expected images to calibrate on"):
        reader(split, given()).calibrate()


def test_broken_images_count_once():
    counter = BrokenImages(2)
    for _ in range(5):
        counter.note("one", "bad")
    counter.note("two", "bad")
    assert (counter.count, counter.places) == (2, ["one", "two"])
    with pytest.raises(InvalidValueError, match=r"3 images cannot be read, among them one; two; three .*at most .* 2"):
        counter.note("three", "bad")


# Evaluation and calibration


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 5), (2, 4), (3, 3), (4, 7), (5, 23)])
def test_every_image_is_evaluated_once(given, streaming, processes, batch_size):
    split = train_of(given(streaming=streaming))
    shares = evaluate(split, batch_size, processes)
    assert len({len(share) for share in shares}) == 1
    found, labels = [], []
    for share in shares:
        for batch in share:
            assert batch["valid"].shape == batch["labels"].shape == (batch_size,)
            assert batch["valid"].dtype == torch.bool and len(batch["pixel_values"]) == batch_size
            found += values(batch["pixel_values"][batch["valid"]])
            labels += batch["labels"][batch["valid"]].tolist()
            assert (batch["labels"][~batch["valid"]] == -100).all()
    assert sorted(found) == list(range(COUNT)) and labels == [value % 3 for value in found]


def test_evaluation_can_be_repeated_and_read_ahead(given):
    split = train_of(given())
    before = torch.get_rng_state()
    batches = reader(split, given(per_device_eval_batch_size=4, dataloader_num_workers=2)).evaluate()
    assert len(batches) == 6 and seen(batches) == seen(batches) == seen(evaluate(split, 4)[0])
    assert torch.equal(torch.get_rng_state(), before)
    stream = train_of(given(streaming=True))
    with pytest.raises(TypeError, match="not known"):
        len(reader(stream, given()).evaluate())


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_images_are_not_evaluated(given, broken_file, streaming):
    split = train_of(given(train_file=str(broken_file), streaming=streaming))
    counter = BrokenImages(4)
    shares = evaluate(split, 6, 2, broken=counter)
    found = [value for share in shares for batch in share for value in values(batch["pixel_values"][batch["valid"]])]
    assert sorted(found) == [value for value in range(COUNT) if value not in (5, 6, 11, 17)]
    assert counter.count == 4
    with pytest.raises(InvalidValueError, match="2 images cannot be read"):
        evaluate(split, 6, broken=BrokenImages(1))


@pytest.mark.parametrize("streaming", [False, True])
def test_calibration_images_are_random_and_whole(given, broken_file, streaming):
    few = {"calibration_samples": 10, "calibration_batch_size": 4}
    settings = given(train_file=str(broken_file), streaming=streaming, **few, **AUGMENTED)
    split = train_of(settings)
    one, again, other = (reader(split, settings, seed=seed).calibrate() for seed in (1, 1, 2))
    assert [len(batch["pixel_values"]) for batch in one] == [4, 4, 2] and set(one[0]) == {"pixel_values"}
    assert seen(one) == seen(again) != seen(other) and len(set(seen(one))) == 10
    assert not {5, 6, 11, 17} & set(seen(one)) and max(seen(one)) > 10
    many = reader(split, CompressSettings(calibration_samples=99)).calibrate()
    assert len(seen(many)) == COUNT - 4
