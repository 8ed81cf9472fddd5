"""The command `tiercache replay`: a trace or a text, through policies, the tiers of a config, or a live store."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from warnings import WarningMessage

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tiercache.config import StoreConfig, parse_bytes
from tiercache.engram.families import FAMILIES, hashed
from tiercache.errors import ConfigError, FormatError
from tiercache.lab import synthetic
from tiercache.lab.bounds import uses_of
from tiercache.lab.curves import ONLINE
from tiercache.lab.formats import FORMATS, load_recording, load_trace
from tiercache.lab.replay import Replay, replay_live, replay_tiers
from tiercache.lab.sweep import Done, sweep
from tiercache.lab.tokens import TokenStream, load_tokens
from tiercache.lab.trace import Trace, chunks, in_groups, serving
from tiercache.policies import DEFAULT
from tiercache.recording.blocks import MAGIC, RecordedTable
from tiercache.recording.reader import Recording
from tiercache.report import measure
from tiercache.report.facts import Subject
from tiercache.report.file import Save, report_file
from tiercache.report.page import page
from tiercache.report.printed import print_whole
from tiercache.report.rows import COLUMNS, WARM, result_rows, title
from tiercache.report.subject import Text, of_rows, of_text
from tiercache.storage import open_table
from tiercache.storage.table import FileTable
from tiercache.store import Store

_RECORD_BYTES = 264
_NUM_ROWS = 8_134_407
_MADE_UP = {"zipf": synthetic.zipf, "shifting": synthetic.shifting, "scanning": synthetic.scanning}
_BATCHES, _SIZE, _TOKENS = 2000, 1000, 200_000
"""Of what is made up."""

_MOST_ASKED, _MOST_ROWS = 1 << 33, 1 << 40
"""Rows that may be made up or asked for at once, and rows of a table."""

_NO_IMAGE = "What the config restores is not simulated."


class What(NamedTuple):
    """What is replayed: a trace from a file, a made-up one, or a text; as the options of the command say."""

    trace: Path | None
    form: str | None
    text: Path
    synthetic: str | None
    seed: int
    family: str
    vocabulary: int
    limit: int | None
    batch: int | None

    @property
    def recorded(self) -> bool:
        """Whether it is a recording, which says of which tables it is."""
        return self.trace is not None and _format_of(self.trace, self.form) == "recording"

    @property
    def hashed(self) -> bool:
        """Whether it is a text, whose rows a family's hashing gives."""
        if self.trace is not None:
            return _format_of(self.trace, self.form) == "tokens"
        return self.synthetic in (None, "text")


class Wanted(NamedTuple):
    """A report that is wanted: what saves its page, the command line to show in it, and what has been warned of so far."""

    save: Save
    command: str
    told: Sequence[WarningMessage]


class Simulated(NamedTuple):
    """The options of a simulation of single tiers."""

    policy: list[str] | None
    capacity: list[str] | None
    record_bytes: int | None
    num_rows: int | None
    processes: int | None


def run(
    what: What,
    simulated: Simulated,
    config: Path | None,
    name: str | None,
    *,
    simulate: bool,
    console: Console,
    report: Path | None = None,
    command: str = "",
    told: Sequence[WarningMessage] = (),
) -> None:
    """Replay, and print. ConfigError for options that do not go together, and the errors of loading and of the store.

    report: a page of HTML to write, which shows the command line and what is told: warnings, as they come.
    """
    require_sense(what, simulated, config, name, simulate=simulate)
    if report is not None and config is not None and (size := StoreConfig.load(config).group_rows) > 1:
        raise ConfigError(f"--report: tells of rows; the tiers of {config} hold groups of {size}, allowed is group_rows = 1")
    with ExitStack() as stack:
        wanted = None if report is None else Wanted(stack.enter_context(report_file(report)), command, told)
        if config is None:
            _run_policies(what, simulated, console, wanted)
        elif simulate:
            _run_tiers(what, StoreConfig.load(config), name, console, wanted)
        else:
            _run_store(what, config, name, console, wanted)
    if report is not None:
        console.print(f"{report}: the report", soft_wrap=True, markup=False, highlight=False, emoji=False)


def require_sense(what: What, simulated: Simulated, config: Path | None, name: str | None, *, simulate: bool) -> None:
    if config is None:
        _refuse({"--table": name}, "names a table of a store; it needs --config")
        _refuse({"--simulate": simulate or None}, "is for the tiers of a store; it needs --config")
    else:
        names = ("--policy", "--capacity", "--record-bytes", "--rows", "--processes")
        _refuse(dict(zip(names, simulated, strict=True)), "are for a simulation; with --config the store decides")
    if what.trace is not None:
        _refuse({"--synthetic": what.synthetic}, "makes up what --trace would be; allowed is one of the two")
    else:
        _refuse({"--format": what.form}, "is that of a trace; it needs --trace")
    if what.recorded:
        _refuse({"--table": name}, "is not for a recording, which knows its tables")
    for option, value, allowed in (
        ("--format", what.form, (*FORMATS, "tokens")),
        ("--synthetic", what.synthetic, (*_MADE_UP, "text")),
        ("--family", what.family, tuple(FAMILIES)),
    ):
        if value is not None and value not in allowed:
            raise ConfigError(f"{option} {value!r}: allowed are {', '.join(allowed)}")
    _require_numbers(what, simulated.num_rows)


def _require_numbers(what: What, num_rows: int | None) -> None:
    """ConfigError for numbers that no memory is large enough for."""
    for option, value, most in (
        ("--limit", what.limit, _MOST_ASKED), ("--batch", what.batch, _MOST_ASKED), ("--rows", num_rows, _MOST_ROWS)
    ):  # fmt: skip
        if value is not None and value > most:
            raise ConfigError(f"{option} {value}: allowed are numbers up to {most}")
    made_up = (what.limit or _BATCHES) * (what.batch or _SIZE)
    if what.synthetic in _MADE_UP and made_up > _MOST_ASKED:
        raise ConfigError(f"--limit, --batch: {made_up} rows would be made up; allowed are {_MOST_ASKED} or fewer")


def _refuse(options: Mapping[str, object], why: str) -> None:
    """ConfigError where one of these options was given."""
    if given := [option for option, value in options.items() if value is not None and value != []]:
        raise ConfigError(f"{', '.join(given)}: {why}")


def _run_policies(what: What, simulated: Simulated, console: Console, report: Wanted | None) -> None:
    policies = simulated.policy or [DEFAULT]
    for policy in policies:
        if policy not in ONLINE:
            raise ConfigError(f"policy {policy!r}: allowed are {', '.join(ONLINE)}")
    tables = Recording(what.trace).tables if what.trace is not None and what.recorded else None
    if tables:
        _refuse({"--rows": simulated.num_rows}, "is not for a recording, which knows its tables")
    record_bytes = simulated.record_bytes or (max(table.record_bytes for table in tables) if tables else _RECORD_BYTES)
    slots = [bytes_of("--capacity", size, record_bytes) // record_bytes for size in simulated.capacity or ["64MiB"]]
    num_rows = simulated.num_rows or (None if what.family != "demo" else _NUM_ROWS)
    wanted = _trace(what, num_rows, tables)
    most = _most_slots(what, wanted, num_rows, tables)
    sizes = [min(each, most) for each in slots]
    with progress(f"Simulating {wanted.rows.size:,} rows", len(sizes) * (len(policies) + 1)) as done:
        results = sweep(wanted, policies, sizes, record_bytes=record_bytes, processes=simulated.processes, done=done)
    _print_replays(console, results)
    if report is not None:
        subject = _subject(what, report, num_rows, tables or [], 0)
        with _measuring() as steps:
            facts = measure.of_policies(subject, wanted, uses_of(wanted), results, policies, steps)
        report.save(page(facts))


def _most_slots(what: What, trace: Trace, num_rows: int | None, tables: list[RecordedTable] | None) -> int:
    """Slots that a tier may ever use: one for each row of the tables, or of the trace where only that is known."""
    if tables:
        return sum(table.num_rows for table in tables)
    if num_rows is not None and (what.trace is None or what.hashed):
        return num_rows
    return int(np.unique(trace.rows).size)


def _run_tiers(what: What, config: StoreConfig, name: str | None, console: Console, report: Wanted | None) -> None:
    tables = tables_of(what, files_of(config))
    wanted = trace_on(what, tables, name)
    uses = uses_of(in_groups(wanted, config.group_rows))
    with progress(f"Planning {wanted.rows.size:,} rows", wanted.num_batches) as done:
        result = replay_tiers(config, tables, wanted, uses, on_batch=done)
    _print_replays(console, [result], config.group_rows)
    if config.restore is not None:
        console.print(_NO_IMAGE, soft_wrap=True, highlight=False)
    if report is not None:
        table, base = _table_of(what, tables, name)
        subject = _subject(what, report, table.num_rows, tables, base)
        if config.restore is not None:
            subject = subject._replace(about=(*subject.about, ("image", _NO_IMAGE)))
        with _measuring() as steps:
            facts = measure.of_tiers(subject, config, tables, wanted, uses, result, steps)
        report.save(page(facts))


def files_of(config: StoreConfig) -> list[FileTable]:
    """The tables on disk that a config names, described. Raises as `open_table`."""
    return [open_table(each.name, each.path, fields=each.fields, resident=each.resident) for each in config.tables]


def tables_of(what: What, files: Sequence[FileTable]) -> list[RecordedTable]:
    """The tables of a config, or those that a recording says there were. ConfigError where there are none."""
    tables = [RecordedTable(table.name, table.num_rows, table.record_bytes, table.identity) for table in files]
    if tables:
        return tables
    if what.trace is None or not what.recorded:
        raise ConfigError("table: is required, unless a recording says what the tables are")
    return Recording(what.trace).tables


def trace_on(what: What, tables: list[RecordedTable], name: str | None) -> Trace:
    """The batches, as rows of a store of these tables; name: of the table that they are for. Raises as loading a trace does."""
    table, base = _table_of(what, tables, name)
    wanted = _trace(what, table.num_rows, tables)
    return wanted._replace(rows=wanted.rows + base) if base else wanted


def heads_of(what: What, num_rows: int) -> int | None:
    """Rows of a token, where what is replayed is a text; None where it is a trace of rows. num_rows: of the table."""
    made_up = what.synthetic is not None and what.synthetic != "text"
    if made_up or (what.trace is not None and _format_of(what.trace, what.form) != "tokens"):
        return None
    return FAMILIES[what.family](what.vocabulary, num_rows).num_heads


def _run_store(what: What, config: Path, name: str | None, console: Console, report: Wanted | None) -> None:
    settings = StoreConfig.load(config).model_copy(update={"trace": None})  # it would be recorded to what is replayed
    with Store.open(settings) as store:
        tables = store.recorded_tables()
        table, base = _table_of(what, tables, name)
        wanted = _trace(what, table.num_rows, tables)
        group_rows = store.config.group_rows
        uses = uses_of(in_groups(wanted, group_rows))
        with Console(stderr=True).status(f"Fetching {wanted.rows.size:,} rows"):
            result = replay_live(store, wanted, uses, table=None if what.recorded else table.name)
    _print_replays(console, [result], group_rows)
    p50, p99 = np.percentile(result.latency_ns, (50, 99)) / 1e6
    console.print(f"{wanted.num_batches:,} fetches: p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    if report is not None:
        subject = _subject(what, report, table.num_rows, tables, base)
        if base and not what.recorded:
            wanted, uses = wanted._replace(rows=wanted.rows + base), uses._replace(rows=uses.rows + base)
        with _measuring() as steps:
            facts = measure.of_tiers(subject, settings, tables, wanted, uses, result, steps)
        report.save(page(facts))


def _subject(what: What, report: Wanted, num_rows: int | None, tables: list[RecordedTable], base: int) -> Subject:
    """What a report says it is of. num_rows: of the table that a text is hashed for; base: the row that it begins with."""
    name = what.text.name if what.trace is None else what.trace.name
    if what.synthetic is not None:
        name = f"{what.synthetic}, seed {what.seed}"
    if what.hashed:
        text = Text(what.family, what.vocabulary, what.batch, num_rows, base)
        return of_text(name, text, tables, report.command, report.told)
    return of_rows(name, "a recording" if what.recorded else "a trace", tables, report.command, report.told)


@contextmanager
def _measuring() -> Iterator[measure.Progress]:
    """A bar for what a report needs beside the replay: (steps to come) -> what is called after each."""
    with _bar() as progress:

        def begin(steps: int) -> Done:
            task = progress.add_task("Measuring for the report", total=steps)
            return lambda: progress.advance(task)

        yield begin


def _bar() -> Progress:
    """On stderr; none where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True)


def _table_of(what: What, tables: list[RecordedTable], name: str | None) -> tuple[RecordedTable, int]:
    """The table that rows are of, and the row of the store that it begins with. Of a recording's, any."""
    by_name = {table.name: table for table in tables}
    if name is None and len(tables) > 1 and not what.recorded:
        raise ConfigError(f"--table: is required, as there are several; allowed are {', '.join(by_name)}")
    if name is not None and name not in by_name:
        raise ConfigError(f"--table {name!r}: allowed are {', '.join(by_name)}")
    table = tables[0] if name is None else by_name[name]
    return table, sum(each.num_rows for each in tables[: tables.index(table)])


def _format_of(path: Path, form: str | None) -> str | None:
    if form is not None:
        return form
    if path.suffix == ".npz":
        return "tokens"
    try:
        with path.open("rb") as file:
            return "recording" if file.read(len(MAGIC)) == MAGIC else None
    except OSError:
        return None  # whoever loads it says what is wrong


def _trace(what: What, num_rows: int | None, tables: list[RecordedTable] | None) -> Trace:
    """The batches. num_rows: of the table that a text is hashed for. tables: of the store that a recording is for."""
    if what.trace is not None and _format_of(what.trace, what.form) != "tokens":
        if what.recorded:
            trace = load_recording(what.trace, tables)
        else:
            trace = load_trace(what.trace, what.form)
            _require_rows(what.trace, trace, num_rows if tables else None)
        if what.limit is not None:
            offsets = trace.offsets[: what.limit + 1]
            trace = Trace(trace.rows[: offsets[-1]], offsets)
        if not trace.rows.size:
            raise FormatError(f"{what.trace}: holds no rows to replay")
        return trace
    try:
        if what.synthetic is not None and what.synthetic != "text":
            batches = _BATCHES if what.limit is None else what.limit
            make = _MADE_UP[what.synthetic]
            return make(num_rows or _NUM_ROWS, batches=batches, size=what.batch or _SIZE, seed=what.seed)
        stream = _stream(what)
        stream = stream if what.limit is None else stream.first(what.limit)
        rows = hashed(what.family, stream.tokens, stream.documents, vocabulary=what.vocabulary, num_rows=num_rows)
    except ValueError as error:
        raise error if isinstance(error, FormatError) else ConfigError(str(error)) from None
    if not rows.size:
        raise FormatError(f"{what.trace or what.text}: holds no tokens to replay")
    return serving(rows, stream.documents) if what.batch is None else chunks(rows, what.batch)


def _stream(what: What) -> TokenStream:
    if what.synthetic is None:
        return load_tokens(what.text if what.trace is None else what.trace)
    num_tokens = _TOKENS if what.limit is None else what.limit
    return synthetic.markov_text(num_tokens, vocabulary=what.vocabulary, seed=what.seed)


def _require_rows(path: Path, trace: Trace, num_rows: int | None) -> None:
    """FormatError for a trace of rows that the table has not."""
    if num_rows is not None and trace.rows.size and (most := int(trace.rows.max())) >= num_rows:
        raise FormatError(f"{path}: has row {most}; the table has rows 0 to {num_rows - 1}")


def bytes_of(option: str, text: str, least: int) -> int:
    """Bytes that an option says. ConfigError for what is no size, or less than the `least` bytes that a row takes."""
    try:
        num_bytes = parse_bytes(int(text) if text.isascii() and text.isdigit() else text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}") from None
    if num_bytes < least:
        raise ConfigError(f"{option} {text!r}: holds no row of {least} bytes; allowed are {least} bytes or more")
    return num_bytes


@contextmanager
def progress(text: str, total: int) -> Iterator[Done]:
    """A bar on stderr; none where that is no terminal."""
    with _bar() as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)


def _print_replays(console: Console, results: list[Replay], group_rows: int = 1) -> None:
    """Policies, each of one tier; or the tiers of a store."""
    first, rows = result_rows(results)
    caption = title(results[0].bounds.accesses, group_rows)
    table = Table(first, *COLUMNS, title=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    print_whole(console, table)
    if any(each.warm for each in results):
        console.print(WARM, soft_wrap=True, highlight=False)
