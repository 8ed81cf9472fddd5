"""What tests of tables and engines share: rows as a function of their number, sources and files that fail on request, and
contracts as test classes. A subclass says what it is about, and pytest runs the whole contract over it.

Needs pytest. Faults are the kernel's own: a descriptor of an open file is made to lead elsewhere for a while.
"""

import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tiercache.errors import StorageError
from tiercache.records import Record, plain
from tiercache.source import Source
from tiercache.storage import queue as q
from tiercache.storage.files import open_files
from tiercache.storage.reader import FileReader, Job
from tiercache.storage.reads import Files, Targets, bounce_bytes, longest_piece, new_layout
from tiercache.storage.table import Extent, FileTable, open_file

_MIX = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15], np.uint64)


def oracle(rows: npt.ArrayLike, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The record of each row, uint8[*rows.shape, num_bytes]: a hash of the row and the byte's place."""
    words = np.asarray(rows, np.int64).astype(np.uint64)[..., None] * _MIX[2] + np.arange(-(-num_bytes // 8), dtype=np.uint64)
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return np.ascontiguousarray((words ^ (words >> np.uint64(31))).view(np.uint8)[..., :num_bytes])


class OracleSource:
    """A Source of `num_rows` rows that are `oracle`'s."""

    def __init__(self, num_rows: int, record: Record) -> None:
        self.num_rows = num_rows
        self.record = record

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """As Source.read."""
        out[:] = oracle(rows, out.shape[1])

    def close(self) -> None:
        """Nothing to let go of."""


class FaultySource:
    """A Source before another one that fails on request. Every attribute may be changed at any time.

    errors     errno by row: a read that touches such a row brings what lies before it, and raises OSError
    short      rows in the middle of whose record the source's bytes end: as above, ENODATA
    latency_s  seconds that every read takes longer
    gate       reads wait until it is set, as it is at first
    begun      is set when a read has begun
    reads      the rows of every read so far
    """

    def __init__(
        self,
        source: Source,
        *,
        errors: Mapping[int, int] | None = None,
        short: Iterable[int] = (),
        latency_s: float = 0.0,
    ) -> None:
        self.num_rows = source.num_rows
        self.record = source.record
        self.errors = dict(errors or {})
        self.short = set(short)
        self.latency_s = latency_s
        self.gate, self.begun = threading.Event(), threading.Event()
        self.gate.set()
        self.reads: list[npt.NDArray[np.int64]] = []
        self.num_closes = 0
        self._source = source

    def read(self, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """As Source.read."""
        self.reads.append(rows.copy())
        self.begun.set()
        self.gate.wait()
        if self.latency_s:
            time.sleep(self.latency_s)
        self._source.read(rows, out)
        for position, row in enumerate(rows.tolist()):
            if row in self.errors or row in self.short:
                kept = out.shape[1] // 2 if row in self.short else 0
                out[position, kept:] = 0xEE
                out[position + 1 :] = 0xEE
                number = self.errors.get(row, errno.ENODATA)
                raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Close the other source."""
        self.num_closes += 1
        self._source.close()


@contextmanager
def broken(path: str | os.PathLike[str], by: str | os.PathLike[str] = "/proc/self/mem", flags: int = 0) -> Iterator[None]:
    """Within, every descriptor that this process has of a file leads to another one, opened read-only with `flags`.

    `by` decides what a read of the file then gives: /proc/self/mem EIO, a directory EISDIR, a truncated copy an end too soon,
    the file itself with O_DIRECT EINVAL where a read is not aligned. ValueError if the file is not open.
    """
    status, replacement = os.stat(path), os.open(by, os.O_RDONLY | flags)
    descriptors = [int(name) for name in os.listdir("/proc/self/fd") if _is_open_on(int(name), status)]
    if replacement in descriptors:
        descriptors.remove(replacement)
    originals = [os.dup(descriptor) for descriptor in descriptors]
    try:
        if not descriptors:
            raise ValueError(f"{os.fspath(path)} is not open in this process")
        for descriptor in descriptors:
            os.dup2(replacement, descriptor, inheritable=False)
        yield
    finally:
        for descriptor, original in zip(descriptors, originals, strict=True):
            os.dup2(original, descriptor, inheritable=False)
            os.close(original)
        os.close(replacement)


def _is_open_on(descriptor: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), status)
    except OSError:
        return False


class SourceContract:
    """What every Source keeps. A subclass makes one in `open_source`."""

    num_rows = 257
    record = plain("U8", 264)

    def open_source(self, records: npt.NDArray[np.uint8], directory: Path) -> Source:
        """A source of exactly these records, uint8[num_rows, record.record_bytes]; it may write below the directory."""
        raise NotImplementedError

    @pytest.fixture
    def source(self, tmp_path: Path) -> Iterator[Source]:
        records = oracle(np.arange(self.num_rows), self.record.record_bytes)
        with closing(self.open_source(records, tmp_path)) as source:
            yield source

    def test_says_what_it_has(self, source: Source) -> None:
        assert source.num_rows == self.num_rows
        assert source.record.record_bytes == self.record.record_bytes

    @pytest.mark.parametrize("num_rows", [0, 1, 2, 100, 257])
    @pytest.mark.parametrize("order", ["up", "down", "random"])
    def test_reads_exactly_the_rows_asked_for(self, source: Source, num_rows: int, order: str) -> None:
        rows = np.random.default_rng(num_rows).permutation(self.num_rows)[:num_rows].astype(np.int64)
        rows = {"up": np.sort(rows), "down": np.sort(rows)[::-1].copy(), "random": rows}[order]
        asked = rows.copy()
        out = np.full((num_rows + 1, self.record.record_bytes), 0xEE, np.uint8)
        source.read(rows, out[:num_rows])
        assert np.array_equal(rows, asked)
        assert np.array_equal(out[:num_rows], oracle(rows, self.record.record_bytes))
        assert (out[num_rows] == 0xEE).all()

    def test_reads_the_same_twice(self, source: Source) -> None:
        rows = np.array([self.num_rows - 1, 0, 100], np.int64)
        first, second = np.zeros((2, 3, self.record.record_bytes), np.uint8)
        source.read(rows, first)
        source.read(rows, second)
        assert np.array_equal(first, second)


class EngineRig:
    """An engine over the files of one table, whose rows are `oracle`'s, with memory for what it reads.

    Each file holds a third of the rows in two fields, one behind the other, and ends with its last row. The engine does not
    serve before its `start`, so that what is submitted earlier waits.
    """

    num_rows = 300
    num_files = 3

    def __init__(self, kind: Any, directory: Path, *, num_bytes: int, depth: int, direct: bool) -> None:
        self.num_bytes = num_bytes
        self.table = self._write_table(directory)
        self.files = open_files(self.table.files, direct=direct)
        self.slot_bytes = bounce_bytes(longest_piece([self.table]), self.files.alignment)
        self.engine = kind(q.new_queue(), depth, self.slot_bytes, self.files.alignment)
        sizes = np.array([file.size for file in self.files.files], np.int64)
        self.reader = FileReader(
            new_layout(self.table, 0),
            Files(self.files.descriptors, sizes, np.zeros_like(sizes), np.zeros_like(sizes)),
            self.files,
            self.engine,
            self.files.alignment,
            self.slot_bytes,
        )
        self.slots, self.staging = np.zeros((2, self.num_rows, num_bytes), np.uint8)
        self.flags = np.zeros(self.num_rows, np.int8)
        self._closed = False

    def _write_table(self, directory: Path) -> FileTable:
        each, split = self.num_rows // self.num_files, self.num_bytes // 4
        extents = []
        for number in range(self.num_files):
            first = number * each
            records = oracle(np.arange(first, first + each), self.num_bytes)
            head = b"\xee" * (100 + number)
            content = head + records[:, split:].tobytes() + records[:, :split].tobytes()
            (directory / f"{number}.bin").write_bytes(content)
            wide = self.num_bytes - split
            extents += [
                Extent(number, len(head), first, each, wide, wide, split),
                Extent(number, len(head) + each * wide, first, each, split, split, 0),
            ]
        files = tuple(open_file(directory / f"{number}.bin") for number in range(self.num_files))
        return FileTable("t", self.num_rows, plain("U8", self.num_bytes), files, tuple(extents), (), None, "")

    def submit(
        self,
        rows: npt.ArrayLike,
        places: npt.ArrayLike | None = None,
        *,
        wanted: npt.ArrayLike = (),
        deadline_s: float = 0.0,
    ) -> Job:
        """Begin a job; without places, each row goes to the slot of its own number."""
        rows = np.asarray(rows, np.int64)
        places = rows.astype(np.int32) if places is None else np.asarray(places, np.int32)
        self.flags[places[places >= 0]] = self.reader.num_reads
        targets = Targets(
            self.slots.ctypes.data, self.num_bytes, self.staging.ctypes.data, self.num_bytes, self.flags.ctypes.data, 1
        )
        due = time.monotonic_ns() + int(deadline_s * 1e9)
        return self.reader.submit(rows, places, np.asarray(wanted, np.int64), targets, due)

    def wait(self, job: Job) -> None:
        """Wait for a job, and raise what it failed with."""
        job.wait()
        self.reader.raise_error(job)

    def has(self, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each row lies in its slot, every byte of it, and its flag says so."""
        rows = np.asarray(rows, np.int64)
        return (self.slots[rows] == oracle(rows, self.num_bytes)).all(1) & (self.flags[rows] == 0)

    def close(self) -> None:
        """Close engine and files. A second close does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()
            self.files.close()


class EngineContract:
    """What every Engine keeps. A subclass names its class in `kind`: called with queue, depth, slot_bytes, alignment."""

    kind: Any

    @pytest.fixture(params=[True, False], ids=["direct", "buffered"])
    def direct(self, request: pytest.FixtureRequest) -> bool:
        return bool(request.param)

    @pytest.fixture(params=[1, 2, 128])
    def depth(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.fixture(params=[264])
    def num_bytes(self, request: pytest.FixtureRequest) -> int:
        return int(request.param)

    @pytest.fixture
    def rig(self, tmp_path: Path, direct: bool, depth: int, num_bytes: int) -> Iterator[EngineRig]:
        with closing(EngineRig(self.kind, tmp_path, num_bytes=num_bytes, depth=depth, direct=direct)) as rig:
            yield rig

    @pytest.mark.parametrize("num_bytes", [8, 264, 20_000], indirect=True)
    def test_random_jobs_are_exact(self, rig: EngineRig) -> None:
        rig.engine.start()
        random = np.random.default_rng(0)
        for num_rows in (0, 1, 2, 17, 150, rig.num_rows):
            rig.slots[:] = rig.staging[:] = 0xEE
            rows = random.permutation(rig.num_rows)[:num_rows]
            staged = rows[: num_rows // 3]
            places = np.append(~np.arange(staged.size), rows[staged.size :])
            rig.wait(rig.submit(rows, places))
            assert np.array_equal(rig.staging[: staged.size], oracle(staged, rig.num_bytes))
            assert rig.has(rows[staged.size :]).all()
            others = np.setdiff1d(np.arange(rig.num_rows), rows[staged.size :])
            assert (rig.slots[others] == 0xEE).all()
            assert (rig.staging[staged.size :] == 0xEE).all()

    def test_neighbours_share_a_read(self, rig: EngineRig) -> None:
        rig.engine.start()
        job = rig.submit(np.arange(20, 60))
        rig.wait(job)
        assert rig.has(np.arange(20, 60)).all()
        assert len(job.memory[0]) <= 2

    def test_many_jobs_of_any_deadline_in_flight(self, rig: EngineRig) -> None:
        rig.engine.start()
        random = np.random.default_rng(1)
        parts = np.array_split(random.permutation(rig.num_rows), 40)
        jobs = [rig.submit(part, deadline_s=float(random.random())) for part in parts]
        for job in jobs[::-1]:
            rig.wait(job)
        assert rig.has(np.arange(rig.num_rows)).all()

    @pytest.mark.parametrize("depth", [1], indirect=True)
    def test_the_job_that_is_due_first_goes_first(self, rig: EngineRig) -> None:
        late = rig.submit([0, 99, 150], [-1, -1, -1], deadline_s=3600)
        soon = rig.submit([250], [-1], deadline_s=0)
        rig.engine.start()
        rig.wait(soon)
        rig.wait(late)
        assert np.array_equal(rig.staging[0], oracle(150, rig.num_bytes))

    @pytest.mark.parametrize("depth", [1], indirect=True)
    @pytest.mark.parametrize("num_bytes", [20_000], indirect=True)
    def test_a_job_that_somebody_waits_for_does_not_keep_its_deadline(self, rig: EngineRig) -> None:
        first = rig.submit([0], [-1], deadline_s=1800)
        second = rig.submit([250], [-1], deadline_s=3600)
        q.hasten(rig.engine.queue, second.serial)
        rig.engine.start()
        while not q.wait_done(rig.engine.queue, first.result):
            pass
        assert second.done
        assert np.array_equal(rig.staging[0], oracle(0, rig.num_bytes))

    @pytest.mark.parametrize("depth", [1], indirect=True)
    @pytest.mark.parametrize("num_bytes", [20_000], indirect=True)
    def test_bytes_that_an_urgent_job_wants_of_another_come_first(self, rig: EngineRig) -> None:
        late = rig.submit([10, 120, 250], [-1, -1, -1], deadline_s=3600)
        urgent = rig.submit([], wanted=[250])
        rig.engine.start()
        rig.wait(urgent)
        rig.wait(late)
        first_field = rig.num_bytes // 4
        assert np.array_equal(rig.staging[0, :first_field], oracle(120, rig.num_bytes)[:first_field])

    def test_a_cancelled_job_fails_and_its_neighbour_does_not(self, rig: EngineRig) -> None:
        doomed, kept = rig.submit([5, 130, 290]), rig.submit([6, 131])
        doomed.cancel()
        assert doomed.done
        assert doomed.result[q.ERRNO] == errno.ECANCELED
        assert (rig.flags[[5, 130, 290]] == q.FAILED).all()
        rig.engine.start()
        rig.wait(kept)
        assert rig.has([6, 131]).all()
        assert not rig.slots[[5, 130, 290]].any()
        doomed.cancel()

    def test_close_ends_every_job_one_way_or_the_other(self, rig: EngineRig) -> None:
        parts = np.array_split(np.random.default_rng(2).permutation(rig.num_rows), 100)
        jobs = [rig.submit(part) for part in parts]
        rig.engine.start()
        rig.close()
        for job, part in zip(jobs, parts, strict=True):
            assert job.done
            assert job.result[q.ERRNO] in (0, errno.ECANCELED)
            assert np.isin(rig.flags[part], [0, q.FAILED]).all()
            assert rig.has(part[rig.flags[part] == 0]).all()
            assert job.succeeded == (rig.flags[part] == 0).all()
        with pytest.raises(OSError, match=r"(?i)cancel"):
            rig.submit([1])

    def test_a_full_table_of_jobs_makes_the_next_one_wait(self, rig: EngineRig) -> None:
        jobs = [rig.submit([row]) for row in range(q.MAX_JOBS)]
        rest = threading.Thread(target=lambda: jobs.extend(rig.submit([row]) for row in range(q.MAX_JOBS, rig.num_rows)))
        rest.start()
        assert len(jobs) == q.MAX_JOBS
        rig.engine.start()
        rest.join()
        for job in jobs:
            rig.wait(job)
        assert rig.has(np.arange(rig.num_rows)).all()

    @pytest.mark.parametrize("number", [errno.EIO, errno.EISDIR, errno.ENODATA])
    def test_a_file_that_fails_spoils_its_own_rows_only(self, rig: EngineRig, tmp_path: Path, number: int) -> None:
        (tmp_path / "cut").write_bytes(b"short")
        by = {errno.EIO: Path("/proc/self/mem"), errno.EISDIR: tmp_path, errno.ENODATA: tmp_path / "cut"}[number]
        good, bad = np.array([3, 97, 205, 299]), np.array([100, 101, 160, 199])
        rig.engine.start()
        with broken(tmp_path / "1.bin", by):
            job = rig.submit(np.append(good, bad))
            with pytest.raises(StorageError, match=r"offset \d+.* reads failed") as caught:
                rig.wait(job)
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "1.bin"))
        assert rig.has(good).all()
        assert (rig.flags[bad] == q.FAILED).all()
        assert not rig.slots[bad].any()
        rig.wait(rig.submit(bad))
        assert rig.has(bad).all()
