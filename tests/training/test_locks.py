"""A folder that one run at a time writes to, with real processes."""

import multiprocessing
import os
import signal
import socket
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from comcat_hf.errors import InvalidValueError
from comcat_hf.training.locks import locked
from tests.processes import PATIENCE, forked


def hold(folder: Path, pipe: Connection) -> None:
    with locked(folder, "output_dir"):
        # As the workers of a loader, which may outlive it for a while.
        if worker := os.fork():
            pipe.send(worker)
        time.sleep(60)


def test_it_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "a" / "b", tmp_path / "there"):
        with locked(folder, "output_dir"):
            assert folder.is_dir()
            with pytest.raises(InvalidValueError, match=f"process {os.getpid()} on {socket.gethostname()}"):
                locked(folder, "output_dir").__enter__()
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    with locked(tmp_path / "a", "output_dir"):
        (tmp_path / "a" / "model").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


def test_another_process_is_named_and_its_lock_gone_when_it_was_killed(tmp_path: Path):
    ours, theirs = multiprocessing.Pipe()
    with forked(hold, tmp_path, theirs) as holder:
        assert ours.poll(PATIENCE)
        worker = ours.recv()
        try:
            wanted = rf"--output_dir {tmp_path}: expected a folder that no other run .* process {holder.pid} on "
            with pytest.raises(InvalidValueError, match=wanted):
                locked(tmp_path, "output_dir").__enter__()
            holder.kill()
            # Not join(), which waits for the worker, too: it holds the other end of the pipe.
            os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
            with locked(tmp_path, "output_dir"):
                pass
            assert not list(tmp_path.iterdir())
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValueError, match=r"--output_dir .*file/out: expected a folder that can be written to"):
        locked(tmp_path / "file" / "out", "output_dir").__enter__()
