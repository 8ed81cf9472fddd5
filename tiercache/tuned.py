"""What `tiercache tune` shows and writes: tables of sizes, and the config with the sizes that were found."""

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tiercache.config import DeviceConfig
from tiercache.lab import toml
from tiercache.lab.tune import Prediction, Predictor, Sizes
from tiercache.report.printed import print_whole

_GIB = 1 << 30
_UNITS = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_PATHS = (("host", "hot_set"), ("device", "hot_set"), ("trace", "path"))


def size_of(num_bytes: int) -> str:
    """Bytes to be read, in the largest unit that they fill."""
    unit = next((unit for unit, size in _UNITS.items() if num_bytes >= size), None)
    return f"{num_bytes} B" if unit is None else f"{num_bytes / _UNITS[unit]:,.2f} {unit}"


def _setting(num_bytes: int) -> str:
    """Bytes as a config has them, exactly."""
    unit = next((unit for unit, size in _UNITS.items() if num_bytes % size == 0), "B")
    return f"{num_bytes // _UNITS.get(unit, 1)}{unit}"


def gains_of(predict: Predictor, sizes: Sizes) -> dict[str, float]:
    """Tokens a second that one more GiB of each tier would bring."""

    def larger(num_bytes: int) -> int:
        return max(num_bytes, min(num_bytes + _GIB, predict.everything))  # beyond, nothing changes

    here, more = predict.rate(sizes), {"host": Sizes(sizes.device, larger(sizes.host))}
    if sizes.device is not None:
        more["device"] = Sizes(larger(sizes.device), sizes.host)
    return {tier: predict.rate(other) - here for tier, other in more.items()}


def print_tables(
    console: Console, predict: Predictor, devices: Sequence[int | None], hosts: Sequence[int], here: Sizes
) -> None:
    """One tier's sizes, and here the other's; then the other tier's, where several are in question."""
    _print(console, "host", predict, [Sizes(here.device, host) for host in sorted({*hosts, here.host})], here)
    several = {device for device in (*devices, here.device) if device is not None}
    if len(several) > 1:
        _print(console, "device", predict, [Sizes(device, here.host) for device in sorted(several)], here)


def _print(console: Console, tier: str, predict: Predictor, sizes: Sequence[Sizes], here: Sizes) -> None:
    both = here.device is not None
    sized, shares = (("device", "host"), ("device hits", "host hits")) if both else (("host",), ("hits",))
    columns = (*sized, *shares, "misses", "reads/token", "KiB/token", "tokens/s", "one more GiB", "")
    table = Table(*columns, title=f"Sizes of the {tier} tier", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    for each in sizes:
        gain = f"{gains_of(predict, each)[tier]:+,.0f}"
        table.add_row(*_cells(predict(each)), gain, "<-" if each == here else "")
    print_whole(console, table)


def _cells(each: Prediction) -> tuple[str, ...]:
    device = each.sizes.device
    return (
        *(() if device is None else (size_of(device),)),
        size_of(each.sizes.host),
        *(() if device is None else (f"{each.device_hits:.1%}",)),
        f"{each.host_hits:.1%}",
        f"{each.misses:.1%}",
        f"{each.reads:.2f}",
        f"{each.read_bytes / 1024:,.1f}",
        f"{each.tokens_per_s:,.0f}",
    )


def tuned_config(source: Path, destination: Path, predict: Predictor, sizes: Sizes, *, target: float) -> str:
    """The text of a config like that at `source`, with tiers of these sizes, to lie at `destination`; comments say why."""
    data = tomllib.loads(source.read_text(encoding="utf-8"))
    _move(data, source.absolute().parent, destination.absolute().parent)
    found, gains = predict(sizes), gains_of(predict, sizes)
    if sizes.device is not None:
        device = data.get("device", {"device": DeviceConfig().device})
        data["device"] = device | {"capacity": _setting(sizes.device)}
    data["host"] = data.get("host", {}) | {"capacity": _setting(sizes.host)}
    way = "with reads begun ahead" if predict.ahead else "fetched one batch after the other"
    head = [
        f"Written by tiercache tune from {source.name}: the smallest tiers for {target:,.0f} tokens/s {way}.",
        f"{found.tokens_per_s:,.0f} tokens/s are expected, with {found.reads:.2f} reads of the disk a token.",
    ]
    head.append(f"The books of the tiers take {size_of(predict.books(sizes))} of host memory on top.")
    if predict.machine.about:
        head.append(f"Machine: {predict.machine.about}.")
    comments = {"host": _why(sizes.host, found.host_hits, gains["host"])}
    if sizes.device is not None:
        comments["device"] = _why(sizes.device, found.device_hits, gains["device"])
    return toml.dumps(data, head=head, comments=comments)


def _why(num_bytes: int, hits: float, gain: float) -> list[str]:
    return [f"{size_of(num_bytes)}: has {hits:.1%} of the rows asked for; one more GiB would bring {gain:+,.0f} tokens/s."]


def _move(data: dict[str, Any], here: Path, there: Path) -> None:
    """Make relative paths of a config that lies here right for one that lies there."""
    if here == there:
        return
    holders = [(table, "path") for table in data.get("table", data.get("tables", ()))]
    holders += [(data[section], key) for section, key in _PATHS if section in data]
    for holder, key in [*holders, (data, "restore")]:
        if key in holder and not holder[key].startswith("~"):
            holder[key] = os.path.normpath(here / holder[key])
