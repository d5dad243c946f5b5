"""Kernels: who runs, and that all of them compute the same bits."""

from __future__ import annotations

import subprocess
import sys

from swarmtrain_protocols.codecs import kernels, kernels_numpy, use_numba, uses_numba

SCRIPT = """
import sys
from swarmtrain_protocols import codecs, outer, overlap, state
assert "numba" not in sys.modules and not codecs.uses_numba()
codecs.use_numba(True)
assert "numba" in sys.modules and codecs.uses_numba()
codecs.use_numba(False)
assert not codecs.uses_numba()
print("ok")
"""


def test_numba_is_not_imported_before_it_is_asked_for() -> None:
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": path, "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_the_choice_is_explicit_and_reversible() -> None:
    assert kernels.active() is kernels_numpy
    use_numba(True)
    assert uses_numba()
    assert kernels.active().__name__.endswith("kernels_numba")  # type: ignore[attr-defined]
    use_numba(False)
    assert kernels.active() is kernels_numpy
