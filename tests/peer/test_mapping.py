"""Mapped files: their bytes, for as long as somebody looks, and no descriptor for each."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from swarmtrain_peer.mapping import map_readonly
from swarmtrain_peer.storeformat import map_file

DATA = bytes(range(256)) * 33


def mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_hundreds_of_mappings_hold_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    before = len(os.listdir("/proc/self/fd"))
    views = [map_file(path) for _ in range(300)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(view == DATA and view.readonly for view in views)


def test_a_mapping_lives_as_long_as_a_view_of_it_and_outlives_the_name(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    whole = map_file(path)
    piece = np.frombuffer(whole[256:512], np.uint8)
    path.rename(tmp_path / "other")
    (tmp_path / "other").unlink()
    del whole
    gc.collect()
    assert piece.tobytes() == DATA[256:512]
    assert mapped(tmp_path)
    del piece
    gc.collect()
    assert not mapped(tmp_path)


def test_an_empty_file_and_a_bad_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert map_file(path) == b""
    path.write_bytes(DATA)
    handle = os.open(path, os.O_WRONLY)  # a mapping is read
    try:
        with pytest.raises(OSError):
            map_readonly(handle)
    finally:
        os.close(handle)
