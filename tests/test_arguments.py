"""Bad input: calls, settings and files that cannot be. A clear error, and nothing has changed."""

import enum
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stores import config_of, descriptors_of, is_exact, store_threads, write_rows

from tiercache.errors import ConfigError, FormatError, StorageError
from tiercache.records import plain
from tiercache.request import _localise
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.store import Store
from tiercache.testing import OracleSource, oracle


@pytest.fixture
def file(tmp_path) -> Path:
    return write_rows(tmp_path / "t.safetensors", 500, 264)


# arguments


@pytest.fixture
def store(file):
    with Store.open(config_of(file, capacity=264 * 10), tables={"memory": oracle(np.arange(50), 264)}) as store:
        store.fetch([1, 2], table="file")
        before = store.stats()
        yield store
        assert store.stats()._replace(storage=None) == before._replace(storage=None)
        assert is_exact(store, [0, 1, 499], "file")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([500], r"row 500 at position \(0,\) is out of range: table 'file' has rows 0 to 499"),
        ([3, -1, 700], r"row -1 at position \(1,\)"),
        ([[0, 1], [999, -5]], r"row 999 at position \(1, 0\)"),
        (-1, r"row -1 at position \(\)"),
        (torch.tensor([0, 2**40]), rf"row {2**40} at position \(1,\)"),
        (np.array([1, 2**63 + 1], np.uint64), rf"row {2**63 + 1} at position \(1,\)"),
        (np.array([2**64 - 1], np.uint64), rf"row {2**64 - 1} at position \(0,\)"),
        (torch.tensor([0, 2**64 - 1], dtype=torch.uint64), rf"row {2**64 - 1} at position \(1,\)"),
        (np.int8(-128), "row -128"),
    ],
)
@pytest.mark.parametrize("call", [Store.fetch, Store.prefetch])
def test_a_row_out_of_range_is_named(store, call, rows, message):
    with pytest.raises(IndexError, match=message):
        call(store, rows, table="file")


@pytest.mark.parametrize(
    "rows",
    [
        [0.0],
        np.zeros(3),
        np.zeros(0, np.float32),
        [True],
        np.ones(2, np.bool_),
        np.zeros(2, np.complex64),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.complex64),
        "7",
        None,
        ["a"],
    ],
)
def test_indices_that_are_not_integers_here(store, rows):
    with pytest.raises(TypeError, match=r"indices are .*(integers|CPU)"):
        store.fetch(rows, table="file")


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.empty(3, 264, dtype=torch.uint8), ValueError, r"shape \(3, 264\).*\(2, 264\)"),
        (torch.empty(2, 263, dtype=torch.uint8), ValueError, "shape"),
        (torch.empty(528, dtype=torch.uint8), ValueError, "shape"),
        (torch.empty(2, 264), TypeError, r"float32.*uint8"),
        (torch.empty(2, 264, dtype=torch.int8), TypeError, r"int8.*uint8"),
        (torch.empty(2, 264, dtype=torch.uint8, device="meta"), TypeError, "meta"),
        (torch.empty(264, 2, dtype=torch.uint8).T, ValueError, "contiguous"),
        (torch.empty(2, 528, dtype=torch.uint8)[:, ::2], ValueError, "contiguous"),
        (np.empty((2, 264), np.uint8), TypeError, "ndarray"),
    ],
)
def test_an_output_that_does_not_fit(store, out, error, message):
    with pytest.raises(error, match=message):
        store.fetch([5, 6], table="file", out=out)


def test_an_output_that_wants_a_gradient():
    table = torch.ones(3, 4)
    with (
        Store.open(config_of(), tables={"t": table}) as store,
        pytest.raises(ValueError, match="gradient"),
    ):
        store.fetch([0], out=torch.zeros(1, 4, requires_grad=True))


def test_a_stream(store):
    with pytest.raises(ValueError, match="stream"):
        store.fetch([5], object(), table="file")


def test_a_table_that_is_not_there(store):
    for call in (store.fetch, store.prefetch):
        with pytest.raises(KeyError, match=r"'none'.*file, memory"):
            call([5], table="none")
        with pytest.raises(KeyError, match=r"required.*file, memory"):
            call([5])
    with pytest.raises(KeyError):
        store.num_rows("none")


def test_an_index_that_changes_while_it_is_checked():
    class Changing:
        """One index, which is good from its second reading on."""

        size = 1
        good = False

        def __getitem__(self, position):
            row, self.good = 0 if self.good else -5_000_000_000, True
            return row

    rows = np.zeros(1, np.int64)
    assert getattr(_localise, "py_func", _localise)(Changing(), 0, 10, rows) == 0


# settings and files at open


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": {"capacity": 0}}, r"host\.capacity = 0"),
        ({"host": {"capacity": "many"}}, r"host\.capacity = 'many'"),
        ({"host": {"capacity": 263}}, r"host\.capacity = 263: holds no row of 264 bytes"),
        ({"host": {"policy": "best"}}, r"host\.policy = 'best'"),
        ({"host": {"policy": "lru", "policy_options": {"small": 0.1}}}, r"policy_options = .*small.*'lru'.*takes no options"),
        (
            {"host": {"policy": "s3fifo", "policy_options": {"smal": 0.1}}},
            r"policy_options = .*smal.*; it takes small, ghost, threshold",
        ),
        ({"host": {"policy": "s3fifo", "policy_options": {"small": 2}}}, r"policy_options = .*small"),
        ({"host": {"policy": "static"}}, r"host = .*'static'.*needs a hot_set"),
        ({"hots": {}}, "hots"),
        ({"storage": {"engine": "spdk"}}, r"storage\.engine = 'spdk'"),
        ({"storage": {"verify": "page"}}, r'storage\.verify = "page".*no page checksums'),
        ({"device": {}}, "device"),
    ],
)
def test_a_setting_that_cannot_be(file, settings, message):
    with pytest.raises(ConfigError, match=message):
        Store.open({"table": [{"path": file}], **settings})
    assert not store_threads()
    assert descriptors_of(file) == 0


def test_a_store_needs_a_table_and_each_a_name_of_its_own(file):
    with pytest.raises(ConfigError, match="at least one table"):
        Store.open({})
    with pytest.raises(ConfigError, match="'file'"):
        Store.open(config_of(file), tables={"file": np.zeros((1, 1), np.float32)})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([np.zeros((1, 1))], r"tables = \[.*: allowed is a mapping from names"),
        ({"x": "model.safetensors"}, r"tables\['x'\] = 'model.safetensors': .*a path belongs to a table of the config"),
        ({"x": Path("t")}, r"tables\['x'\] = .*a path belongs"),
        ({"x": [[1.0]]}, r"tables\['x'\] = .*to be a source it lacks num_rows, record, read, close"),
        ({3: np.zeros((1, 1))}, r"tables\[3\] = .*a table's name is text"),
        ({"x": SimpleNamespace(num_rows=1, record=plain("U8", 1), read=print)}, r"it lacks close"),
        ({"x": SimpleNamespace(num_rows=1, record=8, read=print, close=print)}, r"its record is a int, not a tiercache"),
        ({"x": SimpleNamespace(num_rows=0, record=plain("U8", 1), read=print, close=print)}, r"its num_rows is 0"),
        ({"x": SimpleNamespace(num_rows=True, record=plain("U8", 1), read=print, close=print)}, r"its num_rows is True"),
        ({"x": SimpleNamespace(num_rows=1.5, record=plain("U8", 1), read=print, close=print)}, r"its num_rows is 1\.5"),
        ({"x": SimpleNamespace(num_rows=-1, record=plain("U8", 1), read=print, close=print)}, r"its num_rows is -1"),
        ({"x": SimpleNamespace(num_rows=1 << 62, record=plain("U8", 1), read=print, close=print)}, r"less than 2\*\*62"),
        ({name: OracleSource(1 << 61, plain("U8", 1)) for name in "ab"}, r"tables: have \d+ rows in all.*less than 2\*\*62"),
        ({"x": SimpleNamespace(num_rows=1, record=plain("U8", 1), read=print, close=3)}, r"its close cannot be called"),
        ({"x": SimpleNamespace(num_rows="9", record=plain("U8", 1), read=print, close=print)}, r"its num_rows is '9'"),
    ],
)
def test_what_is_no_source(tables, message):
    with pytest.raises(ConfigError, match=message):
        Store.open({}, tables=tables)
    assert not store_threads()


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (os.unlink, StorageError),
        (truncate, FormatError),
        (lambda path: os.truncate(path, 0), FormatError),
        (lambda path: path.write_bytes(b"PK\x03\x04" * 100), FormatError),
        (lambda path: (path.unlink(), path.mkdir()), FormatError),
    ],
    ids=["missing", "truncated", "empty", "foreign", "directory"],
)
def test_a_file_that_is_no_table(file, damage, error):
    damage(file)
    with pytest.raises(error, match=re.escape(str(file))):
        Store.open(config_of(file))
    assert not store_threads()


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + ".safetensors", "\0"])
def test_a_path_that_cannot_be(name):
    with pytest.raises(StorageError):
        open_table("t", name)


def test_counts_of_numpy_do_not_overflow():
    sources = {name: OracleSource(np.int32(2**31 - 1), plain("U8", 264)) for name in "abc"}
    with Store.open(config_of(), tables=sources) as store:
        assert store.num_rows("c") == 2**31 - 1
        assert is_exact(store, [2**31 - 2, 0], "c")


class _Rows(enum.IntEnum):
    SOME = 100


@pytest.mark.parametrize("width", [np.int8(8), np.uint8(8), np.int16(8), np.uint64(8)])
def test_integers_of_any_type_leave_other_stores_alone(width):
    """What the first call was given decides for all later ones of which types compiled code takes its arguments."""
    for size in (width, 264, 70_000):
        record, records = plain("U8", size), oracle(np.arange(100), int(size))
        source = MemoryTable(records, record)
        source.num_rows = _Rows.SOME
        with Store.open({"host": {"capacity": 40 * int(size)}}, tables={"t": source, "u": records}) as store:
            for table in store.tables:
                for rows in (range(20), range(100), range(10)):
                    assert np.array_equal(store.fetch(rows, table=table).numpy(), records[list(rows)])


@pytest.mark.parametrize("width", [8.0, "8", None])
def test_a_width_that_is_no_integer(width):
    with pytest.raises(FormatError, match="'rows' has a width of"):
        plain("U8", width)


def test_a_table_of_an_unsupported_dtype(tmp_path):
    from safetensors.torch import save_file

    save_file({"t": torch.zeros(3, 4, dtype=torch.int64)}, tmp_path / "t.safetensors")
    with pytest.raises(FormatError, match="I64"):
        Store.open(config_of(tmp_path / "t.safetensors"))
