"""Which engine serves: a short measurement of each, on the table itself."""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiercache.storage import queue as q
from tiercache.storage.engine import Engine
from tiercache.storage.files import OpenFiles
from tiercache.storage.gds import GdsEngine
from tiercache.storage.threads import ThreadsEngine
from tiercache.storage.uring import UringEngine

_ENGINES: dict[str, Any] = {"uring": UringEngine, "threads": ThreadsEngine, "gds": GdsEngine}
_PROBE_READS = 512
_MARGIN = 1.25
"""How much faster than io_uring threads must be to be chosen: they spend about three times the CPU on a read."""
_BLOCK = 4096


class Choice(NamedTuple):
    """An engine that is serving, and how it was chosen.

    `reads_per_s` is what each measured engine reached; empty where none was measured. `notes` say what was asked for and
    could not be had.
    """

    engine: Engine
    reads_per_s: dict[str, float]
    notes: tuple[str, ...]


def start_engine(name: str, files: OpenFiles, queue_depth: int, slot_bytes: int) -> Choice:
    """Start the named engine, or for "auto" io_uring, unless threads are faster here by far or the kernel grants no ring.

    Its queue has counted nothing yet. ConfigError where an engine needs what is not installed.
    """
    notes: tuple[str, ...] = (files.refusal,) if files.refusal else ()
    engines: list[Engine] = []
    try:
        for candidate in ("uring", "threads") if name == "auto" else (name,):
            try:
                _start(candidate, engines, files, queue_depth, slot_bytes)
            except OSError as error:
                notes += (f"io_uring is refused ({error.strerror}); reading with threads",)
        if not engines:
            _start("threads", engines, files, queue_depth, slot_bytes)
        best: Engine = engines[0]
        rates: dict[str, float] = {}
        if len(engines) > 1:
            best, rates = _choose(engines, files)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    for engine in engines:
        if engine is not best:
            engine.close()
    best.queue.control[[q.READS_DONE, q.BYTES_READ]] = 0
    return Choice(best, rates, notes + best.notes)


def _start(name: str, engines: list[Engine], files: OpenFiles, queue_depth: int, slot_bytes: int) -> None:
    """Add an engine that serves. OSError where io_uring is refused, at its set-up or at its first read."""
    engine: Engine = _ENGINES[name](q.new_queue(), queue_depth, slot_bytes, files.alignment)
    engines.append(engine)
    engine.start()
    if name == "uring":
        _time(engine, int(files.descriptors[0]), np.zeros(1, np.int64))
        if number := int(engine.queue.control[q.BROKEN]):
            engines.remove(engine)
            engine.close()
            raise OSError(number, os.strerror(number))


def _choose(engines: Sequence[Engine], files: OpenFiles) -> tuple[Engine, dict[str, float]]:
    """(engine that will serve, what each reached)."""
    rates = {engine.name: rate for engine, rate in zip(engines, _measure(engines, files), strict=True)}
    best = engines[0]
    for engine in engines[1:]:
        if rates[engine.name] > _MARGIN * rates[best.name]:
            best = engine
    return best, rates


def _measure(engines: Sequence[Engine], files: OpenFiles) -> list[float]:
    """Random reads per second of each engine: the best of three rounds, interleaved, after a warm-up of a few reads."""
    largest = max(range(len(files.files)), key=lambda number: files.files[number].size)
    num_blocks = max(files.files[largest].size // _BLOCK, 1)
    random = np.random.default_rng(0)
    best = [0.0] * len(engines)
    for num_reads in (8, _PROBE_READS, _PROBE_READS, _PROBE_READS):
        for number, engine in enumerate(engines):
            blocks = random.integers(0, num_blocks, num_reads)
            seconds = _time(engine, int(files.descriptors[largest]), np.sort(blocks) * _BLOCK)
            if num_reads == _PROBE_READS:
                best[number] = max(best[number], num_reads / seconds)
    return best


def _time(engine: Engine, descriptor: int, offsets: npt.NDArray[np.int64]) -> float:
    reads = np.zeros((offsets.size, q.READ_COLUMNS), np.int64)
    reads[:, q.AT] = reads[:, q.OFFSET] = offsets
    reads[:, q.FD], reads[:, q.LENGTH], reads[:, q.NEEDED] = descriptor, _BLOCK, 1
    pieces, wanted, result = np.zeros((1, q.PIECE_COLUMNS), np.int64), np.empty(0, np.int64), np.zeros(8, np.int64)
    engine.underway.hold(result, (reads, pieces, wanted))
    begin = time.perf_counter()
    if q.submit(engine.queue, reads, pieces, wanted, result, 0) > 0:
        engine.wake()
        while not q.wait_done(engine.queue, result):
            pass
    return time.perf_counter() - begin
