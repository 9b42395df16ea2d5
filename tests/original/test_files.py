"""Files that somebody else made: whatever they hold is one error of ours, and nothing of it is run or written."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from typer.testing import CliRunner

from comcat_hf import cli
from comcat_hf.errors import CheckpointError
from comcat_hf.original.files import check_sizes, read_pickle, take_tensor
from tests.customization.pipelines import tiny_unet
from tests.original.test_adapter import random_weights
from tests.original.test_vit import HEADS, release_files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    tiny_unet(attention_head_dim=4).save_pretrained(folder)
    return folder


@pytest.fixture
def convert(tmp_path, base):
    """Writes the file of a kind with `save(content, path)`, and runs the command on it as a user would."""

    def run(kind, change, save=torch.save):
        if kind == "vit":
            tensors = release_files(tmp_path / "release")
            file = tmp_path / "release" / "checkpoint.pth"
            save(change({"model": tensors}), file)
            arguments = ("vit", str(tmp_path / "release"), str(tmp_path / "out"), "--heads", str(HEADS))
        else:
            file = tmp_path / "comcat_weight.pt"
            save(change(random_weights(tiny_unet(attention_head_dim=4))), file)
            arguments = ("adapter", str(file), str(tmp_path / "out"), "--base", str(base))
        there = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(cli.app, ["convert", *arguments])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
        assert result.stderr.count("\n") == 1 and result.stderr.startswith(f"comcat convert {kind}: {tmp_path}")
        assert sorted(tmp_path.rglob("*")) == there
        return result.stderr

    return run


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain(content, path):
    path.write_bytes(pickle.dumps(content))


def with_attribute(value):
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.note = value
    return parameter


PLACES = {
    "alone": ("adapter", lambda content, evil: evil),
    "in the list": ("adapter", lambda content, evil: [*content[:-1], evil]),
    "on a parameter": ("adapter", lambda content, evil: [*content[:-1], with_attribute(evil)]),
    "as a tensor": ("vit", lambda content, evil: {"model": {**content["model"], "norm.bias": evil}}),
    "as an argument": ("vit", lambda content, evil: {**content, "args": argparse.Namespace(lr=evil)}),
    "in the optimizer": ("vit", lambda content, evil: {**content, "optimizer": {"state": [{"step": evil}]}}),
}


# The other ways to save in one place of each kind.
OLDER = [("alone", legacy), ("as a tensor", legacy), ("in the list", plain), ("in the optimizer", plain)]


@pytest.mark.parametrize(("place", "save"), [*((place, torch.save) for place in PLACES), *OLDER])
def test_malicious_pickles_do_nothing(tmp_path, convert, place, save):
    kind, put = PLACES[place]
    said = convert(kind, lambda content: put(content, Malicious(tmp_path / "run")), save)
    assert "nothing of it was run" in said
    assert not (tmp_path / "run").exists()


def repeated(*shape, dtype=torch.float32):
    return torch.zeros(1, dtype=dtype).as_strided(shape, (0,) * len(shape))


HUGE = 10**12
DECLARED = {
    "repeated": repeated(1, HUGE + 1, 32),
    "repeated halves": repeated(1, HUGE + 1, 32, dtype=torch.float16),
    "without numbers": torch.empty(1, HUGE + 1, 32, device="meta"),
}


@pytest.mark.parametrize("save", [torch.save, legacy])
@pytest.mark.parametrize("tensor", DECLARED.values(), ids=DECLARED)
def test_shapes_that_the_file_does_not_hold(convert, tensor, save):
    said = convert("vit", lambda content: {"model": {**content["model"], "pos_embed": tensor}}, save)
    assert "the size of the file, found declared sizes of" in said
    said = convert("adapter", lambda content: [tensor[0], *content[1:]], save)
    assert "the size of the file, found declared sizes of" in said


def repacked(change, compression=zipfile.ZIP_STORED):
    """A way to save: what `torch.save` writes, with entries exchanged."""

    def save(content, path):
        torch.save(content, path)
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as source:
            entries = {name: source.read(name) for name in source.namelist()}
        with zipfile.ZipFile(path, "w", compression) as target:
            for name, payload in change(entries).items():
                target.writestr(name, payload)

    return save


def declaring_storage(entries):
    """The first storage is said to have 10^13 numbers."""
    name = next(name for name in entries if name.endswith("data.pkl"))
    head, mark, tail = entries[name].partition(b"cpu")
    # Behind the device and what memoises it stands the count.
    end = tail.index(b"Q")
    start = max(tail.rfind(code, 0, end) for code in (b"K", b"M", b"J"))
    count = b"\x8a\x06" + (10**13).to_bytes(6, "little")
    return entries | {name: head + mark + tail[:start] + count + tail[end:]}


def tar(content, path):
    with tarfile.open(path, "w") as archive:
        for name in ("../escaped", "storages", "tensors", "pickle"):
            payload = pickle.dumps(1)
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))


def cut(length):
    def save(content, path):
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:length])

    return save


DAMAGED = {
    "packed": (repacked(lambda entries: entries, zipfile.ZIP_DEFLATED), "a zip file with the compressed entry"),
    "a storage": (repacked(declaring_storage), "cut short, damaged or of another kind"),
    "outside": (repacked(lambda e: e | {"../escaped": b"x"}), "cut short, damaged or of another kind"),
    "all outside": (repacked(lambda e: {f"../../{k}": v for k, v in e.items()}), "cut short, damaged or of"),
    "tar": (tar, "cut short, damaged or of another kind"),
    "a page": (lambda _, path: path.write_text("<html>Not found</html>"), "expected tensors in plain containers"),
    "a folder": (lambda _, path: (path.unlink(missing_ok=True), path.mkdir()), "Is a directory"),
    "nothing": (cut(0), "cut short, damaged or of another kind"),
    "one byte": (lambda _, path: path.write_bytes(b"\x80"), "cut short, damaged or of another kind"),
    "half": (cut(4000), "cut short, damaged or of another kind"),
}


@pytest.mark.parametrize("kind", ["vit", "adapter"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(convert, kind, damage):
    save, says = DAMAGED[damage]
    assert says in convert(kind, lambda content: content, save)


def test_a_file_of_the_other_kind(tmp_path, convert):
    assert "expected a list of tensors, found dict" in convert("adapter", lambda content: {"model": {}})
    assert "under the key 'model'" in convert("vit", lambda content: [*content["model"].values()])


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.tensor([1.0, torch.nan]), "x to be finite, found NaN or infinity"),
        (torch.tensor([1.0, -torch.inf], dtype=torch.float16), "x to be finite, found NaN or infinity"),
        (torch.empty(2, device="meta"), "found no dense tensor"),
        (torch.ones(2).to_sparse(), "found no dense tensor"),
        (torch.ones(2, dtype=torch.complex64), "found 2 of torch.complex64"),
        (torch.tensor(1.0), "found a single number"),
        ([1.0, 2.0], "found list"),
    ],
)
def test_tensors_that_are_no_weights(tensor, says):
    with pytest.raises(CheckpointError, match=says):
        take_tensor({"x": tensor}, "x", (2,), "file.pt")


def test_what_is_read_is_plain(tmp_path):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float16))
    parameter.float = "hidden"
    torch.save([parameter], tmp_path / "w.pt")
    tensors = read_pickle(tmp_path / "w.pt")
    check_sizes(tensors, tmp_path / "w.pt")
    found = take_tensor({"x": tensors[0]}, "x", (None,), "w.pt")
    assert type(found) is torch.Tensor and found.dtype == torch.float32
    assert found.tolist() == [1.0, 2.0]
