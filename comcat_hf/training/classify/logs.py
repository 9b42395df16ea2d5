"""What a fine-tuning tells: losses kept as tensors until they are asked for, and a log of JSON lines."""

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ...checks import parse_json, whole
from ...compression.distillation import LossParts
from ...errors import CheckpointError, ComCATError
from ...hub import write_text_atomic


__all__ = ["LOG", "LossMeter", "cannot_write", "read_log", "write_log"]

LOG = "training_log.jsonl"
_PARTS = tuple(field.name for field in fields(LossParts))
# What the log calls them.
_NAMES = {"total": "loss"}


class LossMeter:
    """The losses since they were read last, per batch of this process; nothing waits for the device before that.

    Args:
        batches: of one optimizer step.
    """

    def __init__(self, accelerator: Accelerator, batches: int) -> None:
        self._accelerator, self._batches = accelerator, batches
        self._seen: list[Tensor] = []
        self._before: Tensor | None = None
        self._images, self._since = 0, time.perf_counter()

    def add(self, parts: LossParts, images: int) -> None:
        """Note a batch: its losses, and how many images this process had in it."""
        self._seen.append(torch.stack([getattr(parts, name).detach() for name in _PARTS]))
        self._images += images

    def restart_clock(self) -> None:
        """Begin to count images per second anew, behind something that is no training."""
        self._images, self._since = 0, time.perf_counter()

    def check(self, step: int) -> None:
        """See that all losses are finite; all processes call it together.

        Raises:
            ComCATError: one is not; on all processes.
        """
        # By process means: what is not finite on one is then not finite on all.
        rows = self._rows()
        if rows is None or bool((finite := rows.isfinite().all(dim=1)).all()):
            return
        first = int(finite.int().argmin())
        since_first = -(-(len(rows) - first) // self._batches)
        raise ComCATError(
            f"The loss of step {step - since_first + 1} is not finite. Take a lower learning_rate, or full "
            "precision or bf16 if it was fp16; the last checkpoint is as it was."
        )

    def read(self, step: int) -> dict[str, float]:
        """The mean losses over all processes since they were read last, and images per second since the clock began.

        Raises:
            ComCATError: a loss is not finite.
        """
        self.check(step)
        means = self._before.mean(dim=0).tolist()
        seconds = max(time.perf_counter() - self._since, 1e-9)
        speed = self._images * self._accelerator.num_processes / seconds
        self._before = None
        self.restart_clock()
        found = {_NAMES.get(name, name): mean for name, mean in zip(_PARTS, means, strict=True)}
        return found | ({"images_per_second": speed} if speed else {})

    def state_dict(self) -> dict[str, Tensor]:
        """The losses that were not read yet, as [`check`] left them."""
        return {} if self._before is None else {"losses": self._before}

    def load_state_dict(self, content: Mapping[str, Tensor]) -> None:
        self._seen = []
        losses = content.get("losses")
        self._before = None if losses is None else losses.to(self._accelerator.device)

    def _rows(self) -> Tensor | None:
        """Losses per batch since they were read last, means over the processes; `(batches, parts)`."""
        if self._seen:
            rows = self._accelerator.reduce(torch.stack(self._seen).float(), reduction="mean")
            self._before = rows if self._before is None else torch.cat([self._before, rows])
            self._seen = []
        return self._before


def read_log(path: Path, step: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a log up to a step, without those that were cut short."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return [line for text in lines if (line := _parse(text)) and line["step"] <= step]


def write_log(path: Path, lines: Iterable[Mapping[str, Any]], *, append: bool) -> None:
    """Write lines of JSON, or append them.

    Raises:
        ComCATError: the file cannot be written.
    """
    text = "".join(map(_text, lines))
    try:
        if append:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_text_atomic(path, text)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> ComCATError:
    """The error that says that a file or folder of a training cannot be written."""
    reason = getattr(error, "strerror", None) or error
    return ComCATError(
        f"{path}: expected to write there, found that it cannot be done ({reason}). Free or allow "
        "the space and go on with --resume_from_checkpoint latest; finished checkpoints are as they were."
    )


def _text(values: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite) + "\n"


def _parse(text: str) -> dict[str, Any] | None:
    """A line of the log; `None` for one that was cut short."""
    try:
        line = parse_json(text, LOG)
    except CheckpointError:
        return None
    return line if isinstance(line, dict) and whole().holds(line.get("step")) else None
