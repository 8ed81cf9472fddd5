"""`tiercache tune`, as a shell sees it, with the figures of a made-up machine."""

import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from stores import write_rows
from typer.testing import CliRunner, Result

from tiercache import cli
from tiercache.config import StoreConfig
from tiercache.demo import FormulaRows
from tiercache.lab import toml
from tiercache.lab.bounds import uses_of
from tiercache.lab.formats import save_csv
from tiercache.lab.machine import Below, DiskFigures, Machine, Resident
from tiercache.lab.synthetic import zipf
from tiercache.lab.tune import Predictor, Sizes, ladder
from tiercache.lab.work import ReadCounter, ask
from tiercache.recording.blocks import RecordedTable
from tiercache.storage import open_table
from tiercache.storage.pack import pack_rows
from tiercache.store import Store

Tune = Callable[..., Result]

NUM_ROWS = 3000
TRACE = zipf(NUM_ROWS, batches=300, size=40, exponent=0.9)
RESIDENT = Resident(rows=(1, 101), seconds=(1e-5, 1.1e-4))
DISK = DiskFigures(row_seconds=1e-6, reads=(1, 11), seconds=(1e-4, 3e-4), read_bytes=512, byte_seconds=1e-9)
ALONE = Machine(about="a made-up one", record_bytes=264, resident=RESIDENT, disk=DISK)
STACKED = Machine(
    record_bytes=264, device="cuda", resident=RESIDENT, disk=DISK, below=Below(call_seconds=5e-5, row_seconds=2e-6)
)
CONFIG = """
restore = "tiers.image"
[[table]]
path = "table"
[host]
capacity = "64KiB"
policy = "lfu"
policy_options = {}
[storage]
queue_depth = 32
"""


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory with a packed table, a config, a trace, and figures of two machines."""
    pack_rows(FormulaRows(NUM_ROWS), tmp_path / "table")
    (tmp_path / "store.toml").write_text(CONFIG)
    save_csv(tmp_path / "rows.csv", TRACE)
    for name, machine in (("alone", ALONE), ("stacked", STACKED)):
        (tmp_path / f"{name}.toml").write_text(toml.dumps(machine.model_dump(exclude_none=True)))
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


@pytest.fixture
def tune(there: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Runs the command in that directory, on that trace, config and machine unless told otherwise."""
    monkeypatch.setattr(cli, "console", Console(width=200))
    monkeypatch.chdir(there)
    usual = {"--config": "store.toml", "--trace": "rows.csv", "--rows-per-token": 4, "--machine": "alone.toml", "--ram": "1GiB"}

    def call(*flags: str, **options: object) -> Result:
        given = usual | {"--" + name.replace("_", "-"): value for name, value in options.items()}
        arguments = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
        return CliRunner().invoke(cli.app, ["tune", *arguments, *flags])

    return call


def predictor(there: Path, machine: Machine = ALONE) -> Predictor:
    file = open_table("table", there / "table")
    about = [RecordedTable("table", NUM_ROWS, 264, file.identity)]
    config = StoreConfig.load(there / "store.toml")
    return Predictor(config, about, machine, ask(TRACE), ReadCounter([file], 512), rows_per_token=4)


def test_the_smallest_config_is_written_and_is_otherwise_the_old_one(tune: Tune, there: Path) -> None:
    predict = predictor(there)
    hosts = ladder(1 << 30, predict.everything, 264, steps=8)
    target = predict.rate(Sizes(None, hosts[-1])) * 0.7
    wanted = min(host for host in hosts if predict.rate(Sizes(None, host)) >= target)
    result = tune(target_tokens_per_s=target, out="elsewhere/new.toml")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    text = (there / "elsewhere" / "new.toml").read_text()
    new, old = StoreConfig.load(there / "elsewhere" / "new.toml"), StoreConfig.load(there / "store.toml")
    assert new == old.model_copy(update={"host": old.host.model_copy(update={"capacity": wanted})})
    assert tomllib.loads(text)["storage"] == {"queue_depth": 32}
    expected = predict(Sizes(None, wanted))
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), Store.open(new) as store:
        books = store.stats().host.bookkeeping_bytes
    for line in (
        f"# Written by tiercache tune from store.toml: the smallest tiers for {target:,.0f} tokens/s fetched one batch after",
        f"# {expected.tokens_per_s:,.0f} tokens/s are expected, with {expected.reads:.2f} reads of the disk a token.",
        "# Machine: a made-up one.",
        f"# The books of the tiers take {books / 1024:.2f} KiB of host memory on top.",
        f"has {expected.host_hits:.1%} of the rows asked for; one more GiB would bring +",
    ):
        assert line in text
    assert f"tokens/s: host {wanted / 1024:,.2f} KiB, with {expected.tokens_per_s:,.0f}" in result.stdout
    assert sum("<-" in line for line in result.stdout.splitlines()) == 2, "a row of the table, and the remark on it"
    assert wanted < hosts[-1]


def test_figures_that_rest_on_a_hot_set_say_so(tune: Tune, there: Path) -> None:
    assert "hot_set" not in tune().stdout
    np.save(there / "hot.npy", np.arange(9))
    config = (there / "store.toml").read_text()
    assert "[host]" in config
    (there / "store.toml").write_text(config.replace("[host]", '[host]\nhot_set = "hot.npy"'))
    result = tune()
    assert result.exit_code == 0, result.output
    assert "host.hot_set = 'hot.npy': made from this trace, it knows what is still to come" in result.stdout


def test_a_config_beside_the_old_one_keeps_its_paths(tune: Tune, there: Path) -> None:
    result = tune(target_tokens_per_s=1, out="new.toml")
    assert result.exit_code == 0, result.output
    data = tomllib.loads((there / "new.toml").read_text())
    assert (data["table"], data["restore"]) == ([{"path": "table"}], "tiers.image")
    assert data["host"]["capacity"] == f"{ladder(1 << 30, predictor(there).everything, 264, steps=8)[0]}B"


def test_a_device_tier_is_sized_with_the_host_tier(tune: Tune, there: Path) -> None:
    result = tune(machine="stacked.toml", hbm="200KiB", target_tokens_per_s=20_000, out="new.toml")
    assert result.exit_code == 0, result.output
    new = StoreConfig.load(there / "new.toml")
    assert new.device is not None
    assert new.device.device == "cuda"
    assert new.device.capacity <= 200 << 10
    assert all(title in result.stdout for title in ("Sizes of the host tier", "Sizes of the device tier"))
    dear = tune(machine="stacked.toml", hbm="200KiB", target_tokens_per_s=20_000, out="dear.toml", hbm_cost=1000)
    assert dear.exit_code == 0, dear.output
    other = StoreConfig.load(there / "dear.toml")
    assert other.device is not None
    assert other.device.capacity < new.device.capacity
    assert other.host.capacity > new.host.capacity


def test_without_hbm_a_device_tier_stays_as_it_is(tune: Tune, there: Path) -> None:
    (there / "store.toml").write_text(CONFIG + '[device]\ncapacity = "100KiB"\n')
    result = tune(machine="stacked.toml", target_tokens_per_s=15_000, out="new.toml")
    assert result.exit_code == 0, result.output
    new = StoreConfig.load(there / "new.toml")
    assert new.device is not None
    assert new.device.capacity == 100 << 10
    assert "Sizes of the device tier" not in result.stdout


def test_without_a_target_sizes_are_only_shown(tune: Tune) -> None:
    result = tune()
    assert result.exit_code == 0, result.output
    assert "smallest" not in result.stdout
    rates = [float(line.split()[6].replace(",", "")) for line in result.stdout.splitlines() if "%" in line and "iB" in line]
    assert len(rates) > 5
    assert rates == sorted(rates)
    ahead = tune("--prefetch")
    assert ahead.exit_code == 0
    assert "the next batch's reads begun ahead" in ahead.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_tokens_per_s": 1e9}, "1,000,000,000 tokens/s are out of reach: the limits give "),
        ({"target_tokens_per_s": 1e9}, "would be the most: the processor binds"),
        ({"target_tokens_per_s": 20_000, "ram": "20KiB"}, "with room for every row of the trace 4"),
        ({"target_tokens_per_s": 20_000, "ram": "20KiB"}, ": --ram binds"),
        ({"target_tokens_per_s": 100_000}, ": the disk binds"),
    ],
)
def test_a_target_out_of_reach_is_an_error_that_says_what_binds(
    tune: Tune, there: Path, options: dict, message: str
) -> None:
    result = tune(**options, out="new.toml")
    assert result.exit_code == 1
    assert result.stderr.startswith("tiercache: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert "tokens/s" in result.stdout, "what the sizes give is shown all the same"
    assert not (there / "new.toml").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"ram": None}, 2, "--ram: is required"),
        ({"ram": "plenty"}, 2, "--ram 'plenty': allowed are a number of bytes"),
        ({"ram": "263"}, 2, "--ram '263': holds no row of 264 bytes; allowed are 264 bytes or more"),
        ({"hbm": "100", "machine": "stacked.toml"}, 2, "--hbm '100': holds no row of 272 bytes"),
        ({"hbm": "1GiB", "ram": None, "profile": "hot.npy"}, 2, "--hbm: is for tuning; it needs --ram"),
        ({"out": "new.toml"}, 2, "--out: is the config that reaches a rate; it needs --target-tokens-per-s"),
        ({"out": "store.toml", "target_tokens_per_s": 1}, 2, "'store.toml': is there already, and nothing is overwritten"),
        ({"profile": "rows.csv"}, 2, "--profile 'rows.csv': is there already"),
        ({"profile": "no/hot.npy"}, 2, "--profile 'no/hot.npy': there is no directory 'no'"),
        ({"save_machine": "m.toml"}, 2, "--save-machine: is for figures that are measured"),
        ({"machine": "nowhere.toml"}, 2, "nowhere.toml: cannot read the figures"),
        ({"machine": "stacked.toml"}, 2, "stacked.toml: device = 'cuda': figures of other tiers; allowed is ''"),
        ({"hbm": "1MiB"}, 2, "alone.toml: device = '': figures of other tiers; allowed is 'cuda', as in the config"),
        ({"hbm": "1MiB", "machine": None}, 2, "device.device = 'cuda': this machine has none to measure"),
        ({"config": "wide.toml"}, 2, "alone.toml: record_bytes = 264: figures of other rows; those of the tables have 8 bytes"),
        ({"config": "none.toml"}, 2, "table: is required, unless a recording says what the tables are"),
        ({"rows_per_token": None}, 2, "--rows-per-token: is required for a trace of rows"),
        ({"trace": None}, 2, "--rows-per-token: is not for a text, which has 16 rows a token by its hashing"),
        ({"warm_up": 1}, 2, "--warm-up 1.0: leaves no batch to count of 300"),
        ({"sample": 1e-9}, 2, "--sample 1e-09: leaves 720 of 12,000 rows asked for, which tell too little; allowed are shares"),
        ({"rows_per_token": "inf"}, 2, "--rows-per-token inf: allowed are finite numbers"),
        ({"target_tokens_per_s": "inf"}, 2, "--target-tokens-per-s inf: allowed are finite numbers"),
        ({"ram": "\N{SUPERSCRIPT TWO}"}, 2, "allowed are a number of bytes above zero"),
        ({"sample": 2}, 2, "--sample 2.0: allowed are shares above 0, up to 1"),
        ({"trace": "more.csv"}, 1, "more.csv: has row 3000; the table has rows 0 to 2999"),
        ({"trace": "empty.csv"}, 1, "empty.csv: holds no rows to replay"),
        ({"table": "b"}, 2, "--table 'b': allowed are table"),
        ({"synthetic": "zipf"}, 2, "--synthetic: makes up what --trace would be"),
    ],
)
def test_errors_are_one_line_and_a_code(tune: Tune, there: Path, options: dict, code: int, message: str) -> None:
    save_csv(there / "more.csv", zipf(NUM_ROWS + 1, batches=100, size=500))
    (there / "empty.csv").touch()
    (there / "none.toml").write_text("")
    np.save(there / "before.npy", np.arange(3))
    write_rows(there / "wide.safetensors", NUM_ROWS, 8)
    (there / "wide.toml").write_text('[[table]]\npath = "wide.safetensors"\n')
    kept = {path: path.read_bytes() for path in there.glob("*") if path.is_file()}
    result = tune(**options)
    assert (result.exit_code, result.stderr.count("\n")) == (code, 1), result.output
    assert result.stderr.startswith("tiercache: ")
    assert message in result.stderr
    assert kept == {path: path.read_bytes() for path in there.glob("*") if path.is_file()}


def test_a_profile_is_the_rows_by_their_uses(tune: Tune, there: Path) -> None:
    result = tune(ram=None, machine=None, profile="hot.npy")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    rows = np.load(there / "hot.npy")
    assert rows.dtype == np.int64
    counts = np.zeros(NUM_ROWS, np.int64)
    for batch in TRACE.batches():
        counts[np.unique(batch)] += 1
    assert np.array_equal(np.sort(rows), np.flatnonzero(counts))
    assert (np.diff(counts[rows]) <= 0).all()
    assert np.array_equal(rows[:50], uses_of(TRACE).hottest(50))
    config = there / "static.toml"
    config.write_text(CONFIG.replace('restore = "tiers.image"', "").replace('"lfu"', '"static"\nhot_set = "hot.npy"'))
    with Store.open(config) as store:
        store.fetch(rows[:200])
        store.fetch(rows[:200])
        assert store.stats().host.hits == 200


def record(there: Path) -> None:
    (there / "plain.toml").write_text(CONFIG.replace('restore = "tiers.image"', ""))
    with Store.open(there / "plain.toml") as store, store.record(there / "rows.trace"):
        for rows in TRACE.batches():
            store.fetch(rows)


def test_a_recording_is_what_was_asked_for(tune: Tune, there: Path) -> None:
    record(there)
    recorded, known = tune(trace="rows.trace"), tune()
    assert recorded.exit_code == 0, recorded.output
    assert recorded.stdout == known.stdout
    (there / "rows.trace").write_bytes((there / "rows.trace").read_bytes()[:-10])
    damaged = tune(trace="rows.trace")
    assert damaged.exit_code == 0
    assert damaged.stdout == known.stdout
    assert damaged.stderr.startswith("tiercache: warning: ")
    assert "300 whole batches are before it" in damaged.stderr


def test_a_recording_of_another_table_is_refused(tune: Tune, there: Path) -> None:
    record(there)
    pack_rows(FormulaRows(NUM_ROWS + 1), there / "other")
    (there / "store.toml").write_text(CONFIG.replace('"table"', '"other"'))
    result = tune(trace="rows.trace")
    assert result.exit_code == 1
    assert "rows.trace: recorded of another table 'table': 3000 rows; here it has 3001" in result.stderr


def test_a_recording_is_enough_where_the_figures_are_given(tune: Tune, there: Path) -> None:
    record(there)
    (there / "store.toml").write_text('[host]\npolicy = "lru"\n')
    assert tune(trace="rows.trace").exit_code == 0
    result = tune(trace="rows.trace", machine=None)
    assert result.exit_code == 2
    assert "--machine: is required where the config names no tables" in result.stderr


def test_a_text_knows_its_rows_a_token(tune: Tune) -> None:
    result = tune(trace=None, rows_per_token=None, limit=500, batch=32, machine="alone.toml")
    assert result.exit_code == 0, result.output
    assert "8 of 16 batches count" in result.stdout


def test_what_is_measured_is_kept(tune: Tune, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiercache.tunes.measure", lambda config, files, about, done: ALONE)
    result = tune(machine=None, save_machine="here.toml")
    assert result.exit_code == 0, result.output
    assert Machine.load(there / "here.toml") == ALONE
    assert result.stdout == tune(machine="here.toml").stdout


def test_names_are_no_markup(tune: Tune, there: Path) -> None:
    bold = ALONE.model_copy(update={"about": "a [b]bold[/b] one [/]"})
    (there / "alone.toml").write_text(toml.dumps(bold.model_dump(exclude_none=True)))
    result = tune(target_tokens_per_s=1, out="[b]new[].toml", profile="[b].npy")
    assert result.exit_code == 0, result.output
    assert "machine: a [b]bold[/b] one [/]\n" in result.stdout
    assert "\n[b]new[].toml: written\n" in result.stdout
    assert result.stdout.startswith("[b].npy: ")


def test_tiers_that_a_sample_says_nothing_about_are_not_tried(tune: Tune) -> None:
    result = tune(sample=0.5, target_tokens_per_s=1)
    assert result.exit_code == 0, result.output
    assert "simulated with 50.00% of its rows" in result.stdout
    (line,) = [line for line in result.stdout.splitlines() if "<-" in line and "%" in line and "iB" in line]
    assert float(line.split()[0]) * 1024 >= 2000 * 264
