"""Timing calls side by side: their order, how often each is called, and when the rounds end."""

import torch

from comcat_hf.compression.clock import for_seconds, in_turns


CPU = torch.device("cpu")


def test_calls_take_turns_there_and_back():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    taken = in_turns(calls, CPU, range(3), times={"a": 1, "b": 2, "c": 1}, warm_up=1)
    assert "".join(called) == "abc" + "cbba" + "abbc" + "cbba"
    assert list(taken) == ["a", "b", "c"] and all(len(seconds) == 3 for seconds in taken.values())
    assert all(second > 0 for seconds in taken.values() for second in seconds)


def test_rounds_last_as_long_as_asked_within_their_numbers():
    assert list(for_seconds(0, 3, 100)) == [0, 1, 2]
    assert list(for_seconds(60, 3, 5)) == [0, 1, 2, 3, 4]
