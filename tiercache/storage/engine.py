"""Engine: threads that serve a read queue. The seam between what is wanted and how it is read."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.storage.queue import Queue


class Engine(Protocol):
    """Serves one queue from `start` to `close`. `queue` is shared with whoever submits jobs."""

    name: str
    queue: Queue

    def start(self) -> None:
        """Begin to serve. Called once."""

    def wake(self) -> None:
        """Tell that a job was submitted."""

    def close(self) -> None:
        """Let what is in flight land, fail the rest with ECANCELED, end the threads and free everything."""


def aligned_buffer(num_bytes: int, alignment: int = 4096) -> npt.NDArray[Any]:
    """uint8[num_bytes] at an address that is a multiple of `alignment`."""
    block = np.zeros(num_bytes + alignment, np.uint8)
    begin = -block.ctypes.data % alignment
    return block[begin : begin + num_bytes]
