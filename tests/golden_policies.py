"""Misses of every policy on a seeded Zipf trace, and how they are counted. Run as a script: prints them as JSON."""

import json
import sys

import numpy as np

from tiercache.level import MISSES, Level
from tiercache.policies import POLICIES

CAPACITIES = (1, 2, 3, 17, 100, 1000)

GOLDEN: dict[str, tuple[int, ...]] = {
    "fifo": (19915, 19846, 19767, 18952, 16590, 10068),
    "lru": (19915, 19844, 19763, 18818, 16059, 9209),
    "lfu": (19915, 19117, 18603, 16685, 14032, 8392),
    "sieve": (19915, 19841, 19198, 16726, 13952, 8392),
    "s3fifo": (19915, 19117, 18604, 16821, 14113, 8424),
    "arc": (19915, 19337, 18910, 16872, 14006, 8437),
    "gittins": (19915, 19363, 18901, 16586, 13844, 8975),
    "wtinylfu": (19897, 19730, 19136, 17316, 14566, 8544),
    "static": (19161, 18633, 18240, 16211, 13148, 7018),
    "belady": (19915, 18832, 18199, 15301, 11495, 5549),
}
"""Misses of 20,000 accesses at each capacity, batches of one row, parameters as they are by default."""


def zipf_trace(num_accesses, num_rows=5000, seed=0):
    """Independent draws, row rank i with weight (i + 1) ** -0.8, rows numbered at random."""
    rng = np.random.default_rng(seed)
    weights = np.cumsum((np.arange(num_rows) + 1.0) ** -0.8)
    ranks = np.searchsorted(weights, rng.random(num_accesses) * weights[-1])
    return rng.permutation(num_rows)[ranks].astype(np.int64)


def options_of(name, capacity, rows, batch=1):
    """Parameters of the two policies that need some: the profile and the future of the trace itself."""
    if name == "static":
        return {"hot_rows": np.argsort(-np.bincount(rows), kind="stable")[:capacity]}
    if name == "belady":
        return {"future": (rows, np.append(np.arange(0, rows.size, batch), rows.size))}
    return {}


def count_misses(name, capacity, rows, batch=1):
    """Misses of a level that starts empty and is given `batch` rows at a time. Checks the books at the end."""
    level = Level(POLICIES[name], capacity, options_of(name, capacity, rows, batch))
    for start in range(0, rows.size, batch):
        level.release(level.plan(rows[start : start + batch]))
    level.check()
    return int(level.counters[MISSES])


def all_misses(num_accesses, capacities, batch=1):
    """{policy: [misses at each capacity]}."""
    rows = zipf_trace(num_accesses)
    return {name: [count_misses(name, capacity, rows, batch) for capacity in capacities] for name in POLICIES}


if __name__ == "__main__":
    json.dump(all_misses(*json.loads(sys.argv[1])), sys.stdout)
