"""Accuracy against reduction on CIFAR-10 after fine-tuning: ours, the paper's recipe, the dense model trained further.

`--data`, or COMCAT_DATA, names a folder with `vit-cifar10` (a classifier of transformers) and
`cifar10/{train,validation}.parquet`. At every reduction, of the whole model's parameters:

- *ours*: sizes by curvature, MLPs by width, statistics and compensation, soft distillation from the dense model, a
  moving average of the weights;
- *the paper's*: ranks by the differentiable search, factors from the weights alone, hard distillation from the dense
  model with alignment. Fine-tuned for as many steps with the same batch, learning rate and augmentation.

Both run through `compress_vit`, as scripts/compress_vit.py does. Beside them the dense model, trained further by the
same loop with the same augmentation and moving average: for as many steps, and for as long as our longest run took,
choosing and fitting included. A seed decides over the calibration images, the order, the augmentation and the search.
The claim: at a reduction of 0.5 ours loses at most one point against the dense model trained further, in the mean over
the seeds. A run that its output file holds already is not repeated.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import _report
import torch
from accelerate import Accelerator

from comcat_hf.training.classify.augmentation import ImagePreparation, Mixing
from comcat_hf.training.classify.data import BrokenImages, open_splits
from comcat_hf.training.classify.evaluation import evaluate_classifier
from comcat_hf.training.classify.loop import TrainRun, finetune_model
from comcat_hf.training.classify.models import load_classifier, load_image_processor
from comcat_hf.training.classify.routes import Student
from comcat_hf.training.classify.run import compress_vit
from comcat_hf.training.classify.settings import CompressSettings
from comcat_hf.training.classify.stream import ImageReader
from comcat_hf.training.interruption import Interruption


DATA = "COMCAT_DATA"
POINTS = 0.01
CLAIMED = 0.5
# Further steps of the dense model are not worth a run of their own below this.
WORTH = 1.1

OURS = {
    "strategy": "curvature",
    "mlp": "width",
    "compensate": True,
    "calibration_samples": 512,
    "distillation_type": "soft",
    "distillation_alpha": 0.5,
    "ema_decay": 0.99,
}
PAPER = {
    "strategy": "search",
    "mlp": "rank",
    "weights_only": True,
    "search_share": 0.1,
    "search_beta": 1.5,
    "distillation_type": "hard",
    "distillation_alpha": 0.5,
    "distillation_without_token": True,
    "alignment": 1.0,
}
METHODS = {"ours": OURS, "paper": PAPER}


def shared(args: argparse.Namespace, folder: Path, seed: int) -> CompressSettings:
    """What all runs have in common."""
    return CompressSettings(
        model_name_or_path=str(args.data / "vit-cifar10"),
        train_file=str(args.data / "cifar10" / "train.parquet"),
        validation_file=str(args.data / "cifar10" / "validation.parquet"),
        output_dir=str(folder),
        cache_dir=str(args.cache) if args.cache else None,
        seed=seed,
        max_train_steps=args.steps,
        max_train_samples=args.train_samples,
        max_eval_samples=args.eval_samples,
        search_epochs=args.search_epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=250,
        learning_rate=args.learning_rate,
        warmup_ratio=0.05,
        random_resized_crop_scale=args.crop_scale,
        horizontal_flip=0.5,
        mixed_precision="no" if args.device == "cpu" else args.mixed_precision,
        dataloader_num_workers=args.workers,
        checkpointing_steps="none",
        eval_steps="none",
        report_to="none",
    )


def compressed(args: argparse.Namespace, seed: int, method: str, reduction: float) -> dict[str, Any]:
    """One run of one method."""
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(shared(args, Path(folder) / "out", seed), reduction=reduction, **METHODS[method])
        start = time.perf_counter()
        result = compress_vit(settings, report=args.say)
        seconds = time.perf_counter() - start
    if result.interrupted:
        raise SystemExit(f"Stopped by {result.interrupted}.")
    parameters = dict(zip(("dense", "small"), result.plan.parameters, strict=True))
    accuracy = {name: found["top1"] for name, found in result.metrics.items()}
    row = {"method": method, "reduction": reduction, "seed": seed, "accuracy": accuracy}
    row |= {"seconds": seconds, "steps": result.step}
    return row | {"parameters": parameters, "removed": 1 - parameters["small"] / parameters["dense"]}


def dense_further(args: argparse.Namespace, seed: int, method: str, steps: int) -> dict[str, Any]:
    """The dense model trained on for some steps by the same loop, without a teacher."""
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(
            shared(args, Path(folder), seed),
            max_train_steps=steps,
            distillation_type="none",
            ema_decay=OURS["ema_decay"],
            stages="finetune,evaluate",
        )
        accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=settings.mixed_precision)
        start = time.perf_counter()
        model = load_classifier(settings.model_name_or_path, "--data")
        splits = open_splits(settings, model.config, seed)
        preparation = ImagePreparation.of(settings, load_image_processor(settings))
        mixing, broken = Mixing(settings, model.config.num_labels), BrokenImages.of(settings, splits.train)
        reader = ImageReader(splits.train, preparation, settings, broken, seed)

        def evaluate() -> float:
            valid = BrokenImages.of(settings, splits.validation)
            held = ImageReader(splits.validation, preparation, settings, valid).evaluate()
            return evaluate_classifier(model, held, accelerator, progress="Evaluating dense")["top1"]

        before = evaluate()
        with Interruption() as interruption:
            result = finetune_model(
                TrainRun(
                    settings=settings,
                    accelerator=accelerator,
                    student=Student(model=model, teacher=None),
                    seed=seed,
                    plan="dense",
                    batches=partial(reader.train, mixing),
                    steps=steps,
                    steps_per_epoch=min(reader.batches_per_epoch, steps),
                    evaluate=None,
                    interruption=interruption,
                    say=args.say,
                    checkpoint=None,
                )
            )
        if result.interrupted:
            raise SystemExit(f"Stopped by {result.interrupted}.")
        seconds = time.perf_counter() - start
        row = {"method": method, "reduction": 0.0, "seed": seed, "seconds": seconds, "steps": steps}
        return row | {"accuracy": {"dense": before, "initial": before, "final": evaluate()}}


class Runs:
    """All runs, in the output file as soon as they are done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, args.output
        hidden = ("output", "data", "cache", "say", "verbose", "seeds", "reductions", "methods")
        self.settings = {key: value for key, value in vars(args).items() if key not in hidden}
        found = json.loads(self.output.read_text()) if self.output and self.output.exists() else {"rows": []}
        if found["rows"] and found["settings"] != self.settings:
            raise SystemExit(f"{self.output} holds runs with other settings; choose another --output.")
        self.rows: list[dict[str, Any]] = found["rows"]

    def row(self, seed: int, method: str, reduction: float, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for row in self.rows:
            if (row["seed"], row["method"], row["reduction"]) == (seed, method, reduction):
                return row
        self.rows.append(run())
        if self.output:
            found = {"environment": _report.environment(), "settings": self.settings, "rows": self.rows}
            _report.write_json(self.output, found | {"claim": conclude(self.rows)})
        return self.rows[-1]

    def run(self) -> None:
        args = self.args
        for seed in args.seeds:
            own = [
                self.row(seed, method, reduction, partial(compressed, args, seed, method, reduction))
                for reduction in args.reductions
                for method in args.methods
            ]
            longest = max((row["seconds"] for row in own if row["method"] == "ours"), default=0.0)
            name = "dense, as many steps"
            same = self.row(seed, name, 0.0, partial(dense_further, args, seed, name, args.steps))
            if longest > WORTH * same["seconds"]:
                name, steps = "dense, as long", round(args.steps * longest / same["seconds"])
                self.row(seed, name, 0.0, partial(dense_further, args, seed, name, steps))


def of_seeds(rows: Iterable[dict[str, Any]], method: str, reduction: float) -> list[dict[str, Any]]:
    return [row for row in rows if (row["method"], row["reduction"]) == (method, reduction)]


def accuracies(rows: Iterable[dict[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds and the standard error of that mean; of one seed none is known."""
    found = [row["accuracy"][name] for row in rows]
    return statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")


def conclude(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim: what ours loses at the reduction in question, against the better of the dense models trained on."""
    ours = of_seeds(rows, "ours", CLAIMED)
    dense = [found for name in ("as many steps", "as long") if (found := of_seeds(rows, f"dense, {name}", 0.0))]
    if not ours or not dense:
        return {}
    lost = max(accuracies(found, "final")[0] for found in dense) - accuracies(ours, "final")[0]
    seconds = statistics.mean(row["seconds"] for row in ours)
    return {"reduction": CLAIMED, "seeds": len(ours), "lost": lost, "seconds": seconds, "holds": lost <= POINTS}


def show(rows: list[dict[str, Any]]) -> None:
    table = []
    for method, reduction in dict.fromkeys((row["method"], row["reduction"]) for row in rows):
        found = of_seeds(rows, method, reduction)
        size = f"{found[0]['parameters']['small']:,}" if "parameters" in found[0] else ""
        cells = [f"{100 * mean:.2f} ± {100 * error:.2f}" for mean, error in
                 (accuracies(found, name) for name in ("initial", "final"))]  # fmt: skip
        seconds = statistics.mean(row["seconds"] for row in found)
        table.append([f"{reduction:.0%}", method, size, *cells, f"{seconds:.0f}", str(len(found))])
    head = ["removed", "method", "parameters", "before training", "after", "seconds", "seeds"]
    _report.print_table(sorted(table), head)
    if claim := conclude(rows):
        print(
            f"At {claim['reduction']:.0%} ours loses {100 * claim['lost']:+.2f} points against the dense model "
            f"that was trained further, in {claim['seconds'] / 60:.1f} minutes; "
            f"at most {100 * POINTS:.0f}: {claim['holds']}"
        )


def find_data(given: Path | None) -> Path | None:
    folder = given or (Path(os.environ[DATA]) if os.environ.get(DATA) else None)
    if folder is None:
        print(f"Left out: no folder with vit-cifar10 and cifar10 was given, by --data or {DATA}.")
        return None
    for name in ("vit-cifar10", "cifar10/train.parquet", "cifar10/validation.parquet"):
        if not (folder / name).exists():
            raise SystemExit(f"{folder / name} does not exist.")
    return folder.resolve()


def say(text: str) -> None:
    print(text, flush=True)


def quiet(text: str) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with vit-cifar10 and cifar10")
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--crop-scale", type=float, default=0.5, help="least share of the area that is cropped")
    parser.add_argument("--search-epochs", type=int, default=3)
    parser.add_argument("--train-samples", type=int)
    parser.add_argument("--eval-samples", type=int)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="bf16", help="on a GPU")
    parser.add_argument("--cache", type=Path, help="where `datasets` keeps what it read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print what the runs say")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.data = find_data(args.data)
    if args.data is None:
        return
    report: Callable[[str], None] = say if args.verbose else quiet
    args.say = report
    runs = Runs(args)
    runs.run()
    show(runs.rows)


if __name__ == "__main__":
    main()
