"""A device whose streams do nothing until they must, and then in any order that their events allow.

Work is queued as functions and run later, one at a time, from a stream that `choose` picks among those that may go on. The
bytes are real, so that whatever the protocol forgets to wait for gives wrong rows.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

CAPTURED = "captured"


class FakeEvent:
    """Done when it has been reached; asking may let some work run first."""

    def __init__(self, device: "FakeDevice") -> None:
        self.device = device
        self.reached = False

    def done(self) -> bool:
        self.device.run_some()
        return self.reached

    def wait(self) -> None:
        self.device.num_waits += not self.reached
        while not self.reached:
            assert self.device.run_one(), "the host waits for an event that no stream reaches"


class FakeDevice:
    """choose(n) is a number below n."""

    torch_device = torch.device("cpu")
    side = "side"

    def __init__(self, choose: Callable[[int], int]) -> None:
        self.choose = choose
        self.streams: dict[Any, deque[tuple[str, Any]]] = {}
        self.num_waits = self.num_allocations = self.num_faults = 0
        self.stream = "main"
        self.loads: list[tuple[int, int]] = []

    # the order of things

    def queue(self, stream: Any, kind: str, what: Any) -> None:
        self.streams.setdefault(stream, deque()).append((kind, what))

    def run_one(self) -> bool:
        """Run one piece of work of some stream; False where none may go on."""
        ready = [
            work
            for stream, work in self.streams.items()
            if stream != CAPTURED and work and (work[0][0] != "wait" or work[0][1].reached)
        ]
        if not ready:
            return False
        kind, what = ready[self.choose(len(ready))].popleft()
        if kind == "run":
            what()
        elif kind == "record":
            what.reached = True
        return True

    def run_some(self) -> None:
        for _ in range(self.choose(4)):
            self.run_one()

    def run_all(self) -> None:
        while self.run_one():
            pass
        assert not any(work for stream, work in self.streams.items() if stream != CAPTURED), "a stream waits for ever"

    def replay(self, stream: Any) -> None:
        """Queue what was captured on a stream, as the launch of a graph does."""
        for kind, what in self.streams[CAPTURED]:
            assert kind == "run", f"a graph cannot hold {kind!r}"
            self.queue(stream, kind, what)

    # Device

    def current(self) -> str:
        return self.stream

    def slots(self, num_slots: int, slot_bytes: int) -> torch.Tensor:
        self.num_allocations += 1
        return torch.full((num_slots, slot_bytes), 0xDD, dtype=torch.uint8)

    def register(self, memory: np.ndarray) -> None:
        self.registered = memory

    def pinned(self, num_bytes: int) -> np.ndarray:
        self.num_allocations += 1
        return np.full(num_bytes, 0xDD, np.uint8)

    def view(self, memory: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(memory)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, stream: Any) -> torch.Tensor:
        self.num_allocations += 1
        return torch.full(shape, 1, dtype=dtype)

    def upload(self, source: np.ndarray, target: torch.Tensor, stream: Any) -> None:
        self.queue(stream, "run", lambda: target.copy_(torch.from_numpy(source)))

    def fill(self, sources: torch.Tensor, slots: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor, stream: Any) -> None:
        def run() -> None:
            if slots.max() >= upper.shape[0] or sources.max() >= lower.shape[0]:
                self.num_faults += 1  # illegal memory access
            else:
                upper[slots.long()] = lower[sources.long()]

        self.queue(stream, "run", run)

    def gather(
        self,
        where: torch.Tensor,
        upper: torch.Tensor,
        lower: torch.Tensor,
        staging: torch.Tensor,
        out: torch.Tensor,
        record: Any,
        stream: Any,
    ) -> None:
        def run() -> None:
            # Places come from memory: those that a broken order leaves behind may be anything.
            places = where.long()
            above = upper.shape[0]
            raw = torch.full((places.numel(), upper.shape[1]), 0xBB, dtype=torch.uint8)
            outside = torch.ones_like(places, dtype=torch.bool)
            for low, high, memory, offset in (
                (0, above, upper, 0),
                (above, above + lower.shape[0], lower, above),
                (-staging.shape[0], 0, staging.flip(0), -staging.shape[0]),
            ):
                inside = (places >= low) & (places < high)
                outside &= ~inside
                raw[inside] = memory[places[inside] - offset]
            self.num_faults += bool(outside.any())
            raw = raw[:, : record.record_bytes]
            rows = out.view(-1, out.shape[-1])
            rows.copy_(raw if out.dtype == torch.uint8 else record.decode(raw.contiguous(), out.dtype))

        self.queue(stream, "run", run)

    def load(self, file: Any, offset: int, target: torch.Tensor) -> tuple[str, ...]:
        self.loads.append((offset, target.numel()))
        data = np.fromfile(file.path, np.uint8, target.numel(), offset=offset)
        target.copy_(torch.from_numpy(data).view(target.shape))
        return ("loaded by a fake",)

    def record(self, stream: Any) -> FakeEvent:
        event = FakeEvent(self)
        self.queue(stream, "record", event)
        return event

    def wait(self, stream: Any, event: FakeEvent) -> None:
        self.queue(stream, "wait", event)

    def close(self) -> None:
        self.run_all()
