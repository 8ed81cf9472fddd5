"""The command line, as a shell sees it: exit codes, one-line errors, tables packed and replayed, the demo."""

import contextlib
import re
from collections.abc import Callable
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from stores import write_engram
from typer.testing import CliRunner, Result

from tiercache import cli, demo
from tiercache.demo import FormulaRows, WrongBytes, run
from tiercache.errors import FormatError
from tiercache.lab.formats import save_csv, save_oracle
from tiercache.lab.synthetic import zipf
from tiercache.lab.tokens import load_tokens
from tiercache.lab.trace import Trace
from tiercache.storage.pack import pack_rows
from tiercache.store import Store

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    monkeypatch.setattr(cli, "console", Console(width=200))

    def call(*arguments: object) -> Result:
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return call


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"embed": torch.arange(5000 * 16).reshape(5000, 16).to(torch.bfloat16)}, path)
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    pack_rows(FormulaRows(5000), tmp_path / "table")
    path = tmp_path / "store.toml"
    path.write_text('[[table]]\npath = "table"\n[host]\ncapacity = "64KiB"\npolicy = "lru"\n')
    return path


def test_version(invoke: Invoke) -> None:
    result = invoke("--version")
    assert (result.exit_code, result.output.strip()) == (0, version("tiercache"))


def test_help_names_every_command(invoke: Invoke) -> None:
    output = invoke("--help").output
    assert all(f" {command} " in output for command in ("demo", "replay", "pack", "inspect", "verify", "bench"))


def test_a_table_is_packed_inspected_and_verified(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    result = invoke("pack", checkpoint, packed)
    assert result.exit_code == 0, result.output
    assert "5,000 rows of 32 B" in result.output

    output = invoke("inspect", packed).output
    assert all(text in output for text in ("packed", "5,000", "32 B", "BF16 x 16", "of 4096 B pages", "engine"))
    assert "safetensors" in invoke("inspect", checkpoint).output

    assert invoke("verify", packed).exit_code == 0
    with Store.open({"table": [{"path": packed}]}) as store:
        assert torch.equal(store.fetch([3, 4999])[:, 1], torch.tensor([49, 79985]).to(torch.bfloat16))


def test_packing_values_without_their_scale_is_told(invoke: Invoke, tmp_path: Path) -> None:
    path = write_engram(tmp_path / "t.safetensors", np.zeros((5, 264), np.uint8))
    result = invoke("pack", path, tmp_path / "values", "--field", "weight")
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
    assert result.stderr.startswith("tiercache: note: ")
    assert invoke("pack", path, tmp_path / "both", "--field", "weight", "--field", "scale").stderr == ""


def test_what_inspect_prints_is_whole_where_it_is_piped(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=40))
    result = CliRunner().invoke(cli.app, ["inspect", str(checkpoint)])
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines() if not line.startswith(" "))
    assert len(lines["identity"].strip()) == 64
    assert lines["files"].strip() == "1, 156.33 KiB"
    assert all(line == line.rstrip() for line in result.stdout.splitlines())
    assert [cli._size(size) for size in (0, 1023, 1024, 3 << 19, 1 << 31, 5 << 40, 1 << 52)] == [
        *("0 B", "1023 B", "1.00 KiB", "1.50 MiB", "2.00 GiB", "5.00 TiB", "4,096.00 TiB")
    ]


def test_progress_is_drawn_on_stderr_and_only_once_there_is_some(
    invoke: Invoke, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "nowhere" in (failed := invoke("verify", tmp_path / "nowhere").stderr)
    assert "━" not in failed
    result = invoke("pack", checkpoint, tmp_path / "packed")
    assert "━" in result.stderr
    assert "━" not in result.stdout


def test_arguments_have_help(invoke: Invoke) -> None:
    for command, words in (("pack", "Directory to make"), ("inspect", "the directory of a packed"), ("verify", "Packed table")):
        assert words in " ".join(invoke(command, "--help").output.replace("│", " ").split())


def test_verify_names_the_damaged_page(invoke: Invoke, checkpoint: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    invoke("pack", checkpoint, packed)
    rows = packed / "rows" / "c" / "0" / "0"
    damaged = bytearray(rows.read_bytes())
    damaged[9000] ^= 1
    rows.write_bytes(damaged)
    result = invoke("verify", packed)
    assert result.exit_code == 1
    assert "page 2, from row 256, is damaged" in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "nowhere"], 1, "nowhere"),
        (["inspect", "."], 1, "not a packed table"),
        (["verify", "nowhere"], 1, "no such file or directory, the table to verify: 'nowhere'"),
        (["pack", "nowhere", "there"], 1, "no such file or directory, the table to pack: 'nowhere'"),
        (["inspect", "nowhere.safetensors"], 1, "no such file or directory, the table to inspect"),
        (["demo", "--tokens", "5"], 2, "--tokens"),
        (["demo", "--directory", "some-file"], 2, "directory = 'some-file': is a file"),
        (["replay", "--tokens", "nowhere.npz"], 1, "nowhere.npz"),
        (["replay", "--config", "nowhere.toml"], 2, "nowhere.toml"),
        (["replay", "--limit", "9", "--capacity", "plenty"], 2, "'plenty'"),
        (["replay", "--limit", "9", "--capacity", "0"], 2, "'0'"),
        (["replay", "--limit", "9", "--capacity", "\N{SUPERSCRIPT TWO}"], 2, "allowed are a number of bytes above zero"),
        (["replay", "--limit", "9", "--capacity", "263"], 2, "--capacity '263': holds no row of 264 bytes; allowed are 264"),
        (["replay", "--limit", str(2**34)], 2, "--limit 17179869184: allowed are numbers up to 8589934592"),
        (["replay", "--batch", str(2**65)], 2, "--batch 36893488147419103232: allowed are numbers up to"),
        (["replay", "--rows", str(2**41)], 2, "--rows 2199023255552: allowed are numbers up to 1099511627776"),
        (["replay", "--synthetic", "zipf", "--batch", str(2**32)], 2, "--limit, --batch: 8589934592000 rows would be made up"),
        (["replay", "--limit", "9", "--policy", "best"], 2, "'best'"),
        (["replay", "--limit", "9", "--rows", "5"], 2, "num_rows = 5"),
        (["replay", "--limit", "9", "--vocabulary", "5"], 2, "outside 0..4"),
        (["replay", "--limit", "9", "--table", "a"], 2, "--table: names a table of a store; it needs --config"),
        (["replay", "--config", "c", "--policy", "lru", "--rows", "9"], 2, "--policy, --rows: are for a simulation"),
        (["replay", "--config", "c", "--capacity", "9", "--record-bytes", "9"], 2, "--capacity, --record-bytes: "),
        (["replay", "--trace", "nowhere.csv"], 1, "nowhere.csv"),
        (["replay", "--trace", "some-file"], 2, "some-file: of no format that its name or its content tells"),
        (["replay", "--trace", "some-file", "--format", "zip"], 2, "--format 'zip': allowed are recording, oracle, csv,"),
        (["replay", "--trace", "some-file", "--format", "oracle"], 1, "some-file: holds no rows to replay"),
        (["replay", "--trace", "some-file", "--format", "csv"], 1, "some-file: holds no rows to replay"),
        (["replay", "--trace", "some-file", "--format", "recording"], 1, "some-file: not a recording of a store"),
        (["replay", "--trace", "some-file", "--format", "tokens"], 1, "some-file: not an .npz file"),
        (["replay", "--format", "csv"], 2, "--format: is that of a trace; it needs --trace"),
        (["replay", "--trace", "t", "--synthetic", "zipf"], 2, "--synthetic: makes up what --trace would be"),
        (["replay", "--synthetic", "chaos"], 2, "--synthetic 'chaos': allowed are zipf, shifting, scanning, text"),
        (["replay", "--family", "gpt"], 2, "--family 'gpt': allowed are demo, deepseek, qwen, longcat"),
        (["replay", "--simulate"], 2, "--simulate: is for the tiers of a store; it needs --config"),
        (["replay", "--synthetic", "scanning", "--rows", "1", "--limit", "1", "--policy", "no"], 2, "'no'"),
        (["bench", "--no-such-option"], 2, "no-such-option"),
    ],
)
def test_errors_are_one_line_and_a_code(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("some-file").touch()
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output
    if "Usage:" not in result.stderr:
        assert result.stderr.startswith("tiercache: ")
        assert result.stderr.count("\n") == 1


def test_replay_simulates_policies_at_sizes(invoke: Invoke) -> None:
    result = invoke(
        *("replay", "--limit", 2000, "--rows", 50_000, "--batch", 64),
        *("--policy", "lru", "--policy", "fifo", "--capacity", "256KiB", "--capacity", 100_000),
    )
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    rows = [(line[0], line[1]) for line in lines if line and line[0] in ("lru", "fifo")]
    assert rows == [("lru", "0.2"), ("fifo", "0.2"), ("lru", "0.1"), ("fifo", "0.1")]
    assert all(name in result.output for name in ("static", "Belady", "unbounded"))


@pytest.mark.parametrize("width", [200, 80, 20])
def test_tables_have_every_digit_however_narrow_the_terminal(config: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    config.write_text(config.read_text() + '[device]\ndevice = "cpu"\ncapacity = "16KiB"\npolicy = "sieve"\n')
    monkeypatch.setattr(cli, "console", Console(width=width))
    options = ["replay", "--limit", "3000", "--config", str(config), "--simulate"]
    printed = CliRunner().invoke(cli.app, options).stdout
    monkeypatch.setattr(cli, "console", Console(width=500))
    assert [line.split() for line in printed.splitlines() if "─" not in line] == [
        line.split() for line in CliRunner().invoke(cli.app, options).stdout.splitlines() if "─" not in line
    ]
    assert "…" not in printed
    assert "device, sieve" in printed


def test_replay_through_a_store_counts_what_the_simulator_counts(invoke: Invoke, config: Path) -> None:
    live = invoke("replay", "--limit", 2000, "--config", config)
    simulated = invoke("replay", "--limit", 2000, "--rows", 5000, "--policy", "lru", "--capacity", "64KiB")
    assert live.exit_code == simulated.exit_code == 0, live.output + simulated.output
    assert "p99" in live.output

    def counted(result: Result) -> list[str]:
        (line,) = [line.split() for line in result.output.splitlines() if line.startswith(" lru")]
        return line[:7]  # a simulation reads records, a store pages

    assert counted(live) == counted(simulated)


def test_replay_through_a_store_needs_the_name_of_one_of_its_tables(invoke: Invoke, config: Path) -> None:
    config.write_text('[[table]]\nname = "a"\npath = "table"\n[[table]]\nname = "b"\npath = "table"\n')
    for options, message in (
        ([], "tiercache: --table: is required, as there are several; allowed are a, b\n"),
        (["--table", "c"], "tiercache: --table 'c': allowed are a, b\n"),
    ):
        result = invoke("replay", "--limit", 9, "--config", config, *options)
        assert (result.exit_code, result.stderr) == (2, message)
    assert invoke("replay", "--limit", 9, "--config", config, "--table", "b").exit_code == 0


def test_replay_through_a_store_says_how_large_its_tier_is(invoke: Invoke, config: Path) -> None:
    config.write_text('[[table]]\npath = "table"\n[host]\ncapacity = "1GiB"\n')
    result = invoke("replay", "--limit", 200, "--config", config)
    (line,) = [line.split() for line in result.output.splitlines() if line.startswith(" gittins")]
    assert line[1] == "1.3", "5000 rows of 264 B"


@pytest.fixture
def recording(config: Path, tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    with Store.open(config) as store, store.record(tmp_path / "rows.trace"):
        for _ in range(200):
            store.fetch((rng.zipf(1.2, 50) - 1) % 5000)
    return tmp_path / "rows.trace"


def hits_of(result: Result, first: str) -> str:
    (line,) = [line for line in result.output.splitlines() if line.startswith(f" {first} ")]
    return next(cell for cell in line.split() if cell.endswith("%"))


def test_a_recording_is_replayed_live_simulated_and_through_tiers(invoke: Invoke, config: Path, recording: Path) -> None:
    live = invoke("replay", "--trace", recording, "--config", config)
    tiers = invoke("replay", "--trace", recording, "--config", config, "--simulate")
    policies = invoke("replay", "--trace", recording, "--policy", "lru", "--policy", "fifo", "--capacity", "64KiB")
    for result in (live, tiers, policies):
        assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert hits_of(live, "lru") == hits_of(tiers, "lru") == hits_of(policies, "lru") != hits_of(policies, "fifo")
    assert "200 fetches: p50" in live.output
    assert re.search(r"\d\.\d\d x", live.output), "read amplification"
    assert not re.search(r"\d\.\d\d x", tiers.output), "nothing was read"
    assert "fetches: p50" not in tiers.output
    fewer = invoke("replay", "--trace", recording, "--config", config, "--limit", 7)
    assert "7 fetches: p50" in fewer.output


@pytest.mark.parametrize("options", [(), ("--simulate",)])
def test_a_replay_does_not_record_itself(invoke: Invoke, config: Path, recording: Path, options: tuple[str, ...]) -> None:
    before = recording.read_bytes()
    config.write_text(f'{config.read_text()}\n[trace]\npath = "{recording}"\n')
    for _ in range(2):
        result = invoke("replay", "--trace", recording, "--config", config, *options)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        assert recording.read_bytes() == before


def test_two_tiers_are_shown_each_and_together(invoke: Invoke, config: Path, recording: Path) -> None:
    config.write_text(config.read_text() + '[device]\ndevice = "cpu"\ncapacity = "16KiB"\npolicy = "sieve"\n')
    live = invoke("replay", "--trace", recording, "--config", config)
    tiers = invoke("replay", "--trace", recording, "--config", config, "--simulate")
    assert live.exit_code == tiers.exit_code == 0, live.output + tiers.output
    for first in ("device, sieve", "host, lru", "both"):
        assert hits_of(live, first) == hits_of(tiers, first)


def test_a_recording_of_a_store_without_files_is_enough_for_its_tiers(invoke: Invoke, recording: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiers.toml"
    config.write_text('[host]\ncapacity = "64KiB"\npolicy = "lru"\n')
    found = invoke("replay", "--trace", recording, "--config", config, "--simulate")
    known = invoke("replay", "--trace", recording, "--policy", "lru", "--capacity", "64KiB")
    assert found.exit_code == 0, found.output
    assert hits_of(found, "lru") == hits_of(known, "lru")
    refused = invoke("replay", "--config", config, "--simulate", "--limit", 9)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "unless a recording says what the tables are" in refused.stderr


def test_a_recording_of_another_table_is_refused(invoke: Invoke, config: Path, recording: Path, tmp_path: Path) -> None:
    pack_rows(FormulaRows(4999), tmp_path / "other")
    config.write_text('[[table]]\npath = "other"\n')
    for more in ([], ["--simulate"]):
        result = invoke("replay", "--trace", recording, "--config", config, *more)
        assert result.exit_code == 1
        assert "rows.trace: recorded of another table 'table': 5000 rows; here it has 4999" in result.stderr
    named = invoke("replay", "--trace", recording, "--config", config, "--table", "table")
    assert (named.exit_code, "--table: is not for a recording" in named.stderr) == (2, True)


def test_a_damaged_recording_is_replayed_up_to_the_damage_which_is_told(invoke: Invoke, recording: Path) -> None:
    recording.write_bytes(recording.read_bytes()[:-10])
    result = invoke("replay", "--trace", recording)
    assert result.exit_code == 0
    assert result.stderr.startswith("tiercache: warning: ")
    assert result.stderr.count("\n") == 1
    assert "rows.trace: the file ends within a block's header, at byte" in result.stderr
    assert "200 whole batches are before it" in result.stderr


def test_a_recording_without_batches_is_refused(invoke: Invoke, config: Path, tmp_path: Path) -> None:
    with Store.open(config) as store, store.record(tmp_path / "empty.trace"):
        pass
    result = invoke("replay", "--trace", tmp_path / "empty.trace")
    assert (result.exit_code, "empty.trace: holds no rows to replay" in result.stderr) == (1, True)


def test_traces_of_others_are_replayed(invoke: Invoke, config: Path, tmp_path: Path) -> None:
    trace = zipf(5000, batches=100, size=50)
    save_csv(tmp_path / "t.csv", trace)
    save_oracle(tmp_path / "t.bin", trace)
    results = [invoke("replay", "--trace", tmp_path / name, "--config", config) for name in ("t.csv", "t.bin")]
    results.append(invoke("replay", "--trace", tmp_path / "t.bin", "--policy", "lru", "--capacity", "64KiB"))
    assert [result.exit_code for result in results] == [0, 0, 0]
    assert len({hits_of(result, "lru") for result in results}) == 1
    save_csv(tmp_path / "t.csv", zipf(5001, batches=100, size=500))
    refused = invoke("replay", "--trace", tmp_path / "t.csv", "--config", config)
    assert (refused.exit_code, "has row 5000; the table has rows 0 to 4999" in refused.stderr) == (1, True)


def test_a_tier_has_no_more_slots_than_there_are_rows(invoke: Invoke, tmp_path: Path) -> None:
    trace = zipf(5000, batches=100, size=50)
    save_csv(tmp_path / "t.csv", trace)
    for options, rows in (
        (("--trace", tmp_path / "t.csv"), np.unique(trace.rows).size),
        (("--synthetic", "zipf", "--rows", 7000, "--limit", 10), 7000),
    ):
        result = invoke("replay", *options, "--capacity", "1000TiB", "--policy", "lru", "--record-bytes", 1 << 20)
        assert result.exit_code == 0, result.output
        (line,) = [line.split() for line in result.stdout.splitlines() if line.startswith(" lru")]
        assert line[1] == f"{rows:,}.0"
        assert line[2] == line[5], "as unbounded"


def test_a_damaged_text_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    for save, step in ((np.savez, 3), (np.savez_compressed, 1)):
        save(path, tokens=np.arange(100) % 70)
        whole = path.read_bytes()
        for at in range(0, len(whole), step):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            with contextlib.suppress(FormatError, OSError):
                load_tokens(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(20) + whole[middle + 20 :])
    with pytest.raises(FormatError, match=r"text\.npz: not a token stream"):
        load_tokens(path)


def test_a_trace_of_tokens_is_the_text(invoke: Invoke, tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", tokens=np.arange(3000) % 700)
    options = ("--vocabulary", 700, "--rows", 5000, "--capacity", "64KiB")
    results = [invoke("replay", option, tmp_path / "text.npz", *options) for option in ("--trace", "--tokens")]
    assert results[0].exit_code == 0, results[0].output
    assert results[0].output == results[1].output


@pytest.mark.parametrize("name", ["zipf", "shifting", "scanning", "text"])
def test_what_is_made_up_is_replayed(invoke: Invoke, name: str) -> None:
    options = ("replay", "--synthetic", name, "--limit", 50, "--rows", 9000, "--capacity", "64KiB", "--seed", 3)
    results = [invoke(*options) for _ in range(2)]
    assert results[0].exit_code == 0, results[0].output
    assert results[0].output == results[1].output


@pytest.mark.parametrize("family", ["deepseek", "qwen", "longcat"])
def test_a_text_is_replayed_by_every_family(invoke: Invoke, family: str, config: Path) -> None:
    result = invoke("replay", "--family", family, "--limit", 300, "--capacity", "1MiB", "--processes", 1)
    assert result.exit_code == 0, result.output
    refused = invoke("replay", "--family", family, "--limit", 300, "--config", config)
    assert (refused.exit_code, f"the hashing of '{family}' is for a table of" in refused.stderr) == (2, True)


def test_bench_runs_what_is_named(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_BENCH", tmp_path)
    assert invoke("bench").exit_code == 2, "without a checkout there is nothing to run"
    (tmp_path / "fine.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    assert invoke("bench", "fine").exit_code == 0
    assert (tmp_path / "fine.ran").exists()
    assert invoke("bench").exit_code == 3
    unknown = invoke("bench", "other")
    assert unknown.exit_code == 2
    assert "allowed are fails, fine" in unknown.stderr


def test_the_demo_checks_every_row_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HOST_BYTES", 1 << 20)
    shown = StringIO()
    result = run(tmp_path, num_tokens=3000, num_rows=20_000, console=Console(file=shown, width=120))
    assert result.rows == 3000 * 16
    counts, bounds = result.replay.counts, result.replay.bounds
    assert 0 < counts.hits < bounds.belady <= bounds.unbounded
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert all(word in shown.getvalue() for word in ("every byte", "decode", "p99", "Belady", "hit_rate.png"))


def test_the_fewest_tokens_of_the_demo_make_a_picture(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.run, "__kwdefaults__", demo.run.__kwdefaults__ | {"num_rows": 20_000})
    monkeypatch.setattr(demo, "HOST_BYTES", 1 << 20)
    result = invoke("demo", "--tokens", 1000, "--directory", tmp_path / "new")
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "new" / "hit_rate.png").exists()


def test_the_demo_table_is_made_once_and_again_when_it_is_not_right(tmp_path: Path) -> None:
    rows, config = FormulaRows(2000), {"table": [{"path": tmp_path / "table"}], "host": {"capacity": "64KiB"}}
    chunk = tmp_path / "table" / "rows" / "c" / "0" / "0"
    demo._make_table(config, rows, Console(file=StringIO()))
    first = chunk.stat().st_ino
    demo._make_table(config, rows, Console(file=StringIO()))
    assert chunk.stat().st_ino == first

    with chunk.open("r+b") as file:
        file.write(b"\1\2\3")
    demo._make_table(config, rows, Console(file=StringIO()))
    with Store.open(config) as store:
        assert np.array_equal(store.fetch(range(2000), raw=True).numpy(), rows.take(np.arange(2000)))

    demo._make_table(config, FormulaRows(1000), Console(file=StringIO()))
    with Store.open(config) as store:
        assert store.num_rows() == 1000


def test_the_demo_notices_one_wrong_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FormulaRows.read

    def wrong(self: FormulaRows, rows: np.ndarray, out: np.ndarray) -> None:
        right(self, rows, out)
        out[rows == 1500, 200] ^= 4

    monkeypatch.setattr(FormulaRows, "read", wrong)
    pack_rows(FormulaRows(2000), tmp_path / "table")
    monkeypatch.setattr(FormulaRows, "read", right)
    config = {"table": [{"path": tmp_path / "table"}], "host": {"capacity": "64KiB"}}
    trace = Trace(np.arange(2000), np.array([0, 900, 2000]))
    with Store.open(config) as store, pytest.raises(WrongBytes, match="row 1500"):
        demo._stream(store, trace, FormulaRows(2000))
