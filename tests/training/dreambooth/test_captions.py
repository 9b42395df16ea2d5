"""Captions of images: whichever way their images are named, in any encoding, and never dropped without a word."""

import codecs
import contextlib
import json
import logging
import random
import unicodedata

import pytest
from PIL import Image

from comcat_hf.errors import ComCATError, InvalidValueError
from comcat_hf.training.dreambooth.data import find_images, instance_examples
from comcat_hf.training.dreambooth.loop import customize
from comcat_hf.training.dreambooth.settings import CustomizeSettings


PROMPT = "a photo of sks dog"
ACCENT = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"


@pytest.fixture
def make(tmp_path):
    """Writes a folder of images and of other files: text, bytes, or rows of a metadata file."""

    def write(images=("a.jpg",), **files):
        for name in images:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name)
        for name, content in files.items():
            if isinstance(content, list):
                content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return write


def prompts(folder, **changes):
    given = {"instance_data_dir": str(folder), "instance_prompt": PROMPT} | changes
    return [example.prompt for example in instance_examples(CustomizeSettings(**given))]


def row(name="a.jpg", text="sks, told", key="text"):
    return {"file_name": name, key: text}


# Which image is meant


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("a.jpg", "a.jpg"),
        ("a.jpg", "./a.jpg"),
        ("a.jpg", "train/a.jpg"),
        ("a.jpg", "/home/me/train/a.jpg"),
        ("a.jpg", r"train\a.jpg"),
        ("a.jpg", "a"),
        ("a.jpg", " a.jpg "),
        ("a.JPG", "a.jpg"),
        ("a.jpg", "A.JPG"),
        ("a.png", "a.jpeg"),
        ("a.v2.png", "a.v2"),
        (ACCENT, unicodedata.normalize("NFD", ACCENT)),
        (unicodedata.normalize("NFD", ACCENT), ACCENT),
        (ACCENT, unicodedata.normalize("NFD", ACCENT).upper()),
    ],
)
def test_a_name_in_the_metadata_means_the_image_that_it_can_only_mean(make, caplog, image, name):
    assert prompts(make([image], **{"metadata.jsonl": [row(name)]})) == ["sks, told"]
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "A.txt", "a.caption", "a.jpg.txt", "a.JPG.caption"])
def test_a_caption_file_belongs_to_the_image_of_its_name(make, caplog, name):
    assert prompts(make(**{name: "sks, beside"})) == ["sks, beside"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("images", "files", "says"),
    [
        (["a.jpg", "a.png"], {"metadata.jsonl": [row("a")]}, r"line 1: .* 'a', which may mean a\.jpg or a\.png"),
        (["a.jpg", "A.jpg"], {"metadata.jsonl": [row("a.JPG")]}, r"may mean A\.jpg or a\.jpg"),
        (["a.jpg", "a.png"], {"a.txt": "sks"}, r"a\.txt: .* 'a', which may mean a\.jpg or a\.png"),
        (["a.jpg"], {"metadata.jsonl": [row("b.jpg")]}, r"line 1: .*'b\.jpg'.*The images are a\.jpg"),
        (["a.jpg", "train/a.jpg"], {"metadata.jsonl": [row("train/a.jpg")]}, r"'train/a\.jpg'"),
        (["a.jpg"], {"metadata.jsonl": [row(), row("./a.jpg", "b")]}, r"'sks, told' .*line 1.* 'b' .*line 2"),
        (["a.jpg"], {"a.txt": "one", "a.caption": "other"}, r"'other' .*a\.caption.* 'one' .*a\.txt"),
        (["a.jpg"], {"metadata.jsonl": [row()], "metadata.csv": "file_name,text\na.jpg,b"}, r"'b' .*'sks, told'"),
        (["a.jpg"], {"metadata.jsonl": [row() | {"caption": "b"}]}, "found others under text and caption"),
        (
            ["a.jpg"],
            {"metadata.jsonl": [row(key="says")]},
            "found none in 1 rows. Name .* --caption_column .texts are under says.",
        ),
    ],
)
def test_captions_that_cannot_be_assigned(make, images, files, says):
    with pytest.raises(InvalidValueError, match=says):
        prompts(make(images, **files))


def test_exact_names_go_before_others(make):
    rows = [row("a.png", "sks 1"), row("A.png", "sks 2"), row("b.jpg", "sks 3"), row("b.png", "sks 4")]
    images = ["A.png", "a.png", "b.jpg", "b.png"]
    assert prompts(make(images, **{"metadata.jsonl": rows})) == ["sks 2", "sks 1", "sks 3", "sks 4"]


def test_one_warning_counts_what_has_no_caption_and_what_has_no_image(make, caplog):
    files = {"b.txt": "other", "lost.txt": "\xff", "captions.json": "{}", "d.txt": " ", "metadata.parquet": b""}
    rows = [row(), row("b.jpg"), row("x.jpg"), row("y.jpg"), row("z.jpg", None)]
    folder = make(["a.jpg", "b.jpg", "c.jpg", "d.jpg"], **files, **{"metadata.jsonl": rows})
    assert prompts(folder) == ["sks, told", "sks, told", PROMPT, PROMPT]
    (record,) = caplog.records
    for part in (
        "of 4 images, those without a caption get the instance prompt: 2 (c.jpg, d.jpg)",
        f"captions without an image: 2 ('x.jpg' in {folder / 'metadata.jsonl'}, line 3, 'y.jpg' in",
        "files not read, because they belong to no image: 3 (captions.json, metadata.parquet, lost.txt)",
        f"files not used, because a metadata file has another caption: 1 ({folder / 'b.txt'})",
    ):
        assert part in record.message


def test_no_warning_where_there_are_no_captions(make, caplog):
    assert (
        prompts(make(["a.jpg", "b.jpg"], **{"metadata.jsonl": [{"file_name": "a.jpg", "label": 3}]})) == [PROMPT] * 2
    )
    assert not caplog.records


def test_captions_of_class_images_are_mentioned(make, caplog, tmp_path):
    folder = make(["a.jpg", "class/b.jpg"], **{"class/b.txt": "a dog", "class/metadata.csv": "", "class/notes.md": ""})
    prior = {"with_prior_preservation": True, "class_data_dir": str(folder / "class"), "class_prompt": "a dog"}
    given = {"pretrained_model_name_or_path": str(tmp_path / "none"), "instance_prompt": PROMPT}
    with pytest.raises(ComCATError, match="none"):
        customize(CustomizeSettings(**given, **prior, instance_data_dir=str(folder)))
    assert "all class images get the --class_prompt; files not read: 2 (b.txt, metadata.csv)" in caplog.text


# How they are written


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_text_is_read_in_every_encoding_that_says_which_it_is(make, encoding, name):
    content = {"a.txt": "sks café", "metadata.csv": "file_name,text\na.jpg,sks café"}
    text = content.get(name, json.dumps(row(text="sks café"), ensure_ascii=False))
    assert prompts(make(**{name: text.encode(encoding)})) == ["sks café"]
    assert prompts(make(**{name: codecs.BOM_UTF16_BE + text.encode("utf-16-be")})) == ["sks café"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_text_in_another_encoding_is_refused_by_name(make, encoding, name):
    text = {"a.txt": "café", "metadata.csv": "file_name,text\na.jpg,café"}.get(
        name, '{"file_name":"a.jpg","text":"é"}'
    )
    with pytest.raises(InvalidValueError, match=rf"{name}.*UTF-8"):
        prompts(make(**{name: text.encode(encoding)}))


def test_captions_become_one_line_of_composed_characters_without_marks(make):
    text = "\ufeffsks\u2028a\u0085b\x0b\tc\r\nd \ufeff" + unicodedata.normalize("NFD", "é")
    assert prompts(make(**{"metadata.jsonl": [row(text=text)]})) == ["sks a b c d é"]
    assert prompts(make(**{"metadata.jsonl": [row(text=text)]}), instance_token="e\u0301") == ["sks a b c d é"]


@pytest.mark.parametrize(
    "table",
    [
        "file_name,text\n{},{}\n",
        "file_name;caption;size\r\n{};{};3\r\n",
        "size\tfile_name\ttext\n3\t{}\t{}\n\n",
        "file_name, text\n{}, {}",
        '"file_name";"text"\n"{}";{}',
    ],
)
def test_tables_with_any_separator_and_quoted_captions(make, table):
    # The caption is quoted as a spreadsheet quotes it.
    for name in ("metadata.csv", "Metadata.CSV", "metadata.tsv"):
        folder = make(**{name: table.format("a.jpg", '"sks; the ""first"",\nin two lines"')})
        assert prompts(folder) == ['sks; the "first", in two lines']
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metadata.jsonl", [row(), row(text=["sks", "b"])], r"metadata.jsonl, line 2: .*\['sks', 'b'\]"),
        ("metadata.jsonl", [row(text=7)], "line 1: expected a caption, which is one text, found 7"),
        ("metadata.jsonl", [row(text=True)], "line 1: .*found True"),
        ("metadata.jsonl", [row(text={"en": "sks"})], "line 1: .*found {'en': 'sks'}"),
        ("metadata.jsonl", [row(key="caption", text=1.5)], "line 1: .*found 1.5"),
        ("metadata.jsonl", [row(text="sks \0")], r"line 1: .*U\+0000"),
        ("metadata.jsonl", r'{"file_name": "a.jpg", "text": "\ud800"}', r"line 1: .*U\+D800"),
        ("metadata.jsonl", "\n[1, 2]", r"expected JSON with 'file_name' in line 2, found '\[1, 2\]'"),
        ("metadata.jsonl", "[" * 100_000, "expected JSON with 'file_name' in line 1"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a\n"}', "expected JSON with 'file_name' in line 1"),
        ("metadata.jsonl", [{"text": "sks"}], "line 1: expected the name of an image under 'file_name', found None"),
        ("metadata.jsonl", [row(name=3)], "line 1: .*'file_name', found 3"),
        ("metadata.jsonl", "\n", "expected a row for each image, found none"),
        ("metadata.csv", "file_name,text\na.jpg,sks\nb.jpg,7\n", "metadata.csv, line 3: .*found 7"),
        ("metadata.csv", 'file_name,text\na.jpg,"a\nb"\nb.jpg,sks, dog\n', "line 4: expected 2 values, found 3"),
        ("metadata.csv", "a.jpg,sks\n", "expected column names with 'file_name' in line 1, found 'a.jpg,sks'"),
        ("metadata.csv", 'file_name,text\na.jpg,"sks\n', "line 2 that cannot be read"),
        ("metadata.csv", "", "expected column names with 'file_name'"),
        ("a.txt", "sks \0", r"a.txt: .*U\+0000"),
    ],
)
def test_what_is_no_caption_is_named_with_its_line(make, name, content, says):
    with pytest.raises(InvalidValueError, match=says) as raised:
        prompts(make(**{name: content}))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", codecs.BOM_UTF8 + "sks é".encode()),
        ("metadata.jsonl", json.dumps(row()).encode("utf-16")),
        ("metadata.jsonl", json.dumps(row()).encode()),
        ("metadata.csv", b'file_name;text\r\n"a.jpg";"sks, told"\r\n'),
    ],
)
def test_damaged_files_give_captions_or_one_error(make, name, content):
    draw = random.Random(0)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] = draw.randrange(256)
        folder = make(**{name: bytes(damaged[: draw.choice((None, draw.randrange(len(content))))])})
        with contextlib.suppress(InvalidValueError):
            (found,) = prompts(folder)
            assert found.encode() and not {"\0", "\n", "\ufeff"} & set(found)


@pytest.mark.parametrize("name", ["instance_prompt", "class_prompt", "validation_prompt"])
@pytest.mark.parametrize("value", [7, ["sks"]])
def test_prompts_are_texts(name, value):
    with pytest.raises(InvalidValueError, match=f"--{name} must be one text"):
        CustomizeSettings(**{"pretrained_model_name_or_path": "m", "instance_prompt": PROMPT, name: value}).check()


# --caption_column


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"--caption_column 'says': expected one of metadata.jsonl, metadata.csv.* found none"),
        ({"a.txt": "sks"}, "--caption_column 'says': expected one of"),
        ({"metadata.jsonl": [row(key="says"), row("b.jpg")]}, "'says' in line 2, found file_name, text"),
        ({"metadata.csv": "file_name,text\na.jpg,sks"}, "'says' in line 2, found file_name, text"),
        ({"metadata.jsonl": [row(key="says", text=[7])]}, r"line 1: .*found \[7\]"),
        ({"metadata.jsonl": [row(key="says", text=None)]}, "captions under 'says', found none in 1 rows"),
    ],
)
def test_a_caption_column_of_a_folder_must_hold_captions(make, files, says):
    with pytest.raises(InvalidValueError, match=says):
        prompts(make(**files), caption_column="says")


@pytest.fixture
def data_set(make, tmp_path):
    datasets = pytest.importorskip("datasets")

    def write(says, **changes):
        images = [str(path) for path in find_images(make([f"{index}.png" for index in range(len(says))]))]
        rows = datasets.Dataset.from_dict({"image": images, "says": says}).cast_column("image", datasets.Image())
        rows.to_parquet(tmp_path / "set" / "train.parquet")
        given = {"dataset_name": str(tmp_path / "set"), "cache_dir": str(tmp_path / "cache")}
        return prompts(tmp_path, instance_data_dir=None, **given, **changes)

    return write


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ([1, 2], "expected texts in --caption_column 'says', found Value.'int64'"),
        ([["sks"], ["b", "c"]], r"found List\(Value\('string'\)\)"),
        ([{"en": "sks"}], "found {'en': Value"),
        ([None, None], "found Value.'null'"),
        ([" ", None], "found all 2 rows empty"),
        (["sks", "\0"], r"row 1: .*U\+0000"),
    ],
)
def test_a_caption_column_of_a_data_set_must_hold_texts(data_set, says, found):
    with pytest.raises(InvalidValueError, match=found):
        data_set(says, caption_column="says")


def test_rows_without_a_caption_are_counted(data_set, caplog):
    caplog.set_level(logging.WARNING, "comcat_hf")
    assert data_set(["\ufeffsks", None, ""], caption_column="says") == ["sks", PROMPT, PROMPT]
    assert "of 3 images, those without a caption get the instance prompt: 2 (row 1, row 2)" in caplog.text


def test_captions_of_a_data_set_that_nobody_named_are_mentioned(data_set, caplog):
    assert data_set(["sks", "b"]) == [PROMPT, PROMPT]
    assert "no --caption_column is given, so all images get the instance prompt; texts are in says" in caplog.text


def test_an_image_folder_as_a_data_set(make, tmp_path, caplog):
    pytest.importorskip("datasets")
    folder = make(["a.jpg", "b.jpg"], **{"metadata.jsonl": [row(), row("b.jpg", None)], "a.txt": "sks"})
    given = {"dataset_name": str(folder), "instance_data_dir": None, "cache_dir": str(tmp_path / "cache")}
    assert prompts(folder, **given, caption_column="text") == ["sks, told", PROMPT]
    assert "read with --instance_data_dir only; files not read: 1 (a.txt)" in caplog.text
