"""What the kernel refuses when a store opens, and how a store ends: close, fork, exit, garbage collection."""

import errno
import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import (
    ENGINES,
    ENGRAM,
    KINDS,
    config_of,
    descriptors_of,
    in_process,
    is_exact,
    oracle_tensor,
    store_threads,
    write_rows,
)

from tiercache.errors import ClosedError, StorageError
from tiercache.storage import disk, files, probe, uring
from tiercache.storage.queue import stop
from tiercache.store import Store
from tiercache.testing import FaultySource, OracleSource


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "t.safetensors", 500, 264)


@pytest.fixture
def source():
    return FaultySource(OracleSource(100, ENGRAM))


# what the kernel refuses


@pytest.mark.parametrize("name", ["uring", "auto"])
def test_io_uring_refused_is_told_once(file, monkeypatch, name):
    monkeypatch.setattr(uring, "syscall", lambda *words: -errno.EPERM)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns(RuntimeWarning, match=r"io_uring is refused .*reading with threads") as told:
        store = Store.open(config_of(file, engine=name))
    with store:
        assert len(told) == 1
        assert store.stats().storage.engine == "threads"
        assert len(store.stats().storage.notes) == 1
        assert is_exact(store, range(0, 500, 3))
    assert len(os.listdir("/proc/self/fd")) == before


_ENTER_REFUSED = """
import ctypes, struct, sys, warnings
from stores import config_of, is_exact
from tiercache import Store

# A seccomp filter: io_uring_enter (426) fails with EPERM, everything else is allowed.
words = [(0x20, 0, 0, 0), (0x15, 0, 1, 426), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *word) for word in words))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(words), ctypes.addressof(program)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    store = Store.open(config_of(sys.argv[1], engine=sys.argv[2]))
with store:
    assert is_exact(store, range(50))
    print(len(told), store.stats().storage.engine, told[0].message)
"""


@pytest.mark.parametrize("name", ["uring", "auto"])
def test_io_uring_whose_use_is_refused_is_told_once(file, name):
    told = in_process(_ENTER_REFUSED, file, name)
    assert told == "1 threads tiercache: io_uring is refused (Operation not permitted); reading with threads\n"


def test_io_uring_that_does_not_know_a_read(file, monkeypatch):
    unknown = 200
    monkeypatch.setattr(uring, "_READ_FIXED", unknown)
    monkeypatch.setattr(uring.UringEngine, "_register_buffer", lambda engine: True)
    with pytest.warns(RuntimeWarning, match=r"io_uring is refused \(Invalid argument\); reading with threads"):
        store = Store.open(config_of(file, engine="uring"))
    with store:
        assert is_exact(store, range(50))
    assert not store_threads()


@pytest.mark.parametrize("stage", ["thread", "reader"])
def test_an_open_that_fails_leaves_nothing_behind(file, monkeypatch, engine, stage):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    def start(thread):
        if any(other is not thread for other in store_threads()) or engine == "uring":
            refuse()
        original(thread)

    original = threading.Thread.start
    before = len(os.listdir("/proc/self/fd"))
    if stage == "thread":
        monkeypatch.setattr(threading.Thread, "start", start)
    else:
        monkeypatch.setattr(disk, "new_layout", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Store.open(config_of(file, engine=engine))
    assert not store_threads()
    gc.collect()  # an engine and its thread that never began refer to each other
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_directory_for_compiled_code_is_told_once():
    code = """
import warnings
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes = []
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from tiercache.policies.keyset import mix
assert 0 <= mix(5) < 2**32
print(len(told), told[0].category.__name__, "NUMBA_CACHE_DIR" in str(told[0].message))
"""
    assert in_process(code) == "1 RuntimeWarning True\n"


@pytest.mark.parametrize("refused", [uring.SYS_IO_URING_SETUP, uring.SYS_IO_URING_REGISTER])
def test_io_uring_of_an_older_kernel_or_with_little_locked_memory(file, monkeypatch, refused):
    calls = []

    def syscall(number, a, b, *rest):
        calls.append(number)
        if number == refused and calls.count(number) == 1:
            return -errno.EINVAL if number == uring.SYS_IO_URING_SETUP else -errno.ENOMEM
        return original(number, a, b, *rest)

    original = uring.syscall
    Store.open(config_of(file, engine="uring")).close()  # so that `serve` is compiled with the original
    monkeypatch.setattr(uring, "syscall", syscall)
    with Store.open(config_of(file, engine="uring")) as store:
        assert refused in calls
        assert (store.stats().storage.engine, store.stats().storage.notes) == ("uring", ())
        assert is_exact(store, range(0, 500, 3))


@pytest.mark.parametrize("stage", ["open", "read"])
def test_o_direct_refused_is_told_once(file, monkeypatch, engine, stage):
    def refuse_open(path, flags):
        if flags & os.O_DIRECT:
            raise StorageError(errno.EINVAL, "Invalid argument", str(path))
        return original(path, flags)

    original = files._open
    if stage == "open":
        monkeypatch.setattr(files, "_open", refuse_open)
    else:
        monkeypatch.setattr(files, "pread", lambda *arguments: -errno.EINVAL)
    with pytest.warns(RuntimeWarning, match=r"O_DIRECT .*t\.safetensors") as told:
        store = Store.open(config_of(file, engine=engine))
    with store:
        assert len(told) == 1
        assert store.stats().storage.alignment == 1
        assert "O_DIRECT" in store.stats().storage.notes[0]
        assert is_exact(store, range(0, 500, 3))
        assert descriptors_of(file) == 1


def test_a_file_system_in_memory(engine, tmp_path):
    shared = Path("/dev/shm")
    if not shared.is_dir():
        pytest.skip("this machine has no /dev/shm")
    directory = shared / f"tiercache-{os.getpid()}-{engine}"
    directory.mkdir()
    try:
        config = config_of(write_rows(directory / "t.safetensors", 500, 264), engine=engine)
        with Store.open(config) as store:
            assert is_exact(store, range(0, 500, 3))
    finally:
        shutil.rmtree(directory)


# the end


def test_nothing_works_after_close_and_a_second_close_does_nothing(file, source, engine):
    store = Store.open(config_of(file, engine=engine), tables={"source": source})
    ready, resident = store.prefetch([1], table="file"), store.prefetch([], table="file")
    store.close()
    store.close()
    calls = [
        lambda: store.fetch([1], table="file"),
        lambda: store.fetch([], table="source"),
        lambda: store.prefetch([1], table="source"),
        store.stats,
        ready.take,
        resident.take,
        store.__enter__().stats,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()
    store.check()
    assert source.num_closes == 1
    assert not store_threads()
    assert descriptors_of(file) == 0


def hold(monkeypatch, kind):
    """An engine of this kind begins to read only when it is closed."""
    start, close = kind.start, kind.close

    def late(engine):
        stop(engine.queue)
        start(engine)
        close(engine)

    monkeypatch.setattr(kind, "start", lambda engine: None)
    monkeypatch.setattr(probe, "_read", lambda *arguments: 0)
    monkeypatch.setattr(kind, "close", late)


def test_close_during_a_prefetch_that_another_thread_waits_for(file, engine, monkeypatch):
    hold(monkeypatch, KINDS[engine])
    store = Store.open(config_of(file, engine=engine))
    tickets = [store.prefetch(range(0, 500, 20)), store.prefetch(range(0, 500, 25), deadline=9)]
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ticket.take) for ticket in tickets]
        waiting.append(pool.submit(store.fetch, range(10, 500, 20)))
        while store.stats().storage.jobs < 3:
            pass
        store.close()
        for future in waiting:
            with pytest.raises(ClosedError):
                future.result()
    assert not store_threads()


def test_close_while_a_source_reads(source):
    source.gate.clear()
    store = Store.open(config_of(), tables={"t": source})
    tickets = [store.prefetch([number]) for number in range(5)]
    source.begun.wait()
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(ticket.take, raw=True) for ticket in tickets]
        closing = pool.submit(store.close)
        while not store._flights.closed:
            pass
        source.gate.set()
        closing.result()
        try:
            landed = waiting[0].result()
        except ClosedError:
            landed = oracle_tensor([0], 264)
        assert torch.equal(landed, oracle_tensor([0], 264))
        for future in waiting[1:]:
            with pytest.raises(ClosedError):
                future.result()
    assert len(source.reads) == 1


def test_close_ends_everything_though_a_source_cannot_be_closed(file, source, monkeypatch):
    def fail():
        raise OSError("no")

    other = FaultySource(OracleSource(5, ENGRAM))
    monkeypatch.setattr(source, "close", fail)
    store = Store.open(config_of(file), tables={"bad": source, "good": other})
    with pytest.raises(OSError, match="no"):
        store.close()
    assert other.num_closes == 1
    assert not store_threads()
    assert descriptors_of(file) == 0


def test_a_store_that_nobody_has_any_more_ends_its_threads(file, source, engine):
    store = Store.open(config_of(file, engine=engine), tables={"source": source})
    gone = weakref.ref(store)
    ticket = store.prefetch(range(300), table="file")
    assert store_threads()
    del store
    assert torch.equal(ticket.take(), oracle_tensor(np.arange(300), 264))
    del ticket
    assert gone() is None
    assert source.num_closes == 1
    assert not store_threads()
    assert descriptors_of(file) == 0


def test_a_process_that_ends_with_an_open_store(file, engine):
    code = """
import sys
from stores import config_of
from tiercache.records import plain
from tiercache.store import Store
from tiercache.testing import OracleSource
store = Store.open(config_of(sys.argv[1], engine=sys.argv[2]), tables={"source": OracleSource(99, plain("U8", 264))})
tickets = [store.prefetch(range(500), table="file", deadline=60) for _ in range(3)] + [store.prefetch([5], table="source")]
print("end")
"""
    assert in_process(code, file, engine) == "end\n"


def test_a_forked_process_cannot_use_the_store_and_ends_well(file, engine):
    code = """
import os, sys, threading
from stores import config_of, oracle_tensor
from tiercache.errors import ClosedError
from tiercache.records import plain
from tiercache.store import Store
from tiercache.testing import OracleSource
import torch
store = Store.open(config_of(sys.argv[1], engine=sys.argv[2], capacity=2640), tables={"s": OracleSource(500, plain("U8", 264))})
ticket = store.prefetch([3], table="file")
ended = threading.Event()
def work(table):
    while not ended.is_set():
        assert torch.equal(store.fetch(range(0, 500, 9), table=table), oracle_tensor(range(0, 500, 9), 264))
threads = [threading.Thread(target=work, args=(table,)) for table in ("file", "s")]
for thread in threads:
    thread.start()
for number in range(8):
    child = os.fork()
    if child == 0:
        ended.set()
        for call in (lambda: store.fetch([1], table="s"), lambda: store.prefetch([1], table="file"), ticket.take, ticket.cancel,
                     store.stats, store.check):
            try:
                call()
                os._exit(3)
            except ClosedError as error:
                assert "another process" in str(error)
        if number % 2:
            store.close()
        sys.exit(7)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 7, status
ended.set()
for thread in threads:
    thread.join()
assert torch.equal(ticket.take(), oracle_tensor([3], 264))
store.check()
store.close()
print("end")
"""
    assert in_process(code, file, engine) == "end\n"
