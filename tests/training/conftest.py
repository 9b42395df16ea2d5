"""What all tests of trainings need: no accelerate state of another test."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _alone():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
