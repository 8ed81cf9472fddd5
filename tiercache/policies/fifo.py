"""FIFO: the key that entered first leaves first.

Slots are filled in order, so their order is the order of entry and the whole state is one hand that goes round: the
slot under it is the oldest. Hits change nothing. A pinned slot is passed over and stays for another round.

The baseline that every other policy has to beat. Exactly libCacheSim's FIFO.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import BYPASS, MAX_PINNED_VICTIMS, Policy, bind


class State(NamedTuple):
    """hand int64[1]: the slot to fill next."""

    hand: npt.NDArray[np.int64]


def init(capacity: int) -> State:
    """State of `capacity` slots."""
    return State(np.zeros(1, np.int64))


@lean
def on_hit(state: State, keys: Any, slot: int) -> None:
    """A hit does not change the order."""


@lean
def on_miss(state: State, keys: Any, pins: Any, key: int) -> int:
    """The oldest slot without a pin."""
    slot = int64(state.hand[0])
    for _ in range(MAX_PINNED_VICTIMS + 1):
        chosen = slot
        slot = slot + 1 if slot + 1 < keys.size else 0
        if pins[chosen] <= 0:
            state.hand[0] = slot
            return chosen
    state.hand[0] = slot
    return int64(BYPASS)


def check(state: State, keys: npt.NDArray[np.int64]) -> None:
    """The hand is at a slot."""
    assert 0 <= state.hand[0] < keys.size, "the hand is outside"


bind(State, on_hit=on_hit, on_miss=on_miss)
POLICY = Policy("fifo", init, check)
