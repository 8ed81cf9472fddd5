"""Curves: LRU at every size from one pass over the shipped text and from a sample, and what a live store's curve costs.

The rows are the paper's hashing of the token ids (2- and 3-grams, 8 heads), batches of one row. Distances are means over sizes
from 0.1 % to all of the rows touched. The text is sampled anew by adding a constant to all rows, which changes their hashes and
nothing else.
"""

import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from _common import ROW_BYTES, Computed, Figure, Rows, console, latencies, parser, report

from tiercache import Store
from tiercache.curve import LIMIT, Curve
from tiercache.engram.demo import demo_hashers
from tiercache.lab.distances import lru_hits
from tiercache.lab.sampling import LruCurve, choose, lru_curve, sample
from tiercache.lab.simulator import simulate
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.level import Level
from tiercache.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable

RATE, SAMPLES, SHARE = 0.01, 10, 0.05
_STEP, _HEADS, _TOKENS = 40_503_127, 8, 4
_CAPACITY, _SETS = 1 << 20, {48: 400, 10_000: 12}

Rates = npt.NDArray[np.float64]


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--rounds", type=int, default=5, help="of the curves (%(default)s)")
    options.add_argument("--fetch-rounds", type=int, default=100, help="of the fetches (%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    stream = load_tokens()
    rows = demo_hashers(vocabulary=SHIPPED_VOCABULARY)[0].rows(stream.tokens, stream.documents)
    with console.status("Curves of the text"):
        figures = _offline(rows, arguments.rounds)
    with console.status("The curve of a tier"):
        figures += _online(rows)
        figures += _overhead(arguments.fetch_rounds)
    title = f"Curves: {rows.size:,} accesses of text to {np.unique(rows).size:,} rows, {RATE:.0%} of the rows sampled"
    report("curves", title, figures, arguments)


def _offline(matrix: Rows, rounds: int) -> list[Figure]:
    rows = matrix.reshape(-1)
    exact = lru_curve(rows)
    num_rows = exact.hits.size - 1
    sizes = np.geomspace(0.001 * num_rows, num_rows, 31).astype(np.int64)
    wanted = exact.hit_rate(sizes)
    capacity = int(SHARE * num_rows)
    sampled = sample(rows, rate=RATE)

    def small(policy: str) -> Any:
        part = sample(rows, rate=RATE)
        return part.adjusted(simulate(policy, part.slots(capacity), part.rows))

    calls: dict[str, Callable[[], Any]] = {
        "exact": partial(lru_curve, rows),
        "sampled": partial(lru_curve, rows, rate=RATE),
        "lru": partial(simulate, "lru", capacity, rows),
        "s3fifo": partial(simulate, "s3fifo", capacity, rows),
        "s3fifo sampled": partial(small, "s3fifo"),
    }
    results = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    speed = {name: rows.size / median(runs) / 1e6 for name, runs in seconds.items()}
    others = [_distance(lru_curve(rows + number * _STEP, rate=RATE), sizes, wanted) for number in range(1, SAMPLES + 1)]
    whole = [_distance(_of_ngrams(matrix, number * _STEP), sizes, wanted) for number in range(1, SAMPLES + 1)]
    policy = 100 * abs(results["s3fifo"].hit_rate - results["s3fifo sampled"].hit_rate)
    unit, accesses = "M accesses/s", "points"
    return [
        Figure("sampled LRU, distance from the exact curve", _distance(results["sampled"], sizes, wanted), accesses, at_most=1),
        Figure(f"the same, median of {SAMPLES} other samples", median(others), accesses),
        Figure(f"the same, worst of {SAMPLES} other samples", max(others), accesses),
        Figure(f"whole n-grams sampled, median of {SAMPLES}", median(whole), accesses),
        Figure(f"surplus of the sample, {sampled.rows.size:,} uses", 100 * (sampled.rows.size / sampled.accesses - 1), "%"),
        Figure("sampled LRU, every size", speed["sampled"], unit, "exact, every size", speed["exact"], at_least=30),
        Figure("exact LRU, every size", speed["exact"], unit, f"simulated at {SHARE:.0%}", speed["lru"]),
        Figure(f"sampled s3fifo at {SHARE:.0%}, distance", policy, accesses, at_most=1),
        Figure(f"sampled s3fifo at {SHARE:.0%}", speed["s3fifo sampled"], unit, "simulated", speed["s3fifo"], at_least=30),
    ]


def _distance(curve: LruCurve, sizes: Rows, wanted: Rates) -> float:
    """Mean distance of a curve's hit rates, in points."""
    return float(100 * np.abs(curve.hit_rate(sizes) - wanted).mean())


def _of_ngrams(matrix: Rows, step: int) -> LruCurve:
    """The curve from a sample of n-grams, with all their heads: what hashing rows apart is compared with."""
    ngrams = matrix.reshape(-1, _HEADS)
    rows = ngrams[choose(ngrams[:, 0] + step, round(RATE * 2**32))].reshape(-1)
    accesses = RATE * matrix.size
    return LruCurve(np.clip(lru_hits(rows) + accesses - rows.size, 0, accesses), accesses, RATE)


def _online(matrix: Rows) -> list[Figure]:
    """The curve that a level keeps, in batches of a few tokens, against the exact one of these batches."""
    rows = matrix.reshape(-1)
    step = _TOKENS * matrix.shape[1]
    offsets = np.append(np.arange(0, rows.size, step), rows.size)
    exact = lru_curve(rows, offsets)
    capacity = int(SHARE * (exact.hits.size - 1))
    level = Level(POLICIES["lru"], capacity)
    level.watch(Curve(capacity))
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        level.release(level.plan(rows[begin:end]))
    level.take_notes()
    assert level.curve is not None
    points = level.curve.points(round(exact.accesses))
    distances = [100 * abs(point.hit_rate - exact.hit_rate(point.capacity_slots)) for point in points]
    what = f"a tier's own curve, {capacity:,} slots, 1/8 to 8 x"
    return [
        Figure(f"{what}: mean distance", float(np.mean(distances)), "points", at_most=1),
        Figure(f"{what}: worst", float(np.max(distances)), "points"),
        Figure("its memory", level.curve.nbytes / 2**20, "MiB", at_most=1),
    ]


def _overhead(rounds: int) -> list[Figure]:
    """Fetches of resident rows while the curve is kept, and while it is not, in the same store."""
    random = np.random.default_rng(0)
    config = {"host": {"capacity": _CAPACITY * ROW_BYTES}}
    with Store.open(config, tables={"rows": Computed(4 * _CAPACITY)}) as store:
        resident = random.choice(4 * _CAPACITY, _CAPACITY, replace=False)
        for start in range(0, _CAPACITY, 100_000):
            store.fetch(resident[start : start + 100_000], raw=True)
        counters = store._host.level.counters
        limits = {"without": 0, "with": int(counters[LIMIT])}
        ratios: dict[int, list[float]] = {size: [] for size in _SETS}
        samples: dict[tuple[int, str], list[float]] = {}
        for size, num_sets in _SETS.items():
            out = torch.zeros((size, ROW_BYTES), dtype=torch.uint8)
            for number in range(rounds):
                sets = [torch.from_numpy(resident[random.integers(0, _CAPACITY, size)]) for _ in range(num_sets)]
                took = {}
                for name in list(limits)[:: 1 if number % 2 else -1]:
                    counters[LIMIT] = limits[name]
                    took[name] = latencies(partial(store.fetch, raw=True, out=out), sets)
                    samples.setdefault((size, name), []).append(median(took[name]))
                ratios[size].append(median(took["with"]) / median(took["without"]))
    figures = []
    for size, values in ratios.items():
        without = 1e6 * median(samples[size, "without"])
        what = f"fetch of {size:,} resident rows, by the median ratio of the rounds"
        figures.append(Figure(what, median(values) * without, "us", "no curve kept", without, at_most=1.01))
    return figures


if __name__ == "__main__":
    main()
