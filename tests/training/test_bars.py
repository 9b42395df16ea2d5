"""Bars by default, the switches that turn them off, and one process that shows them."""

import pytest
import torch.distributed as dist
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.utils import logging

from comcat_hf import compress, measure_latency
from comcat_hf.progress import progress_bar
from tests.helpers import images, small_vit


def test_every_long_call_shows_its_bars(capsys):
    model, _ = small_vit()
    compress(model, 0.3, batches=[images()])
    measure_latency(model, repeats=1)
    shown = capsys.readouterr()
    assert not shown.out
    assert all(f"{name}: 100%" in shown.err for name in ("Statistics", "Curvature", "Compressing", "Latency"))
    compress(model, 0.3, batches=[images()], progress=False)
    measure_latency(model, repeats=1, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("disable", "enable"),
    [(logging.disable_progress_bar, logging.enable_progress_bar), (disable_progress_bars, enable_progress_bars)],
)
def test_the_switches_of_the_libraries_are_heard_unless_bars_are_asked_for(disable, enable, capsys):
    disable()
    try:
        assert list(progress_bar([1, 2], desc="Silent")) == [1, 2]
        assert not capsys.readouterr().err
        assert list(progress_bar([1, 2], desc="Asked for", progress=True)) == [1, 2]
        assert "Asked for: 100%" in capsys.readouterr().err
    finally:
        enable()


def test_only_the_first_process_shows_bars(capsys):
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        assert list(progress_bar([1], progress=True)) == [1]
    finally:
        dist.destroy_process_group()
    assert not capsys.readouterr().err
