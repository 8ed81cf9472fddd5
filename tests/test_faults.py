"""Faults under an open store: a clear error, nothing half-read is kept, the next call works."""

import contextlib
import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from stores import ENGINES, ENGRAM, KINDS, config_of, is_exact, write_rows, write_shards

from tiercache.errors import StorageError
from tiercache.flights import Flights
from tiercache.level import Level
from tiercache.storage import probe
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import pack_rows
from tiercache.storage.reader import FileReader, Job
from tiercache.store import Store
from tiercache.testing import FaultySource, OracleSource, broken, oracle
from tiercache.tiers.host import HostTier


@pytest.fixture(params=ENGINES)
def engine(request) -> str:
    return request.param


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "t.safetensors", 500, 264)


@pytest.fixture
def source():
    return FaultySource(OracleSource(100, ENGRAM))


# files that change under an open store


def modify(path):
    with open(path, "r+b") as content:
        content.seek(-1000, os.SEEK_END)
        content.write(b"\x00" * 500)


def replace(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 1000), "ends too soon|changed since"),
        (modify, "changed"),
        (replace, "replaced"),
        (os.unlink, "deleted"),
    ],
    ids=["shrank", "modified", "replaced", "deleted"],
)
@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_changes_under_a_store(file, engine, direct, change, message):
    config = config_of(file, engine=engine, direct=direct, capacity=264 * 20)
    with Store.open(config, tables={"memory": oracle(np.arange(500), 264)}) as store:
        assert is_exact(store, [0, 1, 498], "file")
        change(file)
        for rows in ([499, 7], [1, 400]):
            with pytest.raises(StorageError, match=message) as caught:
                store.fetch(rows, table="file")
            assert caught.value.filename == str(file)
            store.check()
        assert is_exact(store, [498, 1, 0, 1], "file")
        assert is_exact(store, range(0, 500, 7), "memory")
        assert store.stats().host.pinned_slots == 0


@pytest.mark.parametrize("share", ["taken", "dropped"])
def test_what_a_prefetch_brought_of_a_changed_file_is_not_served(file, engine, share):
    with Store.open(config_of(file, engine=engine)) as store:
        modify(file)
        ticket = store.prefetch([499, 498])
        if share == "taken":
            with pytest.raises(StorageError, match="changed"):
                ticket.take()
        else:
            while not ticket.done:
                pass
            del ticket
        with pytest.raises(StorageError, match="changed"):
            store.fetch([498])


def test_bytes_of_a_changed_file_never_arrive(file, engine):
    with Store.open(config_of(file, engine=engine)) as store:
        modify(file)
        ticket = store.prefetch(range(490, 500))
        while not ticket.done:
            pass
        for call in (lambda: store.fetch(range(495, 500)), ticket.take):
            with pytest.raises(StorageError, match="changed"):
                call()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("kind", ["fetch", "prefetch"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Level, "make_room"),
        (Level, "plan_into"),
        (Flights, "_begin"),
        (HostTier, "staging"),
        (FileReader, "submit"),
        (Job, "wait"),
        (HostTier, "gather"),
    ],
)
def test_whatever_interrupts_a_call_leaves_no_slot_behind(file, engine, monkeypatch, owner, name, kind, raised):
    """An exception before and after each step of a call, as a signal's handler raises it."""
    original = getattr(owner, name)
    for after in (False, owner is not FileReader):
        with Store.open(config_of(file, engine=engine, capacity=264 * 50)) as store:
            store.fetch(range(20))

            def interrupted(*args, after=after, **kwargs):
                if after:
                    original(*args, **kwargs)
                raise raised

            monkeypatch.setattr(owner, name, interrupted)
            with contextlib.suppress(raised):
                getattr(store, kind)(range(10, 90))
            monkeypatch.setattr(owner, name, original)
            assert is_exact(store, range(100))
            while store.stats().flights:
                store.check()
            store.check()
            assert store.stats().host.pinned_slots == 0


def test_an_interrupted_cancel_leaves_no_slot_behind(file, engine, monkeypatch):
    def interrupted(job):
        raise KeyboardInterrupt

    with Store.open(config_of(file, engine=engine)) as store:
        for row in range(5):
            ticket = store.prefetch([row])
            with monkeypatch.context() as patch:
                patch.setattr(Job, "cancel", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    ticket.cancel()
        while store.stats().flights:
            store.check()
        assert store.stats().host.pinned_slots == 0
        assert is_exact(store, range(20))


def test_a_fetch_that_waits_for_a_prefetch_of_a_changed_file(file, engine, monkeypatch):
    kind = KINDS[engine]
    start = kind.start
    monkeypatch.setattr(kind, "start", lambda engine: None)
    monkeypatch.setattr(probe, "_read", lambda *arguments: 0)
    with Store.open(config_of(file, engine=engine)) as store, ThreadPoolExecutor(1) as pool:
        modify(file)
        ticket = store.prefetch([499, 498])
        waiting = pool.submit(store.fetch, [498])
        while store.stats().storage.jobs < 2:
            pass
        start(store._disk.engine)
        for call in (waiting.result, ticket.take):
            with pytest.raises(StorageError, match="changed"):
                call()
        assert store.stats().host.used_slots == 0


def test_a_page_that_does_not_match_its_checksum_is_named(tmp_path, engine):
    pack_rows(MemoryTable(oracle(np.arange(500), 264), ENGRAM), tmp_path / "t")
    chunk = tmp_path / "t" / "rows" / "c" / "0" / "0"
    with open(chunk, "r+b") as content:
        content.seek(3 * 4096 + 17)
        content.write(bytes([content.read(1)[0] ^ 1]))
    config = config_of(tmp_path / "t", engine=engine, verify="page")
    with Store.open(config) as store:
        with pytest.raises(StorageError, match=r"page 3 does not match its checksum.*rows/c/0/0") as caught:
            store.fetch([0, 3 * 4096 // 264 + 1, 400])
        assert caught.value.errno == errno.EUCLEAN
        assert store.stats().host.used_slots == 0
        assert is_exact(store, range(0, 40))
        assert is_exact(store, range(64, 500))


# reads that fail


@pytest.fixture
def shards(tmp_path) -> Path:
    return write_shards(tmp_path, oracle(np.arange(300), 264), 3)


def config_of_shards(shards, **settings):
    config = config_of(shards, **settings)
    config["table"][0]["fields"] = ["rows.{shard}"]
    return config


@pytest.mark.parametrize("number", [errno.EIO, errno.EISDIR, errno.ENODATA])
@pytest.mark.parametrize("slots", [1, 4, 300])
def test_a_failure_in_the_middle_of_a_batch(shards, engine, number, slots, tmp_path):
    (tmp_path / "cut").write_bytes(b"")
    by = {errno.EIO: "/proc/self/mem", errno.EISDIR: tmp_path, errno.ENODATA: tmp_path / "cut"}[number]
    with Store.open(config_of_shards(shards, engine=engine, capacity=264 * slots)) as store:
        store.fetch([0])
        with broken(tmp_path / "1.safetensors", by):
            for _ in range(2):
                with pytest.raises(StorageError, match=r"offset \d+; \d of \d reads failed") as caught:
                    store.fetch([0, 20, 150, 250, 110])
                assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "1.safetensors"))
                store.check()
                stats = store.stats()
                assert (stats.flights, stats.host.pinned_slots, stats.host.used_slots) == (0, 0, 1)
            with pytest.raises(StorageError):
                store.prefetch([120, 0]).take()
            assert is_exact(store, [20, 0, 299, 20])
        assert is_exact(store, [150, 250, 110, 0, 20])
        assert is_exact(store, range(300))


def test_a_record_of_which_one_field_failed_is_not_kept(tmp_path, engine):
    records = oracle(np.arange(50), 264)
    for name, part, dtype in (("w", records[:, :256], "float8_e4m3fn"), ("s", records[:, 256:], "float8_e8m0fnu")):
        from safetensors.torch import save_file

        save_file({name: torch.from_numpy(part.copy()).view(getattr(torch, dtype))}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "w.safetensors", "s": "s.safetensors"}}')
    config = config_of(index, engine=engine)
    config["table"][0]["fields"] = ["w", "s"]
    with Store.open(config) as store:
        for name in ("w", "s"):
            with broken(tmp_path / f"{name}.safetensors"), pytest.raises(StorageError, match=f"{name}.safetensors"):
                store.fetch([1, 2])
            assert store.stats().host.used_slots == 0
        assert is_exact(store, [2, 1])


def test_reads_that_o_direct_refuses(file, engine):
    with Store.open(config_of(file, engine=engine, direct=False)) as store:
        with broken(file, file, os.O_DIRECT):
            with pytest.raises(StorageError, match=r"Invalid argument .*offset \d+") as caught:
                store.fetch([3])
            assert caught.value.errno == errno.EINVAL
        assert is_exact(store, [3])


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "wtinylfu"])
def test_a_source_that_fails(source, policy):
    source.errors[7] = errno.EIO
    source.short.add(9)
    with Store.open(config_of(capacity=264 * 5, policy=policy), tables={"t": source}) as store:
        store.fetch([1])
        for row, number in ((7, errno.EIO), (9, errno.ENODATA)):
            with pytest.raises(StorageError, match="the source failed") as caught:
                store.fetch([1, 2, row, 3])
            assert caught.value.errno == number
            assert store.stats().host.used_slots == 1
        source.errors.clear()
        source.short.clear()
        assert is_exact(store, [9, 2, 7, 1])


def test_what_else_a_source_raises_comes_through(source, monkeypatch):
    def read(rows, out):
        raise ZeroDivisionError("of the source")

    with Store.open(config_of(), tables={"t": source}) as store:
        with monkeypatch.context() as patch:
            patch.setattr(source, "read", read)
            with pytest.raises(ZeroDivisionError, match="of the source"):
                store.fetch([1])
            ticket = store.prefetch([2])
            with pytest.raises(ZeroDivisionError):
                ticket.take()
        assert is_exact(store, [1, 2])


def test_a_ticket_that_failed_and_was_dropped_leaves_nothing_behind(source):
    source.errors[7] = errno.EIO
    with Store.open(config_of(), tables={"t": source}) as store:
        ticket = store.prefetch([6, 7])
        while not ticket.done:
            pass
        del ticket
        source.errors.clear()
        assert is_exact(store, [7, 6])
        assert store.stats().host.pinned_slots == 0


def test_a_ring_that_breaks_fails_reads_and_not_the_process(file):
    with Store.open(config_of(file, engine="uring")) as store:
        store.fetch([1])
        rings = [name for name in os.listdir("/proc/self/fd") if "io_uring" in link_of(name)]
        null = os.open(os.devnull, os.O_RDONLY)
        for ring in rings:
            os.dup2(null, int(ring), inheritable=False)
        os.close(null)
        for _ in range(2):
            with pytest.raises(StorageError):
                store.fetch([400])
        assert is_exact(store, [1])


def link_of(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""
