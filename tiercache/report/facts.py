"""What a page says: plain numbers, measured by `measure.py` and drawn by `page.py`. Sizes are bytes, rates shares of 1."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.lab.kinds import Kinds
from tiercache.lab.replay import Replay
from tiercache.lab.windows import Windows


class Subject(NamedTuple):
    """What was replayed.

    title    its name
    about    (what, value) pairs that describe it
    command  the command line that made the report
    kinds   the orders of n-grams or the tables that its rows are of, or None
    why      what kinds are, or why there are none; a sentence
    """

    title: str
    about: tuple[tuple[str, str], ...]
    command: str
    kinds: Kinds | None
    why: str


class Line(NamedTuple):
    """A line of a curve: a policy's name, or that of a bound; a hit rate at each size."""

    name: str
    is_bound: bool
    rates: tuple[float, ...]


class Mark(NamedTuple):
    """A chosen size, and the hit rate of the whole replay there, of the line so named. at: its place in the curve's sizes."""

    line: str
    at: int
    rate: float


class SizeCurve(NamedTuple):
    """Hit rate against the size of one tier.

    tier     "Tier", "Host tier" or "Device tier"
    hits_of  what the hit rates count: a sentence
    sizes    ascending; `slot_bytes` each slot
    lines    of policies, then bounds
    marks    the sizes that were chosen
    rate     share of the rows that it was counted with
    """

    tier: str
    hits_of: str
    sizes: tuple[int, ...]
    slot_bytes: int
    lines: tuple[Line, ...]
    marks: tuple[Mark, ...]
    rate: float

    @property
    def error(self) -> float:
        """Largest distance from the whole replay, where both are known."""
        rates = {line.name: line.rates for line in self.lines if not line.is_bound}
        return max((abs(rates[mark.line][mark.at] - mark.rate) for mark in self.marks), default=0.0)


class Choice(NamedTuple):
    """A chosen size, and the hit rates of the curve at half of it, there, and at twice."""

    tier: str
    size: int
    rates: tuple[float, float, float]


class Served(NamedTuple):
    """Where the accesses to each kind of rows were served, for one choice of tiers. All int64[k].

    title     what the tiers are
    names     the kinds
    tiers     hits of each tier, the device's first: ("device tier", hits) and so on
    again     misses of rows that were asked for before
    fresh     misses of rows that were not: no tier can have them
    """

    title: str
    names: tuple[str, ...]
    tiers: tuple[tuple[str, npt.NDArray[np.int64]], ...]
    again: npt.NDArray[np.int64]
    fresh: npt.NDArray[np.int64]


class Facts(NamedTuple):
    """A whole page.

    made      when, and by which version
    mode      "policies", "tiers" (simulated) or "live"
    replays   as printed: policies at sizes, or the one of a store's tiers
    served    empty where tiers began with rows: then those served accesses that no tier could have had, and bounds do not hold
    """

    subject: Subject
    made: str
    mode: str
    replays: tuple[Replay, ...]
    curves: tuple[SizeCurve, ...]
    choices: tuple[Choice, ...]
    served: tuple[Served, ...]
    windows: Windows
    accesses: int
    touched_rows: int
    num_batches: int
    num_rows: int
    """Asked for, duplicates of a batch included."""

    @property
    def warm(self) -> bool:
        """Whether tiers began with rows, so that the bounds are not theirs."""
        return not self.served


def best_of_sizes(replays: Sequence[Replay]) -> list[Replay]:
    """The replay with the most hits at each size, by ascending size."""
    by_size: dict[int, Replay] = {}
    for each in sorted(replays, key=lambda each: each.hits):
        by_size[each.capacity] = each
    return [by_size[size] for size in sorted(by_size)]
