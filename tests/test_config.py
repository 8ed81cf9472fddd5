"""The configuration: defaults, TOML, and refusals that name field, value and what is allowed."""

import struct
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from tiercache import Store
from tiercache.config import HostConfig, StoreConfig, parse_bytes
from tiercache.errors import ConfigError, FormatError

TABLE = {"path": "t.safetensors"}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (1, 1),
        ("4096", 4096),
        ("64MiB", 64 << 20),
        ("1GiB", 1 << 30),
        ("1.5GiB", 3 << 29),
        ("8GB", 8 * 10**9),
        ("3KB", 3000),
        (" 2 TiB ", 2 << 40),
        (np.int64(4096), 4096),
        (np.uint8(200), 200),
        ("7B", 7),
    ],
)
def test_capacities_are_bytes(text, num_bytes):
    assert parse_bytes(text) == num_bytes
    assert StoreConfig.load({"host": {"capacity": text}}).host.capacity == num_bytes


NO_CAPACITIES = [
    *(0, -1, "0", "-5MiB", "", "MiB", "1 mile", "64Mb", "1e9", "0.5B", "4gb", "4G"),
    *(1.5, np.float32(2), True, np.True_, None, 1 << 63),
]


@pytest.mark.parametrize("text", NO_CAPACITIES, ids=repr)
def test_what_is_no_capacity_is_refused(text):
    with pytest.raises(ConfigError, match=r"host\.capacity = .*allowed are .*64MiB") as caught:
        StoreConfig.load({"host": {"capacity": text}})
    assert repr(text) in str(caught.value)


def test_only_path_has_no_default():
    config = StoreConfig.load({"table": [TABLE]})
    (table,) = config.tables
    assert (table.name, table.path, table.fields, table.resident) == ("table", Path("t.safetensors"), (), ())
    assert (config.dtype, config.mode) == ("auto", "r")
    assert (config.host.capacity, config.host.policy, config.host.policy_options) == (1 << 30, HostConfig().policy, {})
    storage = config.storage
    assert (storage.engine, storage.queue_depth, storage.direct, storage.verify) == ("auto", 128, True, "off")


def test_toml_is_read_and_tables_lie_beside_it(tmp_path):
    path = tmp_path / "store.toml"
    path.write_text(
        """
        dtype = "bfloat16"
        [[table]]
        name = "layers.1"
        path = "sub/model.safetensors.index.json"
        fields = ["w.{shard}", "s"]
        resident = ["s"]
        [[table]]
        name = "layers.14"
        path = "/data/t"
        [host]
        capacity = "64GiB"
        policy = "wtinylfu"
        policy_options = { window = 0.02, aging = 10 }
        [storage]
        engine = "threads"
        queue_depth = 64
        direct = false
        verify = "page"
        """
    )
    config = StoreConfig.load(path)
    assert config == StoreConfig.load(str(path)) == StoreConfig.load(config)
    first, second = config.tables
    assert first.path == tmp_path / "sub/model.safetensors.index.json"
    assert second.path == Path("/data/t")
    assert (first.fields, first.resident) == (("w.{shard}", "s"), ("s",))
    assert config.host.policy_options == {"window": 0.02, "aging": 10}
    assert isinstance(config.host.policy_options["aging"], int)
    assert config.storage.verify == "page"


def test_a_mapping_may_say_tables():
    assert StoreConfig.load({"tables": [TABLE]}) == StoreConfig.load({"table": [TABLE]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tabel": []}, r"tabel = \[\]: unknown; allowed are dtype, mode, group_rows, restore, table, device, host, storage"),
        ({"table": [TABLE | {"size": 3}]}, r"table\.0\.size = 3: unknown; allowed are name, path, fields, resident"),
        ({"host": {"capcity": 1}}, r"host\.capcity = 1: unknown; allowed are capacity, policy, policy_options"),
        ({"storage": {"x": 1}}, r"storage\.x = 1: unknown; allowed are engine, queue_depth, direct, verify"),
        ({"table": [{"name": "a"}]}, r"table\.0\.path: is required"),
        ({"table": [TABLE, TABLE]}, r"table = .*more than once: table"),
        ({"table": [TABLE | {"name": ""}]}, r"table\.0\.name = ''"),
        ({"table": [TABLE | {"fields": "w"}]}, r"table\.0\.fields = 'w'"),
        ({"table": TABLE}, r"table = .*: allowed is a list of sections, each of which a TOML file begins with \[\[table\]\]"),
        ({"tables": 5}, r"tables = 5: .*\[\[table\]\]"),
        ({"table": [TABLE | {"fields": "w"}]}, r"table\.0\.fields = 'w': allowed is a list of names"),
        ({"table": [TABLE | {"resident": [3]}]}, r"table\.0\.resident\.0 = 3: allowed is text"),
        ({"table": [{"path": 7}]}, r"table\.0\.path = 7: allowed is a path"),
        ({"table": ["t"]}, r"table\.0 = 't': allowed is a section"),
        ({"host": 5}, r"host = 5: allowed is a section of settings by name"),
        ({"host": {"policy_options": [1]}}, r"host\.policy_options = \[1\]: allowed is a section"),
        ({"host": {"policy": "random"}}, r"host\.policy = 'random': .*'fifo', 'lru'.*'static'"),
        ({"host": {"policy": "belady"}}, r"host\.policy = 'belady'"),
        ({"host": {"policy_options": {"window": "x"}}}, r"host\.policy_options\.window = 'x': allowed is a number"),
        ({"storage": {"engine": "aio"}}, r"storage\.engine = 'aio': .*'auto', 'uring', 'threads' or 'gds'"),
        ({"storage": {"queue_depth": 0}}, r"storage\.queue_depth = 0: .*greater than or equal to 1"),
        ({"storage": {"direct": "yes"}}, r"storage\.direct = 'yes'"),
        ({"storage": {"verify": "row"}}, r"storage\.verify = 'row': .*'off' or 'page'"),
        ({"dtype": "int8"}, r"dtype = 'int8': .*'bfloat16'"),
        ({"mode": "r+"}, r"mode = 'r\+': this release only reads"),
        ({"device": {"capacity": "many"}}, r"device\.capacity = 'many'"),
        ({"device": {"promotion": 0}}, r"device\.promotion = 0"),
        ({"table": [{"path": "a\0b"}]}, r"table\.0\.path = .*without a zero byte"),
        ({"table": [{"path": "~nobody-here/t"}]}, r"table\.0\.path = .*~nobody-here/t.*such a home"),
        ({"host": {"policy": "static", "hot_set": "\0"}}, r"host\.hot_set = .*without a zero byte"),
        ({"device": {"policy": "static"}}, r'device = .*"static" needs a hot_set'),
    ],
)
def test_refusals_name_field_value_and_what_is_allowed(config, message):
    with pytest.raises(ConfigError, match=message):
        StoreConfig.load(config)


@pytest.mark.parametrize("config", [None, 5, [TABLE]], ids=repr)
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ConfigError, match=r"config = .*allowed are the path of a TOML file, a mapping and a StoreConfig"):
        Store.open(config)


def test_numbers_of_numpy_are_numbers():
    options = StoreConfig.load({"host": {"policy_options": {"small": np.float64(0.5), "threshold": np.int8(2)}}})
    assert options.host.policy_options == {"small": 0.5, "threshold": 2}
    assert [type(value) for value in options.host.policy_options.values()] == [float, int]


def test_every_refusal_is_named_at_once():
    with pytest.raises(ConfigError, match=r"dtype = .*host\.policy = "):
        StoreConfig.load({"dtype": "x", "host": {"policy": "y"}})


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot read the config: No such file"):
        StoreConfig.load(tmp_path / "none.toml")
    for content in (b"dtype = ", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
            StoreConfig.load(tmp_path / "bad.toml")


def test_a_config_cannot_be_changed():
    config = StoreConfig.load({})
    with pytest.raises(ValidationError, match="frozen"):
        config.dtype = "float32"


def test_static_needs_a_hot_set() -> None:
    with pytest.raises(ConfigError, match=r'host.*policy "static" needs a hot_set'):
        StoreConfig.load({"host": {"policy": "static"}})


def test_a_static_store_keeps_its_hot_set(tmp_path: Path) -> None:
    np.save(tmp_path / "hot.npy", np.array([7, 3], np.uint16))
    (tmp_path / "store.toml").write_text('[host]\npolicy = "static"\nhot_set = "hot.npy"\n')
    table = np.arange(40, dtype=np.float32).reshape(10, 4)
    with Store.open(tmp_path / "store.toml", tables={"rows": table}) as store:
        for _ in range(2):
            assert np.array_equal(store.fetch(range(10)).numpy(), table)
        assert store.stats().host.hits == 2
        assert store.stats().host.bypasses == 16


def npy(header: str, data: bytes = b"") -> bytes:
    """A .npy file of this header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode().ljust(117) + b"\n" + data


@pytest.mark.parametrize(
    "content",
    [
        b"no",
        b"",
        b"PK\x03\x04" + b"x" * 60,
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776000,), }"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2,), }", b"\0" * 15),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 1), }", b"\0" * 8),
        npy("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8),
        npy("{'descr': (((((("),
    ],
    ids=["foreign", "empty", "zip", "huge", "short", "2-D", "floats", "objects", "header"],
)
@pytest.mark.parametrize("policy", ["static", "gittins"])
def test_a_hot_set_that_is_none_is_named(tmp_path: Path, content: bytes, policy: str) -> None:
    (tmp_path / "hot.npy").write_bytes(content)
    config = {"host": {"policy": policy, "hot_set": tmp_path / "hot.npy"}}
    with pytest.raises(FormatError, match=r"hot\.npy"):
        Store.open(config, tables={"rows": np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize("policy", ["static", "lru"])
@pytest.mark.parametrize(
    ("row", "why"), [(-1, "allowed are rows 0 to 9"), (10, "allowed are rows 0 to 9"), (3, "is there again")]
)
def test_a_hot_set_of_other_rows_is_refused(tmp_path: Path, policy: str, row: int, why: str) -> None:
    np.save(tmp_path / "hot.npy", np.array([3, 4, row, 4]))
    config = {"host": {"policy": policy, "hot_set": tmp_path / "hot.npy"}}
    with pytest.raises(ConfigError, match=rf"host\.hot_set = .*at position 2 .*row {row}\b.*{why}"):
        Store.open(config, tables={"rows": np.zeros((10, 2), np.float32)})
