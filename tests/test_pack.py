"""Writing packed tables: what plain zarr reads, record by record, and whole or not at all."""

import errno
import fcntl
import hashlib
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
import zarr
from safetensors.torch import save_file

from tiercache.errors import FormatError, StorageError
from tiercache.records import Field, Record, plain
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import pack, pack_rows, verify
from tiercache.storage.table import FileTable

ENGRAM = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))


@pytest.fixture
def small(monkeypatch):
    """Chunks of 20,000 bytes and pieces of 3,000, so that small tables have many."""
    monkeypatch.setattr("tiercache.storage.zarr._CHUNK_BYTES", 20_000)
    monkeypatch.setattr("tiercache.storage.pack._PIECE_BYTES", 3_000)
    monkeypatch.setattr("tiercache.storage.pack._PIECE_PAGES", 2)


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def read_all(table: FileTable) -> np.ndarray:
    """Every record, by the place that the format gives it."""
    records = np.zeros((table.num_rows, table.record_bytes), np.uint8)
    for extent in table.extents:
        content = np.fromfile(table.files[extent.file].path, np.uint8).reshape(-1, extent.stride)
        records[extent.first_row : extent.first_row + extent.num_rows] = content[: extent.num_rows]
    return records


def engram_file(path: Path, num_rows: int = 500) -> np.ndarray:
    """A checkpoint of weights and scales; its records."""
    records = random_bytes(num_rows, 264)
    weight, scale = (torch.from_numpy(part.copy()) for part in (records[:, :256], records[:, 256:]))
    save_file({"weight": weight.view(torch.float8_e4m3fn), "scale": scale.view(torch.float8_e8m0fnu)}, path)
    return records


def in_child(work: Callable[[], object]) -> int:
    """Wait status of a forked process that does the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


# writing


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 264), (75, 264), (76, 264), (1000, 264), (333, 4096), (20_001, 1), (3, 50_000)]
)
@pytest.mark.usefixtures("small")
def test_plain_zarr_reads_the_rows_and_the_checksums(tmp_path, shape):
    rows = random_bytes(*shape)
    report = pack_rows(MemoryTable(rows), tmp_path / "t")
    group = zarr.open_group(tmp_path / "t", mode="r")
    assert np.array_equal(group["rows"][:], rows)
    chunk_bytes = group["rows"].chunks[0] * shape[1]
    padded = np.zeros(report.num_files * chunk_bytes, np.uint8)
    padded[: rows.size] = rows.reshape(-1)
    expected = [
        [xxhash.xxh64_intdigest(chunk[start : start + 4096]) for start in range(0, chunk_bytes, 4096)]
        for chunk in padded.reshape(report.num_files, chunk_bytes)
    ]
    assert group["checksums"][:].tolist() == expected
    assert chunk_bytes <= max(20_000, shape[1])
    assert padded.size - rows.size < report.num_files * shape[1]


@pytest.mark.usefixtures("small")
def test_a_checkpoint_is_packed_record_by_record(tmp_path):
    records = engram_file(tmp_path / "m.safetensors")
    report = pack(tmp_path / "m.safetensors", tmp_path / "t", fields=("weight", "scale"))
    table = open_table("t", tmp_path / "t")
    assert (table.num_rows, table.record, table.name) == (500, ENGRAM, "t")
    assert len(table.files) == report.num_files == 7
    assert np.array_equal(read_all(table), records)
    again = pack(tmp_path / "t", tmp_path / "copy")
    assert again[1:6] == report[1:6]
    assert np.array_equal(read_all(open_table("t", tmp_path / "copy")), records)


@pytest.mark.usefixtures("small")
def test_pieces_of_a_tensor_and_a_global_scale_are_packed(tmp_path):
    rows = random_bytes(300, 100)
    parts = {
        f"w.{part}": torch.from_numpy(rows[100 * part :][:100].copy()).view(torch.float8_e4m3fn) for part in range(3)
    }
    save_file(parts | {"s": torch.tensor(0.1)}, tmp_path / "m.safetensors")
    pack(tmp_path / "m.safetensors", tmp_path / "t", fields=("w.{shard}", "s"))
    table = open_table("t", tmp_path / "t")
    assert table.record == Record((Field("w.{shard}", "F8_E4M3", 100),), float(np.float32(0.1)))
    assert np.array_equal(read_all(table), rows)


class Squares:
    """Rows that are a function of their number."""

    num_rows = 1000
    record = plain("U8", 16)

    def __init__(self) -> None:
        self.reads: list[int] = []

    def read(self, rows, out):
        self.reads.append(out.size)
        out.view(np.int64)[:] = np.stack([rows, rows * rows], axis=1)

    def close(self):
        raise AssertionError("the source belongs to the caller")


@pytest.mark.usefixtures("small")
def test_a_function_of_the_row_number_is_packed_in_bounded_pieces(tmp_path):
    source, told = Squares(), []
    report = pack_rows(source, tmp_path / "t", progress=lambda done, total: told.append((done, total)))
    rows = read_all(open_table("t", tmp_path / "t")).view(np.int64)
    assert np.array_equal(rows, np.stack([np.arange(1000), np.arange(1000) ** 2], axis=1))
    assert max(source.reads) <= 3000
    assert sum(source.reads) == report.num_bytes == 16_000
    assert told == sorted(told)
    assert told[-1] == (16_000, 16_000)


def test_the_identity_is_the_digest_that_the_format_describes(tmp_path):
    rows = random_bytes(10, 6)
    report = pack_rows(MemoryTable(rows.view(np.float16)), tmp_path / "t")
    expected = hashlib.sha256(b'[10,null,[["rows","F16",3]]]' + rows.tobytes()).hexdigest()
    assert report.identity == open_table("t", tmp_path / "t").identity == expected


def test_permissions_are_those_of_any_new_directory(tmp_path):
    (tmp_path / "plain").mkdir()
    pack_rows(MemoryTable(random_bytes(2, 2)), tmp_path / "t")
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "plain").stat().st_mode


# whole or not at all


@pytest.mark.usefixtures("small")
def test_a_kill_at_any_point_leaves_no_half_table(tmp_path, monkeypatch):
    rows = random_bytes(190, 264)
    pack_rows(MemoryTable(rows), tmp_path / "warm")  # compiles before the forks
    shutil.rmtree(tmp_path / "warm")
    destination = tmp_path / "t"

    def pack_until(deadly: int) -> None:
        calls = 0

        def mortal(name: str) -> None:
            original = getattr(os, name)

            def call(*arguments, **keywords):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    if name == "write":
                        original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            monkeypatch.setattr(os, name, call)

        for name in ("open", "mkdir", "write", "fsync", "close", "rename"):
            mortal(name)
        pack_rows(MemoryTable(rows), destination)

    points = 0
    while not destination.exists():
        points += 1
        status = in_child(partial(pack_until, points))
        assert status in (0, signal.SIGKILL)
        for path in tmp_path.iterdir():
            try:
                table = open_table("t", path)
            except (FormatError, StorageError):
                assert path != destination
            else:
                assert np.array_equal(read_all(table), rows)
                assert not verify(path).bad
    assert points > 40
    assert list(tmp_path.iterdir()) == [destination] or status == signal.SIGKILL
    pack_rows(MemoryTable(rows), tmp_path / "u")
    shutil.rmtree(destination)
    pack_rows(MemoryTable(rows), destination)
    assert sorted(tmp_path.iterdir()) == [destination, tmp_path / "u"]


def test_leftovers_go_but_a_living_builder_is_left_alone(tmp_path):
    for name in (".t.packing-dead", ".t.packing-living", ".u.packing-other"):
        (tmp_path / name / "rows").mkdir(parents=True)
    lock = os.open(tmp_path / ".t.packing-living", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    pack_rows(MemoryTable(random_bytes(2, 2)), tmp_path / "t")
    os.close(lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".t.packing-living", ".u.packing-other", "t"]


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_exists_is_not_overwritten(tmp_path, kind):
    destination = tmp_path / "t"
    {"file": destination.touch, "directory": destination.mkdir, "link": lambda: destination.symlink_to("gone")}[kind]()
    with pytest.raises(StorageError, match="exists and is not overwritten") as caught:
        pack_rows(MemoryTable(random_bytes(2, 2)), destination)
    assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(destination))
    assert list(tmp_path.iterdir()) == [destination]


def test_a_destination_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def appear(done, total):
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "precious").touch()

    with pytest.raises(StorageError) as caught:
        pack_rows(MemoryTable(random_bytes(2, 2)), tmp_path / "t", progress=appear)
    assert caught.value.errno == errno.ENOTEMPTY
    assert [path.relative_to(tmp_path).name for path in tmp_path.rglob("*")] == ["t", "precious"]


def test_a_missing_parent_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        pack_rows(MemoryTable(random_bytes(2, 2)), tmp_path / "none" / "t")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("call", ["write", "fsync", "mkdir", "rename"])
@pytest.mark.usefixtures("small")
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    original, calls = getattr(os, call), []

    def fail_later(*arguments, **keywords):
        calls.append(call)
        if len(calls) == {"write": 9, "fsync": 3, "mkdir": 4, "rename": 1}[call]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **keywords)

    monkeypatch.setattr(os, call, fail_later)
    with pytest.raises(StorageError, match="No space left") as caught:
        pack_rows(MemoryTable(random_bytes(200, 264)), tmp_path / "t")
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in caught.value.filename
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    pack_rows(MemoryTable(random_bytes(200, 264)), tmp_path / "t")


def test_a_disk_that_cannot_hold_the_table_is_refused_at_once(tmp_path, monkeypatch):
    class Huge(Squares):
        num_rows = 1 << 50

        def read(self, rows, out):
            raise AssertionError("nothing should be read")

    with pytest.raises(StorageError, match="bytes are needed and") as caught:
        pack_rows(Huge(), tmp_path / "t")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_refusing_a_write_leaves_nothing_behind(tmp_path):
    rows = random_bytes(5000, 264)
    pack_rows(MemoryTable(rows), tmp_path / "warm")
    shutil.rmtree(tmp_path / "warm")

    def pack_with_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(StorageError) as caught:
            pack_rows(MemoryTable(rows), tmp_path / "t")
        assert caught.value.errno == errno.EFBIG

    assert in_child(pack_with_limit) == 0
    assert list(tmp_path.iterdir()) == []


def test_errors_and_interrupts_of_a_source_leave_nothing_behind(tmp_path):
    class Failing(Squares):
        def read(self, rows, out):
            raise self.error

    for error in (OSError(errno.EIO, "broken"), KeyboardInterrupt()):
        source = Failing()
        source.error = error
        with pytest.raises(type(error)) as caught:
            pack_rows(source, tmp_path / "t")
        assert caught.value is error
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
def test_a_source_that_changes_while_it_is_packed_makes_no_table(tmp_path):
    engram_file(tmp_path / "m.safetensors")

    def touch(done, total):
        os.utime(tmp_path / "m.safetensors", ns=(done, done))

    with pytest.raises(StorageError, match="changed since"):
        pack(tmp_path / "m.safetensors", tmp_path / "t", fields=("weight", "scale"), progress=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
