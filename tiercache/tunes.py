"""The command `tiercache tune`: which tiers reach a rate on a trace, as a config; and the rows that a trace uses most."""

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console

from tiercache import replays
from tiercache.assemble import stride_of
from tiercache.config import DeviceConfig, StoreConfig
from tiercache.errors import ConfigError
from tiercache.lab import toml
from tiercache.lab.bounds import uses_of
from tiercache.lab.machine import Machine
from tiercache.lab.measure import STEPS, measure, require_measurable
from tiercache.lab.trace import Trace
from tiercache.lab.tune import Predictor, Sizes, TargetOutOfReach, ladder, smallest, why_not
from tiercache.lab.work import Asked, ReadCounter, ask
from tiercache.recording.blocks import RecordedTable
from tiercache.storage.table import FileTable, failures
from tiercache.tuned import gains_of, print_tables, size_of, tuned_config

_HOST_STEPS, _DEVICE_STEPS = 8, 2
"""Sizes to an octave, which are 9 % and 41 % apart."""

_LEAST_SAMPLED = 1000
"""Rows asked for that a sample of a trace leaves at least: fewer say nothing of sizes."""

_Size = TypeVar("_Size", int, int | None)


class Wanted(NamedTuple):
    """The options of the command, beside those that say what is replayed."""

    hbm: str | None
    ram: str | None
    target: float | None
    rows_per_token: float | None
    ahead: bool
    warm_up: float
    hbm_cost: float
    rate: float | None
    machine: Path | None
    save_machine: Path | None
    out: Path | None
    profile: Path | None


def run(what: replays.What, wanted: Wanted, path: Path, name: str | None, *, console: Console) -> None:
    """Tune, print and write. ConfigError for options that do not go together, TargetOutOfReach where the limits are too tight,
    and the errors of loading.
    """
    replays.require_sense(what, replays.Simulated(None, None, None, None, None), path, name, simulate=True)
    _require_sense(wanted)
    config = StoreConfig.load(path)
    if config.group_rows > 1:
        raise ConfigError(f"{path}: group_rows = {config.group_rows}: tune sizes tiers of rows; allowed is group_rows = 1")
    if wanted.hbm is not None and config.device is None:
        config = config.model_copy(update={"device": DeviceConfig()})
    machine = None if wanted.machine is None else Machine.load(wanted.machine)
    if machine is None and wanted.ram is not None:
        require_measurable(config)
    files = replays.files_of(config)
    tables = replays.tables_of(what, files)
    if machine is not None:
        _require_fit(machine, wanted, config, tables)
    elif wanted.ram is not None and not files:
        raise ConfigError("--machine: is required where the config names no tables whose files could be read to measure")
    limits = _limits(config, tables, wanted)
    rows_per_token = _rows_per_token(what, tables, wanted)
    trace = replays.trace_on(what, tables, name)
    if wanted.profile is not None:
        _write_profile(wanted.profile, trace, console)
    if limits is None:
        return
    asked = _asked(trace, wanted)
    if machine is None:
        machine = _measured(config, files, wanted)
    reads = None
    if files:
        verify = config.storage.verify == "page"
        reads = ReadCounter(files, machine.disk.alignment, verify=verify, rate=asked.rate)
    predict = Predictor(config, tables, machine, asked, reads, rows_per_token=rows_per_token, ahead=wanted.ahead)
    with Console(stderr=True).status(f"Planning {asked.trace.rows.size:,} rows, size after size"):
        _tune(predict, path, limits, wanted, console)


def _tune(predict: Predictor, path: Path, limits: Sizes, wanted: Wanted, console: Console) -> None:
    """Search, print and write."""
    least, everything = predict.least, predict.everything
    hosts = ladder(limits.host, everything, least, steps=_HOST_STEPS)
    devices: list[int | None] = [limits.device]
    if limits.device is not None and wanted.hbm is not None:
        devices = [*ladder(limits.device, everything, least, steps=_DEVICE_STEPS)]
    sizes = None
    if wanted.target is not None:
        sizes = smallest(predict.rate, devices, hosts, wanted.target, dearness=wanted.hbm_cost)
    here = Sizes(devices[-1], hosts[-1]) if sizes is None else sizes
    print_tables(console, predict, _octaves(devices, _DEVICE_STEPS), _octaves(hosts, _HOST_STEPS), here)
    for line in _remarks(predict, here):
        console.print(line, soft_wrap=True, highlight=False, markup=False, emoji=False)
    if wanted.target is None:
        return
    if sizes is None:
        raise TargetOutOfReach(why_not(predict, limits, wanted.target))
    gains = gains_of(predict, sizes)
    device = "" if sizes.device is None else f"device {size_of(sizes.device)}, "
    found = f"{device}host {size_of(sizes.host)}, with {predict.rate(sizes):,.0f}"
    console.print(f"smallest for {wanted.target:,.0f} tokens/s: {found}", highlight=False)
    console.print(f"their books take {size_of(predict.books(sizes))} of host memory on top", highlight=False)
    told = ", ".join(f"{tier} {gain:+,.0f}" for tier, gain in gains.items())
    console.print(f"one more GiB, in tokens/s: {told}", highlight=False)
    if wanted.out is not None:
        _write(wanted.out, tuned_config(path, wanted.out, predict, sizes, target=wanted.target))
        console.print(f"{wanted.out}: written", soft_wrap=True, highlight=False, markup=False, emoji=False)


def _octaves(sizes: Sequence[_Size], steps: int) -> list[_Size]:
    """Of a ladder: octave by octave down from its top."""
    return list(sizes[::-1][::steps][::-1])


def _remarks(predict: Predictor, here: Sizes) -> list[str]:
    asked, found = predict.asked, predict(here)
    how = "the next batch's reads begun ahead" if predict.ahead else "one batch fetched after the other"
    lines = [f"machine: {predict.machine.about}"] if predict.machine.about else []
    part = "" if asked.rate == 1 else f", simulated with {asked.rate:.2%} of its rows"
    lines.append(f"trace: {asked.rows.size - asked.first:,} of {asked.rows.size:,} batches count{part}; {how}")
    lines.append(
        f"of the rows that count, {asked.first_uses / asked.accesses:.1%} were asked for the first time; at <- the disk brings "
        f"{found.misses:.1%}"
    )
    begun = predict.config(here)
    for name, tier in (("device", begun.device), ("host", begun.host)):
        if tier is not None and tier.hot_set is not None:
            lines.append(
                f"{name}.hot_set = {str(tier.hot_set)!r}: made from this trace, it knows what is still to come; then these "
                "figures are more than another day will bring"
            )
    lines.append(f"with every row in the top tier: {predict.ceiling(here):,.0f} tokens/s")
    return lines


def _rows_per_token(what: replays.What, tables: list[RecordedTable], wanted: Wanted) -> float:
    """0 where nothing is tuned."""
    heads = replays.heads_of(what, tables[0].num_rows)
    if heads is not None and wanted.rows_per_token is not None:
        raise ConfigError(f"--rows-per-token: is not for a text, which has {heads} rows a token by its hashing")
    if heads is None and wanted.rows_per_token is None and wanted.ram is not None:
        raise ConfigError("--rows-per-token: is required for a trace of rows")
    return heads or wanted.rows_per_token or 0


def _asked(trace: Trace, wanted: Wanted) -> Asked:
    try:
        asked = ask(trace, warm_up=wanted.warm_up, rate=wanted.rate)
    except ValueError:
        raise ConfigError(f"--warm-up {wanted.warm_up}: leaves no batch to count of {trace.num_batches}") from None
    if asked.rate < 1 and asked.trace.rows.size < _LEAST_SAMPLED:
        raise ConfigError(
            f"--sample {wanted.rate}: leaves {asked.trace.rows.size:,} of {trace.rows.size:,} rows asked for, which tell too "
            f"little; allowed are shares that leave {_LEAST_SAMPLED:,}"
        )
    return asked


def _measured(config: StoreConfig, files: list[FileTable], wanted: Wanted) -> Machine:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = model[1] if model else platform.machine()
    about = f"{cpu}, {os.cpu_count()} cores, {files[0].files[0].path}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    about = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in about)
    with replays.progress("Measuring this machine", STEPS) as done:
        machine = measure(config, files, about=about, done=done)
    if wanted.save_machine is not None:
        _write(wanted.save_machine, toml.dumps(machine.model_dump(exclude_none=True)))
    return machine


def _write_profile(path: Path, trace: Trace, console: Console) -> None:
    """The rows of a trace, the most used first: int64[n] in a .npy file."""
    rows = uses_of(trace).hottest(trace.rows.size)
    with failures(path), path.open("xb") as file:
        np.save(file, rows)
    said = f"{path}: {rows.size:,} rows, the most used first"
    console.print(said, soft_wrap=True, highlight=False, markup=False, emoji=False)


def _write(path: Path, text: str) -> None:
    with failures(path), path.open("x", encoding="utf-8") as file:
        file.write(text)


def _require_sense(wanted: Wanted) -> None:
    numbers = {
        "--rows-per-token": wanted.rows_per_token,
        "--target-tokens-per-s": wanted.target,
        "--warm-up": wanted.warm_up,
        "--hbm-cost": wanted.hbm_cost,
    }
    for option, number in numbers.items():
        if number is not None and not isfinite(number):
            raise ConfigError(f"{option} {number}: allowed are finite numbers")
    if wanted.rate is not None and not 0 < wanted.rate <= 1:
        raise ConfigError(f"--sample {wanted.rate}: allowed are shares above 0, up to 1")
    if wanted.ram is None and wanted.profile is None:
        raise ConfigError("--ram: is required, the most that the host tier may have; only --profile goes without")
    needing = {"--hbm": wanted.hbm, "--target-tokens-per-s": wanted.target, "--save-machine": wanted.save_machine}
    for option, value in needing.items():
        if value is not None and wanted.ram is None:
            raise ConfigError(f"{option}: is for tuning; it needs --ram")
    if wanted.out is not None and wanted.target is None:
        raise ConfigError("--out: is the config that reaches a rate; it needs --target-tokens-per-s")
    if wanted.machine is not None and wanted.save_machine is not None:
        raise ConfigError("--save-machine: is for figures that are measured; allowed is one of it and --machine")
    for option, path in (("--out", wanted.out), ("--save-machine", wanted.save_machine), ("--profile", wanted.profile)):
        if path is None:
            continue
        if path.exists():
            raise ConfigError(f"{option} {str(path)!r}: is there already, and nothing is overwritten")
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {str(path)!r}: there is no directory {str(path.parent)!r}")


def _limits(config: StoreConfig, tables: list[RecordedTable], wanted: Wanted) -> Sizes | None:
    """The largest tiers that are allowed; a device tier without --hbm stays as it is. None where nothing is tuned."""
    if wanted.ram is None:
        return None
    stride = stride_of((table.record_bytes for table in tables), config)
    host = replays.bytes_of("--ram", wanted.ram, stride)
    if config.device is None:
        return Sizes(None, host)
    return Sizes(config.device.capacity if wanted.hbm is None else replays.bytes_of("--hbm", wanted.hbm, stride), host)


def _require_fit(machine: Machine, wanted: Wanted, config: StoreConfig, tables: list[RecordedTable]) -> None:
    """ConfigError for figures of other rows, or of a store with other tiers."""
    record_bytes = max(table.record_bytes for table in tables)
    if machine.record_bytes != record_bytes:
        raise ConfigError(
            f"{wanted.machine}: record_bytes = {machine.record_bytes}: figures of other rows; those of the tables have "
            f"{record_bytes} bytes"
        )
    device = "" if config.device is None else config.device.device.split(":")[0]
    if machine.device.split(":")[0] != device:
        raise ConfigError(
            f"{wanted.machine}: device = {machine.device!r}: figures of other tiers; allowed is {device!r}, as in the config"
        )
