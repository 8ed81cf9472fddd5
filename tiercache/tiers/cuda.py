"""A CUDA device: torch's streams and events, the Triton kernels, and CuPy's views of pinned host memory.

Nothing here is imported before a config asks for a device tier on CUDA.
"""

import importlib.util
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tiercache.errors import ConfigError
from tiercache.records import Record
from tiercache.storage import gds
from tiercache.storage.table import TableFile

_PORTABLE_MAPPED = 0x1 | 0x2


def require_cuda(device: torch.device) -> None:
    """ConfigError that says what of the driver, torch, CuPy and Triton a device tier needs and this machine lacks."""
    lacking = []
    if torch.version.cuda is None:
        lacking.append(f"a torch that is built for CUDA (this is {torch.__version__})")
    elif not torch.cuda.is_available():
        lacking.append("a GPU and its driver (torch.cuda.is_available() is False)")
    elif (device.index or 0) >= torch.cuda.device_count():
        lacking.append(f"device {device} (there are {torch.cuda.device_count()})")
    lacking += [
        f'{package} (pip install "tiercache[gpu]" or "tiercache[gpu13]")'
        for package in ("cupy", "triton")
        if importlib.util.find_spec(package) is None
    ]
    if lacking:
        raise ConfigError(f"device.device = {str(device)!r}: needs {', and '.join(lacking)}")


class CudaEvent:
    """A point in a CUDA stream."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        """Whether everything before it in its stream has run."""
        return bool(self.event.query())

    def wait(self) -> None:
        """Make the host wait until it is done."""
        self.event.synchronize()


class CudaDevice:
    """One GPU. See `tiers.device.Device`."""

    def __init__(self, device: torch.device) -> None:
        import cupy

        from tiercache.tiers.kernels import fill, gather

        index = torch.cuda.current_device() if device.index is None else device.index
        self.torch_device = torch.device("cuda", index)
        self._cupy, self._fill, self._gather = cupy, fill, gather
        self.side: Any = torch.cuda.Stream(self.torch_device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        """The caller's current stream."""
        return torch.cuda.current_stream(self.torch_device)

    def slots(self, num_slots: int, slot_bytes: int) -> torch.Tensor:
        """Device memory, uint8[num_slots, slot_bytes], in one allocation."""
        with torch.cuda.stream(self.side):  # its pool gives out nothing that another stream may still use
            return torch.empty((num_slots, slot_bytes), dtype=torch.uint8, device=self.torch_device)

    def register(self, memory: npt.NDArray[np.uint8]) -> None:
        """Pin memory that exists, page by page as it is: nothing is rounded up. It stays pinned as long as this object."""
        with torch.cuda.device(self.torch_device):
            self._cupy.cuda.runtime.hostRegister(memory.ctypes.data, memory.nbytes, _PORTABLE_MAPPED)
        weakref.finalize(self, _unregister, self.torch_device, memory)

    def pinned(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """New pinned host memory, out of torch's cache of it."""
        with torch.cuda.device(self.torch_device):
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True).numpy()

    def view(self, memory: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Pinned host memory as kernels see it: uint8 of the same shape, on the device.

        RuntimeError if torch would rather copy it, as it does with memory that was pinned for another device.
        """
        if memory.size == 0:
            return torch.empty(memory.shape, dtype=torch.uint8, device=self.torch_device)
        address = self._cupy.cuda.runtime.pointerGetAttributes(memory.ctypes.data).devicePointer
        unowned = self._cupy.cuda.UnownedMemory(address, memory.nbytes, memory, self.torch_device.index)
        array = self._cupy.ndarray(memory.shape, self._cupy.uint8, self._cupy.cuda.MemoryPointer(unowned, 0))
        with torch.cuda.device(self.torch_device):
            tensor = torch.as_tensor(array, device=self.torch_device)
        if tensor.data_ptr() != address:
            raise RuntimeError(f"pinned memory of {self.torch_device} was copied, not viewed")
        return tensor

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A tensor that belongs to a stream, or to the current one."""
        with torch.cuda.stream(stream):
            return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def upload(self, source: npt.NDArray[np.int32], target: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy pinned host memory to the device."""
        runtime = self._cupy.cuda.runtime
        with torch.cuda.device(self.torch_device):
            runtime.memcpyAsync(
                target.data_ptr(), source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.cuda_stream
            )

    def fill(
        self, sources: torch.Tensor, slots: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor, stream: Any
    ) -> None:
        """upper[slots] = lower[sources]."""
        with torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            self._fill(sources, slots, upper, lower)

    def gather(
        self,
        where: torch.Tensor,
        upper: torch.Tensor,
        lower: torch.Tensor,
        staging: torch.Tensor,
        out: torch.Tensor,
        record: Record,
        stream: Any,
    ) -> None:
        """Decode or copy the records at places into out."""
        with torch.cuda.device(self.torch_device), torch.cuda.stream(stream):
            self._gather(where, upper, lower, staging, out.view(where.numel(), out.shape[-1]), record)

    def load(self, file: TableFile, offset: int, target: torch.Tensor) -> tuple[str, ...]:
        """Read one extent of a file into device memory, through kvikio; a note if that is in compat mode."""
        with torch.cuda.device(self.torch_device):
            self.side.synchronize()  # torch may have given out memory whose last user is still under way
            return gds.load(file, offset, target.nbytes, target)

    def record(self, stream: torch.cuda.Stream) -> CudaEvent:
        """An event behind everything queued on the stream so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return CudaEvent(event)

    def wait(self, stream: torch.cuda.Stream, event: Any) -> None:
        """Make a stream wait for an event."""
        stream.wait_event(event.event)

    def close(self) -> None:
        """Wait for all work."""
        torch.cuda.synchronize(self.torch_device)


def _unregister(device: torch.device, memory: npt.NDArray[np.uint8]) -> None:
    """Unpin memory that no stream reads any more; it stays alive until here."""
    import cupy

    torch.cuda.synchronize(device)
    cupy.cuda.runtime.hostUnregister(memory.ctypes.data)
