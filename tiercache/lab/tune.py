"""Which tiers to buy: tokens a second at each size, and the cheapest sizes that reach a rate.

Sizes lie on ladders, each step a fixed ratio above the one before, up to a limit or to room for every row of the trace, beyond
which more changes nothing. More of a tier is taken to be never worse. So for each size of the device tier the host tier's is
found by halving, below the cost of the best so far; and no pair on the ladders is cheaper than the one that is found.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any, NamedTuple

from tiercache.assemble import stride_of
from tiercache.config import StoreConfig
from tiercache.errors import TierCacheError
from tiercache.lab.machine import Machine
from tiercache.lab.model import Work, seconds
from tiercache.lab.tiers import levels_of
from tiercache.lab.work import Asked, ReadCounter, work_of
from tiercache.recording.blocks import RecordedTable

_OCTAVES = 10
"""From a ladder's top to its foot."""

_LEAST_SAMPLED = 1000
"""Slots over a sample with which a policy does about what it would do over the trace."""

_UNITS = (1 << 20, 1 << 10, 1)


class TargetOutOfReach(TierCacheError):
    """No sizes within the limits reach the rate; says what binds."""


class Sizes(NamedTuple):
    """Bytes of each tier; device None without one."""

    device: int | None
    host: int

    def cost(self, dearness: float) -> float:
        """Bytes, those of the device tier counted `dearness` times."""
        return dearness * (self.device or 0) + self.host


class Prediction(NamedTuple):
    """What tiers of these sizes do with the batches that count.

    device_hits, host_hits  shares of the distinct rows asked for; misses is the rest
    reads, read_bytes       of the disk, a token
    tokens_per_s            of a caller who fetches one batch after the other, or whose reads are always begun ahead
    """

    sizes: Sizes
    device_hits: float
    host_hits: float
    reads: float
    read_bytes: float
    tokens_per_s: float

    @property
    def misses(self) -> float:
        return max(1 - self.device_hits - self.host_hits, 0.0)


class Predictor:
    """Predictions for a trace on a machine, each size simulated once. ahead: see `seconds`."""

    def __init__(
        self,
        config: StoreConfig,
        tables: Sequence[RecordedTable],
        machine: Machine,
        asked: Asked,
        reads: ReadCounter | None,
        *,
        rows_per_token: float,
        ahead: bool = False,
    ) -> None:
        self.machine, self.asked, self.ahead = machine, asked, ahead
        self.slot_bytes = stride_of((table.record_bytes for table in tables), config)
        self._config, self._tables, self._reads = config, tables, reads
        self._rows_per_token = rows_per_token
        self._known: dict[Sizes, tuple[Work, Prediction]] = {}

    def __call__(self, sizes: Sizes) -> Prediction:
        """The prediction for sizes. ConfigError where a tier holds no row."""
        return self._found(sizes)[1]

    def rate(self, sizes: Sizes) -> float:
        """Tokens a second."""
        return self(sizes).tokens_per_s

    def ceiling(self, sizes: Sizes) -> float:
        """Tokens a second, had the top tier every row of every batch: what no size can exceed."""
        return self._rate(self._found(sizes)[0].resident)

    def config(self, sizes: Sizes) -> StoreConfig:
        """The config with tiers of these sizes."""
        update: dict[str, Any] = {"host": self._config.host.model_copy(update={"capacity": sizes.host})}
        if sizes.device is not None:
            assert self._config.device is not None
            update["device"] = self._config.device.model_copy(update={"capacity": sizes.device})
        return self._config.model_copy(update=update)

    def books(self, sizes: Sizes) -> int:
        """Bytes of host memory that the books of tiers of these sizes take, beside the records."""
        levels = levels_of(self.config(sizes), self._tables)
        return levels.host.nbytes + (levels.device.nbytes if levels.device is not None else 0)

    @property
    def everything(self) -> int:
        """Bytes of a tier with room for every row of the trace; of a sample, which knows them about, with some more."""
        return round(self.asked.touched * (1 if self.asked.rate == 1 else 1.05)) * self.slot_bytes

    @property
    def least(self) -> int:
        """Bytes of the smallest tier that is worth predicting: of a sample, one of which it has some slots."""
        return self.slot_bytes * (1 if self.asked.rate == 1 else ceil(_LEAST_SAMPLED / self.asked.rate))

    def _found(self, sizes: Sizes) -> tuple[Work, Prediction]:
        if sizes not in self._known:
            work = work_of(self.config(sizes), self._tables, self.asked, self._reads)
            self._known[sizes] = work, self._predicted(sizes, work)
        return self._known[sizes]

    def _predicted(self, sizes: Sizes, work: Work) -> Prediction:
        accesses, tokens = self.asked.accesses, work.total(work.rows) / self._rows_per_token
        below, misses = (work.total(column) / accesses for column in (work.below, work.misses))
        top = 1 - below - misses
        return Prediction(
            sizes,
            device_hits=0.0 if sizes.device is None else top,
            host_hits=top if sizes.device is None else below,
            reads=work.total(work.reads) / tokens,
            read_bytes=work.total(work.num_bytes) / tokens,
            tokens_per_s=self._rate(work),
        )

    def _rate(self, work: Work) -> float:
        return work.total(work.rows) / self._rows_per_token / seconds(self.machine, work, ahead=self.ahead)


def ladder(limit: int, everything: int, least: int, *, steps: int) -> list[int]:
    """Sizes in bytes, ascending, `steps` to an octave, down to a thousandth of the largest, or `least`.

    The largest is `everything` or the limit; all but a limit are whole MiB, or KiB where they are small.
    """
    top = min(_round(everything), limit)
    foot = min(_round(least), top)
    steps_down = range(_OCTAVES * steps + 1)
    return sorted({min(max(_round(ceil(top / 2 ** (down / steps))), foot), top) for down in steps_down})


def _round(num_bytes: int) -> int:
    """Up to a whole unit of which it has 64."""
    unit = next(unit for unit in _UNITS if num_bytes >= 64 * unit or unit == 1)
    return -(-num_bytes // unit) * unit


def smallest(
    rate: Callable[[Sizes], float],
    devices: Sequence[int | None],
    hosts: Sequence[int],
    target: float,
    *,
    dearness: float,
) -> Sizes | None:
    """The cheapest pair of these sizes (ascending) whose rate reaches the target, or None. Of equally cheap ones, that with the
    smaller device tier.
    """
    best: Sizes | None = None
    for device in devices:
        most = len(hosts)
        if best is not None:
            most = sum(Sizes(device, host).cost(dearness) < best.cost(dearness) for host in hosts)
        if not most or rate(Sizes(device, hosts[most - 1])) < target:
            continue
        low, high = 0, most - 1
        while low < high:
            middle = (low + high) // 2
            if rate(Sizes(device, hosts[middle])) >= target:
                high = middle
            else:
                low = middle + 1
        best = Sizes(device, hosts[high])
    return best


def why_not(predict: Predictor, limits: Sizes, target: float) -> str:
    """What keeps tiers within the limits from the target."""
    everything = predict.everything
    reached = predict.rate(limits)
    begin = f"{target:,.0f} tokens/s are out of reach: the limits give {reached:,.0f}"
    ceiling = predict.ceiling(limits)
    if ceiling < target:
        return f"{begin}, and with every row in the top tier {ceiling:,.0f} would be the most: the processor binds"
    host = Sizes(limits.device, max(everything, limits.host))
    ways = [("--ram", host)]
    if limits.device is not None:
        device = max(everything, limits.device)
        ways += [("--hbm", Sizes(device, limits.host)), ("--hbm and --ram", Sizes(device, host.host))]
    for name, sizes in ways:
        if sizes != limits and (more := predict.rate(sizes)) >= target:
            return f"{begin}; with room for every row of the trace {more:,.0f}: {name} binds"
    most = predict.rate(ways[-1][1])
    return (
        f"{begin}, and with room for every row of the trace {most:,.0f}, as it asks for rows that nobody asked for before: "
        "the disk binds"
    )
