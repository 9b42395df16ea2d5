"""Processes of tests end, also beside ones that are killed."""

import time

from tqdm.auto import tqdm

from tests.processes import forked, until


def test_a_process_killed_in_a_progress_bar_holds_up_no_other(tmp_path):
    lock = tqdm.get_lock()

    def draw():
        lock.acquire()
        (tmp_path / "drawing").touch()
        time.sleep(60)

    with forked(draw) as killed:
        until((tmp_path / "drawing").exists, killed)
    with forked(lock.acquire) as process:
        until(lambda: False, process)
    assert process.exitcode == 0
