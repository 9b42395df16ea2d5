"""Settings that must stand before the first import, and a fixed seed for every test."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


# Under xdist the processes share the cores: one thread each is faster than all of them in each.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
