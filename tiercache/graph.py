"""StaticFetch: a fetch of one shape whose gather can be captured in a CUDA graph.

A graph replays fixed addresses. So the places that the gather reads lie in one device tensor, the staging area is one piece of
pinned memory, and the output is one tensor. `load` does everything that a graph cannot: it plans, waits for the disk, and
queues the places on the stream. `launch` queues the gather, and nothing else: no allocation, no event, no wait.

    static = store.static_fetch((64, 24))
    static.load(first_indices)
    with torch.cuda.graph(graph):
        static.launch()
        ...                              # the layers that use static.out
    for indices in steps:
        static.load(indices)
        graph.replay()

The slots of a load stay pinned until the next one, whose stream is then behind the replay; the staging area has two halves, so
that the disk fills one while a replay reads the other.
"""

import math
import os
from typing import TYPE_CHECKING, Any

import torch

from tiercache.errors import ClosedError
from tiercache.flight import Flight
from tiercache.request import rows_of

if TYPE_CHECKING:
    from tiercache.flights import Flights
    from tiercache.request import Table
    from tiercache.tiers.device import StreamTier


class Unreached:
    """The event of a load whose replay has not been queued: never done, until the next load puts a real one in its place."""

    def done(self) -> bool:
        """Not yet."""
        return False

    def wait(self) -> None:
        """RuntimeError: there is nothing to wait for."""
        raise RuntimeError("a loaded static fetch ends with the next load, or with its close")


class StaticFetch:
    """See `Store.static_fetch`. `out` holds the rows of the last load once its launch, or its replay, has run.

    Loads and launches belong to one stream at a time. Not safe from several threads.
    """

    def __init__(
        self, flights: "Flights", tier: "StreamTier", table: "Table", shape: tuple[int, ...], out: torch.Tensor
    ) -> None:
        self.out = out
        self._flights, self._tier, self._table, self._shape = flights, tier, table, shape
        size = math.prod(shape)
        self._where = tier.device.slots(1, 4 * max(size, 1)).view(-1).view(torch.int32)[:size]
        self._half = size // table.group_rows
        """Slots of half the staging area."""
        self._staging = tier.staging(2 * self._half)
        self._view = tier.device.view(self._staging)
        self._halves: list[Flight | None] = [None, None]
        self._stream: Any = None
        self._loads = 0

    def load(self, indices: Any, stream: Any = None) -> None:
        """Make the rows of these indices, of the shape given at the start, ready for the next launch on this stream.

        Raises as `Store.fetch`, and ValueError for another shape; then the next launch gives the rows of the last load again.
        An error of the device's own leaves `out` undefined until the next load.
        Waits for the disk; for the device only where the launch before the last has not run.
        """
        rows, shape = rows_of(indices, self._table, self._tier.torch_device)
        if shape != self._shape:
            raise ValueError(f"indices have shape {shape}; this static fetch is of {self._shape}")
        stream = self._tier.device.current() if stream is None else stream
        half = self._loads % 2
        before = self._halves[half]
        self._retire(before, stream)
        if before is not None and before.event is not None:
            before.event.wait()
        flight = Flight(self._table, rows, shape, self._tier.room(rows))
        flight.staging = self._staging[half * self._half : (half + 1) * self._half]
        try:
            self._flights.load(flight)
            where = flight.plan.where
            where[where < 0] -= half * self._half
            flight.event = Unreached()
            self._halves[half] = flight
        except BaseException:
            flight.event = None
            if flight.job is not None:  # its reads land in the half that the next load uses
                flight.job.end()
            self._flights.give_up(flight)
            raise
        self._stream = stream
        self._loads += 1
        self._tier.send(flight.plan, self._where, stream)
        self._retire(self._halves[1 - half], stream)

    def launch(self, stream: Any = None) -> None:
        """Queue the gather into `out`. This is what a graph captures.

        RuntimeError before the first load, ClosedError after `close`.
        """
        if not self._loads:
            raise RuntimeError("a static fetch is loaded before it is launched or captured")
        if all(flight is None or flight.ended for flight in self._halves) or self._flights.closed:
            raise ClosedError("the static fetch, or its store, is closed: its rows are in no slots any more")
        self._tier.launch(self._where, self._view, self.out, self._table.record, stream)

    def close(self) -> None:
        """Let go of the last load's slots, once the stream of that load has done what is queued on it now."""
        for flight in self._halves:
            self._retire(flight, self._stream)

    def __del__(self) -> None:
        if "_loads" in self.__dict__ and self._flights.process == os.getpid():
            self.close()

    def _retire(self, flight: Flight | None, stream: Any) -> None:
        """The launch of a load is queued on the stream: its slots are free behind it.

        Takes no lock, as the collector may come here while its thread holds one: later calls of the store let go of it.
        """
        if flight is not None and not flight.ended:
            flight.event = self._tier.device.record(stream)
            flight.ended = True
            self._flights.abandon(flight)
