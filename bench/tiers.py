"""Tiers: what the device tier's books cost the host, with its stand-in on the CPU, against a store without one.

48 rows that all lie in the uppermost tier; each store serves every set of rows once a round, in a block of its own.
"""

from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from _common import ROW_BYTES, Computed, Figure, latencies, parser, report

from tiercache import Store

BATCH, _SETS, _NUM_ROWS, _CAPACITY = 48, 500, 1 << 20, 256 << 20


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--rounds", type=int, default=20, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    sets = [torch.from_numpy(random.choice(_NUM_ROWS, BATCH, replace=False)) for _ in range(_SETS)]
    host = {"capacity": _CAPACITY}
    configs: dict[str, dict[str, Any]] = {
        "host": {"host": host},
        "device": {"host": host, "device": {"device": "cpu", "capacity": _CAPACITY}},
    }
    stores = {name: Store.open(config, tables={"rows": Computed(_NUM_ROWS)}) for name, config in configs.items()}
    for store in stores.values():
        for each in sets * 2:
            store.fetch(each)
    p50 = {name: 1e6 * median(runs) for name, runs in _measure(stores, sets, arguments.rounds).items()}
    for store in stores.values():
        stats = store.stats()
        top = stats.device or stats.host
        if top.hit_rate < 0.9 or stats.flights:
            raise SystemExit("the rows were not in the uppermost tier")
        store.close()
    figures = [
        Figure("prefetch, then take(out=)", p50["device pair"], "us", "host tier", p50["host pair"], at_most=1.3),
        Figure("take(out=) alone", p50["device take"], "us", "host tier", p50["host take"], at_most=1.3),
        Figure("fetch(out=)", p50["device fetch"], "us", "host tier", p50["host fetch"]),
    ]
    report("tiers", f"Tiers: {BATCH} rows of {ROW_BYTES} B in the device tier's stand-in on the CPU", figures, arguments)


def _measure(stores: dict[str, Store], sets: list[torch.Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds a call, by store and kind."""
    out = torch.empty((BATCH, ROW_BYTES // 2), dtype=torch.bfloat16)
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, store in stores.items():
            samples.setdefault(f"{name} pair", []).extend(latencies(partial(_pair, store, out), sets))
        for name, store in stores.items():
            tickets = [store.prefetch(each) for each in sets]
            samples.setdefault(f"{name} take", []).extend(latencies(partial(_take, out), tickets))
        for name, store in stores.items():
            samples.setdefault(f"{name} fetch", []).extend(latencies(partial(store.fetch, out=out), sets))
    return samples


def _pair(store: Store, out: torch.Tensor, rows: torch.Tensor) -> None:
    store.prefetch(rows).take(out=out)


def _take(out: torch.Tensor, ticket: Any) -> None:
    ticket.take(out=out)


if __name__ == "__main__":
    main()
