"""Hot: random resident rows out of a full host tier, against an embedding on a resident tensor of the same bytes.

One thread each. The tier is filled with random rows of a table four times its size, in random order.
"""

from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from _common import GIB, ROW_BYTES, Computed, Figure, Rows, console, parser, report, timed

from tiercache import Store

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = _FILL = 100_000


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--size", type=float, default=2, help="of the host tier, in GiB (%(default)s)")
    options.add_argument("--rounds", type=int, default=40, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    capacity = int(arguments.size * GIB) // ROW_BYTES
    random = np.random.default_rng(0)
    source = Computed(4 * capacity)
    with Store.open({"host": {"capacity": capacity * ROW_BYTES}}, tables={"rows": source}) as store:
        resident = random.choice(source.num_rows, capacity, replace=False)
        with console.status("Filling the host tier"):
            for start in range(0, capacity, _FILL):
                store.fetch(resident[start : start + _FILL], raw=True)
        before = store.stats().host
        samples = _measure(store, resident, arguments.rounds)
        after = store.stats().host
        if before.used_slots != capacity or after.misses != before.misses:
            raise SystemExit("the host tier was not full, or did not hold every row asked for")
    rate = {name: BATCH / median(runs) / 1e6 for name, runs in samples.items()}
    unit = "M rows/s"
    figures = [
        Figure("fetch(raw=True)", rate["fetch"], unit, "F.embedding, uint8", rate["embedding"], at_least=1.0),
        Figure("fetch(raw=True)", rate["fetch"], unit, "F.embedding, bfloat16", rate["embedding bf16"], at_least=1.0),
        Figure("fetch(raw=True, out=)", rate["out"], unit, "index_select(out=), uint8", rate["select"], at_least=1.0),
    ]
    report("hot", f"Hot: {BATCH:,} resident rows of {ROW_BYTES} B out of {arguments.size:g} GiB", figures, arguments)


def _measure(store: Store, resident: Rows, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each contestant, interleaved, every call with random rows of its own."""
    tensor = torch.ones((resident.size, ROW_BYTES), dtype=torch.uint8)
    out = torch.zeros((BATCH, ROW_BYTES), dtype=torch.uint8)
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fetch": partial(store.fetch, raw=True),
        "embedding": partial(torch.nn.functional.embedding, weight=tensor),
        "embedding bf16": partial(torch.nn.functional.embedding, weight=tensor.view(torch.bfloat16)),
        "out": partial(store.fetch, raw=True, out=out),
        "select": partial(torch.index_select, tensor, 0, out=out),
    }
    random = np.random.default_rng(1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            places = random.integers(0, resident.size, BATCH)
            rows = torch.from_numpy(resident[places] if name in ("fetch", "out") else places)
            sample = timed(partial(call, rows)).seconds
            if number >= 2:
                samples[name].append(sample)
    return samples


if __name__ == "__main__":
    main()
