"""Signals that end a run, in this process."""

import os
import signal
import time

import pytest
from accelerate import Accelerator

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.interruption import Interrupted, Interruption, on_main, until_stopped


SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def alone():
    return Accelerator(cpu=True)


@pytest.mark.parametrize("name", SIGNALS)
def test_noted_or_at_once(name):
    before = signal.getsignal(SIGNALS[name])
    with Interruption() as interruption:
        send(SIGNALS[name])
        time.sleep(0.001)
        assert interruption.requested == name
        with pytest.raises(Interrupted, match=name), interruption.at_once():
            pytest.fail("one had come before")
    assert signal.getsignal(SIGNALS[name]) == before
    start = time.monotonic()
    with Interruption() as interruption, pytest.raises(Interrupted, match=name), interruption.at_once():
        send(SIGNALS[name])
        time.sleep(5)
    assert time.monotonic() - start < 4


def test_a_second_ctrl_c_ends_everything():
    with Interruption() as interruption, pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert interruption.requested == "SIGINT"
        send(signal.SIGINT)
        time.sleep(1)


def test_items_end_at_the_next(alone):
    seen = []
    with Interruption() as interruption, pytest.raises(Interrupted, match="SIGTERM"):
        for item in until_stopped(range(5), alone, interruption):
            seen.append(item)
            if item == 1:
                send(signal.SIGTERM)
    assert seen == [0, 1]


def test_work_on_the_main_process(alone):
    with Interruption() as interruption:
        assert on_main(alone, lambda: 3, interruption) == 3
        with pytest.raises(InvalidValueError, match="no"):
            on_main(alone, lambda: (_ for _ in ()).throw(InvalidValueError("no")))
        with pytest.raises(Interrupted, match="SIGTERM"):
            on_main(alone, lambda: (send(signal.SIGTERM), time.sleep(1)), interruption)
        # What is short is carried through, such as writing what was made.
        assert on_main(alone, lambda: 4) == 4
