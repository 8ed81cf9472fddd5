"""Readers: who holds the memory that is read into, in which order a source is read, and how a read is given up."""

import errno
import gc
import signal
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from stores import ENGRAM, KINDS, config_of, in_process, store_threads

from tiercache.errors import ClosedError
from tiercache.storage import queue as q
from tiercache.storage.reader import SourceReader
from tiercache.storage.reads import Targets
from tiercache.store import Store
from tiercache.testing import EngineRig, FaultySource, OracleSource, oracle


class Memory(np.ndarray):
    """An array that can be referred to weakly."""


def new_memory():
    return np.zeros(8, np.uint8).view(Memory)


class SourceRig:
    """A source of 100 rows under a reader, with memory for what it reads."""

    def __init__(self) -> None:
        self.source = FaultySource(OracleSource(100, ENGRAM))
        self.reader = SourceReader(self.source, q.new_queue())
        self.slots = np.zeros((100, 264), np.uint8)
        self.flags = np.zeros(100, np.int8)

    def submit(self, rows, *, wanted=(), due_s=0.0, alive=()):
        rows = np.asarray(rows, np.int64)
        self.flags[rows] = 1
        targets = Targets(self.slots.ctypes.data, 264, 0, 264, self.flags.ctypes.data, 1)
        due = int(due_s * 1e9) and q.clock_ns(np.empty(2, np.int64)) + int(due_s * 1e9)
        return self.reader.submit(rows, rows.astype(np.int32), np.asarray(wanted, np.int64), targets, due, alive)

    def has(self, rows):
        return bool((self.slots[rows] == oracle(rows, 264)).all() and not self.flags[rows].any())

    def read_rows(self):
        """The first row of every read so far."""
        return [int(rows[0]) for rows in self.source.reads]

    def close(self):
        self.source.gate.set()
        self.reader.close()


@pytest.fixture
def rig():
    with closing(SourceRig()) as rig:
        yield rig
    assert not store_threads()


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def files(request, tmp_path):
    with closing(EngineRig(request.param, tmp_path, num_bytes=264, depth=2, direct=True)) as rig:
        yield rig


# memory


def test_a_source_s_memory_lives_until_the_read_has_landed(rig):
    rig.source.gate.clear()
    memory = new_memory()
    gone = weakref.ref(memory)
    job = rig.submit([1], alive=(memory,))
    rig.source.begun.wait()
    result = job.result
    del memory, job
    gc.collect()
    assert gone() is not None
    rig.source.gate.set()
    while not q.wait_done(rig.reader._queue, result):
        pass
    rig.close()
    assert gone() is None


def test_a_file_s_memory_lives_until_the_read_has_landed(files):
    memory = new_memory()
    gone = weakref.ref(memory)
    rows, due = np.array([5]), 0
    files.flags[5] = files.reader.num_reads
    targets = Targets(files.slots.ctypes.data, 264, 0, 264, files.flags.ctypes.data, 1)
    job = files.reader.submit(rows, rows.astype(np.int32), np.empty(0, np.int64), targets, due, (memory,))
    result = job.result
    del memory, job
    gc.collect()
    assert gone() is not None
    files.engine.start()
    while not q.wait_done(files.engine.queue, result):
        pass
    files.wait(files.submit([6]))
    assert files.has([5, 6]).all()
    assert gone() is None


def test_a_source_for_whose_records_there_is_no_memory(rig, monkeypatch):
    class Huge:
        @property
        def record_bytes(self):
            raise MemoryError("no room")

    monkeypatch.setattr(rig.source, "record", Huge())
    job = rig.submit([1])
    job.wait()
    assert rig.flags[1] == q.FAILED
    with pytest.raises(MemoryError, match="no room"):
        rig.reader.raise_error(job)
    monkeypatch.undo()
    rig.submit([1, 2]).wait()
    assert rig.has([1, 2])


class Interrupt(Exception):
    """What a signal's handler raises."""


def test_a_store_whose_close_was_interrupted_and_that_nobody_has_any_more():
    def interrupt(*_):
        raise Interrupt

    source = FaultySource(OracleSource(20_000, ENGRAM))
    source.gate.clear()
    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        store = Store.open(config_of(capacity="64MiB"), tables={"t": source})
        ticket = store.prefetch(range(20_000))
        source.begun.wait()
        main = threading.get_ident()
        timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGUSR1))
        timer.start()
        with pytest.raises(Interrupt):
            store.close()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    timer.join()
    del store, ticket
    gc.collect()
    source.gate.set()
    while not source.num_closes:
        time.sleep(0.01)
    assert len(source.reads) == source.num_closes == 1


@pytest.mark.parametrize("stage", ["full", "queued"])
def test_an_interrupted_submit_leaves_nothing_under_way(files, monkeypatch, stage):
    def interrupt(*_):
        raise Interrupt

    if stage == "full":
        others = [files.submit([row]) for row in range(q.MAX_JOBS)]
        monkeypatch.setattr(q, "wait_any", interrupt)
    else:
        others = [files.submit([0])]
        monkeypatch.setattr(files.engine, "wake", interrupt)
    held = len(files.engine.underway._held)
    with pytest.raises(Interrupt):
        files.submit([299])
    monkeypatch.undo()
    assert len(files.engine.underway._held) == held
    assert files.engine.queue.control[q.ACTIVE] == len(others)
    files.engine.start()
    for job in others:
        files.wait(job)
    assert not files.slots[299].any()
    files.wait(files.submit([299]))
    assert files.has([299]).all()


# order


def test_a_read_that_was_given_up_before_it_began_is_not_done(rig):
    rig.source.gate.clear()
    first = rig.submit([0])
    rig.source.begun.wait()
    others = [rig.submit([row]) for row in range(1, 10)]
    for job in (first, *others):
        job.cancel()
    assert not first.done
    for job in others:
        assert job.done
        assert job.result[q.ERRNO] == errno.ECANCELED
        with pytest.raises(OSError, match=r"(?i)cancel"):
            rig.reader.raise_error(job)
    assert (rig.flags[1:10] == q.FAILED).all()
    last = rig.submit([50])
    rig.source.gate.set()
    last.wait()
    assert rig.has([0, 50])
    assert rig.read_rows() == [0, 50]


def test_a_source_is_read_in_the_order_of_deadlines(rig):
    rig.source.gate.clear()
    rig.submit([0])
    rig.source.begun.wait()
    jobs = [rig.submit([row], due_s=60 - row) for row in range(1, 6)]
    urgent = [rig.submit([row]) for row in (10, 11)]
    waiting = threading.Thread(target=jobs[1].wait)
    waiting.start()
    while jobs[1].task.due_ns > jobs[4].task.due_ns:
        pass
    rig.source.gate.set()
    for job in (*jobs, *urgent):
        while not q.wait_done(rig.reader._queue, job.result):
            pass
    waiting.join()
    assert rig.read_rows() == [0, 10, 11, 2, 5, 4, 3, 1]


def test_rows_that_an_urgent_read_wants_of_another_come_first(rig):
    rig.source.gate.clear()
    rig.submit([0])
    rig.source.begun.wait()
    rig.submit([1], due_s=30)
    holder = rig.submit([2, 3], due_s=60)
    rig.submit([4], wanted=[3])
    rig.source.gate.set()
    while not q.wait_done(rig.reader._queue, holder.result):
        pass
    rig.close()
    assert rig.read_rows()[:2] == [0, 2]


# the end


def test_a_source_whose_thread_cannot_be_started(rig, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start new thread"):
            rig.submit([1])
    rig.submit([1, 2]).wait()
    assert rig.has([1, 2])


def test_a_closed_reader_takes_nothing(rig):
    rig.submit([1]).wait()
    rig.close()
    with pytest.raises(ClosedError):
        rig.submit([2])
    rig.close()
    assert rig.source.num_closes == 1


class Model:
    """Whatever refers to a store and to itself."""


def test_a_store_that_its_source_s_own_thread_collects():
    class Collecting(FaultySource):
        def read(self, rows, out):
            super().read(rows, out)
            gc.collect()

    source = Collecting(OracleSource(20_000, ENGRAM))
    source.gate.clear()
    gc.disable()
    try:
        model = Model()
        model.me = model
        model.store = Store.open(config_of(capacity="64MiB"), tables={"t": source})
        model.ticket = model.store.prefetch(range(20_000))
        source.begun.wait()
        reading = store_threads()
        del model
        source.gate.set()
        for thread in reading:
            thread.join(60)
    finally:
        gc.enable()
    assert source.num_closes == 1
    assert not store_threads()


def test_threads_that_fetch_while_the_process_ends():
    code = """
import threading, time
from stores import ENGRAM, config_of
from tiercache.errors import ClosedError
from tiercache.store import Store
from tiercache.testing import OracleSource
store = Store.open(config_of(capacity=2640), tables={"t": OracleSource(500, ENGRAM)})
def work():
    end = time.monotonic() + 1
    try:
        while time.monotonic() < end:
            store.fetch(range(0, 500, 9))
    except ClosedError:
        pass
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
store.fetch([1])
"""
    assert in_process(code) == ""


def test_a_fork_leaves_a_source_to_its_process(tmp_path: Path):
    code = """
import os
from stores import ENGRAM, config_of
from tiercache.store import Store
from tiercache.testing import FaultySource, OracleSource
source = FaultySource(OracleSource(500, ENGRAM))
store = Store.open(config_of(), tables={"t": source})
store.fetch([1])
child = os.fork()
if child == 0:
    store.close()
    os._exit(source.num_closes)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
store.close()
assert source.num_closes == 1
"""
    assert in_process(code) == ""
