"""What tune is made of: the time of batches by hand, what tiers leave to be done against live stores, and the search."""

import tomllib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import write_rows, write_shards

from tiercache import ConfigError, Store
from tiercache.config import StoreConfig
from tiercache.lab import measure as measuring
from tiercache.lab import toml
from tiercache.lab.machine import Below, DiskFigures, Machine, Resident
from tiercache.lab.model import Work, seconds, times
from tiercache.lab.synthetic import zipf
from tiercache.lab.tiers import simulate_tiers
from tiercache.lab.trace import Trace
from tiercache.lab.tune import Predictor, Sizes, ladder, smallest, why_not
from tiercache.lab.work import ReadCounter, _numbers_of_misses, ask, work_of
from tiercache.recording.blocks import RecordedTable
from tiercache.storage import open_table
from tiercache.testing import oracle

RESIDENT = Resident(rows=(1, 101), seconds=(1e-5, 1.1e-4))
DISK = DiskFigures(row_seconds=1e-6, reads=(1, 10), seconds=(1e-4, 4e-4), read_bytes=512, byte_seconds=1e-9)
ALONE = Machine(record_bytes=8, resident=RESIDENT, disk=DISK)
STACKED = Machine(
    record_bytes=8, device="cpu", resident=RESIDENT, disk=DISK, below=Below(call_seconds=5e-5, row_seconds=2e-6)
)

FIELDS: dict[str, tuple[str, ...]] = {"one": (), "sharded": ("rows.{shard}",)}


def work(**columns: list[float]) -> Work:
    length = len(next(iter(columns.values())))
    filled = {name: columns.get(name, [0.0] * length) for name in Work._fields}
    filled["weight"] = columns.get("weight", [1.0] * length)
    return Work(*(np.array(filled[name], np.float64) for name in Work._fields))


def test_the_time_of_a_batch_is_what_the_figures_say() -> None:
    some = work(
        rows=[0, 1, 51, 201, 51],
        misses=[0, 0, 3, 100, 1],
        reads=[0, 0, 2, 20, 1],
        num_bytes=[0, 0, 2048, 20 * 512, 100],
    )
    found = times(ALONE, some)
    # Level before one row; 1 us a row; on beyond the last point. Each miss 1 us more.
    assert found.processor == pytest.approx([1e-5, 1e-5, 6e-5 + 3e-6, 2.1e-4 + 1e-4, 6e-5 + 1e-6])
    # A ninth of 0.3 ms a read more; a ns for each byte beyond 512 a read, none for fewer.
    assert found.disk == pytest.approx([0, 0, 1e-4 + 3e-4 / 9 + 1024e-9, 4e-4 + 10 * 3e-4 / 9, 1e-4])
    together = found.processor + found.disk
    assert seconds(ALONE, some) == pytest.approx(together.sum())
    behind = times(ALONE, some, ahead=True)
    assert behind.processor == pytest.approx(found.processor)
    # Behind 20 others 20 reads take 0.67 ms; one or two take half of what they take alone, which is more than behind others.
    assert behind.disk == pytest.approx([0, 0, (1e-4 + 3e-4 / 9) / 2 + 1024e-9, 20 * 3e-4 / 9, 5e-5])
    assert seconds(ALONE, some, ahead=True) == pytest.approx(np.maximum(behind.processor, behind.disk).sum())
    weighted = some._replace(weight=np.array([1, 2, 3, 4, 5.0]))
    assert seconds(ALONE, weighted) == pytest.approx(together @ [1, 2, 3, 4, 5])


def test_rows_of_the_host_tier_cost_their_way_up() -> None:
    some = work(rows=[51, 51, 51], below=[0, 4, 4], misses=[0, 0, 2], reads=[0, 0, 1], num_bytes=[0, 0, 512])
    found = times(STACKED, some)
    assert found.processor == pytest.approx([6e-5, 6e-5 + 5e-5 + 8e-6, 6e-5 + 8e-6 + 2e-6])
    assert found.disk == pytest.approx([0, 0, 1e-4])
    assert times(STACKED, some.resident).processor == pytest.approx([6e-5] * 3)
    assert times(STACKED, some.resident).disk.sum() == 0


def test_one_point_is_a_rate() -> None:
    disk = DISK.model_copy(update={"reads": (10.0,), "seconds": (1e-3,)})
    machine = ALONE.model_copy(update={"disk": disk, "resident": Resident(rows=(100,), seconds=(1e-4,))})
    found = times(machine, work(rows=[50, 200], reads=[1, 20], num_bytes=[0, 0]))
    assert found.processor == pytest.approx([5e-5, 2e-4])
    assert found.disk == pytest.approx([1e-4, 2e-3])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """2000 rows of 264 bytes in one file, and 600 in three shards."""
    directory = tmp_path_factory.mktemp("tables")
    one = write_rows(directory / "one.safetensors", 2000, 264)
    return {"one": one, "sharded": write_shards(directory, oracle(np.arange(600), 264), 3)}


def config_over(tables: dict[str, Path], host: int, device: int | None = None, **host_options: object) -> StoreConfig:
    config: dict = {
        "table": [{"name": name, "path": path, "fields": FIELDS[name]} for name, path in tables.items()],
        "host": {"capacity": host, "policy": "s3fifo", **host_options},
        "storage": {"engine": "threads", "queue_depth": 4},
    }
    if device is not None:
        config["device"] = {"device": "cpu", "capacity": device, "promotion": 272 * 20, "policy": "lru"}
    return StoreConfig.load(config)


def batches(seed: int, count: int = 150) -> Trace:
    """Batches each of one of the two tables, as rows of the store, some without rows."""
    rng = np.random.default_rng(seed)
    parts = [np.empty(0, np.int64)]
    for turn in range(count):
        base, num_rows = ((0, 2000), (2000, 600))[turn % 2]
        parts.append(base + (rng.zipf(1.2, rng.integers(0, 120)) - 1) % num_rows)
    return Trace(np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64))


def described(tables: dict[str, Path]):
    files = [open_table(name, path, fields=FIELDS[name]) for name, path in tables.items()]
    return files, [RecordedTable(file.name, file.num_rows, file.record_bytes, file.identity) for file in files]


@pytest.mark.parametrize("device", [None, 300 * 272])
@pytest.mark.parametrize("warm_up", [0, 0.5])
def test_work_is_what_a_live_store_does(tables: dict[str, Path], device: int | None, warm_up: float) -> None:
    config, trace = config_over(tables, 500 * 272, device), batches(1)
    files, about = described(tables)
    asked = ask(trace, warm_up=warm_up)
    with Store.open(config) as store:
        before = store.stats()
        for number, rows in enumerate(trace.batches()):
            if number == asked.first:
                before = store.stats()
            which = int(rows.size > 0 and rows[0] >= 2000)
            store.fetch(rows - 2000 * which, table=("one", "sharded")[which])
        after = store.stats()
    assert before.storage is not None
    assert after.storage is not None
    found = work_of(config, about, asked, ReadCounter(files, after.storage.alignment))
    assert found.total(found.misses) == after.host.misses - before.host.misses > 0
    assert found.total(found.reads) == after.storage.reads - before.storage.reads
    assert found.total(found.num_bytes) == after.storage.bytes_read - before.storage.bytes_read
    assert found.total(found.rows) == after.rows - before.rows
    assert found.total(found.below) == (0 if device is None else after.host.hits - before.host.hits)
    hits = after.host.hits - before.host.hits
    if after.device is not None and before.device is not None:
        hits += after.device.hits - before.device.hits
    assert asked.accesses - found.total(found.misses) == hits


def test_without_files_each_row_missed_is_a_read(tables: dict[str, Path]) -> None:
    files, about = described(tables)
    config, asked = config_over(tables, 100 * 272), ask(batches(2))
    found = work_of(config, about, asked, None)
    assert np.array_equal(found.reads, found.misses)
    assert not found.num_bytes.any()
    merged = work_of(config, about, asked, ReadCounter(files, 512))
    assert merged.total(merged.reads) < found.total(found.reads)
    assert np.array_equal(merged.misses, found.misses)


def test_what_is_asked_for_first_no_tier_has() -> None:
    trace = Trace(np.array([1, 2, 2, 3, 1, 4, 4, 5, 1]), np.array([0, 3, 5, 5, 9]))
    asked = ask(trace, warm_up=0.5)
    assert (asked.first, asked.accesses, asked.first_uses, asked.touched) == (2, 3, 2, 5)
    assert asked.distinct.tolist() == [2, 2, 0, 3]
    config = StoreConfig.load({"host": {"capacity": 100 * 8}})
    found = work_of(config, [RecordedTable("a", 9, 8, "")], asked, None)
    assert found.misses.tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"warm_up = 1.*leaves no batch to count of 4"):
        ask(trace, warm_up=1)
    with pytest.raises(ValueError, match="rate = 2"):
        ask(trace, rate=2)


@pytest.mark.parametrize("device", [None, 1000])
def test_a_sample_is_about_the_whole(device: int | None) -> None:
    trace = zipf(20_000, batches=3000, size=100)
    config: dict = {"host": {"capacity": 4000 * 16, "policy": "lru"}}
    if device is not None:
        config["device"] = {"device": "cpu", "capacity": device * 16, "policy": "lru"}
    about = [RecordedTable("a", 20_000, 16, "")]
    exact, part = (work_of(StoreConfig.load(config), about, ask(trace, rate=rate), None) for rate in (None, 0.3))
    assert ask(trace).rate == 1
    assert part.total(part.rows) == pytest.approx(exact.total(exact.rows))
    for column in ("misses", "reads", "below"):
        one, other = part.total(getattr(part, column)), exact.total(getattr(exact, column))
        assert one == pytest.approx(other, rel=0.05), column
    assert seconds(ALONE, part) == pytest.approx(seconds(ALONE, exact), rel=0.05)


def test_reads_that_a_sample_shares_are_those_of_the_whole(tables: dict[str, Path]) -> None:
    files, about = described(tables)
    trace = zipf(2000, batches=400, size=60, exponent=0.3)
    config = config_over(tables, 200 * 272)
    found = [
        work_of(config, about, asked, ReadCounter(files, 512, rate=asked.rate))
        for asked in (ask(trace), ask(trace, rate=0.4))
    ]
    shared = [each.total(each.reads) / each.total(each.misses) for each in found]
    assert shared[0] < 0.8
    assert shared[1] == pytest.approx(shared[0], rel=0.1)


@given(st.floats(1, 2000), st.floats(0, 1))
def test_numbers_of_misses_are_a_distribution(size: float, share: float) -> None:
    numbers, likely = _numbers_of_misses(size, share)
    assert sum(likely) == pytest.approx(1)
    assert sum(number * each for number, each in zip(numbers, likely, strict=True)) == pytest.approx(size * share)


def test_a_fixed_set_of_rows_is_sampled_too(tmp_path: Path) -> None:
    trace = zipf(5000, batches=500, size=50)
    hot = np.argsort(-np.bincount(trace.rows, minlength=5000))
    np.save(tmp_path / "hot.npy", hot)
    host = {"capacity": 1000 * 8, "policy": "static", "hot_set": tmp_path / "hot.npy"}
    config, about = StoreConfig.load({"host": host}), [RecordedTable("a", 5000, 8, "")]
    exact, part = (work_of(config, about, ask(trace, rate=rate, warm_up=0), None) for rate in (1.0, 0.5))
    assert exact.total(exact.misses) == simulate_tiers(config, about, trace)[0].counts.misses
    assert part.total(part.misses) == pytest.approx(exact.total(exact.misses), rel=0.1)


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 40), st.integers(1, 4096), st.sampled_from([1, 2, 8]))
def test_a_ladder_ends_at_the_limit_or_at_everything(limit: int, everything: int, least: int, steps: int) -> None:
    limit, everything = max(limit, least), max(everything, least)
    sizes = ladder(limit, everything, least, steps=steps)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= limit
    assert sizes[-1] == limit or everything <= sizes[-1] <= everything * 65 / 64
    assert sizes[0] >= min(least, sizes[-1])
    assert sizes[0] <= max(least * 65 / 64, sizes[-1] / 1000, 64)


@given(st.data())
def test_the_smallest_is_the_cheapest_of_all_pairs(data: st.DataObject) -> None:
    devices = sorted(data.draw(st.sets(st.integers(1, 60), min_size=1, max_size=6)))
    hosts = sorted(data.draw(st.sets(st.integers(1, 300), min_size=1, max_size=9)))
    shape = len(devices), len(hosts)
    steps = data.draw(st.lists(st.integers(0, 5), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    rates = np.reshape(steps, shape).cumsum(axis=0).cumsum(axis=1)
    target, dearness = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0, 1, 2.5, 10]))
    rate = {Sizes(d, h): rates[i][j] for (i, d), (j, h) in product(enumerate(devices), enumerate(hosts))}
    reaching = [sizes for sizes in rate if rate[sizes] >= target]
    best = min(reaching, key=lambda sizes: (sizes.cost(dearness), sizes.device), default=None)
    assert smallest(rate.__getitem__, devices, hosts, target, dearness=dearness) == best


@pytest.fixture(scope="module")
def predict() -> Predictor:
    """A tiny trace on a machine of made-up figures, with both tiers."""
    config = StoreConfig.load({"host": {"policy": "lru"}, "device": {"device": "cpu", "policy": "lru"}})
    asked = ask(zipf(300, batches=150, size=20, exponent=0.7, seed=4))
    machine = STACKED.model_copy(update={"record_bytes": 16})
    return Predictor(config, [RecordedTable("a", 300, 16, "")], machine, asked, None, rows_per_token=4)


def test_the_sizes_that_are_found_are_the_cheapest_of_a_trace(predict: Predictor) -> None:
    hosts = ladder(1 << 20, predict.everything, 16, steps=2)
    devices: list[int | None] = [*ladder(2000, predict.everything, 16, steps=1)]
    assert (devices[-1], hosts[-1]) == (2000, predict.everything)
    rates = {sizes: predict.rate(sizes) for sizes in (Sizes(d, h) for d, h in product(devices, hosts))}
    for share in (0.2, 0.5, 0.9, 1):
        target = max(rates.values()) * share
        reaching = [sizes for sizes, rate in rates.items() if rate >= target]
        best = min(reaching, key=lambda sizes: (sizes.cost(10), sizes.device or 0))
        assert smallest(predict.rate, devices, hosts, target, dearness=10) == best
    assert smallest(predict.rate, devices, hosts, 1.01 * max(rates.values()), dearness=10) is None


def test_a_prediction_is_its_work_over_its_time(predict: Predictor) -> None:
    sizes = Sizes(40 * 16, 120 * 16)
    found, asked = predict(sizes), predict.asked
    left = work_of(predict.config(sizes), [RecordedTable("a", 300, 16, "")], asked, None)
    tokens = asked.rows[asked.first :].sum() / 4
    assert found.tokens_per_s == pytest.approx(tokens / seconds(predict.machine, left))
    assert found.misses == pytest.approx(left.misses.sum() / asked.accesses)
    assert found.host_hits == pytest.approx(left.below.sum() / asked.accesses)
    assert found.device_hits + found.host_hits + found.misses == pytest.approx(1)
    assert found.reads == pytest.approx(left.misses.sum() / tokens)
    # 20 rows a batch: 29 us each, and nothing else.
    assert predict.ceiling(sizes) == pytest.approx(tokens / (left.rows.size * 2.9e-5))


def test_what_binds_is_named(predict: Predictor) -> None:
    all_ = predict.everything
    small, full = Sizes(20 * 16, 40 * 16), Sizes(all_, all_)
    ceiling, best = predict.ceiling(small), predict.rate(full)
    assert best < ceiling, "rows are asked for the first time in what counts"
    assert "the processor binds" in why_not(predict, small, ceiling * 1.01)
    assert "the disk binds" in why_not(predict, small, (ceiling + best) / 2)
    only_host = predict.rate(Sizes(small.device, all_))
    assert "; with room for every row of the trace " in why_not(predict, small, only_host)
    assert why_not(predict, small, only_host).endswith(": --ram binds")
    assert only_host < best
    assert why_not(predict, small, best).endswith(": --hbm and --ram binds")
    assert why_not(predict, Sizes(small.device, all_), best).endswith(": --hbm binds")
    assert f"the limits give {predict.rate(small):,.0f}" in why_not(predict, small, best)


KEYS = st.text(min_size=1, max_size=8)
VALUES = st.one_of(
    st.booleans(), st.integers(-(1 << 62), 1 << 62), st.floats(allow_nan=False), st.text(max_size=12),
    st.lists(st.integers(0, 9), max_size=3), st.dictionaries(KEYS, st.integers(0, 9), max_size=2),
)  # fmt: skip
SECTION = st.dictionaries(KEYS, VALUES, max_size=4)


@settings(max_examples=60)
@given(st.dictionaries(KEYS, st.one_of(VALUES, SECTION, st.lists(SECTION, min_size=1, max_size=3)), max_size=5))
def test_what_is_written_as_toml_is_read_as_it_was(data: dict) -> None:
    comments = {key: ["why", ""] for key in data}
    assert tomllib.loads(toml.dumps(data, head=["about"], comments=comments)) == data


def test_toml_is_laid_out_to_be_read() -> None:
    data = {"mode": "r", "table": [{"path": "a"}, {"path": "b", "fields": ["x"]}], "host": {"policy_options": {"p": 0.5}}}
    text = toml.dumps(data, head=["H"], comments={"host": ["why"]})
    assert text == (
        '# H\n\nmode = "r"\n\n[[table]]\npath = "a"\n\n[[table]]\npath = "b"\nfields = ["x"]\n\n'
        "# why\n[host]\npolicy_options = { p = 0.5 }\n"
    )
    with pytest.raises(TypeError, match="not written"):
        toml.dumps({"a": None})


def test_a_comment_stays_one() -> None:
    head = ["one\nrestore = 1\r\ntwo\rthree\x85\u2028four", "", "a\x00b\x1fc\x7f\ud800"]
    text = toml.dumps({"a": 1}, head=head, comments={"b": ["x\ny = 2"]})
    assert tomllib.loads(text) == {"a": 1}
    assert tomllib.loads(toml.dumps({"b": {"a": 1}}, comments={"b": ["x\ny = 2"]})) == {"b": {"a": 1}}
    assert text.splitlines()[1] == "# restore = 1"
    assert "# a?b?c??" in text.encode().decode()



def figures(**changes: object) -> dict:
    return STACKED.model_dump() | changes


@pytest.mark.parametrize("machine", [ALONE, STACKED])
def test_figures_are_loaded_as_they_were_written(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text(toml.dumps(machine.model_dump(exclude_none=True)))
    assert Machine.load(tmp_path / "m.toml") == machine


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (figures(record_bytes=0), "record_bytes = 0: Input should be greater than or equal to 1"),
        (figures(device=""), r"figures: \[below\] belongs to figures of a device tier"),
        (figures(speed=3), "speed: unknown"),
        ({"record_bytes": 8}, "resident: is required; disk: is required"),
        (figures(resident={"rows": [1, 2], "seconds": [1e-5]}), "resident: 2 rows and 1 seconds"),
        (figures(resident={"rows": [2, 2], "seconds": [1e-5, 1e-5]}), r"resident: rows = \[2.0, 2.0\]: allowed are ascending"),
        (figures(resident={"rows": [1], "seconds": [0]}), r"resident: seconds = \[0.0\]: allowed are numbers above 0"),
        (figures(resident={"rows": [], "seconds": []}), "resident.rows: "),
        (figures(disk=DISK.model_dump() | {"byte_seconds": -1}), "disk.byte_seconds = -1: "),
        (figures(disk=DISK.model_dump() | {"seconds": [float("inf"), 1]}), r"disk: seconds = \[inf, 1.0\]"),
        (figures(disk=DISK.model_dump() | {"alignment": 513}), "disk.alignment = 513: allowed are powers of two up to 1048576"),
        (figures(disk=DISK.model_dump() | {"alignment": 1 << 21}), "disk.alignment = 2097152: allowed are powers of two"),
        (figures(about="one\ntwo"), r"about = 'one\\ntwo': allowed is text without control characters"),
        (figures(disk=DISK.model_dump() | {"depth": 4}), "disk.depth: unknown"),
    ],
)
def test_wrong_figures_are_named(data: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(toml.dumps(data))
    with pytest.raises(ConfigError, match=f"m.toml: .*{message}") as caught:
        Machine.load(path)
    assert "\n" not in str(caught.value)


def test_figures_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot read the figures: No such file"):
        Machine.load(tmp_path / "nowhere.toml")
    (tmp_path / "m.toml").write_text("a = ")
    with pytest.raises(ConfigError, match=r"m\.toml: not TOML"):
        Machine.load(tmp_path / "m.toml")


@pytest.mark.parametrize("device", [None, 1 << 20])
def test_a_machine_is_measured(tables: dict[str, Path], device: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ARRAY_BYTES", 2 << 20)
    monkeypatch.setattr(measuring, "_RESIDENT", (1, 16, 256))
    monkeypatch.setattr(measuring, "_COLD", (1, 4, 16))
    monkeypatch.setattr(measuring, "_RESIDENT_S", 1e-9)
    monkeypatch.setattr(measuring, "_COLD_S", 1e-9)
    steps = []
    config = config_over(tables, 1 << 20, device)
    files, _ = described(tables)
    found = measuring.measure(config, files, about="here", done=lambda: steps.append(1))
    assert len(steps) == measuring.STEPS
    assert (found.about, found.record_bytes) == ("here", 264)
    assert (found.device, found.below is None) == (("", True) if device is None else ("cpu", False))
    assert found.resident.rows == (1, 16, 256)
    assert found.disk.engine == "threads"
    assert found.disk.read_bytes >= 264
    assert Machine.model_validate(found.model_dump()) == found


def test_a_device_that_is_not_here_is_not_measured(tables: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = StoreConfig.load({"table": [{"path": tables["one"]}], "device": {}})
    with pytest.raises(ConfigError, match=r"device\.device = 'cuda': this machine has none to measure; --machine gives"):
        measuring.measure(config, [open_table("table", tables["one"])])


def test_a_table_that_one_slot_holds_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ARRAY_BYTES", 2 << 20)
    monkeypatch.setattr(measuring, "_RESIDENT_S", 1e-9)
    monkeypatch.setattr(measuring, "_COLD_S", 1e-9)
    path = write_rows(tmp_path / "one.safetensors", 1, 264)
    with pytest.raises(ConfigError, match="table 'one': its 1 rows are too few to measure reads"):
        measuring.measure(config_over({"one": path}, 1 << 20), [open_table("one", path)])


def test_wide_rows_are_measured_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_ARRAY_BYTES", 4 << 20)
    monkeypatch.setattr(measuring, "_RESIDENT_S", 1e-9)
    monkeypatch.setattr(measuring, "_COLD_S", 1e-9)
    path = write_rows(tmp_path / "one.safetensors", 400, 40_000)
    found = measuring.measure(config_over({"one": path}, 1 << 20), [open_table("one", path)])
    assert found.record_bytes == 40_000
    assert found.resident.rows == (1, 4, 16)
    assert found.disk.read_bytes >= 40_000
