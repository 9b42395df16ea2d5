"""What is left out of a request is decided by the data that there is."""

import pytest

from comcat_hf import allocate_ranks, collect_statistics, compress, measure_sensitivities, plan_of
from comcat_hf.compression.request import Request
from comcat_hf.errors import InvalidValueError
from tests.helpers import small_vit


@pytest.mark.parametrize(
    ("given", "strategy", "mlp", "compensate", "gathers", "weighs"),
    [
        ({}, "uniform", "rank", False, False, False),
        ({"batches": True}, "curvature", "width", True, True, True),
        ({"batches": True, "statistics": True}, "curvature", "width", True, False, True),
        ({"batches": True, "sensitivities": True}, "sensitivity", "width", True, True, False),
        ({"batches": True, "strategy": "uniform"}, "uniform", "width", True, False, False),
        ({"batches": True, "strategy": "uniform", "compensate": False}, "uniform", "width", False, True, False),
        ({"batches": True, "weights_only": True}, "curvature", "rank", False, True, False),
        ({"batches": True, "strategy": "search"}, "search", "rank", True, False, False),
        ({"statistics": True}, "uniform", "width", False, False, False),
        ({"statistics": True, "curvature": True}, "curvature", "width", False, False, False),
        ({"statistics": True, "sensitivities": True}, "sensitivity", "width", False, False, False),
        ({"sensitivities": True}, "uniform", "rank", False, False, False),
        ({"batches": True, "strategy": "spectrum", "mlp": "mixed"}, "spectrum", "mixed", True, True, False),
    ],
)
def test_defaults(given, strategy, mlp, compensate, gathers, weighs):
    request = Request(**given)
    assert (request.strategy, request.mlp, request.compensate) == (strategy, mlp, compensate)
    assert request.gathers(planned=False) is gathers
    assert request.weighs(planned=False) is weighs
    # Factors of given ranks are fitted to the curvature wherever there is data.
    assert request.weighs(planned=True) is (request.batches and not request.weights_only)


def test_compensation_needs_batches():
    with pytest.raises(InvalidValueError, match="give batches"):
        Request(statistics=True, compensate=True)


def test_all_entry_points_decide_alike():
    model, inputs = small_vit()
    statistics = collect_statistics(model, [inputs])
    data = {"statistics": statistics, "sensitivities": measure_sensitivities(model, [inputs], statistics=statistics)}
    plan = allocate_ranks(model, 0.4, **data)
    assert plan.strategy == "sensitivity"
    assert plan_of(compress(model, 0.4, **data)) == plan
