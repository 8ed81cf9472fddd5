"""The picture of hit-rate curves."""

import operator
import os
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tiercache.lab.curves import Curves

_STYLES = {
    "fifo": ("#999999", "o"),
    "lru": ("#0072B2", "s"),
    "lfu": ("#CC79A7", "v"),
    "sieve": ("#56B4E9", "^"),
    "s3fifo": ("#D55E00", "D"),
    "arc": ("#E69F00", "P"),
    "wtinylfu": ("#009E73", "X"),
    "gittins": ("#000000", "*"),
}
_NAMES = {
    "fifo": "FIFO",
    "lru": "LRU",
    "lfu": "LFU",
    "s3fifo": "S3-FIFO",
    "arc": "ARC",
    "wtinylfu": "W-TinyLFU",
    "gittins": "Gittins",
}
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def plot_curves(
    path: str | os.PathLike[str], curves: Curves, *, record_bytes: int, title: str, mark_slots: int | None = None
) -> None:
    """Write a PNG of hit rate against cache size, in percent of the touched rows and in MiB of records.

    mark_slots: a capacity to draw a line at.
    """
    figure = Figure(figsize=(8.5, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    sizes = [100 * capacity / curves.touched_rows for capacity in curves.capacities]
    _draw_bounds(axes, sizes, curves)
    by_rate = sorted(curves.policies.items(), key=lambda item: -sum(counts.hits for counts in item[1]))
    for policy, counts in by_rate:
        color, marker = _STYLES[policy]
        rates = [100 * count.hit_rate for count in counts]
        axes.plot(sizes, rates, color=color, marker=marker, ms=5, lw=1.6, label=_NAMES.get(policy, policy.upper()))
    _label(axes, sizes, curves, record_bytes)
    if mark_slots is not None:
        _mark(axes, 100 * mark_slots / curves.touched_rows, mark_slots * record_bytes / 2**20)
    axes.set_title(title, fontsize=11, loc="left")
    figure.savefig(path)


def _draw_bounds(axes: Axes, sizes: list[float], curves: Curves) -> None:
    for name, dashes in (("unbounded", (1, 1.5)), ("belady", (6, 2)), ("static", (3, 1.5, 1, 1.5))):
        rates = [100 * getattr(bound, name) / bound.accesses for bound in curves.bounds]
        label = {"unbounded": "unbounded", "belady": "Belady", "static": "static-optimal"}[name]
        axes.plot(sizes, rates, color="black", lw=1.3, dashes=dashes, label=label)


def _label(axes: Axes, sizes: list[float], curves: Curves, record_bytes: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(bottom=0)
    ticks = [100 * tick for tick in _TICKS if sizes[0] <= 100 * tick * 1.001 and 100 * tick <= sizes[-1] * 1.001]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"cache size, share of the {curves.touched_rows:,} rows touched")
    axes.set_ylabel("hit rate, %")
    axes.grid(color="#dddddd", lw=0.7)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.spines[["right"]].set_visible(False)
    mib = curves.touched_rows * record_bytes / 2**20 / 100
    top = axes.secondary_xaxis("top", functions=(partial(operator.mul, mib), partial(operator.mul, 1 / mib)))
    top.set_xticks([tick * mib for tick in ticks], [f"{tick * mib:.3g}" for tick in ticks])
    top.minorticks_off()
    top.set_xlabel("MiB of records")


def _mark(axes: Axes, share: float, mib: float) -> None:
    axes.axvline(share, color="black", lw=0.8, alpha=0.5)
    axes.annotate(
        f"{mib:.0f} MiB tier",
        (share, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
    )
