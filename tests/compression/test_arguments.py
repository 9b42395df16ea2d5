"""An argument that cannot be meant gives one InvalidValueError that names it, in every function that takes it."""

import math

import pytest
import torch

from comcat_hf import (
    allocate_ranks,
    collect_statistics,
    compress,
    measure_latency,
    measure_sensitivities,
    refine,
    search_ranks,
)
from comcat_hf.compression.distillation import DistillationLoss
from comcat_hf.compression.finetuning import finetune
from comcat_hf.errors import InvalidValueError
from tests.helpers import images, small_deit, small_vit


NO_NUMBERS = (math.nan, math.inf, "1", [1])
FROM_ZERO = (*NO_NUMBERS, None, -1, True)
ABOVE_ZERO = (*FROM_ZERO, 0)
FROM_ONE = (*ABOVE_ZERO, 1.5)
SHARE = (*ABOVE_ZERO, 1)


def but_none(values):
    return tuple(value for value in values if value is not None)


WRONG = {
    "refine": {
        "steps": FROM_ONE,
        "batch_size": FROM_ONE,
        "learning_rate": but_none(ABOVE_ZERO),
        "seed": FROM_ZERO,
        "batches": (3, "images"),
    },
    "finetune": {
        "epochs": FROM_ONE,
        "learning_rate": ABOVE_ZERO,
        "weight_decay": FROM_ZERO,
        "warmup": (*FROM_ZERO, 1.1),
        "max_norm": (math.nan, -math.inf, "1", [1], None, -1, 0),
    },
    "distillation": {
        "alpha": (*FROM_ZERO, 1.1),
        "temperature": ABOVE_ZERO,
        "alignment": FROM_ZERO,
        "blocks": FROM_ONE,
    },
    "search": {
        "reduction": SHARE,
        "steps": but_none(FROM_ONE),
        "step": but_none(FROM_ONE),
        "beta": FROM_ZERO,
        "learning_rate": ABOVE_ZERO,
        "weight_decay": FROM_ZERO,
        "temperature": (*ABOVE_ZERO, (1.0,), (1.0, 0.0), (1.0, math.nan)),
        "seed": FROM_ZERO,
        "statistics": ("folder", {}),
        "scope": ("all", ["mlp"]),
    },
    "allocate": {
        "reduction": SHARE,
        "step": but_none(FROM_ONE),
        "statistics": ("folder", {}),
        "sensitivities": ("folder", 0.1),
        "strategy": ("best", ["uniform"]),
        "metric": ("joules", ["params"]),
        "scope": ("all", ["mlp"]),
    },
    "compress": {
        "reduction": but_none(SHARE),
        "refine": FROM_ZERO,
        "statistics": ("folder", {}),
        "sensitivities": ("folder", 0.1),
        "batches": (3, "images"),
        "elastic": (*but_none(ABOVE_ZERO), (0.3,), (0.7, 0.3), (0.3, "1")),
    },
    "elastic": {"statistics": ("folder", {})},
    "statistics": {"batches": (3, "images")},
    "sensitivities": {"step": but_none(FROM_ONE), "statistics": ("folder", {}), "batches": (3, "images")},
    "latency": {"batch_size": FROM_ONE, "repeats": FROM_ONE, "step": but_none(FROM_ONE)},
}


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    (dense, _), (small, _) = small_vit(), small_vit()
    small = compress(small, 0.4)
    batch = {"pixel_values": images(4), "labels": torch.zeros(4, dtype=torch.int64)}
    schedule = {"epochs": 1, "learning_rate": 1e-4}
    return {
        "refine": (refine, {"model": small, "dense": dense, "batches": [images(4)], "steps": 1}),
        "finetune": (finetune, {"student": small, "teacher": dense, "loader": [batch], **schedule}),
        "distillation": (DistillationLoss, {}),
        "search": (search_ranks, {"model": dense, "loader": [batch], "reduction": 0.4, "steps": 1}),
        "allocate": (allocate_ranks, {"model": dense, "reduction": 0.4}),
        "compress": (compress, {"model": dense, "reduction": 0.4, "batches": [images(4)]}),
        "elastic": (compress, {"model": dense, "elastic": (0.3, 0.5)}),
        "statistics": (collect_statistics, {"model": dense}),
        "sensitivities": (measure_sensitivities, {"model": dense, "batches": [images(4)]}),
        "latency": (measure_latency, {"model": dense, "inputs": {"pixel_values": images(1)}, "repeats": 1}),
    }


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (function, name, value)
        for function, names in WRONG.items()
        for name, values in names.items()
        for value in values
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_meant_is_named(calls, function, name, value):
    call, good = calls[function]
    with pytest.raises(InvalidValueError, match=name):
        call(**(good | {name: value}))


def test_sensitivities_are_not_measured_by_the_statistics_of_another_model():
    statistics = collect_statistics(small_deit()[0], [images(2)])
    with pytest.raises(InvalidValueError, match=r"gathered on .*DeiT"):
        measure_sensitivities(small_vit()[0], [images(2)], statistics=statistics)
