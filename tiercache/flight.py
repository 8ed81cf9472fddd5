"""Flight: a fetch that has been planned and begun. Ticket: a flight in a caller's hands."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tiercache.request import are_rows

if TYPE_CHECKING:
    import torch

    from tiercache.request import Table
    from tiercache.stack import StackPlan
    from tiercache.storage.reader import Job
    from tiercache.store import Store
    from tiercache.tiers.device import Event


class Flight:
    """What one fetch holds until it has landed: room for its plan, pinned slots, a staging area, reads on their way.

    `rows` are the store's row numbers asked for, int64[n].
    `staged` is the number of rows of `staging` in use. `event` is behind the work of a device's streams that reads its slots.
    `ended` is set when nobody waits for it any more.
    `borrowed` are slots (int32[b]) that other flights' reads are to fill, with the rows (int64[b]) wanted from them.
    """

    __slots__ = (
        "borrowed", "borrowed_rows", "ended", "event", "job", "plan", "rows", "shape", "staged", "staging", "table",
    )  # fmt: skip

    def __init__(
        self, table: "Table", rows: npt.NDArray[np.int64], shape: tuple[int, ...], plan: "StackPlan"
    ) -> None:
        self.table = table
        self.rows, self.shape = rows, shape
        self.plan = plan
        self.staging: npt.NDArray[np.uint8] = _NOTHING
        self.staged = 0
        self.job: Job | None = None
        self.borrowed: npt.NDArray[np.int32] = _NO_SLOTS
        self.borrowed_rows: npt.NDArray[np.int64] = _NO_ROWS
        self.event: Event | None = None
        self.ended = False

    @property
    def done(self) -> bool:
        """Whether its own reads have all landed or failed, and no stream reads its slots."""
        event = self.event or self.plan.after
        return self.brought and (event is None or event.done())

    @property
    def brought(self) -> bool:
        """Whether its own reads have all landed or failed."""
        return self.job is None or self.job.done


_NOTHING = np.empty((0, 8), np.uint8)
_NO_SLOTS = np.empty(0, np.int32)
_NO_ROWS = np.empty(0, np.int64)


class Ticket:
    """Rows on their way, from `Store.prefetch`. `take` once; a ticket that is dropped lets its rows arrive all the same.

    Until it is taken, cancelled or dropped, its rows stay in the tier.
    """

    def __init__(self, store: "Store", flight: Flight, abandon: Callable[[Flight], Any]) -> None:
        self._store = store
        self._abandon = abandon
        self._flight: Flight | None = flight  # last: what has a flight can let go of it

    @property
    def open(self) -> bool:
        """Whether it was neither taken nor cancelled."""
        return self._flight is not None

    @property
    def done(self) -> bool:
        """Whether `take` would not wait for reads of its own."""
        flight = self._flight
        return flight is None or flight.brought

    def asks_for(self, indices: "torch.Tensor") -> bool:
        """Whether its rows were asked for by these indices, in this shape. False once it was taken or cancelled."""
        flight = self._flight
        return flight is not None and tuple(indices.shape) == flight.shape and are_rows(indices, flight.table, flight.rows)

    def take(self, stream: Any = None, *, out: "torch.Tensor | None" = None, raw: bool = False) -> "torch.Tensor":
        """The rows, as `Store.fetch` returns them; waits for what has not arrived.

        A wrong `out` raises TypeError or ValueError and leaves the ticket as it was; a failed read raises StorageError and
        ends it. A second take raises RuntimeError.
        """
        flight = self._flight
        if flight is None:
            raise RuntimeError("this ticket was taken or cancelled before")
        return self._store._take(self, flight, stream, out, raw)

    def cancel(self) -> None:
        """Give the rows up: what has not been read yet is not read. Does nothing to a ticket that was taken.

        ClosedError in a process forked since.
        """
        self._store._flights.require_here()
        flight, self._flight = self._flight, None
        if flight is not None:
            self._abandon(flight)
            if flight.job is not None:
                flight.job.cancel()

    def _claim(self) -> "Flight | None":
        """The flight, for the one caller that gets it."""
        flight, self._flight = self._flight, None
        return flight

    def __del__(self) -> None:
        flight = self.__dict__.get("_flight")
        if flight is not None:
            self._abandon(flight)
