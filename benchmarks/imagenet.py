"""ImageNet in one command: the recipes of DeiT stage by stage, what each takes, and the tables of the docs.

    python benchmarks/imagenet.py --data imagenet --launch "--num_processes 4 --mixed_precision bf16"
    python benchmarks/imagenet.py --data imagenet --rows base --gradient_accumulation_steps 4
    python benchmarks/imagenet.py --rehearse
    python benchmarks/imagenet.py --tables

The first runs every row of `ROWS`: a recipe with its flags, each stage as `accelerate launch -m
comcat_hf.training.classify RECIPE --stages STAGE`, in a process of its own whose time and memory are taken. The data
is a folder with `train/` and `val/` or `validation/`, or a data set of the Hub. Flags that are not named by `--help`
go to every stage. A row that was stopped goes on where it was when the same command is given again. The figures go
into `results/imagenet.json`, and from there into the empty cells of the table in docs/train.md.

`--rehearse` takes one row through all stages with a few steps: random weights of DeiT-base, 1,000 classes of three
images of random pixels. Its accuracies mean nothing. Time and memory of its stages, and what `_estimates.py` makes of
them for one A100, go into docs/train.md, too. `--tables` writes the tables again from the files.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import _report
from _estimates import estimates, probe

from comcat_hf.reporting.cards import markdown_table


ROOT = Path(__file__).resolve().parent.parent
RESULTS, REHEARSAL = (ROOT / "benchmarks" / "results" / f"{name}.json" for name in ("imagenet", "imagenet-rehearsal"))
PAGE = ROOT / "docs" / "train.md"
PROGRAM = "comcat_hf.training.classify"
START, MEASURE, TAKEN = "start", "measure", "taken.json"
UNTRAINED = ("calibrate", "allocate", "initialize", "evaluate", "export")
TRAINED = ("calibrate", "allocate", "initialize", "finetune", "evaluate", "export")


@dataclass(frozen=True)
class Row:
    """A line of the table of results.

    Attributes:
        what: model and reduction.
        published: figures of others, top-1 in percent.
        recipe, flags: what the program is given; flags go over the recipe.
        stages: those that are run.
    """

    what: str
    published: str
    recipe: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    stages: Sequence[str] = TRAINED


REFINED = {"refine_steps": 1000}
HALF_OF_ATTENTION = {"scope": "attention", "reduction": 0.5}
# 44 of 86.6 million parameters.
AT_44_MILLION = {"reduction": 0.492}
ROWS: Mapping[str, Row] = {
    "small": Row("DeiT-S, -50 %, fine-tuned", "COMCAT 79.58", "deit_small"),
    "base": Row("DeiT-B, -60 %, fine-tuned", "COMCAT 82.26; NViT 83.29 at 34M", "deit_base"),
    "base-44m": Row("DeiT-B at 44M, closed form", "FLAR-SVD 78.4", "deit_base", AT_44_MILLION, UNTRAINED),
    "base-44m-refined": Row("the same, refined without labels", "", "deit_base", AT_44_MILLION | REFINED, UNTRAINED),
    "base-attention": Row(
        "DeiT-B, attention -50 %, closed form", "CORP 80.80", "deit_base", HALF_OF_ATTENTION, UNTRAINED
    ),
    "base-attention-refined": Row(
        "the same, refined without labels", "", "deit_base", HALF_OF_ATTENTION | REFINED, UNTRAINED
    ),
}
# What keeps a rehearsal short; the rest is as in the recipe.
SHORT: Mapping[str, Any] = {
    "calibration_samples": 16,
    "calibration_batch_size": 8,
    "refine_steps": 2,
    "max_train_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_eval_samples": 8,
    "dataloader_num_workers": 1,
    "report_to": "none",
}
# As facebook/deit-base-patch16-224 has it.
PROCESSOR: Mapping[str, Any] = {
    "feature_extractor_type": "DeiTFeatureExtractor",
    "do_resize": True,
    "size": 256,
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
Start = Callable[[str, Sequence[str], TextIO], int]


class Failed(Exception):
    """A stage ended with an error."""


def launching(flags: str) -> Start:
    """Starts a program through accelerate; returns its process id."""

    def start(program: str, arguments: Sequence[str], log: TextIO) -> int:
        launch = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(flags), "-m", program]
        return subprocess.Popen([*launch, *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=ROOT).pid

    return start


def measured(start: Start, program: str, arguments: Sequence[str], log: Path) -> dict[str, float]:
    """Run a program to its end, and see what it and its processes took."""
    began = time.perf_counter()
    with log.open("w") as file:
        _, status, usage = os.wait4(start(program, arguments, file), 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise Failed(f"{program} {shlex.join(arguments)}\n{log.read_text()[-3000:]}")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        # Of the largest of its processes, in KiB.
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def run_row(row: Row, start: Start, output: Path, given: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Run the stages of a row, one process after the other.

    Args:
        output: the folder of the run.
        given: flags for every stage, over those of the row.
        data: flags that name the images.

    Returns:
        what each stage took, and the figures.
    """
    output.mkdir(parents=True, exist_ok=True)
    flags = {name: str(value) for name, value in {**row.flags, **given, **data, "output_dir": output}.items()}
    stages = done_before(output / TAKEN, flags)
    dense = given.get("model_name_or_path", f"facebook/{row.recipe.replace('_', '-')}-patch16-224")
    shared = ("max_eval_samples", "dataloader_num_workers", "per_device_eval_batch_size", "dataset_name")
    of_data = {name: flags[name] for name in (*shared, "validation_dir") if name in flags}
    file = output / "evaluation.json"
    asked = {"model_name_or_path": output, "dense": dense, "throughput_seconds": 0, "output": file}
    commands = {
        START: (PROGRAM, [row.recipe, *words(flags | {"dry_run": True})]),
        **{
            stage: (PROGRAM, [row.recipe, *words(flags | {"stages": stage, "resume_from_checkpoint": "latest"})])
            for stage in row.stages
        },
        MEASURE: (f"{PROGRAM}.evaluate", words(of_data | asked)),
    }
    for stage, (program, arguments) in commands.items():
        if stage in stages:
            continue
        stages[stage] = measured(start, program, arguments, output / f"{stage}.log")
        _report.write_json(output / TAKEN, {"flags": flags, "stages": stages})
        print(f"{stage:10} {stages[stage]['seconds']:8.1f} s", flush=True)
    models = json.loads(file.read_text())["models"]
    return {
        "recipe": row.recipe,
        "flags": {name: value for name, value in flags.items() if name not in {*data, "output_dir"}},
        "stages": stages,
        "sizes": {name: {key: models[name][key] for key in ("parameters", "macs")} for name in models},
        "metrics": json.loads((output / "eval_results.json").read_text()),
        # Measured again, from the exported model.
        "top1": {name: models[name]["top1"] for name in models},
    }


def done_before(file: Path, flags: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """What the finished stages of a row took that was stopped; nothing of a row with other flags."""
    found = json.loads(file.read_text()) if file.is_file() else {}
    return found["stages"] if found.get("flags") == flags else {}


def words(flags: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def data_flags(data: str) -> dict[str, Any]:
    """How the program is told of the images."""
    validation = [path for name in ("val", "validation") if (path := Path(data, name)).is_dir()]
    if not validation:
        return {"dataset_name": data}
    return {"train_dir": Path(data, "train"), "validation_dir": validation[0]}


def class_names(count: int) -> dict[str, str]:
    """Folders and labels as ImageNet's: WordNet ids, which are no labels, where there are 1,000."""
    known = {0: (1440764, "tench"), 281: (2123045, "tabby"), 999: (15075141, "toilet tissue")}
    if count != 1000:
        return {f"class_{number}": f"class_{number}" for number in range(count)}
    places = sorted(known)
    names = {}
    for number in range(count):
        below = max(place for place in places if place <= number)
        identity = known[below][0] + number - below
        names[f"n{identity:08}"] = known[number][1] if number in known else f"class {number}"
    return names


def make_images(folder: Path, names: Sequence[str], count: int) -> Path:
    """Folders of random pixels per class: `count` images to train on and one to validate on."""
    from PIL import Image

    for split, images in {"train": count, "val": 1}.items():
        for name in names:
            place = folder / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(images):
                pixels = random.Random(f"{split} {name} {number}").randbytes(32 * 32 * 3)
                Image.frombytes("RGB", (32, 32), pixels).save(place / f"{number}.JPEG")
    return folder


def make_model(folder: Path, labels: Sequence[str], **sizes: int) -> Path:
    """A ViT classifier with random weights; DeiT-base by default, in the files of facebook/deit-base-patch16-224."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    numbers = {label: number for number, label in enumerate(labels)}
    config = ViTConfig(id2label=dict(enumerate(labels)), label2id=numbers, **sizes)
    ViTForImageClassification(config).save_pretrained(folder)
    side = config.image_size
    processor = {**PROCESSOR, "size": side * 256 // 224, "crop_size": side}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def rehearse(
    name: str, start: Start, folder: Path, classes: int, given: Mapping[str, Any], **sizes: int
) -> dict[str, Any]:
    """Take a row through all stages on generated images with random weights."""
    names = class_names(classes)
    images, model = folder / "images", folder / "model"
    # Of a rehearsal that was stopped both are there.
    if not (model / "preprocessor_config.json").is_file():
        make_images(images, list(names), 3)
        make_model(model, list(names.values()), **sizes)
    flags = {**SHORT, **given, "model_name_or_path": model}
    found = run_row(ROWS[name], start, folder / "out", flags, data_flags(str(images)))
    found["flags"]["model_name_or_path"] = "random weights"
    return {"row": name, "classes": classes, "images": 4 * classes, **found}


# Tables


def results_table(rows: Mapping[str, Any]) -> list[list[str]]:
    """The table of results; cells of rows that were not run are empty."""
    table = [["run", "published, top-1", "parameters", "dense", "before training", "after", "hours"]]
    for name, row in ROWS.items():
        cells = ["", "", "", "", ""]
        if name in rows:
            found = rows[name]
            top1 = {key: f"{100 * values['top1']:.2f}" for key, values in found["metrics"].items()}
            hours = sum(stage["seconds"] for stage in found["stages"].values()) / 3600
            after = top1["final"] if "finetune" in row.stages else ""
            size = f"{found['sizes']['model']['parameters'] / 1e6:.1f}M"
            cells = [size, top1["dense"], top1["initial"], after, f"{hours:.1f}"]
        table.append([f"{row.what} (`{name}`)", row.published, *cells])
    return table


def stages_table(rehearsal: Mapping[str, Any]) -> list[list[str]]:
    """What the stages of a rehearsal took, and what they are estimated to take on one A100."""
    head = ["rehearsed", "wall, s", "CPU, s", "peak, GiB"]
    base, small = (estimates(rehearsal, name) for name in ("deit_base", "deit_small"))
    rows = [[*head, "DeiT-B, hours", "DeiT-B, GPU GiB", "DeiT-S, hours", "DeiT-S, GPU GiB"]]
    for stage, taken in rehearsal["stages"].items():
        guessed = [cell for one in (base, small) for cell in one.get(stage, ("", ""))]
        peak = f"{taken['peak_bytes'] / 2**30:.1f}"
        rows.append([stage, f"{taken['seconds']:.0f}", f"{taken['cpu_seconds']:.0f}", peak, *guessed])
    return rows


def fill(text: str, name: str, table: Sequence[Sequence[str]]) -> str:
    """Put a table between its marks."""
    begin, end = f"<!-- table: {name} -->\n", f"<!-- table: {name}, end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + markdown_table(table) + end + after


def filled(text: str) -> str:
    """The page with its tables as the files of results have them."""
    results = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    text = fill(text, "results", results_table(results))
    return fill(text, "stages", stages_table(json.loads(REHEARSAL.read_text())))


def write_tables() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def environment(launch: str) -> dict[str, object]:
    import torch

    return _report.environment("cpu" if "--cpu" in launch or not torch.cuda.is_available() else "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="folder with train/ and val/, or a data set of the Hub")
    what.add_argument("--rehearse", action="store_true", help="generated images, random weights, a few steps")
    what.add_argument("--tables", action="store_true", help="write the tables of the docs again")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--model", help="dense model in the place of the recipe's")
    parser.add_argument("--launch", help="flags of accelerate launch; on one GPU in bf16 by default")
    parser.add_argument("--folder", type=Path, help="where the runs lie; default: imagenet-runs, of a rehearsal none")
    parser.add_argument("--output", type=Path, help="JSON file; by default in benchmarks/results")
    args, further = parser.parse_known_args()
    if args.tables:
        write_tables()
        return
    given = {"model_name_or_path": args.model} if args.model else {}
    given |= dict(word.removeprefix("--").split("=", 1) for word in joined(further))
    if args.rehearse:
        launch = args.launch or "--cpu --num_processes 1"
        with tempfile.TemporaryDirectory() as folder:
            name = args.rows[0] if len(args.rows) == 1 else "base"
            place = (args.folder or Path(folder)).resolve()
            found = rehearse(name, launching(launch), place, 1000, given)
            found["probe"] = probed(place / "probe.json")
        _report.write_json(args.output or REHEARSAL, {"environment": environment(launch), "launch": launch, **found})
    else:
        launch = args.launch or "--num_processes 1 --mixed_precision bf16"
        output = args.output or RESULTS
        for name in args.rows:
            print(f"== {name}", flush=True)
            place = (args.folder or Path("imagenet-runs")) / name
            found = run_row(ROWS[name], launching(launch), place.resolve(), given, data_flags(args.data))
            before = json.loads(output.read_text())["rows"] if output.is_file() else {}
            rows = {**before, name: {"environment": environment(launch), "launch": launch, **found}}
            _report.write_json(output, {"rows": rows})
    if args.output is None:
        write_tables()


def probed(file: Path) -> dict[str, Any]:
    """What the recipes need per image; measured once."""
    if not file.is_file():
        _report.write_json(file, {recipe: probe(recipe) for recipe in ("deit_small", "deit_base")})
    return json.loads(file.read_text())


def joined(words: Sequence[str]) -> list[str]:
    """Flags and their values, each as one word."""
    found: list[str] = []
    for word in words:
        if word.startswith("--"):
            found.append(word)
        elif found and "=" not in found[-1]:
            found[-1] += f"={word}"
        else:
            raise SystemExit(f"expected a flag, found {word!r}")
    if bare := [word for word in found if "=" not in word]:
        raise SystemExit(f"expected values for {', '.join(bare)}")
    return found


if __name__ == "__main__":
    try:
        main()
    except Failed as error:
        raise SystemExit(str(error)) from None
