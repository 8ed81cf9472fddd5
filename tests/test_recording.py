"""Recording: what comes back is what was planned, whatever kills, damages, slows or refuses the writing of it."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import config_of, descriptors_of, in_process, open_with, store_threads, write_rows

from tiercache import ClosedError, FormatError, StorageError, Store, tap
from tiercache.recording import drain, recorder
from tiercache.recording.blocks import HEADER, Block, Damaged, Encoder, RecordedTable, head_block
from tiercache.recording.codec import NUMBER_BYTES, Packed, Packer, put_all, unpack, unpack_numbers
from tiercache.recording.reader import DamagedRecording, Recording
from tiercache.recording.recorder import Recorder

TABLES = {"a": np.zeros((1000, 8), np.uint8), "b": np.zeros((50, 8), np.uint8)}
ABOUT = [RecordedTable("a", 1000, 8, ""), RecordedTable("b", 50, 8, "")]
Batches = list[tuple[str, list[int]]]


def open_store(tables=TABLES, **sections):
    return Store.open({"host": {"capacity": 800}, **sections}, tables=tables)


def random_batches(count: int, seed: int = 0) -> Batches:
    rng = np.random.default_rng(seed)
    names = [("a", "b")[i] for i in rng.integers(0, 2, count)]
    return [(name, rng.integers(0, len(TABLES[name]), rng.integers(0, 70)).tolist()) for name in names]


def record(path: Path, batches: Batches) -> None:
    with open_store() as store, store.record(path):
        for name, rows in batches:
            store.fetch(rows, table=name)


def read(path: Path) -> Batches:
    return [(name, rows.tolist()) for name, rows in Recording(path).batches()]


def read_damaged(path: Path) -> tuple[Batches, DamagedRecording]:
    """What is read of a damaged recording, and what was told of it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        batches = read(path)
    (warning,) = told
    assert isinstance(warning.message, DamagedRecording)
    return batches, warning.message


rows_of_text = st.lists(st.integers(0, 40) | st.integers(0, 2**62 - 1), max_size=300)


@given(rows_of_text, st.integers(1, 4))
def test_rows_are_packed_and_unpacked(rows: list[int], copies: int) -> None:
    array = np.array(rows * copies, np.int64)
    packed = Packer().pack(array)
    assert np.array_equal(unpack(packed, array.size), array)


def test_a_repeat_takes_bytes_and_no_bits() -> None:
    rows = np.arange(2**40, 2**40 + 500)
    packed = Packer().pack(np.concatenate([rows, rows[3:]]))
    assert 500 <= packed.num_fresh < 600, "a long repeat out of step is soon found"
    assert (packed.width, packed.bits.nbytes) == (41, -(-packed.num_fresh * 41 // 64) * 8)
    assert packed.sequences.size <= 10


@given(st.lists(st.lists(st.integers(0, 30), max_size=60), max_size=5))
def test_a_packer_is_used_again(batches: list[list[int]]) -> None:
    packer = Packer()
    for batch in batches:
        array = np.array(batch, np.int64)
        assert np.array_equal(unpack(packer.pack(array), array.size), array)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_numbers_are_packed_and_unpacked(numbers: list[int]) -> None:
    array = np.array(numbers, np.int64)
    out = np.empty(array.size * NUMBER_BYTES, np.uint8)
    assert np.array_equal(unpack_numbers(out[: put_all(array, out)], array.size), array)


@given(st.binary(max_size=40), st.lists(st.integers(0, 9), max_size=20), st.integers(0, 60))
def test_sequences_of_nobody_raise_or_give_as_many_rows(sequences: bytes, fresh: list[int], num_rows: int) -> None:
    bits = Packer().pack(np.array(fresh, np.int64) + 16).bits
    packed = Packed(np.resize(bits, -(-len(fresh) * 5 // 64)), np.frombuffer(sequences, np.uint8), 5, len(fresh))
    try:
        rows = unpack(packed, num_rows)
    except ValueError:
        return
    assert rows.shape == (num_rows,)
    assert ((rows >= 0) & (rows < 32)).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(("a", "b")), st.lists(st.integers(0, 49), max_size=30)), max_size=20))
def test_what_was_fetched_is_read(tmp_path: Path, batches: Batches) -> None:
    path = tmp_path / "rows.trace"
    path.unlink(missing_ok=True)
    record(path, batches)
    assert read(path) == batches
    assert Recording(path).tables == ABOUT


def test_many_blocks_keep_every_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.001)
    batches = random_batches(3000)
    path = tmp_path / "rows.trace"
    record(path, batches)
    assert read(path) == batches
    assert len(list(Recording(path).blocks())) > 1


def test_a_batch_larger_than_a_block_is_whole(tmp_path: Path) -> None:
    large = (np.arange(3 * drain.BLOCK_ROWS) * 7 % 1000).tolist()
    batches = [("b", [1]), ("a", large), ("a", large[:5]), ("b", [])]
    record(tmp_path / "rows.trace", batches)
    assert read(tmp_path / "rows.trace") == batches


def test_prefetches_and_fetches_are_recorded_as_they_were_planned(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    with open_store() as store, store.record(path):
        first = store.prefetch([[5, 7], [5, 5]], table="a")
        store.fetch([7], table="a")
        second = store.prefetch([2], table="b")
        second.take()
        first.cancel()
        with pytest.raises(IndexError):
            store.fetch([50], table="b")
    assert read(path) == [("a", [5, 7, 5, 5]), ("a", [7]), ("b", [2])]


def test_the_config_records_from_open_to_close(tmp_path: Path) -> None:
    (tmp_path / "store.toml").write_text('[trace]\npath = "rows.trace"\n[host]\ncapacity = 800\n')
    with Store.open(tmp_path / "store.toml", tables=TABLES) as store:
        store.fetch([3], table="a")
        (stats,) = store.stats().recordings
        assert (stats.path, stats.batches, stats.rows) == (str(tmp_path / "rows.trace"), 1, 1)
    assert read(tmp_path / "rows.trace") == [("a", [3])]


def test_a_store_that_is_dropped_ends_its_recordings(tmp_path: Path) -> None:
    store = open_store()
    recording = store.record(tmp_path / "rows.trace")
    store.fetch([3], table="a")
    del store
    assert read(tmp_path / "rows.trace") == [("a", [3])]
    recording.close()


def test_a_process_that_ends_without_close_loses_nothing(tmp_path: Path) -> None:
    in_process(
        "import sys, numpy as np; from tiercache import Store\n"
        "store = Store.open({'host': {'capacity': 800}}, tables={'a': np.zeros((1000, 8), np.uint8)})\n"
        "recording = store.record(sys.argv[1]); store.fetch([1, 2]); store.fetch([3])",
        tmp_path / "rows.trace",
    )
    assert read(tmp_path / "rows.trace") == [("a", [1, 2]), ("a", [3])]


def test_several_recordings_at_once_and_one_after_the_other(tmp_path: Path) -> None:
    with open_store() as store:
        with store.record(tmp_path / "1") as first, store.record(tmp_path / "2"):
            store.fetch([1], table="b")
            assert len(store.stats().recordings) == 2
            first.close()
            first.close()
            store.fetch([2], table="b")
        store.fetch([3], table="b")
        assert store.stats().recordings == ()
        with store.record(tmp_path / "1"):
            store.fetch([4], table="b")
        assert first.stats().batches == 1
    assert read(tmp_path / "1") == [("b", [1]), ("b", [4])]
    assert read(tmp_path / "2") == [("b", [1]), ("b", [2])]


def test_a_closed_store_records_nothing(tmp_path: Path) -> None:
    store = open_store()
    store.close()
    with pytest.raises(ClosedError):
        store.record(tmp_path / "rows.trace")
    assert not (tmp_path / "rows.trace").exists()


def test_what_threads_ask_for_is_whole_and_in_the_order_of_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.002)
    path, count = tmp_path / "rows.trace", 400

    def ask(number: int) -> None:
        for turn in range(count):
            rows = [number, *range(turn % 100, turn % 100 + number)]
            if turn % 3:
                store.fetch(rows, table="a")
            else:
                store.prefetch(rows, table="a").take()

    planned: list[list[int]] = []
    with open_store() as store, store.record(path) as recording:
        level = store._host.level
        plan_into = level.plan_into

        def tell(plan, rows, num_reads, **options):
            planned.append(rows.tolist())
            return plan_into(plan, rows, num_reads, **options)

        monkeypatch.setattr(level, "plan_into", tell)
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recording.stats().batches == store.stats().fetches == 4 * count
    batches = read(path)
    assert [rows for _, rows in batches] == planned
    for number in range(4):
        mine = [rows for _, rows in batches if len(rows) == number + 1]
        assert mine == [[number, *range(t % 100, t % 100 + number)] for t in range(count)]


class Stuck:
    """Stands for a disk that takes nothing until it is told to: a full pipe, which a thread empties into the file then."""

    def __init__(self, recording: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # which a pipe refuses
        self._file = os.dup(recording._writer.descriptor)
        self._pipe, end = os.pipe()
        os.set_blocking(end, False)
        self._filled = 0
        with suppress(BlockingIOError):
            while True:
                self._filled += os.write(end, bytes(1 << 12))
        os.set_blocking(end, True)
        os.dup2(end, recording._writer.descriptor, inheritable=False)
        os.close(end)
        self._counts = recording._tap.counts

    def wait(self, batches: int) -> None:
        """Until the writer has so many batches in hand."""
        while self._counts[tap.LOOKED] < batches:
            time.sleep(0.001)

    def go(self) -> threading.Thread:
        """Let it write. The thread ends when the recording does."""
        thread = threading.Thread(target=self._empty)
        thread.start()
        return thread

    def _empty(self) -> None:
        assert len(os.read(self._pipe, self._filled)) == self._filled
        while data := os.read(self._pipe, 1 << 20):
            os.write(self._file, data)
        os.close(self._pipe)
        os.close(self._file)


def break_disk(recording: Recorder) -> None:
    """Stands for a disk that is full."""
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recording._writer.descriptor, inheritable=False)
    os.close(full)


def test_what_the_writer_is_too_slow_for_is_left_out_whole_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.001)
    path = tmp_path / "rows.trace"
    large = np.zeros(tap.MOST_ROWS // 2, np.int64)
    with open_store() as store, store.record(path) as recording:
        stuck = Stuck(recording, monkeypatch)
        store.fetch([1], table="b")
        stuck.wait(1)
        store.fetch(large, table="a")
        store.fetch(large[:-3], table="a")
        store.fetch([2, 3, 4], table="b")  # room for two
        store.fetch([5], table="b")
        store.fetch([6, 7], table="b")
        assert recording.stats()[1:5] == (4, 2 + large.size + large.size - 3, 2, 5)
        thread = stuck.go()
        while recording.stats().bytes_written < 200:
            time.sleep(0.001)
        store.fetch([8], table="b")
    thread.join()
    file = Recording(path)
    batches = [rows for _, rows in file.batches()]
    assert [rows.size for rows in batches] == [1, large.size, large.size - 3, 1, 1]
    assert [batches[i].tolist() for i in (0, 3, 4)] == [[1], [5], [8]]
    assert file.dropped == (2, 5)
    where = [(block.dropped, block.sizes.size) for block in file.blocks()]
    assert [each for each in where if each[0][0]] == [((1, 3), 1), ((1, 2), 1)]


def test_a_batch_that_fits_no_buffer_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    with open_store() as store, store.record(path) as recording:
        store.fetch([1], table="b")
        store.fetch(np.zeros(tap.MOST_ROWS + 1, np.int64), table="b")
    assert recording.stats()[1:5] == (1, 1, 1, tap.MOST_ROWS + 1)
    file = Recording(path)
    assert [rows.tolist() for _, rows in file.batches()] == [[1]]
    assert file.dropped == (1, tap.MOST_ROWS + 1)


def test_a_list_that_is_full_leaves_the_rest_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.trace"
    lock = threading.RLock()
    recorders: list[Recorder] = []
    recording = Recorder(path, ABOUT, lock, recorders, np.zeros(16, np.int64), lambda: None)
    stuck = Stuck(recording, monkeypatch)
    nothing = np.empty(0, np.int64)
    most = tap.MOST_BATCHES - 1  # one entry may have to tell of batches left out
    with lock:
        for _ in range(most):
            recording.add(0, nothing)
        recording.add(1000, np.array([1049]))
    thread = stuck.go()
    recording.close()
    thread.join()
    file = Recording(path)
    assert sum(1 for _ in file.batches()) == most
    assert file.dropped == (1, 1)


def test_a_disk_that_fails_ends_the_recording_and_not_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.001)
    path = tmp_path / "rows.trace"
    with open_store() as store:
        recording = store.record(path)
        store.fetch([1], table="b")
        while not recording.stats().bytes_written:
            time.sleep(0.001)

        break_disk(recording)
        store.fetch([2, 3], table="b")
        while not recording.stats().error:
            time.sleep(0.001)
        store.fetch([4], table="b")
        stats = recording.stats()
        assert stats[1:5] == (1, 1, 2, 3)
        assert "No space left" in str(stats.error)
        with pytest.raises(StorageError, match="No space left") as raised:
            recording.close()
        assert raised.value.filename == str(path)
        assert store.fetch([5], table="b").shape == (1, 8)
    batches, told = read_damaged(path)
    assert (batches, told.num_batches, told.why) == ([("b", [1])], 1, "the recording was not closed")


def test_a_recording_that_failed_is_told_when_the_store_is_closed(tmp_path: Path) -> None:
    store = Store.open({"trace": {"path": tmp_path / "rows.trace"}, "host": {"capacity": 800}}, tables=TABLES)
    (recording,) = store._flights.recorders
    break_disk(recording)
    store.fetch([1], table="b")
    with pytest.raises(StorageError, match="No space left"):
        store.close()
    store.close()
    assert store_threads() == []
    assert descriptors_of(tmp_path / "rows.trace") == 0


def test_signals_interrupt_no_write_and_no_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.002)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with open_store() as store, store.record(tmp_path / "rows.trace") as recording:
            for turn in range(1000):
                store.fetch([turn, 999 - turn], table="a")
                assert recording._thread.ident is not None
                signal.pthread_kill(recording._thread.ident, signal.SIGUSR1)
        assert recording.stats()[1:5] == (1000, 2000, 0, 0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert read(tmp_path / "rows.trace") == [("a", [turn, 999 - turn]) for turn in range(1000)]


def test_a_recording_that_is_closed_before_its_thread_runs_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, go = recorder._Writer.run, threading.Event()

    def later(self: recorder._Writer) -> None:
        assert go.wait(30)
        run(self)

    monkeypatch.setattr(recorder._Writer, "run", later)
    path = tmp_path / "rows.trace"
    with open_store() as store:
        recording = store.record(path)
        store.fetch([1, 2, 3], table="a")
        closing = threading.Thread(target=recording.close)
        closing.start()
        while not recording._writer.state[drain.CLOSING]:
            time.sleep(0.001)
        go.set()
        closing.join()
    assert read(path) == [("a", [1, 2, 3])]
    assert descriptors_of(path) == 0


def test_a_store_serves_and_closes_while_an_old_recording_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads, go = tmp_path / "rows.trace", threading.Event(), threading.Event()
    record(path, [("a", [1, 2])])
    read_whole = recorder.whole_bytes

    def slowly(*arguments: Any) -> int:
        reads.set()
        assert go.wait(30)
        return read_whole(*arguments)

    monkeypatch.setattr(recorder, "whole_bytes", slowly)
    store, raised = open_store(), []

    def begin() -> None:
        try:
            store.record(path)
        except ClosedError as error:
            raised.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    assert reads.wait(30)
    store.fetch([1], table="b")
    store.close()
    go.set()
    thread.join()
    assert len(raised) == 1
    assert descriptors_of(path) == 0
    assert store_threads() == []


def test_a_recorder_whose_thread_cannot_begin_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with open_store() as store:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                store.record(tmp_path / "rows.trace")
        assert descriptors_of(tmp_path / "rows.trace") == 0
        assert store.stats().recordings == ()
        with store.record(tmp_path / "rows.trace"):
            store.fetch([1], table="b")
    assert read(tmp_path / "rows.trace") == [("b", [1])]


@pytest.mark.parametrize("step", ["_connect", "_finish", "join"])
def test_an_interrupted_close_is_completed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "rows.trace"
    with open_store() as store:
        recording, threads = store.record(path), set(store_threads())
        store.fetch([1, 2], table="a")
        where = {"_connect": (Recorder, step), "_finish": (recorder, step), "join": (recording._thread, step)}[step]
        with monkeypatch.context() as patched:
            patched.setattr(*where, interrupt)
            with pytest.raises(KeyboardInterrupt):
                recording.close()
        recording.close()
        assert threads - set(store_threads()), "the thread goes on"
        assert descriptors_of(path) == 0
        store.fetch([3], table="a")
        with store.record(path):
            store.fetch([4], table="a")
    assert read(path) == [("a", [1, 2]), ("a", [4])]


def test_a_recording_that_is_interrupted_as_it_begins_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, path = threading.Thread.start, tmp_path / "rows.trace"

    def begin(self: threading.Thread) -> None:
        start(self)
        raise KeyboardInterrupt

    with open_store() as store:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", begin)
            with pytest.raises(KeyboardInterrupt):
                store.record(path)
        while descriptors_of(path):
            time.sleep(0.001)
        store.fetch([1], table="a")
        with store.record(path):
            store.fetch([2], table="a")
    assert read(path) == [("a", [2])]


def test_memory_that_runs_out_ends_the_recording_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Encoder, num_rows: int) -> None:
        raise MemoryError

    with open_store() as store:
        recording = store.record(tmp_path / "rows.trace")
        monkeypatch.setattr(Encoder, "make_room", refuse)
        store.fetch([1], table="a")
        with pytest.raises(StorageError, match="Cannot allocate memory"):
            recording.close()
        assert recording.stats().dropped_batches == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_is_told_and_its_descriptors_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Encoder, num_rows: int) -> None:
        raise ValueError("an error of ours")

    with open_store() as store:
        recording = store.record(tmp_path / "rows.trace")
        monkeypatch.setattr(Encoder, "make_room", fail)
        store.fetch(np.arange(tap.WORTH_ROWS) % 1000, table="a")
        recording._thread.join()
        others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        try:
            assert recording._tap.wake in others
            store.fetch(np.arange(tap.WORTH_ROWS) % 1000, table="a")
            for other in others:
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(other)
        finally:
            for other in others:
                os.close(other)
        assert "an error of ours" in str(recording.stats().error)
        with pytest.raises(StorageError, match="has ended"):
            recording.close()


KILLED = """
import os, sys, numpy as np
from tiercache import Store
from tiercache.recording import drain, recorder
recorder.INTERVAL_S = 0.01
store = Store.open({"host": {"capacity": 800}}, tables={"a": np.zeros((1000, 8), np.uint8)})
recording = store.record(sys.argv[1])
for turn in range(10**9):
    store.fetch([turn % 1000, turn // 1000 % 1000])
    if turn == 2000:
        print("going", flush=True)
"""


def test_a_killed_process_leaves_its_whole_blocks_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == b"going\n"
        before = path.stat().st_size
        while path.stat().st_size < before + 1000:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    batches, told = read_damaged(path)
    assert len(batches) == told.num_batches > 100
    assert batches == [("a", [turn % 1000, turn // 1000 % 1000]) for turn in range(len(batches))]

    torn = block_bytes(block_of([7]))[:-1]
    os.truncate(path, told.offset)
    with path.open("ab") as file:
        file.write(torn)
    with open_store({"a": TABLES["a"]}) as store:
        with pytest.warns(RuntimeWarning, match=rf"rows\.trace: ends within a block.* its last {len(torn)} bytes are removed"):
            recording = store.record(path)
        with recording:
            store.fetch([1, 2, 3])
    assert read(path) == [*batches, ("a", [1, 2, 3])]


def block_bytes(block: Block) -> bytes:
    return Encoder().encode(block).tobytes()


def block_of(rows: list[int]) -> Block:
    return Block(np.zeros(1, np.int64), np.array([len(rows)]), np.array(rows, np.int64), (0, 0))


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, bytes, list[int], Batches]:
    """A recording of three blocks of batches: path, bytes, where the blocks end, and the batches."""
    path, batches = tmp_path / "rows.trace", random_batches(9)
    for at in range(0, 9, 3):
        record(path, batches[at : at + 3])
    data = path.read_bytes()
    ends = [data.find(b"TCrecord", 1)]
    while ends[-1] >= 0:
        ends.append(data.find(b"TCrecord", ends[-1] + 1))
    return path, data, [*ends[:-1], len(data)], batches


def test_a_recording_cut_anywhere_is_read_up_to_there(small: tuple[Path, bytes, list[int], Batches]) -> None:
    path, data, ends, batches = small
    assert len(ends) == 9, "head, data, end: three times"
    assert read(path) == batches
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        if whole == 0:
            with pytest.raises(FormatError, match="not a recording of a store"):
                Recording(path)
            continue
        expected = batches[: 3 * ((whole + 1) // 3)]
        if size in (ends[2], ends[5]):
            assert read(path) == expected, "cut between two parts, it is a whole recording"
            continue
        found, told = read_damaged(path)
        assert found == expected
        assert (told.offset, told.num_batches) == (ends[whole - 1], len(expected))
        assert str(path) in str(told)
        assert str(told.offset) in str(told)


def test_a_flipped_bit_anywhere_is_noticed_and_told(small: tuple[Path, bytes, list[int], Batches]) -> None:
    path, data, ends, batches = small
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        block = sum(end <= at for end in ends)
        if block == 0:
            with pytest.raises(FormatError):
                Recording(path)
            continue
        found, told = read_damaged(path)
        assert found == batches[: 3 * ((block + 1) // 3)]
        assert told.offset == ends[block - 1]


def test_a_damaged_recording_is_not_continued(small: tuple[Path, bytes, list[int], Batches]) -> None:
    path, data, ends, _ = small
    for at in (3, ends[0] - 1, ends[0] + HEADER.itemsize + 1, ends[3] + 20, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        with open_store() as store, pytest.raises(FormatError, match="nothing can be appended"):
            store.record(path)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"x", b"{}" * 100, b"TCrecord"], ids=["a byte", "text", "a magic"])
def test_another_file_is_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with open_store() as store, pytest.raises(FormatError, match="precious"):
        store.record(path)
    assert path.read_bytes() == content
    with pytest.raises(FormatError, match="not a recording of a store"):
        Recording(path)


def test_an_empty_file_is_filled_and_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    path.touch()
    with pytest.raises(FormatError, match="begins with no head"):
        Recording(path)
    record(path, [])
    assert read(path) == []


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"c": TABLES["a"], "b": TABLES["b"]}, "recorded of table 'a'; here are 'c', 'b'"),
        ({"a": TABLES["a"][:999], "b": TABLES["b"]}, "another table 'a': 1000 rows; here it has 999"),
        ({"a": TABLES["a"][:, :7], "b": TABLES["b"]}, "another table 'a': 8 bytes a record; here it has 7"),
        ({"b": TABLES["b"]}, "recorded of table 'a'"),
        ({"b": TABLES["b"], "a": TABLES["a"]}, r"recorded of 'a' \(without identity\), 'b' .*; here are 'b' .*, 'a' "),
        ({"a": TABLES["a"], "b": TABLES["b"], "c": TABLES["a"]}, "here are .*'c' .*, which cannot follow"),
    ],
)
def test_a_recording_of_other_tables_is_not_continued(tmp_path: Path, tables: dict, message: str) -> None:
    path = tmp_path / "rows.trace"
    record(path, [("a", [1])])
    before = path.read_bytes()
    with open_store(tables) as store, pytest.raises(FormatError, match=message):
        store.record(path)
    assert path.read_bytes() == before


def test_a_table_on_disk_is_known_by_its_identity(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    for number, first_row in enumerate((0, 0, 7)):
        table = write_rows(tmp_path / "t.safetensors", 30, 16, first_row)
        with Store.open(config_of(table)) as store:
            if number == 2:
                with pytest.raises(FormatError, match="recorded of another table 'file': identity"):
                    store.record(path)
            else:
                with store.record(path):
                    store.fetch([number])
    assert len(Recording(path).tables[0].identity) == 64
    assert read(path) == [("file", [0]), ("file", [1])]


def test_two_do_not_record_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    with open_store() as store, open_store() as other, store.record(path):
        with pytest.raises(StorageError, match="another store records to it"):
            other.record(path)
        store.fetch([1], table="b")
    assert read(path) == [("b", [1])]


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with open_store() as store:
        for path in (tmp_path / "nowhere" / "rows.trace", tmp_path):
            with pytest.raises(StorageError) as raised:
                store.record(path)
            assert raised.value.filename == str(path)
        assert store.stats().recordings == ()
    with pytest.raises(StorageError):
        Store.open({"trace": {"path": tmp_path / "nowhere" / "rows.trace"}}, tables=TABLES)
    with pytest.raises(StorageError, match="nowhere"):
        Recording(tmp_path / "nowhere")


def test_a_forked_child_leaves_the_recording_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    code = """
import os, sys, numpy as np
from tiercache import ClosedError, Store
store = Store.open({"host": {"capacity": 800}}, tables={"a": np.zeros((1000, 8), np.uint8)})
recording = store.record(sys.argv[1])
store.fetch([1])
child = os.fork()
if not child:
    try:
        store.fetch([2])
    except ClosedError:
        recording.close()
        store.close()
        sys.exit(0)
    sys.exit(1)
assert os.waitpid(child, 0)[1] == 0
store.fetch([3])
"""
    in_process(code, path)
    assert read(path) == [("a", [1]), ("a", [3])]


def test_blocks_that_do_not_add_up_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.trace"
    for block in (
        block_of([1000]),
        block_of([1])._replace(tables=np.array([2])),
        block_of([1, 2])._replace(sizes=np.array([1])),
    ):
        path.write_bytes(head_block(ABOUT) + block_bytes(block))
        found, told = read_damaged(path)
        assert (found, told.offset) == ([], len(head_block(ABOUT)))
    path.write_bytes(head_block(ABOUT) + head_block(ABOUT[:1]))
    assert "other tables" in read_damaged(path)[1].why
    path.write_bytes(block_bytes(block_of([1])))
    with pytest.raises(FormatError, match="begins with no head"):
        Recording(path)


@pytest.mark.parametrize(
    "tables",
    [[("a", 0, 8)], [("a", 2**48 + 1, 8)], [("a", -1, 8)], [("a", 9, 0)], [("a", 9, 2**24 + 1)], [("a", 9, 8), ("a", 9, 8)],
     [("a", 2**48, 8), ("b", 1, 8)]],
)  # fmt: skip
def test_a_head_of_senseless_tables_is_refused(tmp_path: Path, tables: list) -> None:
    path = tmp_path / "rows.trace"
    path.write_bytes(head_block([RecordedTable(*table, "") for table in tables]))
    with pytest.raises(FormatError, match=r"rows\.trace: not a recording of a store: its head is not one .*: tables"):
        Recording(path)


def test_damage_is_an_error_of_values() -> None:
    assert issubclass(Damaged, ValueError)


def test_three_tiers_are_recorded_as_two_are(tmp_path: Path) -> None:
    device = ("lru", {}, {"device": "cpu", "capacity": 320}, None)
    with open_with("lru", {}, 800, {}, TABLES, device=device) as store, store.record(tmp_path / "rows.trace"):
        for _ in range(3):
            store.fetch([4, 5, 4], table="a")
            store.fetch([4], table="b")
    assert read(tmp_path / "rows.trace") == [("a", [4, 5, 4]), ("b", [4])] * 3
    assert os.path.getsize(tmp_path / "rows.trace") < 1000
