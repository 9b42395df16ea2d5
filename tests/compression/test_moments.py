"""Statistics add up, over parts of the data and over processes, and come back from their file."""

import json

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator

from comcat_hf import Statistics, collect_statistics, compress
from comcat_hf.compression.calibration.moments import STATISTICS_NAME
from comcat_hf.compression.calibration.statistics import collecting, token_mask
from comcat_hf.errors import CheckpointError, InvalidValueError
from comcat_hf.modeling import apply_ranks, find_sites
from tests.compression.test_statistics import assert_same, doubled
from tests.helpers import MODELS, images, small_bert, small_vit
from tests.processes import in_processes


def gathered():
    model, _ = small_vit()
    return model, collect_statistics(model, images(5).split(2))


def rewritten(path, **changes):
    """The file with other metadata; `None` drops a key."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = {**file.metadata(), **changes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {k: v for k, v in metadata.items() if v is not None})


@pytest.mark.parametrize("family", ["vit", "bert", "clip"])
def test_parts_add_up_to_the_whole(family):
    model, inputs = MODELS[family]()
    parts = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(2)]
    first, second = (collect_statistics(model.double(), [doubled(part)]) for part in parts)
    whole = collect_statistics(model, [doubled(inputs)])
    assert_same(first + second, whole)
    assert_same(first.merge(second), whole)
    assert ((first + second).samples, first.samples) == (2, 1)


def test_those_of_other_models_do_not_add_up():
    model, statistics = gathered()
    bert, inputs = small_bert()
    others = {
        "architecture": collect_statistics(bert, [inputs]),
        "scope": collect_statistics(model, [images()], scope="attention"),
        r"layers\.0.*heads": collect_statistics(small_vit(hidden_size=96)[0], [images()]),
        r"layers\.2": collect_statistics(small_vit(num_hidden_layers=3)[0], [images()]),
    }
    for says, other in others.items():
        with pytest.raises(InvalidValueError, match=says):
            statistics + other
    with pytest.raises(TypeError):
        statistics + 1


def test_serve_the_width_of_an_mlp():
    model, statistics = gathered()
    name = "vit.layers.0.mlp"
    statistics.check_model(model, [name, f"{name}.fc2", "vit.layers.0.attention"])
    with pytest.raises(InvalidValueError, match=r"scope='attention', lack vit\.layers\.0\.mlp, which"):
        collect_statistics(model, [images()], scope="attention").check_model(model, [name])


def test_those_of_a_narrower_side_serve_ranks_only():
    # As gathered before widths were known: at an output layer the covariance of what it gives.
    model, statistics = gathered()
    name = "vit.layers.0.mlp.fc2"
    with token_mask(model) as mask, collecting(find_sites(model)[name], mask) as collector:
        model(images(5))
    old = Statistics({**statistics.sums, name: collector.finish(name)}, statistics.architecture, 5)
    old.check_model(model)
    weights = []
    for given in (old, statistics):
        small = small_vit()[0]
        apply_ranks(small, {name: 9}, statistics=given)
        weights.append(small.get_submodule(name))
    products = [layer.weight @ layer.first_factor.weight for layer in weights]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidValueError, match=r"^vit\.layers\.0\.mlp: .*side 'input'.*gather"):
        apply_ranks(model, {"vit.layers.0.mlp": {"width": 9}}, statistics=old)


def test_come_back_from_a_folder_and_a_file(tmp_path):
    model, statistics = gathered()
    statistics.save_pretrained(tmp_path / "new" / "folder")
    path = tmp_path / "new" / "folder" / STATISTICS_NAME
    assert [entry.name for entry in path.parent.iterdir()] == [STATISTICS_NAME]
    for source in (path, path.parent, str(path.parent)):
        again = Statistics.from_pretrained(source)
        assert_same(again, statistics, tolerance=0)
        assert (again.samples, again.architecture, again.scope) == (5, statistics.architecture, "model")
        assert [s.side for s in again.sums.values()] == [s.side for s in statistics.sums.values()]
    small, same = (compress(model, 0.4, statistics=s) for s in (statistics, again))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))
    statistics = statistics + again
    statistics.save_pretrained(path.parent)
    assert Statistics.from_pretrained(path).samples == 10


def test_files_that_are_not_whole_are_refused(tmp_path):
    _, statistics = gathered()
    statistics.save_pretrained(tmp_path)
    path = tmp_path / STATISTICS_NAME
    whole = path.read_bytes()
    for cut in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"comcat_statistics\.safetensors.*cut short"):
            Statistics.from_pretrained(tmp_path)
    path.write_text("not a tensor in sight, but long enough for a header")
    with pytest.raises(CheckpointError, match="of another kind"):
        Statistics.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": None}, "found format None"),
        ({"format": "lora"}, "'lora'"),
        ({"format_version": "2"}, r"format_version 1, found .*format_version '2'\. Update"),
        ({"samples": None}, "samples"),
        ({"samples": "many"}, "many"),
        ({"samples": "0"}, "samples: expected a whole number from 1, found 0"),
        ({"sides": "{"}, "sides: expected JSON"),
        ({"sides": json.dumps({"classifier": "above"})}, "above"),
        ({"sides": json.dumps({"vit.layers.9.attention": "heads"})}, r"layers\.9"),
        ({"sides": "[]"}, "sides: expected a mapping"),
        ({"sides": "[" * 5000}, "sides: expected JSON"),
    ],
)
def test_files_of_another_kind_or_version_are_refused(tmp_path, changes, says):
    _, statistics = gathered()
    statistics.save_pretrained(tmp_path)
    rewritten(tmp_path / STATISTICS_NAME, **{"digest": None} | changes)
    with pytest.raises(CheckpointError, match=says):
        Statistics.from_pretrained(tmp_path)


def test_a_header_that_was_changed_is_refused_and_one_without_a_digest_is_read(tmp_path):
    _, statistics = gathered()
    statistics.save_pretrained(tmp_path)
    rewritten(tmp_path / STATISTICS_NAME, samples="11")
    with pytest.raises(CheckpointError, match="found it changed"):
        Statistics.from_pretrained(tmp_path)
    rewritten(tmp_path / STATISTICS_NAME, digest=None)
    assert Statistics.from_pretrained(tmp_path).samples == 11


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: {"classifier:count": torch.tensor(float("inf"))}, "classifier: expected count"),
        (lambda tensors: {"classifier:count": torch.tensor(0.0)}, "classifier: expected count above 0"),
        (lambda tensors: {"classifier:mean": tensors["classifier:mean"][1:]}, "classifier: expected mean"),
        (lambda tensors: {"classifier:second": tensors["classifier:mean"] + 0}, "classifier: expected mean"),
        (lambda tensors: {"classifier:first": torch.zeros(1)}, "found classifier:first in one of the two only"),
    ],
)
def test_sums_that_are_not_of_one_module_or_not_finite_are_refused(tmp_path, change, says):
    gathered()[1].save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / STATISTICS_NAME, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    safetensors.torch.save_file(tensors | change(tensors), tmp_path / STATISTICS_NAME, metadata)
    with pytest.raises(CheckpointError, match=says):
        Statistics.from_pretrained(tmp_path)


def test_no_file_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="an empty folder"):
        Statistics.from_pretrained(tmp_path)


def gather_together(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, _ = small_vit()
    share = [images(5)[:3].split(2), [images(5)[3:]]][accelerator.process_index]
    wrapped = accelerator.prepare(model)
    statistics = collect_statistics(wrapped, share, accelerator=accelerator)
    assert statistics.samples == 5
    curved = collect_statistics(wrapped, iter(share), curvature=True, accelerator=accelerator)
    # One row of logits a sample; the sums of both processes are what both have.
    assert {sums.values["weight"].item() for sums in curved.sums.values() if sums.has_curvature} == {5.0}
    table = torch.cat([value.flatten() for sums in curved.sums.values() for value in sums.values.values()])
    both = accelerator.gather(table[None].float())
    assert torch.equal(both[0], both[1])
    lone = collect_statistics(model, [[images(5)], []][accelerator.process_index], accelerator=accelerator)
    assert lone.samples == 5
    statistics.save_pretrained(folder / str(accelerator.process_index))
    for wrong in ([torch.zeros(2, 3, 16, 16)], []):
        batches = [wrong, []][accelerator.process_index]
        own = "does not fit" if accelerator.is_main_process else "1 of 2 processes"
        with pytest.raises(InvalidValueError, match=own if wrong else "empty"):
            collect_statistics(model, batches, accelerator=accelerator)


def test_two_processes_gather_what_one_does(tmp_path):
    in_processes(gather_together, tmp_path)
    alone = collect_statistics(small_vit()[0], [images(5)])
    for rank in range(2):
        assert_same(Statistics.from_pretrained(tmp_path / str(rank)), alone, tolerance=1e-6)
