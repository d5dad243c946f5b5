"""Error feedback: what encoding lost is added to the next contribution (Seide et al. 2014).

The residual moves only when a contribution was in a committed round. Until the outcome is known it
is staged; an abort or an exclusion restores the old one, since the contribution is re-queued whole.
"""

from __future__ import annotations

import numpy as np

from swarmtrain_protocols.codecs.base import F32, U8, Codec
from swarmtrain_protocols.errors import LocalProtocolError


class ErrorFeedback:
    """The residual of one channel of ``values`` values; two fp32 buffers of that length.

    One contribution is staged at a time: ``begin``, ``encode`` for each chunk, and then ``commit``
    or ``rollback``.
    """

    def __init__(self, values: int) -> None:
        self.residual: F32 = np.zeros(values, np.float32)
        self._staged: F32 = np.zeros(values, np.float32)
        self._open = False

    def begin(self) -> None:
        """Start staging a contribution.

        Raises:
            LocalProtocolError: another one is still undecided.
        """
        if self._open:
            raise LocalProtocolError("a contribution is already staged", "its round is undecided")
        self._open = True
        self._staged[:] = self.residual

    def encode(self, start: int, x: F32, codec: Codec, out: memoryview | bytearray | U8) -> None:
        """Encode ``x + residual`` for values ``start …`` (f32[k]) and stage what that loses.

        ``x`` is not written. Chunks may be encoded in any order, and from several threads.
        """
        if not self._open:
            raise LocalProtocolError("no contribution is staged", "begin() was not called")
        part = slice(start, start + x.size)
        staged = self._staged[part]
        np.add(x, self.residual[part], out=staged)
        codec.encode(staged, out)
        codec.decode_accumulate(out, np.float32(-1.0), staged)

    def commit(self) -> None:
        """The contribution was in a committed round: the staged residual is the residual now."""
        self._close()
        self.residual, self._staged = self._staged, self.residual

    def rollback(self) -> None:
        """The round was aborted or left the contribution out: the residual is as before."""
        self._close()

    def _close(self) -> None:
        if not self._open:
            raise LocalProtocolError("no contribution is staged", "nothing to commit or roll back")
        self._open = False
