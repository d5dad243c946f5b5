"""Chunks compressed on their way: zstd level 1 where it saves enough (spec 09-fetch.md §1.4).

Only the wire sees packed bytes: leaf hashes are of the chunk itself. What comes from a peer is
decompressed into memory of the size that the asker knew beforehand, so a frame that would unfold
into more than that is refused before any of it is unpacked.
"""

from __future__ import annotations

import zstandard

from swarmtrain_protocols.errors import PeerFault

LEVEL = 1
SAVING_MIN = 0.05
SAMPLE_BYTES = 64 * 1024
WINDOW_BYTES_MAX = 8 * 1024 * 1024


def sample_saving(chunk: bytes | memoryview) -> float:
    """The share that packing would save, from two pieces of the chunk, 64 KiB together.

    A state chunk is parameters and then momentum, so one piece comes from either half.
    """
    view, piece = memoryview(chunk), SAMPLE_BYTES // 2
    if view.nbytes <= SAMPLE_BYTES:
        sample = bytes(view)
    else:
        quarter = (view.nbytes - piece) // 4
        sample = b"".join(view[at : at + piece] for at in (quarter, 3 * quarter))
    return 1.0 - len(_compress(sample)) / len(sample)


def pack(chunk: bytes | memoryview) -> bytes | None:
    """One zstd frame that states its content size; None if it saves less than 5 %."""
    packed = _compress(chunk)
    return packed if len(packed) <= (1.0 - SAVING_MIN) * memoryview(chunk).nbytes else None


def _compress(data: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor(level=LEVEL).compress(data)


def unpack(packed: bytes | bytearray, into: memoryview) -> None:
    """Decompress one frame into ``into``, which it must fill exactly.

    Raises:
        PeerFault: ``malformed``: no such frame, or of another size.
    """
    try:
        frame = zstandard.get_frame_parameters(packed)
        if frame.content_size != into.nbytes or frame.window_size > WINDOW_BYTES_MAX:
            raise PeerFault("malformed", f"a packed chunk of {frame.content_size} bytes")
        plain = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX).decompress(
            packed, max_output_size=into.nbytes, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise PeerFault("malformed", f"a packed chunk: {error}") from None
    if len(plain) != into.nbytes:
        raise PeerFault("malformed", f"a packed chunk of {len(plain)} bytes")
    into[:] = plain
