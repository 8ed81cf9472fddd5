"""The simulator: a level without bytes. It plans the batches of a trace with the code that the live store runs."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.level import BYPASSES, HITS, MISSES, Level
from tiercache.policies import POLICIES


class Counts(NamedTuple):
    """What a tier counted. Each distinct row of a batch is an access, a hit or a miss; bypasses are misses not kept."""

    accesses: int
    hits: int
    misses: int
    bypasses: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits an access; 0 where there were none."""
        return self.hits / max(self.accesses, 1)


def simulate(
    policy: str,
    capacity: int,
    rows: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64] | None = None,
    **options: Any,
) -> Counts:
    """Counts of a policy, by name, over a tier of `capacity` slots that starts empty.

    rows: int64[n], not negative. offsets: int64[b + 1], batch i is rows[offsets[i] : offsets[i + 1]]; None for batches
    of one row. options: parameters of the policy.
    """
    level = Level(POLICIES[policy], capacity, options)
    batches = np.arange(rows.size + 1, dtype=np.int64) if offsets is None else offsets
    level.replay(rows, batches)
    hits, misses, bypasses = (int(level.counters[column]) for column in (HITS, MISSES, BYPASSES))
    return Counts(hits + misses, hits, misses, bypasses)
