"""Files mapped into memory, without a descriptor held open for each.

A site keeps hundreds of results mapped, so that what it holds does not hang on names on its disk.
``mmap.mmap`` keeps a copy of the descriptor as long as the mapping lives (before Python 3.13
always), and a process may have 1024 of them: the mapping is made by the system's own call.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref

_FAILED = ctypes.c_void_p(-1).value


def _system() -> ctypes.CDLL | None:
    if sys.platform == "win32":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_void_p
    libc.mmap.restype = word
    libc.mmap.argtypes = [word, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [word, ctypes.c_size_t]
    return libc


_LIBC = _system()


def map_readonly(descriptor: int) -> memoryview:
    """All bytes of an open file, u8[n], as a mapping that lives as long as views of it.

    The descriptor may be closed at once. Nothing is mapped of an empty file.

    Raises:
        OSError: the system refuses.
    """
    nbytes = os.fstat(descriptor).st_size
    if nbytes == 0:
        return memoryview(b"")
    if _LIBC is None:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    address = _LIBC.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    mapped = (ctypes.c_ubyte * nbytes).from_address(address)
    # Views hold the array, and the array's end unmaps; at the end of the process the system does.
    weakref.finalize(mapped, _LIBC.munmap, address, nbytes).atexit = False
    return memoryview(mapped).cast("B").toreadonly()
