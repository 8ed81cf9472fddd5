"""Expectation: rows that were announced, in a caller's hands. Lookout: all of a store's, and the level that knows of them."""

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tiercache.errors import ConfigError
from tiercache.level import Level
from tiercache.policies import LOOK_AHEAD
from tiercache.policies.expected import MAX_LANES

if TYPE_CHECKING:
    from tiercache.request import Table
    from tiercache.store import Store


class Expectation:
    """What one sequence is going to ask for, from `Store.expect`. Dropped, it stays in force until its rows were asked for.

    A context manager, whose end cancels it.
    """

    def __init__(self, store: "Store", table: "Table", lane: int, leave: Callable[[int], Any]) -> None:
        self._store = store
        self._table = table
        self._leave = leave
        self._lane: int | None = lane  # last: what has a lane can let go of it

    def __repr__(self) -> str:
        return f"<Expectation of table {self._table.name!r}{', cancelled' if self._lane is None else ''}>"

    @property
    def left(self) -> int:
        """Rows, duplicates counted, that are still expected."""
        return self._store._left(self)

    def extend(self, indices: Any) -> int:
        """Expect more rows, behind the others; as `Store.expect`. How many there was room for. RuntimeError if cancelled."""
        return self._store._expect(self._table, indices, self)

    def cancel(self) -> None:
        """These rows are not going to be asked for. A second time it does nothing. ClosedError in a process forked since."""
        self._store._cancel(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        lane = self.__dict__.get("_lane")
        if lane is not None:
            self._leave(lane)


class Lookout:
    """Lanes of a level that looks ahead, handed out to expectations. Under the store's lock, but for `leave`."""

    def __init__(self, level: Level) -> None:
        level.look_ahead()
        self.level = level
        self._unused = list(range(MAX_LANES))[::-1]
        self._left: deque[int] = deque()
        """Lanes that nobody holds any more, and which may have uses to come."""

    def take(self) -> int:
        """A lane that is empty. RuntimeError where all are in use; what was dropped longest ago is given up before."""
        for _ in range(min(len(self._left), 4)):
            lane = self._left.popleft()
            (self._left if self.level.num_left(lane) else self._unused).append(lane)
        if not self._unused and self._left:
            self.level.cancel(self._left[0])
            self._unused.append(self._left.popleft())
        if not self._unused:
            raise RuntimeError(f"{MAX_LANES} expectations are in force; cancel or drop some")
        return self._unused.pop()

    def leave(self, lane: int) -> None:
        """Nobody holds a lane any more. Needs no lock."""
        self._left.append(lane)


def require_foresight(level: Level) -> None:
    """ConfigError where the policy of a host level makes no use of what is announced."""
    if not level.foresees and level.policy.name not in LOOK_AHEAD:
        raise ConfigError(
            f"host.policy = {level.policy.name!r}: does not look ahead, so nothing can be expected; "
            f"allowed is {', '.join(map(repr, LOOK_AHEAD))}"
        )
