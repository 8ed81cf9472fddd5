"""GPU: fetches by share of rows in device memory, against an embedding in device memory and a gather over the bus.

Needs a GPU and the [gpu] extra: `make gpu`. Times are of the stream, between two events; all contestants take turns.
"""

from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch
from _common import ROW_BYTES, Computed, Figure, parser, report

from tiercache import Store

_NUM_ROWS, _TOKENS = 1 << 20, 64
_SHARES = (1.0, 0.9, 0.5, 0.0)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--rounds", type=int, default=200, help="(%(default)s)")
    options.add_argument("--rows", type=int, default=24, help="a token (%(default)s)")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py: not measured, as there is no GPU (torch.cuda.is_available() is False)")
        return
    size = _TOKENS * arguments.rows
    stride = -(-ROW_BYTES // 16) * 16
    config = {
        "host": {"capacity": stride * _NUM_ROWS},
        "device": {"capacity": stride * _NUM_ROWS // 2, "promotion": stride * _NUM_ROWS},
    }
    with Store.open(config, tables={"rows": Computed(_NUM_ROWS)}) as store:
        for start in [*range(0, _NUM_ROWS, 1 << 15), *range(0, _NUM_ROWS // 2, 1 << 15)]:
            store.fetch(np.arange(start, start + (1 << 15)))
        weight = torch.empty((_NUM_ROWS, ROW_BYTES // 2), dtype=torch.bfloat16, device="cuda")
        calls = {f"{share:.0%}": partial(_fetch, store, share, size) for share in _SHARES}
        samples = _measure({**calls, "embedding": partial(_embedding, weight, size)}, arguments.rounds)
    p50 = {name: 1e3 * median(runs) for name, runs in samples.items()}
    figures = [
        Figure(f"{size:,} rows, {share:.0%} in device memory", p50[f"{share:.0%}"], "us", "F.embedding", p50["embedding"])
        for share in _SHARES
    ]
    name = torch.cuda.get_device_name()
    report("gpu", f"GPU ({name}): {_TOKENS} tokens of {arguments.rows} rows of {ROW_BYTES} B", figures, arguments)


def _fetch(store: Store, share: float, size: int, random: np.random.Generator) -> Callable[[], object]:
    """A take of prefetched rows of which this share rose to the device earlier."""
    above = int(size * share)
    rows = np.append(
        random.integers(0, _NUM_ROWS // 2, above), random.integers(_NUM_ROWS // 2, _NUM_ROWS, size - above)
    )
    return store.prefetch(rows).take


def _embedding(weight: torch.Tensor, size: int, random: np.random.Generator) -> Callable[[], object]:
    rows = torch.from_numpy(random.integers(0, _NUM_ROWS, size)).cuda()
    return partial(torch.nn.functional.embedding, rows, weight)


def _measure(
    calls: dict[str, Callable[[np.random.Generator], Callable[[], object]]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of the stream a call, each with rows of its own."""
    random = np.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 10):
        for name, prepare in calls.items():
            call = prepare(random)
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            if number >= 10:
                samples[name].append(begin.elapsed_time(end))
            del result
    return samples


if __name__ == "__main__":
    main()
