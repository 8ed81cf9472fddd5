"""The gds engine and `load`, over a driver: the machine's own or a stub. `test_gds.py` runs this file in its own process."""

import errno
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import kvikio
import numpy as np
import pytest
import torch
from stores import ENGRAM, config_of, descriptors_of, is_exact, oracle_tensor, store_threads, write_engram, write_rows
from typer.testing import CliRunner

from tiercache import cli
from tiercache.errors import ClosedError, StorageError
from tiercache.storage import gds, open_table
from tiercache.storage.gds import GdsEngine, load
from tiercache.storage.image import about_tables, open_image
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import pack_rows
from tiercache.storage.queue import stop
from tiercache.storage.table import open_file
from tiercache.store import Store
from tiercache.testing import EngineContract, broken, oracle


class TestGds(EngineContract):
    kind = GdsEngine


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "t.safetensors", 500, 264)


@contextmanager
def opened(path, **settings):
    """A store of one table, read by kvikio; that it says what it cannot do is tested once."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        store = Store.open(config_of(path, engine="gds", **settings))
    with store:
        yield store


# the store


@pytest.mark.parametrize("direct", [True, False])
def test_what_the_machine_withholds_is_told_once(file, direct):
    compat = kvikio.defaults.is_compat_mode_preferred()
    with warnings.catch_warnings(record=True, action="always") as told:
        store = Store.open(config_of(file, engine="gds", direct=direct))
    with store:
        storage = store.stats().storage
        assert storage.engine == "gds"
        assert [str(warning.message) for warning in told] == [f"tiercache: {note}" for note in storage.notes]
        assert ("gds reads in compat mode (no GPUDirect Storage here)" in storage.notes) == compat
        assert any("page cache" in note for note in storage.notes) == (storage.alignment > 1) == direct


def test_inspect_tells_it_too(file):
    result = CliRunner().invoke(cli.app, ["inspect", str(file), "--engine", "gds"])
    assert result.exit_code == 0, result.output
    assert ("compat mode" in result.output) == kvikio.defaults.is_compat_mode_preferred()
    assert "gds, reads aligned to" in result.output


@pytest.mark.parametrize("depth", [1, 8, 128])
@pytest.mark.parametrize("direct", [True, False])
def test_rows_are_exact(file, direct, depth):
    with opened(file, direct=direct, queue_depth=depth, capacity=264 * 40) as store:
        random = np.random.default_rng(0)
        for num_rows in (1, 7, 500, 3000):
            assert is_exact(store, random.integers(0, 500, num_rows))
        assert is_exact(store, [499, 0, 499])
        assert store.stats().storage.reads > 0
    assert not store_threads()
    assert descriptors_of(file) == 0


def test_rows_in_two_fields_and_long_ones(tmp_path):
    records = oracle(np.arange(400), 264)
    write_engram(tmp_path / "engram.safetensors", records)
    config = config_of(tmp_path / "engram.safetensors", engine="gds")
    config["table"][0]["fields"] = ["weight", "scale"]
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        store = Store.open(config)
    with store:
        assert is_exact(store, range(0, 400, 3))
    long = 5 << 20
    with opened(write_rows(tmp_path / "long.safetensors", 3, long), capacity=4 * long) as store:
        assert torch.equal(store.fetch([2, 0], raw=True), oracle_tensor([2, 0], long))


def test_pages_are_compared_with_their_checksums(tmp_path):
    pack_rows(MemoryTable(oracle(np.arange(500), 264), ENGRAM), tmp_path / "t")
    chunk = tmp_path / "t" / "rows" / "c" / "0" / "0"
    with open(chunk, "r+b") as content:
        content.seek(3 * 4096 + 17)
        content.write(bytes([content.read(1)[0] ^ 1]))
    with opened(tmp_path / "t", verify="page") as store:
        with pytest.raises(StorageError, match="page 3 does not match its checksum"):
            store.fetch([3 * 4096 // 264 + 1])
        assert is_exact(store, range(40))
        assert is_exact(store, range(64, 500))


@pytest.mark.parametrize("number", [errno.EIO, errno.EISDIR, errno.ENODATA])
@pytest.mark.parametrize("warm", [True, False])
def test_a_fault_is_an_error_and_the_next_call_works(file, tmp_path, number, warm):
    (tmp_path / "cut").write_bytes(file.read_bytes()[:20_000])
    by = {errno.EIO: "/proc/self/mem", errno.EISDIR: tmp_path, errno.ENODATA: tmp_path / "cut"}[number]
    with opened(file) as store:
        if warm:
            assert is_exact(store, [1])
        with broken(file, by):
            if number == errno.ENODATA:
                with pytest.raises(StorageError, match="changed"):
                    store.fetch([5])
            for _ in range(2):
                with pytest.raises(StorageError, match=r"offset \d+; 1 of 1 reads failed") as caught:
                    store.fetch([400])
                assert (caught.value.errno, caught.value.filename) == (number, str(file))
        assert is_exact(store, range(0, 500, 7))
    assert descriptors_of(file) == 0


@pytest.mark.parametrize("change", ["shrank", "replaced"])
def test_a_file_that_changes_under_a_store(file, change):
    with opened(file) as store:
        assert is_exact(store, [0, 1])
        if change == "shrank":
            os.truncate(file, 1000)
        else:
            os.replace(write_rows(file.with_suffix(".new"), 500, 264), file)
        for _ in range(2):
            with pytest.raises(StorageError, match={"shrank": "ends too soon", "replaced": "replaced"}[change]):
                store.fetch([400])
        assert is_exact(store, [1, 0])


# the end


def test_close_while_others_fetch_and_wait(file, monkeypatch):
    start, close = GdsEngine.start, GdsEngine.close

    def late(engine):
        stop(engine.queue)
        start(engine)
        close(engine)

    monkeypatch.setattr(GdsEngine, "start", lambda engine: None)
    monkeypatch.setattr(GdsEngine, "close", late)
    with opened(file) as store, ThreadPoolExecutor(3) as pool:
        tickets = [store.prefetch(range(0, 500, 20)), store.prefetch(range(0, 500, 25), deadline=9)]
        waiting = [pool.submit(ticket.take) for ticket in tickets] + [pool.submit(store.fetch, range(10, 500, 20))]
        while store.stats().storage.jobs < 3:
            pass
        store.close()
        for future in waiting:
            with pytest.raises(ClosedError):
                future.result()
    assert not store_threads()


@pytest.mark.parametrize("seed", range(5))
def test_close_in_the_middle_of_reads(file, seed):
    begun = threading.Event()

    def work():
        random = np.random.default_rng(seed)
        try:
            while True:
                rows = random.integers(0, 500, 60)
                assert torch.equal(store.fetch(rows, raw=True), oracle_tensor(rows, 264))
                begun.set()
        except ClosedError:
            pass

    with opened(file, capacity=264 * 4) as store, ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work) for _ in range(3)]
        begun.wait()
        store.close()
        for worker in workers:
            worker.result()
    assert not store_threads()
    assert descriptors_of(file) == 0


@pytest.mark.parametrize("where", ["pread", "done", "get"])
def test_an_engine_that_ends_unexpectedly_fails_every_job(file, monkeypatch, where):
    """Whether an error that kvikio is not known to raise comes before, during or after a read."""
    due, hooked = [where], []

    def fail(here):
        if here in due:
            due.remove(here)
            raise ZeroDivisionError

    class Future:
        def __init__(self, future):
            self._future = future

        def done(self):
            fail("done")
            return self._future.done()

        def get(self):
            num_bytes = self._future.get()
            fail("get")
            return num_bytes

    class CuFile(kvikio.CuFile):
        def pread(self, *arguments):
            fail("pread")
            return Future(super().pread(*arguments))

    monkeypatch.setattr(kvikio, "CuFile", CuFile)
    monkeypatch.setattr(threading, "excepthook", hooked.append)
    with opened(file) as store:
        waiting = store.prefetch(range(0, 500, 30))
        for call in (waiting.take, lambda: store.fetch([1]), lambda: store.fetch(range(0, 500, 20))):
            with pytest.raises(StorageError):
                call()
    assert [caught.exc_type for caught in hooked] == [ZeroDivisionError]
    assert not store_threads()
    assert descriptors_of(file) == 0


def test_a_read_that_a_signal_interrupted_is_read_again(file, monkeypatch):
    failed = []

    class CuFile(kvikio.CuFile):
        def pread(self, *arguments):
            if not failed:
                failed.append(arguments)
                raise RuntimeError(f"KvikIO failure at: somewhere: POSIX error on pread: {os.strerror(errno.EINTR)}")
            return super().pread(*arguments)

    monkeypatch.setattr(kvikio, "CuFile", CuFile)
    with opened(file) as store:
        assert is_exact(store, [3])
    assert failed


# loads


@pytest.fixture
def extent(tmp_path):
    """A file and its bytes: a few tasks, and a length that no page divides."""
    content = oracle([0], 3 * (1 << 20) + 777)[0]
    (tmp_path / "extent.bin").write_bytes(content)
    return tmp_path / "extent.bin", content


@pytest.mark.parametrize(
    ("offset", "num_bytes"), [(0, 65536), (4096, 2 << 20), (777, 3 << 20), (0, (3 << 20) + 777), (5, 1), (9, 0)]
)
def test_a_load_is_exact(extent, offset, num_bytes):
    path, content = extent
    target = np.full(num_bytes + 10, 0xEE, np.uint8)
    load(open_file(path), offset, num_bytes, target)
    assert np.array_equal(target[:num_bytes], content[offset : offset + num_bytes])
    assert (target[num_bytes:] == 0xEE).all()
    assert descriptors_of(path) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_load_into_a_tensor(extent, dtype):
    path, content = extent
    target = torch.zeros((256, 1024), dtype=dtype, requires_grad=dtype == torch.float32)
    load(open_file(path), 512, target.nbytes, target)
    assert np.array_equal(target.detach().view(torch.uint8).numpy().ravel(), content[512 : 512 + target.nbytes])


def test_loads_from_many_threads(extent):
    path, content = extent
    targets = np.zeros((16, 1 << 20), np.uint8)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: load(open_file(path), number * 1000, 1 << 20, targets[number]), range(16)))
    for number, target in enumerate(targets):
        assert np.array_equal(target, content[number * 1000 : number * 1000 + (1 << 20)])


def test_a_load_that_fails_says_what_where_and_why(extent, tmp_path):
    path, content = extent
    target = torch.zeros(4 << 20, dtype=torch.uint8)
    cases = [
        (path, 1 << 20, (2 << 20) + 778, errno.ENODATA, r"too soon \(load of 2097930 bytes at offset 1048576, .* 3145728\)"),
        (path, content.size, 1, errno.ENODATA, "ends too soon"),
        (Path("/proc/self/mem"), 0, 65536, errno.EIO, r"Input/output error \(load of 65536 bytes at offset 0"),
    ]
    before = len(os.listdir("/proc/self/fd"))
    for broken_path, offset, num_bytes, number, message in cases:
        with pytest.raises(StorageError, match=message) as caught:
            load(open_file(broken_path), offset, num_bytes, target)
        assert (caught.value.errno, caught.value.filename) == (number, str(broken_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_not_what_it_was(extent):
    path, content = extent
    file = open_file(path)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StorageError, match="changed since") as caught:
        load(file, 0, 1, np.zeros(9, np.uint8))
    assert caught.value.errno == errno.ESTALE


def test_the_slots_of_an_image(tmp_path):
    """What a device tier does with its part, into host memory."""
    table = write_rows(tmp_path / "t.safetensors", 500, 264)
    config = {**config_of(table), "device": {"device": "cpu", "capacity": 272 * 300}}
    with Store.open(config) as store:
        for _ in range(2):
            store.fetch(range(300))
        store.save(tmp_path / "tiers")
    slots = np.zeros((300, 272), np.uint8)
    with open_image(tmp_path / "tiers", about_tables({"file": open_table("file", table)}), 264) as parts:
        part = parts["device"]
        by_descriptor = part.file._replace(path=Path(f"/proc/self/fd/{part.descriptor}"))
        load(by_descriptor, part.offset, slots.nbytes, slots)
    assert sorted(part.rows) == list(range(300))
    assert np.array_equal(slots[:, :264], oracle(part.rows, 264))


def test_a_target_that_cannot_take_a_load(extent):
    path, _ = extent
    frozen = np.zeros(10, np.uint8)
    frozen.flags.writeable = False
    square = np.zeros((10, 10), np.uint8)
    for target, offset, num_bytes, message in [
        (frozen, 0, 1, "read-only"),
        (square[:, ::2], 0, 1, "contiguous"),
        (torch.from_numpy(square).T, 0, 1, "contiguous"),
        (square, 0, 101, "101 bytes at offset 0 do not fit a target of 100"),
        (square, 0, -1, "do not fit"),
        (square, -1, 1, "at offset -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(open_file(path), offset, num_bytes, target)
    assert not square.any()


def test_a_load_into_device_memory(extent):
    if not torch.cuda.is_available():
        pytest.skip("torch has no device here")
    path, content = extent
    target = torch.zeros(content.size, dtype=torch.uint8, device="cuda")
    load(open_file(path), 0, content.size, target)
    assert np.array_equal(target.cpu().numpy(), content)
    with pytest.raises(StorageError, match="ends too soon"):
        load(open_file(path), 1, content.size, target)


# errors of kvikio


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (RuntimeError("KvikIO failure at: posix_io.hpp:90: POSIX error on pread: Is a directory"), errno.EISDIR),
        (RuntimeError("KvikIO failure at: posix_io.hpp:173: POSIX error on pread: EOF"), errno.ENODATA),
        (RuntimeError("cuFile error at: file_handle.cpp:9: internal error"), errno.EIO),
        (RuntimeError(""), errno.EIO),
        (OSError(errno.ESTALE, "stale"), errno.ESTALE),
        (OSError("no number"), errno.EIO),
    ],
)
def test_the_number_of_what_kvikio_raises(error, number):
    assert gds._number(error) == number
