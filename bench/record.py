"""Recording: what it adds to a fetch of resident rows, and what a row takes in the file.

The rows are those that a text asks for (DeepSeek-V4.1's hashing of the shipped text, prompts in chunks and decode steps), cut
into batches of one size, for a store that holds them all. A round fetches one part of them four times, twice with a recorder
and twice without, in the order ABBA or BAAB, and has one ratio of times; the figure is the median of the rounds' ratios, as a
host's clock changes by more from second to second than a recorder costs. It is about the thread that fetches; the CPU of the
process has that of the thread that packs and writes as well.
"""

import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from _common import Computed, Figure, Rows, parser, report, timed
from rich.progress import track

from tiercache import Store
from tiercache.engram.deepseek import deepseek_hashers
from tiercache.lab.tokens import SHIPPED_VOCABULARY, load_tokens
from tiercache.lab.trace import serving
from tiercache.recording.codec import Packer, unpack
from tiercache.recording.drain import BLOCK_ROWS

SIZES = (48, 1_000, 100_000)
_TURN_S = 0.1


class _Turn(NamedTuple):
    """Seconds a fetch, or ratios of them: elapsed, CPU of the thread that fetches, CPU of the process."""

    elapsed: float
    thread: float
    process: float


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, directory=False)
    options.add_argument("--tokens", type=int, default=100_000, help="of the shipped text (%(default)s)")
    options.add_argument("--rounds", type=int, default=150, help="(%(default)s)")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rows, num_rows = _rows(arguments.tokens)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as directory:
        for size in SIZES:
            figures += _fetches(rows, num_rows, size, Path(directory), arguments.rounds)
    figures += _codec(rows)
    title = f"Recording: fetches of resident rows, with a recorder and without ({rows.size:,} rows of text)"
    report("record", title, figures, arguments)


def _rows(num_tokens: int) -> tuple[Rows, int]:
    """Rows that the text asks for, in the order of serving, and rows of the table."""
    stream = load_tokens().first(num_tokens)
    hasher = deepseek_hashers((1,), compression=None, compressed_vocab_size=SHIPPED_VOCABULARY)[0]
    return serving(hasher.rows(stream.tokens, stream.documents), stream.documents).rows, hasher.num_rows


def _fetches(rows: Rows, num_rows: int, size: int, directory: Path, rounds: int) -> list[Figure]:
    """Time of a fetch with and without; what was dropped, and what the file took."""
    source = Computed(num_rows)
    batches = [torch.from_numpy(rows[start : start + size]) for start in range(0, rows.size - size, size)]
    out = torch.empty((size, source.record.record_bytes), dtype=torch.uint8)
    capacity = np.unique(rows).size * 2 * source.record.record_bytes
    not_recorded: list[_Turn] = []
    ratios: list[_Turn] = []
    taken = dropped = num_bytes = 0
    with Store.open({"host": {"capacity": capacity}}, tables={"rows": source}) as store:
        _turn(store, batches, out)
        count = min(len(batches), max(1, int(_TURN_S / _turn(store, batches, out).elapsed)))
        asked = cycle(batches)
        for number in track(range(rounds), f"{size:,} rows a fetch", transient=True):
            part = list(islice(asked, count))
            _turn(store, part, out)  # whoever is first finds these rows as near as the others do
            of_round: dict[bool, list[_Turn]] = {False: [], True: []}
            for recording in (number % 2 == 0, number % 2 != 0, number % 2 != 0, number % 2 == 0):
                if not recording:
                    of_round[recording].append(_turn(store, part, out))
                    continue
                path = directory / f"{size}.trace"
                with store.record(path) as recorder:
                    of_round[recording].append(_turn(store, part, out))
                stats = recorder.stats()
                taken, dropped, num_bytes = taken + stats.rows, dropped + stats.dropped_batches, num_bytes + stats.bytes_written
                path.unlink()
            sums = [[sum(each) for each in zip(*of_round[recording], strict=True)] for recording in (True, False)]
            ratios.append(_Turn(*(recorded / alone for recorded, alone in zip(*sums, strict=True))))
            not_recorded += of_round[False]
    base = [1e6 * median(each) for each in zip(*not_recorded, strict=True)]
    elapsed, cpu, all_cpu = (median(each) * alone for each, alone in zip(zip(*ratios, strict=True), base, strict=True))
    what = f"fetch of {size:,} resident rows, recorded"
    return [
        Figure(what, elapsed, "us", "not recorded", base[0], at_most=1.02),
        Figure(f"{what}: CPU of the thread that fetches", cpu, "us", "not recorded", base[1], at_most=1.02),
        Figure(f"{what}: CPU of the process", all_cpu, "us", "not recorded", base[2]),
        Figure(f"{what}: bytes of the file", num_bytes / taken, "B/row"),
        Figure(f"{what}: batches dropped", dropped, "batches", at_most=0),
    ]


def _turn(store: Store, batches: list[torch.Tensor], out: torch.Tensor) -> _Turn:
    """What a fetch takes."""
    clocks = time.perf_counter, time.thread_time, time.process_time
    begin = [clock() for clock in clocks]
    for batch in batches:
        store.fetch(batch, out=out, raw=True)
    return _Turn(*((clock() - since) / len(batches) for clock, since in zip(clocks, begin, strict=True)))


def _codec(rows: Rows) -> list[Figure]:
    """Time and bytes of packing alone."""
    packer = Packer()
    blocks = [rows[start : start + BLOCK_ROWS] for start in range(0, rows.size, BLOCK_ROWS)]
    packed = [each._replace(bits=each.bits.copy(), sequences=each.sequences.copy()) for each in map(packer.pack, blocks)]
    num_bytes = sum(each.bits.nbytes + each.sequences.nbytes for each in packed)
    pack = [timed(lambda: [packer.pack(block) for block in blocks]).cpu_seconds for _ in range(5)]
    sizes = [block.size for block in blocks]
    back = [timed(partial(list, map(unpack, packed, sizes))).cpu_seconds for _ in range(5)]
    return [
        Figure("packing", 1e9 * median(pack) / rows.size, "CPU ns/row"),
        Figure("unpacking", 1e9 * median(back) / rows.size, "CPU ns/row"),
        Figure("packed, the text in its order", num_bytes / rows.size, "B/row"),
    ]


if __name__ == "__main__":
    main()
