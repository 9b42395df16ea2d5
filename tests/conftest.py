"""Settings that must stand before the first import, and a fixed seed for every test."""

import gc
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests run side by side, and what a process computes is compared to the bit with what a launched one does.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tqdm.std import TqdmDefaultWriteLock


# Processes forked from one share this lock, which one that is killed in a progress bar would hold for ever.
TqdmDefaultWriteLock.mp_lock = None


def pytest_collection_finish():
    """What imports made stays: accelerate's trainings collect garbage often, and would walk all of it each time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests of what a GPU alone has are marked so, that benchmarks/gpu.sh finds them."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
