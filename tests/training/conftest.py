"""What all tests of trainings need: no accelerate state of another test, and a tracker."""

import pytest
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker


@pytest.fixture(autouse=True)
def _alone():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Recorder(GeneralTracker):
    """Keeps what a tracker is told."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged, self.images = [], []

    @property
    def tracker(self):
        return None

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((values, step))

    def log_images(self, values, step=None, **kwargs):
        self.images.append((values, step))
