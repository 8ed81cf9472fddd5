"""Traces in files, made-up ones, and those that the hashing of a family gives."""

from pathlib import Path

import libcachesim
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiercache import ConfigError, FormatError, StorageError, Store
from tiercache.engram.deepseek import deepseek_hashers
from tiercache.engram.families import FAMILIES, hashed
from tiercache.lab import synthetic
from tiercache.lab.formats import REQUEST, load_csv, load_oracle, load_recording, load_trace, save_csv, save_oracle
from tiercache.lab.simulator import simulate
from tiercache.lab.trace import Trace, single
from tiercache.recording.blocks import RecordedTable
from tiercache.recording.reader import DamagedRecording

TABLES = {"a": np.zeros((100, 8), np.uint8), "b": np.zeros((50, 8), np.uint8)}
batches_of_rows = st.lists(st.lists(st.integers(0, 2**62 - 1), max_size=12), max_size=12)


def trace_of(batches: list[list[int]]) -> Trace:
    rows = np.array([row for batch in batches for row in batch], np.int64)
    return Trace(rows, np.cumsum([0, *map(len, batches)], dtype=np.int64))


def lists(trace: Trace) -> list[list[int]]:
    return [batch.tolist() for batch in trace.batches()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches_of_rows)
@pytest.mark.parametrize(("save", "load"), [(save_oracle, load_oracle), (save_csv, load_csv)], ids=["oracle", "csv"])
def test_a_trace_comes_back_but_for_batches_without_rows(tmp_path: Path, save, load, batches: list[list[int]]) -> None:
    save(tmp_path / "trace", trace_of(batches))
    assert lists(load(tmp_path / "trace")) == [batch for batch in batches if batch]


@given(st.lists(st.integers(0, 5), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_oracle_tells_the_next_use(tmp_path: Path, rows: list[int]) -> None:
    save_oracle(tmp_path / "trace", single(np.array(rows, np.int64)), num_bytes=264)
    requests = np.fromfile(tmp_path / "trace", REQUEST)
    expected = [next((at for at in range(i + 1, len(rows)) if rows[at] == rows[i]), -1) for i in range(len(rows))]
    assert requests["next_use"].tolist() == expected
    assert set(requests["num_bytes"].tolist()) <= {264}


def test_libcachesim_reads_what_is_written(tmp_path: Path) -> None:
    rows = synthetic.zipf(2000, batches=400, size=50, exponent=0.9).rows
    path = tmp_path / "rows.oracleGeneral"
    save_oracle(path, single(rows))

    def reader() -> libcachesim.TraceReader:
        options = libcachesim.ReaderInitParam(ignore_obj_size=True)
        return libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE, options)

    assert [request.obj_id for request in reader()] == rows.tolist()
    miss_ratio, _ = libcachesim.LRU(cache_size=100).process_trace(reader())
    assert round(miss_ratio * rows.size) == simulate("lru", 100, rows).misses
    clairvoyant, _ = libcachesim.Belady(cache_size=100).process_trace(reader())
    assert clairvoyant < 0.9 * miss_ratio, "it uses the next uses"


def test_csv_of_others_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("7,3,100,x\n7,4,1,y\n9,3,5,z\n")
    assert lists(load_trace(path)) == [[3, 4], [3]]
    path.write_text("when, what\n1,2\n")
    assert lists(load_csv(path)) == [[2]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"1,2\n1\n", "not a trace as csv"),
        ("t.csv", b"1,x\n", "not a trace as csv"),
        ("t.csv", b"1,-3\n", "not a trace as csv"),
        ("t.csv", b"1,%d\n" % 2**62, "object 4611686018427387904; allowed are row numbers"),
        ("t.bin", b"x" * 23, "23 bytes; oracleGeneral has 24 a request"),
        ("t.bin", b"\xff" * 24, "allowed are row numbers"),
        ("t.trace", b"TCrecord", "not a recording of a store"),
    ],
)
def test_what_is_no_trace_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as raised:
        load_trace(path)
    assert str(path) in str(raised.value)


def test_the_format_is_found_or_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_oracle(path, single(np.arange(3)))
    with pytest.raises(ConfigError, match="allowed are recording, oracle, csv"):
        load_trace(path)
    with pytest.raises(ConfigError, match="format = 'x'"):
        load_trace(path, "x")
    assert load_trace(path, "oracle").rows.tolist() == [0, 1, 2]
    with pytest.raises(StorageError, match="nowhere"):
        load_trace(tmp_path / "nowhere.csv")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    with Store.open({"host": {"capacity": 80}}, tables=TABLES) as store, store.record(tmp_path / "t"):
        store.fetch([[5, 7], [5, 5]], table="a")
        store.fetch([], table="b")
        store.fetch([49], table="b")
    return tmp_path / "t"


def test_a_recording_is_loaded_as_rows_of_its_store_or_another(recorded: Path) -> None:
    assert lists(load_trace(recorded)) == [[5, 7, 5, 5], [], [149]]
    about = [RecordedTable("c", 7, 8, ""), RecordedTable("b", 50, 8, ""), RecordedTable("a", 100, 8, "")]
    assert lists(load_recording(recorded, about)) == [[62, 64, 62, 62], [], [56]]
    with pytest.raises(FormatError, match="another table 'b': 50 rows; here it has 51"):
        load_recording(recorded, [about[2], about[1]._replace(num_rows=51)])


def test_a_damaged_recording_is_loaded_in_part(recorded: Path) -> None:
    recorded.write_bytes(recorded.read_bytes()[:-1])
    with pytest.warns(DamagedRecording, match="ends within a block"):
        trace = load_recording(recorded)
    assert lists(trace) == [[5, 7, 5, 5], [], [149]]


def shares(trace: Trace, num_rows: int) -> np.ndarray:
    """Share of the accesses that each row has, most first."""
    return np.sort(np.bincount(trace.rows, minlength=num_rows))[::-1] / trace.rows.size


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_zipf_has_the_popularity_of_its_law(exponent: float) -> None:
    trace = synthetic.zipf(1000, batches=400, size=1000, exponent=exponent)
    assert np.diff(trace.offsets).tolist() == [1000] * 400
    edges = np.arange(1, 1002.0)
    integral = np.log(edges) if exponent == 1 else edges ** (1 - exponent) / (1 - exponent)
    law = np.diff(integral) / (integral[-1] - integral[0])
    found = shares(trace, 1000)
    for top in (1, 10, 100, 1000):
        assert found[:top].sum() == pytest.approx(law[:top].sum(), rel=0.1, abs=2e-3)


@pytest.mark.parametrize("make", [synthetic.zipf, synthetic.shifting, synthetic.scanning])
def test_a_seed_makes_the_trace(make) -> None:
    first, again, other = (make(5000, batches=20, size=100, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.rows, again.rows)
    assert not np.array_equal(first.rows, other.rows)
    assert first.rows.min() >= 0
    assert first.rows.max() < 5000
    assert first.num_batches == 20


def test_popularity_shifts_by_its_share() -> None:
    trace = synthetic.shifting(10_000, batches=40, size=1000, exponent=1.0, period=20, share=0.5)
    halves = [np.bincount(part, minlength=10_000) for part in np.split(trace.rows, 2)]
    before, after = (set(np.argsort(-half)[:200].tolist()) for half in halves)
    assert 60 < len(before & after) < 140
    still = synthetic.shifting(10_000, batches=40, size=1000, exponent=1.0, period=20, share=0.0)
    assert np.array_equal(still.rows, synthetic.zipf(10_000, batches=40, size=1000, exponent=1.0).rows)


def test_a_scan_reads_the_table_in_order() -> None:
    trace = synthetic.scanning(1000, batches=40, size=300, every=4)
    scans = np.concatenate([batch for number, batch in enumerate(trace.batches()) if number % 4 == 3])
    assert np.array_equal(scans, np.arange(3000) % 1000)


def test_a_made_up_text_repeats_its_n_grams() -> None:
    text, again = (synthetic.markov_text(20_000, vocabulary=5000, seed=3) for _ in range(2))
    assert np.array_equal(text.tokens, again.tokens)
    assert text.documents.tolist() == [2000] * 10
    assert (text.tokens.min() >= 0, text.tokens.max() < 5000) == (True, True)
    loose = synthetic.markov_text(20_000, vocabulary=5000, seed=3, memory=0.0)
    pairs = [np.unique(stream.tokens[:-1] * 5000 + stream.tokens[1:]).size for stream in (text, loose)]
    assert pairs[0] < 0.8 * pairs[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: synthetic.zipf(0, batches=1, size=1),
        lambda: synthetic.zipf(9, batches=1, size=0),
        lambda: synthetic.zipf(9, batches=1, size=1, exponent=-1),
        lambda: synthetic.shifting(9, batches=1, size=1, share=1.5),
        lambda: synthetic.shifting(9, batches=1, size=1, period=0),
        lambda: synthetic.scanning(9, batches=1, size=1, every=1),
        lambda: synthetic.markov_text(9, vocabulary=9, memory=2),
    ],
    ids=["no rows", "no size", "exponent", "share", "period", "every", "memory"],
)
def test_what_cannot_be_made_up_is_refused(call) -> None:
    with pytest.raises(ValueError, match="allowed are"):
        call()


@pytest.mark.parametrize(("family", "heads"), [("demo", 16), ("deepseek", 24), ("qwen", 16), ("longcat", 12)])
def test_a_text_is_hashed_by_every_family(family: str, heads: int) -> None:
    text = synthetic.markov_text(3000, vocabulary=1000)
    rows = hashed(family, text.tokens, text.documents, vocabulary=1000)
    assert rows.shape == (3000, heads)
    assert set(FAMILIES) == {"demo", "deepseek", "qwen", "longcat"}
    with pytest.raises(ValueError, match="num_rows"):
        hashed(family, text.tokens, text.documents, vocabulary=1000, num_rows=10)


def test_a_family_hashes_as_its_own_hasher() -> None:
    text = synthetic.markov_text(3000, vocabulary=1000)
    (hasher,) = deepseek_hashers((1,), compression=None, compressed_vocab_size=1000)
    expected = hasher.rows(text.tokens, text.documents)
    assert np.array_equal(hashed("deepseek", text.tokens, text.documents, vocabulary=1000), expected)
