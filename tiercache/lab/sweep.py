"""Many simulations of one trace, in several processes: every policy at every capacity, with the bounds.

Processes read the trace from files that they map, so that it is in memory once.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tiercache.lab.bounds import Bounds, Uses, bounds, uses_of
from tiercache.lab.replay import Replay
from tiercache.lab.simulator import Counts, simulate
from tiercache.lab.trace import Trace

_WORTH_ROWS = 20_000_000
"""Rows to simulate in all that are worth processes: one takes two seconds to begin."""

Done = Callable[[], Any]


def sweep(
    trace: Trace,
    policies: Sequence[str],
    capacities: Sequence[int],
    *,
    record_bytes: int,
    processes: int | None = None,
    done: Done = lambda: None,
) -> list[Replay]:
    """Replays at each capacity of each policy, in this order. done: called after each policy or bound of a capacity.

    processes: how many; None for one a core if there is enough to do, else this one alone.
    """
    work = [(policy, capacity) for capacity in capacities for policy in (*policies, None)]
    if processes is None:
        processes = (os.cpu_count() or 1) if trace.rows.size * len(work) >= _WORTH_ROWS else 1
    uses = uses_of(trace)
    if processes == 1:
        results = []
        for policy, capacity in work:
            results.append(_one(policy, capacity, trace, uses))
            done()
    else:
        results = _in_processes(min(processes, len(work)), work, trace, uses, done)
    found = dict(zip(work, results, strict=True))
    nothing = np.empty(0, np.int64)
    return [
        Replay(
            tier=policy,
            capacity=capacity,
            counts=counts,
            bytes_read=counts.misses * record_bytes,
            bounds=limit,
            latency_ns=nothing,
            reads=counts.misses,
            slot_bytes=record_bytes,
            bytes_missed=counts.misses * record_bytes,
        )
        for capacity in capacities
        for policy in policies
        if isinstance(counts := found[policy, capacity], Counts) and isinstance(limit := found[None, capacity], Bounds)
    ]


def _in_processes(
    processes: int, work: Sequence[tuple[str | None, int]], trace: Trace, uses: Uses, done: Done
) -> list[Counts | Bounds]:
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for number, array in enumerate((*trace, *uses)):
            np.save(Path(directory) / f"{number}.npy", array)
        futures: list[Future[Counts | Bounds]] = [pool.submit(_one_of, each, directory) for each in work]
        for future in as_completed(futures):
            future.result()
            done()
        return [future.result() for future in futures]


def _one_of(work: tuple[str | None, int], directory: str) -> Counts | Bounds:
    """In a process of its own."""
    arrays = [np.load(Path(directory) / f"{number}.npy", mmap_mode="r").view(np.ndarray) for number in range(6)]
    return _one(*work, Trace(*arrays[:2]), Uses(*arrays[2:]))


def _one(policy: str | None, capacity: int, trace: Trace, uses: Uses) -> Counts | Bounds:
    """What a policy counts, or the bounds where there is none."""
    return bounds(capacity, uses) if policy is None else simulate(policy, capacity, *trace)
