"""Engine: threads that serve a read queue. The seam between what is wanted and how it is read."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiercache.storage.queue import DONE, Queue


class Engine(Protocol):
    """Serves one queue from `start` to `close`. `queue` and `underway` are shared with whoever submits jobs."""

    name: str
    queue: Queue
    underway: "Underway"
    notes: tuple[str, ...]
    """What the machine withholds from it."""

    def start(self) -> None:
        """Begin to serve. Called once."""

    def wake(self) -> None:
        """Tell that a job was submitted."""

    def close(self) -> None:
        """Let what is in flight land, fail the rest with ECANCELED, end the threads and free everything."""


class Underway:
    """Memory that an engine reads and writes by address, held from before a job is submitted until it is done.

    The engine's threads hold the engine and so this, whatever becomes of those who submitted. Safe from several threads.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[npt.NDArray[np.int64], Any]] = {}

    def hold(self, result: npt.NDArray[np.int64], memory: Any) -> None:
        """Keep `memory` alive until the job of this result is done; let go of that of jobs that are."""
        for key, (other, _) in list(self._held.items()):
            if other[DONE]:
                self._held.pop(key, None)
        self._held[id(result)] = (result, memory)

    def release(self, result: npt.NDArray[np.int64]) -> None:
        """Let go of the memory of a job that is done, or was never queued."""
        self._held.pop(id(result), None)


def aligned_buffer(num_bytes: int, alignment: int = 4096) -> npt.NDArray[Any]:
    """uint8[num_bytes] at an address that is a multiple of `alignment`."""
    block = np.zeros(num_bytes + alignment, np.uint8)
    begin = -block.ctypes.data % alignment
    return block[begin : begin + num_bytes]
