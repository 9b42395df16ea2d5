"""Every file that we write, damaged a hundred times: one error of ours, or all is read as it was written."""

import json
import logging
import random
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import comcat_hf.cli as cli
from comcat_hf import (
    ComCATConfig,
    LatencyTable,
    RankPlan,
    Statistics,
    compress,
    load_comcat_weights,
    save_comcat_weights,
)
from comcat_hf.compression.budget.latency import ShapeTimes
from comcat_hf.compression.calibration.moments import Sums, sum_names
from comcat_hf.compression.search.search import SearchState
from comcat_hf.configs.adapter import read_config
from comcat_hf.customization import unload_comcat_weights
from comcat_hf.errors import ComCATError
from comcat_hf.native import dense_skeleton
from comcat_hf.original import read_original_vit
from comcat_hf.original.files import read_pickle
from comcat_hf.training.checkpoints import (
    Progress,
    new_checkpoint,
    restore_random_states,
    restore_states,
    write_states,
)
from comcat_hf.training.classify.artefacts import Artefacts
from comcat_hf.training.classify.logs import read_log as lines_of
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.recipes import parse_settings
from tests.helpers import small_vit
from tests.original.test_vit import HEADS, release_files


TIMES = 100
# As they stand in JSON; the deep ones would end in a RecursionError.
VALUES = (
    *("null", "[]", "{}", "true", "0", "-1", "3.7", '"x"', "[null]", "7", "NaN", "-Infinity", "1e400", '"\\ud800"'),
    *("9" * 400, "9" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 100 + "]" * 100),
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]


@dataclass(frozen=True)
class Format:
    """A kind of folder: how it is written, how it is read, and what a reader says of it.

    Attributes:
        write: fills a folder.
        read: metadata and structure of what is in it, without the values of tensors.
        files: which are damaged, by patterns.
        faithful: whether another valid value is an edit, which is read as it stands and is no damage.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: tuple[str, ...] = ("*",)
    faithful: bool = False


def plan() -> RankPlan:
    ranks = {"vit.layers.0.attention": {"qk": 8, "vo": 12}, "vit.layers.0.mlp": {"width": 40}, "classifier": 3}
    return RankPlan(ranks, "ViTForImageClassification", "user/base", "main", "model", "params", "uniform", 0.5, 0.502)


def statistics() -> Statistics:
    torch.manual_seed(0)
    squares, others = {"heads": (2, 4, 4), "input": (6, 6)}, {"attended_sum": (2, 4), "mean": (6,), "input": (9,)}
    others |= dict.fromkeys(("count", "keys", "rows"), ())
    sums = {
        name: Sums(side, {key: torch.rand(others.get(key, squares[side])).double() + 1 for key in sum_names(side)})
        for name, side in (("layers.0.attention", "heads"), ("layers.0.fc1", "input"))
    }
    return Statistics(sums, "transformers.ViT", 12)


def read_statistics(folder: Path) -> Any:
    found = Statistics.from_pretrained(folder)
    tensors = {f"{name}:{key}": value for name in found for key, value in found.sums[name].values.items()}
    return found.architecture, found.samples, found.scope, shapes(tensors)


def table() -> LatencyTable:
    shapes = {"linear 4 to 8": ShapeTimes(2, 900, {"rank": {2: 300, 3: 500}})}
    return LatencyTable(5000, shapes, "ViT", "cpu", "torch.float32", 2, 8)


def search_state() -> SearchState:
    tensors = [torch.rand(2, 3) for _ in range(3)]
    return SearchState(4, ["a:qk", "b:rank"], [[0, 4, 8], [0, 2]], *tensors, torch.Generator().get_state())


def read_search(folder: Path) -> Any:
    state = vars(SearchState.load(folder / "search_state.pt"))
    return shapes({name: value for name, value in state.items() if isinstance(value, torch.Tensor)}), str(state)


def write_stages(folder: Path) -> None:
    for stage in ("calibrate", "allocate"):
        Artefacts(folder).note(stage, {"reduction": 0.5, "scope": "model", "seed": 3})


def read_stages(folder: Path) -> Any:
    return Artefacts(folder).seed(), [Artefacts(folder).was_done(stage) for stage in ("calibrate", "allocate", "x")]


def optimizer() -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    found = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    found.step()
    return found


def write_checkpoint(folder: Path) -> None:
    progress = Progress(2, 7, {"max_train_steps": 4, "num_processes": 1, "plan": "abc"})
    with new_checkpoint(Accelerator(cpu=True), folder, progress) as unfinished:
        write_states(unfinished, {"optimizer": optimizer()})
        save_file({"weight": torch.zeros(3)}, unfinished / "student.safetensors")


def write_earlier_checkpoint(folder: Path) -> None:
    write_checkpoint(folder)
    file = folder / "checkpoint-2" / "training_state.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in ("files", "digest")}))


def read_checkpoint(folder: Path) -> Any:
    checkpoint, states = folder / "checkpoint-2", optimizer()
    progress = Progress.read(checkpoint)
    restore_states(checkpoint, {"optimizer": states})
    restore_random_states(Accelerator(cpu=True), checkpoint)
    return progress, str(states.state_dict()), random.getstate(), torch.get_rng_state().tolist()


def write_pipeline(folder: Path) -> None:
    model = VIT()
    torch.manual_seed(0)
    model.add_adapter(ComCATConfig(mode="customize", qk_rank=2, vo_rank=3, init_weights=False))
    save_comcat_weights({"unet": model}, folder, base_model_name_or_path="user/base")


def read_pipeline(folder: Path) -> Any:
    load_comcat_weights({"unet": ADAPTED}, folder)
    try:
        config = ADAPTED.peft_config["default"].to_dict()
        return str(config), shapes({k: v for k, v in ADAPTED.state_dict().items() if "comcat_" in k})
    finally:
        unload_comcat_weights({"unet": ADAPTED})


def write_configuration(folder: Path) -> None:
    ComCATConfig(qk_rank=2, modules_to_save=["norm"]).save_pretrained(folder)


def read_adapter_config(folder: Path) -> Any:
    # What PEFT itself adds is none of ours.
    return {k: v for k, v in read_config(folder / "adapter_config.json")[1].to_dict().items() if k in OWN}


OWN = ("mode", "qk_rank", "vo_rank", "core", "scale", "rank_pattern", "target_modules", "modules_to_save", "revision")


def write_model(folder: Path) -> None:
    compress(VIT(), 0.5).save_pretrained(folder)


def read_info(folder: Path) -> str:
    result = CliRunner().invoke(cli.app, ["info", str(folder)])
    if result.exit_code:
        assert isinstance(result.exception, SystemExit), result.exception
        raise ComCATError(result.stderr)
    return result.stdout.partition("\n\n")[0]


def read_skeleton(folder: Path) -> Any:
    return shapes(dense_skeleton(plan(), folder).state_dict())


def write_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "reduction: 0.5\nlearning_rate: 3.0e-4\nroute: full\nseed: 3\noutput_dir: out\n"
    )


def read_recipe(folder: Path) -> Any:
    return parse_settings(CompressSettings, [str(folder / "recipe.yaml")], kind="compress", description="x")


def write_log(folder: Path) -> None:
    (folder / "log.jsonl").write_text("".join(f'{{"step": {n}, "loss": 0.{n}}}\n' for n in range(1, 5)))


def read_log(folder: Path) -> None:
    lines_of(folder / "log.jsonl", 3)


def write_original(folder: Path) -> None:
    torch.manual_seed(0)
    release_files(folder)
    torch.save([torch.zeros(2, 3), torch.zeros(3)], folder / "comcat_weight.pt")


def read_original(folder: Path) -> Any:
    found = [tuple(tensor.shape) for tensor in read_pickle(folder / "comcat_weight.pt")]
    return found, shapes(read_original_vit(folder, heads=HEADS).state_dict())


def shapes(tensors: dict[str, torch.Tensor]) -> Any:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def VIT():
    return small_vit()[0]


ADAPTED = VIT()

FORMATS = {
    "rank file": Format(plan().save_pretrained, lambda f: RankPlan.from_pretrained(f)),
    "statistics": Format(statistics().save_pretrained, read_statistics),
    "latency table": Format(table().save_pretrained, lambda f: LatencyTable.from_pretrained(f)),
    "search state": Format(lambda f: search_state().save(f / "search_state.pt"), read_search),
    "stages": Format(write_stages, read_stages),
    "checkpoint": Format(write_checkpoint, read_checkpoint, ("checkpoint-2/*",)),
    "earlier checkpoint": Format(write_earlier_checkpoint, read_checkpoint, ("checkpoint-2/[or]*.pt",)),
    "pipeline adapter": Format(write_pipeline, read_pipeline, ("*.json", "unet/*")),
    "adapter configuration": Format(write_configuration, read_adapter_config, faithful=True),
    "model, info": Format(write_model, read_info, ("config.json", "comcat_ranks.json"), faithful=True),
    "pipeline adapter, info": Format(write_pipeline, read_info, ("*.json", "unet/*.json"), faithful=True),
    "model, skeleton": Format(write_model, read_skeleton, ("config.json",), faithful=True),
    "recipe": Format(write_recipe, read_recipe, faithful=True),
    "log": Format(write_log, read_log, faithful=True),
    "original": Format(write_original, read_original),
}


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes:
    """A bit, of safetensors one in the header: what a tensor's values are is not ours to know."""
    end = len(content)
    if content[8:9] == b"{":
        end = 8 + struct.unpack("<Q", content[:8])[0]
    place = rng.randrange(end)
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def swap(content: bytes, rng: random.Random) -> bytes:
    """Another value in the place of one, or a name more, less or twice."""
    found = json.loads(content)
    parents = list(mappings(found))
    parent = rng.choice(parents)
    name, raw = rng.choice(list(parent)), rng.choice(VALUES)
    match rng.randrange(6):
        case 0:
            del parent[name]
        case 1:
            parent["@more"] = "@raw"
        case 2:
            return content.replace(f'"{name}":'.encode(), f'"{name}": {raw}, "{name}":'.encode(), 1)
        case _:
            parent[name] = "@raw"
    return json.dumps(found).replace('"@raw"', raw).encode()


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if value:
            yield value
        for child in value.values():
            yield from mappings(child)


def exchange(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * 64, b"[]", b"null", b"{}", b"\xff\xfe{", json.dumps(plan().to_dict()).encode()])


def damages(path: Path) -> list[Callable[[bytes, random.Random], bytes]]:
    return [cut, flip, flip, exchange, *([swap] * 6 if path.suffix == ".json" else [flip] * 3)]


@pytest.mark.parametrize("name", FORMATS)
def test_damage_is_one_error_of_ours_or_changes_nothing(name, tmp_path, caplog):
    kind, rng = FORMATS[name], random.Random(name)
    kind.write(tmp_path)
    whole, errors = kind.read(tmp_path), 0
    files = sorted({path for pattern in kind.files for path in tmp_path.glob(pattern) if path.is_file()})
    for number in range(TIMES):
        file = files[number % len(files)]
        content = file.read_bytes()
        damage = rng.choice(damages(file))
        file.write_bytes(damage(content, rng))
        caplog.clear()
        try:
            found = kind.read(tmp_path)
        except ComCATError as error:
            assert len(str(error)) < 2000
            errors += 1
        except BaseException as error:
            error.add_note(f"{damage.__name__} of {file.name}: {file.read_bytes()[:2000]!r}")
            raise
        else:
            edited = kind.faithful or any(record.levelno >= logging.WARNING for record in caplog.records)
            assert found == whole or edited, f"{damage.__name__} of {file.name}: {file.read_bytes()[:2000]!r}"
        file.write_bytes(content)
    # Lines of a log that were cut short are left out.
    assert errors > TIMES / 10 or name == "log"


@pytest.mark.parametrize("pattern", ["attention", "mlp"])
def test_an_adapter_of_peft_without_some_of_its_tensors_is_refused(tmp_path, pattern):
    get_peft_model(VIT(), ComCATConfig(qk_rank=4, linear_rank=5)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole, rng = load_file(file), random.Random(pattern)
    names = [name for name in whole if re.search(pattern, name)]
    for change in (
        lambda name: {k: v for k, v in whole.items() if k != name},
        lambda name: {k if k != name else f"{k}.x": v for k, v in whole.items()},
        lambda name: whole | {name: whole[name][..., 1:].contiguous()},
        lambda name: whole | {name.replace("layers.0", "layers.7"): whole[name] + 0},
    ):
        name = rng.choice([name for name in names if "layers.0" in name])
        save_file(change(name), file, {"format": "pt"})
        with pytest.raises(ComCATError, match="by its configuration: expected"):
            PeftModel.from_pretrained(VIT(), tmp_path)
