"""What a file was when its table was opened: inode, size, time of change. Looked at again after each read, in compiled code."""

import numpy as np
import numpy.typing as npt

from tiercache.native import SYS_STATX, int64, lean, load32, load64, syscall

AT_EMPTY_PATH = 0x1000
_BASIC_STATS = 0x7FF
_NLINK, _INODE, _SIZE, _MTIME, _MTIME_NS = 16, 32, 40, 112, 120
"""Bytes of struct statx, the same on every architecture."""

IDENTITY_BYTES = 264
"""A struct statx, and an empty path behind it."""


def identity_of(descriptor: int) -> npt.NDArray[np.uint8]:
    """uint8[IDENTITY_BYTES]: what an open file is now. OSError where the kernel does not say."""
    identity = np.zeros(IDENTITY_BYTES, np.uint8)
    number = int(_look(descriptor, identity.ctypes.data))
    if number < 0:
        raise OSError(-number, "statx")
    return identity


@lean
def _look(descriptor: int, into: int) -> int:
    return syscall(SYS_STATX, descriptor, into + 256, AT_EMPTY_PATH, _BASIC_STATS, into, 0)


@lean
def changed(descriptor: int, identity: int, scratch: int) -> int:
    """1 where a file is not what the identity at an address says, or has no name any more; else 0.

    scratch: address of IDENTITY_BYTES bytes of which the last are zero.
    """
    if _look(descriptor, scratch) < 0:
        return int64(1)
    same = (
        load64(scratch + _INODE) == load64(identity + _INODE)
        and load64(scratch + _SIZE) == load64(identity + _SIZE)
        and load64(scratch + _MTIME) == load64(identity + _MTIME)
        and load32(scratch + _MTIME_NS) == load32(identity + _MTIME_NS)
        and load32(scratch + _NLINK) != 0
    )
    return int64(0) if same else int64(1)

