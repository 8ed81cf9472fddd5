"""The command line. Parses and prints; everything else is done by the modules it calls."""

import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from typer.core import TyperGroup

from tiercache import demo as demonstration
from tiercache import replays, tunes
from tiercache.errors import ConfigError, TierCacheError
from tiercache.lab.tokens import SHIPPED, SHIPPED_VOCABULARY
from tiercache.recording.reader import DamagedRecording
from tiercache.storage import pack as packing
from tiercache.store import Store

_BENCH = Path(__file__).parent.parent / "bench"


def _tell(message: str, style: str) -> None:
    """One line on stderr."""
    Console(stderr=True).print(f"tiercache: {message}", style=style, markup=False, highlight=False, soft_wrap=True)


def _say(message: str) -> None:
    """A line on stdout, as it is: names in it are no markup."""
    console.print(message, soft_wrap=True, markup=False, emoji=False)


class _Commands(TyperGroup):
    """Commands whose expected errors are one line and an exit code: 2 for a wrong setting, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (TierCacheError, OSError) as error:
            _tell(str(error), "red")
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(
    cls=_Commands,
    help="A table of rows far larger than memory, served from host memory and NVMe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(installed_version("tiercache"), highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of every command."""


Fields = Annotated[
    list[str] | None, typer.Option("--field", help="Tensor that a row is made of; give it once for each, in order.")
]


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where the table and the picture are kept.")] = Path("demo"),
    num_tokens: Annotated[
        int, typer.Option("--tokens", min=1000, help="Tokens of text to serve; with fewer there is nothing to draw.")
    ] = 100_000,
) -> None:
    """Serve real text from a 2 GiB table through 64 MiB of memory, and compare every byte."""
    demonstration.run(directory, num_tokens=num_tokens, console=console)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Table to pack: a .safetensors file or a .safetensors.index.json.")],
    destination: Annotated[Path, typer.Argument(help="Directory to make; nothing may be there yet.")],
    field: Fields = None,
) -> None:
    """Write a safetensors table as a packed one: one read a row, with page checksums."""
    with _byte_progress() as progress:
        report = packing.pack(source, destination, fields=tuple(field or ()), progress=progress)
    for note in report.notes:
        _tell(f"note: {note}", "yellow")
    rate = report.num_bytes / report.seconds / 2**20
    _say(f"{report.path}: {report.num_rows:,} rows of {report.record_bytes} B, {rate:,.0f} MiB/s")


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="Packed table, a directory.")]) -> None:
    """Read a packed table and compare every page with its checksum."""
    with _byte_progress() as progress:
        report = packing.verify(path, progress=progress)
    for page in report.bad[:20]:
        _say(f"{page.file}: page {page.page}, from row {page.first_row}, is damaged")
    _say(f"{report.num_pages:,} pages of {path}, {len(report.bad):,} damaged")
    if report.bad:
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A .safetensors file, a .safetensors.index.json or the directory of a packed table.")
    ],
    field: Fields = None,
    engine: Annotated[str, typer.Option(help="storage.engine, as in a config.")] = "auto",
) -> None:
    """Say what a table is, and how this machine would read it."""
    fields = tuple(field or ())
    info = packing.inspect(path, fields=fields)
    lines = [
        ("kind", info.kind),
        ("rows", f"{info.num_rows:,}"),
        ("record", f"{info.record.record_bytes} B"),
        *((f"  {part.name}", f"{part.dtype} x {part.width}") for part in info.record.fields),
        ("files", f"{len(info.files)}, {_size(sum(file.size for file in info.files))}"),
        ("identity", info.identity),
        ("checksums", f"of {info.page_bytes} B pages" if info.page_bytes else "none"),
        *((f"source {key}", value) for key, value in info.source.items()),
    ]
    config = {
        "table": [{"path": path, "fields": fields}],
        "host": {"capacity": "1MiB"},
        "storage": {"engine": engine},
    }
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning), Store.open(config) as store:
        storage = store.stats().storage
    if storage:
        lines += [("engine", f"{storage.engine}, reads aligned to {storage.alignment} B")]
        lines += [(f"  {engine}", f"{rate:,.0f} reads/s") for engine, rate in storage.probe_reads_per_s.items()]
        lines += [("note", note) for note in storage.notes]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        console.print(f"{name:{width}}  {value}", soft_wrap=True, markup=False, highlight=False, emoji=False)


def _size(num_bytes: int) -> str:
    """Bytes in the largest unit that they fill."""
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, 4)
    return f"{num_bytes / 2 ** (10 * power):,.2f} {'KMGT'[power - 1]}iB" if power else f"{num_bytes} B"


@app.command()
def replay(
    ctx: typer.Context,
    trace: Annotated[
        Path | None,
        typer.Option(help="Trace: a store's recording, libCacheSim's oracleGeneral or csv, or an .npz of tokens."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="Of the trace: recording, oracle, csv, tokens. Else its name or content tells."),
    ] = None,
    text: Annotated[Path, typer.Option("--tokens", help=".npz with tokens and documents.")] = SHIPPED,
    synthetic: Annotated[
        str | None, typer.Option(help="Make one up instead: zipf, shifting, scanning, or text, which is hashed.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is made up.")] = 0,
    family: Annotated[str, typer.Option(help="Hashing of a text: demo, deepseek, qwen, longcat.")] = "demo",
    vocabulary: Annotated[int, typer.Option(min=1, help="Number of token ids.")] = SHIPPED_VOCABULARY,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text, or batches of a trace, to use; all where it is not given.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a text in a batch; without it, prefill chunks and decode steps mixed.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Replay through this store; without it, simulate.")] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Only count what the tiers of --config would do.")] = False,
    name: Annotated[str | None, typer.Option("--table", help="Table of the store.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Policy to simulate, or several.")] = None,
    capacity: Annotated[list[str] | None, typer.Option(help="Tier size to simulate, or several.")] = None,
    record_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of a simulated record; where not given the recording's, or 264.")
    ] = None,
    num_rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows of the simulated table; 8,134,407 where it is not given.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="For simulations; one a core where not given and there is much to do.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Page of HTML to write, with figures; an older report there is replaced.")
    ] = None,
) -> None:
    """Replay a trace or a text, live or simulated: hit rates, reads, and what no policy could beat."""
    what = replays.What(trace, form, text, synthetic, seed, family, vocabulary, limit, batch)
    simulated = replays.Simulated(policy, capacity, record_bytes, num_rows, processes)
    with _damage_told() as told:
        options = what, simulated, config, name
        replays.run(
            *options, simulate=simulate, console=console, report=report, command=_command_line(ctx), told=told
        )


@app.command()
def tune(
    config: Annotated[Path, typer.Option(help="Store whose tiers are sized; all else of it is kept.")],
    ram: Annotated[str | None, typer.Option(help='The most that the host tier may have for records, like "64GiB".')] = None,
    hbm: Annotated[
        str | None, typer.Option(help="The most that the device tier may have; without it, that tier stays as --config has it.")
    ] = None,
    target: Annotated[
        float | None, typer.Option("--target-tokens-per-s", min=0, help="Rate to be reached by the smallest tiers.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Trace, as of replay; without one, a text.")] = None,
    form: Annotated[str | None, typer.Option("--format", help="Of the trace, as of replay.")] = None,
    text: Annotated[Path, typer.Option("--tokens", help=".npz with tokens and documents.")] = SHIPPED,
    synthetic: Annotated[str | None, typer.Option(help="Make one up instead, as replay does.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is made up.")] = 0,
    family: Annotated[str, typer.Option(help="Hashing of a text: demo, deepseek, qwen, longcat.")] = "demo",
    vocabulary: Annotated[int, typer.Option(min=1, help="Number of token ids.")] = SHIPPED_VOCABULARY,
    limit: Annotated[int | None, typer.Option(min=1, help="Tokens of a text, or batches of a trace, to use.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Tokens of a text in a batch, as of replay.")] = None,
    name: Annotated[str | None, typer.Option("--table", help="Table of the store.")] = None,
    rows_per_token: Annotated[
        float | None, typer.Option(min=1e-9, help="Rows that a token asks for, where the trace is no text.")
    ] = None,
    ahead: Annotated[
        bool, typer.Option("--prefetch", help="The caller always has the next batch's reads begun.")
    ] = False,
    warm_up: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the trace that only fills the tiers; the rest counts.")
    ] = 0.5,
    hbm_cost: Annotated[float, typer.Option(min=0, help="What a byte of the device tier costs, in bytes of the host's.")] = 10,
    sample: Annotated[
        float | None, typer.Option(help="Share of the rows to simulate; all of a short trace where it is not given.")
    ] = None,
    machine: Annotated[Path | None, typer.Option(help="Figures of a machine; without them this one is measured.")] = None,
    save_machine: Annotated[Path | None, typer.Option(help="File to write the measured figures to.")] = None,
    out: Annotated[Path | None, typer.Option(help="Config to write, with the tiers that reach the target.")] = None,
    profile: Annotated[Path | None, typer.Option(help=".npy to write: rows of the store, the most used first.")] = None,
) -> None:
    """Say which tiers reach a rate: measure the machine, simulate sizes on a trace, and write the cheapest config."""
    what = replays.What(trace, form, text, synthetic, seed, family, vocabulary, limit, batch)
    wanted = tunes.Wanted(
        hbm, ram, target, rows_per_token, ahead, warm_up, hbm_cost, sample, machine, save_machine, out, profile
    )
    with _damage_told():
        tunes.run(what, wanted, config, name, console=console)


@contextmanager
def _damage_told() -> Iterator[list[warnings.WarningMessage]]:
    """Where a recording is damaged is told on stderr. What is told so far."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", DamagedRecording)
        try:
            yield told
        finally:
            for warning in told:
                _tell(f"warning: {warning.message}", "yellow")


def _command_line(ctx: typer.Context) -> str:
    """The command as it may be typed again, with what was given."""
    words = ["tiercache", ctx.info_name or ""]
    for option in ctx.command.params:
        name = option.name or ""
        given, source = ctx.params.get(name), ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        if given is True:
            words.append(option.opts[0])
        else:
            words += [word for each in (given if isinstance(given, list) else [given]) for word in (option.opts[0], str(each))]
    return shlex.join(words)


@app.command()
def bench(names: Annotated[list[str] | None, typer.Argument(help="Which to run; all by default.")] = None) -> None:
    """Run the measurements of a source checkout, one after another."""
    scripts = {path.stem: path for path in sorted(_BENCH.glob("[!_]*.py"))}
    if not scripts:
        raise ConfigError(f"{_BENCH}: no measurements here; they come with a checkout of the sources")
    for name in names or scripts:
        if name not in scripts:
            raise ConfigError(f"bench {name!r}: allowed are {', '.join(scripts)}")
    for name in names or scripts:
        console.rule(name)
        code = subprocess.run([sys.executable, str(scripts[name])], check=False).returncode
        if code:
            raise typer.Exit(code)


@contextmanager
def _byte_progress() -> Iterator[packing.Progress]:
    """Draws on stderr how many bytes are done, from the first piece on; nothing where stderr is no terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    progress = Progress(*columns, console=terminal, disable=not terminal.is_terminal)
    task = progress.add_task("", total=None)

    def show(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if progress.live.is_started:
            progress.stop()


if __name__ == "__main__":
    app()
