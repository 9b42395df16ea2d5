"""What a GPU proves, in at most eight minutes: its tests, latency, training steps, kernels and short runs.

`benchmarks/gpu.sh` starts it. Every step is a process with a time limit of its own, and a step that fails does not
stop the others. At the end stands a table: what passed, how long it took, and its main figures; all figures go into
`results/gpu-NAME.json`, with the name of the GPU. Where there is no GPU, and with `--dry-run`, the same steps run on
the CPU at tiny sizes, to see that they start and end; nothing is written then unless `--output` names a file.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _report
import psutil
import torch


ROOT = Path(__file__).resolve().parent.parent
BUDGET = 480
CLASSES = 8
LOG = "training_log.jsonl"
CLASSIFY, DREAMBOOTH = "comcat_hf.training.classify", "comcat_hf.training.dreambooth"
TINY = ["--threads", "1", "--repeats", "1", "--warmup", "1"]


@dataclass(frozen=True)
class Step:
    """A process.

    Attributes:
        name: as it is printed.
        limit: seconds, on a GPU; a dry run has ten times as many, on a machine that may be busy.
        gpu, dry: arguments of Python on a GPU, and in a dry run, with `{folder}`, a folder that the steps share, and
            `{output}`, a JSON file.
        tell: makes the main figures, in words, of the JSON file.
        needs: a package, without which a GPU cannot run the step.
    """

    name: str
    limit: int
    gpu: Sequence[str]
    dry: Sequence[str]
    tell: Callable[[Any], str]
    needs: str | None = None


def latency(model: str) -> tuple[list[str], list[str]]:
    same = ["benchmarks/latency.py", "--mlp", "width", "--dtype", "bfloat16", "--output", "{output}"]
    real = ["--models", model, "--device", "cuda", "--batch-size", "1", "64", "256", "--repeats", "11", "--compile"]
    # Compilers take minutes on a CPU.
    tiny = ["--models", "tiny", "--batch-size", "1", "2", "--compile", "aot_eager", *TINY]
    return [*same, *real], [*same, *tiny]


def training(program: str, name: str, launch: Sequence[str], flags: Mapping[str, Any]) -> list[str]:
    """A short run; the JSON file is its log."""
    words = [f"--{key}={value}" for key, value in flags.items()]
    output = f"--output_dir={{folder}}/{name}"
    return ["-m", "accelerate.commands.launch", *launch, "-m", program, *words, output]


def classify(name: str, launch: Sequence[str], dry_launch: Sequence[str]) -> tuple[list[str], list[str]]:
    flags = {"model_name_or_path": "{folder}/vit", "train_dir": "{folder}/images/train", "reduction": 0.4}
    flags |= {"validation_dir": "{folder}/images/val", "max_train_steps": 12, "per_device_train_batch_size": 16}
    flags |= {"calibration_samples": 16, "ema_decay": 0.9, "alignment": 1.0, "logging_steps": 2, "report_to": "none"}
    short = {"max_train_steps": 4, "per_device_train_batch_size": 4, "calibration_samples": 8}
    runs = ((launch, flags), (dry_launch, flags | short))
    return tuple(training(CLASSIFY, name, how, chosen) for how, chosen in runs)


def dreambooth() -> tuple[list[str], list[str]]:
    flags = {"pretrained_model_name_or_path": "{folder}/sd", "instance_data_dir": "{folder}/photos", "resolution": 16}
    flags |= {"instance_prompt": "a sks 3", "max_train_steps": 20, "train_batch_size": 2}
    gpu = flags | {"use_8bit_adam": True, "mixed_precision": "fp16"}
    launches = ((["--num_processes=1"], gpu), (["--cpu", "--num_processes=1"], flags | {"max_train_steps": 2}))
    return tuple(training(DREAMBOOTH, "adam", how, chosen) for how, chosen in launches)


def steps() -> tuple[Step, ...]:
    """All steps, in their order; the limits add up to eight minutes."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    tests = ["-m", "pytest", "-v", "-rf", "-m", "gpu", "-p", "no:cacheprovider", *map(str, marked)]
    dtype = ["--device", "cuda", "--dtype", "bfloat16", "--output", "{output}"]
    sd15 = ["benchmarks/customize.py", "--parts", "training", "--output", "{output}"]
    flux = ["benchmarks/transformers_customize.py", "--parts", "block", "--output", "{output}"]
    widths = ["benchmarks/widths.py", "--output", "{output}"]
    bare = ["benchmarks/training.py", "--parts", "throughput", "--output", "{output}"]
    speed = ["--models", "deit-small", "--device", "cuda", "--mixed-precision", "bf16", "--batch-size", "128"]
    few = ["--models", "cifar", "--batch-size", "2", "--steps", "2", "--repeats", "1", "--threads", "1"]
    small_flux = ["--dim", "128", "--image-tokens", "16", "--text-tokens", "8", "--runs", "1", *TINY]
    fsdp2 = ["--config_file", "scripts/accelerate/fsdp2.yaml", "--num_processes=1"]
    one = ["--num_processes=1", "--mixed_precision"]
    return (
        Step("tests", 130, tests, tests, lambda found: found),
        Step("latency deit-small", 60, *latency("deit-small"), tell_latency),
        Step("latency deit-base", 75, *latency("deit-base"), tell_latency),
        Step("customize, SD 1.5 UNet", 35, [*sd15, *dtype], [*sd15, "--unet", "tiny", *TINY], tell_customize),
        Step("customize, FLUX.1 block", 35, [*flux, *dtype, "--dim", "3072"], [*flux, *small_flux], tell_flux),
        Step("widths of heads", 20, [*widths, *dtype, "--tokens", "4096", "--batch-size", "4"],
             [*widths, "--tokens", "64", *TINY], tell_widths),
        Step("fine-tuning loop", 30, [*bare, *speed], [*bare, *few], tell_loop),
        Step("inputs of the runs", 20, ["benchmarks/gpu.py", "--inputs", "{folder}"],
             ["benchmarks/gpu.py", "--inputs", "{folder}", "--dry-run"], lambda found: ""),
        Step("fp16 run", 25, *classify("fp16", [*one, "fp16"], ["--cpu", *one, "bf16"]), tell_run),
        Step("FSDP2 run, one process", 25, *classify("fsdp2", fsdp2, fsdp2), tell_run),
        Step("8-bit Adam run, fp16", 25, *dreambooth(), lambda found: "", "bitsandbytes"),
    )  # fmt: skip


def tell_latency(found: Mapping[str, Any]) -> str:
    rows = [
        f"batch {row['batch_size']} {row['way']} {row['dense_ms']:.2f} -> {row['compressed_ms']:.2f} ms"
        for row in found["rows"]
    ]
    return "; ".join(rows)


def tell_customize(found: Mapping[str, Any]) -> str:
    return f"training step / LoRA's {found['training']['ratio']:.3f}"


def tell_flux(found: Mapping[str, Any]) -> str:
    rows = (row for row in found["block"]["rows"] if row["side"] in ("full", "full, training", "core, merged"))
    return "; ".join(f"head {row['width']}, {row['side']} / {row['beside']} {row['ratio']:.3f}" for row in rows)


def tell_widths(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{row['width']} {row['kernel']} {row['ms']:.2f} ms" for row in found["rows"])


def tell_loop(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{row['model']} {row['ratio']:.3f} of a bare loop's speed" for row in found["rows"])


def tell_run(found: Sequence[Mapping[str, Any]]) -> str:
    losses = [line["loss"] for line in found if "loss" in line]
    return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""


def run(step: Step, arguments: Sequence[str], limit: float, folder: Path) -> dict[str, Any]:
    """Run a step to its end or its limit, with all processes that it starts."""
    output = folder / f"{step.name.replace(' ', '-')}.json"
    words = [word.format(folder=folder, output=output) for word in arguments]
    log, began = output.with_suffix(".log"), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as file:
        how = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment}
        process = psutil.Popen([sys.executable, *words], **how)
        try:
            code = process.wait(limit)
            status = "passed" if code == 0 else f"failed ({code})"
        except psutil.TimeoutExpired:
            status = f"over {limit:.0f} s"
            # Launchers start their processes in sessions of their own.
            for one in (*process.children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
    text = log.read_text(errors="replace")
    print(text if status == "passed" else text[-6000:], flush=True)
    found = results(step, output, folder, text)
    told = ""
    # Of a step that ended early there may be less than all.
    with suppress(KeyError, TypeError, IndexError):
        told = step.tell(found) if found is not None else ""
    return {"status": status, "seconds": time.perf_counter() - began, "told": told, "result": found}


def results(step: Step, output: Path, folder: Path, text: str) -> Any:
    """The figures of a step: its JSON file, the log of a run, or pytest's last line."""
    if output.is_file():
        return json.loads(output.read_text())
    log = folder / step.name.split()[0].lower() / LOG
    if log.is_file():
        return [json.loads(line) for line in log.read_text().splitlines()]
    counts = re.findall(r"^=+ (.*\d+ (?:passed|skipped|failed).*) in .* =+$", text, re.MULTILINE)
    if not counts and " PASSED" in text:
        return f"{text.count(' PASSED')} passed and {text.count(' FAILED')} failed before it was stopped"
    return counts[-1] if counts else None


def make_inputs(folder: Path, dry: bool) -> None:
    """A ViT with images of its classes, and a Stable Diffusion with photos of a subject."""
    from imagenet import class_names, make_images, make_model

    sys.path.append(str(ROOT))
    from tests.customization.pipelines import WIDTH, tiny_sd, tiny_unet, write_digits

    names = list(class_names(CLASSES))
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    tiny = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 96, "num_hidden_layers": 2}
    make_images(folder / "images", names, 16)
    make_model(folder / "vit", names, **(tiny | {"image_size": 32, "patch_size": 16} if dry else sizes))
    write_digits(folder / "photos")
    tiny_sd(folder / "sd")
    if not dry:
        # Factors of 4,096 numbers and more, which 8-bit Adam keeps in 8 bits.
        wide = {"block_out_channels": (320, 640), "attention_head_dim": 8, "norm_num_groups": 32}
        tiny_unet(cross_attention_dim=WIDTH, **wide).save_pretrained(folder / "sd" / "unet")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny sizes; so it is without a GPU")
    parser.add_argument("--only", nargs="+", help="steps by the beginnings of their names")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--inputs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dry = args.dry_run or not torch.cuda.is_available()
    if args.inputs:
        make_inputs(args.inputs, dry)
        return 0
    device = "cpu" if dry else "cuda"
    environment = _report.environment(device)
    chosen = [step for step in steps() if not args.only or step.name.startswith(tuple(args.only))]
    if dry:
        # At tiny sizes some are the same.
        chosen = list({tuple(step.dry): step for step in reversed(chosen)}.values())[::-1]
    found = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for step in chosen:
            print(f"\n== {step.name}", flush=True)
            if not dry and step.needs and importlib.util.find_spec(step.needs) is None:
                found[step.name] = {"status": f"skipped: pip install {step.needs}", "seconds": 0.0, "told": ""}
                continue
            arguments, limit = (step.dry, 10 * step.limit) if dry else (step.gpu, step.limit)
            found[step.name] = run(step, arguments, limit, Path(folder))
    _report.print_table(
        [[name, one["status"], f"{one['seconds']:.0f}", one["told"]] for name, one in found.items()],
        ["step", "status", "seconds", "figures"],
    )
    passed = sum(one["status"] == "passed" for one in found.values())
    spent = sum(one["seconds"] for one in found.values())
    where = "A DRY RUN: no GPU was used, and the figures mean nothing" if dry else f"On {environment['device']}"
    print(f"{where}. {passed} of {len(found)} steps passed in {spent:.0f} s.")
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
    output = args.output or (None if dry else ROOT / "benchmarks" / "results" / f"gpu-{slug}.json")
    if output:
        _report.write_json(output, {"environment": environment, "dry_run": dry, "steps": found})
        print(f"The figures are in {output}.")
    return 0 if passed == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
