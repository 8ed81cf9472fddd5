"""Rings: ordered sets of slots, linked both ways through one array, so that any member can be taken out at once.

`links` is int32[num_slots + num_rings, 2]. Ring `r` begins and ends at the anchor `num_slots + r`; from there NEWER
leads to its oldest member and OLDER to its newest. Both links of a slot lie in one cache line.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.native import int64, lean
from tiercache.policies.base import BYPASS

OLDER, NEWER = 0, 1
"""Columns of `links`."""


def new_rings(num_slots: int, num_rings: int) -> npt.NDArray[np.int32]:
    """int32[num_slots + num_rings, 2]: that many empty rings."""
    links = np.zeros((num_slots + num_rings, 2), np.int32)
    links[num_slots:] = np.arange(num_slots, num_slots + num_rings, dtype=np.int32)[:, None]
    return links


@lean
def push(links: Any, anchor: int, slot: int) -> None:
    """Put a slot that is in no ring at the newest end of a ring."""
    newest = links[anchor, OLDER]
    links[slot, OLDER] = newest
    links[slot, NEWER] = anchor
    links[newest, NEWER] = slot
    links[anchor, OLDER] = slot


@lean
def unlink(links: Any, slot: int) -> None:
    """Take a slot out of its ring."""
    older, newer = links[slot, OLDER], links[slot, NEWER]
    links[older, NEWER] = newer
    links[newer, OLDER] = older


@lean
def renew(links: Any, anchor: int, slot: int) -> None:
    """Move a member of a ring to its newest end."""
    if links[slot, NEWER] != anchor:
        unlink(links, slot)
        push(links, anchor, slot)


@lean
def oldest_unpinned(links: Any, anchor: int, pins: Any, patience: int) -> tuple[int, int]:
    """The oldest member without a pin, still in the ring, or BYPASS; and the patience left.

    A pinned member that is met goes to the newest end and costs one of `patience`. The search ends when that is used up
    or the ring has been round once.
    """
    slot = int64(links[anchor, NEWER])
    first = slot
    while slot != anchor and patience >= 0:
        if pins[slot] <= 0:
            return slot, patience
        patience -= 1
        renew(links, anchor, slot)
        slot = int64(links[anchor, NEWER])
        if slot == first:
            break
    return int64(BYPASS), patience


def members(links: npt.NDArray[np.int32], anchor: int) -> list[int]:
    """The members of a ring, oldest first. AssertionError where its two directions disagree."""
    found: list[int] = []
    slot = int(links[anchor, NEWER])
    while slot != anchor:
        assert links[links[slot, NEWER], OLDER] == slot, f"ring {anchor} is broken at {slot}"
        assert len(found) < len(links), f"ring {anchor} does not close"
        found.append(slot)
        slot = int(links[slot, NEWER])
    assert links[links[anchor, NEWER], OLDER] == anchor, f"ring {anchor} is broken at its anchor"
    return found
