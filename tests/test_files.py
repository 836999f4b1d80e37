"""Writing files: what the disk refuses, who may read them, and one writer at a time."""

from __future__ import annotations

import os
import resource
import signal
import stat
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from veneer.errors import RunError
from veneer.files import LOCK, claimed, new_directory, write_text


@contextmanager
def largest_file(size: int):
    """No file may grow beyond `size` bytes in this process: a full disk that needs no privileges."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_under_safetensors_is_a_run_error_and_keeps_what_was_there(tmp_path):
    with new_directory(tmp_path / "a") as folder:
        (folder / "old").write_text("old")
    with largest_file(1000), pytest.raises(RunError, match="a: File too large; what was there before is kept"):
        with new_directory(tmp_path / "a") as folder:
            save_file({"x": torch.zeros(5000)}, folder / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and [p.name for p in (tmp_path / "a").iterdir()] == ["old"]


def test_a_full_disk_under_write_text(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with largest_file(1000), pytest.raises(RunError, match="a.txt: File too large"):
        write_text(tmp_path / "a.txt", "x" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_other_errors_inside_stay_what_they_are(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with new_directory(tmp_path / "a"):
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_tensors_are_as_readable_as_the_other_files(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with new_directory(tmp_path / "a") as folder:
            save_file({"x": torch.zeros(5)}, folder / "x.safetensors")
            (folder / "x.json").write_text("{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "a").iterdir()} == {mode}


def test_a_directory_has_one_writer_at_a_time(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(RunError, match="another process is writing .*run"):
            with claimed(tmp_path / "run"):
                pass
        assert (tmp_path / "run" / LOCK).exists()
    with claimed(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="Not a directory"):
        with claimed(tmp_path / "file" / "run"):
            pass
