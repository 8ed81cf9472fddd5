"""kvikio: GPUDirect Storage where the machine has it, plain reads by kvikio's own threads where it has not (compat mode).

Two ways to read. `GdsEngine` serves a read queue like the other engines, into bounce buffers in host memory. `load` reads one
long extent straight into a device buffer, or into a host array by the same code.

kvikio opens files by path, while reads carry descriptors. Both ways open a CuFile on /proc/self/fd/N: that is the file which
the store opened and compared, whatever its path leads to by now. The engine looks at every read where the descriptor leads,
and has a CuFile for each file that it ever led to, so that a fault injected into the descriptor is a fault of the read too.

kvikio, and the driver that it asks even about host memory, are loaded by the first use of either way and not before. Its
default of one thread is then raised, for the whole process. A process forked later must end by os._exit or exec, as
multiprocessing's do: kvikio's threads are not in it, and its own end waits for them.
"""

import ctypes
import errno
import os
import threading
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch

from tiercache.errors import ConfigError, StorageError
from tiercache.native import int64, lean, lock, unlock, wait
from tiercache.storage.engine import Underway, aligned_buffer
from tiercache.storage.queue import (
    ECANCELED,
    EIO,
    ENODATA,
    FD,
    NEEDED,
    OFFSET,
    SCRATCH_BYTES,
    STOP,
    Queue,
    fail_all,
    finish,
    get,
    give_up,
    look_again,
    read_at,
    stop,
    take,
)
from tiercache.storage.table import TableFile, open_readonly

_TASK_BYTES = 1 << 20
_THREADS = 16
_IDLE_NS = 1_000_000_000
_EINTR = 4
_NEEDS = "storage.engine = 'gds': needs"
_NUMBERS = {os.strerror(number): number for number in errno.errorcode} | {"EOF": ENODATA}
_loading = threading.Lock()


def _kvikio() -> Any:
    """The module kvikio, ready to read. ConfigError where it or the driver is missing."""
    with _loading:
        try:
            import kvikio
            import kvikio.defaults
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigError(f"{_NEEDS} the [gpu] extra (kvikio): {error}") from error
        try:
            told = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(ctypes.c_int()))
        except OSError as error:
            raise ConfigError(f"{_NEEDS} the CUDA driver, even for host memory: {error}") from error
        if told:  # kvikio would wait for itself forever
            raise ConfigError(f"{_NEEDS} a CUDA driver that tells its version: cuDriverGetVersion fails with {told}")
        if kvikio.defaults.get("num_threads") == 1:
            kvikio.defaults.set({"num_threads": _THREADS})
        return kvikio


def _open(kvikio: Any, descriptor: int) -> Any:
    return kvikio.CuFile(f"/proc/self/fd/{descriptor}")


def _compat(kvikio: Any) -> tuple[str, ...]:
    """A note where kvikio reads without GPUDirect Storage."""
    return ("gds reads in compat mode (no GPUDirect Storage here)",) if kvikio.defaults.is_compat_mode_preferred() else ()


def _number(error: Exception) -> int:
    """The errno of what kvikio raised: its message ends with the system's own words."""
    number = getattr(error, "errno", None) or _NUMBERS.get(str(error).rpartition(": ")[2], EIO)
    return int(number)


class _Read:
    """A read on its way. Keeps its file and its buffer: kvikio does not, and neither may go before the read has landed."""

    def __init__(self, file: Any, memory: Any, num_bytes: int, offset: int) -> None:
        self._file, self._memory = file, memory
        self._num_bytes, self._offset = num_bytes, offset
        self._begin()

    def _begin(self) -> None:
        self._errno, self._future = 0, None
        try:
            self._future = self._file.pread(self._memory, self._num_bytes, self._offset, self._num_bytes)
        except (RuntimeError, OSError) as error:
            self._errno = _number(error)

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._future is None or self._future.done()

    def wait(self) -> int:
        """Wait until it has landed: 0 where every byte has come, else an errno."""
        while True:
            if (future := self._future) is not None:
                self._future = None
                try:
                    self._errno = 0 if future.get() >= self._num_bytes else ENODATA
                except (RuntimeError, OSError) as error:
                    self._errno = _number(error)
            if self._errno != _EINTR:
                return self._errno
            self._begin()


class GdsEngine:
    """`depth` reads in flight at most, each of up to `slot_bytes`, into host memory and through the page cache.

    Raises ConfigError where kvikio or the driver is missing. `notes` say what the machine withholds.
    """

    name = "gds"

    def __init__(self, queue: Queue, depth: int, slot_bytes: int, alignment: int) -> None:
        self.queue = queue
        self.underway = Underway()
        self._kvikio = _kvikio()
        self.notes = _compat(self._kvikio)
        if alignment > 1:
            self.notes += ("gds reads rows through the page cache, not with O_DIRECT",)
        buffer = aligned_buffer(depth * slot_bytes)
        self._address, self._slot_bytes = buffer.ctypes.data, slot_bytes
        self._slots = list(buffer.reshape(depth, slot_bytes))
        self._free = list(range(depth))
        self._looked = np.zeros(SCRATCH_BYTES, np.uint8)
        self._taken: list[list[int]] = []
        self._flying: dict[int, tuple[int, int, _Read]] = {}  # by slot, oldest first: line, read
        self._files: dict[tuple[int, int, int], Any] = {}  # by descriptor, device, inode
        self._thread = threading.Thread(target=self._serve, name="tiercache-gds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Nothing to do: the thread waits on the queue's own condition variable."""

    def close(self) -> None:
        stop(self.queue)
        if self._thread.ident is not None:
            self._thread.join()

    def _serve(self) -> None:
        taken, scratch = np.zeros((len(self._free), 5), np.int64), np.zeros(2, np.int64)
        try:
            while (count := _take(self.queue, taken, len(self._free), not self._flying, scratch)) >= 0 or self._flying:
                self._taken = taken[: max(count, 0)][::-1].tolist()
                while self._taken:
                    self._issue(*self._taken[-1])
                    self._taken.pop()
                self._land()
        finally:
            self._end()

    def _issue(self, line: int, read: int, descriptor: int, offset: int, needed: int) -> None:
        """Begin a read that was taken."""
        try:
            file = self._file(descriptor)
        except (RuntimeError, OSError) as error:
            self._finish(line, read, 0, _number(error))
            return
        slot = self._free[-1]
        self._flying[slot] = (line, read, _Read(file, self._slots[slot], needed, offset))
        self._free.pop()

    def _file(self, descriptor: int) -> Any:
        """The CuFile of the file that a descriptor leads to now."""
        status = os.fstat(descriptor)
        key = (descriptor, status.st_dev, status.st_ino)
        if key not in self._files:
            self._files[key] = _open(self._kvikio, descriptor)
        return self._files[key]

    def _land(self) -> None:
        """Tell of reads that have landed, among those that kvikio began first; wait for the oldest where none has."""
        oldest = list(islice(self._flying, _THREADS))
        landed = [slot for slot in oldest if self._flying[slot][2].done]
        for slot in landed or oldest[:1]:
            line, read, flight = self._flying[slot]
            number = flight.wait()
            del self._flying[slot]
            self._free.append(slot)
            self._finish(line, read, self._address + slot * self._slot_bytes, number)

    def _finish(self, line: int, read: int, address: int, number: int) -> None:
        look_again(self._looked.ctypes.data)
        finish(self.queue, line, read, address, number, self._looked.ctypes.data)

    def _end(self) -> None:
        """Let land what is in flight, which after an error fails with EIO, and give the queue up."""
        try:
            for *_, flight in self._flying.values():
                flight.wait()
            for file in self._files.values():
                file.close()
        finally:
            begun = [(line, read) for line, read, _ in self._flying.values()]
            for line, read in begun + [(line, read) for line, read, *_ in self._taken]:
                self._finish(line, read, 0, EIO)
            give_up(self.queue, EIO)


@lean
def _take(queue: Any, taken: Any, room: int, patient: bool, scratch: Any) -> int:
    """Take up to `room` reads into `taken`: line, read, descriptor, offset, bytes needed. How many; -1 for none ever again.

    If patient, wait for one.
    """
    mutex, work = queue.sync.ctypes.data, queue.sync.ctypes.data + 64
    count = int64(0)
    lock(mutex)
    while True:
        if queue.control[STOP] != 0:
            fail_all(queue, ECANCELED)
        while count < room:
            line, read = take(queue)
            if line < 0:
                break
            entry = read_at(queue, line, read)
            taken[count, 0], taken[count, 1] = line, read
            taken[count, 2], taken[count, 3], taken[count, 4] = get(entry, FD), get(entry, OFFSET), get(entry, NEEDED)
            count += 1
        if count > 0 or not patient or queue.control[STOP] != 0:
            break
        wait(work, mutex, _IDLE_NS, scratch)
    if count == 0 and queue.control[STOP] != 0:
        count = int64(-1)
    unlock(mutex)
    return count


def load(file: TableFile, offset: int, num_bytes: int, target: Any) -> tuple[str, ...]:
    """Read one extent of a file into the first `num_bytes` of `target`, in parallel. For extents of 64 KiB and more.

    target: a contiguous torch tensor, numpy array or cupy array, on whichever device it lies; nothing else may use it
    meanwhile. Returns when every byte is there, with a note in compat mode. Raises StorageError with path, offset and errno
    where one is not, and then the content of the target is undefined; StorageError (ESTALE) for a file that is not any more
    what it was; ValueError for a target that cannot take them; ConfigError as the engine does.
    """
    kvikio, memory = _kvikio(), _bytes(target)
    if offset < 0 or not 0 <= num_bytes <= memory.nbytes:
        raise ValueError(f"{num_bytes} bytes at offset {offset} do not fit a target of {memory.nbytes} bytes")
    descriptor = open_readonly(file)
    try:
        failures = _load(kvikio, descriptor, offset, memory[:num_bytes])
    finally:
        os.close(descriptor)
    if failures:
        at, number = failures[0]
        what = "the file ends too soon" if number == ENODATA else os.strerror(number)
        raise StorageError(
            number, f"{what} (load of {num_bytes} bytes at offset {offset}, in the task at offset {at})", str(file.path)
        )
    return _compat(kvikio)


def _load(kvikio: Any, descriptor: int, offset: int, memory: Any) -> list[tuple[int, int]]:
    """Fill the memory from a file. Waits for every task, whatever becomes of the others: (offset, errno) of what failed."""
    begins = range(0, memory.nbytes, _TASK_BYTES)
    try:
        file = _open(kvikio, descriptor)
    except (RuntimeError, OSError) as error:
        return [(offset, _number(error))]
    with closing(file):
        parts = [memory[begin : begin + _TASK_BYTES] for begin in begins]
        reads = [_Read(file, part, part.nbytes, offset + begin) for begin, part in zip(begins, parts, strict=True)]
        numbers = [read.wait() for read in reads]
    return [(offset + begin, number) for begin, number in zip(begins, numbers, strict=True) if number]


def _bytes(target: Any) -> Any:
    """The same memory as uint8[n], which kvikio takes: an array for host memory."""
    if isinstance(target, torch.Tensor):
        if not target.is_contiguous():
            raise ValueError("the target is not contiguous")
        flat = target.detach().view(-1).view(torch.uint8)
        return flat if flat.is_cuda else flat.numpy()
    if not target.flags.c_contiguous:
        raise ValueError("the target is not contiguous")
    if isinstance(target, np.ndarray) and not target.flags.writeable:
        raise ValueError("the target is read-only")
    return target.reshape(-1).view(np.uint8)
